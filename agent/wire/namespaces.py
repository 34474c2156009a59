"""Whose prompt cache a request uses. What one namespace holds, requests of another can neither use nor notice. Pure.

A namespace is a name in clear: the nodes that see it know the keys of the rack anyway, and what leaves a node's memory
(blocks on disk, hashes of prefixes in heartbeats) is a keyed hash over it. It is in no log and in no batch.
"""

from typing import NewType

Namespace = NewType("Namespace", str)

OPEN = Namespace("")
"""Of a node without keys, and of gateways of a version that sends none."""
PROBES = Namespace("probes")
"""Of the questions that a standby is asked before it takes over."""


def namespace_of(key_id: str, cache_group: str = "") -> Namespace:
    """The namespace of a key, ``key_id`` "" on a node without keys. Kind and name are apart, so that a group that is
    named like another key is not that key's namespace."""
    if cache_group:
        return Namespace(f"group:{cache_group}")
    return Namespace(f"key:{key_id}") if key_id else OPEN
