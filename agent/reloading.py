"""What reading agent.toml again changes in a running agent: every key is here, as one that is put in force at once or
as one that needs a restart. Pure; agent/reload_run.py puts it in force."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from agent.config import AgentConfig, Key, Model, Peer

RESTART = (
    *("node.id", "node.rack", "listen.host", "listen.port", "paths.state", "paths.logs", "peers.beat_s"),
    *("store.kind", "store.path", "store.endpoint", "store.bucket", "store.prefix", "store.ca", "store.access_key"),
    *("store.secret_key", "telemetry.sample_s", "telemetry.poll_s", "telemetry.upload_s", "telemetry.spool_bytes"),
    *("telemetry.spool_days", "meters", "model_store.path", "audit.enabled"),
)
"""Keys that are read once, at a start."""
LIVE = (
    *("listen.names", "listen.insecure_http", "listen.trusted_proxies", "keys", "models"),
    *("oidc.issuer", "oidc.audience", "oidc.jwks_url", "oidc.ca", "oidc.claim", "oidc.clients", "oidc.ids"),
    "oidc.algorithms",
    *("tls.certificate", "tls.key", "tls.ca", "tls.node_certificate", "tls.node_key"),
    *("peers.secret", "peers.old_secret", "peers.allowed", "peers.nodes"),
    *("limits.header_s", "limits.idle_s", "limits.connections", "limits.connections_per_address"),
    *("limits.body_bytes", "limits.body_s", "limits.bodies_bytes", "limits.bodies_per_key_bytes"),
    *("limits.in_flight_per_model", "limits.in_flight_per_key", "limits.request_s", "limits.first_token_s"),
    *("limits.token_gap_s", "limits.progress_s", "limits.stuck_s", "limits.load_wait_s", "limits.drain_s"),
    *("api.unknown_fields", "api.strict", "api.keepalive_s", "api.open_metrics", "api.cors_origins"),
    *("memory.budget_bytes", "memory.min_residency_s", "memory.max_wait_s", "memory.soft", "memory.hard"),
    *("model_store.disk_bytes", "desired.follow_s", "loader.threads", "loader.calibrate"),
    *("disk_cache.secret", "policy.path", "taint.marks", "taint.every_peer", "log_level"),
    *("audit.segment_s", "audit.keep_days", "audit.keep_bytes"),
)
"""Keys that a reload puts in force. A request that has begun keeps the limits that it began with."""
SWITCHES = ("tls.certificate", "tls.ca")
"""Files may change their names, but whether there are any is decided at a start."""
SECRETS = ("peers.secret", "peers.old_secret", "disk_cache.secret")
MODEL_KEPT = ("preload", "pinned", "keep_alive_s")
"""Settings of a model that its loader does not know; all others need another loader."""


class Comparison(NamedTuple):
    """``changes`` are sentences for the operator, without a secret; ``restarts`` the keys that need a restart;
    ``models`` the names of models that were added, removed or changed."""

    changes: tuple[str, ...]
    restarts: tuple[str, ...]
    models: tuple[str, ...]


def compare(old: AgentConfig, new: AgentConfig) -> Comparison:
    """What differs, key by key."""
    changes, restarts = list[str](), list[str]()
    for path, before, after in _differences(old, new):
        if path not in LIVE or (path in SWITCHES and bool(before) != bool(after)):
            restarts.append(path)
        elif words := _words(path, before, after):
            changes.append(words)
    return Comparison(tuple(changes), tuple(restarts), changed_models(old, new))


def changed_models(old: AgentConfig, new: AgentConfig) -> tuple[str, ...]:
    """Names of models that were added, removed or changed."""
    before, after = ({model.name: model for model in config.models} for config in (old, new))
    return tuple(name for name in {**before, **after} if before.get(name) != after.get(name))


def needs_loader(old: Model, new: Model) -> bool:
    """Whether a model's loader has to be replaced by another one."""
    return any(name not in MODEL_KEPT for name in _fields(old, new))


def refusal(restarts: Sequence[str]) -> str:
    """The sentence about keys that need a restart; "" for none."""
    if not restarts:
        return ""
    listed = restarts[0] if len(restarts) == 1 else f"{', '.join(restarts[:-1])} and {restarts[-1]}"
    return f"{listed} {'needs' if len(restarts) == 1 else 'need'} a restart"


def paths(kind: type[msgspec.Struct] = AgentConfig, prefix: str = "") -> Iterator[str]:
    """Every key of a configuration; a list of tables is one."""
    for field in msgspec.structs.fields(kind):
        path = f"{prefix}{field.encode_name}"
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            yield from paths(field.type, f"{path}.")
        else:
            yield path


def value_at(config: AgentConfig, path: str) -> Any:
    """The value of a key."""
    found: Any = config
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _differences(old: AgentConfig, new: AgentConfig) -> Iterator[tuple[str, Any, Any]]:
    for path in paths():
        before, after = value_at(old, path), value_at(new, path)
        if before != after:
            yield path, before, after


def _words(path: str, before: Any, after: Any) -> str:
    """A difference for display; "" for one of order alone."""
    if path in SECRETS:
        how = "another reference" if before and after else "set" if after else "removed"
        return f"{path}: {how}"
    if isinstance(before, tuple):
        return _listed(path, _LISTS.get(path, _texts)(before, after))
    return f"{path} {_shown(before)} -> {_shown(after)}"


def _listed(path: str, words: Sequence[str]) -> str:
    return f"{path}: {', '.join(words)}" if words else ""


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return (value or "none") if isinstance(value, str) else json.dumps(value)


def _texts(before: Sequence[str], after: Sequence[str]) -> list[str]:
    return [*(f"+ {one}" for one in after if one not in before), *(f"- {one}" for one in before if one not in after)]


def _keys(before: Sequence[Key], after: Sequence[Key]) -> list[str]:
    """Clients by id; of one client's keys only how many."""
    words = _texts(list(dict.fromkeys(k.id for k in before)), list(dict.fromkeys(k.id for k in after)))
    for client in dict.fromkeys(k.id for k in after if k.id in {one.id for one in before}):
        hashes = [Counter(k.sha256 for k in some if k.id == client) for some in (before, after)]
        groups = [{k.cache_group for k in some if k.id == client} for some in (before, after)]
        if hashes[0] != hashes[1]:
            count = hashes[1].total()
            words.append(f"{client} has {count} keys" if count > 1 else f"{client} has another key")
        if groups[0] != groups[1]:
            words.append(f"{client} cache_group")
    return words


def _named(name_of: Callable[[Any], str]) -> Callable[[Sequence[Any], Sequence[Any]], list[str]]:
    """Tables with a name of their own: which are new, which are gone, and which keys of the others differ."""

    def words(before: Sequence[Any], after: Sequence[Any]) -> list[str]:
        old, new = ({name_of(one): one for one in some} for some in (before, after))
        both = [(name, _fields(old[name], new[name])) for name in new if name in old]
        return [*_texts(list(old), list(new)), *(f"{name} {', '.join(fields)}" for name, fields in both if fields)]

    return words


def _fields(old: msgspec.Struct, new: msgspec.Struct) -> list[str]:
    return [name for name in old.__struct_fields__ if getattr(old, name) != getattr(new, name)]


def _model_name(model: Model) -> str:
    return model.name


def _peer_id(peer: Peer) -> str:
    return peer.id


_LISTS: Mapping[str, Callable[[Sequence[Any], Sequence[Any]], list[str]]] = {
    "keys": _keys,
    "models": _named(_model_name),
    "peers.nodes": _named(_peer_id),
    "oidc.clients": _named(lambda client: str(client.value)),
}
"""How lists of tables are compared."""
