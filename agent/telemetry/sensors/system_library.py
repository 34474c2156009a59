"""Functions of the system's C libraries, with their types."""

import ctypes
from typing import Any

from agent.process import machine
from agent.telemetry.sensors.reading import Failure

LIBRARY = machine.LIBRARY


def functions(library: str, why: str, **signatures: tuple[Any, ...]) -> ctypes.CDLL:
    """A library of which these functions are used, each with the type of its result and of its arguments. Raises
    Failure with ``why``, in which {} is the error, where it or one of them does not exist."""
    try:
        found = ctypes.CDLL(library, use_errno=True)
        for name, (result, *arguments) in signatures.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise Failure(why.format(type(error).__name__)) from None
    return found
