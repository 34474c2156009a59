"""Errors of both programs, classified by who has to act.

::

    RackError
    ├── Refused      the request cannot succeed: change it
    │   ├── NotFound             no such object
    │   └── PreconditionFailed   another writer was first
    ├── Retryable    try again later; the request itself is valid
    └── Halt         an operator has to act; retrying does not help
        └── AccessDenied         the store rejected the credentials

A message states the operation, the object, what was seen and the remedy. It never contains a prompt or a secret.
"""


class RackError(Exception):
    """Base class of all errors that are raised deliberately.

    ``code`` is a stable machine-readable identifier, ``param`` the request field at fault, if any.
    """

    code = "error"

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param = message, param
        if code is not None:
            self.code = code


class Refused(RackError):
    """The request is at fault; repeating it fails again."""

    code = "invalid_request"


class NotFound(Refused):
    """No object with this key."""

    code = "not_found"


class PreconditionFailed(Refused):
    """A conditional write failed: the object already exists or has changed."""

    code = "precondition_failed"


class Retryable(RackError):
    """May succeed later. ``retry_after_s`` is a hint in seconds, None if unknown."""

    code = "unavailable"

    def __init__(
        self, message: str, *, code: str | None = None, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, code=code, param=param)
        self.retry_after_s = retry_after_s


class Halt(RackError):
    """An operator has to act; the message says how."""

    code = "halt"


class AccessDenied(Halt):
    """The store rejected the credentials; data are kept until they are replaced."""

    code = "access_denied"
