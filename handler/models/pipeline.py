"""A folder of the diffusers library, `model_index.json` and a folder for each component, loaded without its code.

Nothing in such a folder may run: weights are safetensors, and all classes are those of diffusers and transformers.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray

from handler.backends.torch import DTYPES, device
from handler.settings import Settings

INDEX = "model_index.json"
_STEPS = "num_inference_steps"
_PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
# Components that belong to one pipeline alone, such as a safety checker, are named by its folder.
_PIPELINES = Path(str(diffusers.__file__)).parent / "pipelines"


class Pipeline:
    """A loaded pipeline that makes an image from a text or from the name of a class.

    labels: class index by name, empty for a pipeline that takes any text. parameters: names of those that it takes.
    Raises ValueError if `check` does.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.labels = check(folder)
        torch.set_num_threads(settings.cpu_threads())
        # Its warnings quote prompts.
        diffusers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.disable_progress_bar()
        self._pipeline: Any = DiffusionPipeline.from_pretrained(
            folder,
            dtype=DTYPES[settings.precision],
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        self._pipeline.to(device(settings.device))
        self._pipeline.set_progress_bar_config(disable=True)
        taken = inspect.signature(self._pipeline.__call__).parameters
        self.parameters = frozenset(taken)
        self._usual: dict[str, Any] = {}
        if _STEPS in taken:
            self._usual[_STEPS] = min(taken[_STEPS].default, settings.max_inference_steps)

    def tokens(self, prompt: str) -> tuple[int, int | None]:
        """How many tokens a prompt has, and how many the pipeline looks at; None: all of them."""
        tokenizer = getattr(self._pipeline, "tokenizer", None)
        if tokenizer is None:
            return 0, None
        return len(tokenizer(prompt, verbose=False)["input_ids"]), tokenizer.model_max_length

    def paint(self, prompt: str, seed: int, **parameters: Any) -> NDArray[np.float32] | None:
        """Pixels float32 [height, width, channels], 0 to 1; None if the pipeline's own safety checker withholds them.

        Raises ValueError for parameters that the pipeline refuses.
        """
        inputs: dict[str, Any] = {"class_labels": [self.labels[prompt]]} if self.labels else {"prompt": prompt}
        found = self._pipeline(
            **inputs, **self._usual | parameters, generator=torch.Generator().manual_seed(seed), output_type="np"
        )
        if any(getattr(found, "nsfw_content_detected", None) or ()):
            return None
        pixels: NDArray[np.float32] = found.images[0]
        return pixels


def check(folder: Path) -> dict[str, int]:
    """The classes that a pipeline makes images of, by name; none if it makes images of any text.

    Raises ValueError, saying what to mend, if a folder is no such pipeline, or anything in it could run as code.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        kind, classes = index["_class_name"], {int(key): str(name) for key, name in index.get("id2label", {}).items()}
        libraries = {name: entry[0] for name, entry in index.items() if isinstance(entry, list)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): is this a folder that diffusers saved?") from None
    known = getattr(diffusers, kind, None) if isinstance(kind, str) else None
    if not (isinstance(known, type) and issubclass(known, DiffusionPipeline)):
        raise ValueError(f"{path}: {kind} is no pipeline of the installed diffusers, and no other code is run")
    for name, library in libraries.items():
        own = str(library).isidentifier() and (_PIPELINES / str(library)).is_dir()
        if library not in (None, "diffusers", "transformers") and not own:
            raise ValueError(f"{path}: {name} comes from {library}; only diffusers and transformers are used")
    # In the folder itself there may be what serves the model; diffusers looks for code where it looks for components.
    for file in sorted(path for name in libraries for path in (folder / name).rglob("*")):
        if file.suffix == ".py":
            raise ValueError(f"{file}: code in a model's folder is not run; remove it, if the pipeline works without")
    for file in sorted(folder.rglob("*")):
        if file.suffix in _PICKLES:
            raise ValueError(
                f"{file}: pickled weights are not loaded; load the pipeline once with diffusers and save it with "
                "safe_serialization=True"
            )
    taken = inspect.signature(known.__call__).parameters
    if "prompt" in taken:
        return {}
    if "class_labels" not in taken:
        raise ValueError(f"{path}: {kind} makes images neither of texts nor of classes")
    if not classes:
        raise ValueError(f'{path}: the classes have no names; add them as "id2label": {{"0": "name", …}}')
    # A class may have several names, separated by commas.
    return {name.strip(): index for index, names in sorted(classes.items()) for name in names.split(",")}
