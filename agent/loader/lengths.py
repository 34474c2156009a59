"""Whether a text has more tokens than fit, found out at the cost of what fits and not of the text. Pure.

A tokenizer need not give a text the tokens of its parts: merges cross a cut, and normalizers join what they find. So
parts only ever refuse, with a wide margin, and what is not refused is tokenized whole: a prompt that fits has exactly
the tokens that it always had.
"""

from collections.abc import Callable, Iterable, Iterator

from agent.loader.generation import Advance, nothing

PLAIN_CHARS = 8
"""Texts of up to this many characters for each token that fits are tokenized whole at once: that costs little, and
most that are longer do not fit."""
PART_CHARS = 8192
MARGIN = 1.25
"""How far beyond the limit the parts of a text must be before it is refused."""
CUT_TOK = 128
"""Tokens that a cut may add to a part: some tokenizers give any word of over 100 characters one token, and each
character of a shorter rest its own."""


def exceeds(
    texts: Iterable[str],
    limit_tok: int,
    count: Callable[[str], int],
    advance: Advance = nothing,
    *,
    known_chars: int = 0,
) -> int:
    """At least how many tokens ``texts`` have together where they surely exceed ``limit_tok``, as far as they were
    read; 0 where they may fit. ``count`` counts the tokens of a part, without those that begin or end a prompt.
    ``advance`` is called before each part. Of the texts ``known_chars`` were found to fit before."""
    held = [text for text in texts if text]
    if sum(map(len, held)) - known_chars <= PLAIN_CHARS * limit_tok:
        return 0
    found = 0
    for part in (part for text in held for part in _parts(text)):
        advance()
        found += max(0, count(part) - CUT_TOK)
        if found > MARGIN * limit_tok:
            return found
    return 0


def _parts(text: str) -> Iterator[str]:
    """A text in parts, cut between words where there are any."""
    begin = 0
    while begin < len(text):
        end = begin + PART_CHARS
        if end < len(text):
            between = max(text.rfind(" ", begin + PART_CHARS // 2, end), text.rfind("\n", begin + PART_CHARS // 2, end))
            end = between if between > begin else end
        yield text[begin:end]
        begin = end
