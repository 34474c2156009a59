"""Frames between the daemon and a loader, and between nodes: MessagePack maps, one after another on a stream.

A request frame carries an ``id`` chosen by the sender; every answer repeats it. Times are microseconds, integers.
"""

from collections.abc import Sequence
from typing import Literal, Union

import msgpack
import msgspec

from agent.wire.namespaces import OPEN, Namespace
from agent.wire.priority import NEUTRAL, Priority
from agent.wire.step_times import StepTimes
from shared.errors import Refused
from shared.records import EngineCounts

PROTOCOL = 1
MAX_FRAME_BYTES = 64 << 20
BUFFER_BYTES = 64 << 10
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
"""How much a model is to reason, least first: the values of ``Generate.reasoning_effort``."""


class _Frame(msgspec.Struct, frozen=True, kw_only=True, tag_field="f"):
    pass


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A function call by the model; ``arguments`` is JSON text."""

    id: str
    name: str
    arguments: str


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One turn of a conversation. In a tool's turn, ``call_id`` names the call whose result it is."""

    role: str
    content: str
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    call_id: str = ""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A token and its natural-log probability. ``raw`` are its bytes, which may be part of a character."""

    text: str
    raw: bytes
    logprob: float


class Scored(msgspec.Struct, frozen=True, kw_only=True):
    """A chosen token and the likeliest ones at its position."""

    chosen: Candidate
    top: tuple[Candidate, ...] = ()


class Generate(_Frame, frozen=True, kw_only=True, tag="generate"):
    """Answer this conversation, or continue ``prompt`` verbatim where there is one.

    ``logprobs`` is how many of the likeliest tokens to report at each position, None for no report. ``schema`` is a
    JSON schema, as text, that the answer must follow. ``tools`` are function descriptions as JSON text; ``must_call``
    is the name of the one to call, "" for any, None when the model decides; with ``one_call`` the answer ends after
    the first call. ``template_args`` is a JSON object for the chat template. Nothing of a ``private`` request is kept
    on disk or told to other nodes. ``made`` are tokens of the answer that were already produced: generation continues
    after them, and only exactly ``version`` of the model may do that. A ``whole`` answer is read at its end, so its
    pieces may be joined. ``cache`` is the namespace in which anything computed for it is kept and found again;
    ``priority`` is its place among other requests wherever it waits for them.

    ``top_k`` keeps that many of the likeliest tokens (0: all), ``min_p`` those at least that likely relative to the
    likeliest. ``repetition_penalty`` (1: none) applies to tokens of the last ``repetition_window_tok`` of prompt and
    answer (0: all of them). With ``ignore_eos`` only ``max_tokens`` or a stop string ends the answer. A ``strict``
    request whose ``max_tokens`` exceed the context fails; else they are capped and named in ``Accepted.ignored``.
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
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_window_tok: int = 0
    ignore_eos: bool = False
    strict: bool = False
    schema: str | None = None
    tools: tuple[str, ...] = ()
    must_call: str | None = None
    one_call: bool = False
    reasoning_effort: str | None = None
    template_args: str | None = None
    private: bool = False
    made: tuple[int, ...] = ()
    version: str = ""
    whole: bool = False
    cache: Namespace = OPEN
    priority: Priority = NEUTRAL
    request_id: str = ""
    door: str = ""


class Embed(_Frame, frozen=True, kw_only=True, tag="embed"):
    """A vector for each input: texts, or token ids. ``dimensions`` is the size that the vectors must have, None for the
    model's own. ``private`` as for Generate, although no engine keeps anything of it."""

    id: int
    model: str
    inputs: tuple[str | tuple[int, ...], ...]
    dimensions: int | None = None
    private: bool = False
    cache: Namespace = OPEN
    priority: Priority = NEUTRAL
    request_id: str = ""
    door: str = ""


class Cancel(_Frame, frozen=True, kw_only=True, tag="cancel"):
    """Stop working on a request; no answer follows, but Working."""

    id: int


class Report(_Frame, frozen=True, kw_only=True, tag="report"):
    """Ask for Reported."""


class Relieve(_Frame, frozen=True, kw_only=True, tag="relieve"):
    """Memory pressure: admit nothing new and work in small chunks (soft), also drop what can be computed again (hard),
    or work as usual (calm)."""

    level: Literal["calm", "soft", "hard"]


class Calibrate(_Frame, frozen=True, kw_only=True, tag="calibrate"):
    """The node is idle: time the model's steps until a request arrives, or until ``go`` is false. Calibrated follows
    when that is done."""

    go: bool


class Calibrated(_Frame, frozen=True, kw_only=True, tag="calibrated"):
    """How long the model's steps take, or which ``problem`` prevented it from being timed."""

    times: StepTimes | None = None
    problem: str = ""


class Stop(_Frame, frozen=True, kw_only=True, tag="stop"):
    """Finish running requests and exit."""


class Ready(_Frame, frozen=True, kw_only=True, tag="ready"):
    """The model is resident and warm. ``serves`` is text for a generative model, vectors for an encoder. ``peak_bytes``
    is the peak of MLX memory while the model answered its first prompt, of ``warm_tok`` tokens. ``talks`` says how its
    chat template is spoken to, as found by a probe. ``runtime`` is what the times of its steps depend on beside the
    model (device, system, libraries); "" for a model that is not timed."""

    protocol: int = PROTOCOL
    engine: str
    context_tok: int
    load_us: int
    active_bytes: int
    peak_bytes: int = 0
    warm_tok: int = 0
    blas: str = ""
    serves: str = "text"
    talks: dict[str, str] = {}
    runtime: str = ""


class LoadFailed(_Frame, frozen=True, kw_only=True, tag="load_failed"):
    """The model cannot be served; the loader exits after this frame."""

    code: str
    message: str


class Accepted(_Frame, frozen=True, kw_only=True, tag="accepted"):
    """The request is in the engine; ``cached_tok`` of its ``prompt_tok`` are cached. ``version`` will answer it.
    ``ignored`` are names of request fields that the engine capped or that have no effect on this model."""

    id: int
    prompt_tok: int
    cached_tok: int
    version: str = ""
    node: str = ""
    ignored: tuple[str, ...] = ()


class Tokens(_Frame, frozen=True, kw_only=True, tag="tokens"):
    """The next piece of the answer. ``text`` may be empty while a character or a stop string is incomplete.
    ``reasoning`` is the model's reasoning before its answer; ``calls`` are complete. ``ids`` are the tokens, from which
    another loader could continue."""

    id: int
    text: str
    count: int
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    scored: tuple[Scored, ...] = ()
    ids: tuple[int, ...] = ()


class Done(_Frame, frozen=True, kw_only=True, tag="done"):
    """The answer is complete. ``finish`` is stop, length or tool_calls. The times are the engine's: until work on it
    began, for prefill, for decode. ``unmet`` are parts of schemas that the answer violates, which the engine could not
    enforce."""

    id: int
    finish: str
    prompt_tok: int
    cached_tok: int
    completion_tok: int
    reasoning_tok: int = 0
    queue_us: int = 0
    prefill_us: int = 0
    decode_us: int = 0
    unmet: tuple[str, ...] = ()


class Waits(_Frame, frozen=True, kw_only=True, tag="waits"):
    """This request waits for its turn, for a row or for memory, or its prompt is being computed; sent periodically, so
    that its silence does not count as a stall."""

    id: int


class Embedded(_Frame, frozen=True, kw_only=True, tag="embedded"):
    """The next vectors of an Embed, in order, each as little-endian float32; Done follows the last."""

    id: int
    vectors: tuple[bytes, ...]


class Working(_Frame, frozen=True, kw_only=True, tag="working"):
    """Sent about once a second while the engine works, whatever it works on, when it has become idle, and for a Cancel:
    it is alive, and this is the memory it holds. ``reuse_bytes`` are freed arrays that MLX keeps. The rest is its work
    since the last such frame, on its own clock: tokens and time of prefill; tokens, time and steps of decode. ``waits``
    are requests that wait for a row or for memory, or whose input is being computed: nothing is wrong with them."""

    active_bytes: int = 0
    reuse_bytes: int = 0
    kv_bytes: int = 0
    cache_bytes: int = 0
    prefill_tok: int = 0
    prefill_us: int = 0
    decode_tok: int = 0
    decode_us: int = 0
    decode_steps: int = 0
    waits: tuple[int, ...] = ()


SUSPECT = "suspect_request"
"""Code of the failure of a request that may have ended its loader: it is not tried again."""
CRASHED = "loader_crashed"
"""Code of a failure where the loader ended by its own doing, with this request, perhaps by chance, in its hands."""


class Failed(_Frame, frozen=True, kw_only=True, tag="failed"):
    """This request failed; ``retryable`` when another node or another attempt may succeed."""

    id: int
    code: str
    message: str
    param: str | None = None
    retryable: bool = False


class Reported(EngineCounts, frozen=True, kw_only=True, tag_field="f", tag="reported"):
    """What the engine did since the last report."""


Frame = Union[  # noqa: UP007  (a tagged union msgspec can read back)
    Generate,
    Embed,
    Cancel,
    Report,
    Relieve,
    Calibrate,
    Calibrated,
    Stop,
    Ready,
    LoadFailed,
    Accepted,
    Tokens,
    Embedded,
    Waits,
    Done,
    Failed,
    Working,
    Reported,
]
Ask = Generate | Embed
"""The requests that a model serves."""
Answer = Accepted | Tokens | Embedded | Waits | Done | Failed
"""The answer to one: Accepted, any number of Tokens (or Embedded) with Waits between them, then Done or Failed."""

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


TOGETHER_S = 0.25
"""Tokens of an answer that is read at its end are held this long to be joined with others."""


class Together:
    """Joins tokens of one answer, so that a whole answer takes a few frames and not one for each token. The joined
    pieces are still enough for another loader to continue from."""

    def __init__(self) -> None:
        self._held: list[Tokens] = []
        self._begun = False
        self._since_s = 0.0

    def put(self, answer: "Answer", now_s: float) -> tuple["Answer", ...]:
        """The frames to send now that ``answer`` has arrived, in order."""
        if not isinstance(answer, Tokens):
            return (*self._taken(), answer)
        if not self._begun:
            # the first piece is sent at once, to report that the answer began
            self._begun, self._since_s = True, now_s
            return (answer,)
        self._held.append(answer)
        if now_s - self._since_s < TOGETHER_S:
            return ()
        self._since_s = now_s
        return self._taken()

    def _taken(self) -> tuple["Answer", ...]:
        held, self._held = self._held, []
        return (joined(held),) if held else ()


def joined(pieces: "Sequence[Tokens]") -> Tokens:
    """Several pieces of one answer as one. Reasoning comes before text, as it does in an answer."""
    if len(pieces) == 1:
        return pieces[0]
    return Tokens(
        id=pieces[0].id,
        text="".join(one.text for one in pieces),
        count=sum(one.count for one in pieces),
        reasoning="".join(one.reasoning for one in pieces),
        calls=tuple(call for one in pieces for call in one.calls),
        scored=tuple(scored for one in pieces for scored in one.scored),
        ids=tuple(number for one in pieces for number in one.ids),
    )


class Decoder:
    """Frames out of a stream of bytes that may be cut anywhere."""

    def __init__(self) -> None:
        # its buffer grows where a frame needs more; by default it starts with a megabyte for each loader
        self._unpacker = msgpack.Unpacker(raw=False, read_size=BUFFER_BYTES, max_buffer_size=MAX_FRAME_BYTES)
        self._kept = bytearray()
        self._from = 0

    def feed(self, chunk: bytes) -> list[Frame]:
        """The frames that ``chunk`` completes. Raises Refused for anything that is not one of our frames."""
        self._kept += chunk
        found: list[Frame] = []
        begin = 0
        try:
            self._unpacker.feed(chunk)
            # msgpack finds where a frame ends, wherever the stream is cut; msgspec decodes it, typed and in one go
            while (end := self._next_end()) is not None:
                found.append(_decoder.decode(memoryview(self._kept)[begin:end]))
                begin = end
        except msgspec.ValidationError as error:
            raise Refused(f"frame: {error}", code="bad_frame") from None
        except (msgpack.UnpackException, ValueError, UnicodeDecodeError, RecursionError) as error:
            raise Refused(f"frame: {type(error).__name__}", code="bad_frame") from None
        del self._kept[:begin]
        self._from += begin
        return found

    def _next_end(self) -> int | None:
        """Where the next whole frame in ``_kept`` ends; None when it is not there yet."""
        try:
            self._unpacker.skip()
        except msgpack.OutOfData:
            return None
        return int(self._unpacker.tell()) - self._from
