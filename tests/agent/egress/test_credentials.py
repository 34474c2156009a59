"""Keys at call time: looked up, held for minutes, shared by those who ask together, and never to be seen."""

import asyncio
import copy
import json
import logging
import pickle
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path

import pytest

from agent.egress.credentials import HELD_S, Credentials, Secret
from shared.errors import Halt
from tests.agent.egress.made import KEY


def test_a_secret_shows_nothing() -> None:
    secret = Secret(KEY)
    shown = [repr(secret), str(secret), f"{secret}", f"{secret:>40}", f"{secret!r}", "%s" % secret, "{}".format(secret)]  # noqa: UP031, UP032
    shown += [str([secret]), str({"key": secret}), str(vars(type(secret)))]
    record = logging.LogRecord("x", 0, "", 0, "%s %r", (secret, secret), None)
    assert KEY not in "".join([*shown, record.getMessage()])
    for keep in (pickle.dumps, copy.copy, copy.deepcopy, json.dumps):
        with pytest.raises(TypeError) as caught:
            keep(secret)
        assert KEY not in str(caught.value)
    assert not hasattr(secret, "__dict__")
    assert secret.reveal() == KEY


def test_a_traceback_with_locals_shows_nothing() -> None:
    def breaks(secret: Secret) -> None:
        raise ValueError("x")

    try:
        breaks(Secret(KEY))
    except ValueError as error:
        shown = "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
    assert "<Secret>" in shown
    assert KEY not in shown.replace(f"KEY = {KEY!r}", "")


class Keeper:
    """Counts look-ups, in which threads."""

    def __init__(self) -> None:
        self.asked = list[str]()
        self.threads = set[str]()
        self.value = KEY
        self.go = threading.Event()
        self.go.set()

    def __call__(self, reference: str, environ: Mapping[str, str]) -> str:
        self.asked.append(reference)
        self.threads.add(threading.current_thread().name)
        self.go.wait(60)
        return self.value


async def test_a_key_is_held_for_minutes_and_looked_up_in_a_thread() -> None:
    now, keeper = [0.0], Keeper()
    held = Credentials({}, look_up=keeper, clock=lambda: now[0])
    for at_s, asked in ((0, 1), (HELD_S - 1, 1), (HELD_S, 2), (HELD_S + 1, 2)):
        now[0] = at_s
        assert (await held.of("op://v/i/f")).reveal() == KEY
        assert len(keeper.asked) == asked
    held.drop("op://v/i/f")
    await held.of("op://v/i/f")
    assert len(keeper.asked) == 3
    assert threading.main_thread().name not in keeper.threads
    now[0] += HELD_S
    held._forget()
    assert held._held == {}
    held.close()


async def test_those_who_ask_together_share_one_look_up() -> None:
    keeper = Keeper()
    keeper.go.clear()
    held = Credentials({}, look_up=keeper)
    asking = [asyncio.ensure_future(held.of("keychain:x")) for _ in range(20)]
    await asyncio.sleep(0)
    asking[0].cancel()
    keeper.go.set()
    assert [one.reveal() for one in await asyncio.gather(*asking[1:])] == [KEY] * 19
    assert keeper.asked == ["keychain:x"]


@pytest.mark.parametrize("value", ["two words", "line\nbreak", "null\0", "ümlaut", "tab\there", "esc\x1b[0m"])
async def test_what_cannot_be_a_key_is_refused_without_showing_it(value: str) -> None:
    keeper = Keeper()
    keeper.value = value
    with pytest.raises(Halt) as caught:
        await Credentials({}, look_up=keeper).of("env:X")
    assert value not in str(caught.value)


@pytest.mark.parametrize("reference", ["env:X", "file:{}/key", "op://vault/item/field"])
async def test_nothing_secret_is_on_a_command_line(reference: str, tmp_path: Path) -> None:
    """`op` is a program here that records its arguments and what it could be asked for by `ps`."""
    seen, program, key = tmp_path / "seen", tmp_path / "op", tmp_path / "key"
    program.write_text(f'#!/bin/sh\ntr "\\0" " " < /proc/$$/cmdline >> {seen}\nprintf "%s" {KEY}\n')
    program.chmod(0o700)
    key.touch(0o600)
    key.write_text(KEY + "\n")
    token = "ops_marker-of-a-token"
    environ = {"X": KEY, "PATH": f"{tmp_path}:/usr/bin:/bin", "OP_SERVICE_ACCOUNT_TOKEN": token}
    found = await Credentials(environ).of(reference.format(tmp_path))
    assert found.reveal() == KEY
    arguments = seen.read_text() if seen.exists() else ""
    assert (reference in arguments) == reference.startswith("op://")
    assert KEY not in arguments
    assert token not in arguments
