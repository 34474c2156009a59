"""What the policy needs to know of a request: numbers, features, and for a guess some of its turns. Pure."""

from collections.abc import Collection, Iterable, Sequence

from agent.policy.facts import DEFAULT_ANSWER_TOK, Feature
from agent.process.prefixes import BYTES_PER_TOK, text_of
from agent.views import NodeView
from agent.wire.frames import Embed, Generate

MOST_TURNS = 16
"""Of a conversation that a guess looks at: the first half and the last."""


def features(ask: Generate | Embed, *, n: int = 1, prompts: Sequence[str] = ()) -> tuple[Feature, ...]:
    """What a request uses that not every place can do."""
    if isinstance(ask, Embed):
        return ("embeddings",)
    used: dict[Feature, bool] = {
        "tools": bool(ask.tools),
        "schema": ask.schema is not None,
        "logprobs": ask.logprobs is not None,
        "n": n > 1,
        "prompt": bool(prompts) or ask.prompt is not None,
        "template_args": ask.template_args is not None,
        "sampling": _samples(ask),
    }
    return tuple(feature for feature, is_used in used.items() if is_used)


def _samples(ask: Generate) -> bool:
    """Sampling parameters beyond OpenAI's, and those that name tokens of one model's vocabulary."""
    beyond = ask.top_k or ask.min_p or ask.repetition_window_tok or ask.logit_bias or ask.ignore_eos
    return bool(beyond) or ask.repetition_penalty != 1.0


def prompt_tok(ask: Generate | Embed, prompts: Sequence[str] = ()) -> int:
    """The tokens of a prompt, as routing estimates them; of several prompts, of the longest."""
    longest = max((len(one.encode("utf-8", "surrogatepass")) for one in prompts), default=0)
    return text_of(b"", ask).prompt_tok + longest // BYTES_PER_TOK


def answer_tok(ask: Generate | Embed, answers: int = 1) -> int:
    """The most tokens that all its answers may have together."""
    if isinstance(ask, Embed):
        return 0
    return (DEFAULT_ANSWER_TOK if ask.max_tokens is None else ask.max_tokens) * answers


def answers_of(n: int, prompts: Sequence[str]) -> int:
    """How many answers a request gets: ``n`` to each prompt."""
    return n * max(1, len(prompts))


class Aliases:
    """Served names of the same models: those behind which a node has the same version. While no node has a name's
    model loaded, its latest versions count: what the policy says of it holds, above all, while the rack is down."""

    def __init__(self) -> None:
        self._versions: dict[str, set[str]] = {}

    def of(self, names: Collection[str], nodes: Iterable[NodeView]) -> tuple[str, ...]:
        """Other names of these models (``Facts.aliases``)."""
        found: dict[str, set[str]] = {}
        for node in nodes:
            for model in node.models:
                if model.version:
                    found.setdefault(model.name, set()).add(model.version)
        self._versions |= found
        versions = {version for name in names for version in self._versions.get(name, ())}
        same = {name for name, known in self._versions.items() if not versions.isdisjoint(known)}
        return tuple(sorted(same.difference(names)))


def turns(ask: Generate, prompts: Sequence[str] = ()) -> list[tuple[str, str]]:
    """(role, text) for ``agent.policy.guess``: some turns of a long conversation, a prompt as a user's."""
    messages = ask.messages
    some = messages if len(messages) <= MOST_TURNS else messages[: MOST_TURNS // 2] + messages[-(MOST_TURNS // 2) :]
    return [*((one.role, one.content) for one in some), *(("user", one) for one in prompts[:1])]
