"""The list of checks of `check-config` and `doctor`: facts in, findings out."""

from collections.abc import Iterable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.config import AgentConfig, Node, Peer, Peers
from agent.mesh.peers import Heartbeat
from agent.operator import checks, mac_checks
from agent.operator.checks import (
    Budget,
    Finding,
    FolderFact,
    ListenFact,
    ModelFact,
    PeerFact,
    Secret,
    SecretFact,
    StoreFact,
)
from agent.views import ModelView
from shared.records import Hardware

GB = 10**9
BUDGET = Budget(16 * GB, "a share of the machine's memory", 24 * GB)


def verdicts(found: Iterable[Finding]) -> list[tuple[str, str]]:
    return [(one.what, one.verdict) for one in found]


def config_of(*peers: tuple[str, str]) -> AgentConfig:
    nodes = tuple(Peer(id=node, url=url) for node, url in peers)
    return AgentConfig(node=Node(id="n1", rack="r"), peers=Peers(secret="env:X", nodes=nodes))


# ---- this machine ----


@pytest.mark.parametrize(
    ("model", "chip", "on_a_mac", "verdict", "seen"),
    [
        ("Mac16,11", "Apple M4 Pro", True, "ok", "Mac mini (2024), M4 Pro, 24 GB: 273 GB/s"),
        ("Mac16,10", "Apple M4 Pro", True, "warning", "but the chip calls itself Apple M4 Pro"),
        ("Mac19,1", "Apple M7", True, "warning", "the chip table has no row for 'Apple M7'"),
        ("", "AMD EPYC 7B13", False, "ok", "the chip table has no row for 'AMD EPYC 7B13'"),
    ],
)
def test_a_mac_that_the_chip_table_does_not_know_is_a_warning(
    model: str, chip: str, on_a_mac: bool, verdict: str, seen: str
) -> None:
    found = checks.chip(Hardware(model=model, chip=chip, memory_bytes=24 << 30), on_a_mac=on_a_mac)
    assert (found.what, found.verdict) == ("chip", verdict)
    assert seen in found.seen


# ---- memory ----


def fact(name: str, need: int, least: int = 0, *, pinned: bool = False) -> ModelFact:
    return ModelFact(f"models[{name}].path", name, need, least or need, pinned)


def test_a_model_that_can_never_fit_is_a_problem_with_what_to_do() -> None:
    (found, *_) = checks.models([fact("m", 592 * GB)], BUDGET)
    assert found.verdict == "problem"
    assert "needs 592.0 GB, and all models may have 16.0 GB" in found.seen
    assert "smaller or more strongly quantized" in found.seen
    (found, *_) = checks.models([fact("m", 20 * GB, 9 * GB)], BUDGET)
    assert (found.verdict, "lower its rows, plan_context_tok" in found.seen) == ("problem", True)


def test_models_that_fit_alone_and_not_together_are_a_warning() -> None:
    two = [fact("a", 9 * GB), fact("b", 9 * GB)]
    assert verdicts(checks.models(two, BUDGET)) == [("model a", "ok"), ("model b", "ok"), ("memory", "warning")]
    assert "a, b need 18.0 GB together" in list(checks.models(two, BUDGET))[-1].seen
    pinned = [fact("a", 9 * GB, pinned=True), fact("b", 9 * GB, pinned=True)]
    assert verdicts(checks.models(pinned, BUDGET))[-1] == ("memory", "problem")


@given(st.lists(st.builds(fact, st.sampled_from("abc"), st.integers(1, 40 * GB)), max_size=5))
def test_whether_models_fit_is_arithmetic(models: list[ModelFact]) -> None:
    found = list(checks.models(models, BUDGET))
    assert [one.verdict for one in found if one.what.startswith("model ")] == [
        "problem" if one.need_bytes > BUDGET.bytes else "ok" for one in models
    ]
    fitting = sum(one.need_bytes for one in models if one.need_bytes <= BUDGET.bytes)
    assert any(one.what == "memory" for one in found) is (fitting > BUDGET.bytes)


def test_a_budget_beyond_the_machine_is_a_warning() -> None:
    assert verdicts(checks.models([fact("a", 1)], Budget(30 * GB, "configured", 24 * GB)))[-1] == ("memory", "warning")
    assert verdicts(checks.models([fact("a", 1)], Budget(30 * GB, "configured", None)))[-1] == ("model a", "ok")
    unknown = Budget(0, "set memory.budget_bytes", None)
    assert verdicts(checks.models([fact("a", 1)], unknown)) == [("model a", "ok"), ("memory", "problem")]


# ---- secrets ----


def test_secrets_say_what_is_wrong_and_in_whose_place_it_was_looked_at() -> None:
    good = SecretFact(Secret("peers.secret", "env:A", strong=True), "", "the running agent")
    bad = SecretFact(Secret("store.access_key", "env:B"), "env:B: the environment variable is not set")
    asks = SecretFact(Secret("store.secret_key", "keychain:x"), None)
    usable, unset, unasked = checks.secrets([good, bad, asks])
    assert (usable.verdict, "peers.secret: usable (as seen by the running agent)" in usable.seen) == ("ok", True)
    assert (unset.verdict, unset.key, unset.seen.endswith("(as seen by this shell)")) == (
        "problem",
        "store.access_key",
        True,
    )
    assert (unasked.verdict, "`mlxrack-agent doctor` does" in unasked.seen) == ("ok", True)


def test_every_reference_of_a_configuration_is_looked_at() -> None:
    """A key whose name says secret or key, and that may hold a reference, is in the list."""
    text = """{"node": {"id": "n", "rack": "r"}, "peers": {"secret": "env:1", "old_secret": "env:6"},
        "disk_cache": {"secret": "env:2"}, "store": {"kind": "s3", "access_key": "env:3", "secret_key": "env:4"},
        "meters": [{"name": "m", "kind": "shelly", "at": "http://x", "nodes": ["n"], "secret": "env:5"}]}"""
    found = checks.references(msgspec.json.decode(text, type=AgentConfig))
    assert sorted(one.reference for one in found) == [f"env:{n}" for n in range(1, 7)]
    assert [one.key for one in found if one.strong] == ["peers.secret", "peers.old_secret", "disk_cache.secret"]
    files_and_limits = {"node_key", "in_flight_per_key"}
    known = {"secret", "old_secret", "access_key", "secret_key"}
    assert _secret_fields(AgentConfig) - files_and_limits == known, "a new one belongs in the list"


def _secret_fields(kind: type[msgspec.Struct]) -> set[str]:
    return {
        field.name
        for inner in (msgspec.inspect.type_info(kind), *_structs(msgspec.inspect.type_info(kind)))
        for field in getattr(inner, "fields", ())
        if field.name.endswith(("secret", "_key"))
    }


def _structs(info: object) -> list[msgspec.inspect.StructType]:
    found: list[msgspec.inspect.StructType] = []
    for field in getattr(info, "fields", ()):
        for one in (field.type, getattr(field.type, "item_type", None)):
            if isinstance(one, msgspec.inspect.StructType):
                found += [one, *_structs(one)]
    return found


# ---- folders, address, urls ----


@pytest.mark.parametrize(
    ("given", "verdict", "words"),
    [
        (FolderFact("paths.state", "/a/b", "/a", "file", writable=False), "problem", "/a is a file, so /a/b cannot"),
        (FolderFact("paths.state", "/a/b", "/a", "folder", writable=False, owner="root"), "problem", "belongs to root"),
        (FolderFact("paths.state", "/a", "/a", "folder", writable=False), "problem", "cannot be written to"),
        (
            FolderFact("paths.state", "/a", "/a", "folder", writable=True, free_bytes=5 * 10**8),
            "warning",
            "500 MB free",
        ),
    ],
)
def test_a_folder_that_cannot_be_made_or_written(given: FolderFact, verdict: str, words: str) -> None:
    (found,) = checks.folder(given)
    assert (found.verdict, found.key, words in found.seen) == (verdict, "paths.state", True)
    assert list(checks.folder(FolderFact("x", "/a", "/a", "folder", writable=True, free_bytes=50 * GB))) == []


def test_a_state_folder_of_another_node() -> None:
    assert list(checks.spool(config_of(), None)) == list(checks.spool(config_of(), ("n1", "r"))) == []
    (found,) = checks.spool(config_of(), ("n2", "r"))
    assert (found.verdict, "node 'n2' of rack 'r'" in found.seen) == ("problem", True)


@pytest.mark.parametrize(
    ("given", "verdict", "words"),
    [
        (ListenFact("127.0.0.1", 1), "ok", "is free"),
        (ListenFact("127.0.0.1", 1, "in_use", "agent"), "ok", "this agent is running"),
        (ListenFact("127.0.0.1", 1, "in_use"), "warning", "another program listens"),
        (ListenFact("10.9.9.9", 1, "no_such_address"), "problem", "has no address 10.9.9.9"),
        (ListenFact("127.0.0.1", 80, "not_permitted"), "problem", "below 1024"),
        (ListenFact("127.0.0.1", 80, "other", detail="what"), "problem", "(what)"),
    ],
)
def test_an_address_that_cannot_be_listened_at(given: ListenFact, verdict: str, words: str) -> None:
    (found,) = checks.listen(given)
    assert (found.verdict, words in found.seen) == (verdict, True)


@pytest.mark.parametrize(
    ("url", "verdict", "words"),
    [
        ("http://127.0.0.1:8470", "problem", "leads back to this node itself"),
        ("http://localhost:8470/", "problem", "leads back to this node itself"),
        ("http://mini-2.local", "warning", "has no port, so 80 is called"),
        ("https://mini-2.local", "warning", "has no port, so 443 is called"),
        ("http://mini-2.local:8470/api", "warning", "has a path"),
    ],
)
def test_odd_urls_of_peers(url: str, verdict: str, words: str) -> None:
    (found,) = checks.peers(config_of(("n2", url)))
    assert (found.verdict, words in found.seen, found.key) == (verdict, True, "peers.nodes[0].url")
    assert list(checks.peers(config_of(("n2", "http://mini-2.local:8470")))) == []


# ---- what was asked ----

M = ModelView(name="m", version="v", ready=True)


@pytest.mark.parametrize(
    ("heartbeat", "problem", "verdict", "words"),
    [
        (Heartbeat(node="n2", rack="r", t_ms=1000, models=(M,)), "", "ok", "models that answer there: m"),
        (Heartbeat(node="n2", rack="r", t_ms=1000), "", "ok", "none yet"),
        (Heartbeat(node="n2", rack="r", t_ms=1000, draining=True), "", "warning", "is stopping"),
        (Heartbeat(node="n2", rack="x", t_ms=1000), "", "problem", "belongs to rack 'x'"),
        (Heartbeat(node="n2", rack="r", t_ms=90_000), "", "warning", "clock skew of 89.0 s"),
        (None, "peer http://u: nothing listens there", "problem", "nothing listens there"),
    ],
)
def test_each_peer_s_answer_is_judged(heartbeat: Heartbeat | None, problem: str, verdict: str, words: str) -> None:
    (found,) = checks.peer_answers(config_of(), [PeerFact("n2", "http://u", heartbeat, problem)], 1000)
    assert (found.verdict, words in found.seen, found.seen.startswith("peer ")) == (verdict, True, False)


def test_the_store_s_answer_is_judged() -> None:
    assert verdicts(checks.store("s3", StoreFact(claim="kept", skew_ms=1))) == [("store", "ok"), ("clock", "ok")]
    (found,) = checks.store("s3", StoreFact(claim="none"))
    assert (found.verdict, "shows at the first upload" in found.seen) == ("ok", True)
    (found,) = checks.store("s3", StoreFact(claim="overwritten"))
    assert (found.verdict, "If-None-Match" in found.seen) == ("problem", True)
    assert verdicts(checks.store("s3", StoreFact(denied=["no"]))) == [("store", "warning")]
    assert verdicts(checks.store("s3", StoreFact(problem="no"))) == [("store", "problem")]


# ---- Macs ----


def mac(**more: object) -> mac_checks.MacFacts:
    given: dict[str, object] = {
        "sources": {"notify": ("nominal", ""), "PSTR": ("", "no reading of system power")},
        "gpu_bytes": 16 * GB,
        "drain_s": 60.0,
        "service": {"ExitTimeOut": 90},
        "status": {"budget_from": "recommended for Apple M4", "models": [{"plan_error_ppm": -200_000}]},
        "renames": False,
    }
    return mac_checks.MacFacts(**(given | more))  # type: ignore[arg-type]


def test_on_a_mac_what_can_be_decided_is_decided_and_the_rest_is_for_somebody_to_look_at() -> None:
    found = dict(verdicts(mac_checks.decided(mac())))
    assert found == {
        "macOS tools": "ok",
        "thermal pressure": "ok",
        "SMC": "warning",
        "Metal": "ok",
        "launchd": "ok",
        "GPU memory": "ok",
        "memory plan": "warning",
    }
    left = {one.what.removeprefix("on a Mac: ") for one in mac_checks.undecided(mac())}
    everything = {one.what.removeprefix("on a Mac: ") for one in mac_checks.undecided(None)}
    assert left == everything - found.keys()
    assert dict(verdicts(mac_checks.decided(mac(service={"ExitTimeOut": 20}))))["launchd"] == "warning"
    assert dict(verdicts(mac_checks.decided(mac(gpu_bytes=None))))["GPU memory"] == "warning"
    assert "launchd" not in dict(verdicts(mac_checks.decided(mac(service=None))))
