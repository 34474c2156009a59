"""What a model's files may compute at the start ends."""

import contextlib
import json
import shutil
import threading
import time
from pathlib import Path

import pytest

from agent.loader.cpu_limit import cpu_limit
from agent.loader.mlx import describe, model
from agent.loader.mlx.model import TextModel
from shared.errors import Refused

ENDLESS = {
    "everywhere": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "where it is asked for tools": "{% if tools %}{% for a in range(99999) %}{% for b in range(99999) %}x"
    "{% endfor %}{% endfor %}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}",
    "in a macro": "{% macro f(n) %}{% for a in range(9999) %}{{ f(n + 1) if n < 40 else '' }}{% endfor %}{% endmacro %}"
    "{{ f(0) }}",
}


@pytest.mark.parametrize("where", ENDLESS)
def test_a_chat_template_that_does_not_end_is_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").write_text(ENDLESS[where])
    monkeypatch.setattr(model, "PROBE_S", 0.5)
    monkeypatch.setattr(describe, "PROBE_S", 0.5)
    with pytest.raises(Refused, match="its chat template does not end"):
        TextModel(folder, limit_tok=100, default_max_tokens=8)
    assert describe.main(str(folder)) == 0
    assert json.loads(capsys.readouterr().out) == {"template": "its chat template does not end"}


def burn(seconds: float) -> None:
    end_s = time.process_time() + seconds
    while time.process_time() < end_s:
        pass


def test_nobody_s_handler_holds_up_the_end() -> None:
    def stubborn() -> None:
        while True:
            with contextlib.suppress(Exception):
                burn(30)

    with pytest.raises(Refused, match="too long"), cpu_limit(0.1, "too long"):
        stubborn()


def test_waiting_costs_nothing_and_the_limit_ends_with_the_block() -> None:
    with cpu_limit(0.3, "too long"):
        time.sleep(0.6)
    burn(0.6)


def test_another_thread_has_no_limit() -> None:
    done: list[bool] = []

    def work() -> None:
        with cpu_limit(0.01, "too long"):
            burn(0.1)
        done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert done
