"""Authentication between nodes of a rack: an HMAC with the rack secret over each request. Pure.

What is signed, one per line: protocol, sender, receiver, method, path with its query, time, nonce, and the SHA-256 of
the body. A signature is valid for ``FRESH_S`` around the receiver's clock, and only once. A response has a signature
over the request's nonce, so that the sender knows that a node of its rack answered. A connection is authenticated once
more, over the receiver's random challenge, so that a recorded handshake cannot be replayed, not even after a restart.
"""

import hashlib
import hmac
from collections import deque
from collections.abc import Mapping

import msgspec

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


class NotAPeer(RackError):
    """The sender is not a node of this rack, or cannot prove it. ``node`` is who refuses, told to a sender who has
    proved that it is of this rack."""

    code = "not_a_peer"
    node = ""


class Signed(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of a request's Authorization header."""

    protocol: int
    oldest: int
    node: str
    to: str
    t_ms: int
    nonce: str
    mac: str


def listener_proof(token: str, nonce: str, address: tuple[str, int]) -> str:
    """What only the holder of a node's admin token can answer to a nonce. ``address`` is where its socket listens, so
    that the right answer of another listener, to whom somebody passed the nonce on, is a wrong one."""
    host, port = address[0].removeprefix("::ffff:").partition("%")[0], str(address[1])
    return hmac.digest(token.encode(), _line("listener", nonce, host, port), "sha256").hex()


class Key:
    """A key derived from the rack secret, for requests between nodes."""

    def __init__(self, secret: str) -> None:
        self._key = hashlib.sha256(b"mlxrack peers\0" + secret.encode()).digest()

    def header(self, *, node: str, to: str, method: str, path: str, body: bytes, t_ms: int, nonce: str) -> str:
        """The Authorization header of a request from ``node`` to ``to``."""
        mac = self._mac(PROTOCOL, node, to, f"{method}\n{path}", t_ms, nonce, body)
        return f"{SCHEME} v={PROTOCOL},oldest={OLDEST},node={node},to={to},t={t_ms},nonce={nonce},mac={mac}"

    def proof(self, challenge: str, node: str) -> str:
        """The response of ``node`` to a challenge."""
        return hmac.digest(self._key, _line("proof", challenge, node), "sha256").hex()

    def is_proof(self, offered: str, challenge: str, node: str) -> bool:
        """Whether ``offered`` is the response of ``node``."""
        return hmac.compare_digest(offered.encode("ascii", "replace"), self.proof(challenge, node).encode())

    def answer(self, nonce: str, node: str, body: bytes = b"") -> str:
        """The signature of an answer; ``body`` where it is known before it is sent."""
        return hmac.digest(self._key, _line("answer", nonce, node, _sha256(body)), "sha256").hex()

    def is_answer(self, offered: str, nonce: str, node: str, body: bytes = b"") -> bool:
        """Whether ``offered`` is the signature of a node of this rack."""
        return hmac.compare_digest(offered.encode("ascii", "replace"), self.answer(nonce, node, body).encode())

    def check(self, header: str, *, me: str, method: str, path: str, body: bytes, now_ms: int) -> Signed:
        """The authenticated sender. Raises NotAPeer with the reason: no signature, another secret, clock skew, an
        unsupported protocol version, or another receiver than ``me``."""
        signed = parse(header)
        # the protocol first: a newer one may sign in another way
        if why := mismatch(signed.protocol, signed.oldest):
            raise NotAPeer(why, code="protocol_mismatch")
        mac = self._mac(signed.protocol, signed.node, signed.to, f"{method}\n{path}", signed.t_ms, signed.nonce, body)
        if not hmac.compare_digest(mac.encode(), signed.mac.encode("ascii", "replace")):
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
        return signed

    def _mac(self, protocol: int, node: str, to: str, asked: str, t_ms: int, nonce: str, body: bytes) -> str:
        signed = _line(str(protocol), node, to, asked, str(t_ms), nonce, _sha256(body))
        return hmac.digest(self._key, signed, "sha256").hex()


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
            mac=parts["mac"],
        )
    except (KeyError, ValueError):
        raise NotAPeer("malformed peer signature") from None


def mismatch(protocol: int, oldest: int) -> str:
    """Why two protocol versions are incompatible; "" when they are not."""
    if protocol >= OLDEST and oldest <= PROTOCOL:
        return ""
    which = "newer" if oldest > PROTOCOL else "older"
    return f"protocol version {protocol} is {which} than this node's {PROTOCOL}; upgrade the older of the two"


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ValueError
    return int(text)


def _line(*parts: str) -> bytes:
    return "\n".join(parts).encode("utf-8", "surrogateescape")


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
