"""Every way a call can fail, the same over REST and gRPC."""


class MarbleError(Exception):
    """A call that failed.

    `code` is the HTTP status (its nearest equivalent over gRPC), or 0 when the server gave none. `type` is
    the server's name for the failure. `retry_after` is the server's advice in seconds, when it gave any.
    """

    def __init__(
        self, message: str, *, code: int = 0, kind: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.type = kind or self.__class__.__name__
        self.retry_after = retry_after


class BadRequest(MarbleError):
    """The server could not read the request, or refuses it for a reason with no class of its own."""


class Unauthorized(MarbleError):
    """The token is missing, wrong or expired."""


class NotFound(MarbleError):
    """No such model or version."""


class TooLarge(MarbleError):
    """The input is too large or too long."""


class UnsupportedMediaType(MarbleError):
    """The model does not take this kind of input."""


class InvalidParameter(MarbleError):
    """A parameter or value is wrong."""


class RateLimited(MarbleError):
    """Too many requests from this caller."""


class Unavailable(MarbleError):
    """The server is overloaded, or the model has no worker that can answer."""


class ServerError(MarbleError):
    """The server failed."""


class Timeout(MarbleError):
    """No answer within the deadline."""


class ConnectionFailed(MarbleError):
    """The server cannot be reached, or hung up. `sent` is False when the request surely never reached it."""

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class BadResponse(MarbleError):
    """The server answered with something that is not a Marble answer."""


class StubsMissing(MarbleError):
    """The gRPC stubs are not generated, or do not fit the installed protobuf."""


_BY_TYPE: dict[str, type[MarbleError]] = {
    # TorchServe says 400 for a bad token over REST, and INTERNAL for an unknown model over gRPC.
    "InvalidKeyException": Unauthorized,
    "ModelNotFoundException": NotFound,
    "ModelVersionNotFoundException": NotFound,
}

_BY_CODE: dict[int, type[MarbleError]] = {
    401: Unauthorized,
    403: Unauthorized,
    404: NotFound,
    408: Timeout,
    413: TooLarge,
    415: UnsupportedMediaType,
    422: InvalidParameter,
    429: RateLimited,
    503: Unavailable,
    504: Timeout,
}


def error_for(code: int, kind: str | None, message: str, retry_after: float | None = None) -> MarbleError:
    """The exception for a failure the server reported; `code` is an HTTP status of 400 or more."""
    by_range = ServerError if code >= 500 else BadRequest
    error = _BY_TYPE.get(kind or "") or _BY_CODE.get(code, by_range)
    return error(message, code=code, kind=kind, retry_after=retry_after)
