"""The HTTP layer: parses requests, calls the core, writes responses."""
