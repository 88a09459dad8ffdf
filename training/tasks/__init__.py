"""Training tasks: how examples become features and what a good model is. One file per task, one line here."""

from types import ModuleType

from training.errors import UserError
from training.tasks import text_classification

REGISTRY: dict[str, ModuleType] = {"text-classification": text_classification}


def load(name: str) -> ModuleType:
    """The module of a task. Raises UserError, naming the tasks there are, for another name."""
    if name not in REGISTRY:
        raise UserError(f"--task {name}: choose one of {', '.join(REGISTRY)}")
    return REGISTRY[name]
