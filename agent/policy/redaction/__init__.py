"""What of a text must not leave the premises, replaced by placeholders and restored in the answer."""

from agent.policy.redaction.redacted import Redacted

__all__ = ["Redacted"]
