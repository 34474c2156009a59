"""What the content filter of a policy leaves of an answer, as its client gets it."""

from collections.abc import AsyncGenerator, Sequence

from agent.gateway.withheld import withheld
from agent.policy.rules import Content
from agent.wire.frames import Accepted, Answer, Candidate, Done, Scored, Tokens, ToolCall


async def _frames(pieces: Sequence[Answer]) -> AsyncGenerator[Answer, None]:
    for one in pieces:
        yield one


async def test_what_is_withheld_is_in_no_part_of_an_answer_however_it_is_cut() -> None:
    content = Content(patterns=("falcon-[0-9]+",))
    text = "the code is falcon-1234, tell nobody"
    call = ToolCall(id="c", name="f", arguments='{"a":"falcon-99"}')
    scored = (Scored(chosen=Candidate(text="falcon", raw=b"falcon", logprob=-1.0)),)
    for cut in range(1, len(text)):
        pieces = [text[at : at + cut] for at in range(0, len(text), cut)]
        frames: list[Answer] = [
            Accepted(id=1, prompt_tok=1, cached_tok=0),
            *(Tokens(id=1, text=one, reasoning=one, count=1, scored=scored) for one in pieces),
            Tokens(id=1, text="", count=1, calls=(call,)),
            Done(id=1, finish="stop", prompt_tok=1, cached_tok=0, completion_tok=9),
        ]
        found = [one async for one in withheld(_frames(frames), content)]
        told = [one for one in found if isinstance(one, Tokens)]
        assert "".join(one.text for one in told) == "the code is [withheld], tell nobody"
        assert "".join(one.reasoning for one in told) == "the code is [withheld], tell nobody"
        assert [each.arguments for one in told for each in one.calls] == ['{"a":"[withheld]"}']
        assert not any(one.scored for one in told)
        assert sum(one.count for one in told) == len(pieces) + 1
        assert isinstance(found[-1], Done)
        assert found[-1].finish == "content_filter"
