"""What is said of an answer to a heartbeat that no peer gives: who answered instead, and what to correct."""

from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web

from agent.mesh import heartbeats
from agent.mesh.heartbeats import Heartbeats
from agent.mesh.peer_client import PeerClient, another_node
from agent.mesh.peers import PeerTable
from agent.mesh.signing import NODE_HEADER, RackKeys
from shared.errors import RackError

PAGE = "<html>hello</html>"
OURS = {"X-Mlxrack-Request-Id": "req_1"}
Answer = Callable[[], web.Response]


def error(status: int, code: str, **headers: str) -> web.Response:
    return web.json_response({"error": {"code": code}}, status=status, headers={**OURS, **headers})


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda: web.Response(text=PAGE, content_type="text/html"), "a web page answers there (HTTP 200)"),
        (lambda: web.Response(text=PAGE, content_type="text/html", status=502), "a web page answers there (HTTP 502)"),
        (lambda: web.json_response({}, status=404), "what answers there (HTTP 404) is not an mlxrack agent"),
        (lambda: web.json_response([], status=401), "what answers there (HTTP 401) is not an mlxrack agent"),
        (lambda: web.Response(status=302, headers={"Location": "/login"}), "a peer never redirects"),
        (lambda: error(404, "unknown_url"), "ends with the port, without /v1"),
        (lambda: error(421, "wrong_host"), "set listen.host and listen.names there"),
        (lambda: error(503, "connections_full"), "too many open connections"),
        (lambda: error(500, "internal"), "answered 500"),
        (lambda: error(403, "wrong_node", **{NODE_HEADER: "n7"}), "node 'n7' answers at this url"),
        (lambda: error(403, "wrong_node", **{NODE_HEADER: "me"}), "leads back to this node itself ('me'), not to 'n2'"),
        (lambda: error(403, "wrong_node"), "another node answers at this url, which peers.nodes calls 'n2'"),
        (lambda: error(403, "wrong_node", **{NODE_HEADER: "<b>" * 9}), "another node answers at this url"),
    ],
)
async def test_who_answers_instead_of_a_peer_is_said(answer: Answer, words: str) -> None:
    async def serve(_: web.Request) -> web.Response:
        return answer()

    app = web.Application()
    handler: Callable[[web.Request], Awaitable[web.Response]] = serve
    app.router.add_get("/peer/v1/beat", handler)
    runner, client = web.AppRunner(app), PeerClient(RackKeys(["a secret of the rack, 61f0c2b7e9"]), "me")
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = site.name if not site.name.endswith(":0") else f"http://127.0.0.1:{runner.addresses[0][1]}"
        with pytest.raises(RackError) as caught:
            await client.heartbeat("n2", url, 20)
        assert words in caught.value.message
        assert "<b>" not in caught.value.message
    finally:
        await client.close()
        await runner.cleanup()


def test_the_node_that_answers_is_named() -> None:
    assert another_node("n2", "n3", "n1").startswith("node 'n2' answers at this url, which peers.nodes calls 'n3'")
    assert another_node("n1", "n3", "n1").startswith("this url leads back to this node itself")


def test_a_problem_is_a_warning_once_and_again_when_it_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(heartbeats.log, "warning", lambda event, **fields: said.append(fields["reason"]))
    table = PeerTable([("n2", "http://u")], beat_s=1, now=0)
    beats = Heartbeats(table, PeerClient(RackKeys(["x" * 32]), "me"), lambda _: None, rack="r", beat_s=1)
    for seconds in (2.1, 2.4, 12.9):
        beats._note("n2", f"peer http://u: clock skew of {seconds} s; synchronize both clocks")
    assert len(said) == 1
    beats._note("n2", "peer http://u: nothing listens on u:80")
    beats._note("n2", "")
    beats._note("n2", "peer http://u: nothing listens on u:80")
    assert len(said) == 3
