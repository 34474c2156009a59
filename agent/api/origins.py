"""Whom a request that a browser may have sent comes from: the Host it names, its Origin, its fetch metadata. Pure.

A web page can make a browser send requests anywhere, and its own name can be made to lead to this machine. So a node
that trusts loopback serves loopback names only, and no node serves pages that are not its own or on the allow list.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache

from shared.errors import Refused
from shared.hosts import is_loopback

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(:\d{1,5})?")
_ORIGIN = re.compile(r"https?://(.+)")
_TOKENS = re.compile(r"[A-Za-z0-9_-]{1,64}(\s*,\s*[A-Za-z0-9_-]{1,64}){0,63}")
_FOREIGN_SITES = ("cross-site", "same-site")
_JSON = re.compile(r"application/json\s*(;.*)?", re.IGNORECASE)
_OF_LIMITS = [
    f"x-ratelimit-{said}-{unit}" for unit in ("requests", "tokens") for said in ("limit", "remaining", "reset")
]
_EXPOSED = ", ".join(
    [
        *("Retry-After", "X-Request-Id", "X-Mlxrack-Request-Id", "X-Mlxrack-Version", "X-Mlxrack-Node"),
        *("X-Mlxrack-Ignored", "X-Mlxrack-Class", "X-Mlxrack-Place", "X-Mlxrack-Provider", *_OF_LIMITS),
    ]
)
"""Headers of an answer that a page may read."""
PREFLIGHT_S = 600
"""How long a browser may remember that a page is allowed."""


def check_host(hosts: Sequence[str], names: Collection[str]) -> None:
    """Every Host of a request to a loopback listener is a loopback name or one of ``names`` (lower case). A request
    without one is from no browser. Raises Refused."""
    for host in hosts:
        name = _name_of(host)
        if not is_loopback(name) and name.removesuffix(".") not in names:
            raise Refused(
                "this Host is not served here; use localhost, or add the name to listen.names", code="wrong_host"
            )


def reached_host(hosts: Sequence[str], names: Collection[str], address: str, port: int) -> str:
    """Host and port by which a client reached this server: those of its Host header if the name is a loopback name,
    one of ``names`` (lower case) or the ``address`` that was connected to, else ``address`` and ``port``."""
    match = _HOST.fullmatch(hosts[0].strip()) if len(hosts) == 1 else None
    if match is not None and int((match[2] or ":1")[1:]) in range(1, 65536):
        name = match[1].strip("[]").lower()
        if is_loopback(name) or name.removesuffix(".") in names or name == address.lower():
            return match[0].lower()
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def is_visit(method: str, path: str, headers: Mapping[str, str]) -> bool:
    """Whether a browser opens the front page, perhaps by a link on another site, which cannot read or frame it."""
    asked = (headers.get("Sec-Fetch-Mode"), headers.get("Sec-Fetch-Dest"))
    return method == "GET" and path == "/" and asked == ("navigate", "document") and "Origin" not in headers


@lru_cache(maxsize=64)
def _name_of(host: str) -> str:
    """The name in a Host header, in lower case; "" when it has none."""
    match = _HOST.fullmatch(host.strip())
    return match[1].strip("[]").lower() if match else ""


def allowed_origin(
    headers: Mapping[str, str], hosts: Sequence[str], allowed: Collection[str], *, is_api: bool
) -> str | None:
    """The origin of the page that sends a request and may read its answer; None for a request of no page, or of this
    node's own. Pages of other origins are allowed on the API alone. Raises Refused."""
    origin = headers.get("Origin")
    if origin is not None and is_api and origin in allowed:
        return origin
    own = origin is None or ((match := _ORIGIN.fullmatch(origin)) is not None and match[1] in hosts)
    if own and headers.get("Sec-Fetch-Site", "none").strip().lower() not in _FOREIGN_SITES:
        return None
    why = "requests of other web pages are refused; add the page's origin to api.cors_origins"
    raise Refused(why, code="cross_site")


def check_content_type(headers: Mapping[str, str], content_type: str) -> None:
    """A browser's request has the content type of its body, which a page cannot send elsewhere without asking first.
    Raises Refused."""
    if "Origin" in headers and not _JSON.fullmatch(content_type):
        raise Refused("from a browser, send Content-Type: application/json", code="unsupported_media_type")


def sharing(origin: str) -> dict[str, str]:
    """Headers of an answer that a page of an allowed origin may read."""
    return {"Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": _EXPOSED}


def preflight(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers of the answer to a browser that asks whether a page of an allowed origin may send a request."""
    asked = headers.get("Access-Control-Request-Headers", "")
    found = {
        "Access-Control-Allow-Methods": "GET, POST",
        "Access-Control-Allow-Headers": asked if _TOKENS.fullmatch(asked) else "authorization, content-type",
        "Access-Control-Max-Age": str(PREFLIGHT_S),
    }
    if headers.get("Access-Control-Request-Private-Network") == "true":
        found["Access-Control-Allow-Private-Network"] = "true"
    return found
