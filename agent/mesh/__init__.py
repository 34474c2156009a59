"""The other nodes: heartbeats, signed connections, and what is known of each peer."""
