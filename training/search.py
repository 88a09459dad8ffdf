"""--search N: tries learning rates, numbers of epochs and batch sizes, and keeps those that do best on validation.

The Trainer's own hook and Optuna do it. Each trial trains a fresh model and leaves a line in a journal beside the
checkpoints, so that a run which was killed goes on with the trials that are missing.
"""

import math
from collections.abc import Callable, Mapping
from copy import copy
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import transformers
from transformers import Trainer
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from training import defaults, resuming, tasks
from training.base_model import BaseModel
from training.errors import UserError
from training.interrupts import end_if_interrupted, remembered
from training.options import Options, TrainerOptions
from training.progress import Progress, Steps
from training.tasks import Splits, TrainingTask
from training.trainer import prepare

if TYPE_CHECKING:
    import optuna
    from optuna.storages.journal import JournalStorage

_RATE, _EPOCHS, _BATCH = "learning_rate", "num_train_epochs", "per_device_train_batch_size"
# The learning rate is searched from its default divided by this to its default times this.
_FACTOR = 5.0
_BATCHES = (16, 32, 64)
# Trials at random, the first one with the defaults, before the sampler follows those that did well.
_RANDOM = 5
# The share of the default training after which a trial may be ended for being worse than the median.
_SPARED = 1 / 3


def check(options: Options, arguments: TrainerOptions) -> None:
    """Raises UserError for a --search that cannot be."""
    if options.search is None:
        return
    if options.search < 1:
        raise UserError(f"--search {options.search}: give the number of trials, e.g. 12")
    if options.train_file is None:
        raise UserError("--search needs a --train-file: each trial trains a model")
    if not tasks.load(options.task).trains:
        raise UserError(f"--search: --task {options.task} bundles a model as it is; leave it out")
    if arguments.world_size > 1:
        raise UserError(
            "--search runs in one process; leave torchrun out, and give it the values that were found, "
            "which the line `chosen:` says"
        )
    if arguments.eval_strategy == IntervalStrategy.NO:
        raise UserError("--search chooses by what is measured on validation; leave --eval-strategy no out")
    if not _searched(arguments):
        raise UserError(
            "--search: nothing is left to search; leave out --learning-rate, --num-train-epochs (or --max-steps), or "
            "--per-device-train-batch-size"
        )


def run(
    task: TrainingTask,
    base: BaseModel,
    splits: Splits,
    options: Options,
    arguments: TrainerOptions,
    speak: Callable[..., None],
) -> dict[str, Any]:
    """Sets the best values in `arguments`; returns what metrics.json holds of the trials, {} without --search.

    Raises UserError if no trial comes to an end, or if those to go on with were made with other data or settings.
    """
    if options.search is None or splits.train is None:
        return {}
    import optuna  # here, as it takes a second

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    defaults.fill_epochs(arguments, len(splits.train))
    names, metric = _searched(arguments), str(arguments.metric_for_best_model)
    suggest = partial(_suggest, arguments=copy(arguments), names=names)
    trainer, pruner = _trainer(task, base, splits, options, arguments), _pruner(arguments, len(splits.train))
    storage = _storage(arguments)
    study = _study(storage, resuming.signature(options, arguments, splits), arguments)
    if done := _done(study):
        speak(f"search: {len(done)} of {options.search} trials are done")
    else:
        speak(f"search: {options.search} trials for the best {metric} on validation")
        if not study.get_trials(states=[optuna.trial.TrialState.WAITING]):
            study.enqueue_trial({name: getattr(arguments, name) for name in names})
    while len(done := _done(study)) < options.search:
        number = len(done)
        try:
            with remembered(at_once=False):
                trainer.hyperparameter_search(
                    hp_space=suggest,
                    compute_objective=partial(_objective, trainer, arguments),
                    n_trials=1,
                    direction=study.direction.name.lower(),
                    backend="optuna",
                    study_name=study.study_name,
                    storage=storage,
                    load_if_exists=True,
                    # A sampler for each trial: what it draws does not depend on where a run was killed.
                    sampler=optuna.samplers.TPESampler(seed=arguments.seed + number, n_startup_trials=_RANDOM),
                    pruner=pruner,
                )
        except UserError as error:
            # Only the learning of these values has failed. A trial that was interrupted is not noted, and made again.
            study.set_user_attr(str(len(study.trials) - 1), str(error))
        end_if_interrupted()
        speak(f"  trial {number + 1} of {options.search}: {_told(study, _done(study)[-1], metric)}")
    trials = [_row(trial) for trial in _done(study)]
    if not any(trial["state"] == "complete" for trial in trials):
        raise UserError(f"--search: none of {len(trials)} trials came to an end; the last: {_why(study, done[-1])}")
    for name, value in _rounded(study.best_params).items():
        setattr(arguments, name, type(getattr(arguments, name))(value))
        arguments.reasons[name] = f"best of {len(trials)} trials by {metric}"
    transformers.set_seed(arguments.seed)
    return {"search": trials, "search_metric": metric}


def _searched(arguments: TrainerOptions) -> list[str]:
    """The settings that are searched: those that were not given."""
    given = {
        _RATE: _RATE not in arguments.reasons,
        _EPOCHS: arguments.max_steps > 0
        or (arguments.num_train_epochs is not None and _EPOCHS not in arguments.reasons),
        _BATCH: _BATCH not in arguments.reasons,
    }
    return [name for name, asked in given.items() if not asked]


def _suggest(trial: "optuna.Trial", arguments: TrainerOptions, names: list[str]) -> dict[str, Any]:
    """The values of a trial. arguments: with the defaults that they are searched around."""
    found: dict[str, Any] = {}
    if _RATE in names:
        usual = float(arguments.learning_rate or 0)
        found[_RATE] = trial.suggest_float(_RATE, usual / _FACTOR, usual * _FACTOR, log=True)
    if _EPOCHS in names:
        found[_EPOCHS] = trial.suggest_int(_EPOCHS, 1, int(arguments.num_train_epochs or 1))
    if _BATCH in names:
        found[_BATCH] = trial.suggest_categorical(_BATCH, _BATCHES)
    return _rounded(found)


def _pruner(arguments: TrainerOptions, rows: int) -> "optuna.pruners.BasePruner":
    """Ends a trial that is worse than the median of the others after as many rows; rows: of the training data.

    Optuna's own compares after as many steps, when a trial of half the batch has seen half the rows.
    """
    import optuna

    batch = arguments.train_batch_size
    epochs, accumulated = float(arguments.num_train_epochs or 1), arguments.gradient_accumulation_steps
    spared = _SPARED * (arguments.max_steps * batch if arguments.max_steps > 0 else epochs * rows / accumulated)

    class Median(optuna.pruners.BasePruner):
        def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
            sign = 1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else -1

            def best(some: optuna.trial.FrozenTrial, most: float) -> float | None:
                size = some.params.get(_BATCH, batch)
                reached = [sign * value for step, value in some.intermediate_values.items() if step * size <= most]
                return max(reached, default=None)

            seen = (trial.last_step or 0) * trial.params.get(_BATCH, batch)
            others = [best(other, seen) for other in study.get_trials(states=[optuna.trial.TrialState.COMPLETE])]
            known = [value for value in others if value is not None]
            mine = best(trial, seen)
            return mine is not None and seen >= spared and len(known) >= _RANDOM and mine < median(known)

    return Median()


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as they are used: a learning rate of two digits, which can be given as it is printed."""
    return {name: float(f"{value:.2g}") if name == _RATE else value for name, value in values.items()}


def _objective(trainer: Trainer, arguments: TrainerOptions, metrics: Mapping[str, float]) -> float:
    """What a trial is worth after an evaluation: the value of the epoch that would be shipped.

    Raises UserError for one that is no number.
    """
    value, best = float(metrics[f"eval_{arguments.metric_for_best_model}"]), trainer.state.best_metric
    if not math.isfinite(value):
        raise UserError(f"{arguments.metric_for_best_model} on validation is no number")
    if best is None or not arguments.load_best_model_at_end:
        return value
    return max(value, best) if arguments.greater_is_better else min(value, best)


def _trainer(
    task: TrainingTask, base: BaseModel, splits: Splits, options: Options, arguments: TrainerOptions
) -> Trainer:
    """The task's Trainer, which begins each trial with a fresh model and saves nothing."""
    mine = copy(arguments)
    mine.save_strategy, mine.load_best_model_at_end = SaveStrategy.NO, False

    def fresh() -> Any:
        model, _ = task.load(base, splits, options)
        # As where the Trainer of the final training is made: it repeats the best trial.
        transformers.set_seed(arguments.seed)
        prepare(model, options, mine)
        transformers.set_seed(arguments.seed)
        return model

    model, processor = task.load(base, splits, options)
    trainer = task.trainer(model, processor, splits, options, mine, task.settings(model, processor, options))
    if mine.eval_strategy == IntervalStrategy.NO:
        raise UserError("--search: nothing tells how good such a model is, so there is nothing to choose by")
    trainer.model_init = fresh
    trainer.remove_callback(Progress)
    trainer.add_callback(Steps())
    return trainer


def _storage(arguments: TrainerOptions) -> "JournalStorage":
    """The journal in the folder of checkpoints, a new one unless the run goes on with an earlier one."""
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    path = Path(str(arguments.output_dir)) / resuming.SEARCH
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"{path.name}.*"):  # locks that a kill has left; nobody else uses the file
        left.unlink()
    if not resuming.wanted(arguments):
        path.unlink(missing_ok=True)
    elif path.exists():
        whole, newline, _ = path.read_bytes().rpartition(b"\n")  # the last line may be cut off
        path.write_bytes(whole + newline)
    return JournalStorage(JournalFileBackend(str(path)))


def _study(storage: "JournalStorage", name: str, arguments: TrainerOptions) -> "optuna.Study":
    """The study of this name, the only one in the storage. Raises UserError if another is there."""
    import optuna

    if set(optuna.get_all_study_names(storage)) - {name}:
        raise UserError(resuming.other(Path(str(arguments.output_dir)) / resuming.SEARCH))
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        direction="maximize" if arguments.greater_is_better else "minimize",
        load_if_exists=True,
    )
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def _done(study: "optuna.Study") -> list["optuna.trial.FrozenTrial"]:
    """The trials that need not be made again."""
    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state.name in ("COMPLETE", "PRUNED") or str(trial.number) in study.user_attrs
    ]


def _row(trial: "optuna.trial.FrozenTrial") -> dict[str, Any]:
    """A trial as metrics.json has it. value: of one that was ended early the best until then, None of a failed one."""
    return {
        "parameters": _rounded(trial.params),
        "value": trial.value,
        "state": {"COMPLETE": "complete", "PRUNED": "pruned"}.get(trial.state.name, "failed"),
        "seconds": round(trial.duration.total_seconds(), 1) if trial.duration else 0.0,
    }


def _told(study: "optuna.Study", trial: "optuna.trial.FrozenTrial", metric: str) -> str:
    """A trial as people read it."""
    row = _row(trial)
    values = [f"{name.replace('_', '-')} {value:g}" for name, value in row["parameters"].items()]
    if row["value"] is None:
        return f"{', '.join(values)}: failed: {_why(study, trial)}"
    ended = ", ended early" if row["state"] == "pruned" else ""
    return f"{', '.join(values)}: {metric} {row['value']:.4f}{ended} ({row['seconds']:.0f} s)"


def _why(study: "optuna.Study", trial: "optuna.trial.FrozenTrial") -> str:
    """Why a trial has failed."""
    return str(study.user_attrs.get(str(trial.number), ""))
