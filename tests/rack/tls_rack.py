"""Certificates for tests, and racks whose nodes talk over TLS."""

import contextlib
import datetime as dt
import json
import ssl
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from agent.mesh.certificates import Pair, issue, make_authority
from scripts.seaweed import free_port
from shared.transport import Tls
from tests.rack.harness import Agent, end, until, write_config


class Authority:
    """A CA in a folder, which issues certificates of any node, rack and age."""

    def __init__(self, folder: Path, name: str = "ca", rack: str = "r") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.name, self.rack = folder, name, rack
        self._pair = make_authority(rack, now=_now())
        self.ca = self.put(name, self._pair)[0]

    def put(self, name: str, pair: Pair) -> tuple[Path, Path]:
        """Write a pair; its paths."""
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        certificate.write_bytes(pair.certificate)
        key.touch(mode=0o600)
        key.write_bytes(pair.key)
        return certificate, key

    def issue(
        self,
        node: str,
        *,
        name: str = "",
        rack: str = "",
        age_days: int = 0,
        days: int = 100,
        host: str = "localhost",
        address: str = "127.0.0.1",
    ) -> Tls:
        """Issue a certificate that began ``age_days`` ago; the [tls] table for it."""
        began = _now() - dt.timedelta(days=age_days)
        hosts = {"names": [host], "addresses": [address]}
        pair = issue(self._pair, rack=rack or self.rack, node=node, now=began, days=days, **hosts)
        certificate, key = self.put(name or node, pair)
        return Tls(certificate=str(certificate), key=str(key), ca=str(self.ca))

    def clients(self) -> ssl.SSLContext:
        """What a client that trusts this CA verifies with."""
        return ssl.create_default_context(cafile=self.ca)


def table(tls: Tls) -> str:
    """The [tls] table of agent.toml."""
    names = ("certificate", "key", "ca", "node_certificate", "node_key")
    return "[tls]\n" + "".join(f"{n} = {json.dumps(getattr(tls, n))}\n" for n in names if getattr(tls, n))


def write_tls_config(
    agent: Agent,
    others: Sequence[Agent],
    models: Sequence[dict[str, Any]],
    tls: Tls,
    extra: str = "",
    via: Callable[[Agent], int] = lambda other: other.port,
) -> None:
    """agent.toml of a node that speaks TLS with all others."""
    write_config(agent, others, models, table(tls) + extra, via)
    agent.config.write_text(agent.config.read_text().replace('url = "http://', 'url = "https://'))


@contextlib.contextmanager
def tls_rack(
    folder: Path,
    *models_of: Sequence[dict[str, Any]],
    extra: str = "",
    via: Callable[[Agent, Agent], int] = lambda _, other: other.port,
) -> Iterator[tuple[Authority, list[Agent]]]:
    """Like ``rack``, with a CA and a certificate for each node. ``via`` is the port at which one finds another."""
    authority = Authority(folder / "tls")
    agents = [Agent(folder, f"n{n}", free_port()) for n in range(1, len(models_of) + 1)]
    for agent, models in zip(agents, models_of, strict=True):
        agent.tls = authority.clients()
        others = [a for a in agents if a is not agent]
        ports = {other.node: via(agent, other) for other in others}
        tls, find = authority.issue(agent.node), partial(_port_of, ports)
        write_tls_config(agent, others, models, tls, extra, find)
    try:
        for agent in agents:
            agent.start()
        for agent, models in zip(agents, models_of, strict=True):
            if models:
                agent.ready()
        for agent in agents:
            until(lambda agent=agent: all(p["state"] == "up" for p in agent.status()["peers"]), "peers are up")  # type: ignore[misc]
        yield authority, agents
    finally:
        end(agents)


def _port_of(ports: dict[str, int], other: Agent) -> int:
    return ports[other.node]


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)
