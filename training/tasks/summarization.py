"""Trains an encoder-decoder model to say in few words what a text says."""

from collections.abc import Sequence
from typing import ClassVar

from training.tasks.sequence_to_sequence import SequenceToSequence, rouge_l


class Summarization(SequenceToSequence):
    """Columns `text` and `summary`."""

    primary: ClassVar[str] = "rouge_l"
    answer: ClassVar[str] = "summary_text"
    columns: ClassVar[tuple[tuple[str, str], ...]] = (
        ("text", "summary"),
        ("document", "summary"),
        ("article", "highlights"),
        ("article", "abstract"),
        ("dialogue", "summary"),
        ("text", "target"),
        ("source", "target"),
    )

    def likeness(self, texts: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
        """ROUGE-L."""
        return {"rouge_l": rouge_l(texts, targets)}
