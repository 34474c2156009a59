"""The [store] table that both configurations share, and opening what it names."""

import functools
from collections.abc import Mapping
from typing import Literal

import msgspec

from shared.secrets import is_reference, resolve
from shared.store import ObjectStore

REFERENCE_HINT = (
    "holds a value; secrets are named by reference here: env:NAME, file:/path, keychain:service or op://..."
)


class Store(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The bucket. ``access_key`` and ``secret_key`` are references to secrets."""

    kind: Literal["s3", "directory"] = "directory"
    path: str = ""
    endpoint: str = ""
    bucket: str = ""
    prefix: str = ""
    access_key: str = ""
    secret_key: str = ""


def check_store(store: Store) -> list[str]:
    """Problems that types cannot say, with key paths."""
    if store.kind == "directory":
        return [] if store.path else ["store.path: is required when store.kind is 'directory'"]
    found = [f"store.{k}: is required when store.kind is 's3'" for k in ("endpoint", "bucket") if not getattr(store, k)]
    if store.endpoint and not store.endpoint.startswith(("http://", "https://")):
        found.append("store.endpoint: begins with http:// or https://")
    for name in ("access_key", "secret_key"):
        value = getattr(store, name)
        if not value:
            found.append(f"store.{name}: is required when store.kind is 's3'")
        elif not is_reference(value):
            found.append(f"store.{name}: {REFERENCE_HINT}")
    return found


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
        endpoint=endpoint,
        bucket=bucket,
        prefix=prefix,
        access_key=access_key,
        secret_key=secret_key,
        attempts=attempts,
    )
