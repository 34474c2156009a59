"""One loader child process: start it, send requests over a Unix socket, end it, and report why it ended."""

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from typing import Literal

import msgspec

from agent.process.pace import Pace
from agent.process.prefixes import MOST_BLOCKS, PrefixTable, Text
from agent.process.preparation import size_bytes
from agent.process.watch import Watch
from agent.process.workload import Throughput
from agent.wire.answer_queue import AnswerQueue
from agent.wire.frames import (
    Accepted,
    Answer,
    Ask,
    Calibrate,
    Calibrated,
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
from agent.wire.progress import Progress
from shared.errors import Refused, Retryable

START_TIMEOUT_S = 600.0
_PASSED_ON = ("PATH", "HOME", "XDG_CACHE_HOME", "CC", "CXX", "TMPDIR", "LANG", "LC_ALL", "SSL_CERT_FILE")
"""The only variables that a loader inherits: no secret in the daemon's environment reaches it."""

_HINTS = ("note:", "= note:", "help:", "= help:", "hint:", "stack backtrace:")


class LoaderSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How to start a loader: its arguments, the number of BLAS threads, the number of requests decoded together, the
    watchdog's limit in seconds without progress while it has work, and a secret that it reads from standard input."""

    arguments: tuple[str, ...]
    threads: int = 1
    rows: int = 8
    keeps_prompts: bool = True
    stuck_s: Callable[[], float] = lambda: 60.0
    secret: str = ""


def environment(environ: Mapping[str, str], threads: int) -> dict[str, str]:
    """The child's environment."""
    return {
        **{name: environ[name] for name in _PASSED_ON if name in environ},
        "OPENBLAS_NUM_THREADS": str(threads),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def exit_cause(code: int | None) -> str:
    """An exit status for display: "signal 9 (SIGKILL)" or "exit 3"."""
    if code is None:
        return "still running"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"signal {-code} ({signal.Signals(-code).name})"
        return f"signal {-code}"
    return f"exit {code}"


class LoaderProcess:
    """A running loader. ``in_flight`` counts requests that use it; ``ended`` is set when the process has exited."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        spec: LoaderSpec,
        watch: Watch,
    ) -> None:
        self._process, self._reader, self._writer, self._watch = process, reader, writer, watch
        self._waiting: dict[int, Ask] = {}
        self._open: dict[int, AnswerQueue] = {}
        self._ids = itertools.count(1)
        self._reports: list[Reported] = []
        self._reported = asyncio.Event()
        self._ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._stderr_tail = b""
        self._tasks: list[asyncio.Task[None]] = []
        self.in_flight = 0
        self.stopping = self.dismissed = self._broken = False
        self.ended = asyncio.Event()
        self.ready: Ready | None = None
        self.working: Working | None = None
        self.pace = Pace()
        self.throughput, self.threads = Throughput(spec.rows), spec.threads
        self.calibrated: Calibrated | None = None
        self.prefixes = PrefixTable(MOST_BLOCKS if spec.keeps_prompts else 0)
        self._last_s: dict[int, float] = {}

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    @property
    def usable(self) -> bool:
        """False as soon as the connection is lost, which is before the exit status is known."""
        return not self._broken and not self.ended.is_set()

    @property
    def silent_s(self) -> float:
        """Seconds without progress while it has requests; see Watch."""
        return self._watch.silent_s

    @property
    def cause(self) -> str:
        """Why it ended, for display."""
        return exit_cause(self._process.returncode)

    @classmethod
    async def start(cls, spec: LoaderSpec, environ: Mapping[str, str]) -> "LoaderProcess":
        """Spawn and wait until the model is resident and warmed up. Raises Refused with the loader's reason."""
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise _cannot("create a socket", error) from None
        progress = Progress()
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "agent.loader", "--fd", str(theirs.fileno())),
                *("--progress-fd", str(progress.fd), *spec.arguments),
                pass_fds=tuple(fd for fd in (theirs.fileno(), progress.fd) if fd >= 0),
                env=environment(environ, spec.threads),
                stdin=asyncio.subprocess.PIPE if spec.secret else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
            )
        except BaseException as error:
            ours.close()
            progress.close()
            if isinstance(error, OSError):
                raise _cannot("start a process", error) from None
            raise
        finally:
            theirs.close()
        if process.stdin is not None:
            # not by arguments or environment: other processes can read both
            process.stdin.write(spec.secret.encode())
            process.stdin.close()
        reader, writer = await asyncio.open_connection(sock=ours)
        loader = cls(process, reader, writer, spec, Watch(progress))
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
        """Answers to one request, which ``text`` describes for the prefix table and throughput. It is sent when it is
        its turn to be prepared. Leaving early cancels it. Raises Retryable when the loader is lost."""
        if not self.usable:
            raise Retryable(f"the loader ended ({self.cause})", code="worker_lost")
        number, answers, finished = next(self._ids), AnswerQueue(), False
        self._open[number], self._waiting[number] = answers, request
        self.throughput.begin(number, text.prompt_tok if text else 0)
        try:
            for refused in self._watch.add(number, request.cache, size_bytes(request), request.priority):
                self._open[refused].put(_full(refused))
            self._send_due()
            while not finished:
                if (answer := await answers.get()) is None:
                    raise self._watch.loss(number)
                finished = isinstance(answer, Done | Failed)
                if text is not None and isinstance(answer, Accepted):
                    self.prefixes.took(text, answer.cached_tok)
                yield answer
        finally:
            del self._open[number]
            self.throughput.end(number)
            self._last_s.pop(number, None)
            self._waiting.pop(number, None)
            if self._watch.left(number) and not self.ended.is_set():
                self._write(Cancel(id=number))
            self._send_due()

    async def report(self) -> Reported | None:
        """The engine's counters since the last report; None when no report arrives in time. A report that arrived too
        late for the last call is added to this one, so that no count is lost. Reports are consumed only after the last
        await: a cancelled call leaves them to the next one."""
        self._reported.clear()
        # a loader that has ended may have reported before
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
        """Send the memory pressure level to the engine. A loader that has ended is ignored."""
        with contextlib.suppress(Retryable):
            await self._send(Relieve(level=level))

    async def stop(self, grace_s: float) -> None:
        """End it: send Stop, wait at most ``grace_s`` seconds, then SIGKILL. Returns when the process has exited.
        It is ``dismissed`` from now on, unless it had ended by itself."""
        self.stopping, self.dismissed = True, self.dismissed or not self.ended.is_set()
        with contextlib.suppress(Retryable):
            await self._send(Stop())
        try:
            async with asyncio.timeout(grace_s):
                await self.ended.wait()
        except TimeoutError:
            self.kill()
            await self.ended.wait()

    def calibrate(self, *, go: bool) -> None:
        """Let it time its model's steps while it has nothing else to do, or end that; ``calibrated`` follows."""
        self._write(Calibrate(go=go))

    def kill(self) -> None:
        """SIGKILL; no error when it has exited."""
        self.stopping = True
        self._end()

    def _end(self) -> None:
        """SIGKILL. Not through the process object, which would poll first and reap the exit status that another task
        waits for; until it is reaped, the process id cannot be reused."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)

    def _send_due(self) -> None:
        """Send the requests whose turn it is; few enough that none has to wait for the socket."""
        while self._waiting and not self._broken and (number := self._watch.next()) is not None:
            self._write(msgspec.structs.replace(self._waiting.pop(number), id=number))

    def _write(self, frame: Frame) -> None:
        with contextlib.suppress(ConnectionError, RuntimeError):  # then its end is read, too
            self._writer.write(encode(frame))

    async def _send(self, frame: Frame) -> None:
        if self.ended.is_set():
            raise Retryable(f"the loader ended ({self.cause})", code="worker_lost")
        try:
            self._writer.write(encode(frame))
            await self._writer.drain()
        except (ConnectionError, RuntimeError):
            self._broken = True
            raise Retryable("the connection to the loader is lost", code="worker_lost") from None

    async def _read(self) -> None:
        decoder = Decoder()
        try:
            while chunk := await self._reader.read(1 << 16):
                for frame in decoder.feed(chunk):
                    self._take(frame)
        except (ConnectionError, Refused):
            # a loader that sends invalid frames is unusable; its exit counts as unexpected, hence not `kill`
            self._end()
        self._broken = True
        status = await self._process.wait()
        self._watch.ended(self.cause, status, ours=self.stopping)
        self.ended.set()
        if not self._ready.done():
            died = (self._process.returncode or 0) < 0
            self._ready.set_exception(Refused(self._start_failure(), code="loader_died" if died else "bad_model"))
            self._ready.exception()
        for answers in self._open.values():
            answers.put(None)
        self._writer.close()

    def _take(self, frame: Frame) -> None:
        if not isinstance(frame, Reported):  # a stuck loader may still send reports
            self._watch.heard()
        if isinstance(frame, Accepted | Tokens | Embedded | Done | Failed):
            if frame.id in self._open:
                self._open[frame.id].put(frame)
            self._measure(frame)
        elif isinstance(frame, Working):
            self.working = frame
            self.throughput.worked(time.monotonic(), frame)
            self._tell_waiting(frame.waits)
        elif isinstance(frame, Reported):
            self._reports.append(frame)
            self._reported.set()
        elif isinstance(frame, Calibrated):
            self.calibrated = frame
        elif isinstance(frame, Ready) and not self._ready.done():
            self._ready.set_result(frame)
        elif isinstance(frame, LoadFailed) and not self._ready.done():
            self._ready.set_exception(Refused(frame.message, code=frame.code))
            self._ready.exception()

    def _measure(self, frame: Answer) -> None:
        """Update workload and speed from an answer."""
        if isinstance(frame, Tokens):
            self._note_gap(frame)
        elif isinstance(frame, Accepted):
            self._watch.accepted(frame.id)
            self._send_due()
            self.throughput.accepted(frame.id, frame.prompt_tok, frame.cached_tok)
        elif isinstance(frame, Done | Failed):
            self._watch.done(frame.id)
            self._send_due()
            if isinstance(frame, Done):
                self.throughput.done(time.monotonic(), frame.id, frame.completion_tok)

    def _note_gap(self, frame: Tokens) -> None:
        now, number = time.monotonic(), frame.id
        if number in self._last_s:
            self.pace.gap(now, now - self._last_s[number])
        else:
            self.throughput.token(number)
            self._watch.answers(number)
        if number in self._open:
            self._last_s[number] = now

    async def _end_when_stuck(self, limit: Callable[[], float]) -> None:
        """Watchdog: end a loader that has work but makes no progress. The exit counts as unexpected: no `kill`."""
        while not self.ended.is_set():
            if self._watch.stuck(limit_s := limit()):
                self._end()
                return
            self._tell_waiting(self._watch.waiting)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(1.0, limit_s / 4)):
                    await self.ended.wait()

    def _tell_waiting(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if number in self._open:
                self._open[number].put(Waits(id=number))

    async def _read_stderr(self) -> None:
        """Keep the tail of stderr during the start; later lines might quote a request and are discarded."""
        assert self._process.stderr is not None
        while chunk := await self._process.stderr.read(4096):
            if not self._ready.done():
                self._stderr_tail = (self._stderr_tail + chunk)[-2000:]

    def _start_failure(self) -> str:
        last = telling(self._stderr_tail.decode(errors="replace"))
        said = f": {last[:300]}" if last else ""
        return f"start loader: the loader exited before it was ready ({self.cause}){said}"


def telling(stderr: str) -> str:
    """The line that says why a process ended: its last one, but for hints how to learn more."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if not line.startswith(_HINTS)), lines[-1] if lines else "")


def _cannot(do: str, error: OSError) -> Retryable:
    why = error.strerror or type(error).__name__
    return Retryable(f"start loader: cannot {do} ({why})", code="no_process")


def _full(number: int) -> Failed:
    message = "too much text waits to be prepared; send the request later"
    return Failed(id=number, code="queue_full", message=message, retryable=True)


_PEAKS = ("queue_max", "kv_peak_bytes", "peak_bytes")
_LEVELS = (*_PEAKS, "cache_bytes", "disk_bytes", "active_bytes")


def total_of(reports: Sequence[Reported]) -> Reported:
    """Merge several reports: counts are summed, levels take the last, peaks the highest."""
    total = reports[-1]
    for earlier in reports[:-1]:
        counted = set(Reported.__struct_fields__) - set(_LEVELS)
        counts = {name: getattr(total, name) + getattr(earlier, name) for name in counted}
        peaks = {name: max(getattr(total, name), getattr(earlier, name)) for name in _PEAKS}
        total = msgspec.structs.replace(total, **peaks, **counts)
    return total
