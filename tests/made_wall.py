"""A boundary for tests of what is around it: the real wall without a policy, over a folder, without peers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from agent.audit.log import AuditLog
from agent.gateway.allowances import Allowances
from agent.gateway.analysis import Analysis
from agent.gateway.wall import Guards, Wall
from agent.policy.rules import DEFAULT, Rules


class NoMarks:
    """Taints of a node that has seen nothing SENSITIVE."""

    async def look(self, messages: object) -> None:
        """Nothing was seen."""

    async def add(self, messages: object, reasons: object = ()) -> None:
        """Keeps nothing."""

    def note(self, messages: object) -> None:
        """Keeps nothing."""


def made_boundary(folder: Path, rules: Rules = DEFAULT, **other: Any) -> Any:
    """What handlers use of agent.boundary.Boundary; its audit log is off. ``other`` guards replace those here."""
    allowances, marks, analysis = Allowances("n1", folder, nodes=["n1"], rules=lambda: rules), NoMarks(), Analysis()
    guards: Any = {
        "rules": lambda: rules,
        "serves": lambda name: True,
        "aliases": lambda name: (),
        "rate": lambda name: None,
        "taints": marks,
        "analysis": analysis,
        "audit": AuditLog(folder / "audit", node="n1", known=lambda of, name: False, enabled=False),
        "allowances": allowances,
        **other,
    }
    return SimpleNamespace(wall=Wall("n1", Guards(**guards)), taints=marks, allowances=allowances)
