"""The loader's loop: frames in, one engine step, frames out; the calling thread owns the engine.

A second thread only reads the socket, so that a cancel or the daemon's end is seen while a step runs.
"""

import os
import queue
import socket
import threading
from collections.abc import Callable

from agent.frames import (
    Accepted,
    Cancel,
    Decoder,
    Done,
    Failed,
    Frame,
    Generate,
    LoadFailed,
    Report,
    Stop,
    encode,
)
from agent.loader.generation import Engine
from shared.errors import RackError

EXIT_LOAD_FAILED = 3
EXIT_ENGINE = 4
_ORPHAN_GRACE_S = 5.0


class _Gone:
    """The daemon closed the socket."""


def serve(sock: socket.socket, make_engine: Callable[[], Engine]) -> int:
    """Load, say so, then answer until told to stop or left alone. Returns the exit status."""
    inbox: queue.SimpleQueue[Frame | _Gone] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(sock, inbox), daemon=True).start()
    try:
        engine = make_engine()
    except RackError as error:
        _send(sock, [LoadFailed(code=error.code, message=error.message)])
        return EXIT_LOAD_FAILED
    try:
        _send(sock, [engine.describe()])
        return _loop(sock, inbox, engine)
    except (BrokenPipeError, ConnectionResetError):
        return 0  # the daemon is gone; nobody is left to answer
    finally:
        engine.close()


def _loop(sock: socket.socket, inbox: "queue.SimpleQueue[Frame | _Gone]", engine: Engine) -> int:
    open_ids: set[int] = set()
    stopping = False
    while True:
        while not inbox.empty() or not (engine.busy or stopping):
            frame = inbox.get()
            if isinstance(frame, _Gone):
                return 0
            stopping = stopping or isinstance(frame, Stop)
            _send(sock, _taken(frame, engine, open_ids))
        if stopping and not engine.busy:
            return 0
        try:
            answers = engine.step()
        except Exception as error:  # noqa: BLE001  # the engine is unusable: say so to every caller, then end
            _send(sock, [_engine_failed(i, error) for i in sorted(open_ids)])
            return EXIT_ENGINE
        open_ids -= {a.id for a in answers if isinstance(a, Done | Failed)}
        _send(sock, answers)


def _taken(frame: Frame, engine: Engine, open_ids: set[int]) -> list[Frame]:
    if isinstance(frame, Generate):
        try:
            answer = engine.submit(frame)
        except Exception as error:  # noqa: BLE001  # one request must not end the loader
            answer = Failed(id=frame.id, code="engine_failed", message=f"not taken ({type(error).__name__})")
        if isinstance(answer, Accepted):
            open_ids.add(frame.id)
        return [answer]
    if isinstance(frame, Cancel):
        open_ids.discard(frame.id)
        engine.cancel(frame.id)
    elif isinstance(frame, Report):
        return [engine.report()]
    return []


def _engine_failed(request_id: int, error: Exception) -> Failed:
    return Failed(
        id=request_id, code="engine_failed", message=f"the engine failed ({type(error).__name__})", retryable=True
    )


def _send(sock: socket.socket, frames: list[Frame]) -> None:
    if frames:
        sock.sendall(b"".join(encode(frame) for frame in frames))


def _read(sock: socket.socket, inbox: "queue.SimpleQueue[Frame | _Gone]") -> None:
    decoder = Decoder()
    try:
        while chunk := sock.recv(1 << 16):
            for frame in decoder.feed(chunk):
                inbox.put(frame)
    except (OSError, RackError):
        pass
    inbox.put(_Gone())
    # the owner thread may sit in a long step; an orphan must not hold a model's memory for long
    timer = threading.Timer(_ORPHAN_GRACE_S, os._exit, args=(0,))
    timer.daemon = True
    timer.start()
