"""One loader child: start it, ask it over a Unix socket, end it, know why it ended."""

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Literal

import msgspec

from agent.process.pace import Pace
from agent.process.prefixes import MOST_BLOCKS, PrefixTable, Text
from agent.process.workload import Throughput
from agent.wire.answer_queue import AnswerQueue
from agent.wire.frames import (
    Accepted,
    Answer,
    Ask,
    Cancel,
    Decoder,
    Done,
    Embedded,
    Failed,
    Frame,
    LoadFailed,
    Ready,
    Relieve,
    Report,
    Reported,
    Stop,
    Tokens,
    Waits,
    Working,
    encode,
)
from shared.errors import Refused, Retryable

START_TIMEOUT_S = 600.0
_PASSED_ON = ("PATH", "HOME", "XDG_CACHE_HOME", "CC", "CXX", "TMPDIR", "LANG", "LC_ALL", "SSL_CERT_FILE")
"""The only variables a loader sees: no secret of the daemon's environment reaches it."""


class LoaderSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How to start a loader: its arguments, how many BLAS threads it may use, how many requests it decodes
    together, after how many silent seconds with work to do it is ended, and a secret that it reads from its standard
    input."""

    arguments: tuple[str, ...]
    threads: int = 1
    rows: int = 8
    keeps_prompts: bool = True
    stuck_s: float = 60.0
    secret: str = ""


def environment(environ: Mapping[str, str], threads: int) -> dict[str, str]:
    """The child's environment."""
    kept = {name: environ[name] for name in _PASSED_ON if name in environ}
    return {
        **kept,
        "OPENBLAS_NUM_THREADS": str(threads),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def exit_cause(code: int | None) -> str:
    """An exit status in words: "signal 9 (SIGKILL)" or "exit 3"."""
    if code is None:
        return "still running"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"signal {-code} ({signal.Signals(-code).name})"
        return f"signal {-code}"
    return f"exit {code}"


class LoaderProcess:
    """A running loader. ``in_flight`` counts requests that use it; ``ended`` is set when the process is gone."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        spec: LoaderSpec,
    ) -> None:
        self._process = process
        self._reader, self._writer = reader, writer
        self._open: dict[int, AnswerQueue] = {}
        self._ids = itertools.count(1)
        self._reports: list[Reported] = []
        self._reported = asyncio.Event()
        self._ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._stderr_tail = b""
        self._tasks: list[asyncio.Task[None]] = []
        self.in_flight = 0
        self.stopping = False
        self._broken = False
        self._heard_s = 0.0
        self._unanswered: dict[int, float] = {}
        self._owed: set[int] = set()
        self.ended = asyncio.Event()
        self.ready: Ready | None = None
        self.working: Working | None = None
        self.pace = Pace()
        self.throughput = Throughput(spec.rows)
        self.prefixes = PrefixTable(MOST_BLOCKS if spec.keeps_prompts else 0)
        self._last_s: dict[int, float] = {}

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    @property
    def usable(self) -> bool:
        """False from the moment it is known to be gone, which is before the system has said how it ended."""
        return not self._broken and not self.ended.is_set()

    @property
    def silent_s(self) -> float:
        """For how long it has said nothing although requests wait for it, or has not even taken one of them in."""
        now = time.monotonic()
        silent = now - self._heard_s if self._owed else 0.0
        return max([silent, *(now - since for since in self._unanswered.values())])

    @property
    def cause(self) -> str:
        """Why it ended, in words."""
        return exit_cause(self._process.returncode)

    @classmethod
    async def start(cls, spec: LoaderSpec, environ: Mapping[str, str]) -> "LoaderProcess":
        """Spawn and wait until the model is in memory and warm. Raises Refused with the loader's reason."""
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise Retryable(f"start loader: the system gives no socket ({why})", code="no_process") from None
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "agent.loader",
                "--fd",
                str(theirs.fileno()),
                *spec.arguments,
                pass_fds=(theirs.fileno(),),
                env=environment(environ, spec.threads),
                stdin=asyncio.subprocess.PIPE if spec.secret else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
            )
        except OSError as error:
            ours.close()
            why = error.strerror or type(error).__name__
            raise Retryable(f"start loader: the system starts no process ({why})", code="no_process") from None
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        if process.stdin is not None:
            # neither arguments nor environment: both can be read by others
            process.stdin.write(spec.secret.encode())
            process.stdin.close()
        reader, writer = await asyncio.open_connection(sock=ours)
        loader = cls(process, reader, writer, spec)
        loader._tasks = [
            asyncio.create_task(loader._read()),
            asyncio.create_task(loader._read_stderr()),
            asyncio.create_task(loader._end_when_stuck(spec.stuck_s)),
        ]
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                loader.ready = await loader._ready
        except BaseException as error:
            loader.kill()
            await loader.ended.wait()
            if isinstance(error, TimeoutError):
                raise Refused(f"start loader: not ready after {START_TIMEOUT_S:.0f} s", code="bad_model") from None
            raise
        return loader

    async def generate(self, request: Ask, text: Text | None = None) -> AsyncGenerator[Answer, None]:
        """Answers to one request, which ``text`` describes for the books. Leaving early cancels it. Raises Retryable
        when the loader is lost."""
        number = next(self._ids)
        answers = AnswerQueue()
        if not self._owed:
            self._heard_s = time.monotonic()
        self._open[number] = answers
        self._owed.add(number)
        self._unanswered[number] = time.monotonic()
        self.throughput.begin(number, text.prompt_tok if text else 0)
        finished = False
        try:
            await self._send(msgspec.structs.replace(request, id=number))
            while not finished:
                answer = await answers.get()
                if answer is None:
                    raise Retryable(f"the loader ended ({self.cause})", code="worker_lost")
                finished = isinstance(answer, Done | Failed)
                if text is not None and isinstance(answer, Accepted):
                    self.prefixes.took(text, answer.cached_tok)
                yield answer
        finally:
            del self._open[number]
            self._owed.discard(number)
            self.throughput.end(number)
            self._unanswered.pop(number, None)
            self._last_s.pop(number, None)
            if not finished and not self.ended.is_set():
                with contextlib.suppress(ConnectionError, RuntimeError):
                    self._writer.write(encode(Cancel(id=number)))

    async def report(self) -> Reported | None:
        """What the engine did since the last report; None when it says nothing more, or not in time.

        An answer that came too late for the last call is added to this one, so that nothing is counted late for ever.
        Nothing is taken before the last await: who gives up meanwhile leaves everything to who asks next.
        """
        self._reported.clear()
        # one that is gone may have answered before
        with contextlib.suppress(Retryable):
            await self._send(Report())
            answers = [asyncio.create_task(event.wait()) for event in (self._reported, self.ended)]
            try:
                await asyncio.wait(answers, timeout=30, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in answers:
                    task.cancel()
        found, self._reports = self._reports, []
        return total_of(found) if found else None

    async def relieve(self, level: Literal["calm", "soft", "hard"]) -> None:
        """Tell the engine that memory is short, or no longer. One that is gone needs no relief."""
        with contextlib.suppress(Retryable):
            await self._send(Relieve(level=level))

    async def stop(self, grace_s: float) -> None:
        """End it: ask, wait at most ``grace_s`` seconds, then kill. Returns when the process is gone."""
        self.stopping = True
        with contextlib.suppress(Retryable):
            await self._send(Stop())
        try:
            async with asyncio.timeout(grace_s):
                await self.ended.wait()
        except TimeoutError:
            self.kill()
            await self.ended.wait()

    def kill(self) -> None:
        """SIGKILL; no error when it is gone."""
        self.stopping = True
        self._end()

    def _end(self) -> None:
        """SIGKILL. Not by the process object, which would look first whether it has ended and take its exit status
        away from who waits for it; while nobody has that, the id is nobody else's."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)

    async def _send(self, frame: Frame) -> None:
        if self.ended.is_set():
            raise Retryable(f"the loader ended ({self.cause})", code="worker_lost")
        try:
            self._writer.write(encode(frame))
            await self._writer.drain()
        except (ConnectionError, RuntimeError):
            self._broken = True
            raise Retryable("the loader is gone", code="worker_lost") from None

    async def _read(self) -> None:
        decoder = Decoder()
        try:
            while chunk := await self._reader.read(1 << 16):
                for frame in decoder.feed(chunk):
                    self._take(frame)
        except (ConnectionError, Refused):
            # a loader that speaks no frames is of no use; its end is unwanted, so this is no `kill` of ours
            self._end()
        self._broken = True
        await self._process.wait()
        self.ended.set()
        if not self._ready.done():
            died = (self._process.returncode or 0) < 0
            self._ready.set_exception(Refused(self._start_failure(), code="loader_died" if died else "bad_model"))
            self._ready.exception()
        for answers in self._open.values():
            answers.put(None)
        self._writer.close()

    def _take(self, frame: Frame) -> None:
        if not isinstance(frame, Reported):  # one that is stuck may still count
            self._heard_s = time.monotonic()
        if isinstance(frame, Accepted | Tokens | Embedded | Done | Failed):
            self._unanswered.pop(frame.id, None)
            if isinstance(frame, Done | Failed):
                self._owed.discard(frame.id)  # whoever reads slowly, the engine is done with it
            if frame.id in self._open:
                self._open[frame.id].put(frame)
            self._measure(frame)
        elif isinstance(frame, Working):
            self.working = frame
            self.throughput.worked(time.monotonic(), frame)
            for number in self._open.keys() & set(frame.waits):
                self._open[number].put(Waits(id=number))
        elif isinstance(frame, Reported):
            self._reports.append(frame)
            self._reported.set()
        elif isinstance(frame, Ready) and not self._ready.done():
            self._ready.set_result(frame)
        elif isinstance(frame, LoadFailed) and not self._ready.done():
            self._ready.set_exception(Refused(frame.message, code=frame.code))
            self._ready.exception()

    def _measure(self, frame: Answer) -> None:
        """What an answer says of the loader's work and speed."""
        if isinstance(frame, Tokens):
            self._note_gap(frame)
        elif isinstance(frame, Accepted):
            self.throughput.accepted(frame.id, frame.prompt_tok, frame.cached_tok)
        elif isinstance(frame, Done):
            self.throughput.done(time.monotonic(), frame.id, frame.completion_tok)

    def _note_gap(self, frame: Tokens) -> None:
        now, number = time.monotonic(), frame.id
        if number in self._last_s:
            self.pace.gap(now, now - self._last_s[number])
        else:
            self.throughput.token(number)
        if number in self._open:
            self._last_s[number] = now

    async def _end_when_stuck(self, limit_s: float) -> None:
        """A loader that has work and is silent is of no use; its end is unwanted, so this is no `kill` of ours."""
        while not self.ended.is_set():
            if self.silent_s > limit_s:
                self._end()
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(1.0, limit_s / 4)):
                    await self.ended.wait()

    async def _read_stderr(self) -> None:
        """Keep the end of what it says while it starts; later lines might quote a request and are dropped."""
        assert self._process.stderr is not None
        while chunk := await self._process.stderr.read(4096):
            if not self._ready.done():
                self._stderr_tail = (self._stderr_tail + chunk)[-2000:]

    def _start_failure(self) -> str:
        lines: Sequence[str] = self._stderr_tail.decode(errors="replace").strip().splitlines()
        said = f": {lines[-1][:300]}" if lines else ""
        return f"start loader: it ended before it was ready ({self.cause}){said}"


_PEAKS = ("queue_max", "kv_peak_bytes", "peak_bytes")
_LEVELS = (*_PEAKS, "cache_bytes", "disk_bytes", "active_bytes")


def total_of(reports: Sequence[Reported]) -> Reported:
    """Several windows as one: counts add up, levels take the last, peaks the highest."""
    total = reports[-1]
    for earlier in reports[:-1]:
        counts = {
            name: getattr(total, name) + getattr(earlier, name)
            for name in Reported.__struct_fields__
            if name not in _LEVELS
        }
        peaks = {name: max(getattr(total, name), getattr(earlier, name)) for name in _PEAKS}
        total = msgspec.structs.replace(total, **peaks, **counts)
    return total
