"""Every run says what it did; published reports can be listed, read and fetched; a period without telemetry is none."""

import argparse
import io
import json
import os
import re
import shutil
import stat
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pypdf import PdfReader
from reportlab.lib.styles import ParagraphStyle

from aggregator import api_prices, cli
from aggregator.calendar import last_month, last_week, month, week
from aggregator.commands import reading, weekly
from aggregator.commands.ended import Ended, printable
from aggregator.config import AggregatorConfig
from aggregator.judgements import judge
from aggregator.report import html, layout, markdown, pdf, terminal, wording
from aggregator.report.page import Page, Section, page_of, table
from shared import keys
from shared.batch import Batch
from shared.bucket import Store, place
from shared.errors import Refused
from shared.records import Record
from shared.store import list_all
from shared.store_dir import DirectoryStore
from tests.aggregator.test_bucket import CONFIG, directory, minute, put
from tests.builders import T0, batch, engine, host, resident, served, window

NOW = datetime.now(UTC)
THIS_WEEK = f"{NOW.isocalendar().year}-W{NOW.isocalendar().week:02d}"
ESCAPES = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u202a-\u202e\u2066-\u2069]")


def now_batch() -> Batch:
    """A batch that ended a few minutes ago."""
    ago = (NOW.timestamp() * 1000 - T0) / 60_000 - 5
    return batch([served(), engine(), resident(), host()], minute=int(ago), seq=9_000_000)


@pytest.fixture
def config(tmp_path: Path) -> str:
    return str(directory(tmp_path))


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "bucket")


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bucket with the reports of one week and one month."""
    folder = tmp_path_factory.mktemp("reported")
    store, config = DirectoryStore(folder / "bucket"), str(directory(folder))
    put(store, *(minute(n) for n in range(3)))
    assert cli.main(["weekly", "--week", "2026-W47", "--quiet", "--config", config]) == 0
    assert cli.main(["monthly", "--month", "2026-11", "--quiet", "--config", config]) == 0
    return folder / "bucket"


@pytest.fixture
def filled(config: str, reported: Path, tmp_path: Path) -> str:
    """The same for one test alone."""
    shutil.copytree(reported, tmp_path / "bucket", dirs_exist_ok=True)
    return config


# every run says what it did


def verbs() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def test_an_end_without_a_word_cannot_be_made() -> None:
    for bad in ({}, {"data": {"x": 1}}, {"line": "two\nlines"}, {"details": ("x",)}):
        with pytest.raises(ValueError, match="ends with one line"):
            Ended(**bad)


def test_every_verb_says_in_one_line_what_it_did_and_nothing_when_quiet(
    filled: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "target.toml"
    target.write_text(f'[store]\nkind = "directory"\npath = "{tmp_path}/copy"\n')
    acting = {
        "rollup": [],
        "weekly": ["--week", "2026-W47"],
        "monthly": ["--month", "2026-11"],
        "alert": [],
        "prune": [],
        "sync": ["--to", str(target)],
        "fetch": ["--out", str(tmp_path / "out")],
    }
    reading_ones = {"list", "show", "plan", "economics", "check-config"}
    assert set(acting) | reading_ones | {"apply", "restore", "help"} == set(verbs()), "a new verb is tried here"
    for verb, words in acting.items():
        assert cli.main([verb, *words, "--config", filled]) == 0
        told = capsys.readouterr()
        assert told.out.count("\n") == 1, verb
        assert str(tmp_path) in told.out, f"{verb} says where"
        assert cli.main([verb, *words, "--quiet", "--config", filled]) == 0
        assert capsys.readouterr() == ("", ""), verb
        assert cli.main([verb, *words, "--json", "--quiet", "--config", filled]) == 0
        assert isinstance(json.loads(capsys.readouterr().out), dict), verb


def test_the_line_of_a_report_is_a_command_that_shows_it(filled: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["weekly", "--week", "2026-W47", "--config", filled]) == 0
    line = capsys.readouterr().out.strip()
    assert "report/v1/weekly/2026-W47/" in line
    words = line.partition("read: mlxrack-aggregator ")[2].split()
    assert cli.main(words) == 0
    assert "SCORECARD, RACK R, 2026-W47" in capsys.readouterr().out


def test_quiet_keeps_errors(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["weekly", "--quiet", "--week", "x", "--config", config]) == 1
    told = capsys.readouterr()
    assert (told.out, "give it as 2026-W47" in told.err) == ("", True)


def test_a_place_names_no_secret() -> None:
    s3 = Store(kind="s3", endpoint="https://user:pw@h", bucket="b", prefix="p/", access_key="env:A", secret_key="env:B")
    assert place(s3) == "s3://b/p"
    assert place(Store(path="/x")) == "/x"


# a period without telemetry


@pytest.mark.parametrize(
    "words",
    [
        ["weekly", "--week", "2027-W01"],
        ["weekly", "--week", "2026-W40"],
        ["weekly", "--since", "2026-10-01", "--until", "2026-10-09"],
        ["weekly", "--since", "2099-10-01", "--until", "2099-10-09"],
        ["monthly", "--month", "2026-09"],
        ["monthly", "--month", "2031-01"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("new", [True, False])
def test_a_period_without_telemetry_is_refused(
    new: bool, words: list[str], config: str, store: DirectoryStore, capsys: pytest.CaptureFixture[str]
) -> None:
    if not new:
        put(store, minute(0))
    for quiet in ([], ["--quiet"]):
        assert cli.main([*words, *quiet, "--config", config]) == os.EX_NOINPUT
        told = capsys.readouterr()
        assert told.out == ""
        assert "nothing was published" in told.err, "who asks for a period is told"
        assert ("has not begun" in told.err) == (words[-1] in ("2027-W01", "2099-10-09", "2031-01"))
    assert not list_all(store, "report/")


def test_cron_on_a_new_rack_sends_no_mail_and_one_on_a_silent_rack_does(
    config: str, store: DirectoryStore, capsys: pytest.CaptureFixture[str]
) -> None:
    for reporting in (False, True):
        if reporting:
            put(store, now_batch())
        for verb in ("weekly", "monthly"):
            assert cli.main([verb, "--quiet", "--config", config]) == os.EX_NOINPUT
            assert capsys.readouterr() == ("", ""), "a rack has no last week in its first"
            assert cli.main([verb, "--config", config]) == os.EX_NOINPUT
            assert "no node reported anything" in capsys.readouterr().err
    old = (datetime(2026, 3, 4, tzinfo=UTC).timestamp() * 1000 - T0) / 60_000
    put(store, batch([served(), host()], minute=int(old), seq=1, node="n0"))
    for verb in ("weekly", "monthly"):
        assert cli.main([verb, "--quiet", "--config", config]) == os.EX_NOINPUT
        assert "the telemetry is from 2026-03-04" in capsys.readouterr().err, "it had reported before"


# a period that is not over


def test_a_running_period_is_called_partial_in_every_output(
    config: str, store: DirectoryStore, capsys: pytest.CaptureFixture[str]
) -> None:
    put(store, now_batch())
    running = [("weekly", "--week", THIS_WEEK), ("monthly", "--month", f"{NOW:%Y-%m}")]
    for verb, option, period in running:
        assert cli.main([verb, option, period, "--config", config]) == 0
        assert f"{period}, so far until 20" in capsys.readouterr().out
        assert cli.main(["show", verb, "--config", config]) == 0
        assert capsys.readouterr().out.upper().count("SO FAR UNTIL") >= 5
    assert cli.main(["list", "--config", config]) == 0
    assert capsys.readouterr().out.count("so far until") == 2
    seen = set()
    for listed in list_all(store, "report/"):
        key, body = keys.parse_report_key(listed.key), store.get(listed.key, 1 << 30).body
        seen.add((key.name, key.extension))
        if key.extension == "json":
            tree = json.loads(body)
            rows = tree if isinstance(tree, list) else [tree]
            assert all(row["so_far_until_ms"] > T0 for row in rows), listed.key
        elif key.extension == "csv":
            assert b"x_SoFarUntil" in body
        elif key.extension == "pdf":
            pages = [page.extract_text() for page in PdfReader(io.BytesIO(body)).pages]
            assert all("so far until" in text for text in pages)
        else:
            assert body.decode().lower().count("so far until") >= 2, listed.key
    assert len(seen) == 22


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "Asia/Kolkata"])
def test_a_period_is_partial_until_its_last_moment_is_judged(zone: str) -> None:
    span = week("2026-W47", zone)
    seen = window(minute(0), span=span)
    for now_ms, partial in ((span.until_ms - 3_600_000, True), (span.until_ms, False), (span.until_ms + 1, False)):
        judged = judge(seen, None, CONFIG, now_ms)
        assert bool(judged.so_far) is partial
        body = json.loads(msgspec.json.encode(judged))
        assert ("so_far_until_ms" in body) is partial, "the figures of a period that is over are as before"
        # prices of no day that has not come
        at = datetime.fromtimestamp(min(now_ms, span.until_ms - 1) / 1000, UTC)
        assert judged.apis.at == f"{at:%Y-%m-%d}"


# list, show, fetch


def test_list_tells_periods_revisions_and_when(
    filled: str, store: DirectoryStore, capsys: pytest.CaptureFixture[str]
) -> None:
    put(store, minute(7))
    assert cli.main(["weekly", "--week", "2026-W47", "--config", filled]) == 0
    capsys.readouterr()
    assert cli.main(["list", "--json", "--config", filled]) == 0
    found = json.loads(capsys.readouterr().out)["periods"]
    assert [(one["cadence"], one["period"]) for one in found] == [("monthly", "2026-11"), ("weekly", "2026-W47")]
    revisions = {one["name"]: one["revision"] for one in found[1]["reports"]}
    assert revisions["cost"] == 2
    age_s = NOW.timestamp() - found[1]["reports"][0]["stored_ms"] / 1000
    assert abs(age_s) < 3600
    for one in found:
        for report in one["reports"]:
            assert all(store.get(key, 1 << 30) for key in report["files"])
    assert cli.main(["list", "--config", filled]) == 0
    assert re.search(
        r"2026-W47 +weekly +cost evictions focus placement scorecard uptime usage +2 +20", capsys.readouterr().out
    )


@pytest.mark.parametrize("t_ms", ["99999999999999999", "-99999999999999999", "253402300799000", "1e30"])
def test_a_time_that_no_calendar_has_is_no_traceback(
    filled: str, store: DirectoryStore, tmp_path: Path, capsys: pytest.CaptureFixture[str], t_ms: str
) -> None:
    """In a report, in the mark of a copy, in that of a restore."""
    for name in ("uptime", "placement"):
        body = store.get(keys.report_key("weekly", "2026-W47", name, 1, "json"), 1 << 30).body
        told = body.replace(b"{", b'{"so_far_until_ms": %s,' % t_ms.encode(), 1)
        store.put(keys.report_key("weekly", "2026-W47", name, 2, "json"), told)
    there = DirectoryStore(tmp_path / "copy")
    there.put("state/v1/copy.json", f'{{"rack": "r", "began_ms": 1, "finished_ms": {t_ms}}}'.encode())
    copy = tmp_path / "copy.toml"
    copy.write_text(f'[store]\nkind = "directory"\npath = {json.dumps(str(tmp_path / "copy"))}\n')
    assert cli.main(["list", "--config", filled]) == 0
    assert cli.main(["show", "--report", "uptime", "--config", filled]) == 0
    for words in (
        ["apply", "--week", "2026-W47"],
        ["restore", "--force", "--from", str(copy)],
        ["sync", "--to", str(copy)],
    ):
        assert cli.main([*words, "--config", filled]) == 1, words
        assert "cannot be parsed" in capsys.readouterr().err
    store.put("state/v1/restore.json", f'{{"rack": "r", "began_ms": {t_ms}}}'.encode())
    assert cli.main(["list", "--config", filled]) == 1
    assert "cannot be parsed" in capsys.readouterr().err


def test_formats_with_different_revisions_are_each_the_newest(
    filled: str, store: DirectoryStore, tmp_path: Path
) -> None:
    key = keys.report_key("weekly", "2026-W47", "cost", 2, "md")
    store.put(key, b"# Newer\n")
    period = reading.chosen(store, "weekly")
    assert "Newer" in reading.text_of(store, period)
    assert set(reading.figures_of(store, period)) == {"cost", "evictions", "placement", "scorecard", "uptime", "usage"}
    names = {path.name for path in reading.write(store, period, tmp_path / "out")}
    assert {"2026-W47-cost-r2.md", "2026-W47-cost-r1.html", "2026-W47-cost-r1.json"} <= names


def test_show_prints_the_reports_readably(
    filled: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns in ("60", "100", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        for words in (["show"], ["show", "monthly"], ["show", "--week", "2026-W47"], ["show", "--month", "2026-11"]):
            assert cli.main([*words, "--config", filled]) == 0
            out = capsys.readouterr().out
            assert "Promises\n--------" in out
            assert max(len(line) for line in out.split("\n")[:-2]) <= int(columns) + 40
            assert "| ---" not in out
            assert "&lt;" not in out
    assert cli.main(["show", "--report", "uptime", "--json", "--config", filled]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["figures"]) == ["uptime"]
    assert found["figures"]["uptime"]["requests_ok"] == 6


@pytest.mark.parametrize(
    ("words", "status", "why"),
    [
        (["show", "--week", "../x"], 1, "give it as 2026-W47"),
        (["show", "--week", "2026-W12"], os.EX_NOINPUT, "there are 2026-W47"),
        (["show", "monthly", "--week", "2026-W47"], 1, "give the period as --month"),
        (["show", "--report", "wages"], 1, "no report 'wages'"),
        (["fetch", "--format", "exe"], 1, "there are cost"),
        (["fetch", "--report", "../../x"], 1, "there are cost"),
    ],
    ids=str,
)
def test_what_is_not_there_is_a_sentence(
    words: list[str], status: int, why: str, filled: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*words, "--config", filled]) == status
    assert why in capsys.readouterr().err


def test_open_shows_pages_and_pdfs_with_the_system_s_viewer(
    filled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["show", "--open", "--out", str(tmp_path / "o"), "--config", filled]) == 1
    assert "use --out DIR" in capsys.readouterr().err
    opener = tmp_path / "xdg-open"
    opener.write_text(f'#!/bin/sh\necho "$1" >> "{tmp_path}/opened"\n')
    opener.chmod(0o755)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for words in (["show"], ["show", "monthly"]):
        assert cli.main([*words, "--open", "--config", filled]) == 0
    opened = (tmp_path / "opened").read_text().split()
    assert sorted(Path(path).suffix for path in opened) == [*[".html"] * 6, ".pdf"]
    assert all(Path(path).stat().st_size for path in opened)


HOSTILE = (
    "report/v1/weekly/2026-W47/../../../etc/cost-r1.md",
    "report/v1/weekly/2026-W47//etc/passwd-r1.md",
    "report/v1/weekly/../cost-r9.html",
    "report/v1/weekly/2026-W47/..-r9.html",
    "report/v1/weekly/2026-W47/nul-r9.exe",
    "report/v1/weekly/2026-W47/CON-r9.html",
    "report/v1/weekly/2026-W47/cost-r9.html\n",
    "report/v1/weekly/2026-W47/cost-r09.html",
    "report/v1/weekly/2026-W47/cost-r9.html.app",
    "report/v1/weekly/2026-W47/cost-r9.command",
    "report/v1/weekly/2026-W47/\x1b[2Jcost-r9.html",
    "report/v1/weekly/2026-W47/~/.ssh/x-r9.html",
    "report/v1/weekly/2026-W47/C:\\x-r9.html",
    "report/v1/weekly/2026-W47/.x-r9.html",
    "report/v1/daily/2026-11-21/cost-r9.html",
    "report/v1/weekly/2026-11/cost-r9.html",
    "report/v1/monthly/2026-W47/report-r9.pdf",
    "report/v1/weekly/٢٠٢٦-W47/cost-r9.html",
    "report/v2/weekly/2026-W47/cost-r9.html",
)


@example("report/v1/weekly/2026-W47/cost-r1.html")
@given(
    st.one_of(
        st.sampled_from(HOSTILE), st.from_regex(r"report/v1/(weekly|monthly)/[^\n]{0,40}", fullmatch=True), st.text()
    )
)
def test_no_key_becomes_a_name_outside_a_folder(key: str) -> None:
    try:
        found = keys.parse_report_key(key)
    except Refused:
        return
    assert keys.report_key(*found) == key
    assert re.fullmatch(r"\d{4}-[W0-9-]+-[a-z][a-z0-9_]*-r\d+\.(json|md|html|csv|pdf)", found.file, re.ASCII)
    assert Path("/x", found.file).resolve().parent == Path("/x")


def test_hostile_keys_are_no_reports() -> None:
    for key in HOSTILE:
        with pytest.raises(Refused):
            keys.parse_report_key(key)


def test_fetch_writes_into_the_folder_alone_and_replaces_a_link(
    filled: str, store: DirectoryStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for key in HOSTILE:
        if ".." not in key and "//" not in key:
            store.put(key, b"planted")
    out, outside = tmp_path / "out", tmp_path / "outside"
    out.mkdir()
    outside.write_text("mine")
    (out / "2026-W47-cost-r1.md").symlink_to(outside)
    before = {path for path in tmp_path.rglob("*") if "bucket" not in path.parts}
    assert cli.main(["fetch", "--out", str(out), "--config", filled]) == 0
    made = {path for path in tmp_path.rglob("*") if "bucket" not in path.parts} - before
    assert {path.parent for path in made} == {out}
    assert outside.read_text() == "mine"
    assert not (out / "2026-W47-cost-r1.md").is_symlink()
    assert len(list(out.iterdir())) == 20, "no temporary file stays"
    assert stat.S_IMODE((out / "2026-W47-cost-r1.md").stat().st_mode) == 0o644
    capsys.readouterr()
    (tmp_path / "file").write_text("")
    assert cli.main(["fetch", "--out", str(tmp_path / "file"), "--config", filled]) == 1
    assert "write into" in capsys.readouterr().err


def test_a_failed_fetch_leaves_no_file(filled: str, store: DirectoryStore, tmp_path: Path) -> None:
    period = reading.chosen(store, "weekly")
    store.delete(keys.report_key("weekly", "2026-W47", "uptime", 1, "md"))
    with pytest.raises(Refused):
        reading.write(store, period, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


ATTACK = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.exe\r\x00\x08 \x7f"


def test_nothing_of_a_bucket_reaches_a_terminal_as_an_escape(
    filled: str, store: DirectoryStore, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cost", "zz"):
        store.put(
            keys.report_key("weekly", "2026-W47", name, 3, "md"),
            f"# {ATTACK}\n\n| a | {ATTACK} |\n| --- | --- |\n".encode(),
        )
        store.put(keys.report_key("weekly", "2026-W47", name, 3, "json"), json.dumps({ATTACK: ATTACK}).encode())
    judged = json.loads(store.get(keys.report_key("monthly", "2026-11", "report", 1, "json"), 1 << 30).body)
    judged |= {
        "headline": ATTACK,
        "rack": ATTACK,
        "recommendations": [{"kind": "x", "text": ATTACK, "because": ATTACK}],
    }
    store.put(keys.report_key("monthly", "2026-11", "report", 2, "json"), json.dumps(judged).encode())
    for words in (
        ["list"],
        ["show"],
        ["show", "monthly"],
        ["show", "--json"],
        ["list", "--json"],
        ["show", "--report", ATTACK],
    ):
        cli.main([*words, "--config", filled])
        told = capsys.readouterr()
        assert not ESCAPES.search(told.out + told.err), words
        assert (told.out + told.err).strip()
    store.put(keys.report_key("monthly", "2026-11", "report", 3, "json"), b"[[[")
    assert cli.main(["show", "monthly", "--config", filled]) == 1
    assert "publish it again" in capsys.readouterr().err


@given(st.text())
def test_a_printable_text_has_no_control_characters_and_the_same_lines(text: str) -> None:
    shown = printable(text)
    assert not ESCAPES.search(shown)
    assert len(shown) == len(text)
    assert shown.count("\n") == text.count("\n")


@given(st.text(max_size=400), st.integers(0, 300))
def test_any_markdown_has_a_rendering_for_a_terminal(text: str, width: int) -> None:
    terminal.render(text, width)


def test_a_table_that_fits_is_aligned_and_a_wider_one_is_blocks() -> None:
    page = page_of("T", "Lead.", [Section(title="S", table=table("Name | A <b> column", [("a*b", "x|y"), ("c", "")]))])
    text = markdown.render(page).decode()
    wide = terminal.render(text, 80)
    assert "Name  A <b> column\n----  ------------\na*b   x|y\nc" in wide
    narrow = terminal.render(markdown.render(_wide()).decode(), 40)
    assert "  Second  " in narrow
    assert all(len(line) <= 46 for line in narrow.split("\n"))


def _wide() -> Page:
    rows = [("a", "long words that do not fit beside each other in forty columns")]
    return page_of("T", "L", [Section(title="S", table=table("First | Second", rows))])


# sentences


def test_no_sentence_is_about_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure that is missing is a cell that says so, or a sentence that is left out or another one."""
    nodes = ({"id": "n1", "price": 2000.0},)
    priced = msgspec.convert({"rack": "r", "store": Store(path="x"), "nodes": nodes}, AggregatorConfig)
    printed, paragraph = list[str](), layout.Sheet.p

    def noted(sheet: layout.Sheet, text: str, style: ParagraphStyle) -> object:
        printed.extend([text] if style in (layout.BODY, layout.HEADLINE) or len(text) > 60 else [])
        return paragraph(sheet, text, style)

    monkeypatch.setattr(layout.Sheet, "p", noted)
    kinds: list[list[Record]] = [
        [host()],
        [resident()],
        [engine()],
        [served()],
        [served(requests=0, outcome="failed")],
        [host(), engine(), resident()],
    ]
    november = month("2026-11", "UTC")
    for seen in (window(span=november), *(window(batch(records), span=november) for records in kinds)):
        for one in (CONFIG, priced):
            judged = judge(seen, None, one, T0 + 10**7)
            for _, page in weekly.artifacts(judged, "before").values():
                texts = [page.title, page.lead, page.foot, *(t for s in page.sections for t in (*s.text, *s.points))]
                assert [text for text in texts if wording.NO_DATA in text] == []
            pdf.render(judged)
    assert len(printed) > 50
    assert [text for text in printed if wording.NO_DATA in text] == []


@pytest.mark.parametrize(
    ("saving", "said"),
    [
        (0.5, "50.0 % less than it"),
        (-0.5, "50.0 % more than it"),
        (-186.571, "188 times as much as it"),
        (-1.4, "2.4 times as much as it"),
    ],
)
def test_a_comparison_is_said_as_people_say_it(saving: float, said: str) -> None:
    assert api_prices.against(saving, "it") == said
    assert ("costs" in wording.saved(saving)) == (saving < -1)


def test_a_plan_is_not_said_to_be_published_and_commands_are_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    intake, inventory, page = (tmp_path / name for name in ("intake.toml", "inventory.toml", "plan.html"))
    intake.write_text(
        '[[models]]\nname = "chat"\nweights_gb = 4.5\nkv_kib_per_tok = 144\n'
        '[[workloads]]\nmodel = "chat"\nqps = 0.05\nprompt_tok = 400\nanswer_tok = 100\n'
    )
    inventory.write_text('[[nodes]]\nid = "mini-1"\nchip = "M4"\nmemory_gb = 32\n')
    assert cli.main(["plan", "--intake", str(intake), "--inventory", str(inventory), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "agent.toml" in out
    assert "apply` publishes them" not in out
    assert "`" not in page.read_text()
    assert "<code>mlxrack-aggregator apply</code>" in page.read_text()


def test_backticks_are_code_in_html_and_nothing_else_is() -> None:
    page = page_of("t", "`a b` and `<b>` and `x", [Section(title="s", points=("`c-d`",))])
    text = html.render(page).decode()
    assert "<code>a b</code> and &#39;&lt;b&gt;&#39; and &#39;x" in text
    assert "<li><code>c-d</code></li>" in text


def test_defaults_are_the_last_complete_periods() -> None:
    assert last_week(NOW, "UTC") != THIS_WEEK
    assert last_month(NOW, "UTC") != f"{NOW:%Y-%m}"
