"""Whether a text has more tokens than fit, found out at the cost of what fits and not of the text. Pure.

A tokenizer need not give a text the tokens of its parts: merges cross a cut, and normalizers join what they find. So
parts only ever refuse, with a wide margin, and what is not refused is tokenized whole: a prompt that fits has exactly
the tokens that it always had. A text with more characters for each token than any language has is refused as it is.
"""

from collections.abc import Callable, Iterable, Iterator

from agent.loader.generation import Advance, nothing

PLAIN_CHARS = 8
"""Texts of up to this many characters for each token that fits are tokenized whole at once: that costs little, and
most that are longer do not fit."""
PART_CHARS = 8192
MARGIN = 1.25
"""How far beyond the limit the parts of a text must be before it is refused."""
MOST_CHARS = 128
"""Characters for each token that fits, beyond which a text is refused unread: one long word that a tokenizer does not
know, or characters that it drops. Where a model has longer tokens, the longest one's length counts."""
CUT_TOK, GAP_TOK = 128, 8
"""Tokens that a cut inside a word, and one beside a blank, may add to a part: some tokenizers give any word of over 100
characters one token, and each character of a shorter rest its own."""


def exceeds(
    texts: Iterable[str],
    limit_tok: int,
    count: Callable[[str], int],
    advance: Advance = nothing,
    *,
    known_chars: int = 0,
    most_chars: int = MOST_CHARS,
) -> int:
    """At least how many tokens ``texts`` have together where they surely exceed ``limit_tok``, as far as they were
    read; 0 where they may fit. ``count`` counts the tokens of a part, without those that begin or end a prompt.
    ``advance`` is called before each part. Of the texts ``known_chars`` were found to fit before; ``most_chars`` is the
    length of the model's longest token, if that is above MOST_CHARS."""
    held = [text for text in texts if text]
    total = sum(map(len, held))
    if total - known_chars <= PLAIN_CHARS * limit_tok:
        return 0
    if total > most_chars * limit_tok:
        return limit_tok + 1
    found = 0
    for part, added_tok in (part for text in held for part in _parts(text)):
        advance()
        found += max(0, count(part) - added_tok)
        if found > MARGIN * limit_tok:
            return found
    return 0


def _parts(text: str) -> Iterator[tuple[str, int]]:
    """A text in parts, cut between words where there are any, and how many tokens their cuts may have added."""
    begin, before_tok = 0, 0
    while begin < len(text):
        end = begin + PART_CHARS
        if end < len(text):
            between = max(text.rfind(" ", begin + PART_CHARS // 2, end), text.rfind("\n", begin + PART_CHARS // 2, end))
            end = between if between > begin else end
        within = end < len(text) and not (text[end].isspace() or text[end - 1].isspace())
        after_tok = (CUT_TOK if within else GAP_TOK) if end < len(text) else 0
        yield text[begin:end], before_tok + after_tok
        begin, before_tok = end, after_tok
