"""Which prefixes of conversations a node is likely to have in its prompt cache. Pure.

The gateway may have no tokenizer, so a conversation is treated as bytes, about four per token, and its prefixes as a
chain: one keyed hash per ``BLOCK_BYTES``, each over everything up to there. Two conversations share exactly the hashes
of their common prefix if they use the same namespace of the prompt cache, else none. The key belongs to the rack, so
hashes in a heartbeat reveal nothing about prompts to others.
"""

import hashlib
import struct
from collections.abc import Container, Iterable, Iterator

from agent.wire.frames import Embed, Generate
from agent.wire.namespaces import Namespace

BYTES_PER_TOK = 4
BLOCK_BYTES = 256
BLOCK_TOK = BLOCK_BYTES // BYTES_PER_TOK
MOST_BLOCKS = 1024
"""Maximum per conversation, and in one node's table."""
LEAST_BLOCKS = 64
_HASH_BYTES = 8
_SALT_BYTES = 16

Chain = tuple[int, ...]


class Text:
    """A request as routing sees it: the hashes of its prefixes, and its approximate number of prompt tokens. Those of a
    ``private`` one choose its node, and are told to nobody."""

    __slots__ = ("chain", "private", "prompt_tok")

    def __init__(self, chain: Chain, prompt_tok: int, *, private: bool = False) -> None:
        self.chain, self.prompt_tok, self.private = chain, prompt_tok, private


def prefix_key(rack_secret: str) -> bytes:
    """Key of the prefix hashes: the same on all nodes of a rack, and used for nothing else."""
    return hashlib.sha256(b"mlxrack prefixes\0" + rack_secret.encode()).digest()


def text_of(key: bytes, ask: Generate | Embed) -> Text:
    """Compute a request's Text. ``key`` is at most 64 bytes; without one the chain is empty."""
    if isinstance(ask, Embed):
        size = sum(len(one) if isinstance(one, str) else BYTES_PER_TOK * len(one) for one in ask.inputs)
        return Text((), size // BYTES_PER_TOK + 1, private=ask.private)
    size = sum(len(part) if part.isascii() else len(_utf8(part)) for part in _parts(ask))
    chain = _chain(key, ask.cache, _hashed(ask)) if key and size >= BLOCK_BYTES else ()
    return Text(chain, size // BYTES_PER_TOK + 1, private=ask.private)


def _hashed(ask: Generate) -> bytearray:
    """The text that is hashed: what is beyond may be megabytes."""
    text = bytearray()
    for part in _parts(ask):
        if (room := MOST_BLOCKS * BLOCK_BYTES - len(text)) <= 0:
            break
        text += _utf8(part[:room])[:room]
    return text


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def matched(chain: Chain, known: Container[int]) -> int:
    """Number of leading blocks that are known."""
    count = 0
    for one in chain:
        if one not in known:
            break
        count += 1
    return count


def packed(hashes: Iterable[int]) -> bytes:
    """Hashes in wire format."""
    found = list(hashes)
    return struct.pack(f"<{len(found)}Q", *found)


def unpacked(raw: bytes) -> frozenset[int]:
    """Hashes from wire format; a truncated one is ignored."""
    count = min(MOST_BLOCKS, len(raw) // _HASH_BYTES)
    return frozenset(struct.unpack_from(f"<{count}Q", raw))


class PrefixTable:
    """Prefixes of the requests that one loader received recently, least recent first. The prompt cache itself is in the
    loader and evicts as needed, so the table's size is learned: a cache hit shorter than expected shrinks it, one as
    expected lets it grow. For a loader without a prompt cache ``most`` is 0."""

    def __init__(self, most: int = MOST_BLOCKS) -> None:
        self._hashes: dict[int, None] = {}
        self._most = most
        self._packed: bytes | None = None

    def __iter__(self) -> Iterator[int]:
        return iter(self._hashes)

    def __contains__(self, one: object) -> bool:
        return one in self._hashes

    @property
    def most(self) -> int:
        """Current maximum number of blocks."""
        return self._most

    def took(self, text: Text, cached_tok: int) -> None:
        """Record that the loader accepted a prompt and found ``cached_tok`` of its tokens in the prompt cache. Of a
        private one nothing is recorded: what is here goes into heartbeats."""
        if not self._most or text.private:
            return
        expected = matched(text.chain, self._hashes)
        if expected and 2 * cached_tok < expected * BLOCK_TOK:
            self._most = max(LEAST_BLOCKS, int(self._most * 0.7))
        elif expected:
            self._most = min(MOST_BLOCKS, self._most + expected)
        # insert the first block last, so that tails are evicted first: a prompt is found only from its first block on
        for one in reversed(text.chain):
            self._hashes.pop(one, None)
            self._hashes[one] = None
        while len(self._hashes) > self._most:
            del self._hashes[next(iter(self._hashes))]
        self._packed = None

    def clear(self) -> None:
        """Forget everything: a new loader has an empty cache."""
        self._hashes.clear()
        self._packed = None

    def digest(self) -> bytes:
        """All hashes in wire format."""
        if self._packed is None:
            self._packed = packed(self._hashes)
        return self._packed


def _parts(ask: Generate) -> Iterator[str]:
    """The text of a request in the order in which a template renders it, with separators between pieces."""
    if ask.prompt is not None:
        yield ask.prompt
        return
    yield from (ask.template_args or "", "\0", ask.reasoning_effort or "", "\0")
    for tool in ask.tools:
        yield tool + "\0"
    for message in ask.messages:
        yield from (f"\1{message.role}\0", message.reasoning, "\0", message.content, f"\0{message.call_id}")
        for call in message.calls:
            yield f"\2{call.name}\0{call.arguments}"


def _chain(key: bytes, cache: Namespace, text: bytearray) -> Chain:
    salt = hashlib.blake2b(cache.encode(), digest_size=_SALT_BYTES).digest() if cache else b""
    state = hashlib.blake2b(key=key, salt=salt, digest_size=_HASH_BYTES)
    found = []
    for at in range(0, len(text) - BLOCK_BYTES + 1, BLOCK_BYTES):
        state.update(text[at : at + BLOCK_BYTES])
        found.append(int.from_bytes(state.copy().digest(), "little"))
    return tuple(found)
