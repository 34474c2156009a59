"""The errors of both programs, by who has to act.

::

    RackError
    ├── Refused      the caller asked for something that cannot be had: change the request
    │   ├── NotFound             there is no such object
    │   └── PreconditionFailed   somebody else wrote it first
    ├── Retryable    try again later; nothing is wrong with the request
    └── Halt         a human has to mend something; trying again does not help
        └── AccessDenied         the store does not accept our credentials

A message names the attempt, the object, what was seen and what would mend it. It never carries a prompt or a secret.
"""


class RackError(Exception):
    """Base of every error that is raised on purpose.

    ``code`` is a stable word for programs, ``param`` the request field at fault, where there is one.
    """

    code = "error"

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class Refused(RackError):
    """The caller's fault; the same call will be refused again."""

    code = "invalid_request"


class NotFound(Refused):
    """There is no object under this key."""

    code = "not_found"


class PreconditionFailed(Refused):
    """A conditional write lost: the object exists already or has changed."""

    code = "precondition_failed"


class Retryable(RackError):
    """May succeed later. ``retry_after_s`` is a hint in seconds, None where nothing is known."""

    code = "unavailable"

    def __init__(
        self, message: str, *, code: str | None = None, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, code=code, param=param)
        self.retry_after_s = retry_after_s


class Halt(RackError):
    """Needs a human; the message says what to do."""

    code = "halt"


class AccessDenied(Halt):
    """The store refused our credentials; data is kept until they are mended."""

    code = "access_denied"
