"""What a configuration refers to, as far as it can be looked at without asking anybody: secrets and certificates."""

from collections.abc import Mapping
from pathlib import Path

from agent.config import AgentConfig
from shared.errors import RackError
from shared.secrets import resolve, weakness
from shared.transport import Tls


def files_and_secrets(config: AgentConfig, environ: Mapping[str, str]) -> list[str]:
    """Weak secrets, and files of [tls] with which no agent would start, with key paths. A keychain may ask the
    operator, and a variable may be set for the service alone: such references are judged when the agent starts."""
    named = (("peers.secret", config.peers.secret), ("disk_cache.secret", config.disk_cache.secret))
    found = [f"{key}: {why}" for key, reference in named if (why := _weakness(reference, environ))]
    return [*found, *_tls(config.tls, config.node.rack, config.node.id)]


def _weakness(reference: str, environ: Mapping[str, str]) -> str:
    here = reference.startswith("file:") and Path(reference[5:]).exists()
    if not (here or (reference.startswith("env:") and environ.get(reference[4:]))):
        return ""
    try:
        why = weakness(resolve(reference, environ))
    except RackError as error:
        return error.message
    return f"{reference} {why}; make one with `mlxrack-agent new-secret`" if why else ""


def _tls(tls: Tls, rack: str, node: str) -> list[str]:
    if not tls.certificate:
        return []
    from agent.mesh.tls import NodeTls

    try:
        NodeTls(tls, rack=rack, node=node)
    except RackError as error:
        return [error.message]
    return []
