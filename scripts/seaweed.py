"""A real S3 server on loopback: SeaweedFS with credentials, for the demo, the tests and racks without a store.

The filer's own HTTP port, which would answer without credentials, is disabled; clients use the S3 port only.
"""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from scripts.common import s3_table, script, secret_file
from shared.errors import RackError
from shared.store_s3 import S3Store

START_TIMEOUT_S = 60.0


def free_port() -> int:
    """A TCP port that is free now, below those that systems give to outgoing connections: one of them would take it
    before it is used."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", random.randrange(15_000, 32_000)))  # nothing depends on its secrecy
            return int(probe.getsockname()[1])


class SeaweedFS:
    """One server over ``folder``, a context manager. ``identities`` is the value of that key in its configuration."""

    ADMIN = ("rackadmin", "rackadminsecret0")

    def __init__(self, folder: Path, identities: list[dict[str, Any]] | None = None) -> None:
        self._folder, self._identities = folder, identities or []
        self.port = free_port()
        self._ports = {
            n: free_port() for n in ("master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc")
        }
        self._s3_grpc = free_port()
        self._process: subprocess.Popen[bytes] | None = None

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
        """Start and wait until it is healthy. Raises RuntimeError with the end of its log."""
        self._folder.mkdir(parents=True, exist_ok=True)
        data, config, log = self._folder / "data", self._folder / "s3.json", self._folder / "weed.log"
        data.mkdir(exist_ok=True)
        access_key, secret_key = self.ADMIN
        admin = {
            "name": "admin",
            "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        }
        config.write_text(json.dumps({"identities": [admin, *self._identities]}))
        config.chmod(0o600)
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                self._command(data, config),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**os.environ, "GOMEMLIMIT": "256MiB"},
            )
        self._wait(log)
        return self

    def stop(self) -> None:
        """Kill it; every acknowledged write is on disk."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def __enter__(self) -> "SeaweedFS":
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _command(self, data: Path, config: Path) -> list[str]:
        ports = [
            f"-{name.replace('.grpc', '.port.grpc') if 'grpc' in name else name + '.port'}={p}"
            for name, p in self._ports.items()
        ]
        return [
            *(script("weed"), "-logtostderr=true", "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *(*ports, "-filer", "-filer.disableHttp"),
            *("-s3", f"-s3.port={self.port}", f"-s3.port.grpc={self._s3_grpc}", f"-s3.config={config}"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.cacheCapacityMB=0"),
            *("-master.volumeSizeLimitMB=64", "-master.volumePreallocate=false"),
            *("-volume.max=0", "-volume.minFreeSpace=1", "-volume.preStopSeconds=0"),
        ]

    def _wait(self, log: Path) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        assert self._process is not None
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            with contextlib.suppress(urllib.error.URLError, OSError, RackError):
                urllib.request.urlopen(f"{self.endpoint}/healthz", timeout=1).close()
                self.store("probe-bucket", attempts=1).create_bucket()
                return
            time.sleep(0.2)
        tail = log.read_text(errors="replace")[-2000:]
        self.stop()
        raise RuntimeError(f"SeaweedFS did not start:\n{tail}")
