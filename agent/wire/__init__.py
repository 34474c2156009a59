"""Frames between daemon, loader and peers, and how they are written and queued."""
