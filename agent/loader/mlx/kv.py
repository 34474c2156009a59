"""KV states of rows: slicing them by tokens, joining them, copying them.

A batch returns views that would keep the whole batch alive; everything stored here is a copy that owns its arrays and
has been evaluated.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

from agent.loader.disk_cache import Array

Layers = list[Any]
"""One row's state, one mlx-lm cache object per layer."""
Piece = list[tuple[mx.array, mx.array]]
"""Keys and values of a run of tokens, per layer: (1, heads, tokens, head size)."""


def sliceable(layers: Layers) -> bool:
    """Whether the state of a run of tokens can be sliced out: plain attention in every layer."""
    return all(type(layer) is KVCache for layer in layers)


def cut(layers: Layers, begin: int, end: int) -> Piece:
    """The piece of tokens ``begin`` to ``end``."""
    return owned([(layer.keys[..., begin:end, :], layer.values[..., begin:end, :]) for layer in layers])


def split(piece: Piece, at: int) -> tuple[Piece, Piece]:
    """The pieces of the first ``at`` tokens and of the rest."""
    return (
        owned([(k[..., :at, :], v[..., :at, :]) for k, v in piece]),
        owned([(k[..., at:, :], v[..., at:, :]) for k, v in piece]),
    )


def join(pieces: Sequence[tuple[Piece, int]]) -> Layers:
    """A row's state from pieces in order, each with the number of tokens to use."""
    layers: Layers = []
    for number in range(len(pieces[0][0])):
        parts = [(piece[number][0][..., :taken, :], piece[number][1][..., :taken, :]) for piece, taken in pieces]
        layer = KVCache()
        layer.keys = parts[0][0] if len(parts) == 1 else mx.concatenate([k for k, _ in parts], axis=2)
        layer.values = parts[0][1] if len(parts) == 1 else mx.concatenate([v for _, v in parts], axis=2)
        layer.offset = layer.keys.shape[2]
        layers.append(layer)
    return layers


def to_arrays(piece: Piece) -> list[Array]:
    """A piece as plain bytes, keys and values of each layer in turn."""
    flat = [array for pair in piece for array in pair]
    mx.eval(flat)
    return [(_name(a.dtype), tuple(a.shape), np.array(mx.contiguous(a).view(mx.uint8)).tobytes()) for a in flat]


def from_arrays(arrays: Sequence[Array]) -> Piece:
    """The piece from its bytes."""
    flat = [
        mx.array(np.frombuffer(raw, dtype=np.uint8)).view(getattr(mx, kind)).reshape(shape)
        for kind, shape, raw in arrays
    ]
    return list(zip(flat[::2], flat[1::2], strict=True))


def stacked(pieces: Sequence[Piece]) -> Piece:
    """Consecutive pieces concatenated."""
    return [
        (mx.concatenate([k for k, _ in layer], axis=2), mx.concatenate([v for _, v in layer], axis=2))
        for layer in zip(*pieces, strict=True)
    ]


def part(piece: Piece, begin: int, end: int) -> Piece:
    """Tokens ``begin`` to ``end`` of a piece, in new arrays."""
    return owned([(k[..., begin:end, :], v[..., begin:end, :]) for k, v in piece])


def nbytes(piece: Piece) -> int:
    """Size of a piece."""
    return sum(k.nbytes + v.nbytes for k, v in piece)


def detached(layers: Layers) -> Layers:
    """A copy of a row's whole state, for any kind of layer."""
    copies = [copy.copy(layer) for layer in layers]
    arrays = []
    for layer in copies:
        arrays += _each_array(layer, _fresh)
    mx.eval(arrays)
    return copies


def layers_nbytes(layers: Layers) -> int:
    """Size of a row's whole state."""
    return sum(int(layer.nbytes) for layer in layers)


def owned(piece: Piece) -> Piece:
    """The same values in arrays that share no memory with others."""
    fresh = [(_fresh(k), _fresh(v)) for k, v in piece]
    mx.eval(fresh)
    return fresh


def _fresh(array: mx.array) -> mx.array:
    # an addition makes a new array, where a slice or a copy may share the batch's
    return array + mx.zeros((), dtype=array.dtype)


def _name(dtype: Any) -> str:
    return str(dtype).rpartition(".")[2]


def _each_array(layer: Any, change: Callable[[mx.array], mx.array]) -> list[mx.array]:
    """Replace every array of a layer's cache, including lists and nested caches; returns the new ones."""
    made: list[mx.array] = []

    def changed(value: Any) -> Any:
        if isinstance(value, mx.array):
            made.append(change(value))
            return made[-1]
        if isinstance(value, list | tuple):
            return type(value)(changed(one) for one in value)
        if hasattr(value, "is_trimmable"):  # a cache within a cache
            inner = copy.copy(value)
            made.extend(_each_array(inner, change))
            return inner
        return value

    for name, value in list(vars(layer).items()):
        setattr(layer, name, changed(value))
    return made
