"""The loader's loop: frames in, one engine step, frames out; the calling thread owns the engine.

A second thread only reads the socket, so that a cancel or the daemon's exit is noticed during a step. A third prepares
requests (templates, tokens, grammars), so that a huge prompt or a complex schema delays no other request's tokens.
"""

import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from agent.loader.generation import Engine, Prepared
from agent.loader.measuring import Measuring
from agent.wire.frames import (
    CRASHED,
    Accepted,
    Ask,
    Calibrate,
    Cancel,
    Decoder,
    Done,
    Embed,
    Failed,
    Frame,
    Generate,
    LoadFailed,
    Relieve,
    Report,
    Stop,
    encode,
)
from agent.wire.progress import Progress
from shared.errors import RackError

EXIT_LOAD_FAILED = 3
EXIT_ENGINE = 4
_ORPHAN_GRACE_S = 5.0
_WORKING_S = 1.0


class _Gone:
    """The daemon closed the socket."""


class _Asked(NamedTuple):
    """A request arrived and is to be prepared; Prepared or Failed follows."""

    id: int


Inbox = queue.SimpleQueue[Frame | Prepared | _Asked | _Gone]


def serve(sock: socket.socket, make_engine: Callable[[], Engine], progress: Progress) -> int:
    """Load, send Ready, then serve until Stop or until the daemon is gone. ``progress`` tells the daemon what is being
    prepared. Returns the exit status."""
    inbox: Inbox = queue.SimpleQueue()
    asked: queue.SimpleQueue[Ask] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(sock, inbox, asked), daemon=True).start()
    try:
        engine = make_engine()
    except RackError as error:
        _send(sock, [LoadFailed(code=error.code, message=error.message)])
        return EXIT_LOAD_FAILED
    loop = _Loop(sock, inbox, engine)
    threading.Thread(target=_prepare, args=(engine, asked, inbox, progress, loop.dropped), daemon=True).start()
    try:
        _send(sock, [engine.describe()])
        return loop.run()
    except (BrokenPipeError, ConnectionResetError):
        return 0  # the daemon is gone
    finally:
        engine.close()


class _Loop:
    """Handles incoming frames, steps the engine, sends its output."""

    def __init__(self, sock: socket.socket, inbox: "Inbox", engine: Engine) -> None:
        self._sock, self._inbox, self._engine = sock, inbox, engine
        self._open: set[int] = set()
        self._asked: set[int] = set()
        self.dropped: set[int] = set()
        """Requests that were cancelled before they were prepared."""
        self._stopping = False
        self._said_s = time.monotonic()
        self._measuring = Measuring(engine)

    def run(self) -> int:
        """Run until the daemon is gone or sends Stop; returns the exit status."""
        while True:
            while not self._inbox.empty() or not (self._engine.busy or self._done()):
                item = self._next()
                if isinstance(item, _Gone):
                    return 0
                try:
                    said = self._taken(item)
                except Exception as error:  # noqa: BLE001  # as for a step
                    return self._broken(error)
                _send(self._sock, said)
            if self._done():
                return 0
            try:
                answers = self._engine.step()
            except Exception as error:  # noqa: BLE001  # the engine is unusable
                return self._broken(error)
            self._open -= {a.id for a in answers if isinstance(a, Done | Failed)}
            _send(self._sock, answers + self._sign_of_life())

    def _next(self) -> "Frame | Prepared | _Asked | _Gone":
        """What arrives next. Steps are timed meanwhile if that is allowed; before anything but a report is handled, the
        memory for that is given back."""
        while self._inbox.empty() and self._measuring.wanted and not (self._asked or self._engine.busy):
            _send(self._sock, self._measuring.step())
        item = self._inbox.get()
        if not isinstance(item, Report | Calibrate):
            self._measuring.rest()
        return item

    def _broken(self, error: Exception) -> int:
        """Fail every open request, then exit: the daemon starts another loader."""
        _send(self._sock, [_engine_failed(i, error) for i in sorted(self._open)])
        return EXIT_ENGINE

    def _done(self) -> bool:
        return self._stopping and not self._engine.busy and not self._asked

    def _sign_of_life(self) -> list[Frame]:
        now = time.monotonic()
        if now - self._said_s < _WORKING_S and self._engine.busy:
            return []
        self._said_s = now
        return [self._engine.working()]

    def _taken(self, item: "Frame | Prepared | _Asked") -> list[Frame]:
        if isinstance(item, _Asked):
            self._asked.add(item.id)
        elif isinstance(item, Prepared | Failed):
            return self._submitted(item)
        elif isinstance(item, Cancel):
            if item.id in self._open:
                self._open.discard(item.id)
                self._engine.cancel(item.id)
            elif item.id in self._asked:
                self.dropped.add(item.id)
            return [self._engine.working()]
        elif isinstance(item, Report):
            return [self._engine.report()]
        elif isinstance(item, Relieve):
            self._engine.relieve(item.level)
            return [self._engine.working()]
        elif isinstance(item, Calibrate):
            if item.go:
                self._measuring.allowed = True
            else:
                self._measuring.rest()
        elif isinstance(item, Stop):
            self._stopping = True
        return []

    def _submitted(self, item: Prepared | Failed) -> list[Frame]:
        number = item.id if isinstance(item, Failed) else item.request.id
        self._asked.discard(number)
        if number in self.dropped:
            self.dropped.discard(number)
            return []
        if isinstance(item, Failed):
            return [item]
        try:
            answer = self._engine.submit(item)
        except Exception as error:  # noqa: BLE001  # one request must not end the loader
            answer = _not_taken(number, error)
        if isinstance(answer, Accepted):
            self._open.add(number)
        return [answer]


def _prepare(
    engine: Engine, asked: "queue.SimpleQueue[Ask]", inbox: "Inbox", progress: Progress, dropped: set[int]
) -> None:
    while True:
        request = asked.get()
        if request.id in dropped:  # nobody wants it: what it would cost is saved
            inbox.put(Failed(id=request.id, code="cancelled", message="cancelled"))
            continue
        progress.begin(request.id)
        try:
            found: Prepared | Failed = engine.prepare(request, progress.advance)
        except Exception as error:  # noqa: BLE001  # one request must not end the loader
            found = _not_taken(request.id, error)
        progress.end()
        inbox.put(found)


def _not_taken(request_id: int, error: Exception) -> Failed:
    return Failed(id=request_id, code="engine_failed", message=f"request not accepted ({type(error).__name__})")


def _engine_failed(request_id: int, error: Exception) -> Failed:
    return Failed(id=request_id, code=CRASHED, message=f"the engine failed ({type(error).__name__})", retryable=True)


def _send(sock: socket.socket, frames: list[Frame]) -> None:
    if frames:
        sock.sendall(b"".join(encode(frame) for frame in frames))


def _read(sock: socket.socket, inbox: "Inbox", asked: "queue.SimpleQueue[Ask]") -> None:
    decoder = Decoder()
    try:
        while chunk := sock.recv(1 << 16):
            for frame in decoder.feed(chunk):
                if isinstance(frame, Generate | Embed):
                    inbox.put(_Asked(frame.id))
                    asked.put(frame)
                else:
                    inbox.put(frame)
    except (OSError, RackError):
        pass
    inbox.put(_Gone())
    # the owner thread may be in a long step; an orphan must not hold a model's memory for long
    timer = threading.Timer(_ORPHAN_GRACE_S, os._exit, args=(0,))
    timer.daemon = True
    timer.start()
