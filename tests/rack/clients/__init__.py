"""Scripted sessions of third-party clients; each runs as a separate program and prints its results as JSON."""
