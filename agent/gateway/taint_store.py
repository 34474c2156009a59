"""What this node knows of SENSITIVE messages: marks in memory and on disk, and the keys that they are made with."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path

from agent.gateway.taint_file import Found, TaintFile
from agent.mesh.peers import Held
from agent.policy.taint import BUCKETS, KEY_BYTES, LOST, Marks, split
from shared.errors import RackError

_AT_ONCE = 1000
"""Marks that are taken in one go, which is about a millisecond."""


class Grouped:
    """Runs one thing at a time; whoever comes while it runs has the next run, together with all others that come."""

    def __init__(self, run: Callable[[], Awaitable[None]]) -> None:
        self._run, self._next = run, list[asyncio.Future[None]]()
        self._task: asyncio.Task[None] | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing runs or is due."""
        return self._task is None

    def due(self) -> asyncio.Future[None]:
        """Done when a run that began after this call has ended."""
        if not self._next:
            self._next.append(asyncio.get_running_loop().create_future())
        if self._task is None:
            self._task = asyncio.create_task(self._all())
        return self._next[0]

    async def end(self) -> None:
        """Wait for what is due."""
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    async def _all(self) -> None:
        try:
            while self._next:
                done = self._next.pop()
                try:
                    await self._run()
                finally:
                    if not done.done():  # whoever waited may have gone
                        done.set_result(None)
        finally:
            self._task = None


class TaintStore:
    """Marks and keys of this node. ``most`` is how many marks it may hold; ``first_key`` the key to begin with, b"" for
    a random one. ``problem`` is why the marks of an earlier run are incomplete, ``unsaved`` why the last ones could not
    be written; "" while all is well."""

    def __init__(self, folder: Path, first_key: Callable[[], bytes], most: Callable[[], int]) -> None:
        self.marks, self.keys = Marks(), tuple[bytes, ...]()
        self.loaded = asyncio.Event()
        self.problem = self.unsaved = ""
        self._file, self._first_key, self._most = TaintFile(folder), first_key, most
        self._waiting: list[bytes] = []
        self._keys_due = False
        self._lock = asyncio.Lock()
        self._saving = Grouped(self._save)

    @property
    def full(self) -> bool:
        """Whether marks were left out, or the next ones would be."""
        return len(self.marks) >= self._most() or LOST in self.marks

    def held(self) -> Held:
        """What peers are told."""
        return Held(marks=len(self.marks), digest=self.marks.digest, loading=not self.loaded.is_set())

    async def load(self) -> None:
        """Read what was known; whatever comes of it, marks can be taken afterwards."""
        first = self._first_key()
        async with self._lock:
            try:
                found = await asyncio.to_thread(self._file.read, first)
            except (OSError, RackError) as error:
                why = error.message if isinstance(error, RackError) else error.strerror or type(error).__name__
                self.problem = f"cannot be read: {why}"
                # what is seen from now on can still be told to the others
                found = Found((first or secrets.token_bytes(KEY_BYTES),), Marks(), 0)
            if found.damaged:
                self.problem = f"{found.damaged} records are damaged"
        told, keys, self._waiting = self._waiting, self.keys, []
        self.marks, self.keys = found.marks, found.keys
        self.take(told)
        self.learn(keys)
        self.loaded.set()

    def take(self, marks: Iterable[bytes], *, own: bool = False) -> list[bytes]:
        """Add marks; returns those that were not here. Marks of our own that do not fit leave LOST, so that it is known
        for good, and everywhere, that some are missing; a peer's are known to that peer."""
        fresh = []
        for one in marks:
            if one in self.marks:
                continue
            if len(self.marks) >= self._most() and one != LOST:
                if not own or LOST in self.marks:
                    continue
                one = LOST
            self.marks.add(one)
            fresh.append(one)
        self._waiting += fresh
        return fresh

    async def take_many(self, marks: Sequence[bytes], *, own: bool = False) -> list[bytes]:
        """As ``take``; others have their turn in between."""
        fresh = self.take(marks[:_AT_ONCE], own=own)
        for at in range(_AT_ONCE, len(marks), _AT_ONCE):
            await asyncio.sleep(0)
            fresh += self.take(marks[at : at + _AT_ONCE], own=own)
        return fresh

    def learn(self, keys: Iterable[bytes]) -> None:
        """Recognise the marks made with a peer's keys, too. Ours stay first: what we mark is marked with that."""
        fresh = [key for key in dict.fromkeys(keys) if len(key) == KEY_BYTES and key not in self.keys]
        self.keys, self._keys_due = (*self.keys, *fresh), self._keys_due or bool(fresh)

    def saved(self) -> Sequence[asyncio.Future[None]]:
        """What to wait for until everything taken so far is on the drive, or known not to be."""
        due = self._waiting or self._keys_due or not self._saving.idle
        return (self._saving.due(),) if due and self.loaded.is_set() else ()

    async def clear(self) -> int:
        """Forget all marks; returns how many. Raises OSError."""
        await self.loaded.wait()
        # at once: what is taken from here on is not forgotten
        before, self.marks, self._waiting = self.marks, Marks(), []
        async with self._lock:
            try:
                await asyncio.to_thread(self._file.clear)
                await asyncio.to_thread(self._file.keep_keys, self.keys)
            except OSError:
                self.take(one for number in range(BUCKETS) for one in split(before.bucket(number)))
                raise
            self.problem = self.unsaved = ""
        self.saved()
        return len(before)

    async def close(self) -> None:
        """Write what is due, and close the file."""
        if self.loaded.is_set():
            self.saved()
        await self._saving.end()
        async with self._lock:
            self._file.close()

    async def _save(self) -> None:
        async with self._lock:
            waiting, keys = self._waiting, self.keys if self._keys_due else ()
            batch = waiting[:]
            try:
                if keys:
                    await asyncio.to_thread(self._file.keep_keys, keys)
                    self._keys_due = self.keys != keys
                if batch:
                    await asyncio.to_thread(self._file.append, batch)
            except OSError as error:
                self.unsaved = error.strerror or type(error).__name__
                return
            del waiting[: len(batch)]
            self.unsaved = ""
