"""mosec with its batching on: mosec_server.py --address 127.0.0.1 --port PORT. Environment: MODEL_DIR."""

from typing import Any

import mosec
from torch_classifier import Classifier


class TextClassifier(mosec.Worker):
    def __init__(self) -> None:
        self.model = Classifier()

    def forward(self, data: list[dict[str, str]]) -> list[list[dict[str, Any]]]:
        return self.model([request["inputs"] for request in data])


if __name__ == "__main__":
    server = mosec.Server()
    server.append_worker(TextClassifier, num=1, max_batch_size=64, max_wait_time=2)
    server.run()
