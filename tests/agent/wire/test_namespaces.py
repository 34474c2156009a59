"""A namespace of the prompt cache belongs to one key, or to one group."""

from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.config import Key, cache_group
from agent.gateway.call import Call
from agent.models.warmup import answer_of
from agent.process.loader_process import LoaderProcess
from agent.wire.frames import Ask, Done, Embed, Generate
from agent.wire.namespaces import OPEN, PROBES, Namespace, namespace_of

names = st.text(alphabet=":ab-key grouprobs\0", max_size=12)


@pytest.mark.parametrize(
    ("key_id", "group", "expected"),
    [
        ("", "", OPEN),
        ("shop", "", "key:shop"),
        ("shop", "team", "group:team"),
        ("shop", "shop", "group:shop"),
        ("probes", "", "key:probes"),
    ],
)
def test_a_namespace_names_a_key_or_a_group(key_id: str, group: str, expected: str) -> None:
    assert namespace_of(key_id, group) == expected


@given(names, names, names.filter(bool), names.filter(bool))
def test_two_keys_share_a_namespace_only_in_one_group(a_group: str, b_group: str, a: str, b: str) -> None:
    """Whatever they are called: a group named like a key is not that key's namespace."""
    shared = a_group == b_group if a_group or b_group else a == b
    assert (namespace_of(a, a_group) == namespace_of(b, b_group)) == shared
    assert not {namespace_of(a, a_group), namespace_of(b, b_group)} & {OPEN, PROBES}


def test_a_key_has_the_group_of_its_entry() -> None:
    keys = (Key(id="a", sha256=""), Key(id="b", sha256="", cache_group="team"), Key(id="team", sha256=""))
    found = {key_id: namespace_of(key_id, cache_group(keys, key_id)) for key_id in ("", "a", "b", "team")}
    assert found == {"": OPEN, "a": Namespace("key:a"), "b": Namespace("group:team"), "team": Namespace("key:team")}


async def test_the_questions_for_a_standby_have_a_namespace_of_their_own() -> None:
    """Nobody finds out which questions an operator has recorded."""
    asked: list[Ask] = []

    class Standby:
        ready: Any = None

        async def generate(self, ask: Ask) -> AsyncIterator[Done]:
            asked.append(ask)
            yield Done(id=1, finish="stop", prompt_tok=1, cached_tok=0, completion_tok=1)

    await answer_of(cast(LoaderProcess, Standby()), "What is the capital of France?", 4)
    assert [one.cache for one in asked if isinstance(one, Generate)] == [PROBES]


@pytest.mark.parametrize("ask", [Generate(id=0, model="m", max_tokens=1), Embed(id=0, model="m", inputs=("x",))])
def test_every_frame_of_a_call_carries_its_namespace(ask: Ask) -> None:
    """Continued and repeated ones, too; a call cannot be made without one."""
    call = Call(ask=ask, request_id="r", cache=namespace_of("shop"))
    frames = [call.frame("n1")]
    call.continuing, call.made = True, [1, 2]
    frames.append(call.frame("n1"))
    call.start_over()
    frames.append(call.frame("n1"))
    assert {frame.cache for frame in frames} == {namespace_of("shop")}
    with pytest.raises(TypeError, match="cache"):
        Call(ask=ask, request_id="r")  # type: ignore[call-arg]
