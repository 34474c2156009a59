"""The [store] table that both configurations share, and the form of references to secrets. Pure."""

import re
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from shared.hosts import host_of

SECRET_KINDS = ("env:", "file:", "keychain:", "op://")
REFERENCE_HINT = (
    "is a literal value; use a reference to a secret instead: env:NAME, file:/path, keychain:service or op://..."
)


_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{2,62}")
_OF_S3 = ("endpoint", "bucket", "access_key", "secret_key", "ca")
_S3 = Meta(description='required with `kind = "s3"`')


def is_reference(text: str) -> bool:
    """Whether ``text`` is a reference to a secret rather than the secret itself."""
    return text.startswith(SECRET_KINDS)


class Store(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The bucket. ``access_key`` and ``secret_key`` are references to secrets. ``ca`` is a file in PEM with the CA that
    signed the certificate of a store of your own; without one, public CAs are trusted. Nodes with peers share one
    bucket."""

    kind: Literal["s3", "directory"] = "directory"
    path: Annotated[str, Meta(description='required with `kind = "directory"`')] = ""
    endpoint: Annotated[str, _S3] = ""
    bucket: Annotated[str, _S3] = ""
    prefix: str = ""
    access_key: Annotated[str, _S3] = ""
    secret_key: Annotated[str, _S3] = ""
    ca: str = ""


def check_store(store: Store, *, alone: bool = False) -> list[str]:
    """Problems that types cannot express, with key paths. ``alone``: a store is not required at all."""
    if store.kind == "directory":
        return _check_directory(store, alone=alone)
    found = [f"store.{k}: is required when store.kind is 's3'" for k in ("endpoint", "bucket") if not getattr(store, k)]
    if why := _endpoint(store):
        found.append(f"store.endpoint: {why}")
    if store.bucket and not _BUCKET.fullmatch(store.bucket):
        found.append("store.bucket: is not the name of a bucket; use 3 to 63 letters, digits, '.', '_' or '-'")
    if store.ca and not store.endpoint.startswith("https://"):
        found.append("store.ca: has no effect without an endpoint that begins with https://")
    for name in ("access_key", "secret_key"):
        if not (value := getattr(store, name)):
            found.append(f"store.{name}: is required when store.kind is 's3'")
        elif not is_reference(value):
            found.append(f"store.{name}: {REFERENCE_HINT}")
    return found


def place(store: Store) -> str:
    """Where a bucket is, for display."""
    if store.kind == "directory":
        return store.path
    return f"s3://{store.bucket}/{store.prefix}".rstrip("/")


def _check_directory(store: Store, *, alone: bool) -> list[str]:
    """Who has written the keys of an S3 store has forgotten to say so."""
    if given := [name for name in _OF_S3 if getattr(store, name)]:
        return [f"store.kind: must be 's3' for store.{given[0]}; without it the store is a folder"]
    if store.path:
        return []
    remedy = "; or remove [store]: a node without peers keeps its telemetry in its state folder" if alone else ""
    return [f"store.path: is required when store.kind is 'directory', which it is unless kind = \"s3\"{remedy}"]


def _endpoint(store: Store) -> str:
    """Why an endpoint cannot be one; "" when it can."""
    url = store.endpoint
    if not url:
        return ""
    if not url.startswith(("http://", "https://")):
        return f"invalid value {url!r}: expected an http(s) URL"
    if not host_of(url):
        return "names no host; it is like https://s3.example.com"
    if url.rstrip("/").endswith(f"/{store.bucket}"):
        return "ends with the bucket, which store.bucket names; leave it out here"
    return ""
