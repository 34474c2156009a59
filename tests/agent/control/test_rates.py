"""Rates from the bucket: the last good ones are kept, whatever the bucket holds or does."""

import asyncio
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.config import AgentConfig, Live
from agent.control.rates import EVERY_S, Rates
from agent.policy.rates import Rate
from shared import rates
from shared.errors import Retryable
from shared.keys import RATES
from shared.rates import ModelRate
from shared.store import ObjectStore
from shared.store_dir import DirectoryStore


def body(period: str = "2026-W47", rack: str = "r", price: str = "0.5") -> bytes:
    one = ModelRate(usd_per_mtok_in=Decimal(price), usd_per_mtok_out=Decimal(2))
    return rates.encode(rates.Rates(rack=rack, period=period, models={"chat": one}))


class World:
    """A bucket that can be away, and a clock."""

    def __init__(self, folder: Path) -> None:
        self.store, self.memory, self.now, self.opened = (
            DirectoryStore(folder / "bucket"),
            folder / "rates.json",
            0.0,
            0,
        )
        self.away = False
        self.live = Live(msgspec.convert({"node": {"id": "n1", "rack": "r"}}, AgentConfig))

    def open(self) -> ObjectStore:
        self.opened += 1
        if self.away:
            raise Retryable("the bucket is away")
        return self.store

    def rates(self) -> Rates:
        return Rates(self.live, self.open, self.memory, clock=lambda: self.now)


def tick(one: Rates) -> None:
    asyncio.run(one.tick())


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_rates_come_from_the_bucket_and_are_asked_for_seldom(world: World) -> None:
    one = world.rates()
    tick(one)
    assert one.of("chat") is None
    assert one.period == ""
    world.store.put(RATES, body())
    tick(one)
    assert one.of("chat") is None, "not yet again"
    world.now += EVERY_S
    tick(one)
    assert one.of("chat") == Rate(usd_per_mtok_in=Decimal("0.5"), usd_per_mtok_out=Decimal(2))
    assert one.of("unheard") is None
    assert one.period == "2026-W47"


BAD: list[bytes] = [b"", b"{", body(rack="another"), b"x" * (rates.MOST_BYTES + 1), body(price="-1")]


@pytest.mark.parametrize("bad", BAD)
def test_the_last_good_ones_are_kept(world: World, bad: bytes) -> None:
    one = world.rates()
    world.store.put(RATES, body())
    tick(one)
    known = one.of("chat")
    world.store.put(RATES, bad)
    world.now += EVERY_S
    tick(one)
    assert one.of("chat") == known is not None
    world.store.delete(RATES)
    world.now += EVERY_S
    tick(one)
    assert one.of("chat") == known
    world.store.put(RATES, body("2026-W48", price="9"))
    world.now += EVERY_S
    tick(one)
    assert one.of("chat") != known


def test_a_start_without_the_bucket_has_what_was_known(world: World) -> None:
    world.store.put(RATES, body())
    tick(world.rates())
    world.away = True
    again = world.rates()
    tick(again)
    assert again.of("chat") is not None
    world.away = False
    world.now += EVERY_S
    tick(again)
    assert world.opened == 3, "the bucket is opened anew after it failed"


@pytest.mark.parametrize("kept", [b"", b"{}", body(rack="another"), b"[" * 100_000])
def test_a_file_that_cannot_be_used_is_none(world: World, kept: bytes) -> None:
    world.memory.write_bytes(kept)
    world.away = True
    one = world.rates()
    tick(one)
    assert one.of("chat") is None
    world.away = False
    world.store.put(RATES, body())
    one = world.rates()
    tick(one)
    assert one.of("chat") is not None
    assert rates.parse(world.memory.read_bytes()).period == "2026-W47"


def test_a_disk_that_refuses_the_file_costs_nothing_but_the_file(world: World, monkeypatch: Any) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("agent.control.rates.write_whole", full)
    world.store.put(RATES, body())
    one = world.rates()
    tick(one)
    assert one.of("chat") is not None


amounts = st.decimals(0, 1000, places=6)
tokens = st.integers(0, 10**7)


@given(amounts, amounts, tokens, tokens, tokens)
def test_a_price_is_rounded_up_and_never_negative(
    into: Decimal, out: Decimal, prompt: int, cached: int, done: int
) -> None:
    rate = Rate(usd_per_mtok_in=into, usd_per_mtok_out=out)
    exact = max(0, prompt - cached) * into + done * out
    assert 0 <= rate.usd_micro(prompt, done, cached) - exact < 1


def test_a_request_of_a_million_tokens_costs_the_rates() -> None:
    rate = Rate(usd_per_mtok_in=Decimal("0.5"), usd_per_mtok_out=Decimal(2), usd_per_mtok_cached=Decimal("0.1"))
    assert rate.usd_micro(1_000_000, 1_000_000) == 2_500_000
    assert rate.usd_micro(1_000_000, 0, 400_000) == 340_000
