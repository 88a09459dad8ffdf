"""Audio classification: one score per label for each wav, flac or ogg file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from handler.inputs.sounds import SoundInputs, SoundRow
from handler.settings import Settings
from handler.tasks import Measure
from handler.tasks.media_classification import MediaClassification


class AudioClassification(MediaClassification):
    """See `MediaClassification`; sounds are prepared as the model's `preprocessor_config.json` says."""

    auto_model: ClassVar[str] = "AutoModelForAudioClassification"
    measure: ClassVar[Measure] = Measure("sound", "seconds", "max_seconds")
    inputs: SoundInputs

    def __init__(self, model_dir: Path, settings: Settings, config: Mapping[str, Any]) -> None:
        super().__init__(SoundInputs(model_dir, settings, config), config)

    def kind(self, row: SoundRow) -> int:
        """See `SoundInputs.kind`."""
        return self.inputs.kind(row)
