"""What to say when a package that a program needs is missing, or cannot be imported.

Both programs come in one wheel, and what each needs is an extra of it. This module imports nothing but the standard
library, so that it works where nothing else does.
"""

import functools
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from types import TracebackType
from typing import Protocol

OURS = ("agent", "aggregator", "shared", "__main__")


class Main(Protocol):
    """An entry point: arguments (None: those of the process) to an exit status."""

    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


def guarded(program: str, extra: str) -> Callable[[Main], Main]:
    """Makes an entry point say in one sentence which package cannot be imported, and how to install it, whichever verb
    needs it; it returns os.EX_UNAVAILABLE then. Other errors pass."""

    def around(main: Main) -> Main:
        @functools.wraps(main)
        def run(argv: Sequence[str] | None = None) -> int:
            try:
                return main(argv)
            except Exception as error:
                if (found := broken_import(error)) is None:
                    raise
                print(f"{program}: {sentence(*found, program, pip_line(extra))}", file=sys.stderr)
                return os.EX_UNAVAILABLE

        return run

    return around


def broken_import(error: BaseException) -> tuple[str, str] | None:
    """The package that could not be imported, and why ("": it is not installed); None for an error of another kind, or
    while a module of ours was executed."""
    package = _executed(error.__traceback__)
    if not package and isinstance(error, ImportError):
        package = (error.name or "").partition(".")[0]
    if not package or package in OURS:
        return None
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package:
        return package, ""
    why = (str(error).partition("\n")[0] or type(error).__name__)[:300]
    inner = error.name if isinstance(error, ImportError) else None
    return package, why if not inner or inner == package or inner in why else f"{inner}: {why}"


def sentence(package: str, why: str, program: str, remedy: str) -> str:
    """What happened to a package, and the remedy."""
    seen = f"the package {package} cannot be imported ({why})" if why else f"the package {package} is not installed"
    return f"{seen}; {program} needs it: {remedy}"


def pip_line(extra: str) -> str:
    """The command that completes this installation; an index is asked for other packages only."""
    try:
        metadata.distribution("mlxrack")
        what = f"'mlxrack[{extra}]'"
    except metadata.PackageNotFoundError:  # a checkout that was never installed
        what = f"-e '.[{extra}]' -c constraints.txt"
    return " ".join((shlex.quote(sys.executable), "-m", "pip", "install", what))


def _executed(traceback: TracebackType | None) -> str:
    """The outermost package of others whose module was being executed, as an import does; "" for none."""
    while traceback is not None:
        if traceback.tb_frame.f_code.co_name == "<module>":
            package = str(traceback.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
            if package not in OURS:
                return package
        traceback = traceback.tb_next
    return ""
