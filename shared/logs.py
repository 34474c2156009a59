"""Structured logs: one JSON object a line, times in UTC, rotated by the program itself.

One line per request, tick or run, with its numbers. Only ids, counts and codes: no prompt, no completion, no secret.
"""

import logging
import logging.handlers
import os
import sys
from io import TextIOWrapper
from pathlib import Path

import structlog

MAX_BYTES = 20 << 20
KEEP = 5


def configure(path: Path | None, *, level: str = "info", console: bool = False) -> None:
    """Send log lines to ``path`` (rotated, 0600), and to stderr when ``console`` or when there is no path."""
    handlers: list[logging.Handler] = []
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600, exist_ok=True)
        handlers.append(_PrivateFile(path, maxBytes=MAX_BYTES, backupCount=KEEP, encoding="utf-8"))
    if console or path is None:
        handlers.append(logging.StreamHandler(sys.stderr))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    chain = _processors()
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=chain,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.JSONRenderer(),
        ],
    )
    for handler in handlers:
        handler.setFormatter(formatter)
        root.addHandler(handler)
    root.setLevel(level.upper())
    # aiohttp and boto3 may quote a request in their own lines; only their warnings are let through
    for noisy in ("aiohttp", "botocore", "boto3", "urllib3", "apscheduler", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    structlog.configure(
        processors=[*chain, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


class _PrivateFile(logging.handlers.RotatingFileHandler):
    """A rotating file that its owner alone may read, the fresh one after a rotation too."""

    def _open(self) -> TextIOWrapper:
        opened = super()._open()
        os.chmod(self.baseFilename, 0o600)
        return opened


def _processors() -> list[structlog.typing.Processor]:
    return [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _without_traceback_values,
    ]


def _without_traceback_values(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Keep an exception's type and place and drop its text, which may quote a request."""
    error = event.pop("exc_info", None)
    if error is True:
        error = sys.exc_info()
    if isinstance(error, BaseException):
        error = (type(error), error, error.__traceback__)
    if isinstance(error, tuple) and error[0] is not None:
        frames = []
        trace = error[2]
        while trace is not None:
            code = trace.tb_frame.f_code
            frames.append(f"{Path(code.co_filename).name}:{trace.tb_lineno}:{code.co_name}")
            trace = trace.tb_next
        event["error"] = error[0].__name__
        event["at"] = frames[-6:]
    return event


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger that adds ``logger=name`` to each line."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger
