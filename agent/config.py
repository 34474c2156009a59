"""The agent's configuration: schema, defaults and the checks that types cannot express. docs/configuration.md is
tested against this module."""

import hashlib
import re
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from shared import transport
from shared.bucket import REFERENCE_HINT, Store, check_store, is_reference
from shared.errors import Refused
from shared.hosts import is_loopback
from shared.keys import check_name
from shared.transport import Tls

DEFAULT_PORT = 8470
STORED = "store:"
"""Prefix of a model path that names a model in the model store, with or without @VERSION."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9_.-]+(:\d{1,5})?|https?://\[[0-9a-f:]+\](:\d{1,5})?")
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?")

PlugKind = Literal["shelly", "shelly_pm1", "shelly_em1", "shelly_gen1", "tasmota"]
ApcKind = Literal["apc_device", "apc_legacy", "apc_outlet"]
MeterKind = Literal[PlugKind, ApcKind, "raritan_outlet", "raritan_inlet", "servertech_cord", "sensor"]
SNMP_NUMBERS = {
    "apc_device": 1,
    "apc_legacy": 0,
    "apc_outlet": 1,
    "raritan_outlet": 2,
    "raritan_inlet": 2,
    "servertech_cord": 2,
    "sensor": 1,
}
"""How many numbers identify an outlet, by kind read over SNMP: APC's device or outlet, Raritan's PDU and outlet, Server
Technology's unit and cord, a sensor's index."""
Positive = Annotated[int, Meta(gt=0)]
Seconds = Annotated[float, Meta(gt=0)]


class Node(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The identity of this machine."""

    id: str
    rack: str


class Listen(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The address that clients and peers connect to. Addresses beyond loopback require keys, and TLS or
    ``insecure_http``. On a loopback address only requests to a loopback name (localhost, 127.0.0.1, [::1]) are served,
    and to ``names``: those under which a proxy on this machine passes requests on. ``trusted_proxies`` are addresses or
    networks whose X-Forwarded-For and X-Forwarded-Proto are believed."""

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = DEFAULT_PORT
    names: tuple[str, ...] = ()
    insecure_http: bool = False
    trusted_proxies: tuple[str, ...] = ()


class Paths(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Folders; "" uses the platform's default (docs/configuration.md)."""

    state: str = ""
    logs: str = ""


class Key(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A client's API key: the id that reports show, and the SHA-256 of the key; never the key. What its prompts leave
    in the prompt caches serves no other key, but those of the same ``cache_group``, if it has one: whoever shares a
    cache can find out what the others have sent."""

    id: str
    sha256: str
    cache_group: str = ""


class Peer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Another node of the rack."""

    id: str
    url: str


class Peers(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The rack's nodes. ``secret`` is a reference to their shared secret, at least 32 random characters (`mlxrack-agent
    new-secret`); requests between nodes are signed with it. A peer that misses three heartbeats, ``beat_s`` apart, is
    down. The desired state may name other peers, at hosts that are ``allowed``: names, domains like .rack.example, or
    networks like 10.0.0.0/24."""

    secret: str = ""
    allowed: tuple[str, ...] = ()
    beat_s: Seconds = 1.0
    nodes: tuple[Peer, ...] = ()


class Model(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model this node can serve. ``path`` is an mlx-lm model folder, or a BERT-class encoder's; ``store:NAME`` (or
    ``store:NAME@VERSION``) refers to one that was pulled into the model store.

    Up to ``rows`` requests are decoded together; they may hold ``rows`` times ``plan_context_tok`` tokens in total,
    which is also the longest context of one. Decoding rows wait at most about ``stall_s`` for a prefill chunk, which
    has at most ``prefill_chunk_tok`` tokens. ``cache_bytes`` bounds the prompt cache in memory, ``disk_cache_bytes``
    the one on disk, which survives a restart (0 disables it).
    ``probes`` is a file of questions with recorded answers that a standby must reproduce before it takes over, each
    of its timed requests within ``probe_p99_s``. A model unused for ``keep_alive_s`` is evicted; 0 evicts it at once,
    -1 never. ``need_bytes`` overrides the memory plan computed from the files.
    """

    name: str
    path: str = ""
    engine: Literal["mlx", "fake"] = "mlx"
    preload: bool = True
    pinned: bool = False
    max_tokens: Positive = 4096
    rows: Annotated[int, Meta(ge=1, le=64)] = 8
    prefill_chunk_tok: Annotated[int, Meta(ge=16, le=8192)] = 512
    stall_s: Seconds = 0.75
    cache_bytes: Annotated[int, Meta(ge=0)] = 256 << 20
    disk_cache_bytes: Annotated[int, Meta(ge=0)] = 0
    plan_context_tok: Positive = 2048
    need_bytes: Annotated[int, Meta(ge=0)] = 0
    probes: str = ""
    probe_p99_s: Seconds = 30.0
    keep_alive_s: Annotated[float, Meta(ge=-1)] = -1
    fake_step_s: float = 0.0
    fake_row_s: float = 0.0
    fake_prefill_tps: float = 0.0
    fake_cache_tok: Annotated[int, Meta(ge=0)] = 0
    fake_load_s: float = 0.0
    fake_held_bytes: Annotated[int, Meta(ge=0)] = 0


class Telemetry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How often a window is closed and how often segments are uploaded; how much the spool may hold meanwhile.
    Temperatures, power and memory are polled every ``poll_s`` in between."""

    sample_s: Seconds = 60.0
    poll_s: Annotated[float, Meta(ge=0.2, le=5)] = 2.0
    upload_s: Seconds = 60.0
    spool_bytes: Positive = 200 << 20
    spool_days: Positive = 30


class Meter(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A metered outlet, read by this node for the rack: configure each on one node only. It powers ``nodes``; a reading
    that several share is reported as measured, and never divided.

    ``kind`` is shelly (Switch, generation 2 and later), shelly_pm1, shelly_em1, shelly_gen1 or tasmota, with ``at`` a
    url and ``channel`` the outlet; or over SNMP apc_device, apc_legacy, apc_outlet, raritan_outlet, raritan_inlet,
    servertech_cord or sensor (RFC 3433), with ``at`` an address and ``numbers`` the outlet's identifiers there.
    ``secret`` is a reference to the password or the community; ``scale`` is watts per unit of an APC outlet.
    """

    name: str
    kind: MeterKind
    at: str
    nodes: tuple[str, ...]
    channel: Annotated[int, Meta(ge=0)] = 0
    numbers: tuple[Annotated[int, Meta(ge=0)], ...] = ()
    user: str = "admin"
    secret: str = ""
    scale: Annotated[float, Meta(gt=0)] = 1.0


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits on client requests and on how long operations may take. Before its first token a request may be silent for
    ``first_token_s``: neither waiting for its turn nor being computed. It has ``request_s`` without the time in which
    it waits at a loader or is computed, and again from its first token on. A loader that has work and makes no progress
    for ``progress_s`` turns /live to 503; after ``stuck_s`` the watchdog ends it and starts it again.

    A connection must send its first request's headers within ``header_s`` and the next request within ``idle_s``. At
    most ``connections`` are open (fewer where the process may open too few files), ``connections_per_address`` of one
    address; when they are all taken, those that have sent no request are closed first. The bodies of requests in
    flight and what they decode to may take ``bodies_bytes`` of memory in all and ``bodies_per_key_bytes`` for an API
    key."""

    header_s: Seconds = 10.0
    idle_s: Seconds = 75.0
    connections: Annotated[int, Meta(ge=16)] = 2048
    connections_per_address: Positive = 512
    body_bytes: Annotated[int, Meta(gt=0, le=16 << 20)] = 10 << 20
    body_s: Seconds = 60.0
    bodies_bytes: Positive = 256 << 20
    bodies_per_key_bytes: Positive = 64 << 20
    in_flight_per_model: Positive = 64
    in_flight_per_key: Positive = 48
    request_s: Seconds = 600.0
    first_token_s: Seconds = 120.0
    token_gap_s: Seconds = 60.0
    progress_s: Seconds = 10.0
    stuck_s: Seconds = 60.0
    load_wait_s: Seconds = 120.0
    drain_s: Seconds = 60.0


class Api(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the API treats fields that this server does not know. ``unknown_fields`` are ignored, and named in the log
    and in the response header X-Mlxrack-Ignored; or refused with a 400. With ``strict`` a ``max_tokens`` beyond the
    context length is a 400, else it is capped and named in that header.

    While the prompt of a stream is computed, an SSE comment is sent every ``keepalive_s``, so that proxies and clients
    that drop silent connections (commonly after 60 s) keep it; 0 sends none. With the first comment the status 200 is
    sent, so an error after it ends the stream as an event.

    Web pages of ``cors_origins`` (exact origins, like https://chat.example.com) may use the API from a browser; others
    are refused. Where keys are configured, /metrics and /debug require the token in metrics.token of the state folder,
    or the admin token; with ``open_metrics`` they are open."""

    unknown_fields: Literal["ignore", "refuse"] = "ignore"
    strict: bool = False
    keepalive_s: Annotated[float, Meta(ge=0)] = 15.0
    open_metrics: bool = False
    cors_origins: tuple[str, ...] = ()


class Memory(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``budget_bytes`` for all models together; 0 uses what the GPU reports, else the share of the machine's memory
    that Metal would recommend.

    A model is evicted for another only after ``min_residency_s`` in memory (or as long as its loading took). When
    requests for a model that is not resident have waited ``max_wait_s``, one in use is drained to make room.
    The memory guard acts when models hold the share ``soft`` of the budget, and more strongly from ``hard`` on.
    """

    budget_bytes: Annotated[int, Meta(ge=0)] = 0
    min_residency_s: Annotated[float, Meta(ge=0)] = 5.0
    max_wait_s: Annotated[float, Meta(ge=0)] = 20.0
    soft: Annotated[float, Meta(gt=0, le=2)] = 0.9
    hard: Annotated[float, Meta(gt=0, le=2)] = 1.0


class Shelf(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Models on disk: the folder into which they are pulled ("" is models in the state folder) and how many bytes it
    may hold (0: limited by the disk only)."""

    path: str = ""
    disk_bytes: Annotated[int, Meta(ge=0)] = 0


class Desired(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How often the node polls the bucket for a newer desired state."""

    follow_s: Seconds = 60.0


class DiskCache(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The prompt cache on disk, for models with ``disk_cache_bytes``. It holds prompts, so it is encrypted; ``secret``
    is a reference to the secret that keys are derived from (at least 32 random characters), kept elsewhere."""

    secret: str = ""


class Loader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``threads`` of the CPU's BLAS in each loader; 0 divides the cores among the models. Linux only."""

    threads: Annotated[int, Meta(ge=0)] = 0


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """agent.toml. Without ``store`` a node that has no peers keeps its telemetry in its state folder."""

    node: Node
    listen: Listen = Listen()
    tls: Tls = Tls()
    paths: Paths = Paths()
    keys: tuple[Key, ...] = ()
    peers: Peers = Peers()
    models: tuple[Model, ...] = ()
    store: Store = Store()
    telemetry: Telemetry = Telemetry()
    meters: tuple[Meter, ...] = ()
    limits: Limits = Limits()
    api: Api = Api()
    memory: Memory = Memory()
    model_store: Shelf = Shelf()
    desired: Desired = Desired()
    loader: Loader = Loader()
    disk_cache: DiskCache = DiskCache()
    log_level: Literal["debug", "info", "warning", "error"] = "info"


def hash_key(key: str) -> str:
    """The hash that the configuration holds for an API key."""
    return hashlib.sha256(key.encode()).hexdigest()


def cache_group(keys: Sequence[Key], key_id: str) -> str:
    """The group with which a key shares its prompt cache; "" for none."""
    return next((key.cache_group for key in keys if key.id == key_id), "")


def check(config: AgentConfig) -> Sequence[str]:
    """Every problem that types cannot express, with key paths."""
    return [
        *_check_names(config),
        *_check_listen(config),
        *_check_transport(config),
        *_check_browsers(config),
        *_check_bodies(config.limits),
        *_check_keys(config.keys),
        *_check_peers(config),
        *_check_models(config.models),
        *_check_disk_cache(config),
        *_check_meters(config.meters),
        *_check_store(config),
    ]


def has_store(config: AgentConfig) -> bool:
    """Whether a bucket is configured."""
    return config.store != Store()


def with_own_store(config: AgentConfig, folder: str) -> AgentConfig:
    """A node without a [store] keeps its telemetry in a folder of its own."""
    return config if has_store(config) else msgspec.structs.replace(config, store=Store(path=folder))


def _check_store(config: AgentConfig) -> list[str]:
    """One node alone needs none."""
    if has_store(config):
        return check_store(config.store)
    return ["store.path: is required with peers; all nodes of a rack share one bucket"] if config.peers.nodes else []


def _check_names(config: AgentConfig) -> list[str]:
    named = [("node.id", config.node.id), ("node.rack", config.node.rack)]
    named += [(f"models[{n}].name", m.name) for n, m in enumerate(config.models)]
    named += [(f"peers.nodes[{n}].id", p.id) for n, p in enumerate(config.peers.nodes)]
    named += [(f"keys[{n}].id", k.id) for n, k in enumerate(config.keys)]
    named += [(f"keys[{n}].cache_group", k.cache_group) for n, k in enumerate(config.keys) if k.cache_group]
    found = []
    for path, name in named:
        try:
            check_name(name, path)
        except Refused as error:
            found.append(error.message)
    return found


def _check_listen(config: AgentConfig) -> list[str]:
    if is_loopback(config.listen.host) or config.keys:
        return []
    remedy = "create one with `mlxrack-agent new-key NAME`, or listen on 127.0.0.1"
    open_to = f"{config.listen.host} is reachable from other machines, and no [[keys]] entry exists"
    return [f"listen.host: {open_to}; {remedy}"]


def _check_browsers(config: AgentConfig) -> list[str]:
    found = [
        f"listen.names[{n}]: must be a host name or an IPv4 address, without a port"
        for n, name in enumerate(config.listen.names)
        if not _NAME.fullmatch(name)
    ]
    return found + [
        f"api.cors_origins[{n}]: must be an origin in lower case, like https://chat.example.com; * is not supported"
        for n, origin in enumerate(config.api.cors_origins)
        if not _ORIGIN.fullmatch(origin)
    ]


def _check_bodies(limits: Limits) -> list[str]:
    """The largest body must fit into what its key and all keys may hold, a text twice (docs/api.md)."""
    found = []
    if limits.bodies_per_key_bytes < 2 * limits.body_bytes:
        found.append("limits.bodies_per_key_bytes: must be at least twice limits.body_bytes")
    if limits.bodies_bytes < limits.bodies_per_key_bytes:
        found.append("limits.bodies_bytes: must be at least limits.bodies_per_key_bytes")
    return found


def scheme(config: AgentConfig) -> str:
    """How the listener is spoken to."""
    return "https" if config.tls.certificate else "http"


def plain_url(config: AgentConfig, url: str) -> str:
    """Why a peer must not be called at ``url``; "" when it may be."""
    return transport.plain_url(url, config.tls, insecure=config.listen.insecure_http)


def plain_warnings(config: AgentConfig) -> list[str]:
    """What a running node sends in clear because ``insecure_http`` allows it, a sentence each."""
    return transport.plain_warnings(config.listen.host, [(p.id, p.url) for p in config.peers.nodes], config.tls)


def _check_transport(config: AgentConfig) -> list[str]:
    """What would send prompts and keys in clear, or cannot work."""
    insecure = config.listen.insecure_http
    urls = [(f"peers.nodes[{n}].url", plain_url(config, p.url)) for n, p in enumerate(config.peers.nodes)]
    return [
        *transport.check_tls(config.tls),
        *transport.check_listen(config.listen.host, config.listen.trusted_proxies, config.tls, insecure=insecure),
        *(f"{path}: {why}" for path, why in urls if why),
    ]


def _check_keys(keys: Sequence[Key]) -> list[str]:
    found = [
        f"keys[{n}].sha256: must be a SHA-256 in hex; `mlxrack-agent new-key NAME` prints one"
        for n, key in enumerate(keys)
        if not _SHA256.fullmatch(key.sha256)
    ]
    return found + [
        f"keys[{n}].cache_group: must be that of the other keys with the id {key.id!r}"
        for n, key in enumerate(keys)
        if key.cache_group != cache_group(keys, key.id)
    ]


def _check_peers(config: AgentConfig) -> list[str]:
    peers, found = config.peers, []
    ids = [p.id for p in peers.nodes]
    if config.node.id in ids:
        found.append(f"peers.nodes: lists this node itself ({config.node.id!r}); remove it")
    found += [f"peers.nodes: duplicate id {i!r}" for i in sorted({i for i in ids if ids.count(i) > 1})]
    found += [
        f"peers.nodes[{n}].url: must begin with http:// or https://"
        for n, p in enumerate(peers.nodes)
        if not p.url.startswith(("http://", "https://"))
    ]
    urls = [p.url.rstrip("/") for p in peers.nodes]
    found += [f"peers.nodes: duplicate url {u}" for u in sorted({u for u in urls if urls.count(u) > 1})]
    if peers.nodes and not peers.secret:
        found.append("peers.secret: is required with peers; use the same secret on all nodes")
    if peers.secret and not is_reference(peers.secret):
        found.append(f"peers.secret: {REFERENCE_HINT}")
    return found


def _check_disk_cache(config: AgentConfig) -> list[str]:
    secret = config.disk_cache.secret
    if secret and not is_reference(secret):
        return [f"disk_cache.secret: {REFERENCE_HINT}"]
    if not secret and any(m.disk_cache_bytes for m in config.models):
        return ["disk_cache.secret: is required with disk_cache_bytes, because the disk cache holds prompts"]
    return []


def _check_meters(meters: Sequence[Meter]) -> list[str]:
    names = [m.name for m in meters]
    found = [f"meters: duplicate name {n!r}" for n in sorted({n for n in names if names.count(n) > 1})]
    for n, meter in enumerate(meters):
        numbers = SNMP_NUMBERS.get(meter.kind)
        if numbers is None and not meter.at.startswith(("http://", "https://")):
            found.append(f"meters[{n}].at: must begin with http:// or https:// for {meter.kind}")
        if numbers is not None and "://" in meter.at:
            found.append(f"meters[{n}].at: must be an address for {meter.kind}, like 10.0.0.9 or 10.0.0.9:161")
        if numbers is not None and len(meter.numbers) != numbers:
            found.append(f"meters[{n}].numbers: {meter.kind} needs {numbers}, got {len(meter.numbers)}")
        if not meter.nodes:
            found.append(f"meters[{n}].nodes: is required; list the nodes that it powers")
        if meter.secret and not is_reference(meter.secret):
            found.append(f"meters[{n}].secret: {REFERENCE_HINT}")
    return found


def _check_models(models: Sequence[Model]) -> list[str]:
    names = [m.name for m in models]
    found = [f"models: duplicate name {n!r}" for n in sorted({n for n in names if names.count(n) > 1})]
    return found + [
        f"models[{n}].path: is required (the model's folder)"
        for n, m in enumerate(models)
        if m.engine == "mlx" and not m.path
    ]
