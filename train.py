#!/usr/bin/env python
"""Fine-tunes a Hugging Face model offline and writes it as a bundle, ready for ./build_mar.sh.

Files are csv, tsv, jsonl or parquet with the columns `text` and `label`; --text-column and --label-column name others.
Images and sounds are a folder, with a folder for each label in it. docs/tasks.md says what each task reads.
"""

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import torch
import transformers
from datasets import ClassLabel

from handler.engine import Engine
from training import (
    base_model,
    bundle,
    care,
    defaults,
    evaluation,
    folds,
    help,
    privacy,
    private,
    report,
    resuming,
    search,
    tasks,
)
from training.base_model import BaseModel
from training.errors import UserError
from training.interrupts import INTERRUPTED, end_if_interrupted, remembered
from training.options import Options, TrainerOptions
from training.tasks import Splits, TrainingTask

# Training examples that an int8 model is calibrated on.
_CALIBRATION = 300


@dataclass(frozen=True)
class Run:
    """A command: what it asks for, and the data that it names. threads: that torch computes on."""

    task: TrainingTask
    base: BaseModel
    splits: Splits
    options: Options
    arguments: TrainerOptions
    speak: Callable[..., None]
    threads: int

    @property
    def secret(self) -> bool:
        """Whether rows of training are private: the bundle has nothing of them but weights with noise."""
        return self.options.private_epsilon is not None

    def told(self) -> list[str]:
        """The splits of which the bundle may tell."""
        return [name for name in self.splits.named() if not (self.secret and name == "train")]


@dataclass(frozen=True)
class Data:
    """What the bundle may tell of the rows, by split. counts: of each label; lengths: tokens of each row, if any."""

    counts: dict[str, dict[str, int]]
    lengths: dict[str, list[int]]
    findings: care.Findings


@dataclass(frozen=True)
class Learnt:
    """A model that is ready to be bundled. history: of its training, for metrics.json."""

    model: Any
    settings: dict[str, Any]
    choices: Sequence[defaults.Choice] = ()
    history: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    options, arguments = parse(sys.argv[1:])
    task = tasks.load(options.task)
    place = Path(str(arguments.output_dir))
    bundle.check_place(place, overwrite=options.overwrite)
    checkpoints = place.with_name(f"{place.name}.checkpoints")
    arguments.output_dir = str(checkpoints)
    resumed = checkpoint_to_resume(arguments, checkpoints)
    base = base_model.resolve(options.base_model, options.from_scratch, options.layers)
    transformers.set_seed(arguments.seed)
    splits = task.read(options, arguments.seed, base)
    arguments.choose_by(splits.metrics or task.metrics)
    speak = partial(print, flush=True) if arguments.process_index == 0 else _silent
    run = Run(task, base, splits, options, arguments, speak, torch.get_num_threads())

    counts = {name: task.counts(rows, splits.labels) for name, rows in splits.named().items()}
    describe(speak, splits, counts)
    model, processor = task.load(base, splits, options)
    settings = task.settings(model, processor, options)
    data = look_at(run, counts, processor, settings)
    before = search.run(task, base, splits, options, arguments, speak)
    before |= folds.run(task, base, splits, options, arguments, speak)
    learnt = fit(run, model, processor, settings, resumed)
    if arguments.process_index == 0:
        metrics = write(run, place, data, learnt, processor, before)
        shutil.rmtree(checkpoints, ignore_errors=True)
        conclude(place, metrics)


def look_at(run: Run, counts: dict[str, dict[str, int]], processor: Any, settings: Mapping[str, Any]) -> Data:
    """Says what is wrong with the rows, as far as a program can tell. Raises UserError if --strict is given, too."""
    named = run.splits.named()
    compared = {name: run.task.compared(rows, run.splits.labels) for name, rows in named.items()}
    findings = care.examine(compared)
    lengths = {name: care.lengths(rows, processor) for name, rows in compared.items() if rows}
    if found := findings.sentence(lengths, settings.get("max_length")):
        if run.options.strict:
            raise UserError(f"--strict: {found}; mend the data, or leave --strict out for a report of which rows")
        run.speak(f"the data is not clean: {found}" + ("" if run.secret else "; report.html shows which"))
    told = run.told()
    if len(told) < len(compared):
        findings = care.examine({name: compared[name] for name in told})
    return Data(
        {name: counts[name] for name in told}, {name: lengths[name] for name in told if name in lengths}, findings
    )


def fit(run: Run, model: Any, processor: Any, settings: dict[str, Any], resumed: str | None) -> Learnt:
    """Trains the model, if there is something to learn from. resumed: the checkpoint to go on from."""
    splits, options, arguments = run.splits, run.options, run.arguments
    if splits.train is None:
        run.speak(f"no --train-file: {run.base.name} is bundled as it is")
        return Learnt(model, settings)
    defaults.fill_epochs(arguments, len(splits.train))
    trainer = run.task.trainer(model, processor, splits, options, arguments, settings)
    choices = defaults.choices(options, arguments)
    # Between steps: raised in a destructor, it would be dropped, and the training would go on.
    with remembered(at_once=False):
        extent = f"{arguments.max_steps} steps" if arguments.max_steps > 0 else f"{arguments.num_train_epochs:g} epochs"
        how = [
            f"learning rate {arguments.learning_rate:g}",
            f"batch {arguments.train_batch_size}",
            "bf16" if arguments.bf16 else "fp32",
            f"{run.threads} threads",
            *(f"{name} {value}" for name, value in settings.items() if name != "options"),
        ]
        run.speak(f"{'training' if run.base.spec else 'fine-tuning'} {run.base.name} for {extent}: {', '.join(how)}")
        chosen = [choice for choice in choices if choice.name in arguments.reasons]
        run.speak(f"  chosen: {', '.join(str(choice) for choice in chosen if choice.why != defaults.ELSEWHERE)}")
        started = time.monotonic()
        trained = trainer.train(resume_from_checkpoint=resumed)
    end_if_interrupted()
    settings |= run.task.learned(trainer, splits, options, settings)
    history: dict[str, Any] = {
        "epochs": [entry for entry in trainer.state.log_history if "eval_loss" in entry],
        "training_loss": [
            {key: entry[key] for key in ("epoch", "step", "loss")}
            for entry in trainer.state.log_history
            if "loss" in entry and not run.secret
        ],
        "training_seconds": round(time.monotonic() - started, 1),
        "training_samples_per_second": trained.metrics["train_samples_per_second"],
    }
    if isinstance(trainer, private.PrivateTrainer):
        history["private"] = trainer.record()
        run.speak(private.sentence(history["private"]))
    return Learnt(trainer.model, settings, choices, history)


def write(
    run: Run, place: Path, data: Data, learnt: Learnt, processor: Any, before: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes the bundle, with what the engine that serves it makes of validation and test; returns metrics.json.

    before: what metrics.json holds of search and folds.
    """
    task, splits, options, arguments = run.task, run.splits, run.options, run.arguments
    with bundle.staged(place, overwrite=options.overwrite) as stage:
        bundle.write_model(stage, learnt.model, processor)
        bundle.write_model_config(stage, options.task, learnt.settings)
        examples = {
            name: task.examples(rows, splits.labels) for name, rows in splits.named().items() if name != "train"
        }
        known = examples.get("validation", [])
        bundle.write_lines(stage, "validation.jsonl", known)
        trained_on: list[dict[str, Any]] = []
        if splits.train is not None:
            chosen = splits.train.shuffle(seed=arguments.seed).select(range(min(_CALIBRATION, len(splits.train))))
            trained_on = task.examples(chosen, splits.labels)
            if not run.secret:  # then validation has to do
                bundle.write_calibration(stage, trained_on)
        # From here on the engine speaks: what is measured and recorded is what will be served.
        engine = Engine(stage)
        golden = bundle.write_golden(stage, engine, task.golden(known, engine.settings.max_length, arguments.seed))
        predictions = {name: evaluation.predict(engine, rows) for name, rows in examples.items()}
        membership = privacy.membership(engine, trained_on, examples, predictions)
        if run.secret and membership:
            run.speak(f"membership: AUC {membership['auc']:.3f} (0.5: the loss tells nothing); not in the bundle")
        metrics = {
            "task": options.task,
            "primary": splits.primary or task.primary,
            "labels": splits.labels,
            "settings": learnt.settings,
            "rows": {name: len(rows) for name, rows in splits.named().items()},
            "rows_per_label": data.counts,
            "rows_skipped": splits.skipped,
            "findings": data.findings.counts(),
            "choices": [asdict(choice) for choice in learnt.choices],
            "splits": {
                name: task.score(predictions[name], [row["target"] for row in rows], splits.labels)
                for name, rows in examples.items()
            },
            "membership": None if run.secret else membership,
            **before,
            **learnt.history,
        }
        bundle.write_json(stage, "metrics.json", metrics)
        given = json.loads(arguments.to_json_string())  # type: ignore[no-untyped-call]
        sources = bundle.provenance(
            stage,
            base=run.base,
            files={name: path for name, path in options.files().items() if name in run.told()},
            digests=splits.digests,
            arguments={**vars(options), **given},
            command=sys.argv,
            threads=run.threads,
        )
        bundle.write_json(stage, "provenance.json", sources)
        evidence = report.Evidence(engine, examples, predictions, golden, data.findings, data.lengths)
        report.write(stage, place.name, metrics, sources, evidence)
    return metrics


def parse(argv: list[str]) -> tuple[Options, TrainerOptions]:
    """Options and Trainer arguments from a command line."""
    parser = help.parser(str(__doc__))
    options, arguments, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    if options.from_scratch is not None and options.train_file is None and tasks.load(options.task).trains:
        raise UserError("--from-scratch needs a --train-file: there is nothing to bundle in a model that knows nothing")
    if not 0 < options.validation_share < 1:
        raise UserError(f"--validation-share {options.validation_share}: give a share between 0 and 1, e.g. 0.1")
    if options.wished_precision is not None and not 0 < options.wished_precision <= 1:
        raise UserError(f"--wished-precision {options.wished_precision}: give a share up to 1, e.g. 0.95")
    if options.wished_precision is not None and options.task != "text-classification":
        raise UserError(
            f"--wished-precision: {options.task} has no answers to leave out; it is for text-classification"
        )
    if options.early_stopping_patience and not arguments.load_best_model_at_end:
        raise UserError("--early-stopping-patience needs --load-best-model-at-end true, to ship the best epoch")
    if options.most_tokens < 1:
        raise UserError(f"--most-tokens {options.most_tokens}: give 1 or more, e.g. 8192")
    defaults.fill(options, arguments)
    private.check(options, arguments)
    search.check(options, arguments)
    folds.check(options)
    return options, arguments


def checkpoint_to_resume(arguments: TrainerOptions, checkpoints: Path) -> str | None:
    """The checkpoint named by --resume-from-checkpoint; the last one of this output folder for `true`."""
    wanted = arguments.resume_from_checkpoint
    if wanted is None or wanted.lower() == "false":
        return None
    found = wanted
    if wanted.lower() == "true":
        # The Trainer writes this file last: a checkpoint without it was cut off.
        whole = [path.parent for path in checkpoints.glob("checkpoint-*/trainer_state.json")]
        if not whole and any((checkpoints / name).exists() for name in (resuming.SEARCH, resuming.FOLDS)):
            return None  # what came before the training goes on
        if not whole:
            raise UserError(f"--resume-from-checkpoint: there is no checkpoint in {checkpoints}; start without it")
        found = str(max(whole, key=lambda folder: int(folder.name.rpartition("-")[2])))
    elif not Path(wanted, "trainer_state.json").is_file():
        raise UserError(f"--resume-from-checkpoint {wanted}: this is no folder of a checkpoint")
    return found


def describe(speak: Any, splits: Splits, counts: dict[str, dict[str, int]]) -> None:
    """Says how many rows each label has in each split, and whether the labels are out of balance."""
    for name, rows in splits.named().items():
        shown = ", ".join(f"{label} {count}" for label, count in list(counts[name].items())[:12])
        more = f", … ({len(counts[name])} labels)" if len(counts[name]) > 12 else ""
        speak(f"{name}: {len(rows)} rows" + (f" ({shown}{more})" if shown else ""))
    if splits.skipped:
        speak(f"left out {splits.skipped} rows without an input or a target")
    trained = sorted(counts.get("train", {}).items(), key=lambda entry: entry[1])
    if trained and trained[-1][1] >= 3 * max(1, trained[0][1]):
        (rare, least), (frequent, most) = trained[0], trained[-1]
        single = splits.train is not None and isinstance(splits.train.features.get("label"), ClassLabel)
        speak(
            f"the labels are out of balance: {frequent!r} has {most} in training and {rare!r} {least}; "
            "judge the model by macro-F1 and the per-label table rather than by accuracy"
            + ("; --class-weights balanced makes rare ones count as much as frequent ones" if single else "")
        )


def _silent(*_: object) -> None:
    """What all processes of a distributed run but the first say."""


def conclude(place: Path, metrics: Mapping[str, Any]) -> None:
    """Says how good the model is, where the bundle is, and what comes next."""
    for name, scores in metrics["splits"].items():
        print(f"{name}: {', '.join(report.figures(scores))} ({scores['rows']} rows)")
        print_confusion(scores)
    if "training_seconds" in metrics:
        print(f"trained in {metrics['training_seconds']:.0f} s")
    print(f"bundle: {place} (report.html says more)")
    print(f"next: ./build_mar.sh --bundle {place}")


def print_confusion(scores: dict[str, Any]) -> None:
    """The confusion matrix, if it fits a terminal."""
    labels = scores.get("labels", [])
    if "confusion_matrix" not in scores or len(labels) > 8:
        return
    width = max(6, *(len(label) for label in labels)) + 2
    print("true \\ predicted".ljust(18) + "".join(label.rjust(width) for label in labels))
    for label, row in zip(labels, scores["confusion_matrix"], strict=True):
        print(label.ljust(18) + "".join(str(count).rjust(width) for count in row))


if __name__ == "__main__":
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    defaults.use_physical_cores()
    try:
        main()
    except UserError as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        message = "interrupted; no bundle was written. Add --resume-from-checkpoint true to go on."
        print(f"train.py: {message}", file=sys.stderr)
        sys.exit(INTERRUPTED)
