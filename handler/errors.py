"""Errors that belong to one request or one input, each with the HTTP status a client sees."""

from typing import Any, ClassVar


class RequestError(Exception):
    """An error caused by one request (or one of its inputs); its neighbours in the batch are not touched.

    The message says what is wrong and how to mend it. It never quotes the client's text.
    """

    code: ClassVar[int] = 500

    def body(self) -> dict[str, Any]:
        """The JSON body of the answer: `{"error": …, "code": …, "type": …}`."""
        return {"error": str(self), "code": self.code, "type": type(self).__name__}


class UnreadableRequest(RequestError):
    """The bytes cannot be read as what they claim to be."""

    code = 400


class TooLarge(RequestError):
    """The request, one of its texts, or the answer to it is over a limit."""

    code = 413


class UnsupportedMediaType(RequestError):
    """A content type that no wire format of Marble takes."""

    code = 415


class InvalidInput(RequestError):
    """A well-formed request whose `inputs` the task cannot take."""

    code = 422


class InvalidParameter(RequestError):
    """A parameter that is unknown, of the wrong type, or out of range."""

    code = 422


class Overloaded(RequestError):
    """The batch this request came in is full of work; the same request succeeds when it is sent again."""

    code = 503


class NotSupported(RequestError):
    """Something that this model or this server does not offer."""

    code = 501


class WrongAnswer(RequestError):
    """The model answers its canary otherwise than the golden set says."""

    code = 500


class InternalError(RequestError):
    """A defect of the server, not of the request."""

    code = 500
