"""A deterministic engine without a model, for tests of everything around it.

Each next word depends on the conversation, the seed and the words before it, so two runs of one request agree and a
run can be continued anywhere. Words are tokens. Prefill time depends on the words that are not in the prompt cache,
step time on the number of rows, and rows are admitted while their KV cache fits, the highest rank first: to a router it
looks like a real machine. A conversation whose last message begins with ``!crash`` kills the process, as a GPU out of
memory does; ``!hang`` is never prepared; ``!raise`` ends the engine in its first step; ``!slow`` makes this loader ten
times slower from then on.
"""

import hashlib
import json
import os
import signal
import struct
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from agent.loader.calibration import Bounds, Decode, Prefill, Task
from agent.loader.counts import Counts
from agent.loader.generation import Advance, Prepared, nothing
from agent.loader.ranking import Standing, could_start, rows_for, yielding
from agent.loader.row_placement import Placed
from agent.loader.stopping import StopText
from agent.wire.frames import (
    Accepted,
    Ask,
    Candidate,
    Done,
    Embed,
    Embedded,
    Failed,
    Frame,
    Generate,
    Ready,
    Reported,
    Scored,
    Tokens,
    ToolCall,
    Working,
)
from agent.wire.namespaces import Namespace
from agent.wire.priority import Turns

CONTEXT_TOK = 8192
_PIECE_TOK = 256
_BLOCK_TOK = 16
_WORDS = ("rack", "node", "heat", "fan", "token", "queue", "swap", "peer", "load", "cache", "batch", "drain")


@dataclass
class _Row:
    request: Generate
    prompt: tuple[str, ...]
    cached_tok: int
    words: Iterator[str]
    stop: StopText
    since_s: float
    left_tok: int = 0
    begun_s: float = 0.0
    first_s: float = 0.0
    made: int = 0
    said: list[str] = field(default_factory=list)
    rank: int = 0
    yielded: int = 0

    @property
    def standing(self) -> Standing:
        return Standing(self.rank, self.request.priority.leaves_rows, self.yielded)


class Pretence(NamedTuple):
    """A machine's speed: seconds per decode step, additional seconds per row, prompt tokens per second (0 takes no
    time), prompt cache size in tokens, and KV cache limit of all rows in tokens (0 for no limit)."""

    step_s: float = 0.0
    row_s: float = 0.0
    prefill_tps: float = 0.0
    cache_tok: int = 0
    kv_tok: int = 0


_AT_ONCE = Pretence()


class FakeEngine:
    """Engine whose numbers are simulated but consistent."""

    def __init__(
        self, speed: Pretence = _AT_ONCE, *, load_s: float = 0.0, salt: str = "", rows: int = 8, held_bytes: int = 0
    ) -> None:
        time.sleep(load_s)
        self._speed, self._salt, self._limit = speed, salt, rows
        self._slower = 1.0
        self._load_us = int(load_s * 1e6)
        self._waiting: list[_Row] = []
        self._turns, self._could = Turns(), set[int]()
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._rows: dict[int, _Row] = {}
        self._embeds: list[tuple[Embed, int]] = []
        self._counts = Counts()
        self._due: list[Frame] = []
        self._held_bytes = held_bytes or 1 << 20

    def describe(self) -> Ready:
        return Ready(
            engine="fake",
            context_tok=CONTEXT_TOK,
            load_us=self._load_us,
            active_bytes=self._held_bytes,
            runtime=repr(self._speed) if self.bounds() else "",
        )

    @property
    def busy(self) -> bool:
        return bool(self._rows or self._waiting or self._embeds or self._due)

    def prepare(self, request: Ask, advance: Advance = nothing) -> Prepared | Failed:
        if isinstance(request, Embed):
            return Prepared(request, tuple([0] * (len(one) // 4 + 1) for one in request.inputs))
        texts = [m.content for m in request.messages] or [request.prompt or ""]
        if texts[-1].startswith("!hang"):
            time.sleep(3600)
        if texts[-1].startswith("!crash"):
            os.kill(os.getpid(), signal.SIGKILL)
        if texts[-1].startswith("!slow"):
            self._slower = 10.0
        _calls(request)  # tools that cannot be called fail here, as with a real engine, and not in a step
        prompt_tok = len(_prompt(request))
        room = CONTEXT_TOK - prompt_tok
        wanted = request.max_tokens or 64
        if room < max(1, len(request.made)) or (wanted > room and request.strict):
            return Failed(
                id=request.id,
                code="context_length_exceeded",
                message=f"prompt is too long: {prompt_tok}; this model's maximum context length is {CONTEXT_TOK}",
                param="messages" if room <= 0 else "max_tokens",
            )
        ignored = ("max_tokens",) if wanted > room else ()
        capped = msgspec.structs.replace(request, max_tokens=min(wanted, room))
        return Prepared(capped, ([0] * prompt_tok,), min(wanted, room), ignored)

    def submit(self, prepared: Prepared) -> Frame:
        request = prepared.request
        prompt_tok = sum(len(prompt) for prompt in prepared.prompts)
        if isinstance(request, Embed):
            self._embeds.append((request, prompt_tok))
            return Accepted(id=request.id, prompt_tok=prompt_tok, cached_tok=0)
        prompt = _prompt(request)
        cached_tok = min(self._known_tok(request.cache, prompt), prompt_tok - 1)
        stop = StopText(request.stop)
        row = _Row(request, prompt, cached_tok, _words(request, self._salt), stop, time.perf_counter())
        if finish := _resumed(row):
            self._due.append(_done(row, finish))
        else:
            row.left_tok = prompt_tok - cached_tok + row.made
            self._waiting.append(row)
            self._turns.arrive(request.id, request.priority, row.since_s)
        self._counts.add("cached_tok", cached_tok)
        self._counts.highest("queue_max", len(self._waiting) + len(self._rows) - self._limit)
        ignored = prepared.extra or ()
        return Accepted(id=request.id, prompt_tok=prompt_tok, cached_tok=cached_tok, ignored=ignored)

    def cancel(self, request_id: int) -> None:
        self._embeds = [work for work in self._embeds if work[0].id != request_id]
        self._waiting = [row for row in self._waiting if row.request.id != request_id]
        self._turns.leave(request_id)
        if row := self._rows.pop(request_id, None):
            self._counts.add("wasted_tok", row.made)

    def step(self) -> list[Frame]:
        self._counts.add("steps", 1)
        answers, self._due = self._due, []
        self._prefill()
        rows = list(self._rows.values())
        if any(row.request.messages and row.request.messages[-1].content.startswith("!raise") for row in rows):
            raise RuntimeError("a request asked for it")
        step_s = (self._speed.step_s + self._speed.row_s * len(rows)) * self._slower
        time.sleep(step_s)
        self._counts.add("busy_decode_us", max(1, int(step_s * 1e6)))
        self._counts.lately.decoded(len(rows), int(step_s * 1e6))
        for row in rows:
            answers += self._advance(row)
        for embed, prompt_tok in self._embeds:
            answers.append(Embedded(id=embed.id, vectors=tuple(_vector(one) for one in embed.inputs)))
            answers.append(Done(id=embed.id, finish="stop", prompt_tok=prompt_tok, cached_tok=0, completion_tok=0))
        self._embeds.clear()
        return answers

    def _prefill(self) -> None:
        """Admit rows that fit, by rank and in order; prefill one chunk, or everything when prefill takes no time."""
        while (row := self._next_row()) is not None:
            row.begun_s = row.begun_s or time.perf_counter()
            piece = min(row.left_tok, self._chunk_tok)
            self._counts.add("prefill_tok", piece)
            row.left_tok -= piece
            if self._speed.prefill_tps:
                piece_s = piece / self._speed.prefill_tps * self._slower
                time.sleep(piece_s)
                self._counts.add("busy_prefill_us", int(piece_s * 1e6))
                self._counts.lately.prefilled(piece, int(piece_s * 1e6))
            if row.left_tok <= 0:
                self._waiting.remove(row)
                self._rows[row.request.id] = row
                self._turns.take(row.request.id, time.perf_counter(), self._could)
                row.rank = row.request.priority.rank  # it had its turn, however it came to it
                self._keep(row.request.cache, row.prompt)
            if self._speed.prefill_tps:
                return

    def _next_row(self) -> _Row | None:
        """The row to prefill now; None while the first of the highest rank does not fit, even if lower ones yield."""
        now = time.perf_counter()
        standings = {number: row.standing for number, row in self._rows.items()}
        self._could = could_start({row.request.id: row.standing for row in self._waiting}, standings, self._limit)
        for row in self._waiting:
            row.rank = self._turns.rank(row.request.id, now, could=row.request.id in self._could)
        first = max(self._waiting, key=lambda row: row.rank, default=None)
        if first is None:
            return None
        placed = [Placed(number, 0, row.begun_s, row.made, False) for number, row in self._rows.items()]
        left = dict(self._rows)
        for number in (None, *yielding(placed, standings, first.rank)):
            if number is not None:
                del left[number]
            if self._has_room(first, left):
                for gone in [self._rows[one] for one in self._rows if one not in left]:
                    gone.yielded += 1
                    self._waiting.insert(0, self._rows.pop(gone.request.id))
                    self._turns.back(gone.request.id, now)
                return first
        return None

    @property
    def _chunk_tok(self) -> int:
        """Prompt tokens of a step, which takes a quarter of a second at most."""
        tps = self._speed.prefill_tps
        return min(_PIECE_TOK, max(1, int(tps / 4))) if tps else CONTEXT_TOK

    def _has_room(self, row: _Row, rows: dict[int, _Row]) -> bool:
        """Whether it fits beside these rows."""
        if len(rows) >= rows_for(row.standing.leaves, [one.standing for one in rows.values()], self._limit):
            return False
        held = sum(len(one.prompt) + one.made for one in rows.values())
        return not self._speed.kv_tok or not rows or held + len(row.prompt) <= self._speed.kv_tok

    def _known_tok(self, cache: Namespace, prompt: tuple[str, ...]) -> int:
        known = 0
        for number, one in enumerate(_blocks(cache, prompt), 1):
            if one not in self._kept:
                break
            known = number * _BLOCK_TOK
        return known

    def _keep(self, cache: Namespace, tokens: tuple[str, ...]) -> None:
        if not self._speed.cache_tok:
            return
        for one in _blocks(cache, tokens):
            self._kept[one] = None
            self._kept.move_to_end(one)
        while len(self._kept) * _BLOCK_TOK > self._speed.cache_tok:
            self._kept.popitem(last=False)
            self._counts.add("cache_evictions", 1)

    def _advance(self, row: _Row) -> list[Frame]:
        row.made += 1
        row.first_s = row.first_s or time.perf_counter()
        self._counts.add("decode_tok", 1)
        word = next(row.words)
        row.said.append(word.strip())
        ids = (_WORDS.index(word.strip()),)
        text, stopped = row.stop.feed(word)
        scored: tuple[Scored, ...] = ()
        if row.request.logprobs is not None:
            chosen = Candidate(text=word, raw=word.encode(), logprob=-0.5)
            scored = (Scored(chosen=chosen, top=(chosen,) * min(1, row.request.logprobs)),)
        limit = row.request.max_tokens or 64
        calls = _calls(row.request)
        if not stopped and not calls and row.made < limit:
            return [Tokens(id=row.request.id, text=text, count=1, scored=scored, ids=ids)]
        del self._rows[row.request.id]
        self._turns.leave(row.request.id)
        self._keep(row.request.cache, (*row.prompt, *_heading("assistant"), *row.said))
        text += "" if stopped else row.stop.finish()
        done = _done(row, "tool_calls" if calls else "stop" if stopped else "length")
        said = "" if calls else text
        return [Tokens(id=row.request.id, text=said, count=1, calls=calls, scored=scored, ids=ids), done]

    def report(self) -> Reported:
        return Reported(active_bytes=self._held_bytes, **self._counts.taken())

    def working(self) -> Working:
        held_tok = sum(len(row.prompt) + row.made for row in self._rows.values())
        waits = tuple(row.request.id for row in self._waiting)
        lately = self._counts.lately.taken()
        return Working(active_bytes=self._held_bytes, kv_bytes=held_tok << 10, waits=waits, **lately)

    def relieve(self, level: str) -> None:
        if level == "hard":
            self._held_bytes = 1 << 20

    def bounds(self) -> Bounds | None:
        if not (self._speed.step_s and self._speed.prefill_tps):
            return None  # it pretends no machine
        return Bounds(self._limit, self._speed.kv_tok or CONTEXT_TOK, CONTEXT_TOK, self._chunk_tok)

    def measure(self, task: Task) -> float:
        """Takes the time that it pretends, and reports exactly that."""
        if isinstance(task, Prefill):
            seconds = task.tokens / self._speed.prefill_tps if self._speed.prefill_tps else 0.0
        else:
            wide = task.rows if isinstance(task, Decode) else task.rows * task.tokens
            seconds = self._speed.step_s + self._speed.row_s * wide
        time.sleep(seconds * self._slower)
        return seconds * self._slower * 1e6

    def rest(self) -> None:
        pass

    def close(self) -> None:
        self._rows.clear()
        self._waiting.clear()


def _resumed(row: _Row) -> str:
    """Advance a row to where another loader stopped; its finish reason if it ended there, "" if it continues."""
    for _ in row.request.made:
        row.made += 1
        word = next(row.words)
        row.said.append(word.strip())
        if row.stop.feed(word)[1]:
            return "stop"
    return "length" if row.made >= (row.request.max_tokens or 64) else ""


def _done(row: _Row, finish: str) -> Done:
    now = time.perf_counter()
    begun, first = row.begun_s or now, row.first_s or now
    return Done(
        id=row.request.id,
        finish=finish,
        prompt_tok=len(row.prompt),
        cached_tok=row.cached_tok,
        completion_tok=row.made,
        queue_us=int((begun - row.since_s) * 1e6),
        prefill_us=int((first - begun) * 1e6),
        decode_us=int((now - first) * 1e6),
    )


def _prompt(request: Generate) -> tuple[str, ...]:
    """A request's tokens: words, preceded by four header tokens per turn."""
    if request.prompt is not None or not request.messages:
        return (*_heading(""), *_split(request.prompt or ""))
    found: list[str] = []
    for message in request.messages:
        found += (*_heading(message.role), *_split(message.content))
    return tuple(found)


def _split(text: str) -> list[str]:
    """A text's words, as far as they may fit: refusing a long one costs what fits."""
    return text.split(None, CONTEXT_TOK + 1)


def _heading(role: str) -> tuple[str, ...]:
    return (f"<{role}>",) * 4


def _blocks(cache: Namespace, tokens: tuple[str, ...]) -> Iterator[int]:
    """Hashes of the namespace and the whole prefix up to each block's end."""
    state = hashlib.sha256(cache.encode() + b"\0")
    for at in range(0, len(tokens) - _BLOCK_TOK + 1, _BLOCK_TOK):
        state.update("\0".join(tokens[at : at + _BLOCK_TOK]).encode())
        yield int.from_bytes(state.copy().digest()[:8], "little")


def _calls(request: Generate) -> tuple[ToolCall, ...]:
    """The tool call that a request requires, without arguments."""
    if request.must_call is None:
        return ()
    name = request.must_call or json.loads(request.tools[0])["name"]
    return (ToolCall(id=f"call_{request.id}", name=name, arguments="{}"),)


def _vector(text: str | tuple[int, ...]) -> bytes:
    return struct.pack("<8f", *(byte / 255 for byte in hashlib.sha256(repr(text).encode()).digest()[:8]))


def _words(request: Generate, salt: str) -> Iterator[str]:
    state = hashlib.sha256(salt.encode())
    state.update((request.prompt or "").encode())
    for message in request.messages:
        state.update(f"{message.role}\0{message.content}\0".encode())
    if request.temperature > 0:
        state.update(str(request.seed).encode())
    while True:
        state.update(b".")
        yield _WORDS[state.digest()[0] % len(_WORDS)] + " "
