"""One address for several nodes: a name with several A records and the official client, or a proxy in front.

docs/operating.md promises that a node's death costs no request before its first byte.
"""

import asyncio
import contextlib
import errno
import itertools
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest

from agent.config import hash_key
from scripts.seaweed import free_port
from tests.rack.harness import Agent, end, model, until
from tests.rack.tls_rack import Authority, write_tls_config

PAGE = Path(__file__).parents[2] / "docs/operating.md"
SITE = "llm.example.com"
PLACES = ("127.0.0.1", "127.0.0.2")
DEAF = "127.0.0.3"
KEYS = f'[[keys]]\nid = "k"\nsha256 = "{hash_key("client-key")}"\n'
SERVED = model(rows=8, fake_step_s=0.01)
CLIENTS = 6
TOKENS, LONG_TOKENS = 20, 300
TURNS = 10 if os.environ.get("MLXRACK_DRILL") else 1
"""How many nodes end, one after the other."""


class Heard(NamedTuple):
    """A request: how many pieces of its answer arrived, and what ended it ("" when it was whole)."""

    pieces: int
    fault: str


class Names:
    """A resolver for SITE alone, which gives its addresses in another order each time, as name servers do, or always in
    the same (``turning``)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, addresses: Sequence[str], *, turning: bool = True) -> None:
        self._addresses, self._real = list(addresses), socket.getaddrinfo
        self._turn = itertools.count() if turning else itertools.repeat(0)
        monkeypatch.setattr(socket, "getaddrinfo", self._resolved)

    def _resolved(self, host: Any, *rest: Any, **more: Any) -> Any:
        if host not in (SITE, SITE.encode()):
            return self._real(host, *rest, **more)
        first = next(self._turn) % len(self._addresses)
        there = self._addresses[first:] + self._addresses[:first]
        return [found for address in there for found in self._real(address, *rest, **more)]


def port_of_all(addresses: Sequence[str]) -> int:
    """A port that is free at every address; skips where loopback has not got them."""
    while True:
        port = free_port()
        with contextlib.ExitStack() as stack:
            try:
                for address in addresses:
                    stack.enter_context(socket.socket()).bind((address, port))
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:
                    pytest.skip("loopback has one address: sudo ifconfig lo0 alias 127.0.0.2")
                continue
            return port


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Authority, list[Agent]]]:
    """Two nodes with TLS at one port of two addresses, each with a certificate for the name of both."""
    folder, port = tmp_path_factory.mktemp("rack"), port_of_all((*PLACES, DEAF))
    authority = Authority(folder / "tls")
    agents = [Agent(folder, f"n{n}", port) for n in (1, 2)]
    for agent, other, address in zip(agents, agents[::-1], PLACES, strict=True):
        agent.address, agent.tls = address, authority.clients()
        agent.tls.check_hostname = False
        write_tls_config(agent, [other], [SERVED], authority.issue(agent.node, host=SITE, address=address), KEYS)
        text = agent.config.read_text()
        text = text.replace("[listen]\n", f'[listen]\nhost = "{address}"\nnames = ["{SITE}"]\n')
        (elsewhere,) = set(PLACES) - {address}
        agent.config.write_text(text.replace(f"https://127.0.0.1:{port}", f"https://{elsewhere}:{port}"))
    try:
        for agent in agents:
            agent.start()
        for agent in agents:
            agent.ready()
            until(lambda agent=agent: all(p["state"] == "up" for p in agent.status()["peers"]), "peers are up")  # type: ignore[misc]
        yield authority, agents
    finally:
        end(agents)


def client_of(authority: Authority, port: int, host: str = SITE, **more: Any) -> openai.OpenAI:
    """The official client with its own retries and timeouts, unless ``more`` says otherwise."""
    trusted = openai.DefaultHttpxClient(verify=authority.clients())
    return openai.OpenAI(base_url=f"https://{host}:{port}/v1", api_key="client-key", http_client=trusted, **more)


def ask(client: openai.OpenAI, number: int) -> Heard:
    """One request, streamed or not by turns."""
    pieces = 0
    question: Any = {"model": "m", "messages": [{"role": "user", "content": f"tell me {number}"}], "max_tokens": TOKENS}
    try:
        if number % 2:
            answer = client.chat.completions.create(**question)
            assert answer.usage is not None
            return Heard(1, "" if answer.usage.completion_tokens == TOKENS else "short")
        finished = False
        for piece in client.chat.completions.create(**question, stream=True):
            pieces += 1
            finished = finished or any(choice.finish_reason for choice in piece.choices)
        return Heard(pieces, "" if finished else "a silent stop")
    except Exception as error:  # noqa: BLE001  # whatever the client and its HTTP library raise
        return Heard(pieces, f"{type(error).__name__}: {error}")


class Clients:
    """Threads that ask one after another, with one client, until they are stopped."""

    def __init__(self, client: openai.OpenAI) -> None:
        self._client, self._stop, self._numbers = client, threading.Event(), itertools.count()
        self.heard: list[Heard] = []
        self._threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)

    def more(self, count: int) -> None:
        """Wait until so many more requests have ended."""
        enough = len(self.heard) + count
        until(lambda: len(self.heard) >= enough, f"{count} more requests have ended")

    def _ask(self) -> None:
        while not self._stop.is_set():
            self.heard.append(ask(self._client, next(self._numbers)))


def ended_in_turn(
    agents: Sequence[Agent], clients: Clients, how: Callable[[Agent], Any], *, times: int = TURNS
) -> None:
    """One node after the other ends under load, while the other lives, and comes back."""
    for number in range(times):
        agent, other = agents if number % 2 else agents[::-1]
        clients.more(2 * CLIENTS)
        how(agent)
        clients.more(3 * CLIENTS)
        agent.start().ready()
        until(lambda agent=agent: agent.status()["peers"][0]["state"] == "up", "it knows its peer")  # type: ignore[misc]
        until(lambda other=other: other.status()["peers"][0]["state"] == "up", "its peer knows it")  # type: ignore[misc]


def check(heard: Sequence[Heard], case: str) -> list[Heard]:
    """No request was lost before its first byte; the streams that were cut, which are few."""
    lost = [one for one in heard if one.fault and not one.pieces]
    cut = [one for one in heard if one.fault and one.pieces]
    print(f"{case}: {len(heard)} requests, {len(lost)} lost before their first byte, {len(cut)} streams cut after it")
    assert not lost, lost[:3]
    assert len(cut) <= TURNS * CLIENTS, "only streams that went through a node as it was killed"
    return cut


def test_a_name_with_two_addresses_loses_no_request_before_its_first_byte(
    two_nodes: tuple[Authority, list[Agent]], monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, agents = two_nodes
    Names(monkeypatch, PLACES)
    with client_of(authority, agents[0].port) as client:
        with Clients(client) as clients:
            ended_in_turn(agents, clients, Agent.kill)
        cut = check(clients.heard, "two A records")
    assert not [one for one in cut if one.fault == "a silent stop"], "a client can tell that an answer is not whole"


def test_nodes_that_are_stopped_one_after_another_fail_no_request(
    two_nodes: tuple[Authority, list[Agent]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an upgrade: SIGTERM, and the next version starts."""
    authority, agents = two_nodes
    Names(monkeypatch, PLACES)
    long: list[int] = []
    with client_of(authority, agents[0].port) as client:
        with Clients(client) as clients:
            ended_in_turn(agents, clients, lambda agent: stopped_beside_a_long_answer(authority, agent, long))
        assert check(clients.heard, "stopped one after another") == []
    assert [pieces >= LONG_TOKENS for pieces in long] == [True] * TURNS, "it is finished before the node goes"


def stopped_beside_a_long_answer(authority: Authority, agent: Agent, long: list[int]) -> None:
    """SIGTERM while the node has a stream to finish, for which it stays for seconds; how many pieces that had."""
    with client_of(authority, agent.port, host=agent.address) as client:
        question: Any = {"model": "m", "messages": [{"role": "user", "content": "a long story"}]}
        with client.chat.completions.create(**question, max_tokens=LONG_TOKENS, stream=True) as pieces:
            next(pieces)
            statuses: list[int] = []
            stopping = threading.Thread(target=lambda: statuses.append(agent.stop()))
            stopping.start()
            long.append(1 + sum(1 for _ in pieces))
            stopping.join(120)
    assert statuses == [0]


@contextlib.contextmanager
def deaf(port: int) -> Iterator[None]:
    """A machine that answers nothing: its queue of connections is full, so that it drops what arrives, as one without
    power does."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind((DEAF, port))
        listener.listen(0)
        for _ in range(4):
            caller = stack.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex((DEAF, port))
        yield


@pytest.mark.skipif(sys.platform != "linux", reason="a full queue refuses elsewhere, instead of dropping")
@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_an_address_that_answers_nothing_costs_a_connection_timeout_and_no_request(
    two_nodes: tuple[Authority, list[Agent]], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    authority, (first, _) = two_nodes
    Names(monkeypatch, [DEAF, *PLACES], turning=False)
    question: Any = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
    with deaf(first.port):
        with pytest.raises(TimeoutError), socket.create_connection((DEAF, first.port), timeout=0.5):
            pass
        if kind == "asyncio":  # its HTTP library tries the next address after a moment, with its own timeout or another
            answer = asyncio.run(_asked(authority.clients(), first.port, question))
        else:
            with client_of(authority, first.port, timeout=openai.Timeout(60.0, connect=1.0)) as client:
                answer = client.chat.completions.create(**question)
    assert answer.choices[0].message.content


async def _asked(trusted: ssl.SSLContext, port: int, question: dict[str, Any]) -> Any:
    http = openai.DefaultAsyncHttpxClient(verify=trusted)
    address = f"https://{SITE}:{port}/v1"
    async with openai.AsyncOpenAI(base_url=address, api_key="client-key", http_client=http) as client:
        return await client.chat.completions.create(**question)


def test_the_documented_proxy_loses_no_request_before_its_first_byte(
    two_nodes: tuple[Authority, list[Agent]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = shutil.which("caddy")
    if program is None:
        pytest.skip("caddy is not installed")
    (authority, agents), port = two_nodes, port_of_all(PLACES[:1])
    Names(monkeypatch, PLACES[:1])
    config = caddyfile(tmp_path, authority, agents, port)
    with running([program, "run", "--config", str(config)], tmp_path, lambda: answers(authority, port)):
        with client_of(authority, port) as client, Clients(client) as clients:
            ended_in_turn(agents, clients, Agent.kill, times=1)  # the proxy takes seconds to see that a node is back
        check(clients.heard, "behind Caddy")


def caddyfile(folder: Path, authority: Authority, agents: Sequence[Agent], port: int) -> Path:
    """The documented site with this rack's addresses and a certificate of its CA."""
    (site,) = re.findall(r"```caddy\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    own = authority.issue("proxy", host=SITE)
    site = site.replace(f"{SITE} {{", f"https://{SITE}:{port} {{\n\ttls {own.certificate} {own.key}")
    site = site.replace("/etc/caddy/mlxrack-ca.pem", str(authority.ca))
    upstreams = " ".join(f"https://{agent.address}:{agent.port}" for agent in agents)
    site, count = re.subn(r"https://mini-1\.local:8470.*?(?= \{)", upstreams, site)
    assert count == 1
    path = folder / "Caddyfile"
    path.write_text(f"{{\n\tadmin off\n}}\n{site}")
    return path


def answers(authority: Authority, port: int) -> bool:
    """Whether the proxy passes a request on."""
    with openai.DefaultHttpxClient(verify=authority.clients()) as http:
        try:
            return http.get(f"https://{SITE}:{port}/health").status_code == 200
        except Exception:  # noqa: BLE001  # not yet
            return False


@contextlib.contextmanager
def running(command: list[str], folder: Path, ready: Callable[[], bool]) -> Iterator[None]:
    """A program until the block ends."""
    with (folder / "proxy.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HOME": str(folder)})
    try:
        until(lambda: process.poll() is not None or ready(), "the proxy answers")
        assert process.poll() is None, (folder / "proxy.log").read_text()[-600:]
        yield
    finally:
        process.terminate()
        process.wait(30)
