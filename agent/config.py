"""The agent's configuration: schema, defaults and the checks that types cannot express. docs/configuration.md is
tested against this module."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from agent.config_oidc import Oidc
from shared import transport
from shared.bucket import Store
from shared.transport import Tls

DEFAULT_PORT = 8470
STORED = "store:"
"""Prefix of a model path that names a model in the model store, with or without @VERSION."""

ShellyKind = Literal["shelly", "shelly_pm1", "shelly_em1", "shelly_em", "shelly_gen1", "shelly_gen1_em"]
PlugKind = Literal[ShellyKind, "tasmota", "home_assistant", "kasa", "tapo"]
ApcKind = Literal["apc_device", "apc_legacy", "apc_outlet"]
SentryKind = Literal[
    "servertech_cord", "servertech_outlet", "sentry3_tower", "sentry3_infeed", "sentry3_phases", "sentry3_outlet"
]
PduKind = Literal[
    ApcKind, "raritan_outlet", "raritan_inlet", SentryKind, "eaton_outlet", "eaton_input", "cyberpower_outlet"
]
MeterKind = Literal[PlugKind, PduKind, "cyberpower_load", "sensor", "snmp"]
SNMP_NUMBERS = {
    "apc_device": 1,
    "apc_legacy": 0,
    "apc_outlet": 1,
    "raritan_outlet": 2,
    "raritan_inlet": 2,
    "servertech_cord": 2,
    "servertech_outlet": 3,
    "sentry3_tower": 1,
    "sentry3_infeed": 2,
    "sentry3_phases": 1,
    "sentry3_outlet": 3,
    "eaton_outlet": 2,
    "eaton_input": 2,
    "cyberpower_outlet": 1,
    "cyberpower_load": 1,
    "sensor": 1,
    "snmp": 0,
}
"""How many numbers identify an outlet, by kind read over SNMP: APC's device or outlet, Raritan's PDU and outlet, Server
Technology's unit, cord and outlet or, of Sentry3, tower, infeed and outlet, Eaton's unit and outlet or input,
CyberPower's outlet or row of loads, a sensor's index."""
KASA_KINDS = ("kasa", "tapo")
"""Read by python-kasa, of the extra ``kasa``."""
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
    new-secret`); requests between nodes are signed with it. While it is replaced, ``old_secret`` is the one before,
    which counts as well (`mlxrack-agent secrets rotate`). A peer that misses three heartbeats, ``beat_s`` apart, is
    down. The desired state may name other peers, at hosts that are ``allowed``: names, domains like .rack.example, or
    networks like 10.0.0.0/24."""

    secret: Annotated[str, Meta(description="required with `peers.nodes`")] = ""
    old_secret: str = ""
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
    path: Annotated[str, Meta(description='required with `engine = "mlx"`')] = ""
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

    ``kind`` says how it is read, and what the other keys must be (docs/metrics.md). With ``at`` a url and ``channel``
    the outlet: shelly (Switch, generation 2 and later), shelly_pm1, shelly_em1, shelly_em (three phases), shelly_gen1,
    shelly_gen1_em and tasmota; ``phases`` of shelly_em and shelly_gen1_em are added up. home_assistant reads an
    ``entity`` of power, whose last report is at most ``age_s`` old; its ``secret`` is a token. kasa and tapo
    (extra ``kasa``) have an address as ``at``. So have PDUs over SNMP, with ``numbers`` for the outlet there:
    apc_device, apc_legacy, apc_outlet, raritan_outlet, raritan_inlet, servertech_cord, servertech_outlet,
    sentry3_tower, sentry3_infeed, sentry3_phases, sentry3_outlet, eaton_outlet, eaton_input, cyberpower_outlet,
    cyberpower_load and sensor (RFC 3433). snmp is any other: the value at ``oid`` times ``scale`` is in ``unit``, and
    counts while ``status_oid``, if there is one, has a value of ``status_ok``.

    ``secret`` is a reference to the password, token or community; ``scale`` is also watts per unit of an APC outlet.
    """

    name: str
    kind: MeterKind
    at: str
    nodes: tuple[str, ...]
    channel: Annotated[int, Meta(ge=0)] = 0
    phases: tuple[Literal["a", "b", "c"], ...] = ()
    entity: str = ""
    age_s: Seconds = 600.0
    numbers: Annotated[
        tuple[Annotated[int, Meta(ge=0)], ...], Meta(description="required over SNMP, but for apc_legacy and snmp")
    ] = ()
    oid: str = ""
    unit: Literal["mW", "W", "kW"] = "W"
    status_oid: str = ""
    status_ok: tuple[int, ...] = ()
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
    address, unless it is loopback or in ``listen.trusted_proxies``; when they are all taken, those whose client has
    shown no key are closed first, the oldest of them before the others. The bodies of requests in flight and what they
    decode to may take ``bodies_bytes`` of memory in all and ``bodies_per_key_bytes`` for an API key."""

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


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The policy file (docs/policy.md), the same on all nodes: who may use which model, what is SENSITIVE, what may
    leave the premises. "" is none: every key may use every model, and nothing leaves. It is read again whenever it
    changes; the last valid one stays in force until the next start, which an invalid one ends."""

    path: str = ""


class Audit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The audit log: who asked for what kind of work, what was decided, where it was done and how it ended; never a
    prompt or an answer (docs/audit.md). While it cannot be written, requests that are SENSITIVE or may leave the
    premises are refused. A file of it is closed and shipped to the bucket every ``segment_s``; files are kept for
    ``keep_days``, and no more than ``keep_bytes`` of them; what could not be shipped yet may take twice as much."""

    enabled: bool = True
    segment_s: Annotated[float, Meta(gt=0, le=86400)] = 3600.0
    keep_days: Positive = 90
    keep_bytes: Annotated[int, Meta(ge=32 << 20)] = 1 << 30


class DiskCache(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The prompt cache on disk, for models with ``disk_cache_bytes``. It holds prompts, so it is encrypted; ``secret``
    is a reference to the secret that keys are derived from (at least 32 random characters), kept elsewhere."""

    secret: Annotated[str, Meta(description="required with `disk_cache_bytes`")] = ""


class Taint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is remembered of SENSITIVE requests (docs/sensitive.md). When ``marks`` messages are remembered, every
    request counts as SENSITIVE until an operator clears them; a million take about 25 MB of memory and 20 MB of disk.
    With ``every_peer`` every request also counts as SENSITIVE while a peer is away."""

    marks: Positive = 1_000_000
    every_peer: bool = False


class Loader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``threads`` of the CPU's BLAS in each loader; 0 divides the cores among the models. Linux only. With
    ``calibrate`` the steps of a model that this node has not timed yet are timed after its load, for a minute at most
    and only while no request is here."""

    threads: Annotated[int, Meta(ge=0)] = 0
    calibrate: bool = True


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """agent.toml. Without ``store`` a node that has no peers keeps its telemetry in its state folder; with peers it is
    required."""

    node: Node
    listen: Listen = Listen()
    tls: Tls = Tls()
    paths: Paths = Paths()
    keys: tuple[Key, ...] = ()
    oidc: Oidc = Oidc()
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
    policy: Policy = Policy()
    taint: Taint = Taint()
    audit: Audit = Audit()
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class Live:
    """The configuration in force. Parts hold this and never a table or a value of it, so that all of them have a new
    one with one assignment. What has to be derived from it is derived by a follower."""

    def __init__(self, config: AgentConfig) -> None:
        self.now = config
        self._followers: list[Callable[[AgentConfig], None]] = []

    def follow(self, take: Callable[[AgentConfig], None]) -> None:
        """Call ``take`` with the configuration, now and whenever another one is put in force. It must not fail."""
        self._followers.append(take)
        take(self.now)

    def replace(self, config: AgentConfig) -> None:
        """Put another one in force; if a follower fails, the one before stays, and what it raised is raised."""
        before, self.now = self.now, config
        try:
            for take in self._followers:
                take(config)
        except BaseException:
            self.now = before
            for take in self._followers:
                take(before)
            raise


def hash_key(key: str) -> str:
    """The hash that the configuration holds for an API key."""
    return hashlib.sha256(key.encode()).hexdigest()


def is_open(config: AgentConfig) -> bool:
    """Whether clients need to show nothing: only on loopback."""
    return not config.keys and not config.oidc.issuer


def cache_group(keys: Sequence[Key], key_id: str) -> str:
    """The group with which a key shares its prompt cache; "" for none."""
    return next((key.cache_group for key in keys if key.id == key_id), "")


def key_ids(config: AgentConfig) -> frozenset[str]:
    """The ids that clients' requests may have, but those that a pattern takes from tokens (`oidc.ids`)."""
    return frozenset((*(key.id for key in config.keys), *(one.id for one in config.oidc.clients)))


def has_store(config: AgentConfig) -> bool:
    """Whether a bucket is configured."""
    return config.store != Store()


def with_own_store(config: AgentConfig, folder: str) -> AgentConfig:
    """A node without a [store] keeps its telemetry in a folder of its own."""
    return config if has_store(config) else msgspec.structs.replace(config, store=Store(path=folder))


def scheme(config: AgentConfig) -> str:
    """How the listener is spoken to."""
    return "https" if config.tls.certificate else "http"


def plain_url(config: AgentConfig, url: str) -> str:
    """Why a peer must not be called at ``url``; "" when it may be."""
    return transport.plain_url(url, config.tls, insecure=config.listen.insecure_http)


def configured_peers(config: AgentConfig) -> list[tuple[str, str]]:
    """(node, url) of the peers in agent.toml; the desired state may name others."""
    return [(peer.id, peer.url.rstrip("/")) for peer in config.peers.nodes]


def plain_warnings(config: AgentConfig, peers: Sequence[tuple[str, str]]) -> list[str]:
    """What a node with these peers sends in clear because ``insecure_http`` allows it, a sentence each."""
    return transport.plain_warnings(config.listen.host, peers, config.tls, insecure=config.listen.insecure_http)
