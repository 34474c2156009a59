"""The channel protocol of gpt-oss ("harmony"): every message has a header that names its channel and its recipient.

``<|start|>assistant<|channel|>analysis<|message|>...<|end|>``; the channel ``final`` is the answer, ``commentary`` with
a recipient ``functions.NAME`` a call, ``analysis`` the reasoning. Pure.
"""

import re
from typing import NamedTuple

from agent.loader.chat.calls import CallFormat

HARMONY = CallFormat(
    open="<|channel|>commentary to=functions.",
    sep=" <|constrain|>json<|message|>",
    close="<|call|>",
    marker="<|channel|>",
    several=False,
    channels=True,
)
"""How a call is written. Its parts are announced by their headers, so ``agent.loader.chat.speech`` parses them."""
FINAL = "<|channel|>final<|message|>"
ANALYSIS = ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant")
BEGINS = ("<|start|>", "<|channel|>")
"""What begins a header."""
MESSAGE = "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
"""What ends a message; the beginning of a header does, too."""
TO_FUNCTION = re.compile(r"to=(?:functions\.)?([\w.-]+)")
"""The recipient in a header."""
CALL_HEADER = re.compile(r"to=functions\.([\w.-]+)(?:(?!<\|(?:message|end|call|return)\|>).)*<\|message\|>", re.DOTALL)
"""The header of a call, complete; its arguments follow."""


class Header(NamedTuple):
    """A message's channel, and the function that it calls, "" for none."""

    channel: str
    function: str


def is_harmony(rendered: str) -> bool:
    """Whether a rendered conversation uses the protocol."""
    return "<|channel|>" in rendered and MESSAGE in rendered


def header(text: str) -> Header:
    """A header between its beginning and ``<|message|>``."""
    role, _, rest = text.rpartition("<|channel|>")
    channel = re.match(r"\s*(\w*)", rest)
    recipient = TO_FUNCTION.search(rest) or TO_FUNCTION.search(role)
    return Header(channel[1] if channel else "", recipient[1] if recipient else "")
