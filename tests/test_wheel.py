"""The wheel has what its user needs: pages, files, and the versions it was tested with."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from collections import defaultdict
from collections.abc import Collection, Iterable
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts.pins import requirements
from shared.resources import FILES

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = ("agent", "aggregator", "kasa", "store")
MACHINES = [
    {"sys_platform": system, "platform_system": name, "platform_machine": machine, "python_version": python,
     "python_full_version": f"{python}.1", "os_name": "posix", "implementation_name": "cpython"}
    for system, name, machine in (("darwin", "Darwin", "arm64"), ("linux", "Linux", "x86_64"))
    for python in ("3.11", "3.12", "3.13", "3.14")
]  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


def test_the_wheel_has_every_page_and_file(wheel: zipfile.ZipFile) -> None:
    pages = [f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")]
    assert len(pages) > 10
    fonts = [f"vendor/fonts/{path.name}" for path in (ROOT / "vendor/fonts").iterdir()]
    assert len(fonts) == 5
    for name in (*pages, *fonts, *FILES):
        assert wheel.read(f"shared/files/{name}") == (ROOT / name).read_bytes()


def test_the_wheel_has_every_module_and_file_of_the_packages(wheel: zipfile.ZipFile) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "agent", "aggregator", "shared"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    wanted = {name for name in listed.stdout.split() if not name.startswith("agent/grafana/")}
    assert len(wanted) > 200
    assert wanted <= set(wheel.namelist())


def test_both_programs_start_inside_the_guard(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    text = wheel.read(name).decode()
    for program in ("agent", "aggregator"):
        assert f"mlxrack-{program} = {program}.__main__:main" in text
        first = ast.parse(wheel.read(f"{program}/__main__.py"))
        imported = [node for node in first.body if isinstance(node, ast.Import | ast.ImportFrom)]
        modules = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imported}
        assert modules == {"sys", "collections.abc", "shared.missing", "shared.commandline"}
    for module in ("missing", "commandline"):
        tree = ast.parse(wheel.read(f"shared/{module}.py"))
        names = [n.module or "" for n in tree.body if isinstance(n, ast.ImportFrom)]
        names += [alias.name for n in tree.body if isinstance(n, ast.Import) for alias in n.names]
        others = {name for name in names if name.split(".")[0] not in sys.stdlib_module_names} - {"shared.missing"}
        assert not others, "nothing that a missing package could break"


def needed(texts: Iterable[str], machine: dict[str, str]) -> set[str]:
    """Names of what some requirements ask for on a machine, directly or through others, as installed here."""
    found: set[str] = set()
    waiting: list[tuple[Requirement, Collection[str]]] = [(Requirement(text), ("",)) for text in texts]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        one, extras = waiting.pop()
        if one.marker and not any(one.marker.evaluate({**machine, "extra": extra}) for extra in extras):
            continue
        key = (canonicalize_name(one.name), frozenset(one.extras))
        if key in seen:
            continue
        seen.add(key)
        found.add(key[0])
        try:
            inner = metadata.requires(key[0]) or []
        except metadata.PackageNotFoundError:  # another system's
            continue
        waiting += [(Requirement(text), (*one.extras, "")) for text in inner]
    return found


def wanted(extra: str, machine: dict[str, str]) -> set[str]:
    return needed(PROJECT["dependencies"] + (PROJECT["optional-dependencies"][extra] if extra else []), machine)


def test_the_wheel_pins_what_each_extra_needs_on_each_system_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    told = Parser().parsestr(wheel.read(name).decode()).get_all("Requires-Dist") or []
    exact = [one for one in map(Requirement, told) if any(s.operator == "==" for s in one.specifier)]
    for machine in MACHINES:
        for extra in ("", *EXTRAS):
            pinned: dict[str, set[str]] = defaultdict(set)
            for one in exact:
                if one.marker is None or one.marker.evaluate({**machine, "extra": extra}):
                    pinned[canonicalize_name(one.name)].add(str(one.specifier))
            assert set(pinned) == wanted(extra, machine), f"{extra} on {machine}: annotate constraints.txt"
            assert all(len(versions) == 1 for versions in pinned.values())


def test_pins_are_the_constraints() -> None:
    text = "a==1  # base\nb==2\nc==3; sys_platform == 'darwin'  # agent, store\n# d==4  # agent\n"
    assert list(requirements(text)) == [
        "a==1",
        "c==3; sys_platform == 'darwin' and extra == 'agent'",
        "c==3; sys_platform == 'darwin' and extra == 'store'",
    ]
