"""A TCP relay on loopback that can be shut and opened, to simulate network outages."""

import contextlib
import socket
import threading


class TcpGate:
    """Relays to port ``target``. While shut, open connections are cut and new ones refused."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._open = True
        self._links: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self.port = 0
        self._listen()

    def shut(self) -> None:
        """Cut all connections and refuse new ones."""
        with self._lock:
            self._open = False
            links, self._links = self._links, set()
        if self._listener is not None:
            # shutdown first: a blocked accept() would keep the port listening
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        for link in links:
            _end(link)

    def open(self) -> None:
        """Relay again, on the same port."""
        self._open = True
        self._listen()

    def _listen(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(64)
        self.port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target), timeout=5)
                far.settimeout(None)
            except OSError:
                _end(near)
                continue
            with self._lock:
                if not self._open:
                    _end(near)
                    _end(far)
                    return
                self._links |= {near, far}
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        for link in (source, sink):
            with self._lock:
                self._links.discard(link)
            _end(link)


def _end(link: socket.socket) -> None:
    with contextlib.suppress(OSError):
        link.shutdown(socket.SHUT_RDWR)
    link.close()
