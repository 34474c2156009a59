"""Authentication between nodes of a rack: an HMAC with the rack secret over each request. Pure.

What is signed, one per line: protocol, sender, receiver, method, path with its query, time, nonce, and the SHA-256 of
the body. A signature is valid for ``FRESH_S`` around the receiver's clock, and only once. A response has a signature
over the request's nonce, so that the sender knows that a node of its rack answered. A connection is authenticated once
more, over the receiver's random challenge, so that a recorded handshake cannot be replayed, not even after a restart.

While the secret is replaced a node has two, and signs each request with both: two nodes that have one in common
understand each other, in whatever order the nodes get theirs. What is answered is signed with the one that both have,
the newest first.
"""

import hashlib
import hmac
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from agent.process.prefixes import prefix_key
from shared.errors import RackError

PROTOCOL = 2
"""The version of the protocol between nodes: heartbeats, frames and this signature."""
OLDEST = 2
"""The oldest version that this one supports."""
FRESH_S = 60.0
SCHEME = "Mlxrack"
ANSWER_HEADER = "X-Mlxrack-Rack"
NODE_HEADER = "X-Mlxrack-Node"
"""Which node refuses a request that was meant for another."""
BODY = "body"
"""In the query of a request with a body, its hash: the path is signed, so a receiver knows the sender before it reads a
body."""
_MACS = ("mac", "mac2")
_MARK_BYTES = 6


class NotAPeer(RackError):
    """The sender is not a node of this rack, or cannot prove it. ``node`` is who refuses, told to a sender who has
    proved that it is of this rack."""

    code = "not_a_peer"
    node = ""


class Signed(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of a request's Authorization header; ``macs`` has one for each secret of the sender."""

    protocol: int
    oldest: int
    node: str
    to: str
    t_ms: int
    nonce: str
    macs: tuple[str, ...]


def listener_proof(token: str, nonce: str, address: tuple[str, int]) -> str:
    """What only the holder of a node's admin token can answer to a nonce. ``address`` is where its socket listens, so
    that the right answer of another listener, to whom somebody passed the nonce on, is a wrong one."""
    host, port = address[0].removeprefix("::ffff:").partition("%")[0], str(address[1])
    return hmac.digest(token.encode(), _line("listener", nonce, host, port), "sha256").hex()


def taint_key(secret: str) -> bytes:
    """The key that the nodes of a rack begin with: those that begin with one secret have one key."""
    return hashlib.sha256(b"mlxrack taints\0" + secret.encode()).digest()


class Key:
    """A key derived from one rack secret, for requests between nodes. ``mark`` tells it from others and reveals nothing
    of it."""

    def __init__(self, secret: str) -> None:
        self._key = hashlib.sha256(b"mlxrack peers\0" + secret.encode()).digest()
        self.mark = hmac.digest(self._key, b"mark", "sha256")[:_MARK_BYTES].hex()

    def proof(self, challenge: str, node: str) -> str:
        """The response of ``node`` to a challenge."""
        return hmac.digest(self._key, _line("proof", challenge, node), "sha256").hex()

    def is_proof(self, offered: str, challenge: str, node: str) -> bool:
        """Whether ``offered`` is the response of ``node``."""
        return hmac.compare_digest(offered.encode("ascii", "replace"), self.proof(challenge, node).encode())

    def answer(self, nonce: str, node: str, body: bytes = b"") -> str:
        """The signature of an answer; ``body`` where it is known before it is sent."""
        return hmac.digest(self._key, _line("answer", nonce, node, body_hash(body)), "sha256").hex()

    def is_answer(self, offered: str, nonce: str, node: str, body: bytes = b"") -> bool:
        """Whether ``offered`` is the signature of a node of this rack."""
        return hmac.compare_digest(offered.encode("ascii", "replace"), self.answer(nonce, node, body).encode())

    def mac(self, signed: bytes) -> str:
        """The signature of a request."""
        return hmac.digest(self._key, signed, "sha256").hex()


class RackKeys:
    """The keys of a node, the newest first; none without a rack secret. Whoever signs or checks holds this, so that all
    have new ones at once. ``prefix_key`` is that of the oldest secret, on which the nodes agree until the first of them
    forgets it; ``taint_key`` is one of it, too, with which a node that has none begins."""

    def __init__(self, secrets: Sequence[str] = ()) -> None:
        self._keys: Mapping[str, Key] = {}
        self.newest: Key | None = None
        self.prefix_key = self.taint_key = b""
        self.become(secrets)

    def become(self, secrets: Sequence[str]) -> None:
        """Have other keys; what is signed with those that are gone counts no more."""
        self._keys = {secret: self._keys.get(secret) or Key(secret) for secret in secrets}
        self.newest = next(iter(self), None)
        self.prefix_key, self.taint_key = (prefix_key(secrets[-1]), taint_key(secrets[-1])) if secrets else (b"", b"")

    def __bool__(self) -> bool:
        return bool(self._keys)

    def __iter__(self) -> Iterator[Key]:
        return iter(tuple(self._keys.values()))

    def __contains__(self, key: object) -> bool:
        return any(one is key for one in self._keys.values())

    @property
    def marks(self) -> tuple[str, ...]:
        """Of every key, the newest first."""
        return tuple(key.mark for key in self)

    def needs_older(self, accepted: Sequence[str] | None) -> bool | None:
        """Whether a peer that accepts the keys with these marks lacks the newest one; None when that is not known: it
        has not answered yet, or runs a version that knows one secret only."""
        if not accepted or self.newest is None:
            return None
        return self.newest.mark not in accepted

    def header(self, *, node: str, to: str, method: str, path: str, body: bytes, t_ms: int, nonce: str) -> str:
        """The Authorization header of a request from ``node`` to ``to``. A version that knows one secret reads the
        first signature, which is that of the oldest."""
        signed = _request(PROTOCOL, node, to, f"{method}\n{path}", t_ms, nonce, body)
        macs = [key.mac(signed) for key in self][::-1]
        named = ",".join(f"{name}={mac}" for name, mac in zip(_MACS, macs, strict=False))
        return f"{SCHEME} v={PROTOCOL},oldest={OLDEST},node={node},to={to},t={t_ms},nonce={nonce},{named}"

    def check(self, header: str, *, me: str, method: str, path: str, body: bytes, now_ms: int) -> tuple[Signed, Key]:
        """The authenticated sender, and the newest key that both have. Raises NotAPeer with the reason: no signature,
        another secret, clock skew, an unsupported protocol version, or another receiver than ``me``."""
        signed = parse(header)
        # the protocol first: a newer one may sign in another way
        if why := mismatch(signed.protocol, signed.oldest):
            raise NotAPeer(why, code="protocol_mismatch")
        line = _request(signed.protocol, signed.node, signed.to, f"{method}\n{path}", signed.t_ms, signed.nonce, body)
        if (key := self._common(line, signed.macs)) is None:
            raise NotAPeer("invalid signature; peers.secret must be the same on all nodes")
        skew_s = (signed.t_ms - now_ms) / 1000
        if abs(skew_s) > FRESH_S:
            why = f"the clock of {signed.node} differs by {skew_s:.0f} s from this node's; synchronize both clocks"
            raise NotAPeer(why, code="clock_skew")
        if signed.to != me:
            why = f"{signed.node} calls this node {signed.to!r}, but its id is {me!r}; correct peers.nodes there"
            refusal = NotAPeer(why, code="wrong_node")
            refusal.node = me
            raise refusal
        return signed, key

    def answered_with(self, offered: str, nonce: str, node: str, body: bytes = b"") -> Key | None:
        """The key that an answer is signed with; None when it is none of ours."""
        return next((key for key in self if key.is_answer(offered, nonce, node, body)), None)

    def _common(self, signed: bytes, macs: Sequence[str]) -> Key | None:
        """The newest key that made one of these signatures. All are compared, so that timing reveals nothing."""
        offered, found = [mac.encode("ascii", "replace") for mac in macs], None
        for key in self:
            mac = key.mac(signed).encode()
            matches = [hmac.compare_digest(mac, one) for one in offered]
            found = found or (key if any(matches) else None)
        return found


class Nonces:
    """Nonces seen, while signatures are valid; at most ``most``, beyond which the oldest are dropped."""

    def __init__(self, most: int = 200_000) -> None:
        self._seen: set[str] = set()
        self._order: deque[tuple[int, str]] = deque()
        self._most = most

    def take(self, nonce: str, now_ms: int) -> bool:
        """False if it was used before (a replay)."""
        while self._order and (self._order[0][0] < now_ms - 2 * FRESH_S * 1000 or len(self._order) >= self._most):
            self._seen.discard(self._order.popleft()[1])
        if nonce in self._seen:
            return False
        self._seen.add(nonce)
        self._order.append((now_ms, nonce))
        return True


def parse(header: str) -> Signed:
    """The parts of an Authorization header. Raises NotAPeer."""
    scheme, _, rest = header.partition(" ")
    if scheme != SCHEME:
        raise NotAPeer("no peer signature; requests between nodes are signed with peers.secret")
    parts: Mapping[str, str] = dict(part.partition("=")[::2] for part in rest.split(","))
    try:
        return Signed(
            protocol=_number(parts["v"]),
            oldest=_number(parts["oldest"]),
            node=parts["node"],
            to=parts["to"],
            t_ms=_number(parts["t"]),
            nonce=parts["nonce"],
            macs=(parts["mac"], *(parts[name] for name in _MACS[1:] if name in parts)),
        )
    except (KeyError, ValueError):
        raise NotAPeer("malformed peer signature") from None


def mismatch(protocol: int, oldest: int) -> str:
    """Why two protocol versions are incompatible; "" when they are not."""
    if protocol >= OLDEST and oldest <= PROTOCOL:
        return ""
    which = "newer" if oldest > PROTOCOL else "older"
    return f"protocol version {protocol} is {which} than this node's {PROTOCOL}; upgrade the older of the two"


def _request(protocol: int, node: str, to: str, asked: str, t_ms: int, nonce: str, body: bytes) -> bytes:
    return _line(str(protocol), node, to, asked, str(t_ms), nonce, body_hash(body))


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ValueError
    return int(text)


def _line(*parts: str) -> bytes:
    return "\n".join(parts).encode("utf-8", "surrogateescape")


def body_hash(body: bytes) -> str:
    """What stands for a body where it is signed."""
    return hashlib.sha256(body).hexdigest()
