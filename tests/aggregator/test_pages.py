"""Every sentence of every report, on racks of good and bad months: nothing is nonsense, cut off, or looks whole where
it is not."""

import hashlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest
from pypdf import PdfReader
from reportlab.lib.styles import ParagraphStyle
from reportlab.pdfbase import pdfmetrics

from aggregator import calendar, phrases
from aggregator.calendar import DAY_MS, Span
from aggregator.commands import weekly
from aggregator.judgements import Judged, judge
from aggregator.phrases import counted, verb
from aggregator.report import html, layout, markdown, pdf, wording
from aggregator.report.page import Curve, Page, Section, page_of, table
from shared.errors import Refused
from shared.sketch import Sketch
from tests.aggregator.told_racks import config, racks
from tests.builders import T0, batch, host, pdf_text, served, window

NAMES = (
    *("usual", "first", "partial", "dark", "silent", "empty", "zero"),
    *("one", "unpriced", "dear", "notes", "half lost", "skewed", "large"),
)
NONSENSE = {
    "plural of one": r"(?<![\d.,])1 (?!s\b|is\b|was\b|has\b|ms\b|times\b|less\b|us\b)[a-z]+(?<!s)s\b(?! \d)",
    "no data in a sentence": r"\bno data of \w+'? |[Nn]o data per|took no data|cover no data|of no data",
    "a value of the program": r"\bNone\b(?! of the)|\b(?:nan|inf|True|False)\b|Decimal\(",
    "two spaces": r"\S  \S",
    "two full stops": r"(?<!\.)\.\.(?!\.)",
    "dearer": r"of the price: dearer",
    "percent without a space": r"\d%",
}


def told(report: Judged) -> list[str]:
    """Every text of every report, in every format, as its reader sees it."""
    pages = [page for _, page in weekly.artifacts(report, report.before_period or "the period before").values()]
    shown = [line for page in pages for line in markdown.render(page).decode().splitlines()]
    return [cell.strip().replace("\\", "") for line in shown for cell in line.strip("|").split("|")] + printed(report)


def texts(page: Page) -> list[str]:
    found = [page.title, page.lead, page.foot]
    for one in page.sections:
        found += [one.title, *one.text, *one.points, *one.steps]
        found += [cell for row in (one.table.rows if one.table else ()) for cell in row]
    return found


def printed(report: Judged, fallback: str = "") -> list[str]:
    """What is set in the PDF."""
    found, paragraph = list[str](), layout.Sheet.p

    def noted(sheet: layout.Sheet, text: str, style: ParagraphStyle) -> object:
        found.append(sheet.written(text).replace("\xa0", " "))
        return paragraph(sheet, text, style)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(layout.Sheet, "p", noted)
        pdf.render(report, fallback)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_no_sentence_is_nonsense(name: str) -> None:
    found = [
        f"{what}: {text}" for text in told(racks()[name]) for what, wrong in NONSENSE.items() if re.search(wrong, text)
    ]
    assert found == []
    assert [text for text in told(racks()[name]) if text.count("(") != text.count(")")] == []


def test_the_names_are_those_of_the_racks() -> None:
    assert set(NAMES) == set(racks())


@pytest.mark.parametrize("name", NAMES)
def test_equal_reports_give_equal_files_dated_by_their_period(name: str) -> None:
    report = racks()[name]
    body = pdf.render(report)
    assert body == pdf.render(report)
    made = PdfReader(io.BytesIO(body)).metadata
    assert made is not None
    assert made.creation_date is not None
    assert made.creation_date.timestamp() * 1000 == report.telemetry.until_ms


@pytest.mark.parametrize("name", NAMES)
def test_no_page_is_mostly_blank_before_the_last(name: str) -> None:
    """A long table begins below its heading, instead of on a page of its own."""
    pages = [page.extract_text() for page in PdfReader(io.BytesIO(pdf.render(racks()[name]))).pages]
    headings = r"(?m)^(?:\d\. [A-Z][a-z ]+|Promises|Incidents)$"
    for text in pages:
        assert not re.search(headings, text.strip().splitlines()[-1]), "a heading alone at the end"
    assert all(len(text) > 900 for text in pages[:-1])


def test_the_first_page_says_what_the_figures_rest_on() -> None:
    first = {name: pdf_text(pdf.render(racks()[name])).replace("\n", " ") for name in NAMES}
    assert "Judged until 1 Dec 2026 00:00 (the end of the period)" in first["usual"]
    assert "nothing is known to be lost" in first["usual"]
    assert "Judged until 11 Nov 2026 00:00 (the period is not over)" in first["partial"]
    assert "13 days without telemetry, 336 objects in quarantine" in first["half lost"]
    flat = first["half lost"]
    for said in ("336 of another rack", "n3 writes rack 'office' alone", "cannot be read since", "1 record is of an"):
        assert said in flat
    assert "2 batches arrived after their day was pruned and are not counted" in flat
    assert "Clock skew: n2 by up to" in first["skewed"]
    assert "mini-9, which reported nothing" in first["notes"]


def test_a_week_and_a_month_say_the_same_of_what_is_missing() -> None:
    for name in ("half lost", "skewed", "notes"):
        report = racks()[name]
        page = weekly.artifacts(report, report.before_period)["uptime"]
        said = wording.remarks(report.telemetry, report.timezone, report.before_period)
        assert set(said) <= set(texts(page[1])) & set(printed(report))
        assert said
        assert msgspec.to_builtins(page[0])["telemetry"] == msgspec.to_builtins(report.telemetry)


def test_every_key_figure_has_its_change() -> None:
    cards = pdf._key_figures(racks()["usual"])
    assert [change for *_, change, _ in cards if "2026-10" not in change] == []
    both = {name: good for name, *_, good in pdf._key_figures(racks()["dark"])}
    assert both["Uptime of the rack"] == both["Requests answered"], "one verdict, that of the worse"
    saved = next(card for card in pdf._key_figures(racks()["dear"]) if card[0] == "Saved against APIs")
    assert saved[-1] is False


@pytest.mark.parametrize(
    ("now", "before", "points", "said"),
    [
        (1.1, 1.0, False, "+10.0 % on x"),
        (0.5, 1.0, False, "-50.0 % on x"),
        (77.3, 1.0, False, "77 times that of x"),
        (0.999, 0.99, True, "+0.90 points on x"),
        (0.999, 0.99901, True, "as in x"),
        (5, 0, False, "none in x"),
        (0, 0, False, "as in x"),
        (1, None, False, "no data of x"),
        (None, 1, False, "x had data"),
        (-0.8, 0.2, True, "-100.00 points on x"),
    ],
)
def test_a_change_is_said_plainly(now: float | None, before: float | None, points: bool, said: str) -> None:
    assert wording.changed(now, before, "x", points=points) == said


def test_numbers_go_with_their_nouns() -> None:
    assert [counted(n, "node") for n in (0, 1, 2, 1234)] == ["0 nodes", "1 node", "2 nodes", "1,234 nodes"]
    assert counted(2, "batch", "batches") == "2 batches"
    assert [verb(n, "was", "were") for n in (0, 1, 2)] == ["were", "was", "were"]
    assert wording.spans([7200 * 100, 60, None]) == (["200.0", "0.0", "no data"], "h")
    assert wording.spans([9_720, 6_684]) == (["162.0", "111.4"], "min")
    for most in (0, 1, 7, 30_544_620, 10**12):
        step, top = wording.ticks(most)
        assert top >= most
        assert 1 <= round(top / step) <= 5


def test_nothing_is_left_out_in_silence() -> None:
    """Of many recommendations every kind is shown, and what is left out is counted by kind; no text is cut."""
    report = racks()["large"]
    one = report.recommendations[0]
    kinds = ("operations", "placement", "retirement")
    many = [msgspec.structs.replace(one, kind=kind, text=f"{kind} {n}.") for kind in kinds for n in range(30)]
    long = " ".join(["word"] * 500) + " at last do it."
    many.append(msgspec.structs.replace(one, kind="money", text=long))
    text = pdf_text(pdf.render(msgspec.structs.replace(report, recommendations=tuple(many)))).replace("\n", " ")
    assert all(f"{kind} 0." in text for kind in kinds)
    assert "operations 29." in text, "all that cannot wait"
    assert "58 more ones are not listed here (29 placement, 29 retirement)" in text
    assert "at last do it." in text
    usual = racks()["usual"].uptime.incidents
    incidents = [msgspec.structs.replace(i, node=f"x{n}") for n in range(12) for i in usual]
    up = msgspec.structs.replace(report.uptime, incidents=tuple(incidents))
    text = pdf_text(pdf.render(msgspec.structs.replace(report, uptime=up))).replace("\n", " ")
    assert f"{len(incidents) - pdf.MOST_INCIDENTS} shorter ones are not listed here" in text
    assert "unconfirmed" in text


def test_days_without_telemetry_are_no_days_without_work() -> None:
    days = racks()["dark"].volume.days
    assert [day.date for day in days if not day.reported] == ["2026-11-11"]
    text = pdf_text(pdf.render(racks()["dark"]))
    assert "hatched: 1 day without telemetry" in text
    assert "Tokens per day, in millions" in text
    assert "6 Nov" in text


def test_a_month_without_tokens_has_its_cost() -> None:
    text = pdf_text(pdf.render(racks()["zero"]))
    assert "Total cost of the nodes" in text
    assert re.search(r"(?m)^Total\n", text)
    assert "price in the configuration" not in pdf_text(pdf.render(racks()["empty"]))


# the typeface


def test_polish_greek_and_cyrillic_are_letters_and_japanese_is_no_box(tmp_path: Path) -> None:
    text = pdf_text(pdf.render(racks()["notes"])).replace("\n", " ")
    assert "Zasilacz wyłączył się; ktoś odłączył kabel -> patrz zgłoszenie №42." in text
    assert "U+96FB U+6E90" in text
    sheet = layout.Sheet()
    assert sheet.written("ΑΒγ Жя ẞ ơ\t€ “x” 電\u202e\x07") == "ΑΒγ Жя ẞ ơ € “x” U+96FB U+202E U+0007"
    with pytest.raises(Refused, match=r"report.fallback_font '/no/such.ttf'.*TrueType"):
        pdf.render(racks()["notes"], "/no/such.ttf")
    wrong = tmp_path / "wrong.ttf"
    wrong.write_bytes(b"no font at all")
    with pytest.raises(Refused, match="leave it out"):
        pdf.render(racks()["notes"], str(wrong))


def test_every_font_of_a_file_is_embedded_and_has_digits_of_one_width() -> None:
    reader = PdfReader(io.BytesIO(pdf.render(racks()["notes"])))
    named: list[Any] = [page["/Resources"] for page in reader.pages]
    fonts = {str(font.get_object()["/BaseFont"]) for one in named for font in one["/Font"].values()}
    assert {name for name in fonts if "NotoSans" not in name} <= {"/Helvetica"}  # declared by the library, not used
    assert b"/FontFile2" in pdf.render(racks()["notes"])
    sheet = layout.Sheet()
    assert len({pdfmetrics.stringWidth(d, layout.REGULAR, 10) for d in "0123456789"}) == 1
    assert sheet.plain("→ x") == "-> x"


def test_the_fonts_are_those_whose_licence_is_with_them() -> None:
    folder = Path(__file__).parents[2] / "vendor/fonts"
    lines = [line.split() for line in (folder / "SHA256SUMS").read_text().splitlines()]
    sums = {name: sha for sha, name in lines}
    assert {path.name for path in folder.glob("*.ttf")} == set(sums)
    for name, sha in sums.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha
    assert "SIL OPEN FONT LICENSE" in (folder / "OFL.txt").read_text()


def test_a_long_name_is_divided_behind_a_hyphen() -> None:
    layout.Sheet()
    parts = layout.broken("llama-3.1-8b-instruct-4bit", 60).split(" ")
    assert "".join(parts) == "llama-3.1-8b-instruct-4bit"
    assert all(part[-1] in "-." for part in parts[:-1])


# HTML


class Tags(HTMLParser):
    """Elements with their attributes, and whether each is within ``main``."""

    def __init__(self, body: str) -> None:
        super().__init__()
        self.open, self.found, self.outside = list[str](), list[tuple[str, dict[str, str | None]]](), list[str]()
        self.feed(body)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and "main" not in self.open and not {"head"} & set(self.open):
            self.outside.append(data)


@pytest.mark.parametrize("name", ["usual", "one", "empty", "large"])
def test_pages_can_be_read_without_eyes_a_mouse_or_a_screen(name: str) -> None:
    report = racks()[name]
    curve = Curve(title="Balance", labels=("a", "b"), lines=(("x", (1.0, 2.0)),), unit="USD")
    drawn = page_of(
        "T `a`", "lead `b`", [Section(title="S `c`", curve=curve, table=table("a `d` | b", [("`e`", "f`g")]))]
    )
    for page in (drawn, *(page for _, page in weekly.artifacts(report, "before").values())):
        body = html.render(page).decode()
        tags = Tags(body)
        assert tags.open == []
        assert tags.outside == []
        assert sum(tag == "main" for tag, _ in tags.found) == 1
        scrolled = [attrs for tag, attrs in tags.found if attrs.get("class") == "scroll"]
        assert len(scrolled) == sum(tag == "table" for tag, _ in tags.found)
        assert all(a["tabindex"] == "0" and a["role"] == "region" and a["aria-label"] for a in scrolled)
        charts = [attrs for tag, attrs in tags.found if tag == "svg"]
        assert all(a["aria-label"] and a["role"] == "img" for a in charts)
        assert body.count("<svg") == body.count("<title>") - 1 == len(charts)
        assert "`" not in body
        (style,) = re.findall(r"(?s)<style>(.*?)</style>", body)
        assert re.search(r"@media print .*\.scroll \{ overflow: visible; \}", style)
        assert "@page { size: landscape" in style
        assert markdown.render(page)


# one fact, one value


def test_days_that_are_still_to_come_are_not_without_telemetry() -> None:
    span = Span("2026-W48", T0, T0 + 7 * DAY_MS, "UTC")
    first, second = (batch([served(), host()], minute=n * 1440) for n in (0, 2))
    later = ["2026-11-22", "2026-11-24", "2026-11-25"]
    for now_ms, blank in (
        (T0 + 2 * DAY_MS + 60_000, later[:1]),
        (T0 + 3 * DAY_MS, later[:1]),
        (T0 + 5 * DAY_MS, later),
    ):
        seen = window(first, second, span=span)
        judged = judge(seen, None, config("n1"), now_ms)
        assert [day.date for day in judged.volume.days if not day.reported] == blank
        assert f"{counted(len(blank), 'day')} without telemetry" in wording.coverage(judged)


def test_too_few_values_are_no_p95_in_any_place() -> None:
    for count, known in ((19, False), (20, True)):
        one = served(itl_us=Sketch([9_000] * count).to_wire())
        judged = judge(window(batch([one, host()])), None, config("n1"), T0 + 3 * DAY_MS)
        line = next(line for line in judged.scorecard if line.kind == "latency")
        values = (judged.volume.itl_p95_us, judged.figures.itl_p95_us, line.value)
        assert [value is not None for value in values] == [known] * 3


@pytest.mark.parametrize(
    ("now", "before", "said"),
    [
        (-6.4, -5.0, "costs 6.0 x in 2026-10"),
        (-1.5, 0.2, "20.0 % in 2026-10"),
        (0.1, -3.0, "costs 4.0 x in 2026-10"),
        (0.1, 0.2, "-10.00 points on 2026-10"),
    ],
)
def test_many_times_as_dear_is_not_told_in_points(now: float, before: float, said: str) -> None:
    assert wording.changed(now, before, "2026-10", points=True) == said


def test_a_colon_in_a_sentence_is_no_link() -> None:
    def rendered(text: str) -> str:
        return markdown.render(Page(title="t", lead=text, sections=())).decode()

    assert "&#8203;" not in rendered("no data: no model was swapped")
    for link in ("data:text/html,x", "javascript:alert(1)", "mailto:a@b.example", "see http://x.example"):
        assert "&#8203;" in rendered(link)


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "0 tokens"), (1, "1 token"), (8_300, "8,300 tokens"), (1_250_000, "1.25 M tokens"), (669e6, "669 M tokens")],
)
def test_tokens_have_one_form(number: int, said: str) -> None:
    assert phrases.tokens(int(number)) == said


def test_a_month_of_which_only_days_are_there_is_not_compared_as_a_whole_one() -> None:
    report = racks()["usual"]
    assert report.before is not None
    assert not report.before.blank_days
    short = msgspec.structs.replace(report, before=msgspec.structs.replace(report.before, blank_days=27))
    days = f"(of {report.before.days} days)".replace("of", f"{report.before.days - 27} of")
    changes = [change for *_, change, _ in pdf._key_figures(short)]
    assert all(f"{report.before_period} {days}" in change for change in changes)
    last = window(batch([served(), host()], minute=-1440 * 25), span=calendar.month("2026-10", "UTC"))
    now = window(batch([served(), host()]), span=calendar.month("2026-11", "UTC"))
    judged = judge(now, last, config("n1"), T0 + 20 * DAY_MS)
    assert judged.before is not None
    assert (judged.before.days, judged.before.blank_days) == (31, 30)
    assert (judged.figures.days, judged.figures.blank_days) == (30, 29)
