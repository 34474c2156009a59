"""What lies in a node's state folder, whose it is, and that one agent at a time uses it."""

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from agent.operator.admin_client import PORT_NAME
from agent.operator.obtain import OWN_BUCKET
from shared import private

SECRET = (
    *("listener.pem", PORT_NAME, "desired.json", "models.json", "step_times.json", "spool", "prompts", "logs"),
    *(OWN_BUCKET, "rates.json"),
)
"""What nobody else may read; all of it is created so, and what an older version created is corrected."""
TOKENS = ("admin.token", "metrics.token")
"""Not corrected but replaced: who could read one may have kept it."""
PUBLIC = ("models", "tls")


@contextlib.contextmanager
def held(state: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Use the folder alone; ``say`` takes a line for each thing that was, or cannot be, corrected. Raises Halt when it
    is in use, of another user, or open to others and full of other things."""
    with private.held(state, SECRET, (*TOKENS, *PUBLIC)) as corrected:
        (state / PORT_NAME).unlink(missing_ok=True)  # of a run that was killed
        for line in corrected:
            say(line)
        yield


def problems(state: Path, logs: Path) -> list[str]:
    """What others may read or change of the state, or could put into its place."""
    found = private.problems(state, (*SECRET, *TOKENS))
    for folder in dict.fromkeys((state, logs, *state.absolute().parents)):
        with contextlib.suppress(OSError):
            mode = folder.stat().st_mode
            if mode & stat.S_IWOTH and not mode & stat.S_ISVTX and folder != state:
                found.append(f"{folder} has mode {stat.S_IMODE(mode):o}: others may replace what is in it")
    return found


def shown(found: list[str], state: Path) -> str:
    """The problems as one sentence."""
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    remedy = f"; the agent corrects modes when it starts; else `chown -R {os.geteuid()}` and `chmod -R go= {state}`"
    return f"{found[0]}{more}{remedy}"
