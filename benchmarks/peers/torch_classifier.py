"""The model that most peers serve: fp32 PyTorch through transformers, as their documentation loads it."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


class Classifier:
    """A text classifier from a local folder, by default that in the environment variable MODEL_DIR."""

    def __init__(self, model_dir: str | None = None) -> None:
        model_dir = model_dir or os.environ["MODEL_DIR"]
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self.model = AutoModelForSequenceClassification.from_pretrained(model_dir).eval()

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> list[list[dict[str, Any]]]:
        """All labels with their scores, for each text."""
        batch = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        scores = self.model(**batch).logits.softmax(-1).tolist()
        labels = self.model.config.id2label
        return [[{"label": labels[index], "score": score} for index, score in enumerate(row)] for row in scores]
