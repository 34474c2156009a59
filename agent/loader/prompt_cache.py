"""KV states of earlier prompts in radix trees over their tokens: shared prefixes are stored once.

``Tokens`` belong to a namespace, and each namespace has a tree of its own: a prompt finds, and is compared with, what
requests of its namespace have left. There is no way to ask with bare token ids. All trees share one budget.

Each edge of the tree is a run of tokens with the *piece* of state that belongs to exactly these tokens. Pieces are
opaque here; slicing and measuring them is the engine's task. Where a model's state cannot be sliced by tokens
(recurrent layers, sliding-window attention) a piece is the state after the whole prefix, and serves only prompts that
continue from exactly there.

Leaves are evicted by least recent use. A lookup refreshes every node on its path, so a system prompt that many requests
share is always more recent than the questions below it.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from agent.wire.namespaces import Namespace

P = TypeVar("P")

MIN_PREFIX_TOK = 8
"""Shorter common prefixes are not worth a copy."""
TOKEN_BYTES = 4

Ids = NDArray[np.int32]
_NO_IDS: Ids = np.zeros(0, dtype=np.int32)


class Tokens:
    """A run of tokens and the namespace that it belongs to."""

    __slots__ = ("ids", "namespace")

    def __init__(self, namespace: Namespace, ids: Ids) -> None:
        self.namespace, self.ids = namespace, ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> "Tokens":
        return Tokens(self.namespace, self.ids[part])


class Hit(NamedTuple, Generic[P]):
    """Pieces in order with the number of tokens used of each; ``common_tok`` in total."""

    pieces: list[tuple[P, int]]
    common_tok: int


class _Node(Generic[P]):
    """An edge and its subtree. ``piece`` is None where only longer prompts have a state (unsliceable states)."""

    __slots__ = ("children", "parent", "piece", "size", "tokens", "used")

    def __init__(self, tokens: Ids, piece: P | None, size: int, parent: "_Node[P] | None") -> None:
        self.tokens, self.piece, self.size, self.parent = tokens, piece, size, parent
        self.children: dict[int, _Node[P]] = {}
        self.used = 0


class _Root(_Node[P]):
    """Where the tree of a namespace begins. It is there while the tree holds something, so roots are never more than
    leaves, which the budget bounds."""

    __slots__ = ("namespace",)

    def __init__(self, namespace: Namespace) -> None:
        super().__init__(_NO_IDS, None, 0, None)
        self.namespace = namespace


class PromptCache(Generic[P]):
    """Holds up to ``budget_bytes``, all namespaces together; 0 disables it. ``split(piece, at)`` returns the pieces of
    the first ``at`` tokens and of the rest; None for states that cannot be sliced. ``nbytes(piece)`` is its size."""

    def __init__(
        self, budget_bytes: int, nbytes: Callable[[P], int], split: Callable[[P, int], tuple[P, P]] | None = None
    ) -> None:
        self.budget_bytes, self._nbytes, self._split = budget_bytes, nbytes, split
        self._roots: dict[Namespace, _Root[P]] = {}
        self._clock = 0
        self._leaves: set[_Node[P]] = set()
        self.bytes = self.hits = self.misses = self.saved_tok = 0
        self.evictions: Counter[str] = Counter()

    def find(self, prompt: Tokens) -> Hit[P] | None:
        """The longest cached prefix of ``prompt``, counted and refreshed. The last prompt token is never part of it,
        because one token must be left to start generation from."""
        path, common = self._walk(prompt[:-1])
        if common < MIN_PREFIX_TOK:
            self.misses += 1
            return None
        self.hits += 1
        self.saved_tok += common
        self._clock += 1
        for node, _ in path:
            node.used = self._clock
        if self._split is None:
            last = path[-1][0]
            assert last.piece is not None
            return Hit([(last.piece, common)], common)
        return Hit([(node.piece, taken) for node, taken in path if node.piece is not None], common)

    def peek(self, prompt: Tokens) -> int:
        """Number of tokens that ``find`` would return, without counting or refreshing."""
        _, common = self._walk(prompt[:-1])
        return common if common >= MIN_PREFIX_TOK else 0

    def put(self, tokens: Tokens, piece_of: Callable[[int, int], P]) -> None:
        """Store the state of ``tokens``. ``piece_of(begin, end)`` makes the piece that is not cached yet; a state that
        cannot be sliced is requested as a whole, from 0."""
        if len(tokens) < MIN_PREFIX_TOK or not self.budget_bytes:
            return
        root = self._roots.get(tokens.namespace) or _Root(tokens.namespace)
        node, held = self._branch(root, tokens.ids)
        if held == len(tokens) and (self._split is not None or node.piece is not None):
            return
        piece = piece_of(held if self._split is not None else 0, len(tokens))
        above = _lineage(node)
        size = self._nbytes(piece) + TOKEN_BYTES * (len(tokens) - held)
        if sum(one.size for one in above) + size > self.budget_bytes:
            return  # it would evict everything else and then itself
        fresh = node
        if held < len(tokens):
            fresh = _Node(tokens.ids[held:].copy(), None, 0, node)
            node.children[int(fresh.tokens[0])] = fresh
            self._leaves.discard(node)
        self._roots[root.namespace] = root
        fresh.piece = piece
        if not fresh.children:
            self._leaves.add(fresh)
        self._resize(fresh, self._nbytes(piece) + TOKEN_BYTES * len(fresh.tokens))
        self._clock += 1
        for one in (fresh, *above):
            one.used = self._clock
        self.shrink(self.budget_bytes, "budget")

    def shrink(self, to_bytes: int, reason: str) -> None:
        """Evict the least recently used leaves until at most ``to_bytes`` are held."""
        while self.bytes > to_bytes and self._leaves:
            leaf = min(self._leaves, key=lambda node: node.used)
            self.evictions[reason] += 1
            self._drop(leaf)

    def clear(self) -> None:
        """Remove everything; not counted as evictions."""
        self._roots.clear()
        self._leaves.clear()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._leaves)

    def _walk(self, tokens: Tokens) -> tuple[list[tuple[_Node[P], int]], int]:
        """The edges on the path of ``tokens`` with the tokens used of each, and the number of tokens with a state."""
        path: list[tuple[_Node[P], int]] = []
        ids, at, usable, usable_at = tokens.ids, 0, 0, 0
        node: _Node[P] | None = self._roots.get(tokens.namespace)
        while node is not None and at < len(ids):
            if (child := node.children.get(int(ids[at]))) is None:
                break
            taken = _common(child.tokens, ids[at:])
            path.append((child, taken))
            at += taken
            whole = taken == len(child.tokens)
            if self._split is not None or (whole and child.piece is not None):
                usable, usable_at = len(path), at
            if not whole:
                break
            node = child
        return path[:usable], usable_at

    def _branch(self, root: _Root[P], ids: Ids) -> tuple[_Node[P], int]:
        """The node up to which ``ids`` is cached; an edge that it leaves midway is split there."""
        node: _Node[P] = root
        at = 0
        while at < len(ids):
            if (child := node.children.get(int(ids[at]))) is None:
                break
            taken = _common(child.tokens, ids[at:])
            at += taken
            if taken < len(child.tokens):
                return self._divide(child, taken), at
            node = child
        return node, at

    def _divide(self, node: _Node[P], at: int) -> _Node[P]:
        """Split an edge in two; returns the upper one."""
        above, parent = None, node.parent
        assert parent is not None
        below = node.piece
        if self._split is not None and node.piece is not None:
            above, below = self._split(node.piece, at)
        upper: _Node[P] = _Node(node.tokens[:at].copy(), above, 0, parent)
        upper.used = node.used
        parent.children[int(upper.tokens[0])] = upper
        node.tokens, node.piece, node.parent = node.tokens[at:].copy(), below, upper
        upper.children[int(node.tokens[0])] = node
        for part in (upper, node):
            size = self._nbytes(part.piece) if part.piece is not None else 0
            self._resize(part, size + TOKEN_BYTES * len(part.tokens))
        return upper

    def _drop(self, leaf: _Node[P]) -> None:
        """Remove a leaf, its ancestors that have neither other children nor a state, and an empty tree."""
        node = leaf
        while node.parent is not None:
            parent = node.parent
            self._resize(node, 0)
            del parent.children[int(node.tokens[0])]
            self._leaves.discard(node)
            if parent.children:
                return
            if isinstance(parent, _Root):
                del self._roots[parent.namespace]
                return
            if parent.piece is not None:
                self._leaves.add(parent)
                return
            node = parent

    def _resize(self, node: _Node[P], size: int) -> None:
        self.bytes += size - node.size
        node.size = size


def _lineage(node: _Node[P]) -> list[_Node[P]]:
    """A node and all its ancestors."""
    found = [node]
    while found[-1].parent is not None:
        found.append(found[-1].parent)
    return found


def as_tokens(namespace: Namespace, ids: Sequence[int]) -> Tokens:
    """Token ids as the cache expects them."""
    return Tokens(namespace, np.asarray(ids, dtype=np.int32))


def common(left: Tokens, right: Tokens) -> int:
    """Length of the common prefix of two runs of tokens; 0 in different namespaces, whatever the tokens are."""
    return _common(left.ids, right.ids) if left.namespace == right.namespace else 0


def _common(left: Ids, right: Ids) -> int:
    length = min(len(left), len(right))
    differs = np.flatnonzero(left[:length] != right[:length])
    return int(differs[0]) if len(differs) else length


def most_shared(tokens: Tokens, others: Sequence[Tokens], least_tok: int) -> tuple[int, int] | None:
    """Which of the others has the longest common prefix with ``tokens``, and its length; None below ``least_tok``."""
    lengths = [common(tokens, other) for other in others]
    best = max(range(len(lengths)), key=lengths.__getitem__, default=None)
    return None if best is None or lengths[best] < least_tok else (best, lengths[best])
