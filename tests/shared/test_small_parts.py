"""Secrets, backoff, catalog and logs."""

import json
import logging
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import catalog, logs, memory_plan, model_shape, secrets
from shared.backoff import full_jitter_s
from shared.catalog import Manifest, ModelFile
from shared.errors import Halt, Refused


def test_secrets_are_resolved_by_reference(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("from-file\nsecond line\n")
    file.chmod(0o600)
    assert secrets.resolve("env:NAME", {"NAME": "v"}) == "v"
    assert secrets.resolve(f"file:{file}", {}) == "from-file"


def test_an_unresolvable_secret_is_named_and_never_shown(tmp_path: Path) -> None:
    open_file = tmp_path / "open"
    open_file.write_text("topsecret")
    open_file.chmod(0o644)
    os.mkfifo(tmp_path / "pipe", 0o600)
    for reference, why in (
        ("env:GONE", "is not set"),
        (f"file:{tmp_path}/none", "cannot be read"),
        (f"file:{tmp_path}/pipe", "not a regular file"),
        ("file:/dev/zero", "not a regular file"),
        (f"file:{open_file}", "readable by group or others; chmod 600"),
        ("topsecret", "invalid reference; expected one of"),
        ("op://vault/item/field", r"op failed \(|op returned no value"),
    ):
        with pytest.raises(Halt, match=why) as caught:
            secrets.resolve(reference, {})
        assert "topsecret" not in caught.value.message


@given(st.integers(0, 200), st.floats(0, 1))
def test_backoff_stays_under_its_cap(attempt: int, dice: float) -> None:
    assert 0 <= full_jitter_s(attempt, dice) <= min(300.0, 2.0**attempt)


@pytest.mark.parametrize(("gib", "share"), [(16, 2 / 3), (35, 2 / 3), (36, 3 / 4), (64, 3 / 4)])
def test_the_default_memory_budget_is_metals_share(gib: int, share: float) -> None:
    assert abs(memory_plan.default_budget_bytes(gib << 30) - (gib << 30) * share) < 2


def test_a_version_identifies_exact_bytes() -> None:
    a, b = (ModelFile(name=n, size=1, sha256=n * 64) for n in "ab")
    assert catalog.version_of(Manifest(files=(a, b))) == catalog.version_of(Manifest(files=(b, a)))
    assert catalog.version_of(Manifest(files=(a, b))) != catalog.version_of(Manifest(files=(a,)))


@pytest.mark.parametrize("config", [b"", b"[]", b"{}", b'{"num_hidden_layers": 0}', b'{"num_attention_heads": true}'])
def test_an_invalid_model_shape_is_rejected(config: bytes) -> None:
    with pytest.raises(Refused, match=r"config\.json"):
        model_shape.parse_shape(config)


def test_a_logged_exception_keeps_its_location_and_drops_its_text(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "agent.jsonl"
    logs.configure(path)
    try:
        raise ValueError("the prompt was: MARKER")
    except ValueError:
        logs.get_logger("t").error("handler_failed", exc_info=True)
        logging.getLogger("other").exception("library line")
    finally:
        logs.configure(None)
    text = path.read_text()
    entry = json.loads(text.splitlines()[0])
    assert (entry["error"], entry["event"], entry["level"]) == ("ValueError", "handler_failed", "error")
    assert "test_small_parts.py" in entry["at"][-1]
    assert "MARKER" not in text
    assert path.stat().st_mode & 0o777 == 0o600
