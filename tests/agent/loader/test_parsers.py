"""Parsers of a model's output take bounded time, whatever it wrote."""

import importlib
import inspect
import pkgutil
import threading

import pytest
from mlx_lm import tool_parsers

from agent.loader.chat.calls import CallFormat, read
from agent.loader.mlx import parsers

HOSTILE = {
    "glm47": "f<arg_key></arg_key><arg_value>",
    "longcat": "f<longcat_arg_key></longcat_arg_key><longcat_arg_value>",
    "kimi_k3": "<|open|>call<|sep|><|open|>argument<|sep|><|open|>json",
    "minimax_m2": '<invoke name="f"><parameter name="a">',
    "muse_spark": '<atem:invoke name="f"><atem:parameter name="a">',
    "minicpm5": '<function name="f"><param name="a">',
    "function_gemma": "call:f{",
    "gemma4": "call:f{<",
}


def test_every_pattern_of_the_library_has_a_time_limit() -> None:
    patterns = [
        held
        for module in pkgutil.iter_modules(tool_parsers.__path__)
        for held in vars(importlib.import_module(f"mlx_lm.tool_parsers.{module.name}")).values()
        if hasattr(held, "finditer") and not inspect.ismodule(held)
    ]
    assert len(patterns) > 10
    assert all(isinstance(held, parsers._Timed) for held in patterns)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_call_is_no_call_and_ends(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsers, "PATTERN_S", 0.05)
    module = importlib.import_module(f"mlx_lm.tool_parsers.{name}")
    form = CallFormat(marker=module.tool_call_start, parser=module.parse_tool_call)
    found: list[object] = []
    # in a thread that is left behind where the limit is gone: some of these take hours
    reading = threading.Thread(target=lambda: found.append(read(form, HOSTILE[name] * 1500, [])), daemon=True)
    reading.start()
    reading.join(60)
    assert found, "it ends"
