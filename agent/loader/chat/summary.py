"""What the probe of a model found, in words for its operator. Pure."""

from agent.loader.chat.probe import Conversation

_CHANGED = {
    "system": {"folded": "folded into the first user message"},
    "systems": {"joined": "several joined"},
    "later": {"user": "later ones as user messages", "moved": "later ones moved to the beginning"},
}


def summary(talk: Conversation, *, template: bool) -> dict[str, str]:
    """How a model is spoken to: tools, system, reasoning, and what its template leaves out."""
    if not template:
        return {"template": "none: conversations are rendered as plain text; /v1/completions works as usual"}
    found = {"tools": _tools(talk), "system": _system(talk), "reasoning": _reasoning(talk)}
    return found | ({"leaves out": ", ".join(talk.lost)} if talk.lost else {})


def _tools(talk: Conversation) -> str:
    manner = talk.manner
    said = ["native" if talk.native else "described by mlxrack"]
    if talk.form.parser is not None or talk.form.key is not None:
        said.append("own format, arguments checked afterwards")
    if manner.calls == "text":
        said.append("earlier calls as text")
    several = talk.form.several and manner.parallel == "native"
    return ", ".join([*said, "parallel" if several else "one call per turn"])


def _system(talk: Conversation) -> str:
    manner = talk.manner._asdict()
    return ", ".join(words[manner[field]] for field, words in _CHANGED.items() if manner[field] in words) or "native"


def _reasoning(talk: Conversation) -> str:
    if not talk.reasons:
        return "none"
    ways = []
    if talk.efforts is not None:
        ways.append(f"effort ({', '.join(talk.efforts[1])})")
    if talk.switch is not None or talk.quiet:
        ways.append("can be switched off")
    return ", ".join(ways) or "always"
