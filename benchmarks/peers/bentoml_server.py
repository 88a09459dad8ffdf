"""BentoML with its batching on: bentoml serve bentoml_server:TextClassifier. Environment: MODEL_DIR."""

from typing import Any

import bentoml
from torch_classifier import Classifier


@bentoml.service(workers=1)
class TextClassifier:
    def __init__(self) -> None:
        self.model = Classifier()

    @bentoml.api(batchable=True, max_batch_size=64)
    def predict(self, inputs: list[str]) -> list[list[dict[str, Any]]]:
        return self.model(inputs)
