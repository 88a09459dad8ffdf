"""TorchServe with a plain torch handler, in the style of its own: the weights and the tokenizer lie in the archive."""

from typing import Any

from torch_classifier import Classifier
from ts.torch_handler.base_handler import BaseHandler


class TextClassifier(BaseHandler):
    def initialize(self, context: Any) -> None:
        self.model = Classifier(context.system_properties["model_dir"])
        self.initialized = True

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[list[dict[str, Any]]]:
        return self.model([row["body"]["inputs"] for row in data])
