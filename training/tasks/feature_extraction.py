"""Bundles a model of embeddings as it is, with its own sentence-transformers settings."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import snapshot_download
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from handler.tasks.feature_extraction import SentenceSettings, settings_files
from training import models
from training.base_model import BaseModel
from training.errors import UserError
from training.options import Options
from training.tasks import Splits, TrainingTask

_PURPOSE = "a model of embeddings"
_USUAL_MAX_LENGTH = 256
_GOLDEN = (
    "A man is playing the guitar.",
    "Somebody makes music.",
    "The invoice is due on the first of March.",
    "",
    "?",
    "Ünïcödé, 漢字 and 🙂",
    "word " * 40,
)


class SentenceTokenizer:
    """A tokenizer that is saved together with the sentence-transformers settings of its model's `folder`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        self.tokenizer, self._folder = tokenizer, folder
        self.settings = SentenceSettings.load(folder)

    def save_pretrained(self, place: Path) -> None:
        """Writes the tokenizer and the files of the settings, if there are any."""
        self.tokenizer.save_pretrained(place)
        for name in settings_files(self._folder):
            (place / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(self._folder / name, place / name)


class FeatureExtraction(TrainingTask):
    """A model of embeddings, bundled as it is: nothing is trained, and there is nothing to measure."""

    primary: ClassVar[str] = "spearman"

    def read(self, options: Options, seed: int, base: BaseModel) -> Splits:
        """No data. Raises UserError if some is given, or there is no model."""
        check_untrained(options, base)
        if options.files():
            raise UserError(f"--task {options.task} has nothing to measure a model by; leave the data files out")
        return Splits(None, None, None)

    def load(self, base: BaseModel, splits: Splits, options: Options) -> tuple[PreTrainedModel, SentenceTokenizer]:
        """The encoder, and its tokenizer with the settings."""
        tokenizer = models.load_tokenizer(base, _PURPOSE)
        with models.loading(base, f"{_PURPOSE} that can be served"):
            folder = Path(base.location)
            if not folder.is_dir():
                folder = Path(snapshot_download(base.location, allow_patterns=["*.json"]))
            processor = SentenceTokenizer(tokenizer, folder)
        model = models.load(base, AutoModel, _PURPOSE)
        model.config.pad_token_id = tokenizer.pad_token_id
        return model, processor

    def settings(self, model: Any, processor: Any, options: Options) -> dict[str, Any]:
        """The length that the model's settings name, and the overflow policy."""
        own = processor.settings.max_length if processor.settings else None
        return models.text_settings(model, processor.tokenizer, options, own or _USUAL_MAX_LENGTH, "truncate")

    def golden(self, examples: Sequence[Mapping[str, Any]], max_length: int, seed: int) -> list[dict[str, Any]]:
        """Plain texts and odd ones."""
        return [{"inputs": text} for text in _GOLDEN]


def check_untrained(options: Options, base: BaseModel) -> None:
    """Raises UserError if a model of embeddings is to be trained, or there are no weights to bundle."""
    if options.train_file is not None:
        raise UserError(f"--task {options.task} bundles a model as it is; leave --train-file out")
    if base.spec is not None:
        raise UserError(f"--task {options.task} bundles a model as it is; name one with --base-model")
