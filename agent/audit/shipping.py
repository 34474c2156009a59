"""Closed files of the audit log go to the bucket, each once, oldest first, and stay on the disk until they are pruned.

The key names the log, and the first and last line, so a file that was shipped before a crash is found there again. One
that is there with another content is a finding, not a failure to repair: it is said, and the later ones go on.
"""

import contextlib
import itertools
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import zstandard

from agent.audit.chain import file_name, parse, whole_lines
from agent.audit.disk import SHIPPED, Segment
from agent.audit.entry import Begin, decode
from shared import keys
from shared.backoff import full_jitter_s
from shared.durable import write_whole
from shared.errors import AccessDenied, NotFound, PreconditionFailed, RackError, Refused, Retryable
from shared.ids import NodeId
from shared.logs import get_logger
from shared.store import ObjectStore, each

PACE_S = 1.0
"""Between two files: running requests come first."""
MOST_FILE_BYTES = 64 << 20
"""Of a shipped file, uncompressed: agents begin another one at 8 MiB."""

log = get_logger("agent.audit.shipping")


class Shipped(msgspec.Struct, frozen=True, kw_only=True):
    """The last line of a log that is in the bucket, and when it was confirmed."""

    chain: str = ""
    seq: int = 0
    t_ms: int = 0


class Shipper:
    """Ships the files of ``folder``; blocking, for one thread at a time."""

    def __init__(
        self,
        folder: Path,
        node: str,
        open_store: Callable[[], ObjectStore],
        *,
        clock: Callable[[], float] = time.monotonic,
        pace: Callable[[float], None] = time.sleep,
        random_01: Callable[[], float] = random.random,
    ) -> None:
        self._folder, self._node, self._open_store = folder, NodeId(node), open_store
        self._clock, self._pace, self._random_01 = clock, pace, random_01
        self._store: ObjectStore | None = None
        self._failures, self._not_before_s = 0, 0.0
        self.stopping = False
        self.shipped = shipped(folder)
        self.waiting = 0
        self.problem = self.finding = ""

    def drain(self, found: Sequence[Segment], *, force: bool = False) -> int:
        """Ship what is not in the bucket of ``found``, but for the newest file, which is written to; returns how many
        were confirmed. Failures are in ``problem``, never raised; after one it backs off unless ``force``."""
        due = [one for one, after in itertools.pairwise(found) if after.first - 1 > self.shipped.seq]
        self.waiting = len(due)
        if not force and self._clock() < self._not_before_s:
            return 0
        sent = 0
        try:
            for segment in due:
                if self.stopping:
                    break
                if sent:
                    self._pace(PACE_S)
                self._ship(segment.path.read_bytes())
                sent, self.waiting = sent + 1, self.waiting - 1
        except FileNotFoundError:
            pass  # deleted, which the log itself notices
        except (RackError, OSError) as error:
            self._failed(error)
        else:
            self._failures, self.problem = 0, ""
        return sent

    def _ship(self, content: bytes) -> None:
        lines, _ = whole_lines(content)
        begin = decode(lines[0]) if lines else None
        first, last = (parse(lines[0]), parse(lines[-1])) if lines else (None, None)
        if not isinstance(begin, Begin) or first is None or last is None:
            self.finding = "a file of the audit log was changed and cannot be shipped; run `mlxrack-agent audit verify`"
            return
        key = keys.audit_key(keys.AuditKey(self._node, begin.chain, first.seq, last.seq))
        store = self._store = self._store or self._open_store()
        whole = b"".join(lines)
        try:
            store.put_if_absent(key, zstandard.ZstdCompressor().compress(whole))
        except PreconditionFailed:
            if _there(store, key) != whole:
                self.finding = f"{key} differs from the file on this disk; run `mlxrack-agent audit verify --bucket`"
                log.error("audit_differs", key=key)
        except NotFound as error:
            raise Retryable(f"ship {key}: bucket or folder of the store not found ({error.message})") from None
        self.shipped = Shipped(chain=begin.chain, seq=last.seq, t_ms=time.time_ns() // 1_000_000)
        write_whole(self._folder / SHIPPED, msgspec.json.encode(self.shipped))

    def _failed(self, error: RackError | OSError) -> None:
        self._failures += 1
        problem = error.message if isinstance(error, RackError) else error.strerror or type(error).__name__
        if isinstance(error, AccessDenied):
            problem += f" (a node needs Put and Get under {keys.audit_node_prefix(self._node)}, docs/bucket.md)"
        if problem != self.problem:
            log.warning("audit_not_shipped", reason=problem)
        self.problem = problem
        if not isinstance(error, Retryable):
            self._store = None  # credentials may have been corrected meanwhile
        self._not_before_s = self._clock() + full_jitter_s(self._failures - 1, self._random_01())


def shipped(folder: Path) -> Shipped:
    """What is known to be in the bucket; without the note everything is shipped again, which changes nothing."""
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode((folder / SHIPPED).read_bytes(), type=Shipped)
    return Shipped()


def unpacked(body: bytes) -> bytes:
    """A shipped file. Raises Refused for what is none."""
    try:
        # agents state it, and only a whole frame has as many
        if zstandard.get_frame_parameters(body).content_size > MOST_FILE_BYTES:
            raise Refused(f"unpacks to more than {MOST_FILE_BYTES:,} bytes", code="too_large")
        return zstandard.ZstdDecompressor().decompress(body, allow_extra_data=False)
    except zstandard.ZstdError:
        raise Refused("cannot be unpacked", code="damaged") from None


def _there(store: ObjectStore, key: str) -> bytes:
    """A shipped file; for an object that is none a line that is none, which `verify` names."""
    try:
        return unpacked(store.get(key, keys.MOST_AUDIT_BYTES).body)
    except NotFound:
        raise
    except Refused:
        return b"\n"


def in_bucket(store: ObjectStore, node: str) -> Mapping[str, list[keys.AuditKey]]:
    """A node's shipped files by log, in order."""
    found: dict[str, list[keys.AuditKey]] = {}
    for listed in each(store, keys.audit_node_prefix(node)):
        with contextlib.suppress(Refused):
            key = keys.parse_audit_key(listed.key)
            found.setdefault(key.chain, []).append(key)
    return {chain: sorted(of, key=lambda key: key.first_seq) for chain, of in found.items()}


def fetched(store: ObjectStore, of: Sequence[keys.AuditKey]) -> Iterator[tuple[str, bytes]]:
    """Shipped files, each by the name that it has on the node's disk."""
    for key in of:
        yield file_name(key.first_seq), _there(store, keys.audit_key(key))


def to_prune(found: Sequence[Segment], now_ms: int, *, keep_days: int, keep_bytes: int, shipped_seq: int) -> int:
    """How many of the oldest closed files to delete, of ``found`` and the one that is written to, which is last and
    stays. What is not shipped stays within twice ``keep_bytes``. Pure."""
    total, count = sum(one.size for one in found), 0
    for one, after in itertools.pairwise(found):
        old = one.written_ms < now_ms - keep_days * 86_400_000
        safe = after.first - 1 <= shipped_seq
        if not (((old or total > keep_bytes) and safe) or total > 2 * keep_bytes):
            break
        total, count = total - one.size, count + 1
    return count
