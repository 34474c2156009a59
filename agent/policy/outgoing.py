"""A chat request as another place gets it: only what is listed here can leave, so nothing leaves by being overlooked.
Pure data."""

import msgspec


class Called(msgspec.Struct, frozen=True, kw_only=True):
    """A function call of an earlier turn, or of an answer; ``arguments`` is JSON text."""

    id: str
    name: str
    arguments: str


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One turn: ``role`` is system, user, assistant or tool. In a tool's turn ``call_id`` names the call it answers."""

    role: str
    content: str
    calls: tuple[Called, ...] = ()
    call_id: str = ""


class Outgoing(msgspec.Struct, frozen=True, kw_only=True):
    """``tools`` are function descriptions as JSON text; ``must_call`` is the name of the one to call, "" for any, None
    when the model decides; ``one_call``: no parallel calls. ``schema`` is a JSON schema, as text, that the answer must
    follow. None and the neutral values are not sent."""

    model: str
    turns: tuple[Turn, ...]
    tools: tuple[str, ...] = ()
    must_call: str | None = None
    one_call: bool = False
    schema: str | None = None
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    reasoning_effort: str | None = None


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """The next piece of an answer from another place; ``calls`` are complete."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[Called, ...] = ()


class End(msgspec.Struct, frozen=True, kw_only=True):
    """The answer is complete: ``finish`` is stop, length, tool_calls or content_filter. Tokens are the place's own
    count, None where it gave none."""

    finish: str
    prompt_tok: int | None = None
    completion_tok: int | None = None
    cached_tok: int = 0
    reasoning_tok: int = 0
