"""From sensors and request counts to batches in object storage."""
