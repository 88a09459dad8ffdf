"""The canary: `{"canary": true}` has a model answer its first golden example; a probe needs no input of its own.

A good answer proves that this worker, over this transport, gives the answers it was trained to give.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from handler.errors import RequestError, WrongAnswer
from handler.formats.hugging_face import details
from handler.messages import Model, Request, Result, jsonable


@dataclass(frozen=True, slots=True)
class Canary:
    """One golden example, and the reply that judges what came of it.

    drift: `Task.drift`; tolerance: the largest drift that is no wrong answer.
    """

    example: Mapping[str, Any]
    drift: Callable[[Any, Any], float]
    tolerance: float

    @property
    def request(self) -> Request:
        """The example as a request."""
        return Request([self.example["inputs"]], self.example.get("parameters", {}))

    def answer(self, result: Result, model: Model) -> Any:
        """The drift, with usage and model. Raises WrongAnswer if it is over the tolerance."""
        [found] = result.predictions
        if isinstance(found, RequestError):
            raise found
        drift = self.drift(self.example["predictions"], json.loads(json.dumps(found, default=jsonable)))
        if not drift <= self.tolerance:
            raise WrongAnswer(f"the canary's answer drifts by {drift:.4g} from the golden one: do not use this model")
        return {"predictions": {"drift": drift}, **details(result, model)}

    def error(self, error: RequestError, model: Model) -> Any:
        """`{"error", "code", "type"}`."""
        return error.body()


def matches(value: Any) -> bool:
    """Whether a body asks for the canary."""
    return isinstance(value, dict) and value == {"canary": True}
