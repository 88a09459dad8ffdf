"""LitServe with its batching on. Environment: MODEL_DIR, PORT."""

import os
from typing import Any

import litserve
from torch_classifier import Classifier


class ClassifierApi(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.model = Classifier()

    def decode_request(self, request: dict[str, str]) -> str:
        return request["inputs"]

    def predict(self, texts: list[str]) -> list[list[dict[str, Any]]]:
        return self.model(texts)

    def encode_response(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output


if __name__ == "__main__":
    api = ClassifierApi(max_batch_size=64, batch_timeout=0.002)
    server = litserve.LitServer(api, accelerator="cpu")
    server.run(host="127.0.0.1", port=int(os.environ["PORT"]), log_level="warning", generate_client_file=False)
