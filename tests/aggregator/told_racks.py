"""Racks on good and bad months, judged: what every report is read on."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import msgspec

from aggregator.annotations import Notes, read
from aggregator.calendar import DAY_MS, HOUR_MS, month
from aggregator.config import AggregatorConfig
from aggregator.judgements import Judged, judge
from aggregator.manifest import Manifest, Unread
from shared.batch import Batch
from shared.records import AgentStarted, ModelEvicted, Record, SwapFinished, ThrottleEvent
from tests.builders import MINUTE, T0, batch, engine, host, resident, served, window
from tests.made_rack import MadeModel, MadeRack, batches

NOVEMBER, OCTOBER = month("2026-11", "Europe/Berlin"), month("2026-10", "Europe/Berlin")
NOTES = """
[[incidents]]
node = "n1"
start = 2026-11-17T09:00:00+01:00
end = 2026-11-17T12:00:00+01:00
cause = "power"
text = "Zasilacz wyłączył się; ktoś odłączył kabel → patrz zgłoszenie №42."
fix = "電源ケーブルを交換しました"
[[incidents]]
node = "mini-9"
start = 2026-11-18T09:00:00+01:00
end = 2026-11-18T12:00:00+01:00
cause = "planned"
[[incidents]]
start = 2026-11-18T09:00:00
end = 2026-11-18T12:00:00
"""


def config(*nodes: str, price: float | None = 2000.0, **more: Any) -> AggregatorConfig:
    """A rack's configuration, with a comparison for ``chat`` and ``code``."""
    compare = [
        {"model": "chat", "same_as": "llama-3.1-8b-instruct", "frontier": "openai/gpt-4o"},
        {"model": "code", "same_as": "qwen3-32b"},
    ]
    tree = {
        "rack": "r",
        "store": {"path": "x"},
        "timezone": "Europe/Berlin",
        "nodes": [{"id": n, **({"price": price} if price is not None else {})} for n in nodes],
        "compare": compare,
        **more,
    }
    return msgspec.convert(tree, AggregatorConfig)


def made(nodes: int = 2, models: int = 2, **more: Any) -> MadeRack:
    """A made rack from October on, in hours."""
    named = ("chat", "code", *(f"model-{n:02d}-instruct-4bit" for n in range(2, models)))[:models]
    values: dict[str, Any] = {
        "nodes": tuple(f"n{n + 1}" for n in range(nodes)),
        "models": tuple(
            MadeModel(name=name, per_hour=300, nodes=(f"n{n % nodes + 1}",)) for n, name in enumerate(named)
        ),
        "since_ms": OCTOBER.since_ms,
        "window_ms": HOUR_MS,
        "faults": 0.8,
        **more,
    }
    return MadeRack(**values)


def reported(rack: MadeRack, until_ms: int = NOVEMBER.until_ms) -> Iterator[Batch]:
    """Everything that a rack reported until then."""
    for node in rack.nodes:
        yield from batches(rack, node, until_ms)


def judged(
    seen: Sequence[Batch],
    of: AggregatorConfig,
    now_ms: int = NOVEMBER.until_ms,
    notes: Notes | None = None,
    manifest: Manifest | None = None,
) -> Judged:
    """November, compared with October."""
    nodes = [node.id for node in of.nodes]
    now, before = (window(*seen, span=span, nodes=nodes) for span in (NOVEMBER, OCTOBER))
    return judge(now, before, of, now_ms, notes or Notes(), manifest)


def one_of_everything() -> list[Batch]:
    """A node with one of whatever is counted."""
    records: list[Record] = [
        *(served("chat", requests=1), served("chat", requests=1, outcome="failed")),
        *(engine("chat"), resident("chat"), host(throttled=0.5), ThrottleEvent(t_ms=T0, level="heavy")),
        ModelEvicted(t_ms=T0, model="code", version="v", reason="memory", requests_last_hour=1, bytes=10**9),
        SwapFinished(
            t_ms=T0, swap_id="s", model="chat", from_version="a", to_version="b", outcome="flipped", window_us=9
        ),
    ]
    back = AgentStarted(t_ms=T0 + 5 * MINUTE, version="0", previous="unclean")
    return [batch(records), batch([back, host()], minute=5, seq=1, epoch=2)]


@cache
def racks() -> dict[str, Judged]:
    """Every rack by what is the matter with it."""
    usual = list(reported(made()))
    dark_ms = NOVEMBER.since_ms + 10 * DAY_MS
    dark = [b for b in usual if not dark_ms <= b.t_end_ms < dark_ms + 36 * HOUR_MS]
    silent = [b for b in usual if b.node != "n2" or b.t_end_ms < dark_ms]
    noted_ms = NOVEMBER.since_ms + 16 * DAY_MS + 9 * HOUR_MS
    noted = [b for b in usual if b.node != "n1" or not noted_ms <= b.t_start_ms < noted_ms + 3 * HOUR_MS]
    quiet = [b for b in usual if b.t_end_ms < NOVEMBER.since_ms]
    idle = [batch([host(), resident("chat")], minute=n) for n in range(30)]
    two = config("n1", "n2")
    half = {f"2026-11-{day:02d}": 24 for day in range(1, 15)}
    lost = Manifest(
        quarantined_total=340,
        aside={**half, "2026-10-30": 3, "": 1},
        foreign=half,
        strangers={"raw/v1/node=n3": "office"},
        unread={"raw/v1/node=n2/i0001/e00000001/0000000001-0000000002.mpz": Unread(reason="500", since_ms=T0)},
        unknown_records=1,
        too_late=2,
    )
    big = made(50, 40, window_ms=6 * HOUR_MS)
    return {
        "usual": judged(usual, two),
        "first": judged([b for b in usual if b.t_end_ms >= NOVEMBER.since_ms], two),
        "partial": judged([b for b in usual if b.t_end_ms < dark_ms], two, dark_ms),
        "dark": judged(dark, two),
        "silent": judged(silent, two),
        "empty": judged(quiet, two),
        "zero": judged(idle, config("n1")),
        "one": judged(one_of_everything(), config("n1")),
        "unpriced": judged(usual, config("n1", "n2", price=None)),
        "dear": judged(usual, config("n1", "n2", price=90_000.0)),
        "notes": judged(noted, two, notes=read(NOTES.encode())),
        "half lost": judged([b for b in usual if b.t_end_ms >= dark_ms + 4 * DAY_MS], two, manifest=lost),
        "skewed": judged(list(reported(made(skewed=("n2",)))), two),
        "large": judged(list(reported(big, NOVEMBER.since_ms + 4 * DAY_MS)), config(*big.nodes)),
    }
