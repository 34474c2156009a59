"""What travels between the daemon and a loader, and between nodes: MessagePack maps, one after another on a stream.

A frame that asks carries an ``id`` chosen by the asker; every answer repeats it. Times are microseconds, integers.
"""

from typing import Any, Union

import msgpack
import msgspec

from shared.errors import Refused

PROTOCOL = 1
MAX_FRAME_BYTES = 64 << 20


class _Frame(msgspec.Struct, frozen=True, kw_only=True, tag_field="f"):
    pass


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One turn of a conversation."""

    role: str
    content: str


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A token and its natural-log probability. ``raw`` are its bytes, which may be part of a character."""

    text: str
    raw: bytes
    logprob: float


class Scored(msgspec.Struct, frozen=True, kw_only=True):
    """A chosen token beside the likeliest ones at its place."""

    chosen: Candidate
    top: tuple[Candidate, ...] = ()


class Generate(_Frame, frozen=True, kw_only=True, tag="generate"):
    """Answer this conversation, or continue ``prompt`` as it stands where there is one.

    ``logprobs`` is how many of the likeliest tokens to report at each place, None for no report. ``schema`` is a JSON
    schema, as text, that the answer has to follow.
    """

    id: int
    model: str
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    max_tokens: int | None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    schema: str | None = None
    request_id: str = ""
    door: str = ""


class Cancel(_Frame, frozen=True, kw_only=True, tag="cancel"):
    """Stop working on a request; no answer follows."""

    id: int


class Report(_Frame, frozen=True, kw_only=True, tag="report"):
    """Ask for Reported."""


class Stop(_Frame, frozen=True, kw_only=True, tag="stop"):
    """Finish what runs and end."""


class Ready(_Frame, frozen=True, kw_only=True, tag="ready"):
    """The model is in memory and warm."""

    protocol: int = PROTOCOL
    engine: str
    context_tok: int
    load_us: int
    active_bytes: int
    blas: str = ""


class LoadFailed(_Frame, frozen=True, kw_only=True, tag="load_failed"):
    """The model cannot be served; the loader ends after this frame."""

    code: str
    message: str


class Accepted(_Frame, frozen=True, kw_only=True, tag="accepted"):
    """The request is in the engine; ``cached_tok`` of its ``prompt_tok`` need no work. ``version`` will answer it."""

    id: int
    prompt_tok: int
    cached_tok: int
    version: str = ""
    node: str = ""


class Tokens(_Frame, frozen=True, kw_only=True, tag="tokens"):
    """Some more of the answer. ``text`` may be empty while a character or a stop string is incomplete."""

    id: int
    text: str
    count: int
    scored: tuple[Scored, ...] = ()


class Done(_Frame, frozen=True, kw_only=True, tag="done"):
    """The answer is complete. ``finish`` is stop or length."""

    id: int
    finish: str
    prompt_tok: int
    cached_tok: int
    completion_tok: int


class Failed(_Frame, frozen=True, kw_only=True, tag="failed"):
    """This request ended in an error; ``retryable`` when another node or another try may do better."""

    id: int
    code: str
    message: str
    param: str | None = None
    retryable: bool = False


class Reported(_Frame, frozen=True, kw_only=True, tag="reported"):
    """What the engine did since the last report; see shared.records.EngineWindow."""

    busy_prefill_us: int = 0
    busy_decode_us: int = 0
    prefill_tok: int = 0
    cached_tok: int = 0
    decode_tok: int = 0
    wasted_tok: int = 0
    steps: int = 0
    queue_max: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    cache_evictions: int = 0
    cache_bytes: int = 0
    active_bytes: int = 0


Frame = Union[  # noqa: UP007  (a tagged union msgspec can read back)
    Generate, Cancel, Report, Stop, Ready, LoadFailed, Accepted, Tokens, Done, Failed, Reported
]
Answer = Accepted | Tokens | Done | Failed
"""What a generation yields: Accepted, any number of Tokens, then Done or Failed."""

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


def encode(frame: Frame) -> bytes:
    """One frame as MessagePack."""
    return _encoder.encode(frame)


def decode(raw: bytes) -> Frame:
    """Exactly one frame. Raises Refused."""
    try:
        return _decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(f"frame: {type(error).__name__}", code="bad_frame") from None


class Decoder:
    """Frames out of a stream of bytes that may be cut anywhere."""

    def __init__(self) -> None:
        self._unpacker = msgpack.Unpacker(raw=False, max_buffer_size=MAX_FRAME_BYTES)

    def feed(self, chunk: bytes) -> list[Frame]:
        """The frames that ``chunk`` completes. Raises Refused for anything that is no frame of ours."""
        try:
            self._unpacker.feed(chunk)
            return [self._frame(mapping) for mapping in self._unpacker]
        except (msgpack.UnpackException, ValueError, UnicodeDecodeError, RecursionError) as error:
            raise Refused(f"frame: {type(error).__name__}", code="bad_frame") from None

    @staticmethod
    def _frame(mapping: Any) -> Frame:
        try:
            frame: Frame = msgspec.convert(mapping, Frame)
        except msgspec.ValidationError as error:
            raise Refused(f"frame: {error}", code="bad_frame") from None
        return frame
