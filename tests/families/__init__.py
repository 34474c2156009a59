"""Model families: the shapes that real ones have, as templates and samples of our own.

A folder holds ``chat_template.jinja`` (none for a model without) and ``family.toml``: ``ends`` are the tokens that end
an answer, ``special`` and ``normal`` the added tokens by their flag, ``writes`` is what such a model writes. A folder
with a real ``tokenizer_config.json`` works as well; what that model writes then stands in ``expect.json``, if known.
"""

import json
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import llguidance.hf
import mlx.core as mx
import msgspec
from llguidance import LLMatcher, LLTokenizer
from mlx_lm import tokenizer_utils
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from agent.loader.chat.grammar import Plan
from agent.loader.chat.probe import Conversation, probed
from agent.loader.chat.speech import Said, Speech
from agent.loader.mlx.constraint import Constraint
from agent.loader.mlx.plan import Planned, Planner
from agent.loader.mlx.prompt import Prompt, PromptWriter
from agent.loader.mlx.template import ChatTemplate
from agent.wire.frames import Failed, Generate

FOLDER = Path(__file__).parent
NAMES = tuple(sorted(path.parent.name for path in FOLDER.glob("*/family.toml")))
"""The committed families."""


@cache
def known(name: str) -> "Family":
    """A committed family, loaded once."""
    return Family(FOLDER / name)


class Wrong(Exception):
    """Something that a model of the family would suffer from."""


class Masked(Wrong):
    """A token that the constraint does not allow."""


class Writes(msgspec.Struct, frozen=True, kw_only=True):
    """What a model writes behind its prompt, without the token that ends it: a call of ``get_weather`` for Paris, two
    for Paris and London, an answer "A" after the reasoning "R". ``vars`` and ``reasoning_vars`` are the template's
    variables for which it does so. None: it does not, or nobody knows."""

    call: str | None = None
    two_calls: str | None = None
    reasoning: str | None = None
    call_with_reasoning: str | None = None
    plain: str = "Hello"
    plain_text: str = "Hello"
    vars: dict[str, Any] = {}
    reasoning_vars: dict[str, Any] = {}


class _Facts(NamedTuple):
    """What is known of a tokenizer: added tokens and whether each is flagged special."""

    added: dict[str, bool]
    ends: tuple[str, ...]
    bos: str
    writes: Writes
    about: str = ""


class Family:
    """A family as a loaded model has it, but for the weights."""

    def __init__(self, folder: Path) -> None:
        self.name, facts = folder.name, _facts(folder)
        self.writes, self.about = facts.writes, facts.about
        self.tokenizer: Any = _tokenizer(folder, facts)
        self.ends: list[int] = sorted(self.tokenizer.eos_token_ids)
        self.template = ChatTemplate(self.tokenizer)
        exists = self.template.exists
        self.use(probed(self.template.render, self.template.traits(self.ends)) if exists else Conversation())

    def use(self, talk: Conversation) -> None:
        """Converse in this way."""
        self.talk = talk
        self.template.keep((*(talk.reasoning or ()), talk.form.marker, talk.form.stop))
        self.prompts = PromptWriter(self.template, talk)
        self.planner = Planner(talk, self.template, self.ends, lambda: self.grammars)

    @cached_property
    def grammars(self) -> LLTokenizer:
        """llguidance's view of the tokenizer."""
        return llguidance.hf.from_tokenizer(self.tokenizer._tokenizer, eos_token=self.ends)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, control tokens included."""
        return bytes(self.grammars.decode_bytes(list(tokens))).decode(errors="ignore")

    def answer(self, request: Generate, prompt: Prompt, text: str) -> Said:
        """What a client gets when the model answers a prompt with a text. Raises Wrong, or Masked for a token that the
        constraint forbids."""
        planned = self.planned(request, prompt)
        constraint = self._constraint(planned, prompt)
        speech = Speech(planned.markers, request.tools, reasoning=prompt.inside)
        detokenizer, made, said = self.tokenizer.detokenizer, list[int](), Said()
        for token in self._until_end(text):
            self._demand(constraint, made, [token])
            made.append(token)
            detokenizer.add_token(token)
            said += speech.feed(detokenizer.last_segment)
        self._demand(constraint, made, self.ends)
        detokenizer.finalize()
        return said + speech.feed(detokenizer.last_segment) + speech.finish()

    def planned(self, request: Generate, prompt: Prompt) -> Planned:
        """The plan of a request. Raises Wrong."""
        planned = self.planner.planned(request, prompt.form)
        if isinstance(planned, Failed):
            raise Wrong(f"no plan: {planned.message}")
        return planned

    def _until_end(self, text: str) -> Iterator[int]:
        for token in self.template.tokens(text):
            if token in self.ends:
                return
            yield token

    def _constraint(self, planned: Planned, prompt: Prompt) -> Constraint | None:
        plan: Plan = planned.plan
        if plan.whole is None and plan.announced is None:
            return None
        thought = planned.markers.reasoning
        return Constraint(plan, 0, self.ends, self._matcher, self.text, thought, inside=prompt.inside)

    def _matcher(self, grammar: str) -> LLMatcher:
        return LLMatcher(self.grammars, grammar, log_level=0)

    def _demand(self, constraint: Constraint | None, made: list[int], wanted: Sequence[int]) -> None:
        """Raises Masked unless one of the wanted tokens is allowed next."""
        if constraint is None:
            return
        logits = constraint(mx.array(made, dtype=mx.int32), mx.zeros((1, self.grammars.vocab_size)))
        if bool(mx.all(mx.isinf(logits[0, mx.array(list(wanted))]))):
            raise Masked(f"masked: {self.text(wanted[:1])!r} after {self.text(made)[-60:]!r}")


def _facts(folder: Path) -> _Facts:
    if (path := folder / "family.toml").exists():
        found = tomllib.loads(path.read_text(encoding="utf-8"))
        added = dict.fromkeys(found["special"], True) | dict.fromkeys(found["normal"], False)
        writes = msgspec.convert(found["writes"], Writes)
        return _Facts(added, tuple(found["ends"]), found.get("bos", ""), writes, found["about"])
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    expected = json.loads(path.read_text(encoding="utf-8")) if (path := folder / "expect.json").exists() else {}
    known = (_content(settings.get(key)) for key in ("bos_token", "eos_token", "unk_token"))
    added = {word: True for word in known if word}
    added |= {one["content"]: one.get("special", True) for one in settings.get("added_tokens_decoder", {}).values()}
    stated = [str(expected.get(key) or "") for key in ("ends_with", "ends_with_call")]
    ends = [
        _content(settings.get("eos_token")) or "<|endoftext|>",
        *(word for word in stated if word[:1] in ("<", "[")),
    ]
    writes = msgspec.convert({key: held for key, held in expected.items() if held is not None}, Writes)
    return _Facts(added, tuple(dict.fromkeys(ends)), _content(settings.get("bos_token")), writes)


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token or "")


def _tokenizer(folder: Path, facts: _Facts) -> Any:
    """A tokenizer with a token for each byte and the family's added tokens, as mlx-lm loads it."""
    made = Tokenizer(models.BPE(vocab={one: n for n, one in enumerate(sorted(_ALPHABET))}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    for word, special in {**facts.added, **{end: facts.added.get(end, True) for end in facts.ends}}.items():
        token = AddedToken(word, special=special, normalized=False)
        (made.add_special_tokens if special else made.add_tokens)([token])
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {"eos_token": facts.ends[0]} | ({"bos_token": facts.bos} if facts.bos else {})
    named = {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("additional_chat_templates/*.jinja")}
    if (template := folder / "chat_template.jinja").exists():
        default = template.read_text(encoding="utf-8")
        every = [{"name": name, "template": text} for name, text in {"default": default, **named}.items()]
        settings["chat_template"] = every if named else default
    with tempfile.TemporaryDirectory() as kept:
        made.save(f"{kept}/tokenizer.json")
        Path(kept, "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return tokenizer_utils.load(Path(kept), eos_token_ids=[made.token_to_id(word) for word in facts.ends])


_ALPHABET = pre_tokenizers.ByteLevel.alphabet()
