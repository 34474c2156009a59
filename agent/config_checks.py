"""What of a configuration types cannot express: every problem, each with the path of its key. Pure."""

import re
from collections.abc import Iterator, Sequence

import msgspec

from agent.config import (
    KASA_KINDS,
    SNMP_NUMBERS,
    AgentConfig,
    Key,
    Limits,
    Meter,
    Model,
    cache_group,
    has_store,
    is_open,
    plain_url,
)
from agent.config_oidc import Oidc
from shared import transport
from shared.bucket import REFERENCE_HINT, check_store, is_reference
from shared.errors import Refused
from shared.hosts import host_of, is_loopback
from shared.keys import check_name, is_name

_SHA256 = re.compile(r"[0-9a-f]{64}")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9_.-]+(:\d{1,5})?|https?://\[[0-9a-f:]+\](:\d{1,5})?")
_ODD_URL = re.compile(r"[?#\s\\]")
_PEER_URL = "it is like http://mini-2.local:8470"
_ENTITY = re.compile(r"[a-z0-9_]{1,100}\.[a-z0-9_]{1,155}")
_OID = re.compile(r"\.?1\.3(\.\d{1,10}){3,60}")
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?")


def check(config: AgentConfig) -> Sequence[str]:
    """Every problem that types cannot express, with key paths."""
    return [
        *_check_names(config),
        *_check_listen(config),
        *_check_transport(config),
        *_check_browsers(config),
        *_check_bodies(config.limits),
        *_check_keys(config.keys),
        *_check_oidc(config.oidc),
        *_check_peers(config),
        *_check_models(config.models),
        *_check_disk_cache(config),
        *_check_meters(config.meters),
        *_check_store(config),
    ]


def _check_store(config: AgentConfig) -> list[str]:
    """One node alone needs none."""
    if has_store(config):
        return check_store(config.store, alone=not config.peers.nodes)
    return ["store.path: is required with peers; all nodes of a rack share one bucket"] if config.peers.nodes else []


def _check_names(config: AgentConfig) -> list[str]:
    named = [("node.id", config.node.id), ("node.rack", config.node.rack)]
    named += [(f"models[{n}].name", m.name) for n, m in enumerate(config.models)]
    named += [(f"peers.nodes[{n}].id", p.id) for n, p in enumerate(config.peers.nodes)]
    named += [(f"keys[{n}].id", k.id) for n, k in enumerate(config.keys)]
    named += [(f"keys[{n}].cache_group", k.cache_group) for n, k in enumerate(config.keys) if k.cache_group]
    found = []
    for path, name in named:
        try:
            check_name(name, path)
        except Refused as error:
            found.append(error.message)
    return found


def _check_listen(config: AgentConfig) -> list[str]:
    if is_loopback(config.listen.host) or not is_open(config):
        return []
    remedy = "create one with `mlxrack-agent new-key NAME`, or listen on 127.0.0.1"
    open_to = f"{config.listen.host} is reachable from other machines, and no [[keys]] entry exists"
    return [f"listen.host: {open_to}; {remedy}"]


def _check_browsers(config: AgentConfig) -> list[str]:
    found = [
        f"listen.names[{n}]: must be a host name or an IPv4 address, without a port"
        for n, name in enumerate(config.listen.names)
        if not _NAME.fullmatch(name)
    ]
    return found + [
        f"api.cors_origins[{n}]: must be an origin in lower case, like https://chat.example.com; * is not supported"
        for n, origin in enumerate(config.api.cors_origins)
        if not _ORIGIN.fullmatch(origin)
    ]


def _check_bodies(limits: Limits) -> list[str]:
    """The largest body must fit into what its key and all keys may hold, a text twice (docs/api.md)."""
    found = []
    if limits.bodies_per_key_bytes < 2 * limits.body_bytes:
        found.append("limits.bodies_per_key_bytes: must be at least twice limits.body_bytes")
    if limits.bodies_bytes < limits.bodies_per_key_bytes:
        found.append("limits.bodies_bytes: must be at least limits.bodies_per_key_bytes")
    return found


def _check_transport(config: AgentConfig) -> list[str]:
    """What would send prompts and keys in clear, or cannot work."""
    insecure = config.listen.insecure_http
    urls = [(f"peers.nodes[{n}].url", plain_url(config, p.url)) for n, p in enumerate(config.peers.nodes)]
    return [
        *transport.check_tls(config.tls),
        *transport.check_listen(config.listen.host, config.listen.trusted_proxies, config.tls, insecure=insecure),
        *(f"{path}: {why}" for path, why in urls if why),
    ]


def _check_keys(keys: Sequence[Key]) -> list[str]:
    found = [
        f"keys[{n}].sha256: must be a SHA-256 in hex; `mlxrack-agent new-key NAME` prints one"
        for n, key in enumerate(keys)
        if not _SHA256.fullmatch(key.sha256)
    ]
    return found + [
        f"keys[{n}].cache_group: must be that of the other keys with the id {key.id!r}"
        for n, key in enumerate(keys)
        if key.cache_group != cache_group(keys, key.id)
    ]


def _check_oidc(oidc: Oidc) -> list[str]:
    if not oidc.issuer:
        return ["oidc.issuer: is required with the other keys of [oidc]"] if oidc != Oidc() else []
    found = [
        f"oidc.{name}: must begin with https://; http:// only to this machine"
        for name, url in (("issuer", oidc.issuer), ("jwks_url", oidc.jwks_url or oidc.issuer))
        if not (url.startswith("https://") and host_of(url)) and not is_loopback(host_of(url))
    ]
    if not any(oidc.audience) or not all(oidc.audience):
        found.append("oidc.audience: is required: what tokens for this rack name as their audience")
    if not oidc.claim:
        found.append("oidc.claim: must not be empty")
    if not oidc.clients and not oidc.ids:
        found.append("oidc.clients: is required, or oidc.ids: without them no token has a key id")
    values = [client.value for client in oidc.clients]
    found += [
        f"oidc.clients: duplicate value {value!r}" for value in sorted({v for v in values if values.count(v) > 1})
    ]
    for n, client in enumerate(oidc.clients):
        if not client.value:
            found.append(f"oidc.clients[{n}].value: must not be empty")
        if not is_name(client.id):
            found.append(f"oidc.clients[{n}].id: use 1 to 63 letters, digits, '.', '_' or '-'")
    return found + _check_ids(oidc.ids)


def _check_ids(pattern: str) -> list[str]:
    try:
        matches_nothing = bool(pattern) and re.fullmatch(pattern, "") is not None
    except (re.error, RecursionError, OverflowError) as error:
        return [f"oidc.ids: invalid regular expression: {error}"]
    return ["oidc.ids: matches an empty text"] if matches_nothing else []


def _check_peers(config: AgentConfig) -> list[str]:
    peers, found = config.peers, []
    ids = [p.id for p in peers.nodes]
    if config.node.id in ids:
        found.append(f"peers.nodes: lists this node itself ({config.node.id!r}); remove it")
    found += [f"peers.nodes: duplicate id {i!r}" for i in sorted({i for i in ids if ids.count(i) > 1})]
    found += [f"peers.nodes[{n}].url: {why}" for n, p in enumerate(peers.nodes) if (why := _peer_url(p.url))]
    urls = [p.url.rstrip("/") for p in peers.nodes]
    found += [f"peers.nodes: duplicate url {u}" for u in sorted({u for u in urls if urls.count(u) > 1})]
    if peers.nodes and not peers.secret:
        found.append("peers.secret: is required with peers; use the same secret on all nodes")
    named = (("peers.secret", peers.secret), ("peers.old_secret", peers.old_secret))
    found += [f"{path}: {REFERENCE_HINT}" for path, secret in named if secret and not is_reference(secret)]
    if peers.old_secret and peers.old_secret == peers.secret:
        found.append("peers.old_secret: is the same as peers.secret; remove it, or set peers.secret to the new one")
    if peers.old_secret and not peers.secret:
        found.append("peers.secret: is required with peers.old_secret, which it replaces")
    return found


def _peer_url(url: str) -> str:
    """Why no node can be called at ``url``; "" when one can. A proxy may serve nodes below a path of its own."""
    if not url.startswith(("http://", "https://")):
        return "must begin with http:// or https://"
    if not host_of(url) or _ODD_URL.search(url):
        return f"is not the address of a node; {_PEER_URL}"
    if url.rstrip("/").endswith("/v1"):
        return f"is what clients use; without /v1 it is a node's: {_PEER_URL}"
    return ""


def _check_disk_cache(config: AgentConfig) -> list[str]:
    secret = config.disk_cache.secret
    if secret and not is_reference(secret):
        return [f"disk_cache.secret: {REFERENCE_HINT}"]
    if not secret and any(m.disk_cache_bytes for m in config.models):
        return ["disk_cache.secret: is required with disk_cache_bytes, because the disk cache holds prompts"]
    return []


def _check_meters(meters: Sequence[Meter]) -> list[str]:
    names = [m.name for m in meters]
    found = [f"meters: duplicate name {n!r}" for n in sorted({n for n in names if names.count(n) > 1})]
    for n, meter in enumerate(meters):
        found += [f"meters[{n}].{key}: {why}" for key, why in (*_meter_keys(meter), *_meter_of_kind(meter))]
    return found


def _meter_keys(meter: Meter) -> Iterator[tuple[str, str]]:
    """What is wrong of the keys that every meter has."""
    numbers = SNMP_NUMBERS.get(meter.kind)
    if numbers is None and meter.kind not in KASA_KINDS and not meter.at.startswith(("http://", "https://")):
        yield "at", f"must begin with http:// or https:// for {meter.kind}"
    if (numbers is not None or meter.kind in KASA_KINDS) and "://" in meter.at:
        port = "" if numbers is None else " or 10.0.0.9:161"
        yield "at", f"must be an address for {meter.kind}, like 10.0.0.9{port}"
    if numbers is not None and len(meter.numbers) != numbers:
        yield "numbers", f"{meter.kind} needs {numbers}, got {len(meter.numbers)}"
    if not meter.nodes:
        yield "nodes", "is required; list the nodes that it powers"
    if meter.secret and not is_reference(meter.secret):
        yield "secret", REFERENCE_HINT


_METER_KEYS = {
    **dict.fromkeys(("oid", "unit", "status_oid", "status_ok"), ("snmp",)),
    **dict.fromkeys(("entity", "age_s"), ("home_assistant",)),
    "phases": ("shelly_em", "shelly_gen1_em"),
}
"""Kinds that a key belongs to; elsewhere it would be set without effect."""


def _meter_of_kind(meter: Meter) -> Iterator[tuple[str, str]]:
    """What is wrong of the keys that some kinds have."""
    fields = {field.name: field.default for field in msgspec.structs.fields(Meter)}
    for key, kinds in _METER_KEYS.items():
        if meter.kind not in kinds and getattr(meter, key) != fields[key]:
            yield key, f"is for {' and '.join(kinds)} only; {meter.kind} has none"
    if len(set(meter.phases)) < len(meter.phases):
        yield "phases", "names a phase twice"
    if meter.kind == "snmp":
        yield from _generic_meter(meter)
    if meter.kind == "home_assistant":
        if not _ENTITY.fullmatch(meter.entity):
            yield "entity", "is required: the entity's id, like sensor.plug_power"
        if not meter.secret:
            yield "secret", "is required: a reference to a long-lived access token of Home Assistant"
    if meter.kind == "tapo" and (not meter.secret or meter.user == "admin"):
        yield "user" if meter.secret else "secret", "is required: e-mail address and password of the TP-Link account"


def _generic_meter(meter: Meter) -> Iterator[tuple[str, str]]:
    if not _OID.fullmatch(meter.oid):
        yield "oid", "is required in numbers, like 1.3.6.1.4.1.28507.43.1 (`snmpwalk -On` prints them)"
    if meter.status_oid and not _OID.fullmatch(meter.status_oid):
        yield "status_oid", "must be in numbers, like 1.3.6.1.4.1.28507.43.1"
    if bool(meter.status_oid) != bool(meter.status_ok):
        yield "status_ok", "and status_oid need each other: values of status_oid with which the power counts"


def _check_models(models: Sequence[Model]) -> list[str]:
    names = [m.name for m in models]
    found = [f"models: duplicate name {n!r}" for n in sorted({n for n in names if names.count(n) > 1})]
    return found + [
        f"models[{n}].path: is required (the model's folder)"
        for n, m in enumerate(models)
        if m.engine == "mlx" and not m.path
    ]
