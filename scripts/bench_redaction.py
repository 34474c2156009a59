"""``make bench-redaction``: recall, false findings, speed and isolation of redaction, each against its bar.

Values come from two generators that share no code with the detectors (scripts/redaction_corpus.py). Every type stands
alone, with the lower end of its 95 % interval (Wilson). Times count processor time of this process, best of three.
"""

import asyncio
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from agent.gateway.analysis import Analysis
from agent.gateway.analyzer import secret_scan
from agent.policy.outgoing import Outgoing, Piece, Turn
from agent.policy.redaction import Redacted
from agent.policy.redaction.detectors import Detectors
from agent.policy.redaction.replacing import NONCE_LETTERS, redact
from agent.policy.redaction.restoring import Restorer
from agent.policy.rules import Provider, Redaction, Rules
from scripts.common import parser, quantile, warn_if_busy
from scripts.redaction_corpus import SENTENCES, VARIANTS, generators, is_valid_phone, manuals
from shared.errors import Retryable

FAR = Provider(name="far", kind="openai", secret="op://vault/far/key")
RUNS = ("1", "@", "A1", "abcdEF/+", ".", "x", "a@", "1 ", "0 2 ", "a.", "\\u00", "%41", "eyJ.", "DE89 ", "+49 ", "ab ")
"""What is repeated to a megabyte."""
ISOLATED = """
import sys
from agent.gateway import analyzer as a
calls = []
sys.addaudithook(lambda event, args: calls.append(event) if event in ("socket.connect", "socket.getaddrinfo") else None)
analyzer = a._Analyzer()
analyzer.answer(a.Setup(a.Rules()))
a.open_nothing_more()
for n in range(1000):
    analyzer.answer(a.Find(("key 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, +81 3-1234-5678, jane@example.com",), ()))
print(len(calls))
"""


class Row(NamedTuple):
    """One line of the table."""

    name: str
    figure: str
    bar: str
    ok: bool


def wilson(hits: int, count: int) -> float:
    """The lower end of a share's 95 % interval."""
    z2, share = 1.96**2, hits / count
    return (share + z2 / (2 * count) - 1.96 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))) / (
        1 + z2 / count
    )


def recall(detectors: Detectors, count: int) -> Iterator[Row]:
    """Each type of each generator apart: a value counts when each of its letters and digits is covered."""
    rng = random.Random(1)
    for who, types in generators(int(time.time()) % 100_000).items():
        for name, make in types.items():
            phone = name.removeprefix("phone ") if name.startswith("phone ") else ""
            hits = total = 0
            while total < count:
                value = make()
                if phone and not is_valid_phone(value.split("x")[0], phone):
                    continue
                total += 1
                hits += covered(detectors, rng.choice(SENTENCES).format(value), value)
            low, bar = wilson(hits, total), 0.98 if name.startswith("phone") else 0.995
            figure = f"{hits}/{total} = {hits / total:.2%}, at least {low:.2%}"
            yield Row(f"recall, {who}: {name}", figure, f">= {bar:.1%}", low >= bar)


def covered(detectors: Detectors, text: str, value: str) -> bool:
    """Whether no letter or digit of a value is left."""
    start = text.index(value)
    seen = {n for one in detectors.find([text]) for n in range(one.start, one.end)}
    return all(n in seen or not text[n].isalnum() for n in range(start, start + len(value)))


def spellings(detectors: Detectors, count: int) -> Iterator[Row]:
    """Every spelling, over checksummed ids, phones and keys."""
    types = {name: make for name, make in generators(5)["own"].items() if name not in ("email", "key pem")}
    for variant, write in VARIANTS.items():
        hits = total = 0
        for make in types.values():
            for _ in range(count):
                value = write(make())
                total += 1
                hits += covered(detectors, f"My value is {value} , thanks", value)
        yield Row(f"spelling: {variant}", f"{hits}/{total}", ">= 99 %", hits >= 0.99 * total)


def false_findings(detectors: Detectors, most: int) -> Iterator[Row]:
    """In manuals; an address in them is one, so addresses are counted apart."""
    size, found = 0, Counter[str]()
    for _, text in manuals():
        size += len(text)
        found.update(one.kind for one in detectors.find([text]))
        if size >= most:
            break
    addresses, keys = found.pop("email", 0), found["secret"]
    rate = found.total() / (size / 100_000)
    yield Row("manuals read", f"{size / 1e6:.1f} MB, {addresses} addresses in them", ">= 1 MB", size >= 1_000_000)
    yield Row("false findings per 100 KB", f"{rate:.2f} ({dict(found)})", "<= 1", rate <= 1)
    yield Row("false keys per MB", f"{keys / (size / 1e6):.2f}", "0", keys == 0)


def dense(detectors: Detectors) -> Iterator[Row]:
    """4 KB in which every sentence holds a value."""
    rng, own = random.Random(2), generators(3)["own"]
    names = [name for name in own if name != "key pem"]

    def text() -> str:
        said = ""
        while len(said) < 4096:
            said += rng.choice(SENTENCES).format(own[rng.choice(names)]()) + " "
        return said[:4096]

    texts = [text() for _ in range(100)]
    times = [best(partial(detectors.find, [one])) for one in texts]
    found = statistics.median(len(detectors.find([one])) for one in texts)
    p50 = f"p50 {statistics.median(times) * 1e3:.1f} ms, {found:.0f} found"
    yield Row("4 KB with values in every sentence", p50, "", True)
    p99 = quantile(times, 0.99)
    yield Row("the same, p99", f"{p99 * 1e3:.1f} ms", "<= 10 ms", p99 <= 0.01)


def best(work: Callable[[], object], rounds: int = 3) -> float:
    """The least processor time in seconds."""
    times = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


def linear(detectors: Detectors) -> Iterator[Row]:
    """Four times the text may cost at most six times the time."""
    for run in RUNS:
        quarter, whole = (best(partial(detectors.find, [(run * n)[:n]]), 1) for n in (250_000, 1_000_000))
        figure = f"{whole:.2f} s a MB, {whole / quarter:.1f} times a quarter's"
        yield Row(f"1 MB of {run!r}", figure, "<= 6 times", whole <= 6 * quarter + 0.05)


def isolation() -> Iterator[Row]:
    """A fresh HOME: at load, in the first and the thousandth scan."""
    with tempfile.TemporaryDirectory() as home:
        trace = Path(home) / "trace"
        Path(home, "home").mkdir()
        command = ["strace", "-f", "-e", "trace=connect", "-o", str(trace), sys.executable, "-c", ISOLATED]
        try:
            run = subprocess.run(command, env={"HOME": f"{home}/home"}, capture_output=True, text=True, check=False)
            seen = trace.read_text().count("AF_INET")
        except FileNotFoundError:
            run = subprocess.run(command[6:], env={"HOME": f"{home}/home"}, capture_output=True, text=True, check=False)
            seen = 0
        asked = run.stdout.split() or ["failed"]
        left = len(list(Path(home, "home").iterdir()))
    yield Row(
        "connections at load and in 1,000 scans", f"{seen}, {asked[0]} by Python", "0", (seen, asked[0]) == (0, "0")
    )
    yield Row("files left in a fresh HOME", str(left), "0", left == 0)


def restoring(detectors: Detectors) -> Iterator[Row]:
    """Every split into three of an answer, and two requests at the same time."""
    sent = [_sent(detectors, f"{who}@example.com 4111 1111 1111 1111") for who in ("ann", "bob")]
    answers = [" E " + ", ".join(one.originals) + " C" for one in sent]
    wanted = [" E " + ", ".join(one.originals.values()) + " C" for one in sent]
    splits = wrong = shared = 0
    answer = answers[0]
    for first in range(len(answer) + 1):
        for second in range(first, len(answer) + 1):
            restorer = Restorer(sent[0])
            parts = (answer[:first], answer[first:second], answer[second:])
            splits += 1
            told = "".join(restorer.piece(Piece(text=one)).text for one in parts) + restorer.end().text
            wrong += told != wanted[0]
    both, telling = [Restorer(one) for one in sent], ["", ""]
    for at in range(max(map(len, answers))):
        for n in (0, 1):
            telling[n] += both[n].piece(Piece(text=answers[n][at : at + 1])).text
    shared = sum(a + b.end().text != c for a, b, c in zip(telling, both, wanted, strict=True))
    yield Row("splits of an answer restored otherwise", f"{wrong} of {splits}", "0", wrong == 0)
    yield Row("two requests that shared a map", str(shared), "0", shared == 0)


def _sent(detectors: Detectors, text: str) -> Redacted:
    nonce = "".join(random.choice(NONCE_LETTERS) for _ in range(48))
    return redact(Outgoing(model="m", turns=(Turn(role="user", content=text),)), FAR, detectors, nonce=nonce)


async def failing() -> list[Row]:
    """A child that never answers: what a caller gets, and what could leave."""
    rules = Rules(providers=(FAR,), redaction=Redaction(time_out_s=0.5))
    analysis = Analysis((sys.executable, "-c", "import time; time.sleep(600)"))
    analysis.start(rules)
    analysis.ready = True  # as if it had hung after its start
    refused = 0
    for _ in range(20):
        try:
            await analysis.redacted(Outgoing(model="m", turns=(Turn(role="user", content="x"),)), FAR)
        except Retryable as error:
            refused += error.code == "analysis_failed"
        analysis.ready = True
    await analysis.close()
    return [Row("requests refused while the analysis hangs", f"{refused} of 20, 0 bytes made", "all", refused == 20)]


def main() -> int:
    """Print the table; 1 where a bar is missed."""
    options = parser(__doc__)
    options.add_argument("--values", type=int, default=2000, help="values of each type")
    options.add_argument("--manuals", type=int, default=3_000_000, help="characters of manuals")
    given = options.parse_args()
    warn_if_busy()
    detectors, failed = Detectors(Rules(), scan=secret_scan()), 0
    parts: list[Callable[[], Iterator[Row]]] = [
        lambda: dense(detectors),
        lambda: linear(detectors),
        lambda: recall(detectors, given.values),
        lambda: spellings(detectors, max(1, given.values // 100)),
        lambda: false_findings(detectors, given.manuals),
        isolation,
        lambda: restoring(detectors),
        lambda: iter(asyncio.run(failing())),
    ]
    for part in parts:
        for row in part():
            failed += not row.ok
            print(f"{'PASS' if row.ok else 'FAIL'}  {row.name:42} {row.figure:50} {row.bar}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
