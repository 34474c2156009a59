"""Why a TLS handshake failed, in a sentence: for the log of the side that was called, and the status of the caller."""

import ssl
import time
from collections.abc import Callable

from shared.connection_errors import causes
from shared.logs import get_logger

REPEAT_S = 60.0
_EXPIRED = 10
_VERIFY = {
    9: "the certificate is not valid yet; compare both clocks",
    _EXPIRED: "the certificate has expired; issue a new one (`mlxrack-agent tls issue`)",
    18: "the certificate is self-signed, not signed by the rack's CA",
    19: "the certificate is signed by another CA than the one in tls.ca",
    20: "the certificate is signed by another CA than the one in tls.ca",
    21: "the certificate is signed by another CA than the one in tls.ca",
    26: "the certificate is not made for this use; it needs serverAuth and clientAuth",
    79: "the certificate is signed by something that is not a CA",
}
"""By OpenSSL's X509_V_ERR_ number."""
_REASONS = {
    "HTTP_REQUEST": "plain HTTP was spoken to the TLS port; use https://",
    "WRONG_VERSION_NUMBER": "the other side does not speak TLS",
    "UNSUPPORTED_PROTOCOL": "the other side speaks no TLS version from 1.2 on",
    "NO_SHARED_CIPHER": "both sides have no cipher in common",
    "KEY_VALUES_MISMATCH": "the key does not belong to the certificate",
    "NO_START_LINE": "not in PEM",
    "BAD_DECRYPT": "the key is encrypted; store it without a password",
    "PEM_LIB": "not in PEM, or incomplete",
}
_ALERTS = {
    "ALERT_UNKNOWN_CA": "refused this node's certificate: it is signed by another CA than the one in tls.ca there",
    "ALERT_CERTIFICATE_EXPIRED": "refused this node's certificate: it has expired",
    "ALERT_CERTIFICATE_UNKNOWN": "refused this node's certificate",
    "ALERT_BAD_CERTIFICATE": "refused this node's certificate",
    "ALERT_UNSUPPORTED_CERTIFICATE": "refused this node's certificate: it is not made for this use",
    "ALERT_CERTIFICATE_REQUIRED": "requires a certificate of this node",
    "ALERT_PROTOCOL_VERSION": "speaks no TLS version that this node speaks",
    "ALERT_HANDSHAKE_FAILURE": "refused the handshake",
}

log = get_logger("agent.mesh.tls")


class WrongNode(ssl.SSLCertVerificationError):
    """A verified certificate of another node."""

    def __init__(self, why: str) -> None:
        super().__init__(1, why)
        self.why = why


def reason_of(error: ssl.SSLError) -> str:
    """The sentence for a failed handshake or files that cannot be loaded; our own words, or OpenSSL's reason."""
    if isinstance(error, WrongNode):
        return error.why
    if isinstance(error, ssl.SSLCertVerificationError):
        code, message = getattr(error, "verify_code", 0), getattr(error, "verify_message", "")
        return _VERIFY.get(code, f"the certificate cannot be verified ({message})")
    # OpenSSL gives no reason where a block of PEM is cut short
    reason = error.reason or ("PEM_LIB" if "PEM" in str(error) else "")
    alert = next((text for name, text in _ALERTS.items() if reason.endswith(name)), "")
    return alert or _REASONS.get(reason) or f"TLS failed ({reason or type(error).__name__})"


def tls_reason(error: BaseException) -> str:
    """Like ``reason_of`` for whatever a client library made of it; "" when TLS is not why it failed."""
    found = [one for one in causes(error) if isinstance(one, ssl.SSLError)]
    # aiohttp's own errors are of ssl's types, too, and say less than what they were made of
    return reason_of(found[-1]) if found else ""


def is_expiry(error: ssl.SSLError) -> bool:
    """Whether a certificate was refused because it has expired."""
    return getattr(error, "verify_code", 0) == _EXPIRED


class Refusals:
    """Logs why handshakes were refused: each reason once a minute, with how often it was since the line before."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: dict[str, tuple[float, int]] = {}

    def note(self, reason: str) -> None:
        """Count one refusal."""
        now = self._clock()
        last_s, count = self._since.get(reason, (-REPEAT_S, 0))
        if now - last_s >= REPEAT_S:
            log.warning("tls_refused", reason=reason, times=count + 1)
            self._since[reason] = (now, 0)
        else:
            self._since[reason] = (last_s, count + 1)
