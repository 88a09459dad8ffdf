"""The `handler:` section of `model-config.yaml`: how one archive behaves."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import yaml

from handler import cpus
from handler.parameters import Overflow


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the engine runs one model.

    task: name in the task registry, e.g. "text-classification".
    backend: "torch" or "openvino"; precision: "fp32", "bf16", with OpenVINO "int8", with torch on a GPU "fp16".
    device: where torch runs: "cpu", "cuda", or "auto", which is a GPU where there is one.
    compile: whether the torch backend runs through torch.compile.
    max_length: tokens of one sequence, special tokens included.
    stride: tokens that neighbouring windows of one long text share.
    overflow: policy for longer texts where a request names none.
    max_windows: a text that needs more is refused (413).
    max_inputs: inputs of one request; more are refused (413).
    max_characters: a text, or all texts of a request, with more are refused (413) before any time is spent on them.
    max_pixels: an image, or all images of a request, that have more are refused (413) before they are decoded.
    max_seconds: a sound, or all sounds of a request, that last longer are refused (413).
    max_tokens: tokens of one request that may go through the model, windows counted apart; more are refused (413).
    max_explanation_tokens: tokens that may go through the model to explain one input; where all its words would take
    more, they are explained in runs of several.
    max_new_tokens: tokens that one answer of a generative task may have; a request for more is refused (422).
    max_inference_steps: denoising steps of one image; a request for more is refused (422).
    max_generation_seconds: a generated answer that is not there by then, and is not streamed, is given up (503);
    stays below TorchServe's `responseTimeout`.
    token_budget: tokens of one micro-batch, padding included.
    max_response_bytes: a longer answer is refused (413); stays below TorchServe's `max_response_size`.
    threads: intra-op threads; None takes this worker's share of the CPUs that the process really has.
    streams: micro-batches that OpenVINO runs at the same time, each on its share of the threads; None: one a thread.
    golden_tolerance: how far a golden score may drift before the worker refuses to start.
    options: what only this task knows, e.g. thresholds; see the task's own file.
    """

    task: str
    backend: str = "torch"
    precision: str = "fp32"
    device: str = "auto"
    compile: bool = False
    max_length: int = 512
    stride: int = 32
    overflow: Overflow = "truncate"
    max_windows: int = 64
    max_inputs: int = 1024
    max_characters: int = 1_000_000
    max_pixels: int = 50_000_000
    max_seconds: float = 600.0
    max_tokens: int = 32_768
    max_explanation_tokens: int = 16_384
    max_new_tokens: int = 512
    max_inference_steps: int = 100
    max_generation_seconds: float = 45.0
    token_budget: int = 512
    max_response_bytes: int = 6_000_000
    threads: int | None = None
    streams: int | None = None
    golden_tolerance: float = 1e-3
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, model_dir: Path) -> "Settings":
        """Reads `model_dir/model-config.yaml`.

        Raises ValueError, naming the file and the key, if the section is missing or has a key that is not a setting.
        """
        path = model_dir / "model-config.yaml"
        try:
            document: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{path} is missing: is {model_dir} a bundle written by train.py?") from None
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from None
        section = document.get("handler") if isinstance(document, dict) else None
        if not isinstance(section, dict):
            raise ValueError(f"{path} has no `handler:` section")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(section) - known):
            raise ValueError(f"{path}: unknown handler settings {unknown}; known: {sorted(known)}")
        workers = document.get("maxWorkers") or document.get("minWorkers")
        if isinstance(workers, int) and workers > 1 and section.get("threads") is None:
            section = {**section, "threads": max(1, cpus.available() // workers)}
        try:
            settings = cls(**section)
        except TypeError as error:
            raise ValueError(f"{path}: {error}") from None
        if settings.overflow not in get_args(Overflow):
            raise ValueError(f"{path}: overflow {settings.overflow!r} is not one of {', '.join(get_args(Overflow))}")
        if settings.stride >= settings.max_length // 2:
            raise ValueError(f"{path}: stride {settings.stride} must be below half of max_length {settings.max_length}")
        if not isinstance(settings.options, dict):
            raise ValueError(f"{path}: options must be a mapping")
        return settings

    def cpu_threads(self) -> int:
        """Intra-op threads to run on."""
        return self.threads or cpus.available()
