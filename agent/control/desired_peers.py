"""Which peers of the desired state this node follows. Whoever can write that one object must not be able to lead
prompts through a host of their own. Pure.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from agent.config import AgentConfig, configured_peers, plain_url
from shared.desired import DesiredPeer
from shared.hosts import host_of, permitted


class Chosen(NamedTuple):
    """Peers as (node, url), and a sentence about each that is not followed."""

    peers: Sequence[tuple[str, str]]
    refused: Sequence[str]


def choose(config: AgentConfig, desired: Sequence[DesiredPeer]) -> Chosen:
    """The desired peers that are at a configured node's own host or a host in ``peers.allowed``; a configured node
    that is desired elsewhere stays where it is configured. All configured ones where none are desired."""
    configured = dict(configured_peers(config))
    named = [peer for peer in desired if peer.id != config.node.id]
    if not named:
        return Chosen(list(configured.items()), ())
    peers: list[tuple[str, str]] = []
    refused: list[str] = []
    for peer in named:
        url = peer.url.rstrip("/")
        if why := _refusal(config, configured, peer.id, url):
            refused.append(f"peer {peer.id} at {host_of(url) or 'no host'} is not followed: {why}")
            url = configured.get(peer.id, "")
        if url:
            peers.append((peer.id, url))
    return Chosen(peers, tuple(refused)) if peers or not refused else Chosen(list(configured.items()), tuple(refused))


def _refusal(config: AgentConfig, configured: Mapping[str, str], node: str, url: str) -> str:
    """Why a peer is not called at ``url``; "" when it is."""
    known = configured.get(node, "")
    if url == known:
        return ""
    host = host_of(url)
    if not host or url.count("/") > 2:
        return "its URL is not that of a node"
    if host != host_of(known) and not permitted(host, config.peers.allowed):
        return "it is neither a configured node's host nor in peers.allowed"
    if not url.startswith("https://") and (config.tls.ca or known.startswith("https://")):
        return "its URL must begin with https://; insecure_http is for the URLs in agent.toml"  # no downgrade by others
    return f"its URL {why}" if (why := plain_url(config, url)) else ""
