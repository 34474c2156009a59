"""What of a text must not leave the premises, replaced by placeholders and restored in the answer. Pure.

The detectors (`agent.policy.redaction.detectors`) are large; the gateway runs them in a process of their own, and this
package makes of their findings what may leave.
"""

from agent.policy.redaction.redacted import Redacted

__all__ = ["Redacted"]
