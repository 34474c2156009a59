"""The [store] table that both configurations share, and the form of references to secrets. Pure."""

from typing import Literal

import msgspec

SECRET_KINDS = ("env:", "file:", "keychain:", "op://")
REFERENCE_HINT = (
    "is a literal value; use a reference to a secret instead: env:NAME, file:/path, keychain:service or op://..."
)


def is_reference(text: str) -> bool:
    """Whether ``text`` is a reference to a secret rather than the secret itself."""
    return text.startswith(SECRET_KINDS)


class Store(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The bucket. ``access_key`` and ``secret_key`` are references to secrets. ``ca`` is a file in PEM with the CA that
    signed the certificate of a store of your own; without one, public CAs are trusted."""

    kind: Literal["s3", "directory"] = "directory"
    path: str = ""
    endpoint: str = ""
    bucket: str = ""
    prefix: str = ""
    access_key: str = ""
    secret_key: str = ""
    ca: str = ""


def check_store(store: Store) -> list[str]:
    """Problems that types cannot express, with key paths."""
    if store.kind == "directory":
        return [] if store.path else ["store.path: is required when store.kind is 'directory'"]
    found = [f"store.{k}: is required when store.kind is 's3'" for k in ("endpoint", "bucket") if not getattr(store, k)]
    if store.endpoint and not store.endpoint.startswith(("http://", "https://")):
        found.append(f"store.endpoint: invalid value {store.endpoint!r}: expected an http(s) URL")
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
