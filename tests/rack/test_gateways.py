"""A gateway and misbehaving workers: circuit breakers, retries, and what clients observe."""

import json
import os
import threading
import time
from pathlib import Path

import pytest

from agent.gateway.retry_budget import FLOOR_PER_S, MOST, SHARE
from scripts.seaweed import free_port
from tests.rack.harness import Agent, model, rack, until, write_config
from tests.rack.load import Ask, Heard, Load, at_once
from tests.rack.mocks import Named, door_with_mocks

BAD_REQUESTS = int(os.environ.get("MLXRACK_BAD_REQUESTS", "200"))
WORDS = 16


def asks(count: int, *, stream: bool = True) -> list[Ask]:
    return [Ask(f"tell me {n}", WORDS, stream=stream) for n in range(count)]


def wrong(heard: list[Heard]) -> list[str]:
    """Faults in answers of the mock, which repeats the same word."""
    return [one.fault or one.text for one in heard if one.fault or one.text != "word " * WORDS]


def breakers(door: Agent) -> dict[str, str]:
    return {one["node"]: one["state"] for one in door.status()["breakers"]}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "not streamed"])
@pytest.mark.parametrize("mode", ["5xx", "breaks", "error", "garbage", "stalls"])
def test_a_failing_worker_opens_its_breaker_and_no_client_notices(tmp_path: Path, mode: str, stream: bool) -> None:
    with door_with_mocks(tmp_path, "bad", "good", words=WORDS) as (door, (bad, _)):
        at_once(door.port, asks(8))
        bad.mode = mode
        # adaptive timeouts need some history; a stall takes at least five seconds
        heard = at_once(door.port, asks(12, stream=stream))
        assert not wrong(heard)
        assert max(one.total_s for one in heard) < (12.0 if mode == "stalls" else 3.0)
        assert bad.began > 0

        def blamed() -> bool:
            assert not wrong(at_once(door.port, asks(8, stream=stream)))
            return bool(breakers(door))

        if mode == "stalls" and BAD_REQUESTS < 1000:
            return  # three stalls take a while
        until(blamed, "its breaker opens", 40)
        assert set(breakers(door)) == {"bad"}
        bad.mode = "well"
        until(lambda: not wrong(at_once(door.port, asks(8))) and not breakers(door), "it is trusted again", 40)


def test_a_worker_that_breaks_three_streams_is_excluded(tmp_path: Path) -> None:
    with door_with_mocks(tmp_path, "bad", "good", words=WORDS) as (door, (bad, good)):
        bad.mode = "breaks"
        for _ in range(3):
            # the healthy worker is busy, so that the bad one would be preferred
            began = bad.began
            good.gap_s = 0.2
            until(lambda: not wrong(at_once(door.port, asks(1))) and bad.began > began, "it was tried", 30)  # noqa: B023
        good.gap_s = 0.01
        assert set(breakers(door)) == {"bad"}
        assert bad.began == 3
        reason = door.status()["breakers"][0]["reason"]
        assert "connection lost" in reason


@pytest.mark.timeout(900)
def test_client_errors_open_no_breaker(tmp_path: Path) -> None:
    with door_with_mocks(tmp_path, "one", "two") as (door, workers):
        for worker in workers:
            worker.mode = "refuses"
        for number in range(0, BAD_REQUESTS, 50):
            heard = at_once(door.port, [Ask(f"no {number + n}", 5, stream=bool(n % 2)) for n in range(48)])
            assert {one.fault[:4] for one in heard} == {"400:"}
        gone = b'{"model":"m","messages":[{"role":"user","content":"x"}],"stream":true}'
        for _ in range(10):
            door.request("POST", "/v1/chat/completions", gone, timeout=0.01)  # hangs up
        assert sum(worker.began for worker in workers) >= BAD_REQUESTS * 0.9
        assert door.status()["breakers"] == []
        assert {p["state"] for p in door.status()["peers"]} == {"up"}


def test_an_engine_failure_counts_only_if_another_node_can_answer(tmp_path: Path) -> None:
    with door_with_mocks(tmp_path, "one", "two", words=WORDS) as (door, (one, two)):
        one.mode = two.mode = "fails"
        heard = at_once(door.port, asks(20))
        assert {each.fault[:4] for each in heard} == {"500:"}
        assert one.began + two.began == 40, "each request was tried once more, and no more"
        assert breakers(door) == {}, "nobody could: the requests may be at fault"
        two.mode = "well"
        until(lambda: not wrong(at_once(door.port, asks(4))) and bool(breakers(door)), "it is blamed", 20)
        assert set(breakers(door)) == {"one"}


def test_a_prompt_too_long_for_one_node_goes_to_another(tmp_path: Path) -> None:
    with door_with_mocks(tmp_path, "small", "large", words=WORDS) as (door, (small, large)):
        small.mode, small.context_tok, large.context_tok = "refuses", 1_000, 2_000
        until(lambda: [p["offers"][0]["context_tok"] for p in door.status()["peers"]] == [2_000, 1_000], "it is known")
        assert not wrong(at_once(door.port, asks(12)))
        assert small.began, "its prompts seemed short enough"
        assert breakers(door) == {}
        large.mode = "refuses"
        heard = at_once(door.port, asks(4))
        assert {each.fault[:4] for each in heard} == {"400:"}, "too long for every node"


@pytest.mark.timeout(900)
def test_half_open_lets_one_of_fifty_requests_through(tmp_path: Path) -> None:
    with door_with_mocks(tmp_path, "only", words=WORDS, gap_s=0.05) as (door, (only,)):
        only.mode = "breaks"
        heard = at_once(door.port, asks(3))
        assert all("error event" in one.fault for one in heard), "nobody else can go on, and that is said"
        until(lambda: breakers(door) != {}, "it is open")
        only.mode = "well"
        until(lambda: breakers(door) == {"only": "half_open"}, "the pause is over")
        before = only.began
        load = Load([(0.0, one) for one in asks(48)], lambda _: door.port).start()
        until(lambda: only.began > before, "one is sent")
        time.sleep(0.3)
        assert only.began == before + 1, "the others wait for it"
        assert not wrong(load.join())
        assert breakers(door) == {}


@pytest.mark.timeout(900)
def test_all_breakers_open_still_tries_a_live_node(tmp_path: Path) -> None:
    with door_with_mocks(tmp_path, "one", "two", words=WORDS) as (door, (one, two)):
        one.mode = two.mode = "breaks"
        at_once(door.port, asks(12))
        until(lambda: len(breakers(door)) == 2, "both are open")
        one.mode = "well"
        heard = at_once(door.port, asks(6, stream=False))
        assert not wrong(heard), "the least bad answers, whatever was believed of it"


def test_retries_are_bounded_when_everything_fails(tmp_path: Path) -> None:
    with door_with_mocks(tmp_path, "one", "two", "three") as (door, workers):
        for worker in workers:
            worker.mode = "error"
        began = time.monotonic()
        for _ in range(4):
            heard = at_once(door.port, asks(45, stream=False))
            assert all(one.fault for one in heard)
        tries = sum(worker.began for worker in workers)
        most = 180 + MOST + SHARE * 180 + FLOOR_PER_S * (time.monotonic() - began)
        print(f"{tries} tries for 180 requests, at most {most:.0f}")
        assert tries <= most, "requests, a full budget, and what has come into it since"
        assert door.get("/debug/rack").json["retries_refused"] > 0


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        ("unsigned", "response not signed with peers.secret"),
        ("newer", "is newer than this node's"),
        ("older", "is older than this node's"),
        ("noise", "not a heartbeat; what answered is not an mlxrack agent"),
        ("silent", "does not answer"),
        ("senseless", "invalid heartbeat"),
    ],
)
def test_an_invalid_peer_is_named_and_gets_no_requests(tmp_path: Path, mode: str, why: str) -> None:
    with door_with_mocks(tmp_path, "odd", "good", words=WORDS) as (door, (odd, good)):
        odd.mode = mode
        until(lambda: {p["node"]: p["state"] for p in door.status()["peers"]}["odd"] == "down", "it is down")
        before = odd.began
        assert not wrong(at_once(door.port, asks(6)))
        assert odd.began == before
        assert good.began >= 6
        problem = next(p["problem"] for p in door.status()["peers"] if p["node"] == "odd")
        assert why in problem
        odd.mode = "well"
        until(lambda: {p["node"]: p["state"] for p in door.status()["peers"]}["odd"] == "up", "it is back")


def steps_of(door: Agent, heard: Heard) -> list[tuple[str, str]]:
    """The gateway's decisions for a request."""
    part = door.get(f"/debug/decision/{heard.request_id}").json["parts"][0]
    return [(step["what"], step.get("node", "")) for step in part["steps"]]


def test_an_answer_is_not_continued_where_it_does_not_fit(tmp_path: Path) -> None:
    with door_with_mocks(tmp_path, "a", "b", "c", gap_s=0.02, words=40) as (door, (a, b, c)):
        a.context_tok, b.context_tok, c.context_tok = 8_000, 1_000, 8_000
        b.mode, c.gap_s = "refuses", 0.06  # the small node is fast and the other slow
        time.sleep(1.5)
        a.mode = "breaks"
        (heard,) = at_once(door.port, [Ask("x", 40)])
        assert (heard.fault, len(heard.text.split())) == ("", 40)
        assert steps_of(door, heard)[-2] == ("continues", "c")


def test_a_prompt_that_only_the_large_node_fits_waits_for_it(tmp_path: Path) -> None:
    """The node with room is lost briefly: the other one's small context must not be the answer."""
    with door_with_mocks(tmp_path, "large", "small", words=20) as (door, (large, small)):
        large.context_tok, small.context_tok, small.mode = 8_000, 100, "refuses"
        time.sleep(1.5)
        large.mode = "5xx"
        load = Load([(0.0, Ask("long " * 200, 20))], lambda _: door.port).start()
        until(lambda: small.began, "the small one is asked")
        large.mode = "well"
        (heard,) = load.join()
        assert heard.fault == ""
        assert steps_of(door, heard)[-2] == ("sent", "large")
        large.mode = "silent"
        until(lambda: {p["node"]: p["state"] for p in door.status()["peers"]}["large"] == "down", "it is down")
        (heard,) = at_once(door.port, [Ask("long " * 200, 20)])
        assert "400" in heard.fault, "when nobody who lives has room, that is said at once"


def test_models_of_a_peer_without_a_heartbeat_are_not_unknown(tmp_path: Path) -> None:
    with rack(tmp_path, [model()], [model("other")]) as (first, second):
        second.kill()
        first.kill()
        first.start().ready()
        until(lambda: first.status()["peers"][0]["state"] == "down", "nobody answers there")
        began = time.monotonic()
        for answer in (first.chat(model="other"), first.get("/v1/models/other")):
            assert (answer.status, answer.json["error"]["code"]) == (503, "no_capacity")
            assert int(answer.headers["Retry-After"]) >= 1
        assert time.monotonic() - began < 5
        listed = first.get("/v1/models")
        assert (listed.status, [m["id"] for m in listed.json["data"]]) == (200, ["m"])
        second.start().ready()
        until(lambda: first.status()["peers"][0]["state"] == "up", "it is heard")
        assert first.chat(model="other").status == 200
        assert first.chat(model="nothing").status == 404
        assert first.get("/v1/models/nothing").status == 404
        second.kill()
        until(lambda: first.status()["peers"][0]["state"] == "down", "it is gone again")
        listed = first.get("/v1/models")
        assert (listed.status, [m["id"] for m in listed.json["data"]]) == (200, ["m"])
        assert first.get("/v1/models/other").status == 503


def test_one_deadline_covers_a_model_load(tmp_path: Path) -> None:
    cold = model("m", preload=False, fake_load_s=6.0)
    with rack(tmp_path, [cold], extra="[limits]\nrequest_s = 2.0\n") as (agent,):
        began = time.monotonic()
        answer = agent.chat()
        assert (answer.status, answer.json["error"]["code"]) == (504, "deadline_exceeded")
        assert time.monotonic() - began < 4


def test_a_peer_with_another_secret_or_rack_is_rejected_on_both_sides(tmp_path: Path) -> None:
    first, second, third = (Agent(tmp_path, name, free_port()) for name in ("n1", "n2", "n3"))
    second.secret = "another rack's secret, 93b1d60e5c"
    agents = [first, second, third]
    for agent in agents:
        write_config(agent, [a for a in agents if a is not agent], [model()])
    third.config.write_text(third.config.read_text().replace('rack = "r"', 'rack = "another"'))
    try:
        for agent in agents:
            agent.start().ready()
        problems: dict[str, str] = {}

        def known() -> bool:
            problems.update({p["node"]: p["problem"] for p in first.status()["peers"]})
            same = "peers.secret must be the same on all nodes" in problems["n2"]
            return same and "belongs to rack 'another'" in problems["n3"]

        until(known, "both are refused and named")
        for agent in agents:
            answer = agent.chat()
            assert (answer.status, answer.headers["X-Mlxrack-Node"]) == (200, agent.node)
    finally:
        for agent in agents:
            if agent.process is not None:
                agent.kill()


def test_a_peer_that_is_the_node_itself_and_a_request_that_loops(tmp_path: Path) -> None:
    agent = Agent(tmp_path, "n1", free_port())
    write_config(agent, [Named("n2", agent.port)], [model()])  # type: ignore[list-item]
    try:
        agent.start().ready()
        until(lambda: agent.status()["peers"][0]["problem"], "it is noticed")
        assert "this url leads back to this node itself" in agent.status()["peers"][0]["problem"]
        answer = agent.chat()
        assert (answer.status, answer.headers["X-Mlxrack-Node"]) == (200, "n1")
    finally:
        agent.kill()


def test_a_configuration_that_lists_itself_as_peer_is_rejected(tmp_path: Path) -> None:
    agent = Agent(tmp_path, "n1", free_port())
    write_config(agent, [Named("n1", 1), Named("n2", 2), Named("n3", 2)], [model()])  # type: ignore[list-item]
    agent.start(wait=False)
    assert agent.process is not None
    assert agent.process.wait(20) == os.EX_CONFIG
    said = agent.output()
    agent.stop()
    assert "lists this node itself" in said
    assert "duplicate url" in said


def test_every_request_has_an_id_and_a_decision(tmp_path: Path) -> None:
    with rack(tmp_path, [model()], [model("other")]) as (first, _):
        good = first.chat()
        forwarded = first.chat(model="other")
        unknown = first.chat(model="nothing")
        broken = first.request("POST", "/v1/chat/completions", b"{")
        for answer in (good, forwarded, unknown, broken):
            assert answer.headers["X-Mlxrack-Request-Id"].startswith("req_")
        parts = {
            name: first.get(f"/debug/decision/{answer.headers['X-Mlxrack-Request-Id']}").json["parts"][0]
            for name, answer in (("good", good), ("forwarded", forwarded), ("unknown", unknown))
        }
        assert parts["good"]["worker"] == "n1"
        assert parts["good"]["steps"][0]["candidates"][0]["node"] == "n1"
        assert parts["good"]["steps"][0]["excluded"] == {"n2": "model not served"}
        assert (parts["forwarded"]["worker"], parts["forwarded"]["outcome"]) == ("n2", "ok")
        assert (parts["unknown"]["model"], parts["unknown"]["outcome"]) == ("", "refused")
        assert first.get("/debug/decision/req_none").status == 404
        assert first.get("/debug/rack").json["peers"][0]["offers"][0]["name"] == "other"
        assert "hello" not in json.dumps(parts)
        stream = first.chat(stream=True, n=2)
        request_id = stream.headers["X-Mlxrack-Request-Id"]
        assert len(first.get(f"/debug/decision/{request_id}").json["parts"]) == 2


@pytest.mark.timeout(900)
def test_a_node_that_slows_down_gets_fewer_requests_and_stays_up(tmp_path: Path) -> None:
    worker = model(rows=4, fake_step_s=0.01)
    with rack(tmp_path, [], [worker], [worker]) as (door, *_):
        for _ in range(3):
            at_once(door.port, [Ask(f"warm {n}", 60) for n in range(8)])
        slow = at_once(door.port, [Ask("!slow from now on", 5)])[0].worker
        began, late = time.monotonic(), []
        stop = threading.Event()

        def traffic() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                late.extend(at_once(door.port, [Ask(f"go {number}", 20)]))

        threads = [threading.Thread(target=traffic) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(10.0)
        stop.set()
        for thread in threads:
            thread.join()
        assert not [one.fault for one in late if one.fault]
        recent = [one for one in late if one.at_s > began + 6.0]
        share = sum(one.worker == slow for one in recent) / len(recent)
        print(f"share of the slow node after 6 s: {share:.2f} of {len(recent)}")
        assert share < 0.2
        assert {p["state"] for p in door.status()["peers"]} == {"up"}
