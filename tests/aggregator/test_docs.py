"""The examples in docs/tables.md, run over tables that the aggregator wrote."""

import re
from pathlib import Path

import duckdb
import pytest

from aggregator import load
from aggregator.calendar import month
from aggregator.commands import rollup
from aggregator.config import AggregatorConfig
from shared import keys
from shared.batch import seal
from shared.bucket import Store
from shared.ids import NodeId
from shared.sketch import RELATIVE_ERROR
from shared.store_dir import DirectoryStore
from tests.made_rack import HOUR_MS, MadeModel, MadeRack, batches

TEXT = Path(__file__).parents[2].joinpath("docs/tables.md").read_text()
SINCE_MS = 1_793_577_600_000


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bucket")
    store = DirectoryStore(folder)
    rack = MadeRack(
        models=(MadeModel(name="a", per_hour=90), MadeModel(name="b", per_hour=40)),
        since_ms=SINCE_MS,
        window_ms=HOUR_MS,
    )
    for node in rack.nodes:
        made = list(batches(rack, node, SINCE_MS + 72 * HOUR_MS))
        key = keys.RawKey(NodeId(node), 1, 1, made[0].seq, made[-1].seq)
        store.put(keys.batch_key(key), seal(made))
    rollup.run(AggregatorConfig(rack="r", store=Store(path=str(folder))), store)
    return folder


def test_duckdb_results_match_the_reports(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bucket)
    (block,) = re.findall(r"```sql\n(.*?)```", TEXT, re.DOTALL)
    first, second = (query for query in block.split(";") if query.strip())
    window = load.window(DirectoryStore(bucket), month("2026-11", "UTC"))
    sums = {
        model: (
            sum(s.requests for s in window.served if s.model == model and s.outcome == "ok"),
            sum(s.completion_tok for s in window.served if s.model == model and s.outcome == "ok"),
        )
        for model in ("a", "b")
    }
    with duckdb.connect() as db:
        assert {model: tuple(rest) for model, *rest in db.execute(first).fetchall()} == sums
        found = dict(db.execute(second).fetchall())
    for model in ("a", "b"):
        (whole, *others) = [x.sketch("itl_us") for x in window.latencies if x.model == model and x.outcome == "ok"]
        for one in others:
            whole.merge(one)
        said = whole.quantile(0.95)
        assert said is not None
        assert abs(found[model] - said) <= 2 * RELATIVE_ERROR * said


def test_polars_reads_the_same_tables(
    bucket: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(bucket)
    code = re.findall(r"```python\n(import polars.*?)```", TEXT, re.DOTALL)[0]
    exec(code, {})
    out = capsys.readouterr().out
    window = load.window(DirectoryStore(bucket), month("2026-11", "UTC"))
    for model in ("a", "b"):
        assert str(sum(s.requests for s in window.served if s.model == model and s.outcome == "ok")) in out


def test_every_table_is_described() -> None:
    from aggregator.tables import HOUR_TABLES

    for name in HOUR_TABLES:
        assert f"`{name}`" in TEXT, name
