"""A stand-in for the Hugging Face hub on loopback: what its client asks for a model, with faults on demand.

Large files are redirected to a second origin, as the hub redirects to its storage.
"""

import asyncio
import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from aiohttp import web

LARGE_BYTES = 50_000
"""Files from this size on have a SHA-256 and lie in the storage."""


class Sent(NamedTuple):
    """One download: the file, where it began, how many bytes were sent."""

    name: str
    start: int
    sent: int


class Repo:
    """A model; ``files`` by name."""

    def __init__(self, files: dict[str, bytes], commit: str = "c0ffee" + "0" * 34, **card: Any) -> None:
        self.files, self.commit, self.card = files, commit, card
        self.gated = False
        self.branches = {"main"}

    @classmethod
    def of_folder(cls, folder: Path, **more: Any) -> "Repo":
        """A model folder."""
        return cls({p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}, **more)


class StandInHub:
    """Models by ``org/name``. ``corrupt`` counts, by file, how often a wrong byte is sent; ``cut`` ends the next
    download of a file after so many bytes; ``hold`` stops at this byte of a file until ``release`` is set; ``token``
    opens gated models; ``answers`` are given instead of a model's description."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.token = "hf_right"
        self.sent: list[Sent] = []
        self.asked: list[str] = []
        self.answers: dict[str, tuple[int, dict[str, str]]] = {}
        self.corrupt: dict[str, int] = {}
        self.cut: dict[str, int] = {}
        self.hold: dict[str, int] = {}
        self.held, self.release = threading.Event(), threading.Event()
        self.ranges = True
        self.tokens_at_storage: list[str] = []
        self.port = 0

    @property
    def endpoint(self) -> str:
        """HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.port}"

    def bytes_of(self, name: str) -> int:
        """How many bytes of a file were sent."""
        return sum(one.sent for one in self.sent if one.name == name)

    # ---- what the client asks ----

    async def _info(self, request: web.Request) -> web.Response:
        name = f"{request.match_info['org']}/{request.match_info['name']}"
        self.asked.append(f"info {name}")
        if name in self.answers:
            status, headers = self.answers[name]
            return web.json_response({}, status=status, headers=headers)
        if (repo := self.repos.get(name)) is None:
            return web.json_response({}, status=401, headers={"X-Error-Code": "RepoNotFound"})
        revision = request.match_info.get("revision", "main")
        if revision not in (*repo.branches, repo.commit):
            return web.json_response({}, status=404, headers={"X-Error-Code": "RevisionNotFound"})
        assert request.query.get("blobs"), "sizes are asked for"
        siblings = [_sibling(path, body) for path, body in repo.files.items()]
        gated = "manual" if repo.gated else False
        return web.json_response(
            {"id": name, "sha": repo.commit, "gated": gated, "cardData": repo.card, "siblings": siblings}
        )

    async def _resolve(self, request: web.Request) -> web.StreamResponse:
        repo, path = self.repos[f"{request.match_info['org']}/{request.match_info['name']}"], request.match_info["path"]
        self.asked.append(f"{request.method} {path}")
        if repo.gated and (status := self._refused(request.headers.get("Authorization", ""))):
            return web.Response(status=status, headers={"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        body = repo.files[path]
        headers = {"X-Repo-Commit": repo.commit, "ETag": f'"{_blob(body)}"'}
        if len(body) >= LARGE_BYTES:
            digest = hashlib.sha256(body).hexdigest()
            headers |= {"X-Linked-Size": str(len(body)), "X-Linked-Etag": f'"{digest}"'}
            # the same server under another name is another origin
            place = (
                f"http://localhost:{self.port}/storage/{request.match_info['org']}/{request.match_info['name']}/{path}"
            )
            return web.Response(status=302, headers={**headers, "Location": f"{place}?signature=secret"})
        return await self._send(request, path, body, headers)

    async def _storage(self, request: web.Request) -> web.StreamResponse:
        self.tokens_at_storage += request.headers.getall("Authorization", [])
        repo, path = self.repos[f"{request.match_info['org']}/{request.match_info['name']}"], request.match_info["path"]
        return await self._send(request, path, repo.files[path], {})

    def _refused(self, authorization: str) -> int:
        return 0 if authorization == f"Bearer {self.token}" else 403 if authorization else 401

    async def _send(self, request: web.Request, path: str, body: bytes, headers: dict[str, str]) -> web.StreamResponse:
        start = int(request.headers.get("Range", "bytes=0-")[6:].partition("-")[0]) if self.ranges else 0
        if self.corrupt.get(path, 0):
            self.corrupt[path] -= 1
            body = body[:-1] + bytes([body[-1] ^ 1])
        answer = web.StreamResponse(status=206 if start else 200, headers=headers)
        if start:
            answer.headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        answer.content_length = len(body) - start
        await answer.prepare(request)
        if request.method == "HEAD":
            return answer
        end = min(start + self.cut.pop(path, len(body)), max(start, self.hold.get(path, len(body))), len(body))
        self.sent.append(Sent(path, start, end - start))
        await answer.write(body[start:end])
        if path in self.hold:
            self.held.set()
            await asyncio.to_thread(self.release.wait, 120)
        if end < len(body):
            assert request.transport is not None
            request.transport.close()
        return answer

    @contextmanager
    def running(self) -> Iterator["StandInHub"]:
        """Serve until the block ends, in a thread with a loop of its own."""
        loop, ready = asyncio.new_event_loop(), threading.Event()
        stop = asyncio.Event()

        async def serve() -> None:
            app = web.Application()
            app.router.add_get("/api/models/{org}/{name}", self._info)
            app.router.add_get("/api/models/{org}/{name}/revision/{revision}", self._info)
            app.router.add_get("/storage/{org}/{name}/{path:.+}", self._storage)
            app.router.add_get("/{org}/{name}/resolve/{revision}/{path:.+}", self._resolve)
            runner = web.AppRunner(app, shutdown_timeout=1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            server: Any = site._server
            self.port = server.sockets[0].getsockname()[1]
            ready.set()
            await stop.wait()
            await runner.cleanup()

        thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
        thread.start()
        try:
            assert ready.wait(30)
            yield self
        finally:
            self.release.set()
            loop.call_soon_threadsafe(stop.set)
            thread.join(30)
            loop.close()


def _sibling(path: str, body: bytes) -> dict[str, Any]:
    told: dict[str, Any] = {"rfilename": path, "size": len(body), "blobId": _blob(body)}
    if len(body) >= LARGE_BYTES:
        told["lfs"] = {"size": len(body), "sha256": hashlib.sha256(body).hexdigest(), "pointerSize": 134}
    return told


def _blob(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
