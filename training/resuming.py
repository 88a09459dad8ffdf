"""What a run leaves beside its checkpoints, for the same command with --resume-from-checkpoint to go on from."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from handler.digests import sha256

if TYPE_CHECKING:
    from training.options import Options, TrainerOptions
    from training.tasks import Splits

# The files of training/search.py and training/folds.py in the folder of checkpoints.
SEARCH, FOLDS = "search.journal", "folds.json"
# What may differ between a run and the one that goes on with it.
_FREE = ("overwrite", "output_dir", "resume_from_checkpoint")


def wanted(arguments: "TrainerOptions") -> bool:
    """Whether the run goes on with an earlier one."""
    return (arguments.resume_from_checkpoint or "false").lower() != "false"


def other(path: Path) -> str:
    """What is wrong with a file whose signature is not that of the run."""
    return (
        f"{path}: this is of other data or settings; give the command as it was, or start anew without "
        "--resume-from-checkpoint"
    )


def signature(options: "Options", arguments: "TrainerOptions", splits: "Splits") -> str:
    """A digest (hex) of data and settings: results of runs that differ in it must not be mixed."""
    digests = {
        name: splits.digests.get(name) or sha256(path)
        for name, path in options.files().items()
        if name in splits.digests or path.is_file()
    }
    given = {**json.loads(arguments.to_json_string()), **vars(options)}  # type: ignore[no-untyped-call]
    facts = [digests, {name: value for name, value in given.items() if name not in _FREE}]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
