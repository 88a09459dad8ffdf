"""KServe's v1 protocol: `{"instances": […]}` → `{"predictions": […]}`."""

from typing import Any

from handler.errors import RequestError
from handler.formats import fields
from handler.formats.hugging_face import details, listed
from handler.messages import Model, Request, Result


class KServeV1Reply:
    """Answers with one prediction per instance."""

    def answer(self, result: Result, model: Model) -> Any:
        """`{"predictions": […]}`, with usage and model beside it when details are asked for."""
        return {"predictions": listed(result), **(details(result, model) if result.details else {})}

    def error(self, error: RequestError, model: Model) -> Any:
        """`{"error", "code", "type"}`."""
        return error.body()


def matches(value: Any) -> bool:
    """Whether a body is of this format."""
    return isinstance(value, dict) and "instances" in value


def decode(value: Any) -> tuple[Request, KServeV1Reply]:
    """Reads a body for which `matches` holds. Raises RequestError if it is malformed."""
    fields.only(value, ("instances", "parameters"))
    return Request(fields.items(value["instances"], "instances"), fields.parameters(value), True), KServeV1Reply()
