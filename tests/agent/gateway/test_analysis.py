"""The analysis in its child process: real processes, real kills; what fails sends nothing."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent.gateway import analysis as module
from agent.gateway.analysis import Analysis, needed
from agent.gateway.analyzer import NAMES_HINT, names_scan
from agent.policy.outgoing import Outgoing, Turn
from agent.policy.rules import Provider, Redaction, Rules, Sensitive
from shared.errors import Refused, Retryable

FAR = Provider(name="far", kind="openai", secret="op://vault/far/key")
NEAR = Provider(name="near", kind="local", url="http://127.0.0.1:11434/v1")
CARD = "4111 1111 1111 1111"
RULES = Rules(providers=(FAR,), sensitive=Sensitive(words=("geheim",)), redaction=Redaction(time_out_s=30))
FAKE = """
import argparse, os, socket, time
from agent.gateway import analyzer as a
parser = argparse.ArgumentParser(); parser.add_argument("--fd", type=int)
sock = socket.socket(fileno=parser.parse_args().fd); stream = sock.makefile("rb")
while len(head := stream.read(4)) == 4:
    asked = a._decode_question(stream.read(a.HEAD.unpack(head)[0]))
    text = "" if isinstance(asked, a.Setup) else " ".join(asked.texts)
    if "hang" in text:
        time.sleep(600)
    if "crash" in text:
        os._exit(1)
    if "lie" in text:
        answer = a.Findings((a.Found("card", 0, 0, 10_000, 0),), len(asked.texts))
    elif "few" in text:
        answer = a.Findings((), len(asked.texts) - 1)
    elif "fail" in text:
        answer = a.Unfinished("it failed")
    elif "garbage" in text:
        sock.sendall(a.HEAD.pack(3) + b"xyz"); continue
    else:
        answer = a.Prepared() if isinstance(asked, a.Setup) else a.Findings((), len(asked.texts))
    sock.sendall(a.framed(answer))
"""
"""A child that does what its text says."""


def chat(text: str) -> Outgoing:
    return Outgoing(model="m", turns=(Turn(role="user", content=text),))


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not holds():
            await asyncio.sleep(0.02)


@asynccontextmanager
async def running(rules: Rules = RULES, child: Sequence[str] = module.CHILD) -> AsyncIterator[Analysis]:
    analysis = Analysis(child)
    analysis.start(rules)
    try:
        await until(lambda: analysis.ready or "install" in analysis.problem)
        yield analysis
    finally:
        await analysis.close()


@pytest.fixture
def fake(tmp_path: Path) -> Sequence[str]:
    (tmp_path / "fake.py").write_text(FAKE)
    return (sys.executable, str(tmp_path / "fake.py"))


@pytest.mark.parametrize(
    ("rules", "wanted"),
    [
        (Rules(), False),
        (Rules(providers=(NEAR,)), False),
        (Rules(providers=(FAR,)), True),
        (Rules(sensitive=Sensitive(words=("x",))), True),
        (Rules(sensitive=Sensitive(patterns=("x",))), True),
        (Rules(sensitive=Sensitive(kinds=("card",))), True),
    ],
)
async def test_a_process_is_started_only_where_a_policy_needs_it(rules: Rules, wanted: bool) -> None:
    assert needed(rules) is wanted
    analysis = Analysis(("/nonexistent",))
    analysis.start(rules)
    assert (analysis._task is not None) is wanted
    await analysis.close()


async def test_findings_of_the_child_are_replaced_here_and_a_new_policy_is_followed() -> None:
    async with running() as analysis:
        first = await analysis.redacted(chat(f"pay {CARD}"), FAR)
        second = await analysis.redacted(chat(f"pay {CARD}"), FAR)
        assert (first.provider, first.category, dict(first.counts)) == ("far", "outside", {"card": 1})
        assert CARD not in first.outgoing.turns[0].content
        assert set(first.originals) != set(second.originals)
        assert await analysis.sensitive(["streng GEHEIM"]) == ("words[0]",)
        assert await analysis.sensitive([]) == ()
        with pytest.raises(Refused):
            await analysis.redacted(Outgoing(model="m", turns=(), tools=("{",)), FAR)
        analysis.start(Rules(providers=(FAR,), redaction=Redaction(patterns=("PRJ-[0-9]+",), time_out_s=30)))
        assert dict((await analysis.redacted(chat("PRJ-77 geheim"), FAR)).counts) == {"pattern": 1}
        assert await analysis.sensitive(["geheim"]) == ()
        analysis.start(Rules())
        assert not analysis.ready
        with pytest.raises(Retryable) as raised:
            await analysis.redacted(chat("x"), FAR)
        assert raised.value.code == "analysis_failed"


@pytest.mark.parametrize("text", ["hang", "crash", "lie", "few", "fail", "garbage"])
async def test_an_analysis_that_fails_sends_nothing_and_the_next_one_works(text: str, fake: Sequence[str]) -> None:
    rules = Rules(providers=(FAR,), redaction=Redaction(time_out_s=1 if text == "hang" else 30))
    async with running(rules, fake) as analysis:
        first = analysis._running
        with pytest.raises(Retryable) as raised:
            await analysis.redacted(chat(f"{text} {CARD}"), FAR)
        assert raised.value.code == "analysis_failed"
        assert CARD not in raised.value.message
        stays = text in ("lie", "few", "fail")
        await until(lambda: analysis.ready and (analysis._running is first) == stays)
        again = Rules(providers=(FAR,), redaction=Redaction(time_out_s=30))
        analysis.start(again)
        assert (await analysis.redacted(chat("fine"), FAR)).counts == {}


async def test_those_who_wait_behind_a_hanging_analysis_are_refused(fake: Sequence[str]) -> None:
    async with running(Rules(providers=(FAR,), redaction=Redaction(time_out_s=1)), fake) as analysis:
        asked = [asyncio.create_task(analysis.redacted(chat(text), FAR)) for text in ("hang", "fine", "fine")]
        ended = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(one, Retryable) and one.code == "analysis_failed" for one in ended)


async def test_a_client_that_leaves_does_not_disturb_the_next(fake: Sequence[str]) -> None:
    async with running(child=fake) as analysis:
        task = asyncio.create_task(analysis.redacted(chat("fine"), FAR))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await analysis.redacted(chat("also fine"), FAR)).counts == {}


async def test_a_killed_child_is_started_again(fake: Sequence[str]) -> None:
    async with running(child=fake) as analysis:
        child = analysis._running
        assert child is not None
        os.kill(child.pid, signal.SIGKILL)
        # nobody has to ask for it to be noticed
        await until(lambda: analysis.ready and analysis._running is not child)
        assert (await analysis.redacted(chat("fine"), FAR)).counts == {}


async def test_names_without_a_model_refuse_with_what_to_install() -> None:
    if shutil.which("spacy"):
        pytest.skip("spaCy is installed")
    async with running(Rules(providers=(FAR,), redaction=Redaction(names=True))) as analysis:
        assert analysis.problem == NAMES_HINT
        with pytest.raises(Retryable) as raised:
            await analysis.redacted(chat("x"), FAR)
        assert "install spacy" in raised.value.message
    with pytest.raises(Refused):
        names_scan()


PROBE = """
import os, socket, sys
from agent.gateway import analyzer as a
held = socket.socketpair()
analyzer = a._Analyzer()
analyzer.answer(a.Setup(a.Rules()))
a.open_nothing_more()
texts = ("AKIAIOSFODNN7EXAMPLE, 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, +49 30 1234567, +81 3-1234-5678",)
for n in range(1000):
    found = analyzer.answer(a.Find(texts, ())).found
assert [one.kind for one in found] == ["secret", "secret", "phone", "phone"], found
for open_something in (lambda: socket.socket(), lambda: open("/etc/hosts"), lambda: os.pipe()):
    try:
        open_something()
    except OSError as error:
        assert error.errno == 24, error
    else:
        raise SystemExit("something was opened")
print("ok")
"""


def test_the_child_can_open_nothing_and_leaves_nothing_in_a_fresh_home(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    command = [sys.executable, "-c", PROBE]
    trace = tmp_path / "trace"
    if strace := shutil.which("strace"):
        command = [strace, "-f", "-e", "trace=connect,sendto,bind", "-o", str(trace), *command]
    environ = {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": "", "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=250)
    assert run.stdout == "ok\n", run.stderr
    assert list(home.iterdir()) == []
    if strace:
        assert "AF_INET" not in trace.read_text()
