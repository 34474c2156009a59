"""What can be said of a configuration and its machine: one list, for `check-config` and for `doctor`. Pure.

`check-config` judges what can be known without asking anybody (agent/operator/facts.py gathers it); `doctor` judges the
same, and what it has asked the peers, the store, the GPU and the running agent (agent/operator/doctor.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from agent.config import AgentConfig, configured_peers, plain_warnings
from agent.mesh.peers import SKEW_WARNING_MS, Heartbeat, of_another_rack, skewed
from agent.operator.statusview import size
from agent.policy.rules import differing
from shared.bucket import is_reference
from shared.chips import identify
from shared.hosts import host_of, is_loopback
from shared.records import Hardware

Verdict = Literal["ok", "warning", "problem"]
LEAST_FREE_BYTES = 1 << 30
"""Of a disk that holds state: telemetry waits there while the store is away."""


class Finding(NamedTuple):
    """One check: what was looked at, the verdict, what was seen and what to do. ``key`` is the configuration's."""

    what: str
    verdict: Verdict
    seen: str
    key: str = ""


class Secret(NamedTuple):
    """A reference to a secret at ``key``; keys are derived from one that must be ``strong``."""

    key: str
    reference: str
    strong: bool = False


class SecretFact(NamedTuple):
    """``problem`` is why it cannot be used ("" when it can), None for one that nobody has asked. ``by`` is in whose
    place it was looked at."""

    secret: Secret
    problem: str | None
    by: str = "this shell"


class ModelFact(NamedTuple):
    """A model's planned bytes, and those with one request of 2,048 tokens; ``problem`` is why it cannot be loaded."""

    key: str
    name: str
    need_bytes: int = 0
    least_bytes: int = 0
    pinned: bool = False
    problem: str = ""


class Budget(NamedTuple):
    """Bytes for all models (0: nothing tells them, and ``source`` says what to do), where the number comes from, and
    the machine's memory (None: no source tells it)."""

    bytes: int
    source: str
    machine_bytes: int | None


class FolderFact(NamedTuple):
    """A folder that is written to: ``existing`` is its first part that exists, ``kind`` is folder, file or link."""

    key: str
    path: str
    existing: str
    kind: str
    writable: bool
    owner: str = ""
    free_bytes: int | None = None


class ListenFact(NamedTuple):
    """What came of listening at an address. ``taken_by``: "" when nobody answers there, "agent" for this agent."""

    host: str
    port: int
    error: Literal["", "in_use", "no_such_address", "not_permitted", "other"] = ""
    taken_by: str = ""
    detail: str = ""


class PeerFact(NamedTuple):
    """What came of asking a peer: its heartbeat, or why there is none."""

    node: str
    url: str
    heartbeat: Heartbeat | None = None
    problem: str = ""
    hop_ms: float = 0.0


class StoreFact(NamedTuple):
    """What came of asking the store. ``denied`` is why the credentials may not do some of what a node does; ``claim``
    is whether this node has a claim there, and what became of one that was written again on the condition that there
    is none: the store must refuse that."""

    problem: str = ""
    denied: Sequence[str] = ()
    claim: Literal["none", "kept", "overwritten"] = "none"
    skew_ms: int | None = None


class PolicyFact(NamedTuple):
    """The policy file: every problem, or its version, its digest, its references to secrets and what is probably not
    meant."""

    problems: Sequence[str] = ()
    version: str = ""
    digest: str = ""
    doubts: Sequence[str] = ()
    secrets: Sequence[Secret] = ()


class Facts(NamedTuple):
    """What is known without asking anybody else."""

    secrets: Sequence[SecretFact]
    models: Sequence[ModelFact]
    budget: Budget
    folders: Sequence[FolderFact]
    listen: ListenFact
    tls_problem: str = ""
    tls_warnings: Sequence[str] = ()
    spool_of: tuple[str, str] | None = None
    """Node and rack whose telemetry lies in the state folder; None when there is none."""
    policy: PolicyFact = PolicyFact()


def here(config: AgentConfig, facts: Facts) -> list[Finding]:
    """Everything that `check-config` knows, in the order in which an operator would look at it."""
    return [
        *secrets(facts.secrets),
        *models(facts.models, facts.budget),
        *(one for fact in facts.folders for one in folder(fact)),
        *spool(config, facts.spool_of),
        *listen(facts.listen),
        *peers(config),
        *transport(config, facts),
        *policy(config, facts.policy),
    ]


def chip(hardware: Hardware, *, on_a_mac: bool) -> Finding:
    """What the chip table expects of this machine; a Mac that it does not know, or that contradicts itself, is worth a
    warning."""
    told = identify(hardware.model, hardware.chip, hardware.memory_bytes)
    return Finding("chip", "warning" if told.remarks and on_a_mac else "ok", told.text)


def references(config: AgentConfig) -> list[Secret]:
    """Every reference to a secret in a configuration; a literal value is reported elsewhere."""
    found = [
        Secret("peers.secret", config.peers.secret, strong=True),
        Secret("peers.old_secret", config.peers.old_secret, strong=True),
        Secret("disk_cache.secret", config.disk_cache.secret, strong=True),
        Secret("store.access_key", config.store.access_key),
        Secret("store.secret_key", config.store.secret_key),
        *(Secret(f"meters[{n}].secret", meter.secret) for n, meter in enumerate(config.meters)),
    ]
    return [one for one in found if one.reference and is_reference(one.reference)]


def unfit_for_service(secret: Secret) -> str:
    """Why no service can ever use this kind of reference; "" for the others."""
    if not secret.reference.startswith("env:"):
        return ""
    return f"{secret.reference}: launchd gives a service HOME and PATH alone; use file:, keychain: or op:// instead"


def secrets(facts: Sequence[SecretFact]) -> Iterator[Finding]:
    """Those that could be used, in whose place they were looked at, and why the others cannot."""
    usable = [fact for fact in facts if fact.problem == ""]
    if usable:
        names = ", ".join(fact.secret.key for fact in usable)
        places = ", ".join(sorted({fact.by for fact in usable}))
        yield Finding("secrets", "ok", f"{names}: usable (as seen by {places})")
    for fact in facts:
        key, reference = fact.secret.key, fact.secret.reference
        if fact.problem is None:
            seen = f"{reference}: not looked up, because that may ask you; `mlxrack-agent doctor` does"
            yield Finding(f"secret {key}", "ok", seen, key)
        elif fact.problem:
            yield Finding(f"secret {key}", "problem", f"{fact.problem} (as seen by {fact.by})", key)


def models(facts: Sequence[ModelFact], budget: Budget) -> Iterator[Finding]:
    """Whether each can be loaded, and whether all of them fit together."""
    if not facts:
        yield Finding("models", "warning", "none configured; this node can only forward requests to peers")
    for fact in facts:
        if fact.problem:
            yield Finding(f"model {fact.name}", "problem", fact.problem, fact.key)
        elif not budget.bytes:
            yield Finding(f"model {fact.name}", "ok", f"needs {size(fact.need_bytes)}", fact.key)
        elif fact.need_bytes > budget.bytes:
            yield Finding(f"model {fact.name}", "problem", _too_large(fact, budget), fact.key)
        else:
            seen = f"needs {size(fact.need_bytes)} of {size(budget.bytes)}"
            yield Finding(f"model {fact.name}", "ok", seen, fact.key)
    if not budget.bytes:
        yield Finding("memory", "problem", budget.source, "memory.budget_bytes")
    yield from _together([one for one in facts if not one.problem and one.need_bytes <= budget.bytes], budget)
    if budget.machine_bytes is not None and budget.bytes > budget.machine_bytes:
        seen = f"the budget of {size(budget.bytes)} is more than this machine's {size(budget.machine_bytes)}"
        yield Finding("memory", "warning", f"{seen}; correct memory.budget_bytes", "memory.budget_bytes")


def _too_large(fact: ModelFact, budget: Budget) -> str:
    seen = f"needs {size(fact.need_bytes)}, and all models may have {size(budget.bytes)} ({budget.source})"
    if fact.least_bytes > budget.bytes:
        return (
            f"{seen}: it can never be loaded, not even for one short request ({size(fact.least_bytes)}); use a smaller "
            "or more strongly quantized model (`mlxrack-agent models recommend`)"
        )
    return f"{seen}: it can never be loaded like this; lower its rows, plan_context_tok or cache_bytes"


def _together(fitting: Sequence[ModelFact], budget: Budget) -> Iterator[Finding]:
    """What each fits alone, and not beside the others."""
    need, pinned = sum(one.need_bytes for one in fitting), [one for one in fitting if one.pinned]
    if need <= budget.bytes:
        return
    names = ", ".join(one.name for one in fitting)
    held = sum(one.need_bytes for one in pinned)
    if held > budget.bytes:
        which = ", ".join(one.name for one in pinned)
        seen = f"the pinned models {which} need {size(held)} together, and all models may have {size(budget.bytes)}"
        yield Finding("memory", "problem", f"{seen}; unpin one: a pinned model never makes room", "models")
        return
    seen = f"{names} need {size(need)} together, and all models may have {size(budget.bytes)} ({budget.source})"
    yield Finding("memory", "warning", f"{seen}: they take turns, and requests wait while one is loaded", "models")


def folder(fact: FolderFact) -> Iterator[Finding]:
    """Whether a folder exists or can be made, and has room."""
    what = f"folder {fact.key}"
    if fact.kind != "folder":
        seen = (
            f"{fact.existing} is a {fact.kind}, so {fact.path} cannot be made; move it away, or set another {fact.key}"
        )
        yield Finding(what, "problem", seen, fact.key)
    elif not fact.writable:
        owner = f"; it belongs to {fact.owner}" if fact.owner else ""
        verb = "written to" if fact.existing == fact.path else "made, because its parent may not be written to"
        seen = f"{fact.path} cannot be {verb} by this user{owner}: run this as the agent's user (`sudo -u`), or `chown`"
        yield Finding(what, "problem", f"{seen} {fact.existing}", fact.key)
    elif fact.free_bytes is not None and fact.free_bytes < LEAST_FREE_BYTES:
        yield Finding(what, "warning", f"{fact.path}: only {size(fact.free_bytes)} free on its disk", fact.key)


def spool(config: AgentConfig, spool_of: tuple[str, str] | None) -> Iterator[Finding]:
    """Whether the state folder is another node's."""
    if spool_of is None or spool_of == (config.node.id, config.node.rack):
        return
    seen = f"the state folder is that of node {spool_of[0]!r} of rack {spool_of[1]!r}"
    remedy = "restore node.id and node.rack, or set another paths.state for the new node"
    yield Finding("node", "problem", f"{seen}; {remedy}", "node.id")


def listen(fact: ListenFact) -> Iterator[Finding]:
    """Whether the address can be listened at."""
    at = f"{fact.host}:{fact.port}"
    if fact.error == "in_use":
        yield _taken(at, fact)
    elif fact.error == "no_such_address":
        seen = f"this machine has no address {fact.host}; use one of its own, or 0.0.0.0 for all of them"
        yield Finding("listen", "problem", seen, "listen.host")
    elif fact.error == "not_permitted":
        seen = f"this user may not listen at {at}; ports below 1024 need root: use another, like 8470"
        yield Finding("listen", "problem", seen, "listen.port")
    elif fact.error:
        yield Finding("listen", "problem", f"cannot listen at {at} ({fact.detail})", "listen.host")
    else:
        yield Finding("listen", "ok", f"{at} is free")


def _taken(at: str, fact: ListenFact) -> Finding:
    if fact.taken_by == "agent":
        return Finding("listen", "ok", f"this agent is running and listens at {at}")
    who = fact.taken_by or "another program"
    return Finding("listen", "warning", f"{who} listens at {at}; stop it, or set another listen.port", "listen.port")


def peers(config: AgentConfig) -> Iterator[Finding]:
    """What is odd about the urls of peers, although nodes might answer there."""
    for n, (node, url) in enumerate(configured_peers(config)):
        key = f"peers.nodes[{n}].url"
        if why := _odd_url(config, url):
            yield Finding(f"peer {node}", "problem" if "itself" in why else "warning", why, key)


def _odd_url(config: AgentConfig, url: str) -> str:
    host = host_of(url)
    if not host:
        return ""  # reported as no address at all
    parts = urlsplit(url)
    if is_loopback(host) and parts.port == config.listen.port and not parts.path.strip("/"):
        return f"{url} leads back to this node itself, whose listen.port it has; use the address of the other machine"
    if parts.path.strip("/"):
        return f"{url} has a path; nodes answer below it only where a proxy serves them so, else leave it out"
    if parts.port is None:
        return f"{url} has no port, so {443 if parts.scheme == 'https' else 80} is called; an agent listens on 8470"
    return ""


def transport(config: AgentConfig, facts: Facts) -> Iterator[Finding]:
    """TLS: whether its files can be used, and when they expire; and what is sent without it."""
    for warning in plain_warnings(config, configured_peers(config)):
        yield Finding("plain HTTP", "warning", warning)
    if facts.tls_problem:
        yield Finding("tls", "problem", facts.tls_problem.removeprefix("tls: "), "tls")
    elif config.tls.certificate:
        for warning in facts.tls_warnings:
            yield Finding("tls", "warning", warning)
        if not facts.tls_warnings:
            yield Finding("tls", "ok", "all certificates are valid for over 30 days")
    elif is_loopback(config.listen.host):
        yield Finding("tls", "ok", "not configured; this node is reachable from this machine only")


def policy(config: AgentConfig, fact: PolicyFact) -> Iterator[Finding]:
    """Whether the policy file can be used, and what of it is probably not meant."""
    if not config.policy.path:
        yield Finding("policy", "ok", "no file: every key may use every model, and nothing leaves the premises")
    elif fact.problems:
        yield from (
            Finding("policy", "problem", f"{config.policy.path}: {one}", "policy.path") for one in fact.problems
        )
    else:
        yield Finding("policy", "ok", f"version {fact.version} ({fact.digest})")
    yield from (Finding("policy", "warning", one) for one in fact.doubts)


def policies(mine: str, facts: Sequence[PeerFact]) -> Iterator[Finding]:
    """Peers that decide by another policy than this node, whose policy has the digest ``mine``."""
    heard = {fact.node: fact.heartbeat.policy for fact in facts if fact.heartbeat is not None}
    if told := differing(mine, heard):
        yield Finding("policy", "warning", told.removeprefix("policy: "))


def peer_answers(config: AgentConfig, facts: Sequence[PeerFact], now_ms: int) -> Iterator[Finding]:
    """What each peer answered, and what to do where it did not."""
    for fact in facts:
        what, heard = f"peer {fact.node}", fact.heartbeat
        if heard is None:
            yield Finding(what, "problem", fact.problem.removeprefix(f"peer {fact.url}: "))
        elif foreign := of_another_rack(fact.url, heard, config.node.rack):
            yield Finding(what, "problem", foreign.removeprefix(f"peer {fact.url}: "))
        elif late := skewed(fact.url, heard, now_ms):
            yield Finding(what, "warning", late.removeprefix(f"peer {fact.url}: "))
        else:
            ready = ", ".join(sorted(model.name for model in heard.models if model.ready)) or "none yet"
            state = "is stopping; " if heard.draining else ""
            verdict: Verdict = "warning" if heard.draining else "ok"
            yield Finding(what, verdict, f"{state}answers in {fact.hop_ms:.0f} ms; models that answer there: {ready}")


def store(kind: str, fact: StoreFact) -> Iterator[Finding]:
    """Whether the store can be reached, and lets this node do what it has to."""
    if fact.problem:
        yield Finding("store", "problem", fact.problem, "store")
    elif fact.claim == "overwritten":
        seen = "it writes where it was told not to (If-None-Match): two nodes could overwrite each other's telemetry"
        yield Finding("store", "problem", f"{seen}; use a store with conditional writes (docs/bucket.md)", "store")
    elif not fact.denied:
        wrote = "" if fact.claim == "kept" else "; whether they may write shows at the first upload"
        yield Finding("store", "ok", f"{kind}: the bucket is there and accepts the credentials{wrote}")
    for why in fact.denied:
        yield Finding("store", "warning", why, "store")
    if fact.skew_ms is not None:
        yield clock(fact.skew_ms)


def meters(polled: Sequence[Mapping[str, Any]], running: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """What each meter said, as in a status: just now from here, else to the running agent; or why it said nothing."""
    by_agent = {meter["meter"]: meter for meter in running}
    for n, meter in enumerate(polled):
        what, nodes = f"meter {meter['meter']}", ", ".join(meter["nodes"])
        seen = by_agent.get(meter["meter"], meter)
        if meter["watts"] is not None:
            yield Finding(what, "ok", f"{meter['watts']:g} W for {nodes}")
        elif seen["watts"] is not None:
            yield Finding(what, "ok", f"{seen['watts']:g} W for {nodes} (as seen by the running agent)")
        else:
            yield Finding(what, "warning", meter["problem"], f"meters[{n}]")


def clock(skew_ms: int) -> Finding:
    """This machine's clock, compared with the store's."""
    if abs(skew_ms) <= SKEW_WARNING_MS:
        return Finding("clock", "ok", f"within {SKEW_WARNING_MS / 1000:g} s of the store's")
    seen = f"{abs(skew_ms) / 1000:.0f} s {'ahead of' if skew_ms > 0 else 'behind'} the store's; set it by NTP"
    return Finding("clock", "warning", seen)
