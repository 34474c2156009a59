"""Names, ports and cores of the walk's machines, for the Python programs that run on one of them.

A machine is an address on loopback. Python imports this module by itself where its folder is in PYTHONPATH. It changes
no address but those that the walk's documents name: ``WALK_HERE`` is this machine's address, ``WALK_HOSTS`` says which
addresses a name has (``mini-1.local=127.0.0.1 llm.example.com=127.0.0.1,127.0.0.2``), ``WALK_PORTS`` which port of this
machine stands for a documented one (``8470=23456``). Each machine has one core: with more, the loaders of several would
compute each other to a standstill.
"""

import os
import random
import socket
from typing import Any

_HERE = os.environ.get("WALK_HERE", "")
_HOSTS = {name: there.split(",") for name, _, there in (w.partition("=") for w in os.environ["WALK_HOSTS"].split())}
_PORTS = {int(port): int(there) for port, _, there in (w.partition("=") for w in os.environ["WALK_PORTS"].split())}
_OWN = ("0.0.0.0", "127.0.0.1", "localhost", "", None)
_bind, _getaddrinfo = socket.socket.bind, socket.getaddrinfo


def _own(host: Any, port: Any) -> bool:
    """Whether this machine is meant: one of the walk's ports, at an address that every machine has."""
    return host in _OWN and (port in _PORTS or port in _PORTS.values())


def _bound(sock: socket.socket, address: Any) -> None:
    if isinstance(address, tuple) and len(address) == 2 and _own(*address):
        address = (_HERE, _PORTS.get(address[1], address[1]))
    _bind(sock, address)


def _resolved(host: Any, port: Any, *rest: Any, **more: Any) -> list[Any]:
    name = host.decode() if isinstance(host, bytes) else host
    number = int(port) if isinstance(port, str | bytes) and port.isdigit() else port
    if name in _HOSTS:
        there = list(_HOSTS[name])
        random.shuffle(there)  # as a name server does with several addresses
    elif _own(name, number):
        there = [_HERE]
    else:
        return _getaddrinfo(host, port, *rest, **more)
    number = _PORTS.get(number, number)
    return [found for address in there for found in _getaddrinfo(address, number, *rest, **more)]


setattr(socket.socket, "bind", _bound)  # noqa: B010  # a method is replaced
socket.getaddrinfo = _resolved
os.cpu_count = lambda: 1
