"""Structured logs: one JSON object per line, times in UTC, rotated by the program itself.

One line per request, tick or run, with its figures. Only ids, counts and codes: no prompt, completion or secret.
Our own lines are rendered once and written; those of libraries pass through the standard library's logging, and of
many alike one a minute is written, with the count of the others, so that whatever makes a library complain cannot
wipe the log.
"""

import contextlib
import errno
import logging
import logging.handlers
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import msgspec

# structlog imports rich if it is installed: five megabytes for coloured output that is never used here
sys.modules.setdefault("rich", None)  # type: ignore[arg-type]
import structlog  # noqa: E402

from shared.log_repeats import Repeats  # noqa: E402

MAX_BYTES = 20 << 20
KEEP = 5
_MOST_CHARS = 500
"""Of a library's text."""
_STAMP = structlog.processors.TimeStamper(fmt="iso", utc=True)
_NUMBERS = re.compile(r"0x[0-9a-fA-F]+|\d+")
_file: "_PrivateFile | None" = None
_loggers: list[Any] = []


def configure(path: Path | None, *, level: str = "info", console: bool = False) -> None:
    """Write log lines to ``path`` (rotated, mode 0600), and to stderr if ``console`` is set or there is no path."""
    global _file
    writers: list[Callable[[bytes], None]] = []
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    if _file is not None:
        _file.close()
        _file = None
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600, exist_ok=True)
        _file = _PrivateFile(path, maxBytes=MAX_BYTES, backupCount=KEEP, encoding="utf-8")
        writers.append(_file.line)
    if console or path is None:
        writers.append(_to_stderr)
    libraries = _Libraries(writers)
    root.addHandler(libraries)
    root.setLevel(level.upper())
    # aiohttp and boto3 may quote requests in their log lines; only their warnings pass
    for noisy in ("aiohttp", "botocore", "boto3", "urllib3", "apscheduler", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    structlog.configure(
        processors=[structlog.processors.add_log_level, _name, *_processors(), _render],
        logger_factory=lambda name="": _Writer(str(name), writers, libraries.tell),
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        # a request's line costs a fifth of the time it takes without the cache
        cache_logger_on_first_use=True,
    )


def set_level(level: str) -> None:
    """Write lines of this level and above from now on."""
    logging.getLogger().setLevel(level.upper())
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())))
    for logger in _loggers:
        logger.__dict__.pop("bind", None)  # what it has cached


def state() -> dict[str, Any]:
    """For ``status``: the lines that could not be written to the file since the start, and why the last one could not;
    "" once lines are written again."""
    return {"lost_lines": _file.lost if _file else 0, "problem": _file.problem if _file else ""}


def catch_unraisable() -> None:
    """Exceptions that no code can catch go to the log from now on, where repetitions are counted. Python itself would
    write each to stderr, with what it was about: a client causes one by a TLS server name beyond ASCII."""
    sys.unraisablehook = _unraisable


def _unraisable(raised: "sys.UnraisableHookArgs") -> None:
    text = f"unraisable {raised.exc_type.__name__} in {type(raised.object).__name__}"
    logging.getLogger("python").error(text, exc_info=raised.exc_value)


def _to_stderr(text: bytes) -> None:
    with contextlib.suppress(OSError):  # its file may be full, too
        print(text.decode(), file=sys.stderr)


class _Libraries(logging.Handler):
    """The way of libraries' records to the log."""

    def __init__(self, writers: list[Callable[[bytes], None]]) -> None:
        super().__init__()
        self._writers, self._repeats = writers, Repeats()
        chain: list[structlog.typing.Processor] = [
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            *_processors(),
        ]
        last: list[structlog.typing.Processor] = [
            _shortened,
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            _rendered,
        ]
        self.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=chain, processors=last))

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, unless one of its kind was written within a minute."""
        self.tell()
        if self._repeats.take(_kind(record), time.monotonic()) is None:
            return
        try:
            self._write(self.format(record).encode())
        except (
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
        ):  # what it was given does not fit its text, or cannot be shown
            self._write(_render(None, "", {"logger": record.name, "event": "unreadable record"}))

    def tell(self) -> None:
        """Write how many records of each kind were left out, once a minute."""
        if (now_s := time.monotonic()) < self._repeats.next_s:
            return
        self.acquire()  # records of other threads are counted meanwhile
        try:
            due = self._repeats.due(now_s)
        finally:
            self.release()
        for kind, count in due:
            name, *_, text = kind if isinstance(kind, tuple) else ("", kind)
            event = {"logger": name, "level": "warning", "event": "repeated", "of": text, "repeated": count}
            self._write(_render(None, "", _STAMP(None, "", event)))

    def _write(self, text: bytes) -> None:
        for write in self._writers:
            write(text)


def _kind(record: logging.LogRecord) -> tuple[str, int, str, str]:
    """What makes two records alike: where they come from, and the first line of their text without its numbers."""
    error = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else ""
    first = str(record.msg)[:_MOST_CHARS].partition("\n")[0]
    return record.name, record.levelno, error, _NUMBERS.sub("#", first)


def _shortened(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    if len(text := str(event.get("event", ""))) > _MOST_CHARS:
        event["event"] = text[:_MOST_CHARS] + "..."
    return event


class _Writer:
    """Sink of rendered lines; structlog calls the method named after the line's level."""

    def __init__(self, name: str, writers: list[Callable[[bytes], None]], tell: Callable[[], None]) -> None:
        self.name, self._writers, self._tell = name, writers, tell

    def msg(self, text: bytes) -> None:
        """Write one line."""
        self._tell()
        for write in self._writers:
            write(text)

    debug = info = warning = error = critical = exception = msg


class _PrivateFile(logging.handlers.RotatingFileHandler):
    """A rotating file with mode 0600, which rotation preserves."""

    lost, problem = 0, ""

    def line(self, text: bytes) -> None:
        """Write a rendered line with one system call. On a full disk it is dropped and counted."""
        self.acquire()
        try:
            if self.stream is not None and self._size >= self.maxBytes:
                self.doRollover()
            if self.stream is None:
                self.stream = self._open()
            if (written := os.write(self.stream.fileno(), text + b"\n")) <= len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._size += written
            self.problem = ""
        except OSError as error:
            self.lost, self.problem = self.lost + 1, error.strerror or type(error).__name__
        finally:
            self.release()

    def _open(self) -> TextIOWrapper:
        opened = super()._open()
        with contextlib.suppress(OSError):  # some file systems have no modes
            os.chmod(self.baseFilename, 0o600)
        self._size = os.fstat(opened.fileno()).st_size
        return opened


def _processors() -> list[structlog.typing.Processor]:
    return [_STAMP, _without_traceback_values]


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
    logger = structlog.get_logger(name)
    _loggers.append(logger)
    return logger
