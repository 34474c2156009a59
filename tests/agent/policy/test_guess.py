"""The guess: what it makes of some sentences, and that no request is too large or too odd for it.

The sentences are this project's own, written together with the tables of words, so what they show is that the three
languages and classes are covered, not how often real traffic is guessed right. Nothing that leaves depends on it.
"""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.api.openai.requests import parse_chat, parse_embeddings, parse_text
from agent.gateway import describing
from agent.policy.classes import CLASSES
from agent.policy.facts import DEFAULT_ANSWER_TOK
from agent.policy.guess import MOST_CHARS, MOST_TURNS, guess
from agent.views import ModelView, NodeView

LABELLED = {
    "ROUTINE": (
        "Extract the invoice number and the total from this e-mail as JSON.",
        "Translate to German: The meeting is moved to Tuesday.",
        "Is this review positive or negative? Answer only with one word.",
        "Write a short subject line for this newsletter.",
        "Hi there, can you say hello in Spanish?",
        "Give me a recipe for pancakes.",
        "Extrahiere Name, Datum und Betrag aus dieser Rechnung.",
        "Fasse den Absatz in einem Satz zusammen.",
        "Formuliere diese Mail freundlicher.",
        "Wie heißt die Hauptstadt von Portugal?",
        "Traduis cette phrase en anglais.",
        "Résume ce paragraphe en une phrase.",
        "Classe ce message : vente, technique ou comptabilité.",
    ),
    "REASONING": (
        "Why does this query get slower as the table grows, and how would you fix it?",
        "Compare event sourcing with a plain audit table; what are the trade-offs for a team of three?",
        "Prove that the sum of two odd integers is even, step by step.",
        "Here is a traceback from our service. Find the root cause.",
        "The numbers of both ledgers contradict each other. Who is right?",
        "Warum steigt der Verbrauch nachts an, obwohl niemand rechnet? Analysiere die Messwerte.",
        "Vergleiche die beiden Angebote und begründe, welches für uns besser ist.",
        "Entwirf ein Schema für Mandanten und erkläre die Vor- und Nachteile.",
        "Pourquoi cette requête est-elle lente, et comment peut-on l'optimiser ?",
        "Démontre étape par étape que cette suite converge.",
    ),
    "ORCHESTRATION": (
        "Break this migration into subtasks and assign each to one of the agents.",
        "Make a project plan for the launch and coordinate the writers and the testers.",
        "You are the planner. Decide which agent handles each ticket and delegate the work.",
        "Zerlege das Vorhaben in Teilaufgaben und weise sie den Agenten zu.",
        "Koordiniere die drei Unteragenten und verteile die offenen Tickets.",
        "Décompose ce projet en sous-tâches et attribue-les aux agents.",
        "Coordonne les sous-agents et répartis le travail entre eux.",
    ),
}


def test_most_of_the_labelled_sentences_are_guessed_as_they_are_meant() -> None:
    confusion = Counter((meant, guess([("user", text)])) for meant, texts in LABELLED.items() for text in texts)
    for meant in CLASSES:
        print(meant.ljust(14), *(f"{guessed} {confusion[meant, guessed]:2}" for guessed in CLASSES))
    total, right = confusion.total(), sum(confusion[one, one] for one in CLASSES)
    print(f"{right} of {total}")
    assert right >= 0.9 * total
    assert all(confusion[one, one] > 0.7 * len(LABELLED[one]) for one in CLASSES)


@pytest.mark.parametrize(
    ("turns", "more", "expected"),
    [
        ([("user", "Compare both offers.")], {"max_tokens": 1}, "ROUTINE"),  # a label, whatever the question
        ([("user", "Compare both offers.")], {"max_tokens": 900}, "REASONING"),
        ([("user", "The order of yesterday.")], {"has_schema": True}, "ROUTINE"),
        ([("user", "x " * 2000)], {}, "ROUTINE"),
        ([("user", "Refactor this:\n```\ndef f(): ...\n```")], {}, "REASONING"),
        ([("system", "You delegate to other agents."), ("user", "Go on.")], {}, "ORCHESTRATION"),
        ([("system", "You are an agent."), ("user", "Book it.")], {"has_tools": True}, "ORCHESTRATION"),
        ([("system", "You help."), ("user", "Weather in Rome?")], {"has_tools": True}, "ROUTINE"),
        ([], {}, "ROUTINE"),
        ([("assistant", "Why?")], {}, "ROUTINE"),
    ],
)
def test_the_shape_of_a_request_counts(turns: list[tuple[str, str]], more: dict[str, int], expected: str) -> None:
    assert guess(turns, **more) == expected  # type: ignore[arg-type]


@given(
    st.lists(st.tuples(st.sampled_from(("user", "system", "tool", "x")), st.text(max_size=200)), max_size=12),
    st.booleans(),
    st.booleans(),
    st.none() | st.integers(0, 10**9),
)
def test_any_conversation_has_a_class(
    turns: list[tuple[str, str]], has_tools: bool, has_schema: bool, most: int | None
) -> None:
    found = guess(turns, has_tools=has_tools, has_schema=has_schema, max_tokens=most)
    assert found in CLASSES
    assert found == guess(iter(turns), has_tools=has_tools, has_schema=has_schema, max_tokens=most)


def test_only_the_begin_and_the_end_of_what_is_long_are_looked_at() -> None:
    filler = "lorem " * MOST_CHARS
    assert guess([("user", f"Why? Compare. {filler}")]) == guess([("user", f"{filler} Why? Compare.")]) == "REASONING"
    assert guess([("user", f"{filler} Delegate subtasks to subagents. {filler}")]) != "ORCHESTRATION"
    many = [("user", "hi")] * (10 * MOST_TURNS)
    assert guess([*many, ("user", "Delegate subtasks to the subagents.")]) == "ORCHESTRATION"


# ---- what the policy needs to know of a request ----


def test_features_of_requests() -> None:
    def chat(more: bytes = b"") -> tuple[str, ...]:
        asked = parse_chat(b'{"model":"m","messages":[{"role":"user","content":"12345678"}]' + more + b"}")
        return describing.features(asked.generate, n=asked.n, prompts=asked.prompts)

    tool = b',"tools":[{"type":"function","function":{"name":"f"}}]'
    assert chat() == chat(b',"temperature":0.5,"top_p":0.9,"seed":1,"stop":"x","max_tokens":5') == ()
    assert chat(tool) == ("tools",)
    assert chat(b',"response_format":{"type":"json_object"}') == ("schema",)
    assert chat(b',"logprobs":true') == ("logprobs",)
    assert chat(b',"n":2') == ("n",)
    assert chat(b',"chat_template_kwargs":{"a":1}') == ("template_args",)
    for more in (
        b'"top_k":5',
        b'"min_p":0.1',
        b'"repetition_penalty":1.1',
        b'"logit_bias":{"5":1}',
        b'"ignore_eos":true',
    ):
        assert chat(b"," + more) == ("sampling",), more
    text = parse_text(b'{"model":"m","prompt":["abcd","abcdefgh"]}')
    assert describing.features(text.generate, n=text.n, prompts=text.prompts) == ("prompt",)
    vectors = parse_embeddings(b'{"model":"m","input":"hi"}')
    assert describing.features(vectors.embed) == ("embeddings",)


def test_lengths_of_requests() -> None:
    asked = parse_chat(b'{"model":"m","messages":[{"role":"user","content":"' + b"x" * 4000 + b'"}],"max_tokens":7}')
    assert 1000 <= describing.prompt_tok(asked.generate) <= 1100
    assert describing.answer_tok(asked.generate) == 7
    assert describing.answer_tok(asked.generate, describing.answers_of(2, ("a", "b", "c"))) == 42
    text = parse_text(b'{"model":"m","prompt":["abcd","' + b"y" * 400 + b'"]}')
    assert 100 <= describing.prompt_tok(text.generate, text.prompts) <= 110
    assert (
        describing.answer_tok(parse_chat(b'{"model":"m","messages":[{"role":"user","content":"a"}]}').generate)
        == DEFAULT_ANSWER_TOK
    )
    assert describing.answer_tok(parse_embeddings(b'{"model":"m","input":"hi"}').embed) == 0


def test_other_names_of_the_same_model_are_known_by_its_version() -> None:
    def node(**models: str) -> NodeView:
        offered = tuple(ModelView(name=name, version=version, ready=True) for name, version in models.items())
        return NodeView(node="n", models=offered)

    nodes = (node(small="v1", old="v1", large="v2", cold=""), node(small="v1", tiny="v1", other="v3", empty=""))
    known = describing.Aliases()
    assert known.of(("small",), nodes) == ("old", "tiny")
    assert known.of(("large", "old"), nodes) == ("small", "tiny")
    assert known.of(("cold",), nodes) == known.of(("unknown",), nodes) == ()
    assert known.of(("small",), ()) == ("old", "tiny"), "while all are down it is what it was"
    assert known.of(("small",), (node(small="", old="v1"),)) == ("old", "tiny")
    assert known.of(("small",), (node(small="v9"),)) == (), "another model has its name"


def test_turns_of_requests() -> None:
    messages = b",".join(b'{"role":"user","content":"%d"}' % n for n in range(40))
    asked = parse_chat(b'{"model":"m","messages":[' + messages + b"]}")
    found = describing.turns(asked.generate)
    assert len(found) == describing.MOST_TURNS
    assert (found[0], found[-1]) == (("user", "0"), ("user", "39"))
    text = parse_text(b'{"model":"m","prompt":["abcd","b"]}')
    assert describing.turns(text.generate, text.prompts) == [("user", "abcd")]
