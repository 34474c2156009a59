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

from agent.config import AgentConfig, scheme
from agent.mesh.signing import listener_proof
from shared import connection_errors
from shared.errors import Halt, Refused, Retryable
from shared.hosts import is_loopback
from shared.keys import is_name

STATUS_TIMEOUT_S = 5.0
SECRETS_TIMEOUT_S = 60.0
"""A keychain may take its time."""
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
        self._node, self._scheme = config.node.id, scheme(config)

    def status(self) -> dict[str, Any]:
        """The agent's status. Raises Retryable when the agent is not running."""
        return self._call("GET", "/admin/v1/status", None, STATUS_TIMEOUT_S)

    def secrets(self) -> dict[str, Any]:
        """By reference, why the agent cannot use a secret ("" when it can); never a value."""
        return self._call("GET", "/admin/v1/secrets", None, SECRETS_TIMEOUT_S)

    def policy(self) -> dict[str, Any]:
        """The policy in force with its rules. Raises Retryable when the agent is not running."""
        return self._call("GET", "/admin/v1/policy", None, STATUS_TIMEOUT_S)

    def why(self, request_id: str) -> dict[str, Any]:
        """Routing decisions of a request. Raises Refused when none are kept."""
        return self._call("GET", f"/debug/decision/{quote(request_id, safe='')}", None, STATUS_TIMEOUT_S)

    def orders(self) -> dict[str, Any]:
        """The orders that stand, and warnings about them. Raises Retryable when the agent is not running."""
        return self._call("GET", "/admin/v1/orders", None, STATUS_TIMEOUT_S)

    def taint(self) -> dict[str, Any]:
        """What is remembered of SENSITIVE requests. Raises Retryable when the agent is not running."""
        return self._call("GET", "/admin/v1/taint", None, STATUS_TIMEOUT_S)

    def limits(self) -> dict[str, Any]:
        """The limits of all keys, and this node's parts of them. Raises Retryable when the agent is not running."""
        return self._call("GET", "/admin/v1/limits", None, STATUS_TIMEOUT_S)

    def order(self, verb: str, **body: str) -> dict[str, Any]:
        """load, unload, swap, pin, orders/clear, taint/clear, seal; waits for completion. Raises Refused with the
        agent's reason."""
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
            seen = f"no agent is running on {self._host}:{self._port}; start it: `mlxrack-agent run`"
            raise Retryable(seen, code="not_running") from None
        except ssl.SSLCertVerificationError:
            seen = f"what listens on {self._host}:{self._port} is not this agent: it shows another certificate"
            raise Retryable(seen) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            said = connection_errors.why(error, f"{self._scheme}://{self._host}:{self._port}", "listen.port")
            raise Retryable(f"the agent cannot be asked: {said}") from None
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
            seen = f"{self._served} cannot be read; is the agent running? start it: `mlxrack-agent run`"
            raise Retryable(seen, code="not_running") from None
        return http.client.HTTPSConnection(self._host, self._port, timeout=timeout_s, context=context)

    def _recognise(self, connection: http.client.HTTPConnection, token: str) -> None:
        """The port of an agent that was killed may be anybody's by now: the token is sent only on a connection whose
        other end has shown that it knows it. Raises Retryable."""
        connection.connect()
        connection.auto_open = 0  # not another connection, whose end has shown nothing
        nonce, address = secrets.token_hex(16), connection.sock.getpeername()[:2]
        connection.request("GET", f"/admin/v1/proof/{nonce}")
        answer = connection.getresponse()
        body = answer.read(MOST_PROOF_BYTES)
        tree = _tree(body)
        expected = listener_proof(token, nonce, address)
        if hmac.compare_digest(str(tree.get("proof")).encode(), expected.encode()):
            return
        connection.close()  # who serves one connection at a time can answer the next question
        raise Retryable(self._who_else(answer, body, tree), code="not_running")

    def _who_else(self, answer: http.client.HTTPResponse, body: bytes, tree: dict[str, Any]) -> str:
        """Who listens there instead. What it says of itself is proof of nothing, so it is only shown."""
        at = f"{self._host}:{self._port}"
        elsewhere = "stop it, or set another listen.port here"
        if "proof" not in tree:
            kind = str(answer.headers.get("Content-Type", ""))
            what = "a web page" if "html" in kind or body[:1] == b"<" else f"HTTP {answer.status}"
            older = "" if "html" in kind else " (or one of an older version)"
            return f"what listens on {at} is not an mlxrack agent{older}: it answers with {what}; {elsewhere}"
        if (node := self._node_there()) and node != self._node:
            return (
                f"the agent on {at} is that of node {node!r}, not of {self._node!r}: it does not know "
                f"{self._token_file}; {elsewhere}, or name its configuration with --config"
            )
        seen = f"what listens on {at} does not know {self._token_file}, so it is not this agent"
        return f"{seen}: one with another paths.state, or a copy; {elsewhere}, or start this one: `mlxrack-agent run`"

    def _node_there(self) -> str:
        """The node id that is given there, of which nothing is proved; "" for none."""
        connection = self._connection(STATUS_TIMEOUT_S)
        try:
            connection.request("GET", "/health")
            node = str(_tree(connection.getresponse().read(MOST_PROOF_BYTES)).get("node", ""))
        except (OSError, http.client.HTTPException):
            return ""
        finally:
            connection.close()
        return node if is_name(node) else ""

    def _token(self) -> str:
        try:
            return self._token_file.read_text(encoding="ascii").strip()
        except (FileNotFoundError, NotADirectoryError):
            seen = f"{self._token_file} does not exist; has this agent been started with this configuration?"
            raise Retryable(seen, code="not_running") from None
        except PermissionError:
            raise Halt(f"{self._token_file}: permission denied; run this command as the agent's user") from None


def _listening(path: Path) -> int:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def _tree(body: bytes) -> dict[str, Any]:
    """A JSON object; an empty one for anything else."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(tree := json.loads(body), dict):
            return tree
    return {}
