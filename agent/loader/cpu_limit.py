"""A limit of CPU time for what a model's files make this process compute before it serves."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from shared.errors import Refused

PROBE_S = 30.0
"""For everything that is asked of a chat template at the start; the slowest known one takes a few seconds."""
_AGAIN_S = 1.0


class _TimeIsUp(BaseException):
    """Not an Exception: whoever tries a template expects it to raise anything, and goes on."""


@contextlib.contextmanager
def cpu_limit(limit_s: float, refusal: str) -> Iterator[None]:
    """The block may take this much of the process's CPU time; then it ends. Raises Refused with ``refusal``. CPU time,
    so that a busy machine changes nothing; in another thread than the main one there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _raise)
    # again and again: where it is raised in a callback of C code, it may be dropped
    signal.setitimer(signal.ITIMER_VIRTUAL, limit_s, _AGAIN_S)
    try:
        yield
    except _TimeIsUp:
        raise Refused(refusal, code="bad_model") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _raise(*_: object) -> None:
    raise _TimeIsUp
