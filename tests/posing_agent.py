"""An agent that finds fake providers under the names of real ones: ``python -m tests.posing_agent run --config ...``.

No configuration can do that, so this program exists for tests alone. ``MLXRACK_TEST_PROVIDERS`` is JSON: ``ports`` maps
hosts to ports on loopback, ``ca`` is the file of the CA that signed their certificates. A host that is not among them
has no address.
"""

import json
import os
import socket
import ssl
import sys
from collections.abc import Sequence

from agent.__main__ import main
from agent.egress import connections
from agent.egress.connections import Endpoint, Reach
from agent.policy.addresses import Category, unfit

VARIABLE = "MLXRACK_TEST_PROVIDERS"


def posing(text: str) -> Reach:
    """The reach that the variable describes."""
    described = json.loads(text)
    ports: dict[str, int] = described["ports"]

    def addresses(host: str, port: int) -> Sequence[Endpoint]:
        if host in ports:
            return [Endpoint(socket.AF_INET, "127.0.0.1", ports[host])]
        if host == "localhost":
            return [Endpoint(socket.AF_INET, "127.0.0.1", port)]
        raise socket.gaierror(socket.EAI_NONAME, "no such host")

    def judged(address: str, category: Category) -> str:
        return "" if category == "outside" and address == "127.0.0.1" else unfit(address, category)

    return Reach(addresses, judged, lambda: ssl.create_default_context(cafile=described["ca"]))


if __name__ == "__main__":
    connections.SYSTEM = posing(os.environ[VARIABLE])
    sys.exit(main())
