"""The vocabulary both programs speak; it imports nothing of ours but itself."""

__version__ = "0.1.0"
