"""Whose a spool is, and how its last run ended: the file beside its batches."""

import uuid
from pathlib import Path

import msgspec

from shared.errors import Halt


class Identity(msgspec.Struct, kw_only=True):
    """The writer of a spool, stored beside the batches so that epochs never repeat. ``claim`` is the number of its
    claim on the node id in the bucket, ``incarnation`` that of its first one. ``served`` tells whether any run came to
    serve, None where a version wrote it that did not note that; ``clean`` how the last one that did ended."""

    spool_id: str
    node: str
    rack: str
    hardware: str
    incarnation: int | None = None
    claim: int | None = None
    epoch: int = 0
    served: bool | None = None
    clean: bool = True


def previous(identity: Identity) -> str:
    """How the last run that served ended, before this start changes anything: first (there was none), clean or
    unclean. A start that failed is not asked about, however often it was tried."""
    served = identity.epoch > 0 if identity.served is None else identity.served
    return "first" if not served else "clean" if identity.clean else "unclean"


def read(folder: Path, *, node: str, rack: str, hardware: str) -> Identity:
    """The identity of the spool in ``folder``, a new one where there is none. Raises Halt when it is damaged, or
    another node's, rack's or machine's."""
    path = folder / "identity.json"
    if not path.exists():
        return Identity(spool_id=uuid.uuid4().hex, node=node, rack=rack, hardware=hardware, served=False)
    try:
        identity = msgspec.json.decode(path.read_bytes(), type=Identity)
    except msgspec.DecodeError:
        raise Halt(f"spool: {path} is damaged; move the folder away and restart", code="bad_spool") from None
    if (identity.node, identity.rack) != (node, rack):
        raise Halt(
            f"spool {folder}: belongs to node {identity.node!r} of rack {identity.rack!r}, but the "
            f"configuration has {node!r} of {rack!r}; restore node.id, or set another paths.state for the new node",
            code="wrong_identity",
        )
    if "unknown" in (identity.hardware, hardware):
        # unreadable then or now; keep the known value
        identity.hardware = hardware if identity.hardware == "unknown" else identity.hardware
    elif identity.hardware != hardware:
        why = f"a copied disk must not report as {node!r}: move the spool folder away and restart"
        raise Halt(f"spool {folder}: written by other hardware; {why}", code="wrong_identity")
    return identity
