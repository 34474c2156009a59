"""The CLI's client of the admin API: blocking calls to the agent on this machine."""

import http.client
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from agent.config import AgentConfig, is_loopback
from shared.errors import Halt, Refused, Retryable

STATUS_TIMEOUT_S = 5.0
ORDER_TIMEOUT_S = 900.0
PORT_NAME = "port"
"""Where a running agent notes its port, which need not be the configured one."""


class AdminClient:
    """Client of the agent that this configuration describes."""

    def __init__(self, config: AgentConfig, state: Path) -> None:
        host = config.listen.host
        self._host = host if is_loopback(host) else ("127.0.0.1" if host == "0.0.0.0" else host)
        self._port = _listening(state / PORT_NAME) or config.listen.port
        self._token_file = state / "admin.token"

    def status(self) -> dict[str, Any]:
        """The agent's status. Raises Retryable when the agent is not running."""
        return self._call("GET", "/admin/v1/status", None, STATUS_TIMEOUT_S)

    def why(self, request_id: str) -> dict[str, Any]:
        """Routing decisions of a request. Raises Refused when none are kept."""
        return self._call("GET", f"/debug/decision/{quote(request_id, safe='')}", None, STATUS_TIMEOUT_S)

    def order(self, verb: str, **body: str) -> dict[str, Any]:
        """load, unload, swap or seal; waits for completion. Raises Refused with the agent's reason."""
        return self._call("POST", f"/admin/v1/{verb}", body, ORDER_TIMEOUT_S)

    def _call(self, method: str, path: str, body: dict[str, str] | None, timeout_s: float) -> dict[str, Any]:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)
        headers = {"Authorization": f"Bearer {self._token()}", "Content-Type": "application/json"}
        try:
            connection.request(method, path, json.dumps(body) if body is not None else None, headers)
            answer = connection.getresponse()
            tree = json.loads(answer.read())
        except ConnectionRefusedError:
            why = f"no agent is running on {self._host}:{self._port}; start it: `mlxrack-agent run`"
            raise Retryable(why, code="not_running") from None
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
