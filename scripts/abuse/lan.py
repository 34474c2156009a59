"""A stranger between the nodes, and what an operator may get wrong: finding 3 and the smaller ones of 12."""

import contextlib
import random
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from scripts.abuse import Place, Seen, agent_of, all_of, case, command, keys, log_of, program
from scripts.seaweed import free_port
from tests.rack.harness import Agent, model, until, write_config

PROMPT = "SECRET-PROMPT the patient Miller has condition X"


class Relay:
    """A TCP relay that keeps all bytes; ``change`` may alter those that go to the target."""

    def __init__(self, target: int) -> None:
        self._target, self.up, self.down = target, bytearray(), bytearray()
        self.openings: list[bytes] = []
        self.change: Callable[[bytes], bytes] = bytes
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            with contextlib.suppress(OSError):
                far = socket.create_connection(("127.0.0.1", self._target), timeout=5)
                far.settimeout(None)
                for source, sink, kept, goes_up in ((near, far, self.up, True), (far, near, self.down, False)):
                    threading.Thread(target=self._pump, args=(source, sink, kept, goes_up), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, kept: bytearray, goes_up: bool) -> None:
        first = True
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                kept += data
                if goes_up and first:
                    self.openings.append(data)
                first = False
                sink.sendall(self.change(data) if goes_up else data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def _certificates(folder: Path, *nodes: str, rack: str = "r") -> dict[str, dict[str, str]]:
    """A CA in ``folder`` and a certificate for each node, by the program's own commands; the [tls] of each."""
    where = ("--folder", str(folder), "--rack", rack)
    steps = [("init", *where), *(("issue", one, *where, "--name", "localhost", "--ip", "127.0.0.1") for one in nodes)]
    for words in steps:
        status, said = program("mlxrack-agent", "tls", *words)
        if status:
            raise AssertionError(f"`mlxrack-agent tls {words[0]}` ended with {status}: {said.strip().splitlines()[-1]}")
    files = {one: {"certificate": f"{one}.pem", "key": f"{one}.key", "ca": "ca.pem"} for one in nodes}
    return {one: {what: str(folder / name) for what, name in each.items()} for one, each in files.items()}


def _tls(files: dict[str, str]) -> str:
    return "[tls]\n" + "".join(f'{what} = "{path}"\n' for what, path in files.items())


def _pair(place: Place, relay_of: Callable[[int], int], tables: dict[str, str], second: str = "worker") -> list[Agent]:
    """A gateway without a model that reaches the worker through a relay; ``second`` is who really is there."""
    made = [Agent(place.folder, node, free_port()) for node in ("door", second)]
    for agent, other in (made, reversed(made)):
        is_door = agent.node == "door"
        port = relay_of(other.port) if is_door else other.port
        named = Agent(place.folder, "worker", other.port) if is_door else other
        write_config(agent, [named], [] if is_door else [model()], tables["door" if is_door else "worker"])
        scheme = "https" if is_door or tables["worker"] else "http"
        text = agent.config.read_text().replace(f"http://127.0.0.1:{other.port}", f"{scheme}://127.0.0.1:{port}")
        agent.config.write_text(text)
    return made


def _started(agents: list[Agent]) -> None:
    for agent in agents:
        agent.start(wait=False)
    time.sleep(1)
    for agent in agents:
        until(lambda agent=agent: agent.alive() and _accepts(agent.port), f"{agent.node} listens", 60)  # type: ignore[misc]


def _accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def _chat(agent: Agent, *, tls: str = "") -> tuple[int, str]:
    """A chat over HTTP or HTTPS: status, and the body or why there is none."""
    import json
    import ssl
    import urllib.error
    import urllib.request

    body = {"model": "m", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 5}
    url = f"{'https' if tls else 'http'}://localhost:{agent.port}/v1/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        context = ssl.create_default_context(cafile=tls) if tls else None
        with urllib.request.urlopen(request, timeout=30, context=context) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, type(error).__name__


@case(
    "relay",
    "3",
    "a relay between gateway and worker records; alters; replays what it recorded, 10,000 times",
    "nothing readable, nothing accepted",
    limit_s=240,
)
def relay(place: Place) -> Seen:
    """As ARP or mDNS spoofing gives; the relay knows no secret and no key."""
    files = _certificates(place.folder / "ca", "door", "worker")
    relays: list[Relay] = []

    def through(port: int) -> int:
        relays.append(Relay(port))
        return relays[-1].port

    agents = _pair(place, through, {one: _tls(files[one]) for one in files})
    _started(agents)
    (door, worker), middle, ca = agents, relays[0], files["door"]["ca"]
    until(lambda: _chat(door, tls=ca)[0] == 200, "the gateway answers from the worker", 90)
    recorded = bytes(middle.up + middle.down)
    readable = sum(recorded.count(text) for text in (b"SECRET", b"Miller", b"Generate", b"completion", b"Mlxrack v="))
    rng = random.Random(1)
    middle.change = lambda data: bytes(b ^ (rng.random() < 0.01) for b in data)
    altered = [_chat(door, tls=ca)[0] for _ in range(place.size(20, 5))]
    middle.change = bytes
    accepted = _replayed(worker.port, middle.openings[0], bytes(middle.up), place.size(10_000, 500), rng)
    until(lambda: _chat(door, tls=ca)[0] == 200, "the gateway answers again", 90)
    strange = _requests(worker, '"outcome"') - _requests(door)
    return all_of(
        (readable == 0, f"{readable} readable words in {len(recorded) / 1e3:.0f} kB"),
        (200 not in altered, f"altered: {sorted(set(altered))}"),
        (accepted == 0, f"{accepted} of {place.size(10_000, 500)} replays were answered with data"),
        (not strange, f"{len(strange)} requests at the worker that the gateway did not send"),
    )


def _requests(agent: Agent, only: str = "") -> set[str]:
    """The ids of all requests in an agent's log, in lines that hold ``only``."""
    lines = [line for line in log_of(agent).splitlines() if only in line]
    return {found[1] for line in lines if (found := re.search(r'"request":"([^"]+)"', line))}


def _replayed(port: int, opening: bytes, sent: bytes, count: int, rng: random.Random) -> int:
    """Send what was recorded to the worker: as it was, from somewhere, or altered. How many got application data."""
    answered = 0
    for number in range(count):
        piece = sent if number % 4 == 0 else opening + sent[rng.randrange(len(sent)) :][:4096]
        if number % 4 == 2:
            piece = bytes(b ^ (rng.random() < 0.02) for b in piece[:600])
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
            sock.sendall(piece[: 1 << 16])
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(3)
            answer = b""
            while got := sock.recv(4096):
                answer += got
            # what a server may say before it is convinced is plain text of its handshake; a WebSocket or HTTP is not
            answered += b"HTTP/1.1 101" in answer or b"HTTP/1.1 200" in answer
    return answered


@case(
    "wrong-certificates",
    "3",
    "a peer with another node's certificate, of another CA, over plain http",
    "refused with a sentence each in status",
    limit_s=240,
)
def wrong_certificates(place: Place) -> Seen:
    """Names are bound to node ids; what is refused says why."""
    good = _certificates(place.folder / "ca", "door", "worker", "third")
    other = _certificates(place.folder / "other", "worker")
    kinds = {"another node's": {**good["third"]}, "another CA's": {**other["worker"]}, "none, http": {}}
    checks = []
    for number, (kind, files) in enumerate(kinds.items()):
        inner = Place(place.folder / str(number), place.quick)
        inner.folder.mkdir()
        tables = {"door": _tls(good["door"]), "worker": _tls(files) if files else ""}
        agents = _pair(inner, lambda port: port, tables, "third" if files == good["third"] else "worker")
        _started(agents)
        problem, deadline = "", time.monotonic() + 30
        while not problem and time.monotonic() < deadline:
            time.sleep(0.5)
            status, said = command(agents[0], "status", "--json")
            problem = _problem(said) if status == 0 else ""
        refused = _chat(agents[0], tls=good["door"]["ca"])[0] != 200
        checks.append((refused and bool(problem), f"{kind}: {problem[:120] or 'no reason in status'}"))
        for agent in agents:
            agent.kill()
    return all_of(*checks)


def _problem(said: str) -> str:
    import json

    try:
        return str(json.loads(said)["peers"][0]["problem"])
    except (ValueError, KeyError, IndexError):
        return ""


@case(
    "weak-secret",
    "12",
    "rack secrets a, office, 31 characters, 32 times the same",
    "the agent does not start and says how to make one",
)
def weak_secret(place: Place) -> Seen:
    """A sniffed heartbeat allows guessing at 172,000 per second and thread."""
    checks: list[tuple[bool, str]] = []
    for secret in ("a", "office", "x7Kq" * 7 + "abc", "a" * 32, "password" * 4):
        agent = agent_of(place, [model()], f"n{len(checks)}", start=False)
        other = Agent(place.folder, "other", free_port())
        write_config(agent, [other], [model()])
        agent.secret = secret
        agent.start(wait=False)
        assert agent.process is not None
        try:
            ended = agent.process.wait(15) != 0
        except Exception:  # noqa: BLE001  # it runs
            ended = False
        said = agent.output() if ended else ""
        agent.kill()
        told = "refused" if ended else "serves"
        checks.append(
            (
                ended and "new-secret" in said and (len(secret) < 8 or secret not in said),
                f"{len(secret)} x {secret[0]}: {told}",
            )
        )
    return all_of(*checks)


HOSTS = ("localhost.evil.example", "127.evil.example", "127.0.0.1.evil.example", "::1.evil.example", "0.0.0.0", "::")


@case(
    "loopback-names",
    "12",
    f"listen.host = {', '.join(HOSTS)} without keys; 0.0.0.0 with keys, in clear",
    "not loopback: keys are demanded, and TLS or insecure_http",
)
def loopback_names(place: Place) -> Seen:
    """An address is parsed; of names `localhost` alone is loopback."""

    def checked(host: str, extra: str) -> bool:
        agent = agent_of(place, [model()], extra, start=False)
        text = agent.config.read_text().replace("[listen]\n", f'[listen]\nhost = "{host}"\n')
        agent.config.write_text(text)
        return command(agent, "check-config")[0] == 0

    passed = [host for host in HOSTS if checked(host, "")]
    ours = [host for host in ("localhost", "127.0.0.1", "127.0.0.2", "::1") if not checked(host, "")]
    insecure = checked("0.0.0.0", keys())
    return all_of(
        (not passed, f"taken for loopback: {', '.join(passed) or 'none'}"),
        (not ours, f"not taken for it: {', '.join(ours) or 'none'}"),
        (not insecure, "plain http off loopback is " + ("accepted" if insecure else "refused")),
    )
