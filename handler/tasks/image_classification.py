"""Image classification: one score per label for each PNG, JPEG, WebP or GIF."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from handler.explain import Target
from handler.inputs.images import ImageInputs
from handler.settings import Settings
from handler.tasks import Measure, Part
from handler.tasks.media_classification import MediaClassification
from handler.tasks.text_classification import label_targets


class ImageClassification(MediaClassification):
    """See `MediaClassification`; images are prepared as the model's `preprocessor_config.json` says."""

    auto_model: ClassVar[str] = "AutoModelForImageClassification"
    top_k: ClassVar[int | None] = 5
    measure: ClassVar[Measure] = Measure("image", "pixels", "max_pixels")
    inputs: ImageInputs

    def __init__(self, model_dir: Path, settings: Settings, config: Mapping[str, Any]) -> None:
        super().__init__(ImageInputs(model_dir, config), config)

    def targets(self, part: Part, prediction: list[dict[str, Any]], parameters: Any) -> list[Target]:
        """The logit of each label in the answer, highest score first."""
        return label_targets(self._labels, part, prediction)
