"""Policies and facts of tests, and hypothesis strategies for any of them."""

from typing import Any, get_args

from hypothesis import strategies as st

from agent.policy.checking import check
from agent.policy.classes import CLASSES
from agent.policy.facts import ClassFrom, Facts, Feature, Reason
from agent.policy.rules import ANY, KeyPolicy, ModelPolicy, Permission, Provider, Route, Rules
from shared.config import ConfigError, parse

KEYS = ("web", "batch", "personnel")
MODELS = ("small", "large", "secret", "gpt")
OUTSIDE, STUDIO, OLLAMA = (
    Provider(name="cloud", kind="openai", secret="env:K"),
    Provider(name="studio", kind="local", url="http://10.0.0.9:1234/v1", sensitive=True),
    Provider(name="ollama", kind="local", url="http://10.0.0.8:11434/v1"),
)
PROVIDERS = (OUTSIDE, STUDIO, OLLAMA)


def permission(**more: Any) -> Permission:
    """An [[allow]] of everything to the provider outside, but for ``more``."""
    plain: dict[str, Any] = {"provider": "cloud", "use": "gpt-5", "keys": (ANY,), "classes": CLASSES, "models": (ANY,)}
    return Permission(**{**plain, **more})


def facts(**more: Any) -> Facts:
    """A plain request whose class its caller named."""
    plain: dict[str, Any] = {"key_id": "web", "model": "small", "class_from": "header", "day": "2026-11-27"}
    return Facts(**{**plain, **more})


def problems(text: str) -> list[str]:
    """What is wrong with a policy file of this text."""
    try:
        parse(text, Rules, check, source="policy.toml")
    except ConfigError as error:
        return list(error.problems)
    return []


def _some(names: tuple[str, ...], least: int = 1) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(st.sampled_from(names), unique=True, min_size=least, max_size=3).map(tuple)


def _of(names: tuple[str, ...]) -> st.SearchStrategy[tuple[Any, ...]]:
    """Some of the names, or all."""
    return st.one_of(st.just((ANY,)), _some(names))


_classes = _some(CLASSES)
_keys = st.builds(
    KeyPolicy,
    id=st.sampled_from((*KEYS, ANY)),
    models=_of(MODELS),
    classes=_classes,
    sensitive=st.booleans(),
    outside=st.booleans(),
    expires=st.sampled_from(("", "2026-11-26", "2026-11-27", "2027-01-01")),
)
_models = st.builds(ModelPolicy, name=st.sampled_from((*MODELS, "alias")), sensitive=st.booleans())
_routes = st.builds(
    Route,
    task_class=st.sampled_from(CLASSES),
    model=st.sampled_from(MODELS),
    up_to_tok=st.sampled_from((0, 100, 10_000)),
)
_allow = st.builds(
    Permission,
    provider=st.sampled_from([one.name for one in PROVIDERS]),
    use=st.sampled_from(("gpt-5", "qwen3")),
    keys=_of(KEYS),
    classes=_classes,
    models=_of((*MODELS, "auto", "class:routine", "class:reasoning")),
    guessed=st.booleans(),
    when=st.sampled_from(("full", "always")),
)
any_rules = st.builds(
    Rules,
    keys=st.lists(_keys, max_size=4, unique_by=lambda one: one.id).map(tuple),
    models=st.lists(_models, max_size=3, unique_by=lambda one: one.name).map(tuple),
    routes=st.lists(_routes, max_size=5, unique=True).map(tuple),
    providers=st.just(PROVIDERS),
    allow=st.lists(_allow, max_size=5, unique=True).map(tuple),
)
any_facts = st.builds(
    Facts,
    key_id=st.sampled_from((*KEYS, "", "unknown")),
    model=st.sampled_from((*MODELS, "unknown", "auto", "AUTO", "class:routine", "class: Reasoning", "class:x")),
    aliases=st.sampled_from(((), ("alias",))),
    task_class=st.sampled_from(CLASSES),
    class_from=st.sampled_from(get_args(ClassFrom)),
    sensitive=st.lists(st.sampled_from(get_args(Reason)), max_size=2, unique=True).map(tuple),
    prompt_tok=st.sampled_from((0, 50, 5000, 1 << 40)),
    answer_tok=st.sampled_from((0, 50, 5000)),
    features=st.lists(st.sampled_from(get_args(Feature)), max_size=2, unique=True).map(tuple),
    day=st.sampled_from(("2026-11-26", "2026-11-27", "2026-11-28")),
)
