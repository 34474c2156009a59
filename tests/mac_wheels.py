"""Whether all that our wheel asks for has a wheel for a Mac: macOS 14 on arm64, with each supported Python.

pip cannot resolve for another system, because it judges markers by the machine that it runs on; so the pins of
constraints.txt are asked for one by one (``--no-deps``), and what each of those wheels requires there is compared with
the pins. Where the index is, pip's own configuration says. Exits 1 for a wheel that is missing, and 75 when the index
cannot be asked: that says nothing of the wheels.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts.common import parser
from scripts.pins import requirements

ROOT = Path(__file__).parent.parent
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
PLATFORM = "macosx_14_0_arm64"
LIMIT_S = 300.0
_SILENT = re.compile(
    r"Failed to establish|NameResolution|Temporary failure in name|Connection refused|timed? ?out|Max retries exceeded|"
    r"SSLError|ProxyError|\b(?:40[137]|429|5\d\d) (?:Client|Server) Error|Connection (?:reset|aborted|broken)",
    re.IGNORECASE,
)
"""What pip says of an index that it could not ask."""
_NONE = re.compile(r"(?:No matching distribution found for|find a version that satisfies the requirement) (\S+)")


class Outcome(NamedTuple):
    """What came of one Python: the wheels found, what is wrong with them, and why the index could not be asked."""

    python: str
    wheels: int = 0
    problems: Sequence[str] = ()
    silent: str = ""


def environment(python: str) -> dict[str, str]:
    """The variables of markers on a Mac."""
    return {
        "implementation_name": "cpython",
        "implementation_version": f"{python}.0",
        "os_name": "posix",
        "platform_machine": "arm64",
        "platform_python_implementation": "CPython",
        "platform_release": "23.6.0",
        "platform_system": "Darwin",
        "platform_version": "Darwin Kernel Version 23.6.0",
        "python_full_version": f"{python}.0",
        "python_version": python,
        "sys_platform": "darwin",
    }


def pins(constraints: str, extras: Iterable[str], python: str) -> dict[str, str]:
    """What the wheel asks for on a Mac with all ``extras``: versions by name."""
    there = environment(python)
    asked = [Requirement(one) for one in requirements(constraints)]
    found = dict[str, str]()
    for one in asked:
        if any(one.marker is None or one.marker.evaluate({**there, "extra": extra}) for extra in ("", *extras)):
            found[canonicalize_name(one.name)] = next(iter(one.specifier)).version
    return found


def judged(report: Mapping[str, Any], pinned: Mapping[str, str], python: str) -> Iterator[str]:
    """What a Mac would miss, by the metadata of the wheels that pip has found."""
    there = environment(python)
    for installed in report["install"]:
        data = installed["metadata"]
        for text in data.get("requires_dist", ()):
            needed = Requirement(text)
            if needed.marker is not None and not _applies(needed.marker, there):
                continue
            version = pinned.get(canonicalize_name(needed.name))
            if version is None:
                yield f"{data['name']} {data['version']} needs {needed.name} there, which constraints.txt does not pin"
            elif not needed.specifier.contains(version, prereleases=True):
                yield f"{data['name']} {data['version']} needs {needed}, and {version} is pinned"
    names = {canonicalize_name(installed["metadata"]["name"]) for installed in report["install"]}
    yield from (f"{name}=={pinned[name]}: pip has left it out" for name in sorted(set(pinned) - names))


def _applies(marker: Marker, there: dict[str, str]) -> bool:
    """Without extras: who wants those of a dependency has them pinned, too."""
    return marker.evaluate({**there, "extra": ""})


def ask(python: str, pinned: Mapping[str, str], more: Sequence[str] = ()) -> Outcome:
    """Ask the index of pip's configuration for all wheels of one Python."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, report = Path(folder, "wanted.txt"), Path(folder, "report.json")
        wanted.write_text("\n".join(f"{name}=={version}" for name, version in pinned.items()))
        tags = ["--platform", PLATFORM, "--python-version", python, "--implementation", "cp", "--only-binary=:all:"]
        command = [
            *(sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed", "--no-input"),
            *("--disable-pip-version-check", "--target", f"{folder}/target", "--report", str(report)),
            *("--retries", "2", *tags, "-r", str(wanted), *more),  # only of a retry it says that an index is away
        ]
        try:
            run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            return Outcome(python, silent=f"no answer within {LIMIT_S:.0f} s")
        if run.returncode == 0:
            found = json.loads(report.read_text())
            return Outcome(python, len(found["install"]), list(judged(found, pinned, python)))
        return said(python, f"{run.stdout}\n{run.stderr}")


def said(python: str, text: str) -> Outcome:
    """What pip's error means. One that names a missing wheel counts only where every index could be asked."""
    lines = text.strip().splitlines() or ["pip said nothing"]
    if silent := next((line for line in lines if _SILENT.search(line)), ""):
        return Outcome(python, silent=silent)
    missing = sorted(set(_NONE.findall(text)))
    return Outcome(python, problems=[f"{name}: no wheel for {PLATFORM}" for name in missing] or [lines[-1]])


def extras() -> list[str]:
    """What the wheel offers; `dev` is not for a node."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [extra for extra in project["optional-dependencies"] if extra != "dev"]


def verdict(outcomes: Sequence[Outcome]) -> tuple[list[str], int]:
    """Lines for a person, and the exit status. A wheel that is missing for one Python counts, whatever the index does
    for another."""
    lines = list[str]()
    for one in outcomes:
        lines += [f"Python {one.python}: {problem}" for problem in one.problems]
        if one.silent:
            lines.append(f"Python {one.python}: the index cannot be asked, so nothing is known: {one.silent}")
        elif not one.problems:
            lines.append(f"Python {one.python}: {one.wheels} wheels for {PLATFORM}")
    status = (
        1 if any(one.problems for one in outcomes) else os.EX_TEMPFAIL if any(one.silent for one in outcomes) else 0
    )
    return lines, status


def main() -> int:
    """One pip for each Python, at the same time: they wait for the index."""
    parser(__doc__).parse_args()
    constraints, offered = (ROOT / "constraints.txt").read_text(encoding="utf-8"), extras()
    with ThreadPoolExecutor() as pool:
        outcomes = list(pool.map(lambda python: ask(python, pins(constraints, offered, python)), PYTHONS))
    lines, status = verdict(outcomes)
    print("\n".join(lines))
    return status


if __name__ == "__main__":
    sys.exit(main())
