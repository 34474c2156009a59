"""A number that macOS publishes under a key by notify(3): its current value, and a descriptor that becomes readable
when it is published again. Unprivileged. Signatures: <notify.h>."""

import os
from ctypes import byref, c_char_p, c_int, c_uint32, c_uint64, c_void_p

from agent.telemetry.sensors.reading import Failure
from agent.telemetry.sensors.system_library import LIBRARY, functions

_OK = 0


class Notify:
    """One key. Raises Failure when notify(3) is missing or refuses. Must be closed."""

    def __init__(self, key: str, library: str = LIBRARY) -> None:
        self._lib = functions(
            library,
            "notify(3): {}",
            notify_register_file_descriptor=(c_uint32, c_char_p, c_void_p, c_int, c_void_p),
            notify_get_state=(c_uint32, c_int, c_void_p),
            notify_cancel=(c_uint32, c_int),
        )
        descriptor, token = c_int(-1), c_int(-1)
        status = self._lib.notify_register_file_descriptor(key.encode(), byref(descriptor), 0, byref(token))
        if status != _OK:
            raise Failure(f"notify(3): {key} cannot be registered (status {status})")
        self._token = token.value
        self.descriptor = descriptor.value
        """Readable when the number was published since the last ``drain``."""
        os.set_blocking(self.descriptor, False)

    def state(self) -> int:
        """The current number; 0 also for a key that was never published. Raises Failure."""
        value = c_uint64(0)
        if (status := self._lib.notify_get_state(self._token, byref(value))) != _OK:
            raise Failure(f"notify(3): cannot read the state (status {status})")
        return int(value.value)

    def drain(self) -> None:
        """Read the pending notifications: four bytes for each publication."""
        try:
            while os.read(self.descriptor, 4096):
                pass
        except BlockingIOError:
            pass

    def close(self) -> None:
        """Cancel the registration; the system library closes the descriptor."""
        if self._token >= 0:
            self._lib.notify_cancel(self._token)
            self._token = -1
