"""Swaps, loads and unloads of a real agent under streams, with loaders killed, slowed and damaged at every point.

``make swap`` runs the same with 200 swaps of the fake engine under 30 streams and 20 of a real model under 8.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from scripts.fetch_demo_model import MAIN, SECOND, default_folder
from tests.rack.harness import Agent, Answer, events_of, model, rack, until
from tests.tiny_model import write_tiny_model

SWAPS = int(os.environ.get("MLXRACK_SWAPS", "4"))
REAL_SWAPS = int(os.environ.get("MLXRACK_REAL_SWAPS", "1"))
CYCLES = int(os.environ.get("MLXRACK_CYCLES", "6"))
REAL_CYCLES = int(os.environ.get("MLXRACK_REAL_CYCLES", "1"))
KILLS = int(os.environ.get("MLXRACK_KILLS", "3"))
FORTY_MB = {
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
}
LIMITS = "[limits]\nin_flight_per_key = 64\n[memory]\nmin_residency_s = 0\n"


class Streams:
    """Clients that stream one answer after another and check each: complete, of one version, with its text."""

    def __init__(self, agent: Agent, count: int, *, tokens: int = 40, prompts: int = 3) -> None:
        self._agent, self._tokens, self._prompts = agent, tokens, prompts
        self._over = threading.Event()
        self._known: dict[tuple[str, int], str] = {}
        self._lock = threading.Lock()
        self.answers = 0
        self.versions: Counter[str] = Counter()
        self.faults: list[str] = []
        self._threads = [threading.Thread(target=self._client, args=(n,)) for n in range(count)]

    def __enter__(self) -> "Streams":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _client(self, number: int) -> None:
        turn = number
        while not self._over.is_set():
            turn += 1
            which = turn % self._prompts
            answer = self._agent.chat(
                f"question {which}",
                stream=True,
                max_tokens=self._tokens,
                temperature=0,
                stream_options={"include_usage": True},
            )
            with self._lock:
                self._judge(answer, which)

    def _judge(self, answer: Answer, which: int) -> None:
        self.answers += 1
        if answer.status != 200:
            self.faults.append(f"status {answer.status}: {answer.body[:200]!r}")
            return
        events = events_of(answer)
        if not events or events[-1] != "[DONE]":
            self.faults.append(f"cut off: {events[-1] if events else 'nothing'}")
            return
        chunks = events[:-1]
        prints = {chunk["system_fingerprint"] for chunk in chunks}
        version = answer.headers["X-Mlxrack-Version"]
        if prints != {f"fp_{version}"} or len({chunk["id"] for chunk in chunks}) != 1:
            self.faults.append(f"an answer of {sorted(prints)}, its header says {version}")
        text = "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"])
        if self._known.setdefault((version, which), text) != text:
            self.faults.append(f"version {version} answered question {which} in two ways")
        if sum(c["delta"].get("role") == "assistant" for chunk in chunks for c in chunk["choices"]) != 1:
            self.faults.append("not one role")
        self.versions[version] += 1


def order(agent: Agent, verb: str, **body: str) -> Answer:
    """An order that may take long."""
    token = (agent.state / "admin.token").read_text().strip()
    return agent.request(
        "POST", f"/admin/v1/{verb}", json.dumps(body).encode(), {"Authorization": f"Bearer {token}"}, timeout=900
    )


def shown(agent: Agent, name: str) -> Any:
    """One model's status."""
    return next(m for m in agent.status()["models"] if name in m["names"])


def children(agent: Agent) -> set[int]:
    """The agent's loaders."""
    assert agent.process is not None
    return {child.pid for child in psutil.Process(agent.process.pid).children() if child.status() != "zombie"}


def pair(**more: Any) -> list[dict[str, Any]]:
    """Two models that can be swapped for each other."""
    return [model(fake_step_s=0.005, rows=32, **more), model("b", fake_step_s=0.005, rows=32, preload=False, **more)]


def test_swaps_under_streams_neither_lose_nor_mix_answers(tmp_path: Path) -> None:
    with rack(tmp_path, pair(), extra=LIMITS) as (agent,):
        with Streams(agent, 30) as streams:
            outcomes = [order(agent, "swap", model="m", new=new).json for new in ("b", "m") * (SWAPS // 2)]
        assert not streams.faults, (len(streams.faults), Counter(streams.faults).most_common(5))
        assert [o.get("outcome") for o in outcomes] == ["flipped"] * len(outcomes), outcomes[-1]
        assert len(streams.versions) == 2, "both versions answered"
        assert min(streams.versions.values()) > 10
        assert all(o["probes"] == 30 for o in outcomes)
        until(lambda: len(children(agent)) == 1, "one loader is left")
        known = [o for o in outcomes if o["itl_before_us"]]  # the first swap had no streams before it
        raised = [o["raised_us"] / 1e6 for o in known]
        print(
            f"{len(outcomes)} swaps under 30 streams: {streams.answers} answers, 0 failed; p95 gap before / during "
            f"{statistics.median(o['itl_before_us'] for o in known) / 1e3:.0f} / "
            f"{statistics.median(o['itl_during_us'] for o in known) / 1e3:.0f} ms (medians), "
            f"raised for {statistics.median(raised):.2f} s in the median, at most {max(raised):.2f} s"
        )


def real_folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two models that MLX computes: in `make swap` the demo's, otherwise random weights of 40 MB."""
    if REAL_SWAPS > 1:
        if not (default_folder() / SECOND).is_dir():
            pytest.skip("`make model` fetches the model")
        return default_folder() / MAIN, default_folder() / SECOND
    made = tmp_path / "one", tmp_path / "other"
    for seed, folder in enumerate(made):
        write_tiny_model(folder, seed=seed, config=FORTY_MB)
    return made


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_swaps_of_a_real_model_under_streams(tmp_path: Path) -> None:
    folders = real_folders(tmp_path)
    weights = min((folder / "model.safetensors").stat().st_size for folder in folders)
    real = [
        {"name": name, "path": str(folder), "preload": name == "m", "probe_p99_s": 120.0}
        for name, folder in zip("mb", folders, strict=True)
    ]
    with rack(tmp_path, real, extra=LIMITS) as (agent,):
        until(lambda: shown(agent, "m")["state"] == "ready", "the model is loaded", limit_s=600)
        error = shown(agent, "m")["plan_error_ppm"]
        assert abs(error) < 100_000, "planned and measured memory agree within 10 %"
        with Streams(agent, 8, tokens=24, prompts=2) as streams:
            until(lambda: streams.answers >= 16, "the usual ITL is known", limit_s=600)
            outcomes = [order(agent, "swap", model="m", new=("b", "m")[n % 2]).json for n in range(REAL_SWAPS)]
        assert not streams.faults, Counter(streams.faults).most_common(5)
        assert [o.get("outcome") for o in outcomes] == ["flipped"] * REAL_SWAPS, outcomes[-1]
        ratios = [o["itl_during_us"] / o["itl_before_us"] for o in outcomes]
        print(
            f"{REAL_SWAPS} swaps of a real model under 8 streams: {streams.answers} answers, 0 failed; p95 gap "
            f"during / before: median {statistics.median(ratios):.2f}, max {max(ratios):.2f}; raised for "
            f"{statistics.median(o['raised_us'] for o in outcomes) / 1e6:.1f} s; swap "
            f"{statistics.median(o['window_us'] for o in outcomes) / 1e6:.1f} s; plan error {error / 1e4:+.1f} %; "
            f"freed {statistics.median(o['freed_bytes'] for o in outcomes) / 1e6:.0f} MB"
        )
        assert all(o["freed_bytes"] > (500e6 if REAL_SWAPS > 1 else weights) for o in outcomes)


@contextlib.contextmanager
def swapping(agent: Agent, new: str = "b") -> Iterator[list[Answer]]:
    """A swap in the background."""
    found: list[Answer] = []
    thread = threading.Thread(target=lambda: found.append(order(agent, "swap", model="m", new=new)))
    thread.start()
    yield found
    thread.join()


def phase_is(agent: Agent, phase: str) -> bool:
    swaps = agent.status()["swaps"]
    return bool(swaps) and swaps[-1]["phase"] == phase and not swaps[-1]["outcome"]


@pytest.mark.parametrize("phase", ["starting", "warming"])
def test_a_standby_killed_during_a_swap_leaves_the_old_version_serving(tmp_path: Path, phase: str) -> None:
    models = [model(fake_step_s=0.005), model("b", fake_step_s=0.03, fake_load_s=1.0, preload=False)]
    with rack(tmp_path, models, extra=LIMITS) as (agent,), Streams(agent, 8) as streams:
        version, old = shown(agent, "m")["version"], children(agent)
        with swapping(agent) as found:
            until(lambda: phase_is(agent, phase) and children(agent) - old, f"the swap is {phase}")
            for pid in children(agent) - old:
                os.kill(pid, signal.SIGKILL)
        assert found[0].status == 409
        assert "SIGKILL" in found[0].json["reason"]
        assert shown(agent, "m")["version"] == version
        assert children(agent) == old
        time.sleep(0.3)
    assert not streams.faults, Counter(streams.faults).most_common(5)
    assert set(streams.versions) == {version}


def test_a_loader_killed_while_draining_has_its_streams_continued(tmp_path: Path) -> None:
    """Their answers are continued by the version that began them, token for token."""
    models = [model(fake_step_s=0.03), model("b", fake_step_s=0.005, preload=False)]
    with rack(tmp_path, models, extra=LIMITS) as (agent,):
        before = agent.chat("long", max_tokens=120, temperature=0).json["choices"][0]["message"]["content"]
        old, version = children(agent), shown(agent, "m")["version"]
        found: list[Answer] = []
        with Streams(agent, 4) as streams, swapping(agent) as swapped:
            until(lambda: phase_is(agent, "warming"), "the standby warms up")
            thread = threading.Thread(
                target=lambda: found.append(agent.chat("long", stream=True, max_tokens=120, temperature=0))
            )
            until(lambda: agent.status()["swaps"][-1]["detail"].startswith("2"), "nearly warm")
            thread.start()
            until(lambda: agent.status()["swaps"][-1]["phase"] == "draining", "the old loader drains")
            for pid in old:
                os.kill(pid, signal.SIGKILL)
            thread.join()
        assert swapped[0].json["outcome"] == "flipped"
        assert not streams.faults, Counter(streams.faults).most_common(5)
        events = events_of(found[0])
        assert events[-1] == "[DONE]"
        text = "".join(c["delta"].get("content") or "" for e in events[:-1] for c in e["choices"])
        assert text == before, "not a word more or less than undisturbed"
        assert {e["system_fingerprint"] for e in events[:-1]} == {f"fp_{version}"}
        assert len(children(agent)) == 1


def test_loaders_killed_at_any_time_of_a_swap_fail_no_request(tmp_path: Path) -> None:
    dice = random.Random(4)
    with rack(tmp_path, pair(fake_load_s=0.2), extra=LIMITS) as (agent,):
        names = ["m", "b"]
        with Streams(agent, 8) as streams:
            for _ in range(KILLS):
                with swapping(agent, new=names[1]) as found:
                    time.sleep(dice.uniform(0.1, 2.5))
                    alive = sorted(children(agent))
                    if alive:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(dice.choice(alive), signal.SIGKILL)
                body = found[0].json
                if "error" in body:  # killed before the swap had begun: rejected, and nothing changed
                    assert body["error"]["code"] == "conflict", body
                    until(lambda: shown(agent, "m")["state"] == "ready", "a loader serves")
                    continue
                assert body["outcome"] in ("flipped", "failed"), body
                if body["outcome"] == "flipped":
                    names.reverse()
                else:
                    assert body["reason"]
                until(lambda: shown(agent, "m")["state"] == "ready", "a loader serves")
        assert not streams.faults, (len(streams.faults), Counter(streams.faults).most_common(5))
        until(lambda: len(children(agent)) == 1, "one loader is left")


GARBAGE = '{"probes": [{"prompt": "Say hello.", "answer": "Hello! How can I help you today?"}]}'


@pytest.mark.parametrize(
    ("standby", "why"),
    [
        ({"fake_step_s": 0.5, "probe_p99_s": 0.3}, "took over 0.3 s"),
        ({"probes": "garbage"}, "probe 1 of 1: the answer differs from the recorded one"),
    ],
)
def test_a_slow_or_wrong_standby_does_not_take_over(tmp_path: Path, standby: dict[str, Any], why: str) -> None:
    if "probes" in standby:
        (tmp_path / "probes.json").write_text(GARBAGE)
        standby = {"probes": str(tmp_path / "probes.json")}
    with rack(tmp_path, [model(fake_step_s=0.005), model("b", preload=False, **standby)], extra=LIMITS) as (agent,):
        version = shown(agent, "m")["version"]
        with Streams(agent, 4) as streams:
            answer = order(agent, "swap", model="m", new="b")
        assert answer.status == 409
        assert why in answer.json["reason"]
        assert why in agent.status()["swaps"][-1]["reason"]
        assert not streams.faults
        assert set(streams.versions) == {version} == {shown(agent, "m")["version"]}
        assert len(children(agent)) == 1


def nan_weights(folder: Path) -> None:
    import mlx.core as mx

    weights: dict[str, Any] = dict(mx.load(str(folder / "model.safetensors")))  # type: ignore[arg-type]
    name = "model.layers.0.self_attn.q_proj.weight"
    weights[name] = weights[name] * float("nan")
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})


def noise(folder: Path) -> None:
    path = folder / "model.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size - 20_000)
        file.write(random.Random(1).randbytes(20_000))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda folder: os.truncate(folder / "model.safetensors", 50_000), "truncated"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 5_000), "not a safetensors file"),
        (lambda folder: (folder / "config.json").write_text("{}"), "config.json"),
        (nan_weights, "NaN or infinity"),
        (noise, "NaN or infinity|differs from the recorded one"),
    ],
    ids=["truncated", "zeroed", "no config", "nan", "noise"],
)
def test_damaged_weights_never_take_over(
    tmp_path: Path, tiny_model: Path, damage: Callable[[Path], object], why: str
) -> None:
    """Damage visible in the files is rejected before anything starts; damage visible only in answers, by the probes."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    shutil.copytree(tiny_model, good)
    shutil.copytree(tiny_model, bad)
    damage(bad)
    real = [
        {"name": "m", "path": str(good), "plan_context_tok": 128, "cache_bytes": 0},
        {"name": "b", "path": str(bad), "preload": False, "plan_context_tok": 128, "cache_bytes": 0},
    ]
    with rack(tmp_path, real, extra=LIMITS) as (agent,):
        recorded = order(agent, "probes", model="m")
        assert recorded.status == 200
        (bad / "mlxrack-probes.json").write_bytes(recorded.body)
        version = shown(agent, "m")["version"]
        with Streams(agent, 3, tokens=10) as streams:
            answer = order(agent, "swap", model="m", new="b")
        assert answer.status in (422, 409), answer.body
        body = answer.json
        reason = body["error"]["message"] if "error" in body else body["reason"]
        assert any(part in reason for part in why.split("|")), reason
        assert not streams.faults, streams.faults[:3]
        assert set(streams.versions) == {version}


def resources(agent: Agent) -> tuple[int, int, int]:
    """Open descriptors, threads and resident bytes of the daemon."""
    assert agent.process is not None
    process = psutil.Process(agent.process.pid)
    return process.num_fds(), process.num_threads(), process.memory_info().rss


@pytest.mark.timeout(900)
def test_loads_and_unloads_leak_nothing(tmp_path: Path) -> None:
    with rack(tmp_path, [model(), model("b", preload=False)], extra=LIMITS) as (agent,):
        files: set[Path] = set()
        before = (0, 0, 0)
        for cycle in range(CYCLES + 3):
            if cycle == 3:  # thread pools and module caches are filled by then
                until(lambda: len(children(agent)) == 1, "only the other model is left")
                before, files = resources(agent), set(agent.state.rglob("*"))
            assert order(agent, "load", model="b").status == 200
            pid = shown(agent, "b")["pid"]
            assert agent.chat(model="b").status == 200
            assert order(agent, "unload", model="b").status == 200
            assert not psutil.pid_exists(pid), "the process is gone when the answer comes, and its memory with it"
        until(lambda: resources(agent)[0] <= before[0] + 1, f"descriptors are back to {before[0]}")
        after = resources(agent)
        assert after[1] <= before[1] + (os.cpu_count() or 1) + 4, "no thread but those of the pool"
        grown = after[2] - before[2]
        assert grown < 8 << 20, f"{grown} bytes in {CYCLES} cycles"
        left = {p for p in set(agent.state.rglob("*")) - files if "spool" not in p.parts and "logs" not in p.parts}
        assert not left
        print(f"{CYCLES} load/unload cycles: descriptors {before[0]} -> {after[0]}, memory {grown / 1e6:+.1f} MB")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_unloading_a_real_model_frees_its_memory(tmp_path: Path) -> None:
    if not (default_folder() / MAIN).is_dir():
        pytest.skip("`make model` fetches the model")
    real = [{"name": "m", "path": str(default_folder() / MAIN), "preload": False}]
    with rack(tmp_path, real, extra=LIMITS, start=True) as (agent,):
        for _ in range(REAL_CYCLES):
            assert order(agent, "load", model="m").status == 200
            one = shown(agent, "m")
            assert one["footprint_bytes"] > 500e6
            assert order(agent, "unload", model="m").status == 200
            assert not psutil.pid_exists(one["pid"])
            assert not children(agent)


BAD: list[tuple[str, dict[str, str], int, str]] = [
    ("swap", {"model": "m", "new": "zzz"}, 404, "zzz is not configured (known: m, b, gone)"),
    ("swap", {"model": "zzz", "new": "b"}, 404, "not configured on this node"),
    ("swap", {"model": "m", "new": "m"}, 409, "is already the active version"),
    ("swap", {"model": "b", "new": "m"}, 409, "m is itself resident or loading"),
    ("swap", {"model": "m"}, 400, "new is required"),
    ("swap", {"model": "m", "new": "gone"}, 422, "nothing named elsewhere is in the store"),
    ("load", {"model": "gone"}, 422, "fetch it with `mlxrack-agent models pull"),
    ("load", {"model": "zzz"}, 404, "not configured on this node"),
    ("unload", {"model": "b"}, 409, "unload b: not resident"),
    ("pin", {"model": "zzz", "pinned": "yes"}, 404, "not configured on this node"),
    ("probes", {"model": "b"}, 503, "not ready"),
]


def test_invalid_orders_change_nothing(tmp_path: Path) -> None:
    models = [model(), model("b", preload=False), {"name": "gone", "path": "store:elsewhere", "preload": False}]
    with rack(tmp_path, models, extra=LIMITS) as (agent,):
        before = [(m["model"], m["version"], m["pid"]) for m in agent.status()["models"]]
        for verb, body, status, why in BAD:
            answer = order(agent, verb, **body)
            assert answer.status == status, (verb, body, answer.body)
            assert why in answer.json["error"]["message"], (verb, body, answer.body)
        for verb in ("swap", "load", "unload", "pin", "probes"):
            assert agent.request("POST", f"/admin/v1/{verb}", b'{"model": "m", "new": "b"}').status == 401
        assert before == [(m["model"], m["version"], m["pid"]) for m in agent.status()["models"]]


def test_a_second_swap_of_a_model_is_rejected_during_the_first(tmp_path: Path) -> None:
    models = [model(), model("b", fake_load_s=1.0, preload=False), model("c", preload=False)]
    with rack(tmp_path, models, extra=LIMITS) as (agent,), swapping(agent) as found:
        until(lambda: phase_is(agent, "starting"), "the first swap starts")
        second = order(agent, "swap", model="m", new="c")
        assert (second.status, "already loading, swapping or being evicted" in second.body.decode()) == (409, True)
    assert found[0].json["outcome"] == "flipped"


def test_under_memory_pressure_new_requests_get_retry_after_and_running_ones_finish(tmp_path: Path) -> None:
    """The loader reports more than the budget: chunks shrink, caches are dropped, then requests are rejected."""
    extra = LIMITS + "budget_bytes = 1000\n"
    heavy = model(fake_step_s=0.05, fake_held_bytes=5_000)
    with rack(tmp_path, [heavy], extra=extra) as (agent,):
        found: list[Answer] = []
        running = threading.Thread(target=lambda: found.append(agent.chat(stream=True, max_tokens=140)))
        running.start()
        until(lambda: agent.status()["memory"]["refusing"], "the guard refuses")
        refused = agent.chat()
        assert refused.status == 503
        assert refused.json["error"]["code"] == "memory_pressure"
        assert int(refused.headers["Retry-After"]) >= 1
        running.join()
        assert events_of(found[0])[-1] == "[DONE]", "what ran was answered to its end"
        until(lambda: agent.status()["memory"]["level"] == "calm", "the idle model has left")
        assert agent.status()["models"][0]["state"] == "cold"
