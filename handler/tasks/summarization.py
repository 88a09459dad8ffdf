"""Summarization: a short text that says what a long one does."""

from typing import ClassVar

from handler.tasks.sequence_to_sequence import SequenceToSequence


class Summarization(SequenceToSequence):
    """Answers with `summary_text`."""

    answer: ClassVar[str] = "summary_text"
