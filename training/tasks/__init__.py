"""Training tasks: how examples become features, what a good model is. One file per task, one line in the registry."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar

from datasets import Dataset
from transformers import Trainer

from training.base_model import BaseModel
from training.care import Rows
from training.errors import UserError
from training.options import Options, TrainerOptions

REGISTRY = {
    "audio-classification": "training.tasks.audio_classification:AudioClassification",
    "automatic-speech-recognition": "training.tasks.speech_recognition:SpeechRecognition",
    "feature-extraction": "training.tasks.feature_extraction:FeatureExtraction",
    "fill-mask": "training.tasks.fill_mask:FillMask",
    "image-classification": "training.tasks.image_classification:ImageClassification",
    "question-answering": "training.tasks.question_answering:QuestionAnswering",
    "sentence-similarity": "training.tasks.sentence_similarity:SentenceSimilarity",
    "summarization": "training.tasks.summarization:Summarization",
    "text-classification": "training.tasks.text_classification:TextClassification",
    "text-generation": "training.tasks.text_generation:TextGeneration",
    "text-to-image": "training.tasks.text_to_image:TextToImage",
    "text-to-speech": "training.tasks.text_to_speech:TextToSpeech",
    "token-classification": "training.tasks.token_classification:TokenClassification",
    "translation": "training.tasks.translation:Translation",
    "zero-shot-classification": "training.tasks.zero_shot_classification:ZeroShotClassification",
}
_GOLDEN_EXAMPLES = 12


@dataclass(frozen=True, slots=True)
class Splits:
    """The data of a run, checked.

    train: None where an existing model is bundled as it is. labels: names in class order, empty if the task has none.
    skipped: rows left out by --skip-bad-rows. digests: SHA-256 (hex) of a split that is more than one file, by name.
    metrics, primary: those of the task (see TrainingTask), where they depend on the data.
    """

    train: Dataset | None
    validation: Dataset | None
    test: Dataset | None
    labels: list[str] = field(default_factory=list)
    skipped: int = 0
    digests: Mapping[str, str] = field(default_factory=dict)
    metrics: tuple[str, ...] | None = None
    primary: str | None = None

    def named(self) -> dict[str, Dataset]:
        """The splits that there are, by name."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: rows for name, rows in splits.items() if rows is not None}


class TrainingTask(ABC):
    """One task, from files to a trained model and its scores.

    A task that only bundles models as they are leaves out what follows `settings`, but for `golden`.

    metrics: what an epoch can be judged by besides "loss"; the first is the default, "loss" if there are none.
    primary: the key of `score`'s result that stands for the whole, higher is better, from 0 to 1.
    trains: whether its models can be trained; if not, a model from scratch keeps its random weights.
    """

    metrics: ClassVar[tuple[str, ...]] = ()
    primary: ClassVar[str]
    trains: ClassVar[bool] = True

    @abstractmethod
    def read(self, options: Options, seed: int, base: BaseModel) -> Splits:
        """Reads the files. Raises UserError for whatever in them would spoil the run."""

    def counts(self, rows: Dataset, labels: Sequence[str]) -> dict[str, int]:
        """Rows (or entities) per label, in label order; {} where that says nothing."""
        return {}

    def compared(self, rows: Dataset, labels: Sequence[str]) -> Rows:
        """Rows as `care` compares them; [] where they are no texts, or one text that is cut anywhere."""
        return []

    @abstractmethod
    def load(self, base: BaseModel, splits: Splits, options: Options) -> tuple[Any, Any]:
        """The model to train and its processor: a tokenizer, image processor or feature extractor; None if it has none.

        Both have `save_pretrained`. Raises UserError if the base model cannot be loaded for this task.
        """

    @abstractmethod
    def settings(self, model: Any, processor: Any, options: Options) -> dict[str, Any]:
        """Entries of the `handler:` section of model-config.yaml (see handler/settings.py), before training.

        Raises UserError for options that the model cannot meet.
        """

    def trainer(
        self,
        model: Any,
        processor: Any,
        splits: Splits,
        options: Options,
        arguments: TrainerOptions,
        settings: Mapping[str, Any],
    ) -> Trainer:
        """A Hugging Face Trainer over the splits: see training/trainer.py. Raises UserError if there is none."""
        raise UserError(f"--task {options.task} bundles a model as it is; leave --train-file out")

    def learned(
        self, trainer: Trainer, splits: Splits, options: Options, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Entries of the `handler:` section that come from the trained model, e.g. thresholds."""
        return {}

    def examples(self, rows: Dataset, labels: Sequence[str]) -> list[dict[str, Any]]:
        """Rows as what a client would send: `inputs`, perhaps `parameters`, and the `target` that `score` compares."""
        return []

    def golden(self, examples: Sequence[Mapping[str, Any]], max_length: int, seed: int) -> list[dict[str, Any]]:
        """Requests for the golden set, each `inputs` and perhaps `parameters`. Those that are refused are left out."""
        return [
            {key: value for key, value in example.items() if key != "target"} for example in examples[:_GOLDEN_EXAMPLES]
        ]

    def score(self, predictions: Sequence[Any], targets: Sequence[Any], labels: Sequence[str]) -> dict[str, Any]:
        """Metrics of the served model's predictions; `rows` and `primary` are among them."""
        return {"rows": len(predictions)}


def load(name: str) -> TrainingTask:
    """A task by its name. Raises UserError, naming the tasks there are, for another name."""
    if name not in REGISTRY:
        raise UserError(f"--task {name}: choose one of {', '.join(REGISTRY)}")
    module, _, attribute = REGISTRY[name].partition(":")
    task: TrainingTask = getattr(import_module(module), attribute)()
    return task
