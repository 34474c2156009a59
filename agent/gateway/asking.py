"""What the wall needs of a request beside what the policy does: its texts, their size, and the form in which it could
leave. Pure."""

from collections.abc import Iterator, Sequence

from agent.policy.outgoing import Called, Outgoing, Turn
from agent.wire.frames import Embed, Generate, Message
from shared.errors import Refused


def texts_of(ask: Generate | Embed, prompts: Sequence[str] = ()) -> Iterator[str]:
    """Every text of a request that its client wrote; ``prompts`` are those of a text completion."""
    yield from prompts
    if isinstance(ask, Embed):
        yield from (one for one in ask.inputs if isinstance(one, str))
        return
    for message in ask.messages:
        yield from (message.content, message.reasoning)
        for call in message.calls:
            yield from (call.name, call.arguments)
    yield from ask.tools
    yield from ask.stop
    yield from (text for text in (ask.prompt, ask.schema, ask.template_args) if text)


def prompt_bytes(ask: Generate | Embed, prompts: Sequence[str] = ()) -> int:
    """The size of what is computed before an answer; a bound of its tokens, of which each takes a byte at least."""
    if isinstance(ask, Embed):
        return sum(
            len(one.encode("utf-8", "surrogatepass")) if isinstance(one, str) else len(one) for one in ask.inputs
        )
    return sum(
        len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass")) for text in texts_of(ask, prompts)
    )


def outgoing_of(ask: Generate | Embed, model: str) -> Outgoing:
    """A chat as another place gets it, with that place's ``model``. Reasoning of earlier turns stays here. Raises
    Refused for any other request."""
    if not isinstance(ask, Generate) or ask.prompt is not None or not ask.messages:
        raise Refused("only conversations can be answered elsewhere", code="not_redactable")
    return Outgoing(
        model=model,
        turns=tuple(_turn(message) for message in ask.messages),
        tools=ask.tools,
        must_call=ask.must_call,
        one_call=ask.one_call,
        schema=ask.schema,
        max_tokens=ask.max_tokens,
        temperature=ask.temperature,
        top_p=ask.top_p,
        stop=ask.stop,
        frequency_penalty=ask.frequency_penalty,
        presence_penalty=ask.presence_penalty,
        reasoning_effort=ask.reasoning_effort,
    )


def _turn(message: Message) -> Turn:
    calls = tuple(Called(id=call.id, name=call.name, arguments=call.arguments) for call in message.calls)
    return Turn(role=message.role, content=message.content, calls=calls, call_id=message.call_id)
