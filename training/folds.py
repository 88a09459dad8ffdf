"""--folds K: cross-validation, which says how good such a model is, and how sure that is, where there are few rows.

The rows of the training file are divided into K parts. K models are trained, each without one of them and with a seed
of its own, and measured on it as they would be served.
"""

import json
import os
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import ClassLabel, Dataset, concatenate_datasets
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold, KFold, StratifiedKFold

from handler.engine import Engine
from training import bundle, defaults, evaluation, resuming, tasks
from training.base_model import BaseModel
from training.errors import UserError
from training.interrupts import end_if_interrupted, remembered
from training.options import Options, TrainerOptions
from training.progress import Progress, Steps
from training.tasks import Splits, TrainingTask

# Rows that have the same value here, questions about one text, must not be on both sides.
_GROUP = "context"


def check(options: Options) -> None:
    """Raises UserError for --folds that cannot be."""
    if options.folds is None:
        return
    if options.folds < 2:
        raise UserError(f"--folds {options.folds}: give 2 or more, e.g. 5")
    if options.train_file is None:
        raise UserError("--folds needs a --train-file: its rows are what is divided")
    if not tasks.load(options.task).trains:
        raise UserError(f"--folds: --task {options.task} bundles a model as it is; leave it out")


def run(
    task: TrainingTask,
    base: BaseModel,
    splits: Splits,
    options: Options,
    arguments: TrainerOptions,
    speak: Callable[..., None],
) -> dict[str, Any]:
    """What metrics.json holds of the folds, {} without --folds.

    Raises UserError if there are too few rows, or if the folds to go on with were made with other data or settings.
    """
    if options.folds is None or splits.train is None:
        return {}
    defaults.fill_epochs(arguments, len(splits.train))
    own = splits.validation is not None and options.validation_file is None
    rows = concatenate_datasets([splits.train, splits.validation]) if own else splits.train
    _check_rows(rows, options.folds)
    place = Path(str(arguments.output_dir)) / resuming.FOLDS
    signature = resuming.signature(options, arguments, splits)
    found = _earlier(place, signature, arguments)
    speak(f"folds: {len(found)} of {options.folds} are done" if found else f"folds: {options.folds} trainings")
    for number, part in enumerate(_parts(rows, options.folds, arguments.seed), start=1):
        if number <= len(found):
            continue
        train, held = _divided(rows, part)
        mine = replace(splits, train=train, test=None)
        if own:
            # The best epoch must not be chosen by the rows that the model is measured on.
            train, validation = _divided(train, _for_validation(train, options, arguments.seed))
            mine = replace(mine, train=train, validation=validation)
        found.append(_measure(task, base, mine, held, options, arguments, number))
        if arguments.process_index == 0:
            _write(place, {"signature": signature, "folds": found})
            speak(f"  fold {number} of {options.folds}: {_told(found[-1]['metrics'])} ({len(held)} rows)")
    transformers.set_seed(arguments.seed)
    if arguments.process_index > 0:
        return {}
    values = {name: [fold["metrics"][name] for fold in found] for name in found[0]["metrics"]}
    means = {name: float(np.mean(some)) for name, some in values.items()}
    deviations = {name: float(np.std(some, ddof=1)) for name, some in values.items()}
    speak(f"{options.folds} folds: {_told(means, deviations)}")
    return {"folds": {"each": found, "mean": means, "deviation": deviations}}


def _check_rows(rows: Dataset, count: int) -> None:
    """Raises UserError if there are too few rows, or too few of a label, for so many folds."""
    what, most = ("contexts", _limit(rows)) if _GROUP in rows.column_names else ("rows", len(rows))
    if most < count:
        raise UserError(f"--folds {count}: there are only {most} {what} to divide; give fewer folds or more data")
    if isinstance(label := rows.features.get("label"), ClassLabel):
        rare, least = min(Counter(rows["label"][:]).items(), key=lambda entry: entry[1])
        if least < count:
            raise UserError(
                f"--folds {count}: the label {label.names[rare]!r} has only {least} rows; give fewer folds, add rows, "
                "or leave the label out"
            )


def _limit(rows: Dataset) -> int:
    """Into how many parts rows can be divided at most."""
    if _GROUP in rows.column_names:
        return len(set(rows[_GROUP]))
    if isinstance(rows.features.get("label"), ClassLabel):
        return max(Counter(rows["label"][:]).values())
    return len(rows)


def _parts(rows: Dataset, count: int, seed: int) -> list[NDArray[np.int64]]:
    """The places of the rows of each part: at random, with equal shares of single labels."""
    splitter, kinds = KFold(count, shuffle=True, random_state=seed), None
    if _GROUP in rows.column_names:
        splitter, kinds = GroupKFold(count, shuffle=True, random_state=seed), rows[_GROUP][:]
    elif isinstance(rows.features.get("label"), ClassLabel):
        splitter, kinds = StratifiedKFold(count, shuffle=True, random_state=seed), rows["label"][:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a label that not all parts can have
        return [part for _, part in splitter.split(np.arange(len(rows)), kinds, kinds)]


def _divided(rows: Dataset, part: NDArray[np.int64]) -> tuple[Dataset, Dataset]:
    """The other rows, and those of the part."""
    return rows.select(np.setdiff1d(np.arange(len(rows)), part)), rows.select(part)


def _for_validation(rows: Dataset, options: Options, seed: int) -> NDArray[np.int64]:
    """Places of rows to choose the best epoch by."""
    count = min(max(2, round(1 / options.validation_share)), _limit(rows))
    if count < 2:
        raise UserError(
            f"--folds {options.folds}: {len(rows)} rows are too few to take some for validation; "
            "give a --validation-file"
        )
    return _parts(rows, count, seed)[0]


def _measure(
    task: TrainingTask,
    base: BaseModel,
    splits: Splits,
    held: Dataset,
    options: Options,
    arguments: TrainerOptions,
    number: int,
) -> dict[str, Any]:
    """Trains a model for a fold and measures it as it would be served; of several processes the first has `metrics`."""
    started, threads = time.monotonic(), torch.get_num_threads()
    folder = Path(str(arguments.output_dir)) / f"fold-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    mine = copy(arguments)
    mine.seed, mine.output_dir = arguments.seed + number, str(folder)
    transformers.set_seed(mine.seed)
    if arguments.process_index > 0:
        transformers.logging.set_verbosity_error()  # which the Trainer of the fold before has undone
    model, processor = task.load(base, splits, options)
    settings = task.settings(model, processor, options)
    trainer = task.trainer(model, processor, splits, options, mine, settings)
    trainer.remove_callback(Progress)
    trainer.add_callback(Steps())
    with remembered(at_once=False):
        trainer.train()
    end_if_interrupted()
    settings |= task.learned(trainer, splits, options, settings)
    trainer.accelerator.wait_for_everyone()
    found: dict[str, Any] = {"seed": mine.seed, "rows": len(held), "metrics": {}}
    if arguments.process_index == 0:
        place = folder / "model"
        bundle.write_model(place, trainer.model, processor)
        bundle.write_model_config(place, options.task, settings)
        engine = Engine(place, threads=threads)
        scores = evaluation.measure(engine, task, task.examples(held, splits.labels), splits.labels)
        found["metrics"] = {name: value for name, value in scores.items() if isinstance(value, float)}
        shutil.rmtree(folder)
    return found | {"seconds": round(time.monotonic() - started, 1)}


def _earlier(place: Path, signature: str, arguments: TrainerOptions) -> list[dict[str, Any]]:
    """The folds of the run that this one goes on with. Raises UserError if they are of other data or settings."""
    if not resuming.wanted(arguments) or not place.exists():
        return []
    state = json.loads(place.read_text(encoding="utf-8"))
    if state["signature"] != signature:
        raise UserError(resuming.other(place))
    return list(state["folds"])


def _write(place: Path, state: Mapping[str, Any]) -> None:
    """Replaces the file at once: a kill leaves the old one or the new one."""
    place.parent.mkdir(parents=True, exist_ok=True)
    new = place.with_name(f"{place.name}.new")
    new.write_text(json.dumps(state), encoding="utf-8")
    os.replace(new, place)


def _told(values: Mapping[str, float], deviations: Mapping[str, float] | None = None) -> str:
    """Metrics as people read them, with their standard deviation if there is one."""
    spread = {name: f" ± {value:.4f}" for name, value in (deviations or {}).items()}
    return ", ".join(f"{name.replace('_', '-')} {value:.4f}{spread.get(name, '')}" for name, value in values.items())
