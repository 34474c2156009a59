"""Sends probes to a standby, and to a good model whose answers are recorded."""

import asyncio
import struct
import time
from collections.abc import Callable, Sequence

import msgspec

from agent.files.probes import TIMED, TIMED_TOK, Heard, Probe, alike, fault
from agent.process.loader_process import LoaderProcess
from agent.wire.frames import Done, Embed, Embedded, Failed, Generate, Message, Tokens
from agent.wire.namespaces import PROBES
from shared.errors import RackError


class Warmed(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome. ``reason`` is "" when the standby may take over; ``took_us`` are the times of the timed probes."""

    reason: str = ""
    took_us: tuple[int, ...] = ()


async def warm(
    loader: LoaderProcess, probes: Sequence[Probe], budget_s: float, progress: Callable[[str], None] = lambda _: None
) -> Warmed:
    """First check its answers, then send 30 short requests, none of which may take longer than the budget. One at a
    time, because the active model serves its clients meanwhile."""
    reason = await _right(loader, probes, budget_s, progress)
    took: list[int] = []
    for number in range(TIMED if not reason else 0):
        progress(f"{number} of {TIMED} timed probes")
        began = time.perf_counter()
        probe = probes[number % len(probes)]
        reason = await _asked(loader, probe.prompt, TIMED_TOK, budget_s, f"timed probe {number + 1} of {TIMED}")
        if reason:
            break
        took.append(int((time.perf_counter() - began) * 1e6))
    return Warmed(reason=reason, took_us=tuple(took))


async def _right(
    loader: LoaderProcess, probes: Sequence[Probe], budget_s: float, progress: Callable[[str], None]
) -> str:
    answers: list[Heard] = []
    for number, probe in enumerate(probes):
        progress(f"{number} of {len(probes)} answers compared")
        what = f"probe {number + 1} of {len(probes)}"
        try:
            async with asyncio.timeout(budget_s):
                one = await answer_of(loader, probe.prompt, probe.max_tokens)
        except TimeoutError:
            return f"{what} took over {budget_s:g} s"
        except RackError as error:
            return f"{what}: {error.message}"
        if reason := fault(probe, one):
            return f"{what}: {reason}"
        answers.append(one)
    return alike(answers) if _writes(loader) else ""


async def _asked(loader: LoaderProcess, prompt: str, max_tokens: int, budget_s: float, what: str) -> str:
    try:
        async with asyncio.timeout(budget_s):
            answer = await answer_of(loader, prompt, max_tokens)
    except TimeoutError:
        return f"{what} took over {budget_s:g} s"
    except RackError as error:
        return f"{what}: {error.message}"
    return "" if answer.tokens else f"{what}: the answer is empty"


async def answer_of(loader: LoaderProcess, prompt: str, max_tokens: int) -> Heard:
    """One answer at temperature 0; of an encoder, its vector's numbers in place of logprobs. Raises RackError."""
    texts: list[str] = []
    numbers: list[float] = []
    tokens = 0
    async for answer in loader.generate(_request(loader, prompt, max_tokens)):
        if isinstance(answer, Failed):
            raise RackError(answer.message, code=answer.code)
        if isinstance(answer, Tokens):
            texts.append(answer.reasoning + answer.text)
            numbers += [one.chosen.logprob for one in answer.scored]
        elif isinstance(answer, Embedded):
            numbers += [n for raw in answer.vectors for n in struct.unpack(f"<{len(raw) // 4}f", raw)]
            tokens += len(answer.vectors)
        elif isinstance(answer, Done):
            tokens += answer.completion_tok
    return Heard(text="".join(texts), tokens=tokens, logprobs=tuple(numbers))


def _request(loader: LoaderProcess, prompt: str, max_tokens: int) -> Generate | Embed:
    if not _writes(loader):
        return Embed(id=0, model="", inputs=(prompt,), request_id="probe")
    return Generate(
        id=0,
        model="",
        messages=(Message(role="user", content=prompt),),
        max_tokens=max_tokens,
        temperature=0.0,
        logprobs=0,
        private=True,
        cache=PROBES,
        request_id="probe",
    )


def _writes(loader: LoaderProcess) -> bool:
    return loader.ready is None or loader.ready.serves == "text"
