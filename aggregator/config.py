"""The aggregator's configuration: structure, defaults and checks beyond types."""

from collections.abc import Sequence
from datetime import date
from decimal import Decimal
from typing import Annotated
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
from msgspec import Meta

from aggregator import heat
from shared.bucket import REFERENCE_HINT, Store, check_store, is_reference
from shared.chips import find, unknown
from shared.errors import Refused
from shared.hosts import host_of
from shared.keys import check_name

Money = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[float, Meta(gt=0)]


class Node(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Purchase price and power of a node; without a price its cost is "no data". It is paid for from ``since`` (its
    first report if left out) until ``retired``, days of the rack's zone, the first one on which it is, and the first
    one on which it is no longer part of the rack. Power that is neither measured nor given as ``watts`` is that of the
    ``chip`` (like ``M4 Pro``) by the node's busy time, else 45 W. ``bandwidth_gb_s`` is the memory bandwidth of a chip
    that the chip table does not know."""

    id: str
    since: date | None = None
    retired: date | None = None
    price: Money | None = None
    life_years: Positive = 3.0
    residual: Share = 0.2
    chip: str = ""
    watts: Money | None = None
    other_per_month: Money = 0.0
    bandwidth_gb_s: Positive | None = None


class Cost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Other prices. ``usd_rate`` is the price of one US dollar in ``currency``, for API prices. ``flag_ratio`` is the
    week-on-week ratio from which a price is flagged, at ``flag_min_tok`` tokens or more."""

    currency: str = "USD"
    usd_rate: Positive | None = None
    electricity_per_kwh: Money = 0.15
    pue: Annotated[float, Meta(ge=1)] = 1.0
    flag_ratio: Positive = 2.0
    flag_min_tok: Annotated[int, Meta(ge=0)] = 200_000


class ApiPrice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Price of a comparable model at an API, per million tokens."""

    model: str
    name: str
    input_per_m: Money
    output_per_m: Money


class Compare(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """API models that a served name is compared with. ``same_as`` is the same open model as API hosts name it (like
    ``llama-3.3-70b-instruct``); ``frontier`` is one model of one provider, like ``openai/gpt-4o``."""

    model: str
    same_as: str = ""
    frontier: str = ""


class PlacedModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Placement constraints of a model: minimum number of copies, and the nodes it may use (none: any)."""

    model: str
    min_copies: Annotated[int, Meta(ge=1)] = 1
    nodes: tuple[str, ...] = ()


class Placement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``max_moves`` is the most copies that one week's proposal may move."""

    max_moves: Annotated[int, Meta(ge=0)] = 6
    models: tuple[PlacedModel, ...] = ()


class Scorecard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Targets of the scorecard and of the monthly report. ``saving`` is the least share to be saved against the same
    open models at API hosts (0: as cheap as the host in the middle), ``times_cheaper`` the least against the frontier
    models that ``[[compare]]`` names."""

    itl_p95_ms: Positive = 100.0
    uptime: Share = 0.999
    throttled: Share = heat.TARGET_SHARE
    swap_s: Positive = 120.0
    saving: Annotated[float, Meta(le=1)] = 0.0
    times_cheaper: Positive = 5.0


class Retention(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Retention of raw segments and minute tables in days; 0 keeps them. Hours, days and reports are always kept."""

    raw_days: Annotated[int, Meta(ge=0)] = 35
    minute_days: Annotated[int, Meta(ge=0)] = 400


class Alerts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Alert thresholds. ``upload_s`` is the agents' upload interval: silence for twice that and 30 s fires."""

    upload_s: Positive = 60.0
    throttled_share: Share = heat.ALERT_SHARE
    throttled_window_s: Positive = 300.0
    storm_evictions: Annotated[int, Meta(gt=0)] = 5
    storm_window_s: Positive = 600.0


class Discord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Webhook URLs, as references to secrets; "" sends nothing. ``thermal`` falls back to ``alerts``. ``docs_url`` is
    where phones find this version's docs folder; a notice then links the page runbooks.md there."""

    alerts: str = ""
    thermal: str = ""
    docs_url: str = ""


class Report(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The monthly PDF. ``fallback_font`` is the path of a TrueType font (.ttf) for characters that the embedded Noto
    Sans lacks, like Japanese ones; without it they are written as U+XXXX."""

    fallback_font: str = ""


class AggregatorConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """aggregator.toml."""

    rack: str
    store: Store
    timezone: str = "UTC"
    nodes: tuple[Node, ...] = ()
    cost: Cost = Cost()
    api_prices: tuple[ApiPrice, ...] = ()
    compare: tuple[Compare, ...] = ()
    placement: Placement = Placement()
    scorecard: Scorecard = Scorecard()
    retention: Retention = Retention()
    alerts: Alerts = Alerts()
    discord: Discord = Discord()
    report: Report = Report()

    @property
    def bandwidths(self) -> dict[str, float]:
        """Configured memory bandwidths (GB/s) by node."""
        return {node.id: node.bandwidth_gb_s for node in self.nodes if node.bandwidth_gb_s is not None}


def check(config: AggregatorConfig) -> Sequence[str]:
    """Problems that types cannot detect, with key paths."""
    found = check_store(config.store)
    for path, name in [("rack", config.rack), *((f"nodes[{n}].id", d.id) for n, d in enumerate(config.nodes))]:
        try:
            check_name(name, path)
        except Refused as error:
            found.append(error.message)
    found += [
        f"nodes[{n}].chip: {unknown(node.chip)}; leave it out, and give watts and bandwidth_gb_s"
        for n, node in enumerate(config.nodes)
        if node.chip and find(node.chip) is None
    ]
    found += [
        f"nodes[{n}].retired: {node.retired} is not after since ({node.since})"
        for n, node in enumerate(config.nodes)
        if node.since is not None and node.retired is not None and node.retired <= node.since
    ]
    ids = [node.id for node in config.nodes]
    found += [f"nodes: duplicate id {i!r}" for i in sorted({i for i in ids if ids.count(i) > 1})]
    found += [
        f"{table}: duplicate model {name!r}"
        for table, names in (
            ("compare", [one.model for one in config.compare]),
            ("placement.models", [one.model for one in config.placement.models]),
        )
        for name in sorted({n for n in names if names.count(n) > 1})
    ]
    for n, one in enumerate(config.compare):
        if one.frontier and one.frontier.count("/") < 1:
            found.append(f"compare[{n}].frontier: expected provider/model, like openai/gpt-4o")
    if config.retention.raw_days and config.retention.raw_days < 7:
        found.append("retention.raw_days: expected 7 or more (late data needs raw segments), or 0 to keep them")
    try:
        ZoneInfo(config.timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        found.append(f"timezone: {config.timezone!r} is not an IANA time zone like Europe/Berlin")
    for name in ("alerts", "thermal"):
        if (value := getattr(config.discord, name)) and not is_reference(value):
            found.append(f"discord.{name}: {REFERENCE_HINT}")
    if (url := config.discord.docs_url) and (not host_of(url) or set(url) & set(' <>()"')):
        found.append("discord.docs_url: expected an http(s) URL, like https://wiki.example/mlxrack/docs")
    return found


def decimal(value: float) -> Decimal:
    """A configured number as the decimal in the file, not its binary approximation."""
    return Decimal(str(value))
