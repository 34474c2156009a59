"""The models in this node's memory: their life cycle, swaps, eviction, and whose load comes next."""
