"""What an operator ordered is served after a restart by TERM, by SIGKILL and by another version, with and without a
desired state, and a client gets it.

``make drill`` (MLXRACK_DRILL=1) restarts in every way with and without a desired state, several times.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shared.desired import DesiredState, encode
from shared.keys import DESIRED
from shared.store_dir import DirectoryStore
from tests.rack.harness import SCRIPT, Agent, model, rack, until
from tests.rack.test_desired import FAST, assign, follows, publish, served, version_of
from tests.rack.test_swaps import Streams, order

DRILL = os.environ.get("MLXRACK_DRILL") == "1"
ROUNDS = 3 if DRILL else 1
TREE = Path(__file__).parents[2]
MODELS = [
    model("f", path="weights-f"),
    model("g", path="weights-g", preload=False),
    model("h", path="weights-h"),
    model("k", path="weights-k", preload=False),
    model("p", path="weights-p"),
    model("u", path="weights-u", pinned=True),
]
EVERY = (("swap", "f", "g"), ("unload", "h"), ("load", "k"), ("pin", "p"), ("unpin", "u"))


def command(agent: Agent, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, *words, "--config", str(agent.config)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "MLXRACK_TEST_SECRET": agent.secret},
    )


def said(agent: Agent, *words: str) -> str:
    done = command(agent, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def lasting(agent: Agent, verb: str, name: str, new: str = "") -> str:
    """An order without the command line; what is said of how long it lasts."""
    more = {"new": new} if new else {"pinned": "yes" if verb == "pin" else "no"} if "pin" in verb else {}
    answer = order(agent, "pin" if "pin" in verb else verb, model=name, **more)
    assert answer.status == 200, answer.body
    return str(answer.json["lasts"])


def standing(agent: Agent) -> dict[str, Any]:
    return {one["model"]: one for one in agent.admin("GET", "orders").json["orders"]}


def now(agent: Agent) -> list[tuple[str, str, bool]]:
    """Names, version in memory, pinned."""
    return sorted((" ".join(m["names"]), m["version"], m["pinned"]) for m in agent.status()["models"])


def returns_to(agent: Agent, before: list[tuple[str, str, bool]], what: str) -> None:
    try:
        until(lambda: now(agent) == before, what)
    except AssertionError as error:
        raise AssertionError(f"{error}: {now(agent)}, not {before}; {standing(agent)}") from None


def by_term(agent: Agent, _: Path, __: pytest.MonkeyPatch) -> None:
    assert agent.stop() == 0
    agent.start()


def by_kill(agent: Agent, _: Path, __: pytest.MonkeyPatch) -> None:
    agent.kill()
    agent.start()


def by_another_version(agent: Agent, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """A copy of this tree with another number, and a file with fields that a still newer one has written."""
    assert agent.stop() == 0
    kept = agent.state / "desired.json"
    tree = json.loads(kept.read_bytes())
    tree["since_9"] = {"anything": [1]}
    for one in tree["orders"].values():
        one["since_9"] = None
    kept.write_text(json.dumps(tree))
    copy = folder / "other version"
    if not copy.exists():
        for package in ("agent", "shared"):
            shutil.copytree(TREE / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
        number = copy / "shared/__init__.py"
        number.write_text(number.read_text() + '\n__version__ = "9.9.9"\n')
    with patch.context() as within:
        within.setenv("PYTHONPATH", str(copy))
        agent.start()
    assert agent.status()["version"] == "9.9.9"


RESTARTS = {"term": by_term, "kill": by_kill, "upgrade": by_another_version}
Restart = Callable[[Agent, Path, pytest.MonkeyPatch], None]


@pytest.mark.parametrize("followed", [False, True])
def test_what_was_ordered_is_served_after_a_restart(
    tmp_path: Path, followed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = list(RESTARTS) if DRILL else (["term"] if followed else ["kill", "upgrade"])
    with rack(tmp_path, MODELS, extra=FAST) as (agent,):
        until(lambda: len(served(agent)) == 4, "what is configured is served")
        if followed:
            assigned = [assign(name, f"weights-{name}", tmp_path) for name in "fhp"]
            publish(tmp_path, 1, *assigned, assign("u", "weights-u", tmp_path, pinned=True))
            follows(agent, 1)
        for verb, *names in EVERY:
            text = said(agent, verb, *names) if DRILL or not followed else lasting(agent, verb, *names)
            assert "lasts over restarts, until a newer generation of the desired state or" in text
            assert f"`mlxrack-agent orders clear {names[0]}`" in text
        before = now(agent)
        assert ("f g", version_of("weights-g", tmp_path), False) in before
        for way in ways * ROUNDS:
            RESTARTS[way](agent, tmp_path, monkeypatch)
            returns_to(agent, before, f"what was ordered is served after {way}")
            for name in "fg":
                answer = agent.chat(model=name)
                assert answer.headers["X-Mlxrack-Version"] == version_of("weights-g", tmp_path), way
            assert set(standing(agent)) == set("fhkpu")
        text = said(agent, "status")
        otherwise = "generation 1 of the desired state" if followed else "agent.toml"
        assert f"swap to g; {otherwise} says f" in text
        assert f"unload; {otherwise} says loaded at the start" in text
        assert f"pin; {otherwise} says not pinned" in text
        origins = {m["model"]: m["origin"]["by"] for m in agent.status()["models"]}
        assert origins == dict.fromkeys("fhkpu", "order")
        if followed:
            follows(agent, 1, "drifted")
            assert "is followed again" in said(agent, "orders", "clear", "p")
            until(lambda: ("p", version_of("weights-p", tmp_path), False) in now(agent), "and is")
            elsewhere = DesiredState(generation=2, nodes={"n9": ()})
            DirectoryStore(tmp_path / "bucket").put(DESIRED, encode(elsewhere))
            until(lambda: agent.status()["desired"]["generation"] == 2, "it looks")
            assert set(standing(agent)) == set("fhku"), "a generation that does not mention this node ends nothing"
            publish(tmp_path, 3, *assigned)
            follows(agent, 3)
            assert standing(agent) == {}
            assert "orders stand: what is served" in said(agent, "orders")


def test_orders_are_listed_and_cleared_without_a_failed_request(tmp_path: Path) -> None:
    models = [model(fake_step_s=0.005), model("b", fake_step_s=0.005, preload=False), model("h")]
    with rack(tmp_path, models, extra=FAST) as (agent,):
        until(lambda: len(served(agent)) == 2, "what is configured is served")
        before = now(agent)
        for verb, *names in (("swap", "m", "b"), ("pin", "m"), ("unload", "h")):
            said(agent, verb, *names)
        listed = json.loads(said(agent, "orders", "--json"))["orders"]
        assert [(one["model"], one["instead"]) for one in listed] == [
            ("m", "agent.toml says m, not pinned"),
            ("h", "agent.toml says loaded at the start"),
        ]
        assert "swap to b" in said(agent, "orders")
        wrong = command(agent, "orders", "clear", "nothing")
        assert wrong.returncode == 1
        assert "orders stand for: m, h" in wrong.stderr
        with Streams(agent, 4) as streams:
            until(lambda: streams.answers > 4, "there is traffic")
            assert "m: swap to b, pin has ended; serves m again" in said(agent, "orders", "clear", "m")
            assert "h: unload has ended; loaded" in said(agent, "orders", "clear")
            done = streams.answers
            until(lambda: streams.answers > done + 4, "traffic goes on")
        assert not streams.faults, streams.faults[:3]
        assert len(streams.versions) == 2
        assert now(agent) == before
        assert "nothing to clear" in said(agent, "orders", "clear")
        assert agent.stop() == 0
        agent.start()
        until(lambda: now(agent) == before, "the same after a restart")


def test_files_that_have_vanished_or_changed_since_they_were_ordered_are_said(tmp_path: Path, tiny_model: Path) -> None:
    first, second, away = tmp_path / "one", tmp_path / "two", tmp_path / "away"
    for folder in (first, second):
        shutil.copytree(tiny_model, folder)
    (second / "generation_config.json").write_text('{"eos_token_id": 257}')
    models = [
        {"name": "f", "path": str(first), "plan_context_tok": 128},
        {"name": "g", "path": str(second), "plan_context_tok": 128, "preload": False},
    ]

    def serves() -> str:
        return str(agent.chat(model="f", max_tokens=3).headers["X-Mlxrack-Version"])

    def origin() -> str:
        return str(next(m["origin"]["text"] for m in agent.status()["models"] if "f" in m["names"]))

    with rack(tmp_path, models, extra=FAST) as (agent,):
        own = serves()
        swapped = order(agent, "swap", model="f", new="g").json["to_version"]
        assert serves() == swapped != own
        assert agent.stop() == 0
        second.rename(away)
        agent.start().ready()
        assert serves() == own, "there is nothing else to serve"
        assert f"cannot be: model g: no such folder: {second}" in origin()
        assert "no such folder" in standing(agent)["f"]["note"]
        agent.kill()
        away.rename(second)
        (second / "generation_config.json").write_text('{"eos_token_id": 256}')
        agent.start().ready()
        assert serves() not in (own, swapped), "the order stands"
        assert f"its files have changed since: {swapped[:8]} is" in origin()


def test_a_kept_file_that_cannot_be_read_is_said_and_set_aside(tmp_path: Path) -> None:
    with rack(tmp_path, [model("f"), model("g", preload=False)], extra=FAST) as (agent,):
        said(agent, "swap", "f", "g")
        agent.kill()
        kept = agent.state / "desired.json"
        kept.write_bytes(kept.read_bytes()[:40])
        agent.start().ready()
        assert served(agent) == {"f": version_of("weights of f", tmp_path)}
        for words in (("status",), ("orders",)):
            shown = command(agent, *words)
            assert "not all that was ordered here is known" in shown.stdout + shown.stderr
        said(agent, "swap", "f", "g")
        assert "the warning has ended" in said(agent, "orders", "clear", "--unreadable")
        assert "not all that was ordered" not in said(agent, "status")
        assert set(standing(agent)) == {"f"}


def test_serving_one_model_neither_obeys_nor_changes_the_orders_of_the_service(
    tmp_path: Path, tiny_model: Path
) -> None:
    with rack(tmp_path, [model("tiny", preload=False)], start=False) as (agent,):
        agent.state.mkdir(mode=0o700)
        kept = b'{"orders":{"tiny":{"resident":{"on":false,"at_ms":5}}}}'
        (agent.state / "desired.json").write_bytes(kept)
        words = ["--name", "tiny", "--rows", "1", "--context", "128", "--offline", "--config", str(agent.config)]
        agent.process = subprocess.Popen(
            [SCRIPT, "serve", str(tiny_model), *words],
            env={**os.environ, "MLXRACK_TEST_SECRET": agent.secret},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        agent.ready()
        assert agent.chat(model="tiny", max_tokens=2).status == 200
        assert "until this process ends" in said(agent, "pin", "tiny")
        assert agent.stop() == 0
        tree = json.loads((agent.state / "desired.json").read_bytes())
        assert tree["orders"] == {"tiny": {"swap": None, "resident": {"on": False, "at_ms": 5}, "pinned": None}}


def test_a_crash_while_the_old_loader_drains_does_not_bring_the_old_files_back(tmp_path: Path) -> None:
    models = [model("f", fake_step_s=0.05), model("g", preload=False)]
    with rack(tmp_path, models, extra=FAST) as (agent,), ThreadPoolExecutor(2) as clients:
        long = clients.submit(agent.chat, model="f", max_tokens=4000)
        until(lambda: agent.status()["in_flight"] == 1, "an answer has begun")
        swapping = clients.submit(order, agent, "swap", model="f", new="g")
        until(lambda: [s["phase"] for s in agent.status()["swaps"]] == ["draining"], "g has taken over")
        until(lambda: "f" in standing(agent) and (agent.state / "desired.json").exists(), "and that is kept")
        agent.kill()
        assert (long.result().status, swapping.result().status) == (0, 0)
        agent.start().ready()
        assert agent.chat(model="f").headers["X-Mlxrack-Version"] == version_of("weights of g", tmp_path)
