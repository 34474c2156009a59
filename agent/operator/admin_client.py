"""The CLI's client of the admin API: blocking calls to the agent on this machine."""

import contextlib
import hmac
import http.client
import json
import secrets
import ssl
from pathlib import Path
from typing import Any
from urllib.parse import quote

from agent.config import AgentConfig
from agent.mesh.signing import listener_proof
from shared.errors import Halt, Refused, Retryable
from shared.hosts import is_loopback

STATUS_TIMEOUT_S = 5.0
ORDER_TIMEOUT_S = 900.0
SERVED_NAME = "listener.pem"
"""Where a running agent notes the certificate that its listener shows."""
_NO_CHECK_TIME = ssl.VerifyFlags(0x200000)
"""X509_V_FLAG_NO_CHECK_TIME."""
MOST_PROOF_BYTES = 1024
PORT_NAME = "port"
"""Where a running agent notes its port, which need not be the configured one."""


class AdminClient:
    """Client of the agent that this configuration describes."""

    def __init__(self, config: AgentConfig, state: Path) -> None:
        host = config.listen.host
        self._host = host if is_loopback(host) else ("127.0.0.1" if host == "0.0.0.0" else host)
        self._port = _listening(state / PORT_NAME) or config.listen.port
        self._token_file = state / "admin.token"
        self._served = state / SERVED_NAME if config.tls.certificate else None

    def status(self) -> dict[str, Any]:
        """The agent's status. Raises Retryable when the agent is not running."""
        return self._call("GET", "/admin/v1/status", None, STATUS_TIMEOUT_S)

    def why(self, request_id: str) -> dict[str, Any]:
        """Routing decisions of a request. Raises Refused when none are kept."""
        return self._call("GET", f"/debug/decision/{quote(request_id, safe='')}", None, STATUS_TIMEOUT_S)

    def orders(self) -> dict[str, Any]:
        """The orders that stand, and warnings about them. Raises Retryable when the agent is not running."""
        return self._call("GET", "/admin/v1/orders", None, STATUS_TIMEOUT_S)

    def order(self, verb: str, **body: str) -> dict[str, Any]:
        """load, unload, swap, pin, orders/clear, seal; waits for completion. Raises Refused with the agent's reason."""
        return self._call("POST", f"/admin/v1/{verb}", body, ORDER_TIMEOUT_S)

    def _call(self, method: str, path: str, body: dict[str, str] | None, timeout_s: float) -> dict[str, Any]:
        connection = self._connection(timeout_s)
        token = self._token()
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        try:
            self._recognise(connection, token)
            connection.request(method, path, json.dumps(body) if body is not None else None, headers)
            answer = connection.getresponse()
            tree = json.loads(answer.read())
        except ConnectionRefusedError:
            why = f"no agent is running on {self._host}:{self._port}; start it: `mlxrack-agent run`"
            raise Retryable(why, code="not_running") from None
        except ssl.SSLCertVerificationError:
            why = f"what listens on {self._host}:{self._port} is not this agent: it shows another certificate"
            raise Retryable(why) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            why = f"the agent on {self._host}:{self._port} does not answer ({type(error).__name__})"
            raise Retryable(why) from None
        finally:
            connection.close()
        if answer.status >= 400:
            problem = tree.get("error", {}) if isinstance(tree, dict) else {}
            reason = problem.get("message") or tree.get("reason") or f"status {answer.status}"
            raise Refused(str(reason), code=str(problem.get("code", "refused")))
        result: dict[str, Any] = tree
        return result

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        """With TLS, to nobody but the running agent: exactly the certificate that it noted in its state folder."""
        if self._served is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # it is one certificate that is trusted, not a name, and `status` must still say when it has expired
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | _NO_CHECK_TIME
        try:
            context.load_verify_locations(cafile=self._served)
        except OSError:
            why = f"{self._served} cannot be read; is the agent running? start it: `mlxrack-agent run`"
            raise Retryable(why, code="not_running") from None
        return http.client.HTTPSConnection(self._host, self._port, timeout=timeout_s, context=context)

    def _recognise(self, connection: http.client.HTTPConnection, token: str) -> None:
        """The port of an agent that was killed may be anybody's by now: the token is sent only on a connection whose
        other end has shown that it knows it. Raises Retryable."""
        connection.connect()
        connection.auto_open = 0  # not another connection, whose end has shown nothing
        nonce, address = secrets.token_hex(16), connection.sock.getpeername()[:2]
        connection.request("GET", f"/admin/v1/proof/{nonce}")
        answer = connection.getresponse().read(MOST_PROOF_BYTES)
        expected = listener_proof(token, nonce, address)
        with contextlib.suppress(ValueError):
            tree = json.loads(answer)
            if isinstance(tree, dict) and hmac.compare_digest(str(tree.get("proof")).encode(), expected.encode()):
                return
        why = f"what listens on {self._host}:{self._port} does not know {self._token_file}, so it is not this agent"
        raise Retryable(f"{why} (or one of an older version); start it: `mlxrack-agent run`", code="not_running")

    def _token(self) -> str:
        try:
            return self._token_file.read_text(encoding="ascii").strip()
        except FileNotFoundError:
            why = f"{self._token_file} does not exist; has this agent been started with this configuration?"
            raise Retryable(why, code="not_running") from None
        except PermissionError:
            raise Halt(f"{self._token_file}: permission denied; run this command as the agent's user") from None


def _listening(path: Path) -> int:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0
