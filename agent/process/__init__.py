"""Loader processes as the daemon sees them, and their measurements."""
