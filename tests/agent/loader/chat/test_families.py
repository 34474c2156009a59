"""The matrix of model families: no cell is wrong, and the documentation shows what came out."""

from typing import Any

import pytest

from agent.loader.chat.calls import OWN
from scripts import families
from tests.families import FOLDER, NAMES, Family, known
from tests.families.cells import CELLS, Cell, cell


@pytest.mark.parametrize("name", NAMES)
def test_no_cell_of_a_family_is_wrong(name: str) -> None:
    found = {column: cell(known(name), column) for column in CELLS}
    assert {column: one.note for column, one in found.items() if one.state == "WRONG"} == {}


def test_the_documentation_shows_the_matrix() -> None:
    _, generated = families.committed()
    assert families.page(generated) == families.PAGE.read_text(encoding="utf-8"), "run `make families`"


@pytest.mark.parametrize(
    ("change", "column"),
    [
        ({"reasoning": ("<tool_call>", "</tool_call>")}, "tools: auto"),
        ({"form": OWN._replace(marker="<call>")}, "tools: auto"),
        ({"silent": ("quotes",)}, "tools: auto"),
    ],
)
def test_the_matrix_sees_what_is_wrong(change: dict[str, Any], column: str) -> None:
    family = Family(FOLDER / "json_tags")
    assert cell(family, column).state == "ok"
    family.use(family.talk._replace(**change))
    assert cell(family, column).state == "WRONG"


def test_a_turn_that_gets_lost_is_wrong_unless_the_probe_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    family = Family(FOLDER / "json_tags")
    render = family.template.render
    monkeypatch.setattr(family.template, "render", lambda *given, **more: render(*given, **more).replace("text 04", ""))
    assert cell(family, "later system").state == "WRONG"
    family.use(family.talk._replace(lost=("later system messages",)))
    assert cell(family, "later system") == Cell("limit", "the template leaves out later system messages")
