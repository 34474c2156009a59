"""The bucket and the aggregator: findings 6, 9, 10 and 11."""

import contextlib
import ctypes
import http.server
import json
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from scripts.abuse import Place, Seen, Watch, agent_of, all_of, case, log_of, program
from scripts.common import s3_table, secret_file
from shared.batch import seal
from shared.ids import NodeId
from shared.keys import RawKey, batch_key, manifest_key
from shared.records import Record
from shared.store import list_all
from shared.store_dir import DirectoryStore
from tests.builders import batch, engine, host, resident, served
from tests.rack.harness import model

_CLONE_NEWNS = 0x20000


class Hostile(http.server.BaseHTTPRequestHandler):
    """What answers where a store should: as ``mode`` says."""

    protocol_version = "HTTP/1.1"
    mode = "503"
    size = 600 << 20

    def _answer(self, status: int, body: bytes = b"", *headers: tuple[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for name, value in (("Content-Length", str(len(body) if length is None else length)), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.close_connection = True
        with contextlib.suppress(OSError):
            getattr(self, f"_{self.mode}")()

    do_PUT = do_HEAD = do_POST = do_DELETE = do_GET  # noqa: N815

    def _503(self) -> None:
        self._answer(503, b"<Error><Code>SlowDown</Code></Error>")

    def _html(self) -> None:
        self._answer(200, b"<html><title>Log in to this network</title></html>", ("Content-Type", "text/html"))

    def _redirect(self) -> None:
        self._answer(307, b"", ("Location", "http://127.0.0.1:1/elsewhere"))

    def _cut(self) -> None:
        self._answer(200, b"{", ("ETag", '"1"'), length=1000)

    def _huge(self) -> None:
        self._answer(200, b"", ("ETag", '"1"'), length=self.size)
        for _ in range(self.size >> 20):
            self.wfile.write(b" " * (1 << 20))

    def _drip(self) -> None:
        self._answer(200, b"", ("ETag", '"1"'), length=1000)
        for _ in range(600):
            self.wfile.write(b" ")
            self.wfile.flush()
            time.sleep(1)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@case(
    "hostile-store",
    "9",
    "a store that answers 200 with HTML, redirects, cuts, sends 600 MB, drips a byte a second",
    "chats go on, status says what answered and since when, memory and the stop are bounded",
    limit_s=300,
)
def hostile_store(place: Place) -> Seen:
    """One after the other; the reason of each must not be the one before."""
    Hostile.size = place.size(600, 300) << 20
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hostile)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    secret = secret_file(place.folder / "s3", "s3-secret-" + "0" * 32)
    agent = agent_of(place, [model()], start=False)
    text = agent.config.read_text()
    own = text[text.index("[store]") : text.index("[telemetry]")]
    agent.config.write_text(text.replace(own, s3_table(f"http://127.0.0.1:{server.server_port}", "b", secret, secret)))
    agent.start().ready()
    checks, reasons = [], []
    for mode in ("503", "html", "redirect", "cut", "huge", "drip"):
        Hostile.mode = mode
        with Watch(agent) as seen:
            good, asked, until_s = 0, 0, time.monotonic() + place.size(25, 10)
            while time.monotonic() < until_s:
                asked += 1
                good += agent.chat().status == 200
                time.sleep(0.2)
        push = agent.status()["push"]
        reasons.append(f"{mode}: {push['reason'][:160]!r}" + (" since" if "since" in json.dumps(push) else ""))
        checks.append((good == asked and seen.peak_mb < 400, f"{mode}: {good} of {asked}, {seen.peak_mb:.0f} MB"))
    began = time.monotonic()
    with contextlib.suppress(subprocess.TimeoutExpired):
        agent.stop()
    took, log = time.monotonic() - began, log_of(agent)
    named = [one for one in reasons if one.startswith(("html", "redirect")) and "S3" in one]
    return all_of(
        *checks,
        (len(named) == 2, "; ".join(reasons)),
        ("raised an exception" not in log, "no traceback in the log"),
        ("s3-secret-" not in log, "no secret in the log"),
        (took < 25, f"stopped after {took:.0f} s"),
    )


def _put(bucket: DirectoryStore, node: str, minute: int, records: Sequence[Record]) -> None:
    """One segment of a node."""
    made = batch(records, node=node, minute=minute)
    key = RawKey(NodeId(node), made.incarnation, made.epoch, made.seq, made.seq)
    bucket.put(batch_key(key), seal([made]))


def _good(bucket: DirectoryStore, node: str, minutes: int) -> None:
    for minute in range(minutes):
        _put(bucket, node, minute, [served(worker=node), engine(), resident(), host()])


def _aggregate(place: Place, *words: str, tmp: Path | None = None) -> tuple[int, str]:
    config = place.folder / "aggregator.toml"
    config.write_text(
        'rack = "r"\ntimezone = "UTC"\n[store]\nkind = "directory"\n'
        f"path = {json.dumps(str(place.folder / 'bucket'))}\n"
        + "".join(f'[[nodes]]\nid = "{node}"\nprice = 1999\n' for node in ("n1", "n2"))
    )
    environ = {"TMPDIR": str(tmp)} if tmp else {}
    return program("mlxrack-aggregator", *words, "--config", str(config), environ=environ)


@contextlib.contextmanager
def _largest(folder: Path) -> Iterator[list[float]]:
    """The most bytes that a folder held, in MB."""
    most, done = [0.0], threading.Event()

    def looks() -> None:
        while not done.wait(0.05):
            with contextlib.suppress(OSError):
                most[0] = max(most[0], sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6)

    thread = threading.Thread(target=looks, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def _small_disk(folder: Path, mb: int) -> str:
    """Mount a small file system there, which ends with this process; why not, where that is not possible."""
    folder.mkdir()
    with contextlib.suppress(AttributeError, OSError):
        if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS) == 0:
            for words in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", f"size={mb}m", "tmpfs", str(folder)]):
                subprocess.run(["mount", *words], check=True, capture_output=True)
            return ""
    return " (a whole disk: only root can mount a small one)"


@case(
    "zip-bomb-segments",
    "6",
    "24 and more segments of 936 bytes with 19,000 equal records each, of one node; a disk of 150 MB",
    "rc 0, a commit, and the other node's telemetry is in it",
    limit_s=300,
)
def zip_bombs(place: Place) -> Seen:
    """17,000 times larger unpacked; before, ENOSPC ended every later run without a commit."""
    bucket, tmp, count = DirectoryStore(place.folder / "bucket"), place.folder / "tmp", place.size(72, 24)
    for minute in range(count):
        _put(bucket, "n1", minute, [served(worker="n1")] * 19_000)
    _good(bucket, "n2", 30)
    sizes = [one.size for one in list_all(bucket, "raw/v1/node=n1")]
    whole = _small_disk(tmp, 150)
    with _largest(tmp) as most:
        runs = [_aggregate(place, "rollup", tmp=tmp) for _ in range(2)]
    commits = list_all(bucket, "manifest/")
    cursors = json.loads(Path(place.folder / "bucket" / commits[-1].key).read_bytes())["cursors"] if commits else {}
    last = [said.strip().splitlines()[-1][:120] for _, said in runs if said.strip()]
    return all_of(
        (all(status == 0 for status, _ in runs), f"rc {[status for status, _ in runs]} {last}"),
        (bool(whole) or most[0] < 150, f"{len(sizes)} segments of {max(sizes)} bytes took {most[0]:.0f} MB{whole}"),
        (any("n2" in key for key in cursors), f"cursors of {sorted(cursors)}"),
    )


@case(
    "two-aggregators",
    "10",
    "a commit of a newer aggregator with a field that this one does not know",
    "this one refuses with a sentence and writes nothing",
)
def two_aggregators(place: Place) -> Seen:
    """Before: it wrote the next commit without the field, rc 0, no word."""
    bucket = DirectoryStore(place.folder / "bucket")
    _good(bucket, "n1", 3)
    first, _ = _aggregate(place, "rollup")
    last = list_all(bucket, "manifest/")[-1]
    tree = json.loads((place.folder / "bucket" / last.key).read_bytes())
    newer = {**tree, "number": tree["number"] + 1, "schema": 999, "min_reader": 999, "future_field": {"kept": 1}}
    bucket.put(manifest_key(newer["number"]), json.dumps(newer).encode())
    _good(bucket, "n1", 6)
    status, said = _aggregate(place, "rollup")
    kept = list_all(bucket, "manifest/")[-1].key == manifest_key(newer["number"])
    line = said.strip().splitlines()[-1] if said.strip() else ""
    return all_of(
        (first == 0, f"first run rc {first}"),
        (status != 0 and "newer" in line, f"rc {status}: {line[:160]}"),
        (kept, "the newer commit is the last one" if kept else "it was overwritten by one without the field"),
    )


EVIL = ("![x](http://evil.example/b.png)", "[go](http://evil.example)", "=cmd|'/c calc'!A1", "@SUM(1)", "a|b\n# forged")


@case(
    "report-injection",
    "11",
    "names and reasons with images, links, table cells, formulas and control characters",
    "no report shows them as such: Markdown, HTML, CSV, PDF",
    limit_s=240,
)
def report_injection(place: Place) -> Seen:
    """A node's credential writes its records; the weekly is meant for tickets and chats."""
    bucket = DirectoryStore(place.folder / "bucket")
    for minute, text in enumerate(EVIL * 3):
        records: list[Record] = [served(text, worker="n1"), served(worker=text), engine(text), resident(text), host()]
        for changed in ({"key_id": text}, {"version": text}, {"finish": text}, {"cause": text}):
            with contextlib.suppress(TypeError, msgspec.ValidationError):
                records.append(served(worker="n1", **changed))  # type: ignore[arg-type]
        _put(bucket, "n1", minute, records)
    _good(bucket, "n2", 60)
    runs = [
        _aggregate(place, *words)
        for words in (["rollup"], ["weekly", "--week", "2026-W47"], ["monthly", "--month", "2026-11"])
    ]
    found: dict[str, int] = {}
    for one in list_all(bucket, "report/"):
        body, kind = (place.folder / "bucket" / one.key).read_bytes(), one.key.rpartition(".")[2]
        found[kind] = found.get(kind, 0) + _live(kind, body)
    return all_of(
        (all(status == 0 for status, _ in runs), f"rc {[status for status, _ in runs]}"),
        (set(found) >= {"md", "html"} and not any(found.values()), f"live injections by kind: {found}"),
    )


def _live(kind: str, body: bytes) -> int:
    """How many of the texts would be rendered or run by what opens such a file."""
    text = body.decode("utf-8", "replace")
    if kind == "md":
        return text.count("![x](") + text.count("[go](") + sum(line == "# forged" for line in text.splitlines())
    if kind == "html":
        return text.count('src="http://evil') + text.count('href="http://evil')
    if kind == "csv":
        cells = (cell.strip('"') for line in text.splitlines() for cell in line.split(","))
        return sum(cell.startswith(("=cmd", "@SUM")) for cell in cells)
    return body.count(b"/URI (http://evil") if kind == "pdf" else 0
