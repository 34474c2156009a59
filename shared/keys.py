"""Build and parse object keys of the bucket; each prefix has one writer (docs/bucket.md)."""

import re
from typing import NamedTuple

from shared.errors import Refused
from shared.ids import NodeId

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_RAW = re.compile(r"raw/v1/node=([^/]+)/i(\d{4,})/e(\d{8,})/(\d{10,})-(\d{10,})\.mpz")
_AUDIT = re.compile(r"audit/v1/node=([^/]+)/c([0-9a-f]{16})/(\d{12,15})-(\d{12,15})\.jsonl\.zst", re.ASCII)
_URGENT = re.compile(r"urgent/v1/node=([^/]+)/i(\d{4,})/e(\d{8,})/(\d{10,})-\d{4,}\.mpz")
_PERIODS = {
    "weekly": re.compile(r"\d{4}-W\d\d|\d{4}-\d\d-\d\d--\d{4}-\d\d-\d\d", re.ASCII),
    "monthly": re.compile(r"\d{4}-\d\d", re.ASCII),
}
_REPORT = re.compile(
    r"report/v1/(weekly|monthly)/([0-9W-]+)/([a-z][a-z0-9_]{0,40})-r([1-9]\d{0,5})\.(json|md|html|csv|pdf)", re.ASCII
)
_TABLE = re.compile(r"(minute|hour|day)/v1/table=([a-z_]+)/dt=(\d{4}-\d\d-\d\d)/part\.parquet")
PREFIXES = (
    *("raw/", "urgent/", "audit/", "minute/", "hour/", "day/", "manifest/", "report/", "prices/", "quarantine/"),
    *("desired/", "state/", "models/", "release/", "annotations/", "inventory/"),
)
"""Everything in a bucket is under one of these; aggregator/commands/sync.py decides what a copy does with each."""
RAW_PREFIX = "raw/v1/"
TABLE_PREFIXES = ("minute/v1/", "hour/v1/", "day/v1/")
URGENT_PREFIX = "urgent/v1/"
AUDIT_PREFIX = "audit/v1/"
MANIFEST_PREFIX = "manifest/v1/"
MODEL_PREFIX = "models/v1/manifest/"
MOST_SEGMENT_BYTES = 16 << 20
"""Limits of what is read, by kind of object. A segment: agents write at most 256 KiB."""
MOST_AUDIT_BYTES = 16 << 20
"""A file of an audit log, compressed: agents begin another one at 8 MiB."""
MOST_CLAIM_BYTES = 1 << 10
"""A claim holds the identity of a spool."""
MOST_DESIRED_BYTES = 4 << 20
"""A thousand nodes with twenty models each."""
MOST_MODEL_MANIFEST_BYTES = 4 << 20
"""Twenty thousand files of a model."""
MOST_COMPANION_BYTES = 16 << 20
"""Recorded probes of a model, and its origin."""
MOST_TABLE_BYTES = 1 << 30
"""A day's table: a thousand nodes write 200 MB."""
MOST_MANIFEST_BYTES = 64 << 20
"""A commit: a hundred thousand cursors, and a piece's 12,000 objects in quarantine."""
MOST_REPORT_BYTES = 64 << 20
"""A report; the longest are placements of thousands of models."""
MOST_STATE_BYTES = 64 << 20
"""State of `alert` and `sync`, by node and by table."""
MOST_LEASE_BYTES = 4 << 10
MOST_NOTES_BYTES = 4 << 20
"""A file that an operator writes by hand."""
DESIRED = "desired/v1/desired.json"
DESIRED_HISTORY = "desired/v1/history/"
RATES = "desired/v1/rates.json"
"""What tokens of the rack cost, for budgets of money."""
RACK = "release/v1/rack.json"
"""Whose bucket this is: the aggregator writes it once it has counted batches of its rack."""
ALERT_STATE = "state/v1/alerts.json"


class AuditKey(NamedTuple):
    """The parts of a shipped file of an audit log: the log's id, and its first and last line."""

    node: NodeId
    chain: str
    first_seq: int
    last_seq: int


class RawKey(NamedTuple):
    """The parts of a segment's key."""

    node: NodeId
    incarnation: int
    epoch: int
    first_seq: int
    last_seq: int


def is_name(text: str) -> bool:
    """Whether ``check_name`` would let it pass."""
    return _NAME.fullmatch(text) is not None


def check_name(name: str, what: str) -> str:
    """Validate a name for use in a key: letters, digits, dot, underscore, hyphen, 63 at most. Raises Refused."""
    if not is_name(name):
        raise Refused(f"{what} {name!r}: use 1 to 63 letters, digits, '.', '_' or '-', starting with a letter or digit")
    return name


def raw_node_prefix(node: str) -> str:
    """All of one node's segments."""
    return f"{RAW_PREFIX}node={check_name(node, 'node id')}/"


def batch_key(key: RawKey) -> str:
    """The key of a segment; keys of one node sort in write order."""
    run = f"i{key.incarnation:04d}/e{key.epoch:08d}"
    return f"{raw_node_prefix(key.node)}{run}/{key.first_seq:010d}-{key.last_seq:010d}.mpz"


def parse_batch_key(key: str) -> RawKey:
    """The inverse of batch_key. Raises Refused for a foreign key."""
    if (match := _RAW.fullmatch(key)) and _NAME.fullmatch(match[1]):
        raw = RawKey(NodeId(match[1]), int(match[2]), int(match[3]), int(match[4]), int(match[5]))
        if raw.first_seq <= raw.last_seq and batch_key(raw) == key:
            return raw
    raise Refused(f"key {key!r}: not a key of this bucket's layout", code="foreign_key")


def claim_key(node: str, incarnation: int) -> str:
    """Key with which a node claims an incarnation, so that a new spool never reuses the keys of a lost one."""
    return f"{raw_node_prefix(node)}i{incarnation:04d}/claim"


def contest_key(node: str, incarnation: int) -> str:
    """Where another agent says that it uses the id whose claim this is."""
    return f"{raw_node_prefix(node)}i{incarnation:04d}/contested"


def grant_key(node: str, incarnation: int) -> str:
    """Where an operator says who may claim the id after this claim."""
    return f"{raw_node_prefix(node)}i{incarnation:04d}/granted"


def is_claim(key: str) -> bool:
    """Whether a key under raw/ is about a claim, and not a segment."""
    return key.startswith(RAW_PREFIX) and key.endswith(("/claim", "/contested", "/granted"))


def urgent_key(key: RawKey, ordinal: int) -> str:
    """A copy of urgent events, sent ahead of the segment that contains them."""
    node = check_name(key.node, "node id")
    return f"{URGENT_PREFIX}node={node}/i{key.incarnation:04d}/e{key.epoch:08d}/{key.first_seq:010d}-{ordinal:04d}.mpz"


def parse_urgent_key(key: str) -> RawKey:
    """The batch that an urgent copy belongs to (first and last sequence number are its). Raises Refused for a foreign
    key."""
    if (match := _URGENT.fullmatch(key)) and _NAME.fullmatch(match[1]):
        return RawKey(NodeId(match[1]), int(match[2]), int(match[3]), int(match[4]), int(match[4]))
    raise Refused(f"key {key!r}: not a key of this bucket's layout", code="foreign_key")


def audit_node_prefix(node: str) -> str:
    """All shipped files of one node's audit logs."""
    return f"{AUDIT_PREFIX}node={check_name(node, 'node id')}/"


def audit_key(key: AuditKey) -> str:
    """The key of a shipped file; those of one log sort in write order."""
    return f"{audit_node_prefix(key.node)}c{key.chain}/{key.first_seq:012d}-{key.last_seq:012d}.jsonl.zst"


def parse_audit_key(key: str) -> AuditKey:
    """The inverse of audit_key. Raises Refused for a foreign key."""
    if (match := _AUDIT.fullmatch(key)) and _NAME.fullmatch(match[1]):
        found = AuditKey(NodeId(match[1]), match[2], int(match[3]), int(match[4]))
        if found.first_seq <= found.last_seq and audit_key(found) == key:
            return found
    raise Refused(f"key {key!r}: not a key of this bucket's layout", code="foreign_key")


def table_key(level: str, table: str, day: str) -> str:
    """The Parquet file of one table and one UTC day (YYYY-MM-DD); ``level`` is minute, or hour or day of a rollup."""
    return f"{level}/v1/table={table}/dt={day}/part.parquet"


def table_prefix(level: str, table: str) -> str:
    """All days of one table."""
    return f"{level}/v1/table={table}/"


def parse_table_key(key: str) -> tuple[str, str, str]:
    """Level (minute, hour or day), table and UTC day of a table's file. Raises Refused for a foreign key."""
    if not (match := _TABLE.fullmatch(key)):
        raise Refused(f"key {key!r}: not a key of this bucket's layout", code="foreign_key")
    return match[1], match[2], match[3]


def manifest_key(number: int) -> str:
    """The n-th commit of the aggregator."""
    return f"{MANIFEST_PREFIX}{number:010d}.json"


def report_key(cadence: str, period: str, name: str, revision: int, extension: str) -> str:
    """A report. ``cadence`` is weekly or monthly, ``period`` like 2026-W47 or 2026-11."""
    return f"report/v1/{cadence}/{period}/{name}-r{revision}.{extension}"


def is_period(cadence: str, period: str) -> bool:
    """Whether reports of a cadence (weekly, monthly) have periods of this form."""
    return _PERIODS[cadence].fullmatch(period) is not None


class ReportKey(NamedTuple):
    """The parts of a report's key. ``file`` is its name on a disk: it says the period, and names no other folder."""

    cadence: str
    period: str
    name: str
    revision: int
    extension: str

    @property
    def file(self) -> str:
        return f"{self.period}-{self.name}-r{self.revision}.{self.extension}"


def parse_report_key(key: str) -> ReportKey:
    """The inverse of report_key. Raises Refused for a foreign key."""
    if not (match := _REPORT.fullmatch(key)) or not is_period(match[1], match[2]):
        raise Refused(f"key {key!r}: not a key of this bucket's layout", code="foreign_key")
    return ReportKey(match[1], match[2], match[3], int(match[4]), match[5])


def history_key(generation: int, digest: str) -> str:
    """What a published desired state replaced; by the SHA-256 of what was published, so that two writers of the same
    generation do not share one."""
    return f"{DESIRED_HISTORY}{generation:010d}-{digest[:16]}.json"


def model_prefix(name: str) -> str:
    """The manifests of all versions of one model."""
    return f"{MODEL_PREFIX}{check_name(name, 'model')}/"


def model_manifest_key(name: str, version: str) -> str:
    """The manifest of one version of a model."""
    return f"{model_prefix(name)}{check_name(version, 'version')}.json"


def parse_model_manifest_key(key: str) -> tuple[str, str]:
    """Model and version. Raises Refused for a foreign key."""
    name, _, file = key.removeprefix(MODEL_PREFIX).partition("/")
    version = file.removesuffix(".json")
    if not (_NAME.fullmatch(name) and _NAME.fullmatch(version)) or model_manifest_key(name, version) != key:
        raise Refused(f"key {key!r}: not a key of this bucket's layout", code="foreign_key")
    return name, version


def model_file_key(version: str, file: str) -> str:
    """One file of a version; a version that two names share is stored once."""
    return f"models/v1/files/{check_name(version, 'version')}/{file}"


def quarantine_key(key: str) -> str:
    """Where an unreadable object is kept, byte for byte."""
    return f"quarantine/v1/{key}"
