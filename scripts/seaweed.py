"""A real S3 server on loopback with credentials, for the demo and the tests: the one of `mlxrack-agent store serve`."""

from pathlib import Path
from types import TracebackType
from typing import Any

from agent.operator import store_server
from agent.operator.store_server import free_port
from scripts.common import s3_table, secret_file
from shared.store_s3 import S3Store

__all__ = ["SeaweedFS", "free_port"]


class SeaweedFS:
    """One server over ``folder``, a context manager. ``identities`` is the value of that key in its configuration."""

    ADMIN = ("rackadmin", "rackadminsecret0")

    def __init__(self, folder: Path, identities: list[dict[str, Any]] | None = None) -> None:
        self.port = free_port()
        admin = store_server.identity("admin", *self.ADMIN)
        options = store_server.Options(folder, "probe-bucket", port=self.port)
        # a worker's tests make a hundred buckets in it, with a few kilobytes each
        self._server = store_server.Server(options, [admin, *(identities or [])], volume_mb=32)

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self.port}"

    def store(self, bucket: str, **more: Any) -> S3Store:
        """A client with the administrator's credentials."""
        access_key, secret_key = self.ADMIN
        return S3Store(endpoint=self.endpoint, bucket=bucket, access_key=access_key, secret_key=secret_key, **more)

    def table(self, folder: Path, bucket: str) -> str:
        """A configuration's [store] table with the administrator's credentials in files of ``folder``."""
        access, secret = (secret_file(folder / n, key) for n, key in zip(("access", "secret"), self.ADMIN, strict=True))
        return s3_table(self.endpoint, bucket, access, secret)

    def start(self) -> "SeaweedFS":
        """Start and wait until it is healthy. Raises Halt with the end of its log."""
        self._server.options.folder.mkdir(parents=True, exist_ok=True)
        self._server.start()
        return self

    def stop(self) -> None:
        """Kill it; every acknowledged write is on disk."""
        self._server.kill()

    def __enter__(self) -> "SeaweedFS":
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()
