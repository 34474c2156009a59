"""Steps as the shell commands that they are, for --dry-run."""

import shlex
from collections.abc import Iterable, Iterator

from agent.operator.service import launchd
from agent.operator.service.steps import RETRY_S, Command, Gone, Step, Write

_END = "END_OF_FILE"


def script(steps: Iterable[Step]) -> str:
    """A script that does the same, to be run by root."""
    return "\n".join(("#!/bin/sh", "set -eu", "umask 022", *(line for step in steps for line in _lines(step)), ""))


def shown(step: Step) -> str:
    """One step on one line, for messages."""
    if isinstance(step, Command):
        return shlex.join(step.argv)
    if isinstance(step, Write):
        return f"write {step.path}"
    return f"wait for {launchd.TARGET}"


def _lines(step: Step) -> Iterator[str]:
    if isinstance(step, Write):
        yield f"cat > {shlex.quote(step.path)} <<'{_END}'\n{step.text.rstrip()}\n{_END}"
        yield f"chmod 644 {shlex.quote(step.path)}"
    elif isinstance(step, Command):
        if step.again:
            yield f"# tried again for {RETRY_S:g} s while it ends with {_numbers(step.again)}"
        if step.fine:
            yield f"# it may end with {_numbers(step.fine)}"
        yield shlex.join(step.argv) + (" || true" if step.optional or step.fine else "")
    else:
        yield f"# for {step.limit_s:g} s at most"
        asked = shlex.join(launchd.PRINT)
        if isinstance(step, Gone):
            yield f"while {asked} > /dev/null 2>&1; do sleep 1; done"
        else:
            yield f"until {asked} | grep -q 'state = running'; do sleep 1; done"


def _numbers(statuses: Iterable[int]) -> str:
    return ", ".join(map(str, statuses))
