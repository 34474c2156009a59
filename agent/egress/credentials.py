"""API keys of providers: resolved when they are needed, held for minutes, and never shown.

A key is in no configuration, log, exception, dump or command line: `op` and the keychain get the reference as an
argument and answer in a pipe (`shared.secrets`).
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import NoReturn

from agent.tasks import Lookups
from shared.errors import Halt
from shared.secrets import resolve

HELD_S = 300.0


class Secret:
    """A key. Whatever is made of it says nothing, except ``reveal``."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The key itself: for a header, and nothing else."""
        return self._value

    def __repr__(self) -> str:
        return "<Secret>"

    def __format__(self, _: str) -> str:
        return "<Secret>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("Secret: is not written anywhere")


class Credentials:
    """The keys that are held. ``look_up`` is shared.secrets.resolve."""

    def __init__(
        self,
        environ: Mapping[str, str],
        *,
        look_up: Callable[[str, Mapping[str, str]], str] = resolve,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._environ, self._look_up, self._clock = environ, look_up, clock
        self._held: dict[str, tuple[float, Secret]] = {}
        self._lookups = Lookups()

    async def of(self, reference: str) -> Secret:
        """The key behind a reference; those who ask at the same time share one look-up. Raises Halt."""
        self._forget()
        if (held := self._held.get(reference)) is not None:
            return held[1]
        value = await self._lookups.ask(reference, lambda: self._look_up(reference, self._environ))
        if not value.isascii() or not value.isprintable() or " " in value:
            raise Halt(
                f"secret {reference}: cannot be an API key; it holds more than printable letters", code="no_secret"
            )
        secret = Secret(value)
        self._held[reference] = (self._clock() + HELD_S, secret)
        # what nobody asks for any more is not held either
        asyncio.get_running_loop().call_later(HELD_S + 1, self._forget)
        return secret

    def drop(self, reference: str) -> None:
        """Forget a key that was not accepted: it may have been changed."""
        self._held.pop(reference, None)

    def close(self) -> None:
        """Forget all of them."""
        self._held.clear()

    def _forget(self) -> None:
        now_s = self._clock()
        self._held = {reference: held for reference, held in self._held.items() if now_s < held[0]}
