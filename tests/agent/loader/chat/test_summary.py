"""What operators read of a model's chat template."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agent.loader.chat.probe import Conversation
from agent.loader.chat.summary import summary
from tests.families import known
from tests.tiny_model import write_tiny_model

SAID = {
    "json_tags": ("native, parallel", "native", "none"),
    "bare_json": ("native, one call per turn", "native", "none"),
    "json_list": ("native, parallel", "several joined, later ones as user messages", "none"),
    "no_system": (
        "described by mlxrack, earlier calls as text, parallel",
        "folded into the first user message, later ones as user messages",
        "none",
    ),
    "keyed_xml": ("native, own format, arguments checked afterwards, parallel", "native", "none"),
    "thinking_tags": ("native, parallel", "native", "can be switched off"),
}


@pytest.mark.parametrize("name", SAID)
def test_a_summary_says_how_a_model_is_spoken_to(name: str) -> None:
    found = summary(known(name).talk, template=True)
    assert (found["tools"], found["system"], found["reasoning"]) == SAID[name]


def test_losses_and_a_missing_template_are_said() -> None:
    assert summary(known("json_list").talk, template=True)["leaves out"] == "text beside a call"
    assert "/v1/completions" in summary(Conversation(), template=False)["template"]


def test_a_folder_is_described_without_its_weights(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "m", seed=1)
    (tmp_path / "m" / "model.safetensors").write_bytes(b"not read")
    command = [sys.executable, "-P", "-m", "agent.loader", "--describe", str(tmp_path / "m")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert json.loads(run.stdout) == {
        "tools": "described by mlxrack, earlier calls as text, parallel",
        "system": "native",
        "reasoning": "none",
    }
