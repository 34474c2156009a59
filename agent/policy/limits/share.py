"""What a node tells its peers of a limit. Pure data."""

import hashlib
from collections.abc import Sequence
from typing import Annotated, cast

import msgspec
from msgspec import Meta

from agent.policy.limits.limit import Name, Span, Unit

Amount = Annotated[int, Meta(ge=0)]


class Share(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One limit at one node. ``period`` is the start of the calendar period, 0 for a minute; ``basis`` names the limit
    and the nodes that it was divided among. ``used`` is what counts there now, ``part`` what the node may use, and
    ``want`` what it lacks for the next seconds. By node and since the period began: ``given`` is what it lent, of which
    it got ``back`` some and has ``ended`` some; ``got`` is what it borrowed, of which it ``returned`` some, and some is
    ``gone`` because the lender has ended it. They only ever rise, so that an answer that is lost, late or doubled
    changes nothing."""

    owner: str
    span: str
    unit: str
    period: Amount = 0
    basis: str = ""
    used: Amount = 0
    part: Amount = 0
    want: Amount = 0
    given: dict[str, Amount] = {}
    back: dict[str, Amount] = {}
    ended: dict[str, Amount] = {}
    got: dict[str, Amount] = {}
    returned: dict[str, Amount] = {}
    gone: dict[str, Amount] = {}

    @property
    def name(self) -> Name:
        """The limit's name, or one that a later version of this program knows."""
        return Name(self.owner, cast(Span, self.span), cast(Unit, self.unit))


def basis(most: int, nodes: Sequence[str]) -> str:
    """Names a limit and the nodes that hold it: those that disagree about either exchange nothing."""
    return hashlib.blake2b("\n".join((str(most), *sorted(nodes))).encode(), digest_size=6).hexdigest()
