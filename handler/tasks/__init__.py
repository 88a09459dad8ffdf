"""Tasks: what is asked of a model and what it answers. One file per task, one line in the registry."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from handler.inputs import Inputs
from handler.parameters import CommonParameters
from handler.settings import Settings

REGISTRY = {
    "audio-classification": "handler.tasks.audio_classification:AudioClassification",
    "automatic-speech-recognition": "handler.tasks.speech_recognition:SpeechRecognition",
    "feature-extraction": "handler.tasks.feature_extraction:FeatureExtraction",
    "fill-mask": "handler.tasks.fill_mask:FillMask",
    "image-classification": "handler.tasks.image_classification:ImageClassification",
    "question-answering": "handler.tasks.question_answering:QuestionAnswering",
    "sentence-similarity": "handler.tasks.sentence_similarity:SentenceSimilarity",
    "summarization": "handler.tasks.summarization:Summarization",
    "text-classification": "handler.tasks.text_classification:TextClassification",
    "text-generation": "handler.tasks.text_generation:TextGeneration",
    "text-to-image": "handler.tasks.text_to_image:TextToImage",
    "text-to-speech": "handler.tasks.text_to_speech:TextToSpeech",
    "token-classification": "handler.tasks.token_classification:TokenClassification",
    "translation": "handler.tasks.translation:Translation",
    "zero-shot-classification": "handler.tasks.zero_shot_classification:ZeroShotClassification",
}

Outputs = Mapping[str, NDArray[np.float32]]

# Candidates whose scores are this close are equally good answers.
TIE = 0.1


@dataclass(frozen=True, slots=True)
class Part:
    """One sample of an input and what the model gave for it.

    outputs: for each row the model's outputs by name, without the batch axis; those with a value per token still have
    the batch's padding behind the row's own `len(row)` positions.
    """

    sample: Any
    rows: Sequence[Any]
    outputs: Sequence[Outputs]

    @property
    def weights(self) -> NDArray[np.float32]:
        """Each row's share of the sample, float32 [rows], sums to 1."""
        lengths = np.array([len(row) for row in self.rows], dtype=np.float32)
        return np.asarray(lengths / lengths.sum())


class Task(ABC):
    """Preprocessing, postprocessing and parameters of one task, for one model.

    Parameters: dataclass of the parameters a request may carry.
    nests_single: whether the Inference API answers a single input with a list of one.
    labels: the names that predictions choose from, if the model has a set of its own; see `found`.
    """

    Parameters: ClassVar[type[CommonParameters]]
    nests_single: ClassVar[bool] = False
    labels: Sequence[str] = ()

    @abstractmethod
    def __init__(self, model_dir: Path, settings: Settings, config: Mapping[str, Any]) -> None:
        """config: the model's `config.json`, {} if it has none. Raises ValueError if the model is not for this task."""

    @abstractmethod
    def read(self, value: Any, parameters: Any) -> Sequence[Any]:
        """The samples of one input: one, or several where an input asks more than one question of the model.

        Raises RequestError if the input is not one this task takes.
        """

    def found(self, prediction: Any) -> Iterable[tuple[str, float]]:
        """The labels that a prediction comes down to, each with its score: what the monitoring counts."""
        return ()

    @staticmethod
    @abstractmethod
    def drift(expected: Any, found: Any) -> float:
        """How far two predictions for one input are apart: the largest difference of a score, or inf.

        Both as JSON values, media in base64.
        """


@dataclass(frozen=True, slots=True)
class Measure:
    """How samples are measured before any time is spent on them.

    what: e.g. "text"; unit: what `Inputs.size` counts, e.g. "characters"; limit: the setting that bounds it.
    """

    what: str
    unit: str
    limit: str


class EncoderTask(Task):
    """A task that needs one forward pass for each row. Runs on every backend.

    auto_model: the transformers class that loads the model. output_names: the model outputs that it needs.
    """

    auto_model: ClassVar[str]
    output_names: ClassVar[tuple[str, ...]] = ("logits",)
    measure: ClassVar[Measure] = Measure("text", "characters", "max_characters")
    inputs: Inputs[Any]

    def kind(self, row: Any) -> int:
        """What all rows of a micro-batch must have in common: for models to which padding is not just padding."""
        return 0

    def keep(self, row: Any, outputs: Outputs) -> Outputs:
        """What `postprocess` needs of one row's outputs: the place to let go of large arrays early."""
        return outputs

    @abstractmethod
    def postprocess(self, parts: Sequence[Part], parameters: Any) -> Any:
        """The prediction for one input, as JSON values; `parts`: what became of the samples that `read` gave.

        Raises RequestError if there is none.
        """

    @staticmethod
    def agrees(expected: Any, found: Any) -> bool:
        """Whether two predictions for one input give one answer, whatever their scores: what int8 must not change.

        Both as JSON values. Of candidates with a score the first is the answer; where others were within `TIE` of it,
        they may take its place.
        """
        if isinstance(expected, dict):
            return EncoderTask.agrees([expected], [found])
        if expected and isinstance(expected[0], list):
            return len(expected) == len(found) and all(map(EncoderTask.agrees, expected, found))
        if not expected or not found:
            return bool(expected) == bool(found)
        scores = {_without_score(entry): float(entry["score"]) for entry in expected}
        lead = float(expected[0]["score"]) - scores.get(_without_score(found[0]), min(scores.values()))
        return lead <= TIE


class GenerativeTask(Task):
    """A task whose answer takes many passes. It owns its model, and runs on torch."""

    def size(self, sample: Any) -> int:
        """Characters of a text, 0 for anything else: what is rationed before any time is spent on a request."""
        return len(sample) if isinstance(sample, str) else 0

    @abstractmethod
    def generate(self, requests: Sequence[tuple[Sequence[Any], Any]]) -> list[Any]:
        """Answers inputs, each as (its samples, its parameters), in order.

        Returns an `Answer` or a RequestError for each.
        """


class StreamingTask(GenerativeTask):
    """A generative task that can hand out its answers piece by piece."""

    @abstractmethod
    def stream(
        self, requests: Sequence[tuple[Sequence[Any], Any]], streamed: Sequence[bool]
    ) -> Iterator[list[tuple[int, Any]]]:
        """Answers inputs as `generate` does, and yields at each step what there is to say, by place in `requests`.

        That is an `Answer` or a RequestError, once, for each input; for one that is `streamed` it is `Piece`s, up to
        the last, in place of the `Answer`.
        """

    def generate(self, requests: Sequence[tuple[Sequence[Any], Any]]) -> list[Any]:
        """See GenerativeTask."""
        found = dict(outcome for step in self.stream(requests, [False] * len(requests)) for outcome in step)
        return [found[index] for index in range(len(requests))]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a generative task gives for one input. tokens: of the input, whole; truncated: whether it was cut."""

    prediction: Any
    tokens: int = 0
    truncated: bool = False


def load(name: str) -> type[Task]:
    """The class of a registered task. Raises ValueError, naming the tasks there are, for another name."""
    if name not in REGISTRY:
        raise ValueError(f"task {name!r} is not one of: {', '.join(REGISTRY)}")
    module, _, attribute = REGISTRY[name].partition(":")
    task: type[Task] = getattr(import_module(module), attribute)
    return task


def largest_difference(expected: Mapping[Any, float], found: Mapping[Any, float]) -> float:
    """Largest difference of the scores under one key, NaN if one is; inf if the keys differ. For `Task.drift`."""
    if expected.keys() != found.keys():
        return float("inf")
    # Unlike max(), numpy's keeps a NaN wherever it stands.
    return float(np.max([abs(expected[key] - found[key]) for key in expected], initial=0.0))


def _without_score(entry: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What a candidate says, to compare it with another."""
    return tuple((name, value) for name, value in entry.items() if name != "score")
