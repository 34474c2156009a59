"""``make demo``: a rack of three nodes on this machine, with a real model, a real S3 store and real failures.

Leaves build/demo/ with the bucket's listing, the weekly artifacts, the monthly PDF and summary.json. Everything
listens on loopback and is stopped at the end.
"""

import contextlib
import functools
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import openai

from scripts.common import agent_toml, at_once, s3_table, script, secret_file
from scripts.fetch_demo_model import MAIN, SECOND, default_folder
from scripts.seaweed import SeaweedFS, free_port
from scripts.tcp_gate import TcpGate
from shared import chips
from shared.keys import MOST_TABLE_BYTES
from shared.store import list_all

BUILD = Path("build/demo")
RACK, BUCKET = "demo", "demo-rack"
NODES = ("mini-1", "mini-2", "mini-3")
MAC = "Mac16,11"
"""What the nodes are said to have cost and to draw: the smallest of these."""
SAMPLE_S = 5
SYSTEM = "You are the assistant of a small company. Answer in one short sentence."
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "What does a fan do?",
    "What is two plus two?",
    "Why is the sky blue?",
    "Name an animal that can fly.",
    "What is a Mac mini?",
    "Say hello to the new colleague.",
)


@dataclass
class Tally:
    """Requests as clients counted them."""

    requests: int = 0
    failed: int = 0
    completion_tokens: int = 0
    errors: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def good(self, tokens: int) -> None:
        """Count an answer."""
        with self.lock:
            self.requests += 1
            self.completion_tokens += tokens

    def bad(self, error: str) -> None:
        """Count a failed request."""
        with self.lock:
            self.requests += 1
            self.failed += 1
            self.errors.append(error)


class Sink(http.server.ThreadingHTTPServer):
    """A stand-in for Discord's webhook that keeps the messages."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _SinkHandler)
        self.messages: list[dict[str, Any]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """The webhook's URL."""
        return f"http://127.0.0.1:{self.server_address[1]}/api/webhooks/1/demo"


class _SinkHandler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        assert isinstance(self.server, Sink)
        self.server.messages.append(json.loads(body))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"id": "1"}')

    def log_message(self, *_: object) -> None:
        """Quiet."""


class Node:
    """One agent process of the demo."""

    def __init__(self, name: str, port: int, environ: dict[str, str]) -> None:
        self.name, self.port = name, port
        self.folder = BUILD / name
        self.config = self.folder / "agent.toml"
        self._environ = environ
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Base URL for clients."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the agent."""
        with (self.folder / "stdout.txt").open("ab") as out:
            self.process = subprocess.Popen(
                [script("mlxrack-agent"), "run", "--config", str(self.config)],
                env=self._environ,
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
            )

    def ready(self) -> bool:
        """Whether its models are loaded."""
        try:
            with urllib.request.urlopen(f"{self.url}/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def cli(self, *words: str) -> dict[str, Any]:
        """A verb of mlxrack-agent, with --json."""
        return _json_of(["mlxrack-agent", *words], self.config, self._environ)

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=90)

    def windows(self) -> set[tuple[str, int, int]]:
        """(node, epoch, seq) of every window that this node closed, or recovered after a kill, from its log."""
        found, epoch = set(), 0
        for line in (self.folder / "state/logs/agent.jsonl").read_text().splitlines():
            entry = json.loads(line)
            if entry["event"] == "agent_started":
                epoch = entry["epoch"]
            elif entry["event"] == "window_closed":
                found.add((self.name, epoch, entry["seq"]))
            elif entry["event"] == "window_recovered":
                found.add((self.name, entry["of_epoch"], entry["seq"]))
        return found


class Demo:
    """The whole run."""

    def __init__(self) -> None:
        self.began, self.tally, self.sink = time.monotonic(), Tally(), Sink()
        self.summary: dict[str, Any] = {}
        self.environ = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        self.environ |= {
            "MLXRACK_DEMO_RACK": "the rack secret of the demo, 7c20b5e9d1",
            "MLXRACK_DEMO_WEBHOOK": self.sink.url,
            "MLXRACK_DEMO_READER": "aggregatorsecret0",
            **{_secret_name(n): f"secretof{n.replace('-', '')}0000" for n in NODES},
        }
        self.store: SeaweedFS | None = None
        self.gate: TcpGate | None = None
        self.nodes: list[Node] = []

    def run(self) -> int:
        """Run all acts; returns the exit status."""
        print(
            "A rack of three nodes on this machine: it serves, swaps, evicts, fails, recovers and reports.", flush=True
        )
        try:
            self._start()
            self._serve()
            self._swap()
            self._evict()
            self._kill()
            self._outage()
            self._stop_agents()
            self._aggregate()
            return self._close()
        finally:
            for node in self.nodes:
                if node.process is not None and node.process.poll() is None:
                    node.kill()
            if self.store is not None:
                self.store.stop()

    # ---- acts ----

    def _start(self) -> None:
        with act("start a store (SeaweedFS, S3) and three agents"):
            identities = [*(_identity(n, self.environ) for n in NODES), _reader(self.environ)]
            self.store = SeaweedFS(BUILD / "store", identities)
            self.store.start()
            self.store.store(BUCKET).create_bucket()
            self.gate = TcpGate(self.store.port)
            ports = {name: free_port() for name in NODES}
            for name in NODES:
                node = Node(name, ports[name], self.environ)
                _write_agent_toml(name, ports, self.gate.port)
                self.nodes.append(node)
                node.start()
            (BUILD / "aggregator.toml").write_text(_aggregator_toml(self.store.port))
            wait("the model is resident on every node", lambda: all(n.ready() for n in self.nodes), 120)
        for node in self.nodes:
            note(f"{node.name} serves {MAIN} at {node.url}/v1")

    def _serve(self) -> None:
        with act("send requests to any node: the official OpenAI client, streaming and not, and curl"):
            text = self._ask(self.nodes[0], "What is the capital of France?", temperature=0.0)
            note(f'"What is the capital of France?" -> "{text}"')
            self._curl(self.nodes[1])
            self._burst([self.nodes[n % 3] for n in range(12)], stream=lambda n: n % 2 == 0)

    def _swap(self) -> None:
        first = self.nodes[0]
        with act(f"swap the model on {first.name} under load"), self._load(self.nodes) as counted:
            wait("load is running", lambda: counted.requests >= 2, 60)
            swap = first.cli("swap", MAIN, SECOND)
            at_flip = counted.requests
            wait("requests after the swap", lambda: counted.requests >= at_flip + 4, 60)
        self.summary["swap"] = {
            "requests_during": counted.requests,
            "failed": counted.failed,
            "outcome": swap["outcome"],
            "seconds": round(swap["window_us"] / 1e6, 2),
        }
        note(
            f"{swap['from_version'][:8]} -> {swap['to_version'][:8]} in {swap['window_us'] / 1e6:.1f} s, "
            f"{counted.requests} requests during the swap, {counted.failed} failed"
        )

    def _evict(self) -> None:
        third = self.nodes[2]
        with act(f"load a second model on {third.name}, which has memory for one: the first is evicted"):
            third.cli("load", SECOND)
            self._ask(third, "Name three colours.", model=SECOND)
            self._ask(third, "Name three colours.")
        note(f"{third.name} serves {SECOND} now and forwards requests for {MAIN} to its peers")

    def _kill(self) -> None:
        first, victim, third = self.nodes
        victim.cli("seal")  # what it counted as a gateway is on disk; from here on clients use the other gateways
        self._aggregator("alert")  # as cron does every minute; the first run reports nothing of the past
        with act(f"kill {victim.name} (SIGKILL) under load"), self._load([first, third], stream=False) as counted:
            wait("load is running", lambda: counted.requests >= 2, 60)
            victim.kill()
            at_kill = counted.requests
            wait("requests after the kill", lambda: counted.requests >= at_kill + 6, 90)
            wait("its peers report it down", lambda: _peer_state(first, victim.name) == "down", 20)
            self._aggregator("alert")
        self.summary["kill"] = {"requests_during": counted.requests, "failed": counted.failed}
        note(f"{counted.requests} requests during the failover, {counted.failed} failed")
        for message in self.sink.messages:
            note(f"alert received: {message['embeds'][0]['title']}".replace("\\", ""))
        with act(f"start {victim.name} again"):
            victim.start()
            wait("it is ready", victim.ready, 60)
            wait("its peers report it up", lambda: _peer_state(first, victim.name) == "up", 20)
            self._aggregator("alert")

    def _outage(self) -> None:
        assert self.gate is not None
        with act("cut the store off: the nodes keep serving and spool their telemetry"):
            self.gate.shut()
            before = {n.name: n.cli("status")["windows_closed"] for n in self.nodes}
            self._burst([self.nodes[n % 3] for n in range(3)], stream=lambda _: False)
            wait(
                "two windows on every node",
                lambda: all(n.cli("status")["windows_closed"] >= before[n.name] + 2 for n in self.nodes),
                60,
            )
            waiting = {n.name: n.cli("status")["push"] for n in self.nodes}
        spooled = sum(p["waiting_batches"] for p in waiting.values())
        states = sorted({p["state"] for p in waiting.values()})
        note(f"{spooled} batches spooled on disk (state: {', '.join(states)})")
        with act("restore the connection to the store"):
            self.gate.open()
            wait("every batch is pushed", lambda: all(_drained(n) for n in self.nodes), 90)
        self.summary["outage"] = {"spooled_batches": spooled}

    def _stop_agents(self) -> None:
        with act("stop the agents (SIGTERM): the last windows are closed and pushed"):
            assert all(n.process is not None for n in self.nodes)
            processes = [node.process for node in self.nodes if node.process is not None]
            for process in processes:
                process.send_signal(signal.SIGTERM)
            codes = [process.wait(timeout=90) for process in processes]
        self.summary["exit_codes"] = codes
        if any(codes):
            raise SystemExit(f"demo: an agent ended with {codes}; see {BUILD}/mini-*/stdout.txt")

    def _aggregate(self) -> None:
        assert self.store is not None
        now = datetime.now(UTC)
        year, number, _ = now.isocalendar()
        week, month = f"{year}-W{number:02d}", now.strftime("%Y-%m")
        with act("run the aggregator as cron does: rollup, weekly, monthly"):
            rollup = self._aggregator("rollup")
            weekly = self._aggregator("weekly", "--week", week)
            monthly = self._aggregator("monthly", "--month", month)
        bucket = self.store.store(BUCKET)
        listed = list_all(bucket, "")
        (BUILD / "bucket.txt").write_text("".join(f"{o.size:>8}  {o.key}\n" for o in listed))
        paths = {}
        for key in [*weekly["published"], *monthly["published"]]:
            path = BUILD / Path(key).name
            path.write_bytes(bucket.get(key, MOST_TABLE_BYTES).body)
            paths[key.rsplit("/", 1)[-1]] = str(path)
        report_path = next(p for n, p in paths.items() if n.startswith("report") and n.endswith("json"))
        report = json.loads(Path(report_path).read_text())
        written = set().union(*(n.windows() for n in self.nodes))
        self.summary |= {
            "nodes": len(self.nodes),
            "model": MAIN,
            "reported_completion_tokens": report["volume"]["completion_tok"],
            "reported_requests": report["volume"]["requests"],
            "batches_written": len(written),
            "batches_read": rollup["batches"],
            "quarantined": rollup["quarantined_total"],
            "evictions": report["evictions"]["total"],
            "alerts": [m["embeds"][0]["title"].replace("\\", "") for m in self.sink.messages],
            "weekly": sorted(p for n, p in paths.items() if not n.startswith("report")),
            "pdf": next(p for n, p in paths.items() if n.endswith("pdf")),
            "report": report_path,
            "bucket_listing": str(BUILD / "bucket.txt"),
        }
        self.summary["outage"]["lost_batches"] = len(written) - rollup["batches"]

    def _close(self) -> int:
        s = self.summary
        s |= {
            "requests": self.tally.requests,
            "failed": self.tally.failed,
            "client_completion_tokens": self.tally.completion_tokens,
            "seconds": round(time.monotonic() - self.began, 1),
        }
        (BUILD / "summary.json").write_text(json.dumps(s, indent=2) + "\n")
        checks = [
            ("every request was answered", f"{s['requests']} requests, {s['failed']} failed", s["failed"] == 0),
            (
                "a model was swapped under load",
                f"{s['swap']['seconds']} s, {s['swap']['requests_during']} requests, {s['swap']['failed']} failed",
                s["swap"]["failed"] == 0 and s["swap"]["outcome"] == "flipped",
            ),
            (
                "a node was killed under load",
                f"{s['kill']['requests_during']} requests, {s['kill']['failed']} failed",
                s["kill"]["failed"] == 0,
            ),
            ("its alert was received", "; ".join(s["alerts"]) or "none", any("Node down" in a for a in s["alerts"])),
            (
                "a store outage lost nothing",
                f"{s['outage']['spooled_batches']} batches spooled, {s['outage']['lost_batches']} lost",
                s["outage"]["lost_batches"] == 0 and s["outage"]["spooled_batches"] > 0,
            ),
            (
                "every batch was rolled up once",
                f"{s['batches_written']} written, {s['batches_read']} rolled up",
                s["batches_written"] == s["batches_read"],
            ),
            (
                "completion tokens agree exactly",
                f"clients {s['client_completion_tokens']}, report {s['reported_completion_tokens']}",
                s["client_completion_tokens"] == s["reported_completion_tokens"],
            ),
            (
                "requests agree",
                f"clients {s['requests']}, report {s['reported_requests']}",
                s["requests"] - s["failed"] == s["reported_requests"],
            ),
            ("a model was evicted, with its reason", f"{s['evictions']} in the report", s["evictions"] >= 1),
            ("within the time limit", f"{s['seconds']} s of 240", s["seconds"] <= 240),
        ]
        print("\n  expected                                        observed")
        for promise, seen, good in checks:
            print(f"  {'ok ' if good else 'NO '} {promise:<44}{seen}")
        print(f"\n  report   {s['pdf']}\n  weekly   {', '.join(s['weekly'])}\n  figures  {BUILD / 'summary.json'}")
        for error in sorted(set(self.tally.errors))[:10]:
            print(f"  error    {error}")
        return 0 if all(good for _, _, good in checks) else 1

    # ---- clients ----

    def _ask(
        self, node: Node, question: str, *, model: str = MAIN, stream: bool = False, temperature: float = 0.7
    ) -> str:
        """One request by the official client, without its retries, so that every failure is counted."""
        client = openai.OpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0, timeout=120)
        messages: Any = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        arguments: dict[str, Any] = {"model": model, "messages": messages, "max_tokens": 24, "temperature": temperature}
        text = ""
        try:
            with client:
                if stream:
                    usage = None
                    for chunk in client.chat.completions.create(
                        **arguments, stream=True, stream_options={"include_usage": True}
                    ):
                        usage = chunk.usage or usage
                        text += "".join(c.delta.content or "" for c in chunk.choices)
                else:
                    answer = client.chat.completions.create(**arguments)
                    usage, text = answer.usage, answer.choices[0].message.content or ""
        except openai.OpenAIError as error:
            self.tally.bad(f"{node.name}: {type(error).__name__}: {error}"[:200])
            return text
        if usage is None:
            self.tally.bad(f"{node.name}: no usage in the answer")
        else:
            self.tally.good(usage.completion_tokens)
        return text

    def _curl(self, node: Node) -> None:
        body = {"model": MAIN, "messages": [{"role": "user", "content": QUESTIONS[3]}], "max_tokens": 16}
        command = ["curl", "-sS", f"{node.url}/v1/chat/completions", "-d", json.dumps(body)]
        try:
            answer = json.loads(_run(command, self.environ))
            self.tally.good(answer["usage"]["completion_tokens"])
        except (RuntimeError, KeyError, ValueError, OSError) as error:
            self.tally.bad(f"curl: {type(error).__name__}")

    def _burst(self, gateways: Sequence[Node], stream: Callable[[int], bool]) -> None:
        at_once(
            [
                functools.partial(self._ask, gateway, QUESTIONS[n % len(QUESTIONS)], stream=stream(n))
                for n, gateway in enumerate(gateways)
            ]
        )

    @contextlib.contextmanager
    def _load(self, gateways: Sequence[Node], *, stream: bool = True, clients: int = 3) -> Iterator["Counted"]:
        """Clients that send one request after another until the block ends."""
        over = threading.Event()
        counted = Counted(self.tally)

        def client(number: int) -> None:
            turn = number
            while not over.is_set():
                gateway, question = gateways[turn % len(gateways)], QUESTIONS[turn % len(QUESTIONS)]
                self._ask(gateway, question, stream=stream and turn % 2 == 0)
                turn += 1

        threads = [threading.Thread(target=client, args=(n,), daemon=True) for n in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield counted
        finally:
            over.set()
            for thread in threads:
                thread.join()
            counted.close()

    def _aggregator(self, verb: str, *words: str) -> dict[str, Any]:
        return _json_of(["mlxrack-aggregator", verb, *words], BUILD / "aggregator.toml", self.environ)


class Counted:
    """Requests of one act: the tally's growth since its start."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._before = (tally.requests, tally.failed)
        self._after: tuple[int, int] | None = None

    @property
    def requests(self) -> int:
        """Requests that ended in this act."""
        return (self._after or (self._tally.requests, 0))[0] - self._before[0]

    @property
    def failed(self) -> int:
        """How many of them failed."""
        return (self._after or (0, self._tally.failed))[1] - self._before[1]

    def close(self) -> None:
        """Stop counting."""
        self._after = (self._tally.requests, self._tally.failed)


def note(text: str) -> None:
    """Print a detail of an act."""
    print(f"        {text}", flush=True)


@contextlib.contextmanager
def act(title: str) -> Iterator[None]:
    """Print an act's title and duration."""
    began = time.monotonic()
    print(f"  ...   {title}", flush=True)
    yield
    print(f"  {time.monotonic() - began:4.1f} s", flush=True)


def wait(what: str, done: Callable[[], bool], limit_s: float) -> None:
    """Poll until done. Raises SystemExit with the condition on timeout."""
    deadline = time.monotonic() + limit_s
    while not done():
        if time.monotonic() > deadline:
            raise SystemExit(
                f"demo: timed out after {limit_s:.0f} s waiting until {what}; see {BUILD}/mini-*/state/logs"
            )
        time.sleep(0.2)


def _drained(node: Node) -> bool:
    push = node.cli("seal") and node.cli("status")["push"]
    return bool(push["waiting_batches"] == 0)


def _peer_state(node: Node, peer: str) -> str:
    return next((str(p["state"]) for p in node.cli("status")["peers"] if p["node"] == peer), "unknown")


def _run(command: list[str], environ: dict[str, str]) -> str:
    run = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"{Path(command[0]).name} {command[1]}: exit {run.returncode}: {run.stderr.strip()[-500:]}")
    return run.stdout


def _json_of(words: list[str], config: Path, environ: dict[str, str]) -> dict[str, Any]:
    """The JSON output of a console script."""
    command = [script(words[0]), *words[1:], "--json", "--config", str(config)]
    result: dict[str, Any] = json.loads(_run(command, environ))
    return result


def _secret_name(node: str) -> str:
    return f"MLXRACK_DEMO_{node.upper().replace('-', '_')}"


def _identity(node: str, environ: dict[str, str]) -> dict[str, Any]:
    """A node's credential: put and get below its own prefixes, read what all nodes share, nothing else."""
    own = [f"{verb}:{BUCKET}/{prefix}/v1/node={node}/*" for verb in ("Write", "Read") for prefix in ("raw", "urgent")]
    return {
        "name": node,
        "credentials": [{"accessKey": node, "secretKey": environ[_secret_name(node)]}],
        "actions": [*own, *(f"Read:{BUCKET}/{p}/*" for p in ("desired", "models", "release"))],
    }


def _reader(environ: dict[str, str]) -> dict[str, Any]:
    return {
        "name": "aggregator",
        "credentials": [{"accessKey": "aggregator", "secretKey": environ["MLXRACK_DEMO_READER"]}],
        "actions": [f"Read:{BUCKET}", f"List:{BUCKET}", f"Write:{BUCKET}"],
    }


def _write_agent_toml(name: str, ports: dict[str, int], store_port: int) -> None:
    budget = 4_000_000_000 if name == NODES[0] else 1_600_000_000
    tables = (
        f"[memory]\nbudget_bytes = {budget}\n\n[loader]\nthreads = 1\ncalibrate = false\n\n"
        f"[telemetry]\nsample_s = {SAMPLE_S}\nupload_s = {SAMPLE_S}\n\n"
        '[peers]\nsecret = "env:MLXRACK_DEMO_RACK"\n'
    )
    peers = "".join(
        f'[[peers.nodes]]\nid = "{other}"\nurl = "http://127.0.0.1:{port}"\n'
        for other, port in ports.items()
        if other != name
    )
    served = "".join(
        f"[[models]]\nname = {json.dumps(model)}\npath = {json.dumps(str(default_folder() / model))}\n"
        f"preload = {json.dumps(model == MAIN)}\nrows = 4\nplan_context_tok = 1024\ncache_bytes = 67108864\n"
        for model in (MAIN, SECOND)
    )
    (BUILD / name).mkdir(parents=True)
    access = secret_file(BUILD / name / "access.key", name)
    store = s3_table(f"http://127.0.0.1:{store_port}", BUCKET, access, f"env:{_secret_name(name)}")
    agent_toml(BUILD / name, name, RACK, f"{tables}{peers}\n{served}", port=ports[name], store=store)


def _aggregator_toml(store_port: int) -> str:
    mac = chips.find_mac(MAC)
    assert mac is not None
    price, _ = chips.price(mac, min(mac.memory_gb))
    nodes = "".join(f'[[nodes]]\nid = "{n}"\nprice = {price or 0:g}\nchip = "{mac.chip}"\n' for n in NODES)
    access = secret_file(BUILD / "reader.key", "aggregator")
    store = s3_table(f"http://127.0.0.1:{store_port}", BUCKET, access, "env:MLXRACK_DEMO_READER")
    discord = '[discord]\nalerts = "env:MLXRACK_DEMO_WEBHOOK"\n'
    return f'rack = "{RACK}"\ntimezone = "UTC"\n\n{store}\n{discord}\n{nodes}'


def main() -> int:
    """Command line."""
    missing = [m for m in (MAIN, SECOND) if not (default_folder() / m / "config.json").is_file()]
    if missing:
        raise SystemExit(f"demo: model {', '.join(missing)} not found; run `make model` first (make demo does)")
    shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True)
    return Demo().run()


if __name__ == "__main__":
    sys.exit(main())
