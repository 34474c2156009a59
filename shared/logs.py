"""Structured logs: one JSON object per line, times in UTC, rotated by the program itself.

One line per request, tick or run, with its figures. Only ids, counts and codes: no prompt, completion or secret.
Our own lines are rendered once and written; those of libraries pass through the standard library's logging.
"""

import logging
import logging.handlers
import os
import sys
import traceback
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import msgspec

# structlog imports rich if it is installed: five megabytes for coloured output that is never used here
sys.modules.setdefault("rich", None)  # type: ignore[arg-type]
import structlog  # noqa: E402

MAX_BYTES = 20 << 20
KEEP = 5


def configure(path: Path | None, *, level: str = "info", console: bool = False) -> None:
    """Write log lines to ``path`` (rotated, mode 0600), and to stderr if ``console`` is set or there is no path."""
    writers: list[Callable[[bytes], None]] = []
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    handlers: list[logging.Handler] = []
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600, exist_ok=True)
        file = _PrivateFile(path, maxBytes=MAX_BYTES, backupCount=KEEP, encoding="utf-8")
        handlers.append(file)
        writers.append(file.line)
    if console or path is None:
        handlers.append(logging.StreamHandler(sys.stderr))
        writers.append(lambda text: print(text.decode(), file=sys.stderr))
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[structlog.stdlib.add_log_level, structlog.stdlib.add_logger_name, *_processors()],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _rendered],
    )
    for handler in handlers:
        handler.setFormatter(formatter)
        root.addHandler(handler)
    root.setLevel(level.upper())
    # aiohttp and boto3 may quote requests in their log lines; only their warnings pass
    for noisy in ("aiohttp", "botocore", "boto3", "urllib3", "apscheduler", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    structlog.configure(
        processors=[structlog.processors.add_log_level, _name, *_processors(), _render],
        logger_factory=lambda name="": _Writer(str(name), writers),
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        # a request's line costs a fifth of the time it takes without the cache
        cache_logger_on_first_use=True,
    )


class _Writer:
    """Sink of rendered lines; structlog calls the method named after the line's level."""

    def __init__(self, name: str, writers: list[Callable[[bytes], None]]) -> None:
        self.name, self._writers = name, writers

    def msg(self, text: bytes) -> None:
        """Write one line."""
        for write in self._writers:
            write(text)

    debug = info = warning = error = critical = exception = msg


class _PrivateFile(logging.handlers.RotatingFileHandler):
    """A rotating file with mode 0600, which rotation preserves."""

    def line(self, text: bytes) -> None:
        """Write a rendered line with one system call. On a full disk it is dropped, like any other log line."""
        self.acquire()
        try:
            if self.stream is not None and self._size >= self.maxBytes:
                self.doRollover()
            if self.stream is None:
                self.stream = self._open()
            self._size += os.write(self.stream.fileno(), text + b"\n")
        except OSError:
            pass
        finally:
            self.release()

    def _open(self) -> TextIOWrapper:
        opened = super()._open()
        os.chmod(self.baseFilename, 0o600)
        self._size = os.fstat(opened.fileno()).st_size
        return opened


def _processors() -> list[structlog.typing.Processor]:
    return [structlog.processors.TimeStamper(fmt="iso", utc=True), _without_traceback_values]


def _name(logger: "_Writer", __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    event["logger"] = logger.name
    return event


def _render(_: object, __: str, event: structlog.typing.EventDict) -> bytes:
    """JSON, several times as fast as the standard library; values of unknown types are written as text."""
    return msgspec.json.encode(event, enc_hook=str)


def _rendered(logger: object, name: str, event: structlog.typing.EventDict) -> str:
    """The same for lines of libraries, which come through logging."""
    return _render(logger, name, event).decode()


def _without_traceback_values(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Keep an exception's type and location, drop its text, which may quote a request."""
    error = event.pop("exc_info", None)
    if error is True:
        error = sys.exc_info()
    if isinstance(error, BaseException):
        error = (type(error), error, error.__traceback__)
    if isinstance(error, tuple) and error[0] is not None:
        steps = [(frame.f_code, line) for frame, line in traceback.walk_tb(error[2])]
        event["error"] = error[0].__name__
        event["at"] = [f"{Path(code.co_filename).name}:{line}:{code.co_name}" for code, line in steps[-6:]]
    return event


def get_logger(name: str) -> Any:
    """A logger that adds ``logger=name`` to every line."""
    return structlog.get_logger(name)
