"""Frames that a peer with the right secret may send: valid ones, odd values, the answer's side, mutations, noise."""

import json
import math
import random
from collections.abc import Callable
from typing import Any

import msgpack

from agent.wire.frames import Cancel, Done, Embed, Failed, Generate, Message, Stop, Tokens, ToolCall, encode

TEXTS = ("", "hello", "\x00", "\ud7ff\U0010ffff", "a" * 5000, "<|im_end|>", "../../etc", "{{ 7*7 }}", "\u202e", " ")
NUMBERS = (0, -1, 1, 7, 2**31, 2**63 - 1, -(2**63), 2**64 - 1)
FLOATS = (0.0, -1.0, 1.0, 1e308, -1e308, math.nan, math.inf, 5e-324)


def _message(rng: random.Random) -> Message:
    calls = tuple(
        ToolCall(id="c", name=rng.choice(TEXTS), arguments=rng.choice(TEXTS)) for _ in range(rng.randrange(3))
    )
    role = rng.choice(("user", "assistant", "system", "tool", "", "root"))
    return Message(role=role, content=rng.choice(TEXTS), reasoning=rng.choice(TEXTS), calls=calls)


def _generate(rng: random.Random) -> bytes:
    """Types as they should be, values as no gateway would send them."""
    odd: dict[str, Callable[[], Any]] = {
        "model": lambda: rng.choice(("m", "m", "nothing", *TEXTS)),
        "messages": lambda: tuple(_message(rng) for _ in range(rng.randrange(4))),
        "prompt": lambda: rng.choice(TEXTS),
        "max_tokens": lambda: rng.choice((None, *NUMBERS[:4])),
        "temperature": lambda: rng.choice(FLOATS),
        "top_p": lambda: rng.choice(FLOATS),
        "min_p": lambda: rng.choice(FLOATS),
        "frequency_penalty": lambda: rng.choice(FLOATS),
        "repetition_penalty": lambda: rng.choice(FLOATS),
        "seed": lambda: rng.choice(NUMBERS),
        "top_k": lambda: rng.choice(NUMBERS),
        "logprobs": lambda: rng.choice((None, *NUMBERS[:4])),
        "logit_bias": lambda: ((rng.choice(NUMBERS), rng.choice(FLOATS)),),
        "stop": lambda: tuple(rng.choice(TEXTS) for _ in range(3)),
        "schema": lambda: rng.choice((*TEXTS, "{}", '{"type": 7}')),
        "tools": lambda: (rng.choice((*TEXTS, "{}")),),
        "must_call": lambda: rng.choice(TEXTS),
        "template_args": lambda: rng.choice((*TEXTS, "[]", '{"a": 1}')),
        "made": lambda: tuple(rng.choice(NUMBERS) for _ in range(3)),
        "version": lambda: rng.choice(TEXTS),
        "request_id": lambda: rng.choice(TEXTS),
        "door": lambda: rng.choice(("n2", "n1", *TEXTS)),
        "whole": lambda: True,
        "private": lambda: True,
    }
    chosen = {name: odd[name]() for name in rng.sample(sorted(odd), rng.randrange(6))}
    # a second request with an open id ends the connection
    number = rng.choice(NUMBERS[:6]) if rng.random() < 0.1 else rng.randrange(1 << 60)
    plain = {"id": number, "model": "m", "max_tokens": 2, "messages": (_message(rng),)}
    return encode(Generate(**{**plain, **chosen}))


def _other(rng: random.Random) -> bytes:
    number = rng.choice(NUMBERS[:6])
    frames = (
        Cancel(id=number),
        Embed(id=number, model="m", inputs=(rng.choice(TEXTS),)),
        Done(id=number, finish="stop", prompt_tok=1, cached_tok=0, completion_tok=1),
        Tokens(id=number, text=rng.choice(TEXTS), count=1, ids=(1,)),
        Failed(id=number, code="x", message=rng.choice(TEXTS)),
        Stop(),
    )
    return encode(rng.choice(frames))


def _mutated(rng: random.Random) -> bytes:
    data = bytearray(rng.choice((_generate, _other))(rng))
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data) + 1)
        how = rng.randrange(4)
        if how == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            del data[at : at + rng.randrange(8)]
        elif how == 2:
            data[at:at] = rng.randbytes(rng.randrange(8))
        else:
            data[at:at] = data[at : at + rng.randrange(64)]
    return bytes(data)


def _shapes(rng: random.Random) -> bytes:
    """Well-formed MessagePack of the wrong shape."""
    deep: Any = 1
    for _ in range(rng.randrange(1, 1500)):
        deep = [deep] if rng.random() < 0.5 else {"f": deep}
    small: Any = {"f": rng.choice(("generate", "embed", "cancel", "nothing")), "id": rng.choice((None, "x", [], -1))}
    one = rng.choice((small, [1, 2], "text", None, {1: 2}, {"f": 1}))
    try:
        return bytes(msgpack.packb(deep if rng.random() < 0.2 else one))
    except ValueError:  # msgpack's own limit on nesting
        return b"\x91" * 2000


def _claims(rng: random.Random) -> bytes:
    """Headers that promise far more than comes."""
    kind = rng.choice((b"\xdb", b"\xdd", b"\xdf", b"\xc6", b"\xc9"))
    return kind + rng.choice((b"\xff\xff\xff\xff", b"\x03\xff\xff\xff", b"\x00\x00\x00\x00")) + rng.randbytes(4)


def frame(rng: random.Random) -> bytes:
    """One frame."""
    kinds = (_generate, _other, _mutated, _shapes, _claims, _noise)
    return rng.choices(kinds, (20, 4, 3, 1, 1, 1))[0](rng)


def _noise(rng: random.Random) -> bytes:
    return rng.choice((rng.randbytes(rng.randrange(1, 64)), json.dumps({"f": "generate"}).encode(), b"", b"\xc1"))
