"""Whether references to secrets can be resolved, and by whom: the values themselves are shown to nobody.

What counts is what the service sees, not the shell in which somebody looks: the running agent is asked; where none
runs, an installed service's environment stands for it; else the shell's, and it is said so.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from agent.config import AgentConfig
from agent.operator import install
from agent.operator.admin_client import AdminClient
from agent.operator.checks import Secret, references, unfit_for_service
from shared.errors import RackError
from shared.secrets import resolve, weakness

_SILENT = ("env:", "file:")
"""References that are resolved without asking anybody; a keychain or `op` may ask for a password."""


class Running(NamedTuple):
    """What the running agent says: its status and, by reference, why it cannot use a secret ("" when it can)."""

    status: dict[str, Any]
    secrets: Mapping[str, str]


class Resolver:
    """Looks at secrets in the agent's place. ``running`` is None when no agent answers; ``may_ask`` says whether a
    keychain may be asked, ``for_service`` whether launchd's environment is what counts."""

    def __init__(
        self,
        environ: Mapping[str, str],
        by: str,
        running: Running | None = None,
        *,
        may_ask: bool = False,
        for_service: bool = False,
    ) -> None:
        self.environ, self.running = environ, running
        self._by, self._may_ask, self._for_service = by, may_ask, for_service

    @property
    def agent_runs(self) -> bool:
        """Whether the agent of this configuration runs."""
        return self.running is not None

    def problem(self, secret: Secret) -> tuple[str | None, str]:
        """Why a secret cannot be used: "" when it can, None when nobody was asked; and in whose place it was tried."""
        if self.running is not None and secret.reference in self.running.secrets:
            return self.running.secrets[secret.reference], "the running agent"
        if not (self._may_ask or secret.reference.startswith(_SILENT)):
            return None, self._by
        why = problem_of(secret, self.environ)
        return (self._for_service and why and unfit_for_service(secret)) or why, self._by


def resolver(config: AgentConfig, state: Path, environ: Mapping[str, str], *, may_ask: bool = False) -> Resolver:
    """The one for this machine as it is now."""
    client = AdminClient(config, state)
    try:
        running = Running(client.status(), _secrets(client))
    except RackError as error:
        running, unasked = None, error.message if error.code not in ("not_running", "unavailable") else ""
    else:
        unasked = ""
    if (service := install.installed()) is not None:
        variables = {str(name): str(value) for name, value in service.get("EnvironmentVariables", {}).items()}
        by = f"the installed service ({install.DAEMON_PLIST})"
        return Resolver(variables, by, running, may_ask=may_ask, for_service=True)
    by = f"this shell, because the agent cannot be asked: {unasked}" if unasked else "this shell"
    return Resolver(environ, by, running, may_ask=may_ask)


def problem_of(secret: Secret, environ: Mapping[str, str]) -> str:
    """Why a secret cannot be used; "" when it can."""
    try:
        value = resolve(secret.reference, environ)
    except RackError as error:
        return error.message.removeprefix("secret ")
    why = weakness(value) if secret.strong else ""
    return f"{secret.reference} {why}; make one with `mlxrack-agent new-secret`" if why else ""


def problems(config: AgentConfig, environ: Mapping[str, str]) -> dict[str, str]:
    """By reference, why it cannot be used; "" when it can. Blocks: a keychain may take seconds."""
    return {one.reference: problem_of(one, environ) for one in references(config)}


def _secrets(client: AdminClient) -> Mapping[str, str]:
    """An agent of an older version cannot tell."""
    try:
        return {str(name): str(why) for name, why in client.secrets().items()}
    except RackError:
        return {}
