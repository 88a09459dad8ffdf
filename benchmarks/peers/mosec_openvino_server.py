"""mosec with our own OpenVINO model and nothing else: mosec_openvino_server.py --address 127.0.0.1 --port PORT.

Environment: MODEL_DIR, an unpacked archive of Marble; PRECISION, what OpenVINO computes in where it is not int8.
"""

import json
import os
from pathlib import Path
from typing import Any

import mosec
import numpy as np
import openvino
from tokenizers import Tokenizer


class TextClassifier(mosec.Worker):
    def __init__(self) -> None:
        folder = Path(os.environ["MODEL_DIR"])
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.labels = [config["id2label"][str(index)] for index in range(len(config["id2label"]))]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(config["max_position_embeddings"])
        self.tokenizer.enable_padding(pad_id=config.get("pad_token_id") or 0, pad_to_multiple_of=8)
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": os.environ["PRECISION"]}
        self.model = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", options)
        self.names = {port.get_any_name() for port in self.model.inputs}

    def forward(self, data: list[dict[str, str]]) -> list[list[dict[str, Any]]]:
        encodings = self.tokenizer.encode_batch([request["inputs"] for request in data])
        arrays = {
            "input_ids": np.array([encoding.ids for encoding in encodings], dtype=np.int64),
            "attention_mask": np.array([encoding.attention_mask for encoding in encodings], dtype=np.int64),
            "token_type_ids": np.array([encoding.type_ids for encoding in encodings], dtype=np.int64),
        }
        logits = self.model({name: array for name, array in arrays.items() if name in self.names})["logits"]
        scores = np.exp(logits - logits.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        return [
            [{"label": label, "score": score} for label, score in zip(self.labels, row, strict=True)]
            for row in scores.tolist()
        ]


if __name__ == "__main__":
    server = mosec.Server()
    server.append_worker(TextClassifier, num=1, max_batch_size=64, max_wait_time=2)
    server.run()
