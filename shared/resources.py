"""The files that come with the program: documentation, launchd's templates, the crontab, dashboards, constraints.

In a checkout they lie where they are written; a wheel has them, under the same names, in ``shared/files/``.
"""

from pathlib import Path

_INSTALLED = Path(__file__).parent / "files"
ROOT = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1]
FILES = (
    "scripts/aggregator.cron",
    "constraints.txt",
    "agent/grafana/mlxrack.json",
    "agent/grafana/prometheus.yml",
    "launchd/dev.mlxrack.agent.plist.in",
)
"""Those that an operator may want to have, by their path in a checkout."""


def resource(name: str) -> Path:
    """A file or folder by its path in a checkout; it may not exist."""
    return ROOT / name


def pages() -> dict[str, str]:
    """The documentation: the text of each page by its name, like ``runbooks``. Raises OSError."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(resource("docs").glob("*.md"))}
