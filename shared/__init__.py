"""Types, keys and storage shared by agent and aggregator; imports neither of them."""

__version__ = "0.1.0"
