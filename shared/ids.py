"""Distinct types for identifiers, so that a node id cannot be passed as a model name."""

from typing import NewType

NodeId = NewType("NodeId", str)
"""A machine of the rack, as named in its configuration."""
ModelName = NewType("ModelName", str)
"""The served name that clients request."""
Version = NewType("Version", str)
"""The version behind a served name: the first 16 hex digits of the SHA-256 of the model's manifest."""
BatchId = tuple[NodeId, int, int, int]
"""(node, incarnation, epoch, seq): the key on which batches are de-duplicated."""
