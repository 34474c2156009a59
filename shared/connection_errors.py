"""Why a connection failed, in words and with what to do: one table for peers, the store, the hub and the command line.

Client libraries wrap what the system said several times over, each in its own way; the innermost error that says
anything decides.
"""

import errno
import socket
import ssl
import sys
from collections.abc import Iterator
from enum import StrEnum
from urllib.parse import urlsplit

ON_MAC = sys.platform == "darwin"
NO_ROUTE = "there is no route to"
LOCAL_NETWORK = (
    "Local Network privacy (macOS 15 and newer) may keep this process from it: a LaunchDaemon and what ssh starts are "
    "exempt, other programs need System Settings, Privacy & Security, Local Network; `mlxrack-agent doctor` compares"
)
"""What EHOSTUNREACH (65) also means on a Mac, where the same address answers from a shell."""
_MOST_CAUSES = 16


class Kind(StrEnum):
    """What went wrong with a connection."""

    NAME = "name"
    REFUSED = "refused"
    SLOW = "slow"
    CLOSED = "closed"
    UNREACHABLE = "unreachable"
    FORBIDDEN = "forbidden"
    FILES = "files"
    CERTIFICATE_NAME = "certificate_name"
    CERTIFICATE_AUTHORITY = "certificate_authority"
    CERTIFICATE_EXPIRED = "certificate_expired"
    CERTIFICATE_EARLY = "certificate_early"
    NOT_TLS = "not_tls"
    TLS = "tls"
    NOT_HTTP = "not_http"
    OTHER = "other"


_WORDS = {
    Kind.NAME: "no address is known for {host}; correct {key}, or this machine's DNS",
    Kind.REFUSED: "nothing listens on {at}; start it there, or correct {key}",
    Kind.SLOW: "{at} does not answer in time; is that machine on, and does a firewall let this through?",
    Kind.CLOSED: "{at} closes the connection without an answer; are the port and {scheme}:// in {key} right?",
    Kind.UNREACHABLE: f"{NO_ROUTE} {{host}}; check its address, and the network of both machines",
    Kind.FORBIDDEN: "this machine does not allow a connection to {at}; check its firewall",
    Kind.FILES: "this process has too many open files; raise its limit (`ulimit -n`)",
    Kind.CERTIFICATE_NAME: "the certificate of {at} is not made for {host}; use a name that it holds in {key}",
    Kind.CERTIFICATE_AUTHORITY: "the certificate of {at} is signed by a CA that is not known here; {remedy}",
    Kind.CERTIFICATE_EXPIRED: "the certificate of {at} has expired; renew it there, and compare both clocks",
    Kind.CERTIFICATE_EARLY: "the certificate of {at} is not valid yet; compare both clocks",
    Kind.NOT_TLS: "{at} does not speak TLS; is it http:// that {key} should say?",
    Kind.TLS: "TLS with {at} failed ({detail})",
    Kind.NOT_HTTP: "what answers on {at} does not speak HTTP; is the port in {key} right, or should it say https://?",
    Kind.OTHER: "{at} does not answer ({detail})",
}
_BY_ERRNO = {
    errno.ECONNREFUSED: Kind.REFUSED,
    errno.ETIMEDOUT: Kind.SLOW,
    **dict.fromkeys((errno.ECONNRESET, errno.EPIPE, errno.ECONNABORTED), Kind.CLOSED),
    **dict.fromkeys((errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETDOWN), Kind.UNREACHABLE),
    errno.EADDRNOTAVAIL: Kind.UNREACHABLE,
    **dict.fromkeys((errno.EACCES, errno.EPERM), Kind.FORBIDDEN),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), Kind.FILES),
}
_BY_VERIFY_CODE = {
    9: Kind.CERTIFICATE_EARLY,
    10: Kind.CERTIFICATE_EXPIRED,
    **dict.fromkeys((2, 18, 19, 20, 21, 24, 79), Kind.CERTIFICATE_AUTHORITY),
    **dict.fromkeys((62, 63, 64), Kind.CERTIFICATE_NAME),
}
"""By OpenSSL's X509_V_ERR_ number."""
_NOT_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE")
_BY_NAME = {
    **dict.fromkeys(("NameResolutionError", "ClientConnectorDNSError"), Kind.NAME),
    **dict.fromkeys(("ConnectTimeoutError", "ReadTimeoutError", "ConnectTimeout", "ReadTimeout"), Kind.SLOW),
    **dict.fromkeys(("WriteTimeout", "PoolTimeout"), Kind.SLOW),
    **dict.fromkeys(("ServerDisconnectedError", "ConnectionClosedError", "RemoteProtocolError"), Kind.CLOSED),
    **dict.fromkeys(("IncompleteRead", "IncompleteReadError"), Kind.CLOSED),
    **dict.fromkeys(("BadStatusLine", "BadHttpMessage", "LineTooLong"), Kind.NOT_HTTP),
}
"""Of the libraries' own classes, which this module does not import; their bases count too."""


def why(error: BaseException, url: str, key: str, *, ca: str = "") -> str:
    """A sentence: what was seen at ``url`` and what to do. ``key`` is what in the configuration names the url, ``ca``
    what names the file of the CA, where there is such a key."""
    kind, said = _judged(error)
    host, at, scheme = _parts(url)
    remedy = f"set {ca} to the file of that CA's certificate" if ca else "add it"
    words = _WORDS[kind].format(host=host, at=at, scheme=scheme, key=key, detail=said, remedy=remedy)
    blocked = ON_MAC and kind is Kind.UNREACHABLE and any(_errno(one) == errno.EHOSTUNREACH for one in causes(error))
    return f"{words}; {LOCAL_NETWORK}" if blocked else words


def kind_of(error: BaseException) -> Kind:
    """The kind of a connection's error, however a library has wrapped it."""
    return _judged(error)[0]


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it, each once, where Python, aiohttp, urllib3, botocore and httpx keep it."""
    waiting, seen = [error], set[int]()
    while waiting and len(seen) < _MOST_CAUSES:
        one = waiting.pop(0)
        if not isinstance(one, BaseException) or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        kept = getattr(one, "kwargs", None)
        waiting += [getattr(one, name, None) for name in ("certificate_error", "os_error", "reason")]
        waiting += [kept.get("error") if isinstance(kept, dict) else None, *one.args]
        waiting += [one.__cause__, None if one.__suppress_context__ else one.__context__]


def _judged(error: BaseException) -> tuple[Kind, str]:
    """The kind, and the detail of an error that has no sentence of its own."""
    found = [(kind, one) for one in causes(error) if (kind := _kind(one)) is not None]
    specific = [pair for pair in found if pair[0] is not Kind.TLS]
    kind, said = (specific or found)[-1] if found else (Kind.OTHER, error)
    return kind, _reason(said) or type(said).__name__


def _kind(error: BaseException) -> Kind | None:
    """What an error says by itself; None for one that only wraps another."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _BY_VERIFY_CODE.get(getattr(error, "verify_code", 0), Kind.TLS)
    if isinstance(error, ssl.SSLError):
        if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return Kind.CLOSED
        reason = _reason(error)
        return Kind.NOT_TLS if reason.endswith(_NOT_TLS) else Kind.TLS
    if isinstance(error, socket.gaierror):
        return Kind.NAME
    if isinstance(error, ConnectionResetError | BrokenPipeError):
        return Kind.CLOSED
    if isinstance(error, OSError) and error.errno in _BY_ERRNO:
        return _BY_ERRNO[error.errno]
    if isinstance(error, TimeoutError):
        return Kind.SLOW
    return next((_BY_NAME[one.__name__] for one in type(error).__mro__ if one.__name__ in _BY_NAME), None)


def _errno(error: BaseException) -> int | None:
    return error.errno if isinstance(error, OSError) else None


def _reason(error: BaseException) -> str:
    """OpenSSL's own name of what went wrong; "" for other errors."""
    return str(getattr(error, "reason", "") or "") if isinstance(error, ssl.SSLError) else ""


def _parts(url: str) -> tuple[str, str, str]:
    """Host, host with port, and scheme for display; a url that is none stands for all of them."""
    try:
        split = urlsplit(url)
        host, scheme = split.hostname or "", split.scheme or "http"
        port = split.port or (443 if scheme == "https" else 80)
    except ValueError:
        host, scheme, port = "", "http", 0
    if not host:
        return "it", "it", scheme
    return host, f"{f'[{host}]' if ':' in host else host}:{port}", scheme
