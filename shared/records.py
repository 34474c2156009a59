"""Records that a node reports. Counts and integers only: no prompt, no completion, no text sent by a client.

Names end in their unit: ``_us`` microseconds, ``_ms`` milliseconds, ``_tok`` tokens, ``_bytes``, ``_mw`` milliwatts,
``_mj`` millijoules, ``_mc`` thousandths of a degree Celsius, ``_ppm`` parts per million. A missing value is None,
never 0. New fields get defaults; fields are never renamed or retyped. A record covers its batch's window: deltas, not
totals.
"""

from typing import Union, get_args

import msgspec

from shared.sketch import SketchWire

PROMPT_BUCKETS_TOK = (1_000, 8_000, 32_000, 128_000, 200_000, 1_000_000)
"""Upper bounds of the prompt sizes that API prices distinguish; a request counts in the first that fits."""

EXPIRY_DAYS = (30, 7)
"""Days before a certificate's end at which to warn, the first alert before the last."""


class _Record(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    pass


class Served(_Record, frozen=True, kw_only=True, tag="served"):
    """Requests that this node answered as gateway, grouped by all labels.

    ``worker`` is the node that computed the answer, "" if none did. ``outcome`` is ok, failed, cancelled or refused.
    ``finish`` is why an answer ended; of a refused request, and of a failed one that no node could take, why it was not
    served: capacity (nothing could serve it), limit (its key's own limit) or request (its own fault). Older agents give
    no reason.

    ``place`` is "" for requests that the rack answered, or nobody: only these are its work. Otherwise it is the name of
    the provider that answered, or failed to; ``place_category`` says where that is: premises or outside. Such a record
    has no worker and no version, ``completion_tok`` and the others are the provider's counts, and ``usd_micro`` is what
    they cost there, in millionths of a US dollar.
    """

    model: str
    version: str = ""
    worker: str = ""
    key_id: str = ""
    task_class: str = ""
    outcome: str = "ok"
    finish: str = ""
    prompt_bucket_tok: int = 0
    place: str = ""
    place_category: str = ""
    requests: int
    retries: int = 0
    prompt_tok: int = 0
    cached_tok: int = 0
    completion_tok: int = 0
    usd_micro: int = 0
    ttft_us: SketchWire = SketchWire()
    itl_us: SketchWire = SketchWire()
    total_us: SketchWire = SketchWire()


class EngineCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Work of one loader over some time: counts, and levels and peaks of memory and queue."""

    busy_prefill_us: int = 0
    busy_decode_us: int = 0
    prefill_tok: int = 0
    cached_tok: int = 0
    decode_tok: int = 0
    wasted_tok: int = 0
    steps: int = 0
    queue_max: int = 0
    queue_us: int = 0
    padding_tok: int = 0
    kv_peak_bytes: int = 0
    rebuilds: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    cache_saved_tok: int = 0
    cache_evictions: int = 0
    disk_restored_tok: int = 0
    disk_bytes: int = 0
    cache_bytes: int = 0
    active_bytes: int = 0
    peak_bytes: int = 0


class EngineWindow(EngineCounts, frozen=True, tag_field="kind", tag="engine"):
    """Work of one loader on this node in the window, for requests of any gateway."""

    # not kw_only: these two come before the inherited fields, on the wire and in tables
    model: str
    version: str


class Resident(_Record, frozen=True, kw_only=True, tag="resident"):
    """A model version resident at the end of the window. ``state`` is ready, starting, draining or failed."""

    model: str
    version: str
    state: str
    pinned: bool = False
    need_bytes: int = 0
    footprint_bytes: int | None = None
    restarts: int = 0


class DesiredObserved(_Record, frozen=True, kw_only=True, tag="desired_observed"):
    """The generation of the desired state that this node follows, and its progress.

    ``state`` is none, acting, converged, drifted or failed; ``drift`` lists the differences by model.
    """

    generation: int
    state: str
    reason: str = ""
    drift: tuple[str, ...] = ()


class HostSample(_Record, frozen=True, kw_only=True, tag="host"):
    """The machine over the window. ``sources_failed`` names each source that could not be read, with its reason.

    Power and temperatures are sampled every few seconds: ``_mean_`` is time-weighted; a temperature without it and
    ``_max_`` are maxima. The three power figures are distinct and never substitute for each other: at the wall, of the
    whole system, of the chip. ``thermal_level_us`` is the time at each level, nominal first. The five-minute shares
    are absent while less than four fifths of that time are known. ``memory_pressure`` is the worst level the kernel
    reported, ``memory_verdict`` is derived from swap, compression and wired memory.
    """

    cpu_ppm: int | None = None
    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None
    memory_used_max_bytes: int | None = None
    memory_wired_bytes: int | None = None
    memory_compressed_bytes: int | None = None
    memory_source: str | None = None
    memory_verdict: str | None = None
    gpu_wired_limit_bytes: int | None = None
    memory_budget_bytes: int | None = None
    memory_pressure: str | None = None
    memory_stall_us: int | None = None
    swap_used_bytes: int | None = None
    swap_total_bytes: int | None = None
    swap_in_bytes: int | None = None
    swap_out_bytes: int | None = None
    disk_free_bytes: int | None = None
    thermal_level: str | None = None
    thermal_source: str | None = None
    thermal_worst: str | None = None
    thermal_known_us: int = 0
    thermal_level_us: tuple[int, ...] = ()
    thermal_coverage_ppm: int | None = None
    throttled_us: int = 0
    throttled_5m_ppm: int | None = None
    pressured_5m_ppm: int | None = None
    package_temp_mc: int | None = None
    package_temp_mean_mc: int | None = None
    pcore_temp_mc: int | None = None
    pcore_temp_mean_mc: int | None = None
    pcore_asleep: bool = False
    gpu_temp_mc: int | None = None
    gpu_temp_mean_mc: int | None = None
    temp_source: str | None = None
    fan_rpm: tuple[int, ...] = ()
    wall_power_mw: int | None = None
    system_power_mw: int | None = None
    system_power_max_mw: int | None = None
    soc_power_mw: int | None = None
    energy_mj: int | None = None
    energy_source: str | None = None
    sources_failed: dict[str, str] = {}


class Hardware(_Record, frozen=True, kw_only=True, tag="hardware"):
    """The node's hardware, once per start and UTC day. ``cores`` by tier, the fastest first."""

    model: str
    chip: str
    memory_bytes: int
    cores: tuple[int, ...] = ()
    system: str = ""


class OutletReading(_Record, frozen=True, kw_only=True, tag="outlet"):
    """A metered outlet over the window, read by one node for the rack. ``nodes`` draw from it; one reading for several
    nodes cannot be divided. ``energy_mj`` is mean power over the covered time."""

    meter: str
    nodes: tuple[str, ...]
    power_mw: int
    power_max_mw: int
    energy_mj: int
    covered_us: int


class AgentStarted(_Record, frozen=True, kw_only=True, tag="agent_started"):
    """``previous`` tells how the previous run ended: first (there was none), clean or unclean."""

    t_ms: int
    version: str
    previous: str


class AgentStopped(_Record, frozen=True, kw_only=True, tag="agent_stopped"):
    """The agent stopped on request."""

    t_ms: int
    reason: str


class ModelLoaded(_Record, frozen=True, kw_only=True, tag="model_loaded"):
    """A loader became ready. ``need_bytes`` is its planned maximum, ``footprint_bytes`` its current size.
    ``planned_peak_bytes`` and ``peak_bytes`` compare plan and measurement of the same first prompt in MLX."""

    t_ms: int
    model: str
    version: str
    load_us: int
    need_bytes: int
    footprint_bytes: int | None = None
    planned_peak_bytes: int | None = None
    peak_bytes: int | None = None


class ModelTimed(_Record, frozen=True, kw_only=True, tag="model_timed"):
    """Step times of a model on this node are put to use: just measured by its calibration, or kept from an earlier one
    (``measured_ms``) with the same version on the same ``runtime``. ``prompt_us`` is the prefill of 1,000 tokens;
    ``step_us`` are decode steps with ``rows`` rows of 1,000 tokens each, ``verify_us`` forwards of ``verify_tok``
    tokens in ``verify_rows`` rows. Half of the samples were within ``spread_ppm`` of their median."""

    t_ms: int
    model: str
    version: str
    runtime: str = ""
    measured_ms: int = 0
    took_us: int = 0
    spread_ppm: int = 0
    prompt_us: int = 0
    rows: tuple[int, ...] = ()
    step_us: tuple[int, ...] = ()
    verify_rows: tuple[int, ...] = ()
    verify_tok: tuple[int, ...] = ()
    verify_us: tuple[int, ...] = ()


class ModelEvicted(_Record, frozen=True, kw_only=True, tag="model_evicted"):
    """A model was evicted. ``reason`` is memory (to make room for another), pressure (models held more than planned),
    idle (its keep-alive expired) or ordered. ``age_us`` counts from when it became ready, ``idle_us`` from its last
    request; ``reload_us`` is its last load time."""

    t_ms: int
    model: str
    version: str
    reason: str
    for_model: str = ""
    bytes: int = 0
    age_us: int = 0
    requests_last_hour: int = 0
    idle_us: int | None = None
    reload_us: int = 0


class ModelMissed(_Record, frozen=True, kw_only=True, tag="model_missed"):
    """The first request for a model after its eviction, ``after_us`` later. ``reason`` is the eviction's."""

    t_ms: int
    model: str
    version: str
    reason: str
    after_us: int


class MemoryPressed(_Record, frozen=True, kw_only=True, tag="memory_pressed"):
    """The memory guard's level changed: calm, soft or hard."""

    t_ms: int
    level: str
    held_bytes: int
    budget_bytes: int


class SwapFinished(_Record, frozen=True, kw_only=True, tag="swap_finished"):
    """A hot swap ended. ``outcome`` is flipped or failed; ``window_us`` is from start to the old loader's end.

    ``itl_before_us`` and ``itl_during_us`` are the old model's p95 ITL, ``raised_us`` the time during which ITL was at
    least twice as long as before. ``freed_bytes`` is the memory that the old loader released.
    """

    t_ms: int
    swap_id: str
    model: str
    from_version: str
    to_version: str
    outcome: str
    reason: str = ""
    window_us: int = 0
    probes: int = 0
    probe_p99_us: int | None = None
    itl_before_us: int | None = None
    itl_during_us: int | None = None
    raised_us: int = 0
    freed_bytes: int = 0


class LoaderExited(_Record, frozen=True, kw_only=True, tag="loader_exited"):
    """A loader ended unexpectedly. ``cause`` is like "signal 9" or "exit 1"."""

    t_ms: int
    model: str
    version: str
    cause: str
    restarts: int


class ThrottleEvent(_Record, frozen=True, kw_only=True, tag="throttle"):
    """The thermal pressure level rose to heavy or above. With ``open_at_start`` it was there when the agent started and
    does not count as a crossing."""

    t_ms: int
    level: str
    duration_us: int = 0
    open_at_start: bool = False


class ThrottleEnded(_Record, frozen=True, kw_only=True, tag="throttle_ended"):
    """The level fell below heavy and stayed there. ``level`` is the maximum since the event began at ``start_ms``."""

    t_ms: int
    start_ms: int
    level: str
    duration_us: int
    open_at_start: bool = False


class PeerDown(_Record, frozen=True, kw_only=True, tag="peer_down"):
    """This node declared a peer down. ``last_seen_ms`` is the peer's last answer on this node's clock."""

    t_ms: int
    peer: str
    last_seen_ms: int


class PeerUp(_Record, frozen=True, kw_only=True, tag="peer_up"):
    """A peer that had been declared down answered again."""

    t_ms: int
    peer: str
    down_us: int


class CertificateExpires(_Record, frozen=True, kw_only=True, tag="certificate_expires"):
    """When a certificate of this node ends: ``certificate`` is listener (what clients see), node or ca. Recorded at
    each start and change, and when one of ``EXPIRY_DAYS`` has come."""

    t_ms: int
    certificate: str
    not_after_ms: int


class NodeIdClash(_Record, frozen=True, kw_only=True, tag="node_id_clash"):
    """Two agents use one node id, ``peer``: by a claim in the bucket, or by what a peer sees. ``one`` and ``other`` are
    marks of their hardware, "" where it is not known. Repeated every ten minutes while it lasts."""

    t_ms: int
    peer: str
    one: str = ""
    other: str = ""


class TaintChanged(_Record, frozen=True, kw_only=True, tag="taint_changed"):
    """What is remembered of SENSITIVE messages on this node became ``state``: full, unreadable or unsaved, in which
    every request counts as SENSITIVE; ready, after one of these; or cleared, by an operator. ``marks`` is how many were
    remembered."""

    t_ms: int
    state: str
    marks: int


class AuditFailing(_Record, frozen=True, kw_only=True, tag="audit_failing"):
    """The audit log cannot be written: ``why`` is full, read_only, deleted, no_answer or error. Requests that are
    SENSITIVE or may leave the premises are refused, and ``lost`` entries of others are missing so far. Repeated every
    ten minutes while it lasts."""

    t_ms: int
    why: str
    since_ms: int
    lost: int = 0


class AuditRecovered(_Record, frozen=True, kw_only=True, tag="audit_recovered"):
    """The audit log is written again; ``lost`` entries are missing from it, and it says so."""

    t_ms: int
    why: str
    since_ms: int
    lost: int = 0


class Unknown(_Record, frozen=True, kw_only=True, tag="unknown"):
    """Placeholder for a newer agent's record, so that the others keep their positions in the batch."""


Event = Union[  # noqa: UP007  (a tagged union msgspec can read back)
    AgentStarted,
    AgentStopped,
    ModelLoaded,
    ModelTimed,
    ModelEvicted,
    ModelMissed,
    MemoryPressed,
    SwapFinished,
    LoaderExited,
    ThrottleEvent,
    ThrottleEnded,
    PeerDown,
    PeerUp,
    CertificateExpires,
    NodeIdClash,
    TaintChanged,
    AuditFailing,
    AuditRecovered,
]
Record = Union[  # noqa: UP007
    Served, EngineWindow, Resident, DesiredObserved, HostSample, Hardware, OutletReading, Event, Unknown
]

RECORD_TYPES: dict[str, type[msgspec.Struct]] = {
    str(cls.__struct_config__.tag): cls for cls in get_args(Record) if cls is not Unknown
}
"""Every kind of record by its tag on the wire."""

URGENT = (
    *(AgentStarted, SwapFinished, ThrottleEvent, PeerDown, PeerUp, ModelEvicted, LoaderExited, CertificateExpires),
    *(NodeIdClash, AuditFailing, AuditRecovered),
)
"""Events that are also sent immediately, out of order, for `alert`."""


def prompt_bucket(prompt_tok: int) -> int:
    """The price bucket (its upper bound in tokens) of a prompt; the largest for longer prompts."""
    return next((bound for bound in PROMPT_BUCKETS_TOK if prompt_tok <= bound), PROMPT_BUCKETS_TOK[-1])
