"""Sentence similarity: how near each of several sentences is to one, by their vectors."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from handler.errors import InvalidInput, TooLarge
from handler.inputs.text import read_text
from handler.parameters import CommonParameters
from handler.tasks import TIE, Part
from handler.tasks.feature_extraction import Embedder, SentenceSettings, mean_vector, normalized

_FIELDS = {"source_sentence", "sentences"}
_MAX_SENTENCES = 1024


class SentenceSimilarity(Embedder):
    """One number for each sentence, by the model's own measure: cosine, unless its settings say otherwise.

    A model without sentence-transformers settings has its token vectors averaged, as sentence-transformers does.
    """

    Parameters: ClassVar[type[CommonParameters]] = CommonParameters

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.sentences = self.sentences or SentenceSettings()

    def read(self, value: Any, parameters: Any) -> Sequence[str]:
        """The source sentence and then the others, of `{"source_sentence": …, "sentences": […]}`."""
        if not isinstance(value, dict) or set(value) != _FIELDS or not isinstance(value["sentences"], list):
            raise InvalidInput('an input must be {"source_sentence": string, "sentences": [string, …]}')
        sentences = value["sentences"]
        if not sentences:
            raise InvalidInput('there is nothing to compare: "sentences" is empty')
        if len(sentences) > _MAX_SENTENCES:
            raise TooLarge(f"{len(sentences)} sentences; send at most {_MAX_SENTENCES} with one source sentence")
        return [self.prompted(read_text(text, "made of strings")) for text in (value["source_sentence"], *sentences)]

    def postprocess(self, parts: Sequence[Part], parameters: Any) -> list[float]:
        """Similarities in the order of the sentences."""
        assert self.sentences is not None
        vectors = np.stack([mean_vector(part) for part in parts])
        if self.sentences.normalize:
            vectors = normalized(vectors)
        return similarity(vectors[0], vectors[1:], self.sentences.similarity).tolist()  # type: ignore[no-any-return]

    @staticmethod
    def agrees(expected: Sequence[float], found: Sequence[float]) -> bool:
        """Whether all similarities are as good as equal."""
        return len(expected) == len(found) and all(
            abs(before - after) <= TIE for before, after in zip(expected, found, strict=True)
        )


def similarity(source: NDArray[np.float64], others: NDArray[np.float64], measure: str) -> NDArray[np.float64]:
    """Similarity of `source`, [size], to each of `others`, [sentences, size]; distances count negative."""
    if measure == "euclidean":
        return np.asarray(-np.linalg.norm(others - source, axis=-1))
    if measure == "manhattan":
        return np.asarray(-np.abs(others - source).sum(axis=-1))
    if measure == "cosine":
        source, others = normalized(source), normalized(others)
    return np.asarray(others @ source)
