"""Clients that ask a rack at a steady rate until they are told to end; each answer is checked to its last token."""

import asyncio
import itertools
import ssl
import threading
import time
from collections.abc import Sequence

import aiohttp

WORDS = 5


class Steady:
    """``rate`` requests a second, spread over ``ports``, with whatever ``key`` is set at the time. ``faults`` are those
    that were not answered as they had to be, a sentence each."""

    def __init__(self, ports: Sequence[int], *, rate: float, key: str = "", tls: ssl.SSLContext | None = None) -> None:
        self._ports, self._every_s, self.key, self._tls = ports, 1.0 / rate, key, tls
        self.faults: list[str] = []
        self.answered = 0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> "Steady":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()
        print(f"{self.answered} requests, {len(self.faults)} failed")

    def more(self, count: int) -> None:
        """Wait until that many more requests have been answered."""
        until, deadline = self.answered + count, time.monotonic() + 180
        while self.answered < until:
            assert time.monotonic() < deadline, "no answers"
            time.sleep(0.02)

    async def _run(self) -> None:
        tasks, loop = set[asyncio.Task[None]](), asyncio.get_running_loop()
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
            due = loop.time()
            for number in itertools.count():
                if self._ending.is_set():
                    break
                task = asyncio.create_task(self._one(session, number))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                due = max(due + self._every_s, loop.time() - 1.0)  # a slow machine is not asked all at once later
                await asyncio.sleep(max(0.0, due - loop.time()))
            await asyncio.gather(*tasks)

    async def _one(self, session: aiohttp.ClientSession, number: int) -> None:
        stream, port = bool(number % 2), self._ports[number % len(self._ports)]
        text = f"{number} " + "word " * (number % 7)
        body = {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": WORDS, "stream": stream}
        url = f"{'https' if self._tls else 'http'}://localhost:{port}/v1/chat/completions"
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            async with session.post(url, json=body, headers=headers, ssl=self._tls or True) as answer:
                whole = (await answer.text()).strip()
                right = whole.endswith("data: [DONE]") and '"error"' not in whole if stream else '"usage"' in whole
                if answer.status != 200 or not right:
                    self.faults.append(f"{number} at {port}: {answer.status} {whole[-300:]}")
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self.faults.append(f"{number} at {port}: {type(error).__name__}: {error}")
        self.answered += 1
