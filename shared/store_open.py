"""Opens the object store that a configuration names."""

import functools
import os
from collections.abc import Mapping

from shared.bucket import Store
from shared.errors import Halt
from shared.secrets import resolve
from shared.store import ObjectStore


def open_store(store: Store, environ: Mapping[str, str], *, attempts: int = 3) -> ObjectStore:
    """The configured store. Raises Halt when a secret cannot be resolved. A caller that waits between tries itself, as
    Retry-After asks, sets ``attempts`` to 1."""
    # imported on demand: boto3 takes a tenth of a second, which `--help` should not pay
    if store.kind == "directory":
        from pathlib import Path

        from shared.store_dir import DirectoryStore

        return DirectoryStore(Path(store.path).expanduser())
    access_key, secret_key = resolve(store.access_key, environ), resolve(store.secret_key, environ)
    return _s3_store(store.endpoint, store.bucket, store.prefix, access_key, secret_key, attempts, _ca(store.ca))


def _ca(file: str) -> str | None:
    if file and not os.access(path := os.path.expanduser(file), os.R_OK):
        raise Halt(f"store.ca: {file} cannot be read; copy the CA's certificate there", code="bad_tls")
    return path if file else None


@functools.lru_cache(maxsize=4)
def _s3_store(
    endpoint: str, bucket: str, prefix: str, access_key: str, secret_key: str, attempts: int, ca: str | None
) -> ObjectStore:
    """One client for all callers with the same credentials: each costs a dozen megabytes and is thread-safe."""
    from shared.store_s3 import S3Store

    return S3Store(
        endpoint=endpoint,
        bucket=bucket,
        prefix=prefix,
        access_key=access_key,
        secret_key=secret_key,
        attempts=attempts,
        verify=ca,
    )
