"""A deterministic engine without a model, for tests of everything around one.

Each next word depends on the conversation, the seed and the words before it, so two runs of one request agree and a
run can be continued anywhere. Prefill takes time by uncached characters, decoding by step. A conversation whose last
message begins with ``!crash`` kills the process, as a GPU out of memory does; ``!hang`` is never prepared.
"""

import hashlib
import json
import os
import signal
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass

from agent.frames import (
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
from agent.loader.generation import Prepared
from agent.loader.stopping import StopText

CONTEXT_TOK = 8192
_WORDS = ("rack", "node", "heat", "fan", "token", "queue", "swap", "peer", "load", "cache", "batch", "drain")


@dataclass
class _Row:
    request: Generate
    prompt_tok: int
    words: Iterator[str]
    stop: StopText
    made: int = 0


class FakeEngine:
    """Engine whose every number is invented but consistent."""

    def __init__(
        self, *, step_s: float = 0.0, load_s: float = 0.0, salt: str = "", rows: int = 8, held_bytes: int = 0
    ) -> None:
        time.sleep(load_s)
        self._step_s = step_s
        self._load_us = int(load_s * 1e6)
        self._salt = salt
        self._limit = rows
        self._rows: dict[int, _Row] = {}
        self._embeds: list[tuple[Embed, int]] = []
        self._window: dict[str, int] = {}
        self._due: list[Frame] = []
        self._held_bytes = held_bytes or 1 << 20

    def describe(self) -> Ready:
        return Ready(engine="fake", context_tok=CONTEXT_TOK, load_us=self._load_us, active_bytes=self._held_bytes)

    @property
    def busy(self) -> bool:
        return bool(self._rows or self._embeds or self._due)

    def prepare(self, request: Ask) -> Prepared | Failed:
        if isinstance(request, Embed):
            return Prepared(request, tuple([0] * (len(one) // 4 + 1) for one in request.inputs))
        texts = [m.content for m in request.messages] or [request.prompt or ""]
        if texts[-1].startswith("!hang"):
            time.sleep(3600)
        if texts[-1].startswith("!crash"):
            os.kill(os.getpid(), signal.SIGKILL)
        prompt_tok = sum(len(text.split()) + 4 for text in texts)
        room = CONTEXT_TOK - prompt_tok
        if room <= 0 or (request.max_tokens or 0) > room:
            return Failed(
                id=request.id,
                code="context_length_exceeded",
                message=f"prompt ({prompt_tok} tokens) and max_tokens exceed the context of {CONTEXT_TOK}",
                param="max_tokens",
            )
        return Prepared(request, ([0] * prompt_tok,), request.max_tokens or 64)

    def submit(self, prepared: Prepared) -> Frame:
        request = prepared.request
        prompt_tok = sum(len(prompt) for prompt in prepared.prompts)
        self._count("prefill_tok", prompt_tok)
        if isinstance(request, Embed):
            self._embeds.append((request, prompt_tok))
        else:
            row = _Row(request, prompt_tok, _words(request, self._salt), StopText(request.stop))
            if finish := _resumed(row):
                self._due.append(_done(row, finish))
            else:
                self._rows[request.id] = row
        self._window["queue_max"] = max(self._window.get("queue_max", 0), len(self._rows) - self._limit)
        return Accepted(id=request.id, prompt_tok=prompt_tok, cached_tok=0)

    def cancel(self, request_id: int) -> None:
        self._embeds = [work for work in self._embeds if work[0].id != request_id]
        row = self._rows.pop(request_id, None)
        if row:
            self._count("wasted_tok", row.made)

    def step(self) -> list[Frame]:
        time.sleep(self._step_s)
        self._count("steps", 1)
        self._count("busy_decode_us", max(1, int(self._step_s * 1e6)))
        answers, self._due = self._due, []
        for row in list(self._rows.values())[: self._limit]:
            answers += self._advance(row)
        for embed, prompt_tok in self._embeds:
            vectors = tuple(_vector(one) for one in embed.inputs)
            answers.append(Embedded(id=embed.id, vectors=vectors))
            answers.append(Done(id=embed.id, finish="stop", prompt_tok=prompt_tok, cached_tok=0, completion_tok=0))
        self._embeds.clear()
        return answers

    def _advance(self, row: _Row) -> list[Frame]:
        row.made += 1
        self._count("decode_tok", 1)
        word = next(row.words)
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
        text += "" if stopped else row.stop.finish()
        done = _done(row, "tool_calls" if calls else "stop" if stopped else "length")
        said = "" if calls else text
        return [Tokens(id=row.request.id, text=said, count=1, calls=calls, scored=scored, ids=ids), done]

    def report(self) -> Reported:
        window, self._window = self._window, {}
        return Reported(active_bytes=self._held_bytes, **window)

    def working(self) -> Working:
        return Working(active_bytes=self._held_bytes, kv_bytes=len(self._rows) << 10)

    def relieve(self, level: str) -> None:
        if level == "hard":
            self._held_bytes = 1 << 20

    def close(self) -> None:
        self._rows.clear()

    def _count(self, name: str, amount: int) -> None:
        self._window[name] = self._window.get(name, 0) + amount


def _resumed(row: _Row) -> str:
    """Bring a row to where another loader had come; why it ended there already, "" when it goes on."""
    for _ in row.request.made:
        row.made += 1
        if row.stop.feed(next(row.words))[1]:
            return "stop"
    return "length" if row.made >= (row.request.max_tokens or 64) else ""


def _done(row: _Row, finish: str) -> Done:
    return Done(id=row.request.id, finish=finish, prompt_tok=row.prompt_tok, cached_tok=0, completion_tok=row.made)


def _calls(request: Generate) -> tuple[ToolCall, ...]:
    """The call that a request insists on, without arguments."""
    if request.must_call is None:
        return ()
    name = request.must_call or json.loads(request.tools[0])["name"]
    return (ToolCall(id=f"call_{request.id}", name=name, arguments="{}"),)


def _vector(text: str | tuple[int, ...]) -> bytes:
    digest = hashlib.sha256(repr(text).encode()).digest()
    return struct.pack("<8f", *(byte / 255 for byte in digest[:8]))


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
