"""Bundles a VITS model for text to speech as it is: transformers can run these models and cannot train them.

`--from-scratch vits` gives one with random weights. It speaks noise, and is there to try the path with.
"""

import json
import string
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from transformers import VitsConfig, VitsModel, VitsTokenizer

from handler.tasks.text_to_speech import load_tokenizer
from training import models
from training.base_model import BaseModel
from training.errors import UserError
from training.options import Options
from training.tasks import Splits, TrainingTask

_PURPOSE = "a text-to-speech model"
_BLANK = "_"
_ALPHABET = f"{_BLANK} {string.ascii_lowercase}{string.digits}'-,.!?"
_MAX_LENGTH = 1024
_MAX_CHARACTERS = 2000  # of a request; English has some 15 a second
_MAX_SECONDS = 60.0
_SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "How much is it? Twelve, or thirteen!",
    "Yes.",
)
_SHOWN_CHARACTERS = 60


class TextToSpeech(TrainingTask):
    """A wav file for a text."""

    primary: ClassVar[str] = "rows"
    trains: ClassVar[bool] = False

    def __init__(self) -> None:
        self._characters = ""

    def read(self, options: Options, seed: int, base: BaseModel) -> Splits:
        """No data. Raises UserError if there are files, or there is no model."""
        if options.files():
            raise UserError(
                "--task text-to-speech: transformers cannot train VITS models; leave the data files out, and the model "
                "of --base-model is bundled as it is"
            )
        if options.base_model is None and base.spec is None:
            raise UserError(
                "text-to-speech needs --base-model, a folder or hub id of a VITS model; to try the path with random "
                "weights, give --from-scratch vits"
            )
        if options.overflow not in (None, "error"):
            raise UserError(f"--overflow {options.overflow}: text-to-speech speaks whole texts; it has only error")
        return Splits(None, None, None)

    def load(self, base: BaseModel, splits: Splits, options: Options) -> tuple[VitsModel, VitsTokenizer]:
        """A VITS model and its tokenizer."""
        if base.spec is None:
            with models.loading(base, _PURPOSE):
                model = VitsModel.from_pretrained(base.location, use_safetensors=True)
                tokenizer = load_tokenizer(Path(base.location))
        elif base.spec.model_type != "vits":
            raise UserError(f"--from-scratch {base.spec.model_type}: text-to-speech takes vits")
        else:
            tokenizer = _tokenizer_from_scratch()
            sizes = {**base.spec.sizes, "vocab_size": len(_ALPHABET), "pad_token_id": 0}
            model = VitsModel(VitsConfig(**sizes))
        # Of a tokenizer that writes phonemes, the characters are none that texts have.
        if not tokenizer.phonemize:
            self._characters = "".join(sorted(token for token in tokenizer.encoder if len(token) == 1))
        return model, tokenizer

    def settings(self, model: Any, processor: Any, options: Options) -> dict[str, Any]:
        """Limits of a text and of its sound."""
        return {
            "max_length": options.max_length or _MAX_LENGTH,
            "overflow": "error",
            "max_characters": _MAX_CHARACTERS,
            "max_seconds": _MAX_SECONDS,
        }

    def golden(self, examples: Sequence[Mapping[str, Any]], max_length: int, seed: int) -> list[dict[str, Any]]:
        """English sentences, one of them with parameters, and characters of the model's own language."""
        own = self._characters[:_SHOWN_CHARACTERS].strip()
        return [
            *({"inputs": sentence} for sentence in _SENTENCES),
            {"inputs": _SENTENCES[0], "parameters": {"seed": seed, "speaking_rate": 1.5}},
            *([{"inputs": own}] if own else []),
        ]


def _tokenizer_from_scratch() -> VitsTokenizer:
    """One token for each letter, digit and common sign."""
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder, "vocab.json")
        vocabulary.write_text(json.dumps({character: index for index, character in enumerate(_ALPHABET)}))
        return VitsTokenizer(str(vocabulary), pad_token=_BLANK, unk_token=_BLANK, language="eng", phonemize=False)
