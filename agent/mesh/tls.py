"""TLS of one node: what its listener shows clients and peers, what it shows and expects when it calls a peer.

A peer's certificate must be signed by the rack's CA and name the node that is meant, by its URI and not by a host
name; clients of the API need none. Peers ask for a server name of their own, so the listener can show clients a
certificate of a public CA and peers the node's own. Files are read again when they change; what cannot be used, half a
pair for example, leaves the last good ones in force.
"""

import asyncio
import contextlib
import ssl
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from agent.mesh.node_names import called_node, server_name, wrong_certificate
from agent.mesh.tls_errors import Refusals, WrongNode, is_expiry, reason_of
from shared.durable import write_whole
from shared.errors import Halt, RackError
from shared.logs import get_logger
from shared.records import EXPIRY_DAYS, CertificateExpires
from shared.regular_file import MOST_PEM_BYTES, read_file
from shared.transport import Tls

_DAY_MS = 86_400_000

log = get_logger("agent.mesh.tls")


class Expiry(NamedTuple):
    """When a certificate in use ends: ``certificate`` is listener, node or ca."""

    certificate: str
    not_after_ms: int


class _Files(NamedTuple):
    certificate: Path
    key: Path
    ca: Path | None
    node_certificate: Path
    node_key: Path


_Bodies = Mapping[Path, bytes]
"""The files' contents, each read once: what is tried is what is put in force."""


class Loaded(NamedTuple):
    """What is in force, or has been tried and may be; ``stamp`` identifies the ``files`` that it was made of."""

    files: _Files
    stamp: tuple[object, ...]
    clients: ssl.SSLContext
    peers: ssl.SSLContext | None
    calls: ssl.SSLContext
    expiries: tuple[Expiry, ...]
    leaf: bytes


class NodeTls:
    """``served`` is a file for the certificate that clients see, for commands on this machine; ``emit`` receives
    CertificateExpires at the start, after a change and when an expiry comes near. Raises Halt when the files cannot be
    used."""

    def __init__(
        self,
        config: Tls,
        *,
        rack: str,
        node: str,
        served: Path | None = None,
        emit: Callable[[CertificateExpires], None] = lambda _: None,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._rack, self._node = rack, node
        self._served, self._emit, self._wall_ms = served, emit, wall_ms
        self._told: dict[str, tuple[int, int]] = {}
        self.problem = ""
        """Why changed files are not in force; "" while all are."""
        files = _files(config)
        stamp, bodies = _stamp(files), _read(files)
        self._loaded = self._load(files, stamp, bodies, at_start=True)
        self.listener = self._listener(files, bodies)
        self._note_served()

    @property
    def calls(self) -> ssl.SSLContext:
        """How to call a peer, by its ``server_name``: with this node's certificate, and accepting that node's alone."""
        return self._loaded.calls

    def reload(self) -> bool:
        """Put changed files in force; whether it did. What is wrong with them is in ``problem``. Blocks."""
        loaded = self._loaded
        if _stamp(loaded.files) == loaded.stamp:
            self.problem = ""
            return False
        try:
            tried = self._tried(loaded.files)
        except RackError as error:
            if error.message != self.problem:
                log.warning("tls_files_not_used", reason=error.message)
            self.problem = f"{error.message}; the certificates loaded before stay in force"
            return False
        if self._loaded is loaded:  # else another thread was first
            self.put(tried)
        return True

    def tried(self, config: Tls) -> Loaded | None:
        """The files of another configuration, tried but not in force; None when nothing has changed. Blocks. Raises
        Halt."""
        files, loaded = _files(config), self._loaded
        return None if (files, _stamp(files)) == (loaded.files, loaded.stamp) else self._tried(files)

    def put(self, loaded: Loaded) -> None:
        """Put in force what was tried."""
        self._loaded, self.problem = loaded, ""
        self._note_served()
        log.info("tls_reloaded")

    async def poll(self) -> bool:
        """Reload what has changed, and report what expires; whether anything was reloaded."""
        changed = await asyncio.to_thread(self.reload)
        self.report()
        return changed

    def report(self) -> None:
        """Emit what is new about each certificate: another one, or a step nearer to its end."""
        now_ms = self._wall_ms()
        for one in self._loaded.expiries:
            state = (one.not_after_ms, step := steps_passed(one.not_after_ms, now_ms))
            if self._told.get(one.certificate) == state:
                continue
            self._told[one.certificate] = state
            event = CertificateExpires(t_ms=now_ms, certificate=one.certificate, not_after_ms=one.not_after_ms)
            self._emit(event)
            if step:
                log.warning("certificate_expires", certificate=one.certificate, days=_days(one.not_after_ms, now_ms))

    def warnings(self) -> Sequence[str]:
        """What an operator has to know, a sentence each."""
        now_ms = self._wall_ms()
        near = [one for one in self._loaded.expiries if steps_passed(one.not_after_ms, now_ms)]
        return [*([self.problem] if self.problem else []), *(expiry_text(one, now_ms) for one in near)]

    def _note_served(self) -> None:
        if self._served is not None:
            with contextlib.suppress(OSError):  # a full disk must not keep it from serving
                write_whole(self._served, self._loaded.leaf, synced=False)

    # ---- contexts ----

    def _tried(self, files: _Files) -> Loaded:
        stamp = _stamp(files)
        return self._load(files, stamp, _read(files), at_start=False)

    def _load(self, files: _Files, stamp: tuple[object, ...], bodies: _Bodies, *, at_start: bool) -> Loaded:
        """``stamp`` is from before the files were read, so that what changes meanwhile is read again."""
        clients = _server(files.certificate, files.key, files.ca, bodies)
        peers = _server(files.node_certificate, files.node_key, files.ca, bodies) if files.ca else None
        leaf, ends = _leaf(bodies[files.certificate]), tuple(_expiries(files, bodies))
        loaded = Loaded(files, stamp, clients, peers, self._calling(files, bodies), ends, leaf)
        if peers is not None:
            self._prove(files, loaded.calls, peers, at_start=at_start)
        return loaded

    def _prove(self, files: _Files, calls: ssl.SSLContext, peers: ssl.SSLContext, *, at_start: bool) -> None:
        """Shake hands with ourselves: whatever is wrong with key, CA, names or usage is found before a peer finds it.
        At a start an expired certificate is reported and not refused: this node still serves. Raises Halt."""
        error = _handshake(calls, peers, server_name(self._node))
        if error is None or (at_start and is_expiry(error)):
            return
        path = files.node_certificate
        raise Halt(f"tls: {path} cannot be used between nodes: {reason_of(error)}", code="bad_tls")

    def _listener(self, files: _Files, bodies: _Bodies) -> ssl.SSLContext:
        """The listener's context for as long as it listens; for each handshake it gives way to the one in force."""
        context = _server(files.certificate, files.key, files.ca, bodies)
        refusals = Refusals()

        class Heard(ssl.SSLObject):
            def do_handshake(self) -> None:
                try:
                    super().do_handshake()
                except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    raise
                except ssl.SSLError as error:
                    refusals.note(reason_of(error))
                    raise

        context.sslobject_class = Heard
        context.sni_callback = self._choose
        return context

    def _choose(self, shaking: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        loaded = self._loaded
        shaking.context = loaded.peers if called_node(name) and loaded.peers is not None else loaded.clients

    def _calling(self, files: _Files, bodies: _Bodies) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.check_hostname = False  # the node's own name is checked instead
        rack = self._rack

        class Checked(ssl.SSLObject):
            def do_handshake(self) -> None:
                super().do_handshake()
                if why := wrong_certificate(self.getpeercert(), rack, called_node(self.server_hostname)):
                    raise WrongNode(why)

        context.sslobject_class = Checked
        if files.ca is not None:
            _trust(context, files.ca, bodies)
            _load_pair(context, files.node_certificate, files.node_key, bodies)
        return context


def steps_passed(not_after_ms: int, now_ms: int) -> int:
    """How many of ``EXPIRY_DAYS`` before its end a certificate has passed, and one more when it has expired."""
    return sum(not_after_ms - now_ms < days * _DAY_MS for days in (*EXPIRY_DAYS, 0))


def expiry_text(one: Expiry, now_ms: int) -> str:
    """The sentence about a certificate that ends soon."""
    if one.not_after_ms <= now_ms:
        return f"the {one.certificate} certificate has expired; replace its files, which are read without a restart"
    days = _days(one.not_after_ms, now_ms)
    return f"the {one.certificate} certificate expires in {days} days; replace its files in time"


def _days(not_after_ms: int, now_ms: int) -> int:
    return (not_after_ms - now_ms) // _DAY_MS


def _files(config: Tls) -> _Files:
    def path(text: str) -> Path:
        return Path(text).expanduser()

    certificate, key = path(config.certificate), path(config.key)
    own = (path(config.node_certificate), path(config.node_key)) if config.node_certificate else (certificate, key)
    return _Files(certificate, key, path(config.ca) if config.ca else None, *own)


def _stamp(files: _Files) -> tuple[object, ...]:
    """What changes when a file does. A file may be missing for a moment."""
    found: list[object] = []
    for path in {path: None for path in files if path is not None}:
        try:
            seen = path.stat()
        except OSError as error:
            found.append(error.errno)
            continue
        found.append((seen.st_mtime_ns, seen.st_size, seen.st_ino))
    return tuple(found)


def _server(certificate: Path, key: Path, ca: Path | None, bodies: _Bodies) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    # a resumed session would skip the check of a certificate that has expired or been replaced since
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    _load_pair(context, certificate, key, bodies)
    if ca is not None:
        context.verify_mode = ssl.CERT_OPTIONAL  # clients have keys; routes for peers require one
        _trust(context, ca, bodies)
    return context


def _read(files: _Files) -> _Bodies:
    """Only regular files: opening a FIFO in place of one would wait for ever. Raises Halt."""
    bodies, keys = dict[Path, bytes](), (files.key, files.node_key)
    for path in (path for path in files if path is not None):
        try:
            bodies[path] = read_file(path, MOST_PEM_BYTES, unless_mode=stat.S_IROTH if path in keys else 0)
        except OSError as error:
            if isinstance(error, PermissionError) and error.errno is None:
                raise Halt(f"tls: {path}: the key is readable by others; chmod 600 it", code="bad_tls") from None
            raise Halt(f"tls: {path}: cannot be read ({error.strerror})", code="bad_tls") from None
    return bodies


@contextlib.contextmanager
def _as_path(body: bytes) -> Iterator[str]:
    """A path by which OpenSSL, which takes no bytes, can read them: of a private file without a name, of which nothing
    stays behind however this process ends."""
    with tempfile.TemporaryFile() as file:
        file.write(body)
        file.seek(0)  # writes it out, too; on some systems opening the path does not rewind
        yield f"/dev/fd/{file.fileno()}"


def _load_pair(context: ssl.SSLContext, certificate: Path, key: Path, bodies: _Bodies) -> None:
    """Raises Halt."""
    try:
        with _as_path(bodies[certificate]) as chain, _as_path(bodies[key]) as secret:
            # without a password OpenSSL would ask the terminal
            context.load_cert_chain(chain, secret, password="")
    except ssl.SSLError as error:
        raise Halt(f"tls: {certificate} and {key}: {reason_of(error)}", code="bad_tls") from None
    except OSError as error:
        raise Halt(f"tls: {certificate} or {key}: cannot be read ({error.strerror})", code="bad_tls") from None


def _trust(context: ssl.SSLContext, ca: Path, bodies: _Bodies) -> None:
    """Raises Halt."""
    try:
        with _as_path(bodies[ca]) as path:
            context.load_verify_locations(cafile=path)
    except ssl.SSLError:
        raise Halt(f"tls: {ca}: no certificate in PEM; it should be the CA's (ca.pem)", code="bad_tls") from None
    except OSError as error:
        raise Halt(f"tls: {ca}: cannot be read ({error.strerror})", code="bad_tls") from None


def _expiries(files: _Files, bodies: _Bodies) -> list[Expiry]:
    from agent.mesh.certificates import end_of  # seven megabytes that a node without TLS does without

    named = [("listener", files.certificate)]
    if files.ca is not None:
        named += [("ca", files.ca)]
        named += [("node", files.node_certificate)] if files.node_certificate != files.certificate else []
    try:
        return [Expiry(name, end_of(bodies[path])) for name, path in named]
    except RackError as error:
        raise Halt(f"tls: {error.message}", code="bad_tls") from None


def _leaf(certificate: bytes) -> bytes:
    from agent.mesh.certificates import first_of

    return first_of(certificate)


def _handshake(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> ssl.SSLError | None:
    """A handshake in memory: None, or why it failed."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(back, there, server_hostname=name), server.wrap_bio(there, back, server_side=True)]
    for _ in range(4):
        for end in list(ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLError as error:
                return error
            ends.remove(end)
    return ssl.SSLError("the handshake did not end") if ends else None
