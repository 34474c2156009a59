"""TLS between nodes: who is refused and why, and files that change while the listener is open."""

import asyncio
import contextlib
import datetime as dt
import os
import ssl
import warnings
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import aiohttp
import msgspec
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from agent.mesh.certificates import Pair, make_authority
from agent.mesh.node_names import called_node, server_name, wrong_certificate
from agent.mesh.peer_client import PeerClient
from agent.mesh.signing import RackKeys
from agent.mesh.tls import NodeTls
from agent.mesh.tls_errors import REPEAT_S, Refusals
from scripts.mock_worker import MockWorker
from shared.errors import Halt, RackError
from shared.records import CertificateExpires
from shared.transport import Tls
from tests.rack.harness import SECRET
from tests.rack.tls_rack import Authority

DAY_MS = 86_400_000


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


async def node_tls(tls: Tls, node: str) -> NodeTls:
    """Files are read in a thread, as in the daemon."""
    return await asyncio.to_thread(NodeTls, tls, rack="r", node=node)


@contextlib.asynccontextmanager
async def listening(context: ssl.SSLContext) -> AsyncIterator[int]:
    """A worker that answers heartbeats as n1, behind this context."""
    worker = MockWorker("n1", "r", SECRET)
    app = web.Application()
    app.router.add_get("/peer/v1/beat", worker._beat)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    await site.start()
    try:
        yield site.port
    finally:
        await runner.cleanup()


async def heartbeat(port: int, tls: NodeTls | None, *, node: str = "n1", scheme: str = "https") -> str:
    """ "" for an answer, else the sentence that `status` shows."""
    client = PeerClient(RackKeys([SECRET]), "n2", tls=tls)
    try:
        await client.heartbeat(node, f"{scheme}://127.0.0.1:{port}", 10.0)
    except RackError as error:
        return error.message.partition(": ")[2]
    finally:
        await client.close()
    return ""


async def test_peers_verify_each_other(authority: Authority) -> None:
    async with listening((await node_tls(authority.issue("n1"), "n1")).listener) as port:
        assert await heartbeat(port, await node_tls(authority.issue("n2"), "n2")) == ""


IMPOSTORS = {
    "another node": ("n3", {}, "its certificate is that of mlxrack://r/n3, not of mlxrack://r/n1"),
    "another rack": ("n1", {"rack": "q"}, "its certificate is that of mlxrack://q/n1, not of mlxrack://r/n1"),
    "expired": ("n1", {"age_days": 50, "days": 49}, "the certificate has expired"),
    "not yet valid": ("n1", {"age_days": -2}, "the certificate is not valid yet"),
}


@pytest.mark.parametrize("which", IMPOSTORS)
async def test_an_impostor_of_the_same_ca_is_sent_nothing(authority: Authority, which: str) -> None:
    node, how, why = IMPOSTORS[which]
    own = authority.issue(node, name="impostor", **how)  # type: ignore[arg-type]
    async with listening(_plain_server(own)) as port:
        assert why in await heartbeat(port, await node_tls(authority.issue("n2"), "n2"))


async def test_a_certificate_of_another_ca_or_of_its_own_is_refused(authority: Authority, tmp_path: Path) -> None:
    mine = await node_tls(authority.issue("n2"), "n2")
    foreign = Authority(tmp_path / "other")
    self_signed = Tls(certificate=str(foreign.ca), key=str(foreign.ca.with_suffix(".key")))
    for own, why in (
        (foreign.issue("n1"), "signed by another CA than the one in tls.ca"),
        (self_signed, "the certificate is self-signed, not signed by the rack's CA"),
    ):
        async with listening(_plain_server(own)) as port:
            assert why in await heartbeat(port, mine)


async def test_there_is_no_downgrade_to_http(authority: Authority) -> None:
    mine = await node_tls(authority.issue("n2"), "n2")
    worker = MockWorker("n1", "r", SECRET)
    await worker.start()
    try:
        assert await heartbeat(worker.port, mine, scheme="http") == "", "it does answer"
        assert await heartbeat(worker.port, mine) == "the other side does not speak TLS"
    finally:
        await worker.stop()


async def test_a_redirect_is_not_followed() -> None:
    worker, elsewhere = MockWorker("n1", "r", SECRET), web.Application()

    async def redirect(_: web.Request) -> web.Response:
        raise web.HTTPTemporaryRedirect(f"http://127.0.0.1:{worker.port}/peer/v1/beat")

    elsewhere.router.add_get("/peer/v1/beat", redirect)
    await worker.start()
    runner = web.AppRunner(elsewhere)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        client = PeerClient(RackKeys([SECRET]), "n2")
        with pytest.raises(RackError, match="never redirects"):
            await client.heartbeat("n1", f"http://127.0.0.1:{site.port}", 10.0)
        await client.close()
    finally:
        await runner.cleanup()
        await worker.stop()


@pytest.mark.parametrize(
    ("which", "reason"),
    [
        ("expired", "the certificate has expired"),
        ("another CA", "signed by another CA"),
        ("self-signed", "self-signed"),
        ("http", "plain HTTP was spoken to the TLS port; use https://"),
        ("TLS 1.0", "no TLS version from 1.2 on"),
        ("TLS 1.1", "no TLS version from 1.2 on"),
        ("noise", "does not speak TLS"),
    ],
)
async def test_who_calls_wrongly_gets_nothing_and_the_log_says_why(
    authority: Authority, tmp_path: Path, which: str, reason: str
) -> None:
    server, foreign = await node_tls(authority.issue("n1"), "n1"), Authority(tmp_path / "other")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(authority.ca)
    if which in ("expired", "another CA"):
        own = authority.issue("n2", age_days=50, days=49) if which == "expired" else foreign.issue("n2")
        context.load_cert_chain(own.certificate, own.key)
    elif which == "self-signed":
        context.load_cert_chain(foreign.ca, foreign.ca.with_suffix(".key"))
    elif which.startswith("TLS"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            version = ssl.TLSVersion.TLSv1 if which == "TLS 1.0" else ssl.TLSVersion.TLSv1_1
            context.minimum_version = context.maximum_version = version
        context.set_ciphers("ALL:@SECLEVEL=0")
    with capture_logs() as logged:
        async with listening(server.listener) as port, aiohttp.ClientSession() as session:
            if which == "noise":
                await _noise(port)
            else:
                scheme = "http" if which == "http" else "https"
                with pytest.raises((aiohttp.ClientError, OSError)):
                    await session.get(f"{scheme}://127.0.0.1:{port}/", ssl=context, server_hostname=server_name("n1"))
            # the server still serves others
            assert await heartbeat(port, await node_tls(authority.issue("n3"), "n3")) == ""
    assert [one["event"] for one in logged] == ["tls_refused"]
    assert reason in logged[0]["reason"]


async def _noise(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"\x00\x01\x02\x03" * 100)
    await reader.read()
    writer.close()


def test_a_repeated_refusal_is_logged_once_a_minute_with_its_count() -> None:
    now = [0.0]
    refusals = Refusals(lambda: now[0])
    with capture_logs() as logged:
        for _ in range(10_000):
            refusals.note("plain HTTP")
        now[0] = REPEAT_S
        refusals.note("plain HTTP")
    assert [one["times"] for one in logged] == [1, 10_000]


def test_a_certificate_names_nodes_by_uri_alone() -> None:
    def shown(*names: tuple[str, str]) -> dict[str, object]:
        return {"subject": ((("commonName", "n1"),),), "subjectAltName": names}

    assert wrong_certificate(shown(("DNS", "x"), ("URI", "mlxrack://r/n1")), "r", "n1") == ""
    assert wrong_certificate(shown(("URI", "mlxrack://r/n2"), ("URI", "mlxrack://r/n1")), "r", "n1") == ""
    for names in (
        [],
        [("DNS", "mlxrack://r/n1")],
        [("URI", "mlxrack://r/n1/")],
        [("URI", "mlxrack://r/N1")],
        [("URI", "mlxrack://r/n11")],
        [("URI", "https://r/n1")],
        [("URI", "mlxrack://R/n1")],
    ):
        assert wrong_certificate(shown(*names), "r", "n1") != "", names
    assert "no certificate" in wrong_certificate(None, "r", "n1")
    assert "no certificate" in wrong_certificate({}, "r", "n1")


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True))
def test_a_node_is_called_by_a_name_of_its_own(node: str) -> None:
    name = server_name(node)
    assert called_node(name) == node
    assert len(name) < 254
    assert all(0 < len(label) < 64 for label in name.split("."))
    assert called_node(f"{node}.example") == called_node(None) == called_node("zz.peer.mlxrack.internal") == ""


# ---- two certificates ----


async def test_clients_may_see_another_certificate_than_peers(authority: Authority, tmp_path: Path) -> None:
    public = Authority(tmp_path / "public", rack="public")
    own, seen = authority.issue("n1"), public.issue("site")
    both = Tls(
        certificate=seen.certificate, key=seen.key, ca=own.ca, node_certificate=own.certificate, node_key=own.key
    )
    async with listening((await node_tls(both, "n1")).listener) as port, aiohttp.ClientSession() as session:
        assert await heartbeat(port, await node_tls(authority.issue("n2"), "n2")) == ""
        async with session.get(f"https://localhost:{port}/x", ssl=public.clients()) as answer:
            assert answer.status == 404, "a client without a certificate, and with a public CA"
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await session.get(f"https://localhost:{port}/x", ssl=authority.clients())


# ---- files ----


@pytest.mark.parametrize("which", ["certificate", "key"])
async def test_a_half_written_pair_leaves_the_last_good_one(authority: Authority, which: str) -> None:
    """Whatever part of a new file is there: the listener answers as before, and takes the whole pair at last."""
    server, mine = await node_tls(own := authority.issue("n1"), "n1"), await node_tls(authority.issue("n2"), "n2")
    authority.issue("n1", name="next")
    paths = {one: Path(getattr(own, one)) for one in ("certificate", "key")}
    after = {one: authority.folder.joinpath(f"next{path.suffix}").read_bytes() for one, path in paths.items()}
    whole = after[which]
    async with listening(server.listener) as port:
        for cut in (*range(0, len(whole), len(whole) // 6), len(whole)):
            paths[which].write_bytes(whole[:cut])
            assert not await asyncio.to_thread(server.reload), cut
            assert "the certificates loaded before stay in force" in server.problem
            assert any("stay in force" in warning for warning in server.warnings())
            assert await heartbeat(port, mine) == ""
        other = "key" if which == "certificate" else "certificate"
        paths[other].write_bytes(after[other])
        assert await asyncio.to_thread(server.reload)
        assert (server.problem, await asyncio.to_thread(server.reload)) == ("", False)
        assert await heartbeat(port, mine) == ""
        assert server._loaded.leaf == after["certificate"]


@pytest.mark.parametrize("kind", ["a FIFO", "a folder", "a device", "a bomb"])
@pytest.mark.parametrize("which", ["certificate", "key", "ca"])
async def test_what_is_no_file_of_a_certificate_s_size_is_not_waited_for(
    authority: Authority, which: str, kind: str
) -> None:
    """Opening a FIFO waits for a writer, which would hold the reload, and with it the end of the process, for ever."""
    server = await node_tls(own := authority.issue("n1"), "n1")
    path = Path(getattr(own, which))
    before = path.read_bytes()
    path.unlink()
    if kind == "a FIFO":
        os.mkfifo(path, 0o600)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        path.touch(mode=0o600)
        os.truncate(path, 8 << 30)
    async with asyncio.timeout(60):
        assert not await asyncio.to_thread(server.reload)
    assert f"tls: {path}: cannot be read (" in server.problem
    path.rmdir() if kind == "a folder" else path.unlink()
    path.touch(mode=0o600)
    path.write_bytes(before)
    assert await asyncio.to_thread(server.reload)
    assert server.problem == ""


@pytest.mark.parametrize(
    "how", ["gone", "another CA", "another node", "another rack", "expired", "readable", "unusable", "text"]
)
def test_files_that_peers_would_refuse_are_not_put_in_force(authority: Authority, tmp_path: Path, how: str) -> None:
    own, foreign = authority.issue("n1"), Authority(tmp_path / "other")
    server = NodeTls(own, rack="r", node="n1")
    key = Path(own.key)
    if how == "gone":
        key.unlink()
    elif how == "another CA":
        foreign.folder = authority.folder
        foreign.issue("n1")
    elif how in ("another node", "another rack", "expired"):
        more = {"another node": {}, "another rack": {"rack": "q"}, "expired": {"age_days": 50, "days": 49}}[how]
        authority.issue("n3" if how == "another node" else "n1", name="n1", **more)  # type: ignore[arg-type]
    elif how == "readable":
        key.write_bytes(key.read_bytes())
        key.chmod(0o644)
        os.utime(key, (1, 1))
    elif how == "unusable":
        Path(own.certificate).write_bytes(authority.ca.read_bytes())
        key.write_bytes(authority.ca.with_suffix(".key").read_bytes())
    else:
        Path(own.ca).write_text("no certificate")
    assert not server.reload()
    assert server.problem, how
    if how != "expired":  # at a start that is reported, and the node serves what it can
        with pytest.raises(Halt, match="tls: "):
            NodeTls(own, rack="r", node="n1")


async def test_the_rack_s_ca_is_replaced_without_a_restart(authority: Authority, tmp_path: Path) -> None:
    """Both CAs are trusted while nodes get new certificates; then the old one's are refused."""
    server, old = await node_tls(authority.issue("n1"), "n1"), await node_tls(authority.issue("n2"), "n2")
    new = Authority(tmp_path / "new")
    before = authority.ca.read_bytes()
    async with listening(server.listener) as port:
        authority.ca.write_bytes(before + new.ca.read_bytes())
        authority.put("n1", _pair_of(new.issue("n1")))
        assert await asyncio.to_thread(server.reload)
        assert await asyncio.to_thread(old.reload)
        assert await heartbeat(port, old) == ""
        authority.ca.write_bytes(new.ca.read_bytes())
        assert await asyncio.to_thread(server.reload)
        assert "closes the connection" in await heartbeat(port, old)


def _pair_of(tls: Tls) -> Pair:
    return Pair(Path(tls.certificate).read_bytes(), Path(tls.key).read_bytes())


# ---- expiry ----


async def test_an_expiry_is_reported_at_the_start_and_at_each_step_once(authority: Authority) -> None:
    now = [int(dt.datetime.now(dt.UTC).timestamp() * 1000)]
    told: list[CertificateExpires] = []
    own = authority.issue("n1", days=40)
    made = partial(NodeTls, own, rack="r", node="n1", emit=told.append, wall_ms=lambda: now[0])
    tls = await asyncio.to_thread(made)

    def after(days: float) -> list[str]:
        before = len(told)
        now[0] += int(days * DAY_MS)
        tls.report()
        tls.report()
        return [one.certificate for one in told[before:]]

    assert after(0) == ["listener", "ca"]
    assert (after(9), tls.warnings()) == ([], [])
    assert after(2) == ["listener"]
    assert tls.warnings() == ["the listener certificate expires in 28 days; replace its files in time"]
    assert after(20) == []
    assert after(3) == ["listener"], "seven days before"
    assert after(7) == ["listener"]
    assert "has expired" in tls.warnings()[0]
    authority.issue("n1", days=100)
    before = len(told)
    assert await tls.poll()
    assert [one.certificate for one in told[before:]] == ["listener"], "another certificate"
    assert tls.warnings() == []


def test_of_a_file_with_several_cas_the_first_to_end_is_reported(authority: Authority, tmp_path: Path) -> None:
    """While a CA is replaced both are in the file: nodes that still have certificates of the old one depend on it."""
    now = dt.datetime.now(dt.UTC)
    own, old = authority.issue("n1"), make_authority("r", now=now - dt.timedelta(days=3640))
    authority.ca.write_bytes(authority.ca.read_bytes() + old.certificate)
    warned = NodeTls(own, rack="r", node="n1").warnings()
    assert warned
    assert all(one.startswith("the ca certificate expires in") for one in warned)


def test_an_expired_certificate_does_not_keep_a_node_from_starting(authority: Authority) -> None:
    tls = NodeTls(authority.issue("n1", age_days=50, days=49), rack="r", node="n1")
    assert tls.warnings() == [
        "the listener certificate has expired; replace its files, which are read without a restart"
    ]


def _plain_server(tls: Tls) -> ssl.SSLContext:
    """A server that checks nothing, as an impostor would."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls.certificate, tls.key)
    return context


def test_events_travel_in_batches() -> None:
    one = CertificateExpires(t_ms=1, certificate="node", not_after_ms=2)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(one), type=CertificateExpires) == one
