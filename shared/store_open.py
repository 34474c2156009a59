"""Opens the object store that a configuration names."""

import functools
from collections.abc import Mapping

from shared.bucket import Store
from shared.secrets import resolve
from shared.store import ObjectStore


def open_store(store: Store, environ: Mapping[str, str], *, attempts: int = 3) -> ObjectStore:
    """The configured bucket. Raises Halt when a secret cannot be resolved. Who waits between tries by himself, as
    Retry-After asks, takes one of the ``attempts`` at a time."""
    # imported when needed: boto3 is a tenth of a second that `--help` should not pay
    if store.kind == "directory":
        from pathlib import Path

        from shared.store_dir import DirectoryStore

        return DirectoryStore(Path(store.path).expanduser())
    access_key, secret_key = resolve(store.access_key, environ), resolve(store.secret_key, environ)
    return _s3_store(store.endpoint, store.bucket, store.prefix, access_key, secret_key, attempts)


@functools.lru_cache(maxsize=4)
def _s3_store(endpoint: str, bucket: str, prefix: str, access_key: str, secret_key: str, attempts: int) -> ObjectStore:
    """One client for all who ask with the same credentials: each costs a dozen megabytes and serves any thread."""
    from shared.store_s3 import S3Store

    return S3Store(
        endpoint=endpoint, bucket=bucket, prefix=prefix, access_key=access_key, secret_key=secret_key, attempts=attempts
    )
