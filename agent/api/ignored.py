"""Fields of requests that had no effect, as clients and operators learn of them: a response header and a log event."""

import re
from collections.abc import Iterable

from agent.api.openai.fields import MAX_NAMED
from shared.logs import get_logger

HEADER = "X-Mlxrack-Ignored"
MAX_NAME_CHARS = 64
MAX_HEADER_CHARS = 512
MAX_LOGGED = 256
"""Names that one process writes to its log; clients choose them."""
_UNSAFE = re.compile(r"[^A-Za-z0-9_.\-\[\]]")
_PLAIN = re.compile(r"[a-z][a-zA-Z_]{0,39}")

log = get_logger("agent.api")


def header(names: Iterable[str]) -> dict[str, str]:
    """The header that names them, each sanitized and once, then how many more there are; none without a name."""
    found = list(dict.fromkeys(_UNSAFE.sub("?", name[:MAX_NAME_CHARS]) for name in names))[: 2 * MAX_NAMED]
    shown = ""
    for count, name in enumerate(found):
        longer = f"{shown}, {name}" if shown else name
        if len(longer) > MAX_HEADER_CHARS:
            shown = f"{shown}, +{len(found) - count} more"
            break
        shown = longer
    return {HEADER: shown} if shown else {}


def log_once(names: Iterable[str], logged: set[str]) -> None:
    """Name those that this process has not logged. A name that does not look like a field's may be private data, and is
    logged as ``other``."""
    plain = {name if all(map(_PLAIN.fullmatch, re.split(r"\[\]\.|\[\]|\.", name))) else "other" for name in names}
    if fresh := sorted(plain - logged)[: MAX_LOGGED - len(logged)]:
        logged.update(fresh)
        log.info("fields_ignored", fields=fresh, policy="api.unknown_fields")
