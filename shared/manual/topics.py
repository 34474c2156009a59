"""The documentation as topics, and as plain text for a terminal. Pure.

A topic is a page of docs/, a section of one, a file that comes with the program, or a verb. A section's name is its
anchor, else the words of its title before a colon: ``node-down`` is a section of the runbooks.
"""

import difflib
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

WIDTH = 100
LISTED = ("runbooks", "operating")
"""Pages of which each section is listed."""
_SECTION = re.compile(r'(?:^<a id="(?P<anchor>[^"]+)"></a>\n+)?^##+ (?P<title>.+)$', re.MULTILINE)
_FENCE = re.compile(r"^ *```")
_ITEM = re.compile(r"(?P<indent> *)(?P<mark>[-*]|\d+\.) +")
_LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<target>[^)\s]+)\)")
_CODE = re.compile(r"`[^`]*`")
_EMPHASIS = re.compile(r"(?<![\w*])(\*\*|\*)(?=\S)(.+?)(?<=\S)\1(?![\w*])")
_INVISIBLE = ("<a id=", "<!--")
_NAMED = 4
"""Near names that are suggested at most."""


class Topic(NamedTuple):
    """What one name shows. ``page`` is the page it stands on, ``text`` Markdown."""

    name: str
    title: str
    page: str
    text: str


def topics(pages: Mapping[str, str]) -> dict[str, Topic]:
    """Every topic of some pages (Markdown by name). Where two sections have one name, runbooks and operating tasks come
    first; a page's own name is always its."""
    found: dict[str, Topic] = {}
    for page in sorted(pages, key=lambda one: (one not in LISTED, one)):
        for one in sections(page, pages[page]):
            found.setdefault(one.name, one)
    for page, text in pages.items():
        title = next((line[2:] for line in text.splitlines() if line.startswith("# ")), page)
        found[page] = Topic(page, title, page, text)
    return found


def sections(page: str, text: str) -> Iterator[Topic]:
    """The sections of a page, each up to the next heading of its level or above."""
    heads = [one for one in _SECTION.finditer(text) if not _within_fence(text, one.start())]
    for n, head in enumerate(heads):
        level = _level(head)
        end = next((one.start() for one in heads[n + 1 :] if _level(one) <= level), len(text))
        title = head["title"].strip()
        yield Topic(head["anchor"] or slug(title), title, page, text[head.start("title") - level - 1 : end])


def _level(head: re.Match[str]) -> int:
    line = head.group().rpartition("\n")[2]
    return len(line) - len(line.lstrip("#"))


def _within_fence(text: str, at: int) -> bool:
    return sum(bool(_FENCE.match(line)) for line in text[:at].splitlines()) % 2 == 1


def slug(title: str) -> str:
    """A title's words before a colon, as a name: lower case, joined by hyphens."""
    plain = _LINK.sub(lambda link: link["text"], title).partition(":")[0]
    return re.sub(r"[^a-z0-9.]+", "-", plain.lower()).strip("-.") or "section"


def asked(words: Sequence[str]) -> str:
    """The name that somebody means: words, a title, or a link like docs/runbooks.md#node-down."""
    text = " ".join(words).strip().strip("`'\"").lower()
    text = text.rpartition("#")[2] or text.rstrip("#")
    text = re.sub(r"\.md$", "", text)
    return text.rpartition("/")[2] if "/" in text and " " not in text.strip("/ ") else slug(text)


def named(name: str, known: Mapping[str, Topic]) -> Topic | None:
    """The topic of a name, or of the anchor that a web page gives its heading (with the words after a colon)."""
    whole = (one for one in known.values() if slug(one.title.replace(":", " ")) == name)
    return known.get(name) or next(whole, None)


def near(name: str, known: Mapping[str, Topic] | Sequence[str]) -> list[str]:
    """Names that may have been meant, best first: those spelled alike, then those with one of its words."""
    alike = difflib.get_close_matches(name, list(known), _NAMED, cutoff=0.6)
    words = [word for word in name.split("-") if len(word) > 2]
    titles = {one: f"{one} {known[one].title.lower()}" if isinstance(known, Mapping) else one for one in known}
    having = [one for one, title in titles.items() if any(word in title for word in words)]
    return list(dict.fromkeys([*alike, *sorted(having, key=lambda one: (-_shared(words, titles[one]), one))]))[:_NAMED]


def _shared(words: Sequence[str], title: str) -> int:
    return sum(word in title for word in words)


def plain(markdown: str, program: str, width: int = WIDTH) -> str:
    """Markdown as text of at most ``width`` columns, code and tables aside; links name what ``program`` can show."""
    out: list[str] = []
    listing = False
    for block in _blocks(markdown):
        first = block[0]
        if out and not (listing and _ITEM.match(first)):
            out.append("")
        listing = bool(_ITEM.match(first))
        if _FENCE.match(first):
            out += [f"    {line}".rstrip() for line in textwrap.dedent("\n".join(block[1:-1])).splitlines()]
        elif first.startswith("#"):
            title = _inline(first.lstrip("# "), program)
            out += [title, ("=" if first.startswith("# ") else "-") * min(len(title), width)]
        elif first.lstrip().startswith("|"):
            out += _table(block, program, width)
        else:
            out += _wrapped(block, program, width)
    return "\n".join(out).strip("\n") + "\n"


def _blocks(markdown: str) -> Iterator[list[str]]:
    """Runs of lines: code, tables, headings, items of lists and paragraphs."""
    block: list[str] = []
    fenced = False
    for line in [*markdown.splitlines(), ""]:
        fence = bool(_FENCE.match(line))
        if fenced:
            block.append(line)
            if fence:
                yield block
                block, fenced = [], False
            continue
        starts = fence or line.startswith("#") or (bool(_ITEM.match(line)) and not line.lstrip().startswith("**"))
        if block and (not line.strip() or starts or line.lstrip().startswith("|") != block[0].lstrip().startswith("|")):
            yield block
            block = []
        fenced = fence
        if line.strip() and not line.startswith(_INVISIBLE):
            block.append(line)
            if line.startswith("#"):
                yield block
                block = []
    if block:
        yield block


def _wrapped(block: list[str], program: str, width: int) -> list[str]:
    item = _ITEM.match(block[0])
    head = item.group() if item else ""
    text = _inline(" ".join(line.strip() for line in [block[0][len(head) :], *block[1:]]), program)
    return textwrap.wrap(
        text, width, initial_indent=head, subsequent_indent=" " * len(head), break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _table(block: list[str], program: str, width: int) -> list[str]:
    """In columns where they fit; else each row's first cell, and the others below it."""
    rows = [[_inline(cell.strip(), program) for cell in _cells(line)] for line in block]
    rows = [row for row in rows if not all(re.fullmatch(r":?-*:?", cell) for cell in row)]
    if not rows:
        return []
    count = max(map(len, rows))
    rows = [[*row, *[""] * (count - len(row))] for row in rows]
    widths = [max(len(row[n]) for row in rows) for n in range(count)]
    if sum(widths) + 2 * (count - 1) <= width:
        return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    head, *rest = rows
    shown = [" / ".join(head)] if count == 2 and any(head) else []
    for row in rest:
        cells = [
            f"{name}: {cell}" if name and cell and count > 2 else cell for name, cell in zip(head, row, strict=True)
        ]
        shown += textwrap.wrap(cells[0], width)
        for cell in cells[1:]:
            shown += textwrap.wrap(cell, width - 4, initial_indent="    ", subsequent_indent="    ")
    return shown


def _cells(line: str) -> list[str]:
    return [cell.replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def _inline(text: str, program: str) -> str:
    """Without emphasis; a link to a page becomes the command that shows it. Code keeps its backticks."""
    kept: list[str] = []

    def keep(code: re.Match[str]) -> str:
        kept.append(code.group())
        return f"\0{len(kept) - 1}\0"

    bare = _EMPHASIS.sub(r"\2", _CODE.sub(keep, text.replace("\0", "")))
    linked = _LINK.sub(lambda link: _shown(link["text"], link["target"], program), bare)
    return re.sub(r"\0(\d+)\0", lambda at: kept[int(at[1])], linked)


def _shown(text: str, target: str, program: str) -> str:
    page, _, anchor = target.partition("#")
    if re.fullmatch(r"(\.\./)?(docs/)?[a-z_-]*(\.md)?", page) and (page.endswith(".md") or anchor):
        shown = f"`{program} help {anchor or page.rpartition('/')[2].removesuffix('.md')}`"
        return shown if text in (page, page.removesuffix(".md"), target) else f"{text} ({shown})"
    return f"{text} ({target})" if "://" in target and target != text else text
