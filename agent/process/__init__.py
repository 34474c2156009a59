"""Loader processes as the daemon sees them, and what is measured of each."""
