"""Clients of a rack: many concurrent streams, each checked to its last token, with the latencies that chaos tests
judge."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import aiohttp


class Ask(NamedTuple):
    """One request: ``words`` of prompt, tokens of answer."""

    prompt: str
    max_tokens: int = 20
    stream: bool = True
    seed: int | None = None
    temperature: float = 0.0


class Heard(NamedTuple):
    """Its result. Times are seconds; ``at_s`` is when it was sent. ``fault`` is "" for a complete and correct
    answer."""

    ask: Ask
    at_s: float
    first_s: float | None
    total_s: float
    text: str
    fault: str
    request_id: str = ""
    worker: str = ""
    longest_gap_s: float = 0.0
    retries: int = 0
    door: int = 0


class Expected:
    """The expected answer of each request, learned from undisturbed answers."""

    def __init__(self) -> None:
        self._texts: dict[Ask, str] = {}

    def learn(self, heard: Heard) -> None:
        """Record an undisturbed answer as the expected one."""
        assert not heard.fault, heard
        self._texts[heard.ask._replace(stream=True)] = heard.text

    def fault(self, heard: Heard) -> str:
        """Its own fault, or that its text differs."""
        right = self._texts.get(heard.ask._replace(stream=True))
        return heard.fault or ("" if right is None or right == heard.text else "another text")


async def ask(session: aiohttp.ClientSession, port: int, one: Ask, model: str = "m") -> Heard:
    """One request of a strict client: every guarantee about the answer's shape is checked."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": one.prompt}],
        "max_tokens": one.max_tokens,
        "temperature": one.temperature,
        "stream": one.stream,
    }
    if one.seed is not None:
        body["seed"] = one.seed
    if one.stream:
        body["stream_options"] = {"include_usage": True}
    began = time.monotonic()
    heard = Heard(one, began, None, 0.0, "", "")
    try:
        async with session.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body) as answer:
            heard = heard._replace(
                request_id=answer.headers.get("X-Mlxrack-Request-Id", ""),
                worker=answer.headers.get("X-Mlxrack-Node", ""),
                retries=int(answer.headers.get("X-Mlxrack-Retries", "0")),
                door=port,
            )
            if answer.status != 200:
                fault = f"{answer.status}: {(await answer.text())[:200]}"
            elif one.stream:
                heard, fault = await _streamed(answer, heard)
            else:
                tree = await answer.json()
                fault = "" if tree["usage"]["completion_tokens"] == one.max_tokens else "miscounted"
                heard = heard._replace(text=tree["choices"][0]["message"]["content"])
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        fault = f"{type(error).__name__}: {error}"
    return heard._replace(total_s=time.monotonic() - began, fault=fault)


async def _streamed(answer: aiohttp.ClientResponse, heard: Heard) -> tuple[Heard, str]:
    text, roles, usages, ids, finishes, first, last, longest = "", 0, [], set(), [], None, heard.at_s, 0.0
    prints: set[str] = set()
    done = False
    async for raw in answer.content:
        line = raw.decode().strip()
        if not line.startswith("data: "):
            continue
        now = time.monotonic()
        if first is not None:
            longest = max(longest, now - last)
        first, last = (now - heard.at_s if first is None else first), now
        if line == "data: [DONE]":
            done = True
            continue
        tree = json.loads(line[6:])
        if "error" in tree:
            return heard._replace(text=text, first_s=first), f"error event: {tree['error']['message']}"
        ids.add(tree["id"])
        prints.add(tree["system_fingerprint"])
        usages += [tree["usage"]] if tree.get("usage") else []
        for choice in tree["choices"]:
            roles += "role" in choice["delta"]
            text += choice["delta"].get("content") or ""
            finishes += [choice["finish_reason"]] if choice["finish_reason"] else []
    fault = ""
    if not done:
        fault = "a silent stop"
    elif (roles, len(usages), len(ids), len(finishes), len(prints)) != (1, 1, 1, 1, 1):
        fault = f"roles {roles}, usages {len(usages)}, ids {len(ids)}, finishes {finishes}, prints {prints}"
    elif usages[0]["completion_tokens"] != heard.ask.max_tokens:
        fault = f"miscounted: {usages[0]}"
    return heard._replace(text=text, first_s=first, longest_gap_s=longest), fault


class Load:
    """Requests in a separate thread: each ``at_s`` after the start, to the port that ``door`` returns then."""

    def __init__(
        self, plan: Sequence[tuple[float, Ask]], door: Callable[[int], int], *, timeout_s: float = 60.0
    ) -> None:
        self._plan = plan
        self._door = door
        self._timeout_s = timeout_s
        self.heard: list[Heard] = []
        self.began_s = 0.0
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def start(self) -> "Load":
        """Start it."""
        self.began_s = time.monotonic()
        self._thread.start()
        return self

    def join(self) -> list[Heard]:
        """Wait for the last answer; returns all in the order of their requests."""
        self._thread.join()
        return sorted(self.heard, key=lambda one: one.at_s)

    async def _run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        # a new connection per request, as with many clients
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            tasks = [asyncio.create_task(self._one(session, n, at_s, one)) for n, (at_s, one) in enumerate(self._plan)]
            await asyncio.gather(*tasks)

    async def _one(self, session: aiohttp.ClientSession, number: int, at_s: float, one: Ask) -> None:
        await asyncio.sleep(max(0.0, self.began_s + at_s - time.monotonic()))
        self.heard.append(await ask(session, self._door(number), one))


def at_once(port: int, asks: Sequence[Ask]) -> list[Heard]:
    """All concurrently, to one gateway."""
    return Load([(0.0, one) for one in asks], lambda _: port).start().join()


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of them lie; 0 for none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
