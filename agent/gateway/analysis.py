"""The analysis of what may leave, away from the event loop: one child process (agent/gateway/analyzer.py) that finds,
and this process, which makes of its findings what leaves. When it is not ready, fails or takes too long, the request is
refused and nothing of it leaves; a child that hangs is ended and started again.
"""

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import sys
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from agent.gateway.analyzer import (
    HEAD,
    Answer,
    Find,
    Findings,
    Prepared,
    Question,
    Sense,
    Sensed,
    Setup,
    decode_answer,
    framed,
)
from agent.policy.outgoing import Outgoing
from agent.policy.redaction import Redacted
from agent.policy.redaction.replacing import NONCE_LETTERS, replaced
from agent.policy.redaction.strings import texts_of
from agent.policy.rules import DEFAULT, Provider, Rules
from agent.process.loader_process import environment
from agent.tasks import Tasks
from shared.errors import Retryable
from shared.logs import get_logger

CHILD = (sys.executable, "-P", "-m", "agent.gateway.analyzer")
START_TIMEOUT_S = 120.0
_NONCE_LETTERS = 48
_LONGEST_PAUSE_S = 30.0

log = get_logger("agent.gateway")


class _Job(NamedTuple):
    """A question, and who waits for the answer; nobody for the policy itself. A child stands for its own end."""

    question: "Question | _Child"
    answer: "asyncio.Future[Answer] | None"


def needed(rules: Rules) -> bool:
    """Whether a policy has anything to analyse: something may leave, or texts decide what is SENSITIVE."""
    sought = rules.sensitive
    outside = any(one.category == "outside" for one in rules.providers)
    return outside or bool(sought.kinds or sought.words or sought.patterns)


class Analysis:
    """Analyses texts in a child process. ``ready`` says whether it can, ``problem`` why not, for operators. All methods
    belong to the event loop."""

    def __init__(self, child: Sequence[str] = CHILD, environ: Mapping[str, str] = os.environ) -> None:
        self._child, self._environ = tuple(child), environ
        self._rules = DEFAULT
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue()
        self._task: asyncio.Future[None] | None = None
        self._tasks = Tasks()
        self._running: _Child | None = None
        self.ready, self.problem = False, "it is not started"

    def start(self, rules: Rules) -> None:
        """Follow a policy, from now on or instead of the one before. Where none needs an analysis, nothing runs."""
        names = rules.redaction.names and not self._rules.redaction.names
        self._rules = rules
        if not needed(rules) or (names and self._task is not None):
            self._end("nothing of this policy needs it")
        if not needed(rules):
            return
        if self._task is None:
            self._unready("it is starting")
            self._task = self._tasks.spawn(self._run())
        else:
            # requests that come after it wait behind it, and meet the new policy
            self._jobs.put_nowait(_Job(Setup(rules), None))

    async def redacted(self, outgoing: Outgoing, target: Provider) -> Redacted:
        """What may leave for a provider. Raises Refused with code ``not_redactable`` for what cannot be read, Retryable
        with code ``analysis_failed`` where the analysis is not ready, fails or takes too long."""
        texts, joins, _ = texts_of(outgoing)
        answer = await self._ask(Find(texts, joins))
        if not isinstance(answer, Findings) or answer.texts != len(texts):
            raise _failed("gave no findings")
        nonce = "".join(secrets.choice(NONCE_LETTERS) for _ in range(_NONCE_LETTERS))
        return replaced(outgoing, target, answer.found, nonce=nonce)

    async def sensitive(self, texts: Sequence[str]) -> tuple[str, ...]:
        """What makes texts SENSITIVE under the policy; empty for nothing. Raises Retryable as above: then the request
        counts as SENSITIVE."""
        answer = await self._ask(Sense(tuple(texts)))
        if not isinstance(answer, Sensed) or answer.texts != len(texts):
            raise _failed("gave no findings")
        return answer.names

    async def close(self) -> None:
        """End the child."""
        self._end("it is closed")
        await self._tasks.cancel()

    async def _ask(self, question: Question) -> Answer:
        """The child's answer, the wait for others included in the time that one may take."""
        if not self.ready:
            raise _failed(f"is not ready: {self.problem}")
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._jobs.put_nowait(_Job(question, answer))
        try:
            async with asyncio.timeout(self._rules.redaction.time_out_s):
                return await answer
        except TimeoutError:
            raise _failed(f"took longer than {self._rules.redaction.time_out_s:g} s") from None

    def _end(self, why: str) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self._unready(why)

    def _unready(self, why: str) -> None:
        """Refuse what waits, and what comes."""
        self.ready, self.problem = False, why
        waiting, self._jobs = self._jobs, asyncio.Queue()
        while not waiting.empty():
            answer = waiting.get_nowait().answer
            if answer is not None and not answer.done():
                answer.set_exception(_failed(f"is not ready: {why}"))

    async def _run(self) -> None:
        """Keep a child running. It ends only by being cancelled."""
        pause_s = 0.5
        while True:
            why = "its process cannot be started"
            try:
                self._running = child = await _Child.start(self._child, environment(self._environ, 1))
                self._tasks.spawn(self._notice(child))
                try:
                    await self._prepare(child, self._rules)
                    pause_s = 0.5
                    await self._serve(child)
                finally:
                    await _surely(child.end())
            except TimeoutError:
                why = "an analysis took too long; its process starts again"
            except (OSError, EOFError, msgspec.MsgspecError):
                why = "its process ended; it starts again"
            log.warning("analysis_lost", why=why)
            self._unready(why)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _notice(self, child: "_Child") -> None:
        """Tell that a child has ended, also while nothing is asked."""
        await child.ended()
        self._jobs.put_nowait(_Job(child, None))

    async def _serve(self, child: "_Child") -> None:
        """Put the questions to a child, one after the other."""
        while True:
            job = await self._jobs.get()
            if isinstance(job.question, _Child):
                if job.question is child:
                    raise EOFError("it has ended")
            elif isinstance(job.question, Setup):
                await self._prepare(child, job.question.rules)
            elif job.answer is not None and not job.answer.done():
                try:
                    answer = await child.ask(job.question, self._rules.redaction.time_out_s)
                except BaseException:
                    if not job.answer.done():
                        job.answer.set_exception(_failed("did not end"))
                    raise
                if not job.answer.done():  # it may have waited too long
                    job.answer.set_result(answer)

    async def _prepare(self, child: "_Child", rules: Rules) -> None:
        answer = await child.ask(Setup(rules), START_TIMEOUT_S)
        if not isinstance(answer, Prepared):
            raise EOFError("no answer to a policy")
        if answer.problem:
            log.error("analysis_not_ready", problem=answer.problem)
            self._unready(answer.problem)
        else:
            self.ready, self.problem = True, ""


class _Child:
    """A running child and its socket."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.pid = process.pid
        self._process, self._reader, self._writer = process, reader, writer

    @classmethod
    async def start(cls, command: Sequence[str], environ: Mapping[str, str]) -> "_Child":
        """Spawn one, or end it where the caller is cancelled meanwhile. Raises OSError."""
        spawning = asyncio.ensure_future(cls._spawn(command, environ))
        try:
            return await asyncio.shield(spawning)
        except asyncio.CancelledError:
            with contextlib.suppress(OSError):
                await _surely(cls._unborn(spawning))
            raise

    @staticmethod
    async def _unborn(spawning: "asyncio.Future[_Child]") -> None:
        await (await spawning).end()

    @classmethod
    async def _spawn(cls, command: Sequence[str], environ: Mapping[str, str]) -> "_Child":
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                *(*command, "--fd", str(theirs.fileno())),
                pass_fds=(theirs.fileno(),),
                env=dict(environ),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours)
        return cls(process, reader, writer)

    async def ask(self, question: Question, seconds: float) -> Answer:
        """The answer to a question. Raises TimeoutError, OSError or EOFError; then the child is of no use."""
        async with asyncio.timeout(seconds):
            self._writer.write(framed(question))
            await self._writer.drain()
            (length,) = HEAD.unpack(await self._reader.readexactly(HEAD.size))
            answer: Answer = decode_answer(await self._reader.readexactly(length))
            return answer

    async def ended(self) -> None:
        """Wait for its end."""
        await self._process.wait()

    async def end(self) -> None:
        """SIGKILL, not through the process object, which would reap the exit status that asyncio waits for."""
        self._writer.close()
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)
        await self._process.wait()


async def _surely(work: Coroutine[Any, Any, None]) -> None:
    """Await it to its end, whoever cancels meanwhile: a process that nobody waited for is left behind."""
    task, cancelled = asyncio.ensure_future(work), False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError
    task.result()


def _failed(why: str) -> Retryable:
    return Retryable(f"redaction: the analysis {why}; nothing has left", code="analysis_failed")
