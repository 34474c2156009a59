"""The class of a request when nobody named one: counts of words and of a request's shape, in well under a millisecond.

It orders the rack's queue and chooses a route. It never says anything about SENSITIVE, and where it is wrong nothing
leaves: an [[allow]] does not count for a guessed class unless it says so. English, German and French.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from agent.policy.classes import TaskClass

MOST_TURNS = 64
MOST_CHARS = 2000
"""Of a text that is looked at: three quarters at its begin, the rest at its end."""
FEW_TOK = 32
"""An answer of so few tokens is a label, a number or a name."""
LONG_CHARS = 2000
LONG_TALK = 8
ENOUGH = 3
"""Different words of a kind that are counted at most: a long text has some of every kind."""


def _begins(*words: str) -> tuple[str, ...]:
    """Words, or the begin of words, as they are looked for: one that is complete ends in a space."""
    return tuple(f" {word}" for text in words for word in text.split("/"))


_ROUTINE = _begins(
    "extract/classif/categoris/categoriz/summaris/summariz/translat/rewrite/rephras/paraphras/proofread/reformat",
    "convert/label/tag /spell/correct the/fix the typo/list all/list the/one word/one sentence/shorten/title for",
    "subject line/reply with only/answer only/yes or no/sentiment/positive or negative",
    "extrahier/klassifizier/kategorisier/ordne /fasse /zusammenfass/übersetz/formulier/korrigier/kürze/betreff",
    "liste /nenne /nur mit/ein wort/einem wort/einem satz/wandle/stichpunkt/rechtschreib",
    "extrai/extrayez/classe /classez/catégoris/résum/tradui/reformul/corrige/raccourci/objet pour/liste/en un mot",
    "une phrase/une seule phrase/réponds uniquement/réponds seulement/orthograph/convertis",
)
_REASONING = _begins(
    "why /how would/how should/how could/how does/how do /how can/compare/prove /proof/derive/analys/analyz/explain",
    "reason/trade off/tradeoff/design/architect/debug/root cause/step by step/evaluat/diagnos/pros and cons/estimat",
    "optimis/optimiz/refactor/what would happen/what went wrong/which is better/hypothes/contradict/deadlock",
    "warum/weshalb/wieso/wie würde/wie sollte/wie kann/wie könnte/wie lässt/vergleich/beweis/herleit/begründ/erklär",
    "schritt für schritt/vor und nachteile/abwäg/entwirf/entwurf/ursache/bewerte/schätze/optimier/widerspr",
    "pourquoi/comment pourrait/comment faire/comment peut/comment devrait/comment fonctionne/démontre/prouve/expliqu",
    "étape par étape/avantages/conçois/concevez/évalue/cause racine/cause profonde/débog",
)
_ORCHESTRATION = _begins(
    "orchestrat/delegat/sub agent/subagent/sub task/subtask/multi agent/planner/planning agent/coordinat/dispatch to",
    "assign each/assign the/assign every/assign work/plan and execute/plan and delegate/project plan/execution plan",
    "task plan/which agent/other agents/break this/break it down/into steps/workers",
    "delegier/teilaufgabe/unteraufgabe/unteragent/koordinier/orchestrier/verteile/arbeitsplan/projektplan/zerlege",
    "welcher agent/andere agenten/anderen agenten/den agenten/ablaufplan",
    "délègu/délégu/sous agent/sous tâche/coordonn/orchestr/réparti/planificat/planifie/plan d action/quel agent",
    "autres agents/décompos/attribue/aux agents",
)
_MANAGER = _begins("agent/planner/orchestrator/coordinator/supervisor/koordinator/planer/coordinateur/planificateur")
_CODE = ("```", "def ", "class ", "traceback", "#include", "=> ", "});", "import ")
_BETWEEN = re.compile(r"\W+")


class _Kinds(NamedTuple):
    """How many different words of each kind a text has."""

    routine: int
    reasoning: int
    orchestration: int
    manager: int


def _indexed() -> dict[str, list[tuple[int, str]]]:
    """By the first letters of a word: what to look for where it occurs, and its kind."""
    found = defaultdict[str, list[tuple[int, str]]](list)
    for kind, table in enumerate((_ROUTINE, _REASONING, _ORCHESTRATION, _MANAGER)):
        for one in table:
            found[one.split()[0][:_LETTERS]].append((kind, one))
    return dict(found)


_LETTERS = 4
_INDEX = _indexed()


def guess(
    turns: Iterable[tuple[str, str]],
    *,
    has_tools: bool = False,
    has_schema: bool = False,
    max_tokens: int | None = None,
) -> TaskClass:
    """The class of a conversation of (role, text). Of many turns the first and the last are looked at, of a long text
    its begin and its end."""
    if max_tokens is not None and max_tokens <= FEW_TOK:
        return "ROUTINE"
    known = turns if isinstance(turns, Sequence) else list(turns)
    some = known if len(known) <= MOST_TURNS else (*known[: MOST_TURNS // 2], *known[-MOST_TURNS // 2 :])
    asked = next((text for role, text in reversed(some) if role == "user"), "")
    question = _kinds(asked)
    system = _kinds(next((text for role, text in some if role in ("system", "developer")), ""))
    planning = 2 * question.orchestration + system.orchestration + has_tools + (has_tools and system.manager > 0)
    simple = 2 * question.routine + system.routine + has_schema
    if planning >= 2 and planning + has_tools >= simple:
        return "ORCHESTRATION"
    thinking = 2 * question.reasoning + system.reasoning // 2 + has_tools
    thinking += (len(asked) > LONG_CHARS) + (len(known) > LONG_TALK) + _has_code(asked)
    return "REASONING" if thinking >= 2 and thinking > simple else "ROUTINE"


def _kinds(text: str) -> _Kinds:
    words, counts = _words(text), [0, 0, 0, 0]
    for begin in {word[:_LETTERS] for word in words.split()}:
        for kind, one in _INDEX.get(begin, ()):
            counts[kind] += one in words
    return _Kinds(*(min(count, ENOUGH) for count in counts))


def _words(text: str) -> str:
    """The words of a text in lower case, with a space around each."""
    return f" {_BETWEEN.sub(' ', _part(text).lower())} "


def _has_code(text: str) -> bool:
    part = _part(text).lower()
    return any(one in part for one in _CODE)


def _part(text: str) -> str:
    if len(text) <= MOST_CHARS:
        return text
    return f"{text[: MOST_CHARS * 3 // 4]}\n{text[-(MOST_CHARS // 4) :]}"
