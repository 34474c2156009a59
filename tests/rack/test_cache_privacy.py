"""Two keys: what one has sent shows in nothing that the other is told, unless they share a cache group."""

import itertools
import json
import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import zstandard

from agent.config import hash_key
from scripts.fetch_demo_model import MAIN, default_folder
from tests.rack.harness import Agent, Answer, model, rack, until

GROUP = "MARKEDgroup"
KEYS = {"alice": "", "bob": "", "carol": GROUP, "dave": GROUP}
"""Keys by their cache group; each is its own secret."""
EXTRA = "".join(
    f'[[keys]]\nid = "{name}"\nsha256 = "{hash_key(name)}"\ncache_group = "{group}"\n' for name, group in KEYS.items()
)
GUESSES = 200
WORDS = 240
TELLS = 1e-6


class Told(NamedTuple):
    """What the client of a guess is told, or can measure."""

    cached_tok: int
    cached_n: int
    prompt_ms: float
    queue_ms: float
    elsewhere: bool
    wall_s: float


def send(agent: Agent, key: str, text: str) -> Answer:
    """One request of a key."""
    answer = agent.chat(text, headers={"Authorization": f"Bearer {key}"}, max_tokens=1, timings=True)
    assert answer.status == 200, answer.body
    return answer


def cached_tok(answer: Answer) -> int:
    """Prompt tokens that came from a cache, as the client is told."""
    return int(answer.json["usage"]["prompt_tokens_details"]["cached_tokens"])


def told(agent: Agent, key: str, text: str) -> Told:
    """Send a guess and note everything about the answer that could depend on another key."""
    began = time.perf_counter()
    answer = send(agent, key, text)
    wall_s = time.perf_counter() - began
    timings = answer.json["timings"]
    elsewhere = answer.headers["X-Mlxrack-Node"] != agent.node
    return Told(cached_tok(answer), timings["cached_n"], timings["prompt_ms"], timings["queue_ms"], elsewhere, wall_s)


def text_of(draw: random.Random) -> str:
    """A document of its own, its secret in the first words."""
    return " ".join(f"{draw.randrange(10_000)}" for _ in range(WORDS))


def p_value(left: Sequence[float], right: Sequence[float]) -> float:
    """How likely two samples of one distribution differ as much as these: Mann and Whitney's test by ranks, two-sided,
    ties corrected; of numbers that are all equal, 1. Ranks do not care how late a busy machine wakes a sleeper."""
    both = sorted([*left, *right])
    ranks = {value: both.index(value) + (count + 1) / 2 for value, count in Counter(both).items()}
    n, m = len(left), len(right)
    ties = sum(count**3 - count for count in Counter(both).values())
    variance = n * m / 12 * (n + m + 1 - ties / ((n + m) * (n + m - 1)))
    u = sum(ranks[value] for value in left) - n * (n + 1) / 2
    return 1.0 if variance <= 0 else math.erfc(abs(u - n * m / 2) / math.sqrt(2 * variance))


def test_the_test_by_ranks_tells_samples_apart() -> None:
    draw = random.Random(1)
    same = [[draw.gauss(0, 1) for _ in range(100)] for _ in range(50)]
    found = [p_value(one, other) for one, other in itertools.pairwise(same)]
    assert 0.2 < sum(p < 0.5 for p in found) / len(found) < 0.8
    assert p_value(same[0], [value + 1 for value in same[1]]) < TELLS
    assert p_value([0] * 100, [0] * 100) == 1.0
    assert p_value([0] * 100, [0] * 50 + [1] * 50) < TELLS
    assert p_value([1, 2, 3], [4, 5, 6]) == pytest.approx(0.0495, abs=1e-3)


@pytest.fixture(scope="module")
def gateways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Agent]]:
    """Two nodes with four keys; a third has a model of its own."""
    served = [model(rows=4, fake_prefill_tps=20_000.0, fake_cache_tok=500_000)]
    far = [model("far", fake_cache_tok=100_000)]
    with rack(tmp_path_factory.mktemp("rack"), served, served, far, extra=EXTRA) as agents:
        yield agents


def has_heard(near: Agent, far: Agent, key: str, draw: random.Random) -> None:
    """Wait until one gateway knows what the other's cache held when this began."""

    def heard() -> bool:
        text = text_of(draw)
        assert send(far, key, text).headers["X-Mlxrack-Node"] == far.node
        time.sleep(0.2)
        return send(near, key, text).headers["X-Mlxrack-Node"] == far.node

    until(heard, f"{near.node} knows the prefixes of {far.node}")


def guessed(gateways: Sequence[Agent], victim: str, attacker: str) -> dict[str, float]:
    """The victim sends documents at one gateway; the attacker sends the same ones and others of their kind at another,
    in random order. For each thing told: how likely the difference between right and wrong guesses is chance."""
    near, far, _ = gateways
    draw = random.Random(f"{victim} {attacker}")
    right = [text_of(draw) for _ in range(GUESSES // 2)]
    for text in right:
        send(far, victim, text)
    has_heard(near, far, victim, draw)
    guesses = [(text, True) for text in right] + [(text_of(draw), False) for _ in right]
    draw.shuffle(guesses)
    found = [(told(near, attacker, f"{text} Is that so?"), is_right) for text, is_right in guesses]
    return {
        name: p_value([getattr(one, name) for one, r in found if r], [getattr(one, name) for one, r in found if not r])
        for name in Told._fields
    }


@pytest.mark.timeout(900)
def test_two_hundred_guesses_tell_nothing_about_another_key(gateways: list[Agent]) -> None:
    found = guessed(gateways, "alice", "bob")
    print("isolated:", {name: f"{p:.2g}" for name, p in found.items()})
    assert (found.pop("cached_tok"), found.pop("cached_n")) == (1.0, 1.0), "the same for all guesses"
    assert {name: p for name, p in found.items() if p < TELLS} == {}


@pytest.mark.timeout(900)
def test_two_hundred_guesses_tell_what_another_key_of_the_group_has_sent(gateways: list[Agent]) -> None:
    """So the test above would see it."""
    found = guessed(gateways, "carol", "dave")
    print("one cache group:", {name: f"{p:.2g}" for name, p in found.items()})
    assert max(found[name] for name in ("cached_tok", "cached_n", "prompt_ms", "elsewhere")) < TELLS


@pytest.mark.parametrize("door", [0, 1, 2], ids=["from n1", "from n2", "at the worker"])
def test_a_forwarded_request_takes_its_namespace_along(gateways: list[Agent], door: int) -> None:
    """At whatever gateway: a key finds on the worker what it has sent, and what its group has."""
    agent, text = gateways[door], text_of(random.Random(door))

    def found(key: str, at: Agent) -> int:
        answer = at.chat(text, model="far", headers={"Authorization": f"Bearer {key}"}, max_tokens=1)
        assert (answer.status, answer.headers["X-Mlxrack-Node"]) == (200, "n3")
        return cached_tok(answer)

    assert [found(key, agent) for key in ("alice", "bob", "carol")] == [0, 0, 0]
    for other in gateways:
        assert min(found(key, other) for key in ("alice", "bob", "carol", "dave")) >= WORDS - 16


def test_several_answers_and_streams_have_the_namespace_of_their_key(gateways: list[Agent]) -> None:
    near, text = gateways[0], text_of(random.Random("several"))
    for key, expected in (("alice", 0), ("bob", 0), ("alice", WORDS - 16), ("bob", WORDS - 16)):
        headers = {"Authorization": f"Bearer {key}"}
        whole = near.chat(text, headers=headers, n=2, max_tokens=2)
        assert whole.status == 200
        assert (cached_tok(whole) >= expected) if expected else (cached_tok(whole) == 0)
    body = {"model": "m", "prompt": text, "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}
    for key, hit in (("alice", False), ("bob", False), ("alice", True)):
        headers = {"Authorization": f"Bearer {key}"}
        answer = near.request("POST", "/v1/completions", json.dumps(body).encode(), headers)
        last = json.loads(answer.body.decode().split("data: ")[-2])
        assert (last["usage"]["prompt_tokens_details"]["cached_tokens"] > 0) == hit, key


def test_no_log_and_no_batch_names_a_namespace(gateways: list[Agent]) -> None:
    for agent in gateways:
        send(gateways[0], "carol", "hello")
        agent.admin("POST", "seal")
    files = [path for path in gateways[0].folder.rglob("*") if path.is_file() and path.suffix != ".toml"]
    assert any(path.name == "agent.jsonl" for path in files)
    segments = [path for path in files if path.suffix == ".mpz"]
    assert segments
    unpacked = [zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read() for path in segments]
    assert any(b"carol" in raw for raw in unpacked), "a key's id is"
    assert not [raw for raw in (*unpacked, *(path.read_bytes() for path in files)) if GROUP.encode() in raw]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_with_a_real_model_and_its_disk_cache(tmp_path: Path) -> None:
    """As a prompt with a guess in it was found out: 84 of its 85 tokens in the cache of another key."""
    if not (default_folder() / MAIN).is_dir():
        pytest.skip("`make model` fetches the model")
    (tmp_path / "secret").write_text("a secret of at least thirty-two characters")
    (tmp_path / "secret").chmod(0o600)
    real = {"name": "m", "path": str(default_folder() / MAIN), "rows": 2, "disk_cache_bytes": 256 << 20}
    extra = f'{EXTRA}[loader]\nthreads = 1\n[disk_cache]\nsecret = "file:{tmp_path / "secret"}"\n'
    text = "Miller of accounting has a salary per year in EUR of 83250. Is this above the median? " * 11

    def found(*keys: str) -> list[int]:
        return [cached_tok(send(agent, key, text)) for key in keys]

    with rack(tmp_path, [real], extra=extra) as (agent,):
        before, again = found("alice", "alice")
        assert (before, again > 256) == (0, True)
        for verb in ("unload", "load"):
            assert agent.admin("POST", verb, model="m").status == 200
        assert found("alice")[0] >= 256, "from disk"
        before, again = found("bob", "bob")
        assert (before, again > 256) == (0, True), "neither her memory nor her disk, but his own"
