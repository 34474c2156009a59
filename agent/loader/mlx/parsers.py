"""mlx-lm's parsers of call formats that are neither JSON nor keyed texts."""

import importlib
import pkgutil
from functools import partial
from types import ModuleType
from typing import Any

import regex
from mlx_lm import tool_parsers

from agent.loader.chat.calls import CallParser

PATTERN_S = 0.25
"""Time of one search. Some patterns take cubic time on a model's output, and every other request waits meanwhile."""


class _Timed:
    """A pattern whose searches raise TimeoutError after ``PATTERN_S``; what a parser raises makes its text no call."""

    def __init__(self, pattern: Any) -> None:
        self._pattern = pattern

    def __getattr__(self, name: str) -> Any:
        return partial(getattr(self._pattern, name), timeout=PATTERN_S)


def _parsers() -> tuple[tuple[str, str, CallParser], ...]:
    """(begin, end, parser) of each module that has them; those for JSON are learnt instead."""
    found = []
    for module in pkgutil.iter_modules(tool_parsers.__path__):
        parser = importlib.import_module(f"mlx_lm.tool_parsers.{module.name}")
        _limit(parser)
        begin = getattr(parser, "tool_call_start", "")
        if begin and module.name not in ("json_tools", "mistral"):
            found.append((begin, getattr(parser, "tool_call_end", "") or "", parser.parse_tool_call))
    return tuple(found)


def _limit(parser: ModuleType) -> None:
    for name, held in vars(parser).items():
        if isinstance(held, regex.Pattern):
            setattr(parser, name, _Timed(held))


PARSERS = _parsers()
