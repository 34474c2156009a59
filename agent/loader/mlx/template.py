"""A model's chat template and tokenizer: conversations to token ids, in which no text of a user is a control token."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from llguidance import LLTokenizer
from tokenizers import AddedToken, Tokenizer

from agent.loader.chat import probe
from agent.loader.chat.calls import CallParser
from agent.loader.chat.grammar import literal
from agent.loader.chat.turns import Turn
from agent.loader.mlx import sandbox
from agent.loader.mlx.parsers import PARSERS

sandbox.install()
_BREAKS = tuple(chr(point) for point in range(0xF8A0, 0xF8B0))
"""Characters of a private area; one that a conversation does not contain breaks its control words."""
_OURS = {"role": frozenset({"system", "user", "assistant", "tool"}), "type": frozenset({"function"})}
"""Keys and values that are words of ours; clients name properties and arguments like these keys, too."""
_THINKING = re.compile(r"\b[A-Za-z_]*(?:think|reason|effort)[A-Za-z_]*\b")


class ChatTemplate:
    """The template of one tokenizer, which is mlx-lm's wrapper. Used by one thread at a time."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        held = getattr(tokenizer, "chat_template", None)
        self.source = "\n".join(map(str, held.values())) if isinstance(held, dict) else str(held or "")
        self._named: dict[str, str] = held if isinstance(held, dict) else {}
        self.exists = bool(getattr(tokenizer, "has_chat_template", False) or self.source)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.added = {str(token): int(number) for number, token in added.items() if str(token).strip()}
        self._special = {str(token) for token in added.values() if token.special}
        self._control: re.Pattern[str] | None = None
        self._breaking: Tokenizer | None = None

    def traits(self, ends: Sequence[int]) -> probe.Traits:
        """What the probe has to know."""
        tokenizer = self._tokenizer
        known: tuple[tuple[str, str, CallParser], ...] = PARSERS
        if tokenizer.tool_parser is not None:
            known = ((tokenizer.tool_call_start, tokenizer.tool_call_end or "", tokenizer.tool_parser), *known)
        return probe.Traits(
            tokens=frozenset(self.added),
            ends=tuple(text for text, number in self.added.items() if number in ends),
            variables=frozenset(_THINKING.findall(self.source)),
            source=self.source,
            parsers=known,
            structure=tuple(tokenizer.structural_markers),
            thinking=(tokenizer.think_start, tokenizer.think_end) if tokenizer.has_thinking else None,
        )

    def render(
        self, turns: Sequence[Turn], tools: Sequence[Turn] | None, variables: Mapping[str, Any], *, begin_answer: bool
    ) -> str:
        """A conversation as text. Raises whatever the template raises."""
        given = dict(variables)
        if tools:
            given["tools"] = list(tools)
        elif "tool_use" in self._named and any(turn.get("tool_calls") for turn in turns):
            given["chat_template"] = self._named["tool_use"]
        every = {"add_generation_prompt": begin_answer, "tokenize": False}
        try:
            rendered = self._tokenizer.apply_chat_template(list(turns), **every, **given)
        except Exception:
            if "tools" in given:
                raise
            # some take no tools as an empty list alone
            rendered = self._tokenizer.apply_chat_template(list(turns), **every, **given, tools=[])
        if not isinstance(rendered, str):
            raise TypeError("the template rendered no text")
        return rendered

    def keep(self, markers: Sequence[str]) -> None:
        """Set the markers that are control words beside the special tokens and the template's own."""
        words = {w for w in self.added if w in self._special or w in self.source or w in markers}
        # a word of one character cannot be broken
        pattern = any_of([word for word in words if len(word) > 1])
        self._control = re.compile(pattern) if pattern else None

    def tokens(self, text: str) -> list[int]:
        """Token ids of a rendered text, control words included."""
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False)]

    def shield(self, tree: Any) -> tuple[Any, str]:
        """The same turns, tools and variables with every control word in them broken by a character, and that
        character; it is "" where there is nothing to break. Raises ValueError for texts with every such character."""
        if self._control is None or not any(self._control.search(text) for text in _texts(tree)):
            return tree, ""
        whole = "".join(_texts(tree))
        mark = next((one for one in _BREAKS if one not in whole), None)
        if mark is None:
            raise ValueError("the texts contain too many characters of a private area")
        pattern = self._control
        return _mapped(tree, lambda text: pattern.sub(lambda found: found[0][0] + mark + found[0][1:], text)), mark

    def shielded_tokens(self, text: str, mark: str) -> list[int]:
        """Token ids of a rendered text in which ``mark`` breaks the control words of users."""
        if not mark:
            return self.tokens(text)
        inner = getattr(self._tokenizer, "_tokenizer", self._tokenizer)
        if (backend := getattr(inner, "backend_tokenizer", None)) is None:
            return [number for piece in text.split(mark) for number in self.tokens(piece)]
        if self._breaking is None:
            # the breaks are tokens of a copy: the texts around them are tokenized as around any other token
            self._breaking = Tokenizer.from_str(backend.to_str())
            self._breaking.no_truncation()
            self._breaking.no_padding()
            self._breaking.add_special_tokens([AddedToken(one, normalized=False, special=True) for one in _BREAKS])
        # those of the breaks that users write are text
        ours = {self._breaking.token_to_id(one): [] if one == mark else self.tokens(one) for one in _BREAKS}
        ids = self._breaking.encode(text, add_special_tokens=False).ids
        return [number for one in ids for number in ours.get(one, (one,))]

    def speller(self, grammars: LLTokenizer, ends: Sequence[int]) -> Callable[[str], str]:
        """A function that spells literals as Lark: what llguidance takes as a token is written as one, whatever the
        tokenizer's flags say. Tokens that end the answer are left out: a complete grammar allows them anyway."""
        special = {word: number for word, number in self.added.items() if grammars.is_special_token(number)}
        pattern = "|".join(re.escape(word) for word in sorted(special, key=len, reverse=True))

        def spell(text: str) -> str:
            pieces = re.split(f"({pattern})", text) if pattern else [text]
            shown = [piece for piece in pieces if piece and special.get(piece) not in ends]
            return " ".join(f"<[{special[piece]}]>" if piece in special else literal(piece) for piece in shown)

        return spell


def any_of(words: Iterable[str]) -> str:
    """A regular expression for the longest of several words, "" for none: a tree of their beginnings, because some
    tokenizers have thousands of words that begin alike, and a list of them would be tried one by one."""
    after: dict[str, list[str]] = {}
    for word in words:
        after.setdefault(word[:1], []).append(word[1:])
    ends = after.pop("", None) is not None
    branches = [re.escape(first) + any_of(rest) for first, rest in after.items()]
    if len(branches) == 1 and not ends:
        return branches[0]
    return f"(?:{'|'.join(branches)}){'?' if ends else ''}" if branches else ""


def _texts(tree: Any) -> list[str]:
    """Every text in turns or tools, keys included."""
    if isinstance(tree, str):
        return [tree]
    if isinstance(tree, Mapping):
        return [text for pair in tree.items() for one in pair for text in _texts(one)]
    if isinstance(tree, Sequence):
        return [text for one in tree for text in _texts(one)]
    return []


def _mapped(tree: Any, change: Any) -> Any:
    if isinstance(tree, str):
        return change(tree)
    if isinstance(tree, Mapping):
        return {change(key): value if _is_ours(key, value) else _mapped(value, change) for key, value in tree.items()}
    if isinstance(tree, Sequence):
        return [_mapped(one, change) for one in tree]
    return tree


def _is_ours(key: str, value: Any) -> bool:
    return isinstance(value, str) and value in _OURS.get(key, ())
