"""Metered outlets: what nodes draw at the wall, read by one node for the whole rack."""
