"""What comes before a training: the search for its settings, and cross-validation."""

import contextlib
import gc
import io
import json
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import optuna
import pytest
from conftest import ROOT, train_here
from datasets import Dataset
from test_train import load, save_tiny_base, start, write_csv

from training import evaluation, folds, report, search
from training.errors import UserError
from training.options import TrainerOptions

TRIALS = 4
# By a figure that differs from trial to trial, as it does in fp32.
BY_LOSS = ("--metric-for-best-model", "loss", "--bf16", "false")


@pytest.fixture(scope="module", autouse=True)
def spared() -> Iterator[None]:
    """Garbage is collected before and after each trial: spares it whatever is in memory by now."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty short rows of two classes."""
    return write_csv(tmp_path_factory.mktemp("small") / "small.csv", ("negative", "positive"))


def options(data: Path, place: Path, base: Path, *more: object) -> list[object]:
    return ["--train-file", data, "--output-dir", place, "--base-model", base, "--max-length", 16, *more]


def train(data: Path, place: Path, base: Path, *more: object) -> str:
    """A run in this process; its standard output."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train_here(*options(data, place, base, *more))
    return printed.getvalue()


def trials_of(place: Path) -> list[dict[str, Any]]:
    """The trials, without the time they took."""
    return [{**trial, "seconds": None} for trial in load(place / "metrics.json")["search"]]


# --- The search ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(small: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A bundle trained after a search, with a test file of which all labels are wrong; and what was printed."""
    folder = tmp_path_factory.mktemp("searched")
    wrong = write_csv(folder / "wrong.csv", ("positive", "negative"))
    printed = train(small, folder / "bundle", base, "--search", TRIALS, *BY_LOSS, "--test-file", wrong)
    assert sorted(path.name for path in folder.iterdir()) == ["bundle", "wrong.csv"], "the journal is removed"
    return folder / "bundle", printed


def test_the_final_training_repeats_the_best_trial(searched: tuple[Path, str]) -> None:
    place, printed = searched
    metrics = load(place / "metrics.json")
    trials = metrics["search"]
    assert len(trials) == TRIALS
    usual = {"learning_rate": 1e-4, "num_train_epochs": 10, "per_device_train_batch_size": 32}
    assert trials[0]["parameters"] == usual, "the defaults are the first trial"
    for trial in trials:
        assert 2e-5 <= trial["parameters"]["learning_rate"] <= 5e-4
        assert trial["parameters"]["num_train_epochs"] in range(1, 11)
        assert trial["parameters"]["per_device_train_batch_size"] in (16, 32, 64)
        assert trial["state"] in ("complete", "pruned")
        assert trial["seconds"] > 0
    assert len({trial["value"] for trial in trials}) == TRIALS
    best = min((trial for trial in trials if trial["state"] == "complete"), key=lambda trial: trial["value"])
    assert min(entry["eval_loss"] for entry in metrics["epochs"]) == best["value"]
    choices = {choice["name"]: choice for choice in metrics["choices"]}
    for name, value in best["parameters"].items():
        assert choices[name]["value"] == value
        assert choices[name]["why"] == f"best of {TRIALS} trials by loss"
        assert load(place / "provenance.json")["arguments"][name] == value
    assert re.search(rf"chosen: .*learning-rate \S+ \(best of {TRIALS} trials by loss\)", printed)
    said = re.findall(
        r"^  trial (\d) of 4: learning-rate \S+, num-train-epochs \d+, .*: loss ([01]\.\d{4})", printed, re.M
    )
    assert said == [(str(number), f"{trial['value']:.4f}") for number, trial in enumerate(trials, start=1)]


def test_the_report_shows_all_trials(searched: tuple[Path, str]) -> None:
    place, _ = searched
    page = (place / "report.html").read_text(encoding="utf-8")
    section = page[page.index("<h2>Search</h2>") : page.index("<h2>Golden set</h2>")]
    assert section.count('<th scope="row">') == TRIALS
    assert section.count("the best</td>") == 1
    assert "loss by trial" in section
    assert "loss by learning rate" in section


def test_a_killed_and_an_interrupted_search_go_on(
    searched: tuple[Path, str], small: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same trials as without, each once; and the same as with a test file, which chooses nothing."""
    place, checkpoints = tmp_path / "bundle", tmp_path / "bundle.checkpoints"
    process = start(sys.executable, ROOT / "train.py", *options(small, place, base, "--search", TRIALS, *BY_LOSS))
    assert process.stdout is not None
    assert any(f"trial 1 of {TRIALS}" in line for line in process.stdout)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["bundle.checkpoints"]
    assert all(path.name.startswith("search.journal") for path in checkpoints.iterdir())
    journal = checkpoints / "search.journal"
    (checkpoints / "search.journal.1.rename").touch()  # of a lock, if the kill comes while it is given back
    journal.write_text(journal.read_text() + '{"op_code": 4, "wor')  # what a kill leaves that comes amid writing
    resumed = ("--search", TRIALS, *BY_LOSS, "--resume-from-checkpoint", "true")

    def interrupted(*arguments: Any) -> float:
        if not values:
            raise KeyboardInterrupt
        return values.pop() and objective(*arguments)

    objective, values = search._objective, [1.0]
    with monkeypatch.context() as patch:
        patch.setattr(search, "_objective", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(small, place, base, *resumed)
    assert {path.name for path in checkpoints.iterdir()} == {"search.journal"}
    with pytest.raises(UserError, match=r"search\.journal: this is of other data or settings"):
        train(small, place, base, "--search", TRIALS + 1, *resumed[2:])
    printed = train(small, place, base, *resumed)
    assert re.search(rf"^search: [1-{TRIALS - 1}] of {TRIALS} trials are done$", printed, re.MULTILINE)
    assert "trial 1 of" not in printed
    assert not checkpoints.exists()
    assert trials_of(place) == trials_of(searched[0])


def test_what_is_given_is_not_searched_and_trials_may_end_early(
    small: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Second(optuna.pruners.BasePruner):
        def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
            return trial.number == 1

    monkeypatch.setattr(search, "_pruner", lambda *_: Second())
    place = tmp_path / "bundle"
    given = ("--num-train-epochs", 2, "--learning-rate", 5e-3)
    printed = train(small, place, base, "--search", 3, *given)
    trials = load(place / "metrics.json")["search"]
    assert [trial["state"] for trial in trials] == ["complete", "pruned", "complete"]
    assert [list(trial["parameters"]) for trial in trials] == [["per_device_train_batch_size"]] * 3
    assert "ended early" in printed
    best = max(trials[0], trials[2], key=lambda trial: trial["value"])
    chosen = {choice["name"]: choice for choice in load(place / "metrics.json")["choices"]}
    assert chosen["learning_rate"] == {"name": "learning_rate", "value": 5e-3, "why": "as asked for"}
    batch = best["parameters"]["per_device_train_batch_size"]
    why = "best of 3 trials by macro_f1"
    assert chosen["per_device_train_batch_size"] == {"name": "per_device_train_batch_size", "value": batch, "why": why}
    page = (place / "report.html").read_text(encoding="utf-8")
    assert "ended early</td>" in page
    assert "macro-f1 by trial" in page
    assert "by learning rate" not in page


def test_a_trial_is_ended_where_it_is_worse_than_the_median_after_as_many_rows(tmp_path: Path) -> None:
    """Of 300 rows in all; five complete trials have the values 1 to 5 after 80, and 11 to 15 after 160."""
    batch = optuna.distributions.CategoricalDistribution((16, 32, 64))

    def trial(size: int, values: dict[int, float]) -> optuna.trial.FrozenTrial:
        return optuna.create_trial(
            params={"per_device_train_batch_size": size},
            distributions={"per_device_train_batch_size": batch},
            value=max(values.values()),
            intermediate_values=values,
        )

    arguments = TrainerOptions(output_dir=str(tmp_path), num_train_epochs=3)
    for direction, sign in (("maximize", 1), ("minimize", -1)):
        study = optuna.create_study(direction=direction)
        pruner = search._pruner(arguments, 100)
        for value in range(1, 6):
            bad = trial(32, {4: -sign * 9.0})
            assert not pruner.prune(study, bad), "too few are complete"
            study.add_trial(trial(16, {5: sign * value, 10: sign * (10 + value)}))
        assert pruner.prune(study, bad)
        assert pruner.prune(study, trial(32, {4: sign * 2.9})), "after 128 rows"
        assert not pruner.prune(study, trial(32, {4: sign * 3.0}))
        assert pruner.prune(study, trial(32, {5: sign * 3.0})), "after 160 rows"
        assert not pruner.prune(study, trial(32, {5: sign * 13.0}))
        assert not pruner.prune(study, trial(32, {3: sign * 2.0})), "of the first 100 rows nothing is said"


def test_trials_that_diverge_count_as_failed(
    small: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "bundle"
    steps = ("--max-steps", 4, "--per-device-train-batch-size", 8)
    monkeypatch.setattr(search, "_FACTOR", 1e35)
    printed = train(small, place, base, "--search", 4, *steps)
    failed = [trial for trial in load(place / "metrics.json")["search"] if trial["state"] == "failed"]
    assert failed
    assert all(trial["value"] is None for trial in failed)
    assert "failed: the loss or its gradients are not finite" in printed
    assert (place / "report.html").read_text(encoding="utf-8").count("failed</td>") == len(failed)
    given = ("--max-steps", 4, "--learning-rate", 1e30, "--warmup-steps", 2)
    with pytest.raises(UserError, match=r"--search: none of 2 trials came to an end; the last: .*not finite"):
        train(small, tmp_path / "other", base, "--search", 2, *given)


def test_a_search_without_a_best_epoch_judges_the_last(small: Path, base: Path, tmp_path: Path) -> None:
    place = tmp_path / "bundle"
    given = ("--num-train-epochs", 4, "--per-device-train-batch-size", 8, "--load-best-model-at-end", "false")
    train(small, place, base, "--search", 2, *given)
    metrics = load(place / "metrics.json")
    assert metrics["epochs"][-1]["eval_macro_f1"] == max(trial["value"] for trial in metrics["search"])


def test_trials_have_adapters_if_the_training_has(small: Path, base: Path, tmp_path: Path) -> None:
    place = tmp_path / "bundle"
    given = ("--num-train-epochs", 2, "--per-device-train-batch-size", 8, "--lora", 2, *BY_LOSS)
    printed = train(small, place, base, "--search", 2, *given)
    metrics = load(place / "metrics.json")
    assert min(entry["eval_loss"] for entry in metrics["epochs"]) == min(trial["value"] for trial in metrics["search"])
    assert re.search(r"^  [\d,]+ of [\d,]+ weights learn$", printed, re.M)


def test_charts_of_few_and_of_failed_trials() -> None:
    one = {"parameters": {"learning_rate": 1e-4}, "value": 0.5, "state": "complete", "seconds": 1.0}
    lost = {"parameters": {"learning_rate": 1e-3}, "value": None, "state": "failed", "seconds": 1.0}
    low = {**one, "value": 0.2}
    assert report.search([], "accuracy") is None
    found = report.search([lost, one, low], "accuracy")
    assert found is not None
    assert found["best"] == 2
    assert report.search([lost, one, low], "loss")["best"] == 3  # type: ignore[index]
    first, second = found["charts"]
    assert "best so far 0.5 at 2 and 0.5 at 3" in first
    assert "polyline" not in second, "points alone"
    assert report.search([one], "accuracy")["best"] == 1  # type: ignore[index]


# --- Folds -----------------------------------------------------------------------------------------------------------

FOLDS = ("--num-train-epochs", 2, "--learning-rate", 5e-3, "--per-device-train-batch-size", 8, "--folds", 3)


def test_folds_measure_each_row_once_and_go_on(
    small: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[list[tuple[str, str]]] = []

    def measure(engine: Any, task: Any, examples: Any, labels: Any) -> Any:
        held.append([(example["inputs"], example["target"]) for example in examples])
        return evaluation_measure(engine, task, examples, labels)

    evaluation_measure = evaluation.measure
    monkeypatch.setattr(evaluation, "measure", measure)
    place, checkpoints = tmp_path / "bundle", tmp_path / "bundle.checkpoints"
    printed = train(small, place, base, *FOLDS)
    with small.open(encoding="utf-8") as file:
        rows = [tuple(line.strip().split(",")) for line in file][1:]
    assert sorted(chain.from_iterable(held)) == sorted(rows)
    assert [Counter(label for _, label in part) for part in held] == [Counter(negative=10, positive=10)] * 3
    found = load(place / "metrics.json")["folds"]
    assert [fold["seed"] for fold in found["each"]] == [43, 44, 45]
    accuracies = [fold["metrics"]["accuracy"] for fold in found["each"]]
    assert (found["mean"]["accuracy"], found["deviation"]["accuracy"]) == (mean(accuracies), stdev(accuracies))
    assert f"3 folds: accuracy {mean(accuracies):.4f} ± {stdev(accuracies):.4f}, macro-f1 " in printed
    page = (place / "report.html").read_text(encoding="utf-8")
    assert "Metrics of 3 folds" in page
    assert f"<td>{stdev(accuracies):.4f}</td>" in page
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]

    def killed(*arguments: Any) -> Any:
        if len(held) == 5:
            raise KeyboardInterrupt
        return folds_measure(*arguments)

    folds_measure = folds._measure
    monkeypatch.setattr(folds, "_measure", killed)
    with pytest.raises(KeyboardInterrupt):
        train(small, tmp_path / "other", base, *FOLDS)
    monkeypatch.setattr(folds, "_measure", folds_measure)
    assert [path.name for path in (tmp_path / "other.checkpoints").iterdir()] == ["folds.json"]
    with pytest.raises(UserError, match=r"folds\.json: this is of other data or settings"):
        train(small, tmp_path / "other", base, *FOLDS, "--seed", 1, "--resume-from-checkpoint", "true")
    printed = train(small, tmp_path / "other", base, *FOLDS, "--resume-from-checkpoint", "true")
    assert "folds: 2 of 3 are done" in printed
    assert len(held) == 6
    for fold in (*found["each"], *load(tmp_path / "other" / "metrics.json")["folds"]["each"]):
        fold.pop("seconds")
    assert load(tmp_path / "other" / "metrics.json")["folds"]["mean"] == found["mean"]
    assert not checkpoints.exists()


def test_a_search_and_folds_with_a_validation_file_of_several_labels(base: Path, tmp_path: Path) -> None:
    """The folds are of the training file alone, and trained with what the search has found."""
    data = tmp_path / "data.jsonl"
    words = {"cold": ["bad", "cold"], "slow": ["bad"], "fine": []}
    lines = [{"text": f"a {word} place {i}", "label": words[word]} for i in range(8) for word in words]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    place = tmp_path / "bundle"
    given = ("--validation-file", data, "--max-steps", 3, "--per-device-train-batch-size", 8)
    train(data, place, base, "--search", 2, "--folds", 2, *given)
    metrics = load(place / "metrics.json")
    assert [fold["rows"] for fold in metrics["folds"]["each"]] == [12, 12]
    assert set(metrics["folds"]["mean"]) == {
        name for name, value in metrics["splits"]["validation"].items() if isinstance(value, float)
    }
    assert len(metrics["search"]) == 2


def test_questions_about_a_context_stay_together() -> None:
    rows = Dataset.from_dict({"question": [str(i) for i in range(30)], "context": [f"text {i % 7}" for i in range(30)]})
    parts = folds._parts(rows, 3, 0)
    contexts = [set(rows.select(part)["context"]) for part in parts]
    assert sum(map(len, contexts)) == len(set.union(*contexts)) == 7
    plain = folds._parts(rows.remove_columns("context"), 4, 0)
    assert sorted(chain.from_iterable(part.tolist() for part in plain)) == list(range(30))
    with pytest.raises(UserError, match="only 7 contexts"):
        folds._check_rows(rows, 8)


# --- What cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--search", 0), ["--search 0", "e.g. 12"]),
        (("--search", 2, "--eval-strategy", "no", "--load-best-model-at-end", "false"), ["--eval-strategy no"]),
        (
            ("--search", 2, "--learning-rate", 0.1, "--max-steps", 2, "--per-device-train-batch-size", 32),
            ["nothing is left to search", "--learning-rate"],
        ),
        (("--folds", 1), ["--folds 1", "2 or more"]),
        (("--folds", 61), ["--folds 61", "only 60 rows"]),
        (("--folds", 31), ["--folds 31", "'negative' has only 30 rows"]),
    ],
)
def test_bad_options(small: Path, base: Path, tmp_path: Path, arguments: tuple[object, ...], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        train(small, tmp_path / "bundle", base, *arguments)
    assert [word for word in words if word not in str(caught.value)] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--search", "--folds"])
def test_without_a_training_there_is_nothing_to_choose(option: str, small: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{option} needs a --train-file"):
        train_here("--output-dir", tmp_path / "bundle", option, 2)
    with pytest.raises(UserError, match="feature-extraction"):
        train_here("--task", "feature-extraction", "--output-dir", tmp_path / "b", "--train-file", small, option, 2)


def test_too_few_rows_for_a_validation_split_in_each_fold(base: Path, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "data.csv", ("a", "b"), rows=4)
    with pytest.raises(UserError, match="2 rows are too few to take some for validation; give a --validation-file"):
        train(data, tmp_path / "bundle", base, "--folds", 2)


def test_a_search_in_several_processes_is_refused(
    small: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainerOptions, "world_size", property(lambda _: 2))
    with pytest.raises(UserError, match="--search runs in one process; leave torchrun out"):
        train(small, tmp_path / "bundle", base, "--search", 2)
