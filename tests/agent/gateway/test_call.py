"""What an answer tells of itself when attempts at it were lost: the whole request, not the last attempt."""

from typing import Any

import msgspec

from agent.gateway.call import Call
from agent.wire.frames import Accepted, Answer, Done, Embed, Generate, Tokens, decode, encode
from agent.wire.namespaces import namespace_of


def call() -> Call:
    return Call(
        ask=Generate(id=1, model="m", max_tokens=9), request_id="req_1", key_id="alice", cache=namespace_of("alice")
    )


def accepted(cached_tok: int) -> Accepted:
    return Accepted(id=1, prompt_tok=1000, cached_tok=cached_tok, version="v", node="n")


def done(cached_tok: int, **more: int) -> Done:
    times: dict[str, Any] = {"queue_us": 5, "prefill_us": 7_000_000, "decode_us": 3_000_000, "completion_tok": 4} | more
    return Done(id=1, finish="stop", prompt_tok=1000, cached_tok=cached_tok, **times)


def attempt(one: Call, *answers: tuple[float, Answer]) -> None:
    for at_s, answer in answers:
        if isinstance(answer, Accepted):
            one.taken(answer, at_s)
            if one.continuing:
                continue
        elif isinstance(answer, Done):
            answer = one.told(answer)
        one.note(answer, at_s)


def token() -> Tokens:
    return Tokens(id=1, text="x", count=1, ids=(1,))


def test_every_attempt_at_a_private_request_is_private() -> None:
    generate = call()
    generate.ask = msgspec.structs.replace(generate.ask, private=True)
    vectors = Call(ask=Embed(id=1, model="m", inputs=("x",), private=True), request_id="r", cache=namespace_of("alice"))
    attempt(generate, (1.0, accepted(0)), (2.0, token()))
    for continuing in (False, True):
        generate.continuing = continuing
        for one in (generate, vectors):
            assert decode(encode(one.frame("n1"))).private  # type: ignore[union-attr]
    generate.start_over()
    assert generate.frame("n1").private
    assert not call().frame("n1").private


def test_an_undisturbed_answer_is_told_as_the_engine_measured_it() -> None:
    one = call()
    attempt(one, (1.0, accepted(64)), (9.0, token()), (12.0, done(80)))
    assert (one.done, one.cached_tok) == (done(80), 80)


def test_a_retried_answer_tells_what_was_cached_before_the_request_and_all_of_its_time() -> None:
    one = call()
    attempt(one, (1.0, accepted(64)))
    one.lose(21.0)
    one.start_over()
    attempt(one, (22.0, accepted(900)), (29.0, token()), (32.0, done(900)))
    assert one.cached_tok == 64, "the rest it had put there itself"
    assert one.done == done(64, prefill_us=27_000_000)


def test_a_continued_answer_tells_the_time_of_both_its_parts() -> None:
    one = call()
    attempt(one, (1.0, accepted(64)), (5.0, token()), (8.0, token()))
    one.lose(30.0)
    one.continuing = True
    attempt(one, (31.0, accepted(1002)), (33.0, token()), (36.0, done(1002, completion_tok=7)))
    assert (one.cached_tok, one.completion_tok) == (64, 7)
    assert one.done == done(64, prefill_us=11_000_000, decode_us=6_000_000, completion_tok=7)


def test_an_attempt_that_no_worker_took_changes_nothing() -> None:
    one = call()
    one.lose(3.0)
    one.start_over()
    attempt(one, (4.0, accepted(64)), (5.0, token()), (6.0, done(80)))
    assert one.done == done(80)


def test_a_crash_after_which_the_answer_went_on_was_by_chance() -> None:
    one = call()
    one.crashes = 1
    one.note(accepted(0), 1.0)
    assert one.crashes == 1, "accepted is not answered"
    one.note(Tokens(id=1, text="a", count=1, ids=(5,)), 2.0)
    assert one.crashes == 0
