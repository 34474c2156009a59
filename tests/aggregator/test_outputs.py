"""Whatever a node calls its models and reasons, nothing of it is active in any output."""

import csv
import io
import json
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pypdf import PdfReader

from aggregator import alerts, focus, load
from aggregator.alerts import Firing, Notice
from aggregator.calendar import before, month, week
from aggregator.commands import monthly, rollup, weekly
from aggregator.config import AggregatorConfig
from aggregator.notify import payload
from aggregator.raw.cleaning import MOST_NAME, NAMES, cleaned, name, text
from aggregator.report import html, markdown
from aggregator.report.page import Curve, Section, page_of, table
from shared.bucket import Store
from shared.errors import Refused
from shared.keys import check_name
from shared.records import RECORD_TYPES, Hardware, Record
from shared.store_dir import DirectoryStore
from tests.aggregator.test_bucket import put
from tests.builders import MINUTE, T0, batch

PAYLOADS = (
    "![x](http://evil.example/beacon.png) [go](https://evil.example)",
    "<img src=http://evil.example/a.png onerror=alert(1)><script>alert(1)</script>",
    "<a href='http://evil.example'>x</a><font color='red'>y</font><para>",
    "http://evil.example www.evil.example <https://evil.example> me@evil.example @everyone",
    "x\n\n# Forged heading\n\n- point\n\n> quote\n\n```\ncode",
    "a|b|c\n|---|---|",
    "`code` **bold** _em_ ~~gone~~ $x$ [ref]: http://evil.example [ref][ref]",
    '=HYPERLINK("http://evil.example")',
    "+1+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(1)",
    "\t=1+1",
    "\x1b[31mred\x1b[0m \u202egnp.exe \x00 \x07",
    "javascript:alert(1) data:text/html,x",
    "</script><svg onload=alert(1)>",
    "\\](http://evil.example) \\<b>",
    "&lt;img src=x&gt; &#91;x&#93;(http://evil.example)",
    "{{ 7*7 }} {% raw %} ${7*7}",
)


def planted(kind: type[msgspec.Struct], payload: str, salt: int) -> Record:
    """A record with a payload in every free field."""
    values: dict[str, object] = {}
    for field in msgspec.structs.fields(kind):
        shape = str(field.type)
        if "str" in shape and "dict" in shape:
            values[field.name] = {payload: payload}
        elif "tuple" in shape and "str" in shape:
            values[field.name] = ("n1", payload)
        elif "str" in shape:
            values[field.name] = payload
        elif field.name in ("t_ms", "last_seen_ms", "start_ms"):
            values[field.name] = T0 + salt
        elif field.required:
            values[field.name] = 7
    fixed = {"outcome": "ok", "state": "ready", "worker": "n1"}
    values |= {k: v for k, v in fixed.items() if k in values and salt % 2}
    made: Record = msgspec.convert(values | {"kind": str(kind.__struct_config__.tag)}, Record)
    return made


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every output of a rack with one planted node."""
    store = DirectoryStore(tmp_path_factory.mktemp("planted"))
    nodes = ({"id": "n1", "price": 2000.0},)
    config = msgspec.convert({"rack": "r", "store": Store(path="x"), "nodes": nodes}, AggregatorConfig)
    for n, one in enumerate(PAYLOADS):
        records = [planted(kind, one, n * MINUTE + salt) for kind in RECORD_TYPES.values() for salt in (0, 1)]
        put(store, batch(records, minute=n))
    assert rollup.run(config, store).quarantined == ()
    span = week("2026-W47", "UTC")
    found: dict[str, bytes] = {}
    for key in (*weekly.publish_span(config, store, span, before(span)), *monthly.run(config, store, "2026-11")):
        found[key] = store.get(key, 1 << 30).body
    assert load.window(store, month("2026-11", "UTC")).events
    return found


def of_kind(outputs: dict[str, bytes], extension: str) -> dict[str, str]:
    found = {key: body.decode() for key, body in outputs.items() if key.endswith(extension)}
    assert found
    return found


def active(markdown_text: str) -> list[str]:
    """What a renderer of Markdown would act on, apart from our own headings, lists, tables and code."""
    fenced = re.sub(r"(?ms)^```\n.*?^```$", "", markdown_text)
    text = re.sub(r"`[A-Za-z0-9 ._-]+`", "", fenced)
    text = re.sub(r"\\[\\`*_{}\[\]()#+\-.!|<>~$=:]", "", text)  # escaped is inert
    patterns = {
        "tag": r"<[A-Za-z/!?]",
        "link": r"\]\(|\]\[|^\s*\[[^\]]*\]:",
        "address": r"(?i)[a-z][a-z0-9+.-]*:(?://|alert)|www\.\w|\w@\w|(?<!\w)@\w",
        "emphasis": r"\*|~|`|\$|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])",
        "control": r"[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e]",
        "forged": r"(?m)^#+ Forged|^> ",
    }
    return [f"{what}: {m[0]!r}" for what, pattern in patterns.items() for m in re.finditer(pattern, text)]


def test_nothing_planted_is_active_in_markdown(outputs: dict[str, bytes]) -> None:
    for key, body in of_kind(outputs, ".md").items():
        assert active(body) == [], key


def test_nothing_planted_is_active_in_html(outputs: dict[str, bytes]) -> None:
    for key, body in of_kind(outputs, ".html").items():
        tags = set(re.findall(r"</?([A-Za-z][A-Za-z0-9]*)", re.sub(r"(?s)<style>.*?</style>", "", body)))
        known = (
            "html head meta title body main h1 h2 p section table thead tbody tr th td div ul ol li footer svg line "
        )
        assert tags <= set((known + "polyline figure figcaption span i style code").split()), key
        # a command, whoever wrote it, is a name and nothing else
        for code in re.findall(r"<code>(.*?)</code>", body):
            assert re.fullmatch(r"[A-Za-z0-9 ._-]+", code), key
        assert not re.findall(r"<[^>]*\s(?:on\w+|href|src)\s*=", body), key


def test_nothing_planted_is_active_in_the_pdf(outputs: dict[str, bytes]) -> None:
    (body,) = (body for key, body in outputs.items() if key.endswith(".pdf"))
    assert body.startswith(b"%PDF")
    for word in (b"/URI", b"/JavaScript", b"/Launch", b"/XObject", b"/Annots"):
        assert word not in body
    assert "evil" in "".join(page.extract_text() for page in PdfReader(io.BytesIO(body)).pages), "as text"


def test_nothing_planted_is_a_formula_in_the_csv(outputs: dict[str, bytes]) -> None:
    for body in of_kind(outputs, ".csv").values():
        for row in csv.reader(io.StringIO(body)):
            for cell in row:
                assert not cell.lstrip().startswith(("=", "+", "@", "-")) or re.fullmatch(r"-?\d+(\.\d+)?", cell), row


def test_json_stays_json(outputs: dict[str, bytes]) -> None:
    for body in of_kind(outputs, ".json").values():
        assert json.loads(body)


def test_values_of_the_csv_are_texts_and_numbers_stay_numbers() -> None:
    found = [focus.inert(value) for value in ("=1", " =1", "\t@x", "-x", "＝1", -2, -2.5, "plain", "a=b", None)]
    assert found == ["'=1", "' =1", "'\t@x", "'-x", "'＝1", -2, -2.5, "plain", "a=b", None]


@pytest.mark.parametrize("one", PAYLOADS)
def test_every_place_of_a_page_is_escaped(one: str) -> None:
    curve = Curve(title=one, labels=(one, one), lines=((one, (1.0, 2.0)),), unit="USD")
    rows = table("a | b", [(one, one)])
    section = Section(title=one, text=(one,), points=(one,), steps=(one,), curve=curve, table=rows)
    page = page_of(one, one, [section], one)
    rendered = markdown.render(page).decode()
    assert [found for found in active(rendered) if not found.startswith("control")] == []
    assert len([line for line in rendered.splitlines() if line.startswith("| ")]) == 3
    assert rendered.count("\n```") == 2
    assert "<script" not in html.render(page).decode()


@pytest.mark.parametrize("one", PAYLOADS)
def test_nothing_is_active_in_a_notice(one: str) -> None:
    firing = Firing(code="node_down", subject=one, since_ms=T0, text=one)
    body = json.loads(json.dumps(payload(Notice(rule=alerts.RULES[0], firing=firing, resolved=False))))
    (embed,) = body["embeds"]
    for shown in (embed["title"], embed["description"]):
        inert = re.sub(r"\\.", "", shown)
        assert not re.search(r"://|[*_`~|<>@\[\]]", inert.removesuffix("runbook: `mlxrack-agent help node-down`")), (
            shown
        )
    assert body["allowed_mentions"] == {"parse": []}


@given(st.text(alphabet=st.sampled_from("ab_-.0 9"), max_size=40).map(lambda s: f"x{s}x"))
@example("qwen3-coder_30b.a3b")
@example("Times are in Europe/Berlin (UTC+1), 12.5 % of 1,234; see annotations/v1/incidents.toml.")
@example("No price: add `price` to [[nodes]] to see money here.")
def test_plain_text_stays_as_it_is(plain: str) -> None:
    if not re.search(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", plain):
        assert markdown._plain(plain) == plain


@given(st.text(max_size=80))
def test_names_are_names_and_distinct_ones_stay_distinct(given_name: str) -> None:
    made = name(given_name)
    if given_name:
        assert check_name(made, "name") == made
    assert len(made) <= MOST_NAME
    assert name(made) == made
    with_space = name(given_name + " ")
    assert with_space != made
    try:
        check_name(given_name, "name")
    except Refused:
        return
    assert made == given_name


@given(st.text(max_size=80))
def test_texts_are_printable(given_text: str) -> None:
    made = text(given_text)
    assert made.isprintable()
    assert text(made) == made
    assert len(made) == len(given_text)
    assert len(text(given_text, 10)) <= 10


def test_every_text_field_of_every_record_is_cleaned() -> None:
    for kind in RECORD_TYPES.values():
        (found,) = cleaned(batch([planted(kind, "\x1b[31m\n" + "x" * 900, 0)])).records
        for field in found.__struct_fields__:
            value = getattr(found, field)
            inner = (
                (*value, *value.values())
                if isinstance(value, dict)
                else value
                if isinstance(value, tuple)
                else (value,)
            )
            for one in inner:
                if isinstance(one, str):
                    assert one.isprintable(), (kind, field)
                    assert len(one) <= (63 if field in NAMES else 500), (kind, field)


def test_the_model_of_a_machine_is_no_name_of_the_rack() -> None:
    mini = Hardware(model="Mac16,11", chip="Apple M4 Pro", memory_bytes=64 << 30)
    assert cleaned(batch([mini])).records == (mini,), "the chip table knows it by its comma"
    (odd,) = cleaned(batch([msgspec.structs.replace(mini, model="Mac\x1b16,11" * 9)])).records
    assert isinstance(odd, Hardware)
    assert odd.model.isprintable()
    assert len(odd.model) <= MOST_NAME


def test_a_plain_batch_is_left_as_it_is(tmp_path: Path) -> None:
    one = batch([planted(kind, "plain.name-1_x", 1) for kind in RECORD_TYPES.values()])
    assert cleaned(one) is one
