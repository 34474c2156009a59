"""Declaring a class: by header, body and model name; what contradicts itself or is misspelt is refused."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.api.openai.requests import parse_chat, parse_embeddings, parse_text
from agent.policy.classes import CLASSES, NOTHING, SENSITIVE, Declared, both, declared, in_metadata, of_model, written
from agent.policy.classing import Stated, class_of
from agent.policy.rules import DEFAULT, KeyPolicy, ModelPolicy, Rules
from shared.errors import Refused


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], NOTHING),
        (["ROUTINE"], Declared("ROUTINE")),
        (["routine , Sensitive"], Declared("ROUTINE", True)),
        (["SENSITIVE"], Declared(None, True)),
        (["REASONING", "SENSITIVE"], Declared("REASONING", True)),  # a header that is sent twice
        (["ROUTINE,ROUTINE,"], Declared("ROUTINE")),
    ],
)
def test_a_declaration_is_read(values: list[str], expected: Declared) -> None:
    assert declared(values, "X-Task-Class") == expected


@pytest.mark.parametrize(
    "values",
    [
        ["SENSITVE"],
        ["ROUTINE, SENSITIVE!"],
        [""],
        [","],
        ["ROUTINE REASONING"],
        ["ROUTINE", "REASONING"],
        ["SENSITIVE;"],
    ],
)
def test_what_names_no_class_is_refused_and_not_quoted(values: list[str]) -> None:
    with pytest.raises(Refused) as caught:
        declared(values, "X-Task-Class")
    assert (caught.value.code, caught.value.param) == ("invalid_value", "X-Task-Class")
    assert "SENSITVE" not in caught.value.message


@given(st.lists(st.text(max_size=20), max_size=3))
def test_no_text_with_the_word_sensitive_is_read_without_it(values: list[str]) -> None:
    words = [*values, "sensitive"]
    with contextlib.suppress(Refused):
        assert declared(words, "h").sensitive


@pytest.mark.parametrize("metadata", [None, {}, "text", 5, ["task_class"], {"user": "x"}, {"task_class": None}])
def test_metadata_without_a_class_declares_nothing(metadata: Any) -> None:
    assert in_metadata(metadata) == NOTHING


@pytest.mark.parametrize(
    "metadata",
    [
        *({"task_class": value} for value in ("", "fast", 5, True, ["ROUTINE"], {"class": "ROUTINE"})),
        *(
            {key: SENSITIVE}
            for key in ("taskClass", "task-class", "Task_Class", "TASK CLASS", " task_class", "taskclass")
        ),
    ],
)
def test_a_class_in_metadata_that_cannot_be_read_is_refused(metadata: dict[str, Any]) -> None:
    with pytest.raises(Refused) as caught:
        in_metadata(metadata)
    assert caught.value.param == "metadata.task_class"


CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
APIS: list[tuple[Any, dict[str, Any]]] = [
    (parse_chat, CHAT),
    (parse_text, {"model": "m", "prompt": "hi"}),
    (parse_embeddings, {"model": "m", "input": "hi"}),
]


@pytest.mark.parametrize(("parse", "body"), APIS)
def test_every_api_reads_the_class_in_its_body(parse: Any, body: dict[str, Any]) -> None:
    def read(**more: Any) -> Any:
        return parse(json.dumps({**body, **more}).encode())

    assert read().declared == read(metadata={"trace": "1"}).declared == NOTHING
    assert read(metadata={"task_class": "reasoning, sensitive"}).declared == Declared("REASONING", True)
    assert read(metadata={"task_class": "ROUTINE"}).ignored == ()
    with pytest.raises(Refused):
        read(metadata={"task_class": 1})


def test_two_declarations_agree_or_are_refused() -> None:
    assert both(Declared("ROUTINE"), Declared(None, True), "x") == Declared("ROUTINE", True)
    assert both(Declared("ROUTINE"), Declared("ROUTINE"), "x") == Declared("ROUTINE")
    with pytest.raises(Refused):
        both(Declared("ROUTINE"), Declared("REASONING"), "x")


def test_a_model_name_may_state_the_class() -> None:
    assert [of_model(one) for one in ("m", "auto", "class:routine", "CLASS: Reasoning")] == [
        *(None, None, "ROUTINE", "REASONING")
    ]
    assert [written(one) for one in ("AUTO", "Class: ROUTINE", "class:x")] == ["auto", "class:routine", "class:x"]
    for wrong in ("class:", "class:fast", "class:sensitive", "class:routine,reasoning"):
        with pytest.raises(Refused):
            of_model(wrong)


def unasked() -> Any:
    raise AssertionError("a guess was asked although a class was named")


POLICY = Rules(
    keys=(KeyPolicy(id="k", task_class="ORCHESTRATION"), KeyPolicy(id="low", classes=("ROUTINE", "ORCHESTRATION"))),
    models=(ModelPolicy(name="big", task_class="REASONING"),),
)


@pytest.mark.parametrize(
    ("header", "body", "model", "key", "expected"),
    [
        ("ROUTINE", None, "big", "k", ("ROUTINE", "header")),
        (None, "ROUTINE", "big", "k", ("ROUTINE", "body")),
        ("ROUTINE", "ROUTINE", "class:routine", "k", ("ROUTINE", "header")),
        (None, None, "class:routine", "k", ("ROUTINE", "model")),
        (None, None, "big", "k", ("REASONING", "model")),
        (None, None, "m", "k", ("ORCHESTRATION", "key")),
    ],
)
def test_the_first_that_names_a_class_counts(
    header: Any, body: Any, model: str, key: str, expected: tuple[str, str]
) -> None:
    found = class_of(Declared(header), Declared(body), model, key, POLICY, unasked)
    assert (found.task_class, found.class_from, found.sensitive) == (*expected, False)


@pytest.mark.parametrize("where", [0, 1])
def test_sensitive_counts_wherever_it_is_said(where: int) -> None:
    header, body = Declared("ROUTINE", where == 0), Declared(None, where == 1)
    assert class_of(header, body, "m", "k", POLICY, unasked).sensitive
    unnamed = Declared(None, where == 0), Declared(None, where == 1)
    guessed = class_of(unnamed[0], unnamed[1], "m", "x", DEFAULT, lambda: "ROUTINE")
    assert (guessed.class_from, guessed.sensitive) == ("guess", True)


@pytest.mark.parametrize(
    ("header", "body", "model"),
    [("ROUTINE", "REASONING", "m"), ("ROUTINE", None, "class:reasoning"), (None, None, "class:x")],
)
def test_contradictions_are_refused(header: Any, body: Any, model: str) -> None:
    with pytest.raises(Refused):
        class_of(Declared(header), Declared(body), model, "k", POLICY, unasked)


@pytest.mark.parametrize("guess", CLASSES)
def test_a_guess_refuses_nobody(guess: Any) -> None:
    """It becomes one that the key may use: the highest up to it, else the lowest above."""
    assert class_of(NOTHING, NOTHING, "m", "x", DEFAULT, lambda: guess) == Stated(task_class=guess, class_from="guess")
    nearest = {"ROUTINE": "ROUTINE", "REASONING": "ROUTINE", "ORCHESTRATION": "ORCHESTRATION"}
    assert class_of(NOTHING, NOTHING, "m", "low", POLICY, lambda: guess).task_class == nearest[guess]
    high = Rules(keys=(KeyPolicy(id="h", classes=("ORCHESTRATION", "REASONING")),))
    assert class_of(NOTHING, NOTHING, "m", "h", high, lambda: "ROUTINE").task_class == "REASONING"
