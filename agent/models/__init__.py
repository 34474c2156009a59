"""The models resident on this node: their life cycle, swaps, eviction and load queue."""
