"""Errors that reach a user: each message is one sentence that says what is wrong and what is allowed."""

import errno


class FenError(Exception):
    """Base of every error whose message is written for the user. The command line prints it without a traceback."""


class CheckpointError(FenError):
    """A file, repository or tensor that cannot be loaded. The message names the file or field."""


class CapacityError(FenError):
    """Something does not fit (memory, context, KV pool). The message names the option that would help."""


class RequestError(FenError):
    """A request that cannot be served as asked; becomes HTTP 400.

    param: the field at fault, in the caller's words. code: a machine-readable word such as "context_length_exceeded".
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param = param
        self.code = code


class EngineDeadError(FenError):
    """The engine process ended while the request was in flight; becomes HTTP 503."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the system or the device had no memory to give, as Python, the system or PyTorch say it."""
    kinds = isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__
    return (
        kinds
        or getattr(error, "errno", None) == errno.ENOMEM
        or any(words in str(error) for words in ("can't allocate memory", "out of memory", "ALLOC_FAILED"))
    )
