"""Metered outlets: wall power of the nodes, read by one node for the whole rack."""
