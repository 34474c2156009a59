"""Names of things, so that a node can never be passed where a model is meant."""

from typing import NewType

NodeId = NewType("NodeId", str)
"""One machine of the rack; comes from its configuration."""

ModelName = NewType("ModelName", str)
"""The served name, which clients ask for."""

Version = NewType("Version", str)
"""What stands behind a served name: the first 16 hex digits of the sha256 of the model's manifest."""

BatchId = tuple[NodeId, int, int, int]
"""(node, incarnation, epoch, seq): the identity on which batches are de-duplicated."""
