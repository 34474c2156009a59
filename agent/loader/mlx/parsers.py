"""mlx-lm's parsers of call formats that are neither JSON nor keyed texts."""

import importlib
import pkgutil

from mlx_lm import tool_parsers

from agent.loader.chat.calls import CallParser


def _parsers() -> tuple[tuple[str, str, CallParser], ...]:
    """(begin, end, parser) of each module that has them; those for JSON are learnt instead."""
    found = []
    for module in pkgutil.iter_modules(tool_parsers.__path__):
        parser = importlib.import_module(f"mlx_lm.tool_parsers.{module.name}")
        begin = getattr(parser, "tool_call_start", "")
        if begin and module.name not in ("json_tools", "mistral"):
            found.append((begin, getattr(parser, "tool_call_end", "") or "", parser.parse_tool_call))
    return tuple(found)


PARSERS = _parsers()
