"""Usage per key and class; what other places answered is in no figure of the rack."""

import csv
import io
import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator import cost, load, parquet, rollup, tables
from aggregator.calendar import DAY_MS
from aggregator.config import AggregatorConfig
from aggregator.judgements import judge
from aggregator.report import html, markdown, pdf
from aggregator.report.pages import usage as usage_page
from aggregator.usage import KeyUsage
from shared.batch import Batch
from shared.records import Record, Served
from tests.builders import DAY, MINUTE, T0, batch, engine, host, pdf_text, resident, served, window

OUTCOMES = ("ok", "failed", "cancelled", "refused")
CONFIG = msgspec.convert(
    {"rack": "r", "store": {"path": "x"}, "nodes": [{"id": "n1", "price": 1399.0, "watts": 40.0}]}, AggregatorConfig
)


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a document with its path; rows of usage are known by whose they are."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{path}/{key}")
    elif isinstance(tree, list):
        for place, one in enumerate(tree):
            name = f"{one['key_id']} {one['task_class']}" if isinstance(one, dict) and "task_class" in one else place
            yield from leaves(one, f"{path}/{name}")
    else:
        yield path, tree


OF_CLIENTS = (
    *("/volume/elsewhere", "/volume/failed", "/volume/refused", "/volume/cancelled", "/figures/failed"),
    *("/figures/refused", "/figures/request_share", "/uptime/request", "/uptime/refused", "/cost/keys", "/cost/places"),
    *("/headline", "/scorecard", "/recommendations"),  # sentences and the promise of availability
)
"""What requests that another place had may change. Nothing else."""


@st.composite
def elsewhere(draw: st.DrawFn) -> Served:
    """What a place had, as like the rack's own work as can be."""
    return served(
        draw(st.sampled_from("abz")),
        worker=draw(st.sampled_from(("", "n1", "n2"))),
        version=draw(st.sampled_from(("", "v1"))),
        requests=draw(st.integers(0, 10**6)),
        key_id=draw(st.sampled_from(("", "k", "other"))),
        task_class=draw(st.sampled_from(("", "ROUTINE"))),
        outcome=draw(st.sampled_from(OUTCOMES)),
        finish=draw(st.sampled_from(("", "stop", "length", "capacity", "limit", "request"))),
        place=draw(st.sampled_from(("hosted", "ollama"))),
        place_category=draw(st.sampled_from(("premises", "outside", "", "moon"))),
        usd_micro=draw(st.integers(0, 10**12)),
        prompt_bucket_tok=1_000,
        ttft_us=served().ttft_us,
        itl_us=served().itl_us,
        total_us=served().total_us,
    )


def rack(more: tuple[Record, ...] = ()) -> list[Batch]:
    """A rack with two models and some trouble, for two hours."""
    return [
        batch(
            [
                served("a", key_id="k", task_class="ROUTINE", requests=5 + minute, cached_tok=100),
                served("b", version="v2", worker="n2", requests=3),
                served("a", outcome="failed", worker="", requests=1, completion_tok=0),
                Served(model="b", outcome="refused", finish="limit", requests=2, key_id="k"),
                *(engine("a", busy_s=20), resident("a"), host()),
                *(more if minute == 60 and node == "n1" else ()),
            ],
            node=node,
            minute=minute,
        )
        for node in ("n1", "n2")
        for minute in range(0, 120, 20)
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(elsewhere(), min_size=1, max_size=5))
def test_what_another_place_answered_changes_no_figure_of_the_rack(more: list[Served]) -> None:
    now_ms = T0 + DAY_MS
    without, with_ = (
        dict(leaves(json.loads(msgspec.json.encode(judge(window(*made), None, CONFIG, now_ms)))))
        for made in (rack(), rack(tuple(more)))
    )
    changed = {path for path in without.keys() | with_.keys() if without.get(path) != with_.get(path)}
    assert not [path for path in changed if not path.startswith(OF_CLIENTS)]
    kept = ("requests", "prompt_tok", "cached_tok", "completion_tok", "busy_s", "busy_share", "cost")
    theirs = {"premises_requests", "outside_requests", "provider_usd"}
    for path in (path for path in changed if path.startswith("/cost/keys")):
        if path in without and (name := path.rpartition("/")[2]) in kept:
            pytest.fail(f"{name} of a key changed")
        assert path not in without or name in theirs or name.startswith(("failed", "cancelled", "refused")), path


def test_a_key_s_row_tells_its_work_its_refusals_and_what_left() -> None:
    records: list[Record] = [
        served("a", key_id="k", task_class="ROUTINE", requests=3, cached_tok=60),
        served("a", key_id="k", task_class="ROUTINE", requests=1, outcome="cancelled"),
        served("a", key_id="k", task_class="REASONING", requests=4),
        Served(model="a", key_id="k", task_class="ROUTINE", outcome="refused", finish="limit", requests=7),
        Served(model="a", key_id="k", task_class="ROUTINE", outcome="refused", finish="capacity", requests=5),
        Served(model="a", key_id="k", task_class="ROUTINE", outcome="refused", finish="request", requests=4),
        Served(model="a", key_id="k", task_class="ROUTINE", outcome="refused", requests=2),
        Served(
            model="a",
            key_id="k",
            task_class="ROUTINE",
            place="hosted",
            place_category="outside",
            requests=2,
            prompt_tok=50,
            completion_tok=9,
            usd_micro=1_250_000,
        ),
        Served(model="a", key_id="k", task_class="ROUTINE", place="hosted", requests=1, outcome="failed", usd_micro=1),
        Served(model="a", key_id="k", task_class="ROUTINE", place="ollama", place_category="premises", requests=6),
        *(engine("a", busy_s=30), host()),
    ]
    report = cost.compute(window(batch(records)), CONFIG)
    reasoning, routine = report.keys
    assert routine == KeyUsage(
        key_id="k",
        task_class="ROUTINE",
        requests=3,
        prompt_tok=400,
        cached_tok=60,
        completion_tok=40,
        busy_s=15.0,
        busy_share=0.5,
        cost=routine.cost,
        failed=1,
        cancelled=1,
        refused_capacity=5,
        refused_limit=7,
        refused_request=4,
        refused_unsaid=2,
        premises_requests=6,
        outside_requests=3,
        provider_usd=Decimal("1.250001"),
    )
    assert routine.cost is not None
    assert reasoning.cost is not None
    assert abs(routine.cost - reasoning.cost) <= Decimal("0.000001"), "the last part takes the remainder"
    hosted, ollama = report.places
    assert (hosted.place, hosted.category, hosted.requests, hosted.answered) == ("hosted", "outside", 3, 2)
    assert (hosted.prompt_tok, hosted.completion_tok, hosted.usd) == (50, 9, Decimal("1.250001"))
    assert (ollama.category, ollama.answered, int(ollama.usd)) == ("premises", 6, 0)
    for page in (markdown.render(usage_page.page(report, "r")), html.render(usage_page.page(report, "r"))):
        assert b"3 requests left the premises, for 1.25 USD" in page


def test_requests_of_other_places_count_for_availability_and_in_no_volume_of_the_rack() -> None:
    other = {"place": "hosted", "place_category": "outside", "worker": ""}
    records: list[Record] = [
        *(served("a", requests=6), engine("a"), host()),
        *(served("a", requests=3, **other), served("a", requests=1, outcome="failed", **other)),
        served("a", requests=2, outcome="refused", finish="capacity", **other),
    ]
    judged = judge(window(batch(records)), None, CONFIG, T0 + DAY_MS)
    assert (judged.uptime.requests_ok, judged.uptime.requests_bad) == (9, 3)
    assert judged.uptime.request_share == 0.75
    assert (judged.volume.requests, judged.volume.elsewhere) == (6, 3)
    assert (judged.volume.failed, judged.volume.refused) == (1, 2)
    assert [day.requests for day in judged.volume.days] == [6]
    assert "3 answered by other places" in " ".join(pdf_text(pdf.render(judged)).split())


def test_the_csv_has_the_figures_of_the_json_and_no_formula() -> None:
    records: list[Record] = [
        served("a", key_id="=cmd", task_class="ROUTINE"),
        served("a", key_id="k"),
        engine("a"),
        host(),
    ]
    report = cost.compute(window(batch(records)), CONFIG)
    rows = list(csv.DictReader(io.StringIO(usage_page.export(report).decode())))
    assert [row["key_id"] for row in rows] == ["'=cmd", "k"]
    for row, one in zip(rows, report.keys, strict=True):
        assert int(row["requests"]) == one.requests
        assert Decimal(row["cost"]) == one.cost
        assert row["period"] == DAY.name
    assert "x_SoFarUntil" in usage_page.export(report, T0).decode().partition("\n")[0]
    assert len(usage_page.export(cost.compute(window(), CONFIG)).splitlines()) == 1


def test_tables_from_before_there_were_places_are_read_as_the_rack_s(tmp_path: Path) -> None:
    """Minute and hour files that older versions wrote lack the columns."""
    new = ("place", "place_category", "usd_micro", "task_class")
    with parquet.Database() as db:
        meta = parquet.meta_json({**dict.fromkeys(tables.META, 0), "node": "n1", "t_end_ms": T0 + MINUTE})
        rows = [parquet.row_json(meta, n, served(requests=n + 1)) for n in range(2)]
        path = db.file("rows.json", b"\n".join(rows))
        minute = parquet.merged(db, "served", [path], None)
        older = db.parquet(f"SELECT * EXCLUDE ({', '.join(new[:3])}) FROM ({parquet.reading([db.file('m', minute)])})")
        file = db.file("older.parquet", older)
        columns = tables.minute_columns("served")
        fold = tables.FOLDS["served"]
        lifted = rollup.lifted(fold, parquet.reading([file], columns))
        found = db.rows(rollup.folded(fold, lifted, None))
        assert [(row["place"], row["requests"], row["usd_micro"]) for row in found] == [("", 3, 0)]
        # an hour table of an older version beside one of this version
        hour = db.parquet(rollup.folded(fold, lifted, 3_600_000))
        old_hour = db.parquet(f"SELECT * EXCLUDE ({', '.join(new[:3])}) FROM ({parquet.reading([db.file('h', hour)])})")
        both = parquet.reading([db.file("h1", old_hour), db.file("h2", hour)], tables.folded_columns(fold))
        kept = db.rows(f"SELECT * FROM ({rollup.folded(fold, both, None)}) WHERE {load._HERE}")
        assert sum(row["requests"] for row in kept) == 6
