"""Whose bucket it is: the name of a rack, which the aggregator writes and every node may read."""

import msgspec

from shared import keys
from shared.errors import AccessDenied, Halt, PreconditionFailed, Refused
from shared.store import ObjectStore, find

MOST_BYTES = 1 << 10


class BucketRack(msgspec.Struct, frozen=True, kw_only=True):
    """The stored object."""

    rack: str


def told(store: ObjectStore) -> str:
    """The rack whose bucket it is; "" where nobody has said so yet. A store may deny what is not there to who may not
    list; that credentials are wrong shows elsewhere."""
    try:
        stored = find(store, keys.RACK, MOST_BYTES)
        return msgspec.json.decode(stored.body, type=BucketRack).rack if stored is not None else ""
    except (AccessDenied, Refused, msgspec.DecodeError, RecursionError):
        return ""


def check(rack: str, mine: str) -> None:
    """Raises Halt (other_rack) for a node of another rack than the bucket's."""
    if rack not in ("", mine):
        raise Halt(
            f"this bucket is that of rack {rack!r}, and this node is of rack {mine!r}: correct [store] or node.rack "
            f"here; if the rack was renamed, delete {keys.RACK} from the bucket",
            code="other_rack",
        )


def tell(store: ObjectStore, rack: str) -> None:
    """Say whose bucket it is, unless somebody has."""
    if not told(store):
        try:
            store.put_if_absent(keys.RACK, msgspec.json.encode(BucketRack(rack=rack)))
        except PreconditionFailed:
            return
