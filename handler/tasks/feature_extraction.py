"""Feature extraction: a vector for each text, made as the model's own sentence-transformers settings say.

A model without such settings gives one vector for each token, as the pipeline of transformers does.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding
from tokenizers.normalizers import Lowercase

from handler.errors import InvalidParameter, RequestError
from handler.inputs import Encoded
from handler.inputs.text import Text, TextInputs, read_text
from handler.parameters import CommonParameters, shown
from handler.settings import Settings
from handler.tasks import EncoderTask, Outputs, Part
from handler.tasks.text_classification import finite

MODULES_FILE = "modules.json"
ENCODER_FILE = "sentence_bert_config.json"
MODEL_FILE = "config_sentence_transformers.json"

# Poolings by the flags of older settings, in the order in which several are joined.
_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# The least cosine of two vectors for one text that stand for the same.
_SAME_DIRECTION = 0.97
_MODULES = ("Transformer", "Pooling", "Normalize")
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")


@dataclass(frozen=True, slots=True, kw_only=True)
class SentenceSettings:
    """How a sentence-transformers model makes one vector of the vectors of a text's tokens.

    poolings: joined in this order. normalize: whether to unit length. prompts: texts to put in front of an input, by
    name. default_prompt: the name of the one that is used unless a request names another. similarity: how vectors are
    compared. max_length: tokens of one text, None where the model does not say.
    """

    poolings: tuple[str, ...] = ("mean",)
    normalize: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    lower_case: bool = False
    similarity: str = "cosine"
    max_length: int | None = None

    @classmethod
    def load(cls, model_dir: Path) -> "SentenceSettings | None":
        """Reads `modules.json` and the files that go with it; None if there is none.

        Raises ValueError, naming the file, if one is broken or asks for what is not known here.
        """
        path = model_dir / MODULES_FILE
        if not path.exists():
            return None
        modules = _read(path, list)
        try:
            names = [str(module["type"]).rpartition(".")[2] for module in modules]
            folders = [str(module["path"]) for module in modules]
        except (TypeError, KeyError):
            raise ValueError(f"{path}: a module has no type or no path") from None
        if len(names) < 2 or tuple(names) != _MODULES[: len(names)]:
            raise ValueError(
                f"{path}: a model of {', '.join(names) or 'no modules'} cannot be served; "
                "only one of Transformer, Pooling and, if need be, Normalize can"
            )
        if folders[0]:
            raise ValueError(
                f"{path}: the encoder lies in {folders[0]}; move its files up beside this one and make its path empty"
            )
        encoder = _read(model_dir / ENCODER_FILE, dict) if (model_dir / ENCODER_FILE).exists() else {}
        model = _read(model_dir / MODEL_FILE, dict) if (model_dir / MODEL_FILE).exists() else {}
        similarity, default_prompt = model.get("similarity_fn_name") or "cosine", model.get("default_prompt_name")
        if similarity not in SIMILARITIES:
            raise ValueError(f"{MODEL_FILE}: similarity_fn_name {similarity!r} is not one of {', '.join(SIMILARITIES)}")
        prompts = {name: text for name, text in (model.get("prompts") or {}).items() if text is not None}
        if default_prompt is not None and default_prompt not in prompts:
            raise ValueError(f"{MODEL_FILE}: default_prompt_name {default_prompt!r} is not among its prompts")
        return cls(
            poolings=_poolings(model_dir / folders[1] / "config.json"),
            normalize=len(names) == len(_MODULES),
            prompts=prompts,
            default_prompt=default_prompt,
            lower_case=bool(encoder.get("do_lower_case")),
            similarity=similarity,
            max_length=encoder.get("max_seq_length"),
        )


def settings_files(model_dir: Path) -> list[str]:
    """Names of the files that `SentenceSettings.load` reads, relative to the model's folder; those that there are."""
    if not (model_dir / MODULES_FILE).exists():
        return []
    folders = [str(module.get("path")) for module in _read(model_dir / MODULES_FILE, list)]
    names = [MODULES_FILE, ENCODER_FILE, MODEL_FILE, *(f"{folder}/config.json" for folder in folders if folder)]
    return [name for name in names if (model_dir / name).is_file()]


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureExtractionParameters(CommonParameters):
    """normalize: to unit length or not, instead of what the model's settings say. prompt_name: one of the model's.

    truncate: the Inference API's name for the policy: true is "overflow": "truncate", false is "error".
    truncation_direction: the end of a long text that is cut off.
    """

    normalize: bool | None = None
    prompt_name: str | None = None
    truncate: bool | None = None
    truncation_direction: Literal["left", "right"] | None = None

    def __post_init__(self) -> None:
        """Raises InvalidParameter for two policies that contradict each other."""
        if self.truncate is None:
            return
        policy = "truncate" if self.truncate else "error"
        if self.overflow not in (None, policy):
            raise InvalidParameter('"truncate" and "overflow" contradict each other; send one of them')
        object.__setattr__(self, "overflow", policy)


class FromEnd(str):
    """A text of which the end is kept where it is too long."""

    __slots__ = ()


class SentenceInputs(TextInputs):
    """Texts of which the end is cut off where they are too long, or the beginning of a `FromEnd`."""

    _direction = "right"

    def encode(self, samples: Sequence[Text]) -> list[Encoded | RequestError]:
        """Encodes all samples, in one tokenizer call for each direction among them."""
        encoded: dict[int, Encoded | RequestError] = {}
        for direction, kind in (("right", False), ("left", True)):
            indices = [index for index, sample in enumerate(samples) if isinstance(sample, FromEnd) is kind]
            if indices:
                self._direction = direction
                self._truncate()
                encoded.update(zip(indices, super().encode([samples[index] for index in indices]), strict=True))
        return [encoded[index] for index in range(len(samples))]

    def _truncate(self) -> None:
        self.tokenizer.enable_truncation(self._max_length, stride=self._stride, direction=self._direction)


class Embedder(EncoderTask):
    """Texts to vectors: what feature extraction and sentence similarity share.

    sentences: the model's sentence-transformers settings, None if it has none.
    """

    auto_model: ClassVar[str] = "AutoModel"
    output_names: ClassVar[tuple[str, ...]] = ("last_hidden_state",)
    sentences: SentenceSettings | None

    def __init__(self, model_dir: Path, settings: Settings, config: Mapping[str, Any]) -> None:
        if config.get("is_encoder_decoder"):
            raise ValueError("the model has a decoder; texts are embedded by models of an encoder alone")
        self.inputs = SentenceInputs(model_dir, config, settings.max_length, settings.stride)
        self.sentences = SentenceSettings.load(model_dir)

    def prompted(self, text: str, prompt_name: str | None = None) -> str:
        """A text as it goes to the tokenizer. Raises InvalidParameter for a prompt that the model does not have."""
        prompts = self.sentences.prompts if self.sentences else {}
        if prompt_name is not None and prompt_name not in prompts:
            names = ", ".join(map(shown, sorted(prompts)))
            raise InvalidParameter(
                f"unknown prompt_name {shown(prompt_name)}; "
                + (f"this model has: {names}" if prompts else "this model has no prompts")
            )
        if self.sentences is None:
            return text
        name = prompt_name or self.sentences.default_prompt
        text = (prompts[name] if name is not None else "") + text
        return Lowercase().normalize_str(text) if self.sentences.lower_case else text

    def keep(self, row: Encoding, outputs: Outputs) -> Outputs:
        """One vector for the row, float32 [size]; without settings one for each of its tokens, [tokens, size]."""
        tokens = outputs["last_hidden_state"][: len(row)]
        return {"vectors": pool(tokens, self.sentences.poolings) if self.sentences else tokens.copy()}

    @staticmethod
    def drift(expected: Any, found: Any) -> float:
        """Largest difference of a number; inf if the shapes differ."""
        before, after = np.array(expected, dtype=np.float64), np.array(found, dtype=np.float64)
        return float(np.max(np.abs(before - after), initial=0.0)) if before.shape == after.shape else float("inf")


class FeatureExtraction(Embedder):
    """One vector [size] for a text; of a model without sentence-transformers settings [1, tokens, size]."""

    Parameters: ClassVar[type[CommonParameters]] = FeatureExtractionParameters

    def __init__(self, model_dir: Path, settings: Settings, config: Mapping[str, Any]) -> None:
        super().__init__(model_dir, settings, config)
        self._stride = settings.stride

    def read(self, value: Any, parameters: Any) -> Sequence[str]:
        """A string, with the prompt in front."""
        text = self.prompted(read_text(value), parameters.prompt_name)
        return [FromEnd(text) if parameters.truncation_direction == "left" else text]

    def postprocess(self, parts: Sequence[Part], parameters: Any) -> list[Any]:
        """Vectors of a long text's windows become one vector, or the vectors of all its tokens."""
        [part] = parts
        normalize = parameters.normalize
        if self.sentences is None:
            vectors = finite(token_vectors(part, self._stride))
            return [(normalized(vectors) if normalize else vectors).tolist()]
        vector = mean_vector(part)
        unit = self.sentences.normalize if normalize is None else normalize
        return (normalized(vector) if unit else vector).tolist()  # type: ignore[no-any-return]

    @staticmethod
    def agrees(expected: Any, found: Any) -> bool:
        """Whether all vectors point almost the same way."""
        before, after = np.array(expected, dtype=np.float64), np.array(found, dtype=np.float64)
        if before.shape != after.shape:
            return False
        return bool((np.sum(normalized(before) * normalized(after), axis=-1) >= _SAME_DIRECTION).all())


def pool(tokens: NDArray[np.float32], poolings: Sequence[str]) -> NDArray[np.float32]:
    """The vectors of a text's tokens, [tokens, size], as one: float32 [size of one × poolings]."""
    weights = np.arange(1, len(tokens) + 1, dtype=np.float32)
    pooled = {
        "cls": lambda: tokens[0],
        "max": lambda: tokens.max(axis=0),
        "mean": lambda: tokens.mean(axis=0),
        "mean_sqrt_len_tokens": lambda: tokens.sum(axis=0) / np.sqrt(np.float32(len(tokens))),
        "weightedmean": lambda: weights @ tokens / weights.sum(),
        "lasttoken": lambda: tokens[-1],
    }
    return np.concatenate([pooled[name]() for name in poolings])


def mean_vector(part: Part) -> NDArray[np.float64]:
    """Mean of the vectors of a text's windows, each with the weight of its tokens.

    Raises InternalError if a number of it is not finite.
    """
    vectors = [output["vectors"] for output in part.outputs]
    return finite(vectors[0] if len(vectors) == 1 else part.weights @ np.stack(vectors))


def token_vectors(part: Part, stride: int) -> NDArray[np.float32]:
    """One vector for each token of a text, [tokens, size], special tokens only at its two ends.

    A token in two windows, which share `stride` tokens, has its vector from the one in which it is farther inside.
    """
    # Windows are counted from the end of the text where that was to be kept.
    windows = sorted(zip(part.rows, part.outputs, strict=True), key=lambda window: _content(window[0])[1])
    pieces = []
    for index, (row, output) in enumerate(windows):
        first, _, after = _content(row)
        start = first + (stride + 1) // 2 if index > 0 else 0
        stop = after - stride // 2 if index < len(windows) - 1 else len(row)
        pieces.append(output["vectors"][start:stop])
    return np.concatenate(pieces)


def normalized(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Vectors [..., size] at unit length; one of length 0 stays what it is."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12))


def _content(row: Encoding) -> tuple[int, int, int]:
    """Of a row's tokens that are not special: the first's position, its place in the text, the position after all."""
    special = row.special_tokens_mask
    first = special.index(0) if 0 in special else 0
    after = len(row) - (special[::-1].index(0) if 0 in special else 0)
    return first, row.offsets[first][0], after


def _read(path: Path, kind: type) -> Any:
    """A JSON file. Raises ValueError, naming it, if it cannot be read or its value is of another kind."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path} must hold a JSON {'list' if kind is list else 'object'}")
    return value


def _poolings(path: Path) -> tuple[str, ...]:
    """The poolings of a Pooling module's `config.json`."""
    config = _read(path, dict)
    named = config.get("pooling_mode") or [name for flag, name in _POOLINGS.items() if config.get(flag)] or "mean"
    poolings = (named,) if isinstance(named, str) else tuple(named)
    if unknown := [name for name in poolings if name not in _POOLINGS.values()]:
        raise ValueError(f"{path}: unknown pooling {unknown[0]!r}; known: {', '.join(_POOLINGS.values())}")
    if not config.get("include_prompt", True):
        raise ValueError(f"{path}: a pooling that leaves out the prompt (include_prompt: false) cannot be served")
    return poolings
