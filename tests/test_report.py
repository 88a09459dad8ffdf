"""What training says of data and model: `report.html`, the model card, and the comparison of two bundles."""

import json
import re
import runpy
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from browser import Browser
from conftest import NO_CHECKPOINTS, run, succeeded, train_here
from console_page import faults
from huggingface_hub import ModelCard
from markupsafe import Markup
from sklearn.metrics import f1_score, precision_score, recall_score

from handler.engine import Engine
from handler.messages import Request, Result
from training import base_model, calibration, care, charts, compare, evaluation, label_errors, mistakes, privacy, report
from training.care import Row
from training.errors import UserError
from training.mistakes import Mistake

SPEC = "bert hidden_size=16 num_hidden_layers=1 num_attention_heads=2 intermediate_size=32 max_position_embeddings=64"
HOSTILE = "</style><script>alert('&lt;')</script> \"quoted\" <img src=x onerror=y> \x07 نص 🙂"
Train = Callable[..., Path]
VOID = {"meta", "br", "path", "polyline", "circle"}


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


# --- The care of data ------------------------------------------------------------------------------------------------


def test_repetitions_by_hand() -> None:
    splits = {
        "train": [
            Row(("A fine day",), "good"),
            Row(("rain",), "bad"),
            Row(("a  FINE\tday ",), "good"),
            Row(("a fine day",), "bad"),
            Row(("a fine day!",), "good"),
        ],
        "validation": [Row(("RAIN",), "bad"), Row(("snow",), "bad"), Row(("snow",), "bad")],
        "test": [Row(("a fine day",), "good"), Row(("rain",), "bad"), Row(("Snow",), "bad"), Row(("fog",), "bad")],
    }
    found = care.examine(splits)
    assert found.counts() == {
        "duplicates": {"train": 2, "validation": 1},
        "leaks": {"train in validation": 1, "train in test": 2, "validation in test": 2},
        "conflicts": 1,
        "damaged": {},
        "writing": {"train": {"latin": 5}, "validation": {"latin": 3}, "test": {"latin": 4}},
    }
    assert found.duplicates["train"].examples == splits["train"][2:4]
    assert found.leaks["train", "validation"].examples == [Row(("RAIN",), "bad")]
    assert found.conflicts == {("A fine day",): {"good": 3, "bad": 1}}
    assert found.sentence({}, 64) == (
        "2 row(s) of train repeat another; 1 row(s) of validation repeat another; 1 row(s) of validation are in train; "
        "2 row(s) of test are in train; 2 row(s) of test are in validation; 1 text(s) have several labels"
    )


def test_pairs_are_the_same_if_both_texts_are_and_nothing_is_said_of_clean_data() -> None:
    rows = [Row(("a", "b"), "x"), Row(("b", "a"), "y"), Row(("a b", ""), "z"), Row(("a", "b c"), "x")]
    found = care.examine({"train": rows, "test": []})
    assert found.sentence({"train": [64, 3]}, 64) == ""
    clean: dict[str, Any] = {"duplicates": {}, "leaks": {}, "conflicts": 0, "damaged": {}}
    assert found.counts() == {**clean, "writing": {"train": {"latin": 4}}}
    unlabelled = care.examine({"train": [Row(("a",)), Row(("A",))]})
    assert unlabelled.counts() == {**clean, "duplicates": {"train": 1}, "writing": {"train": {"latin": 2}}}


def test_damage_lengths_and_writing_by_hand() -> None:
    sound = ["Ça a coûté 3 £ à l’hôtel", "ÂGE D’OR, SÃO PAULO", "two\nlines\tand a tab", "Ünïcödé 🙂"]
    damaged = ["cafÃ© noir", "it doesnâ€™t", "Â£5 off", "a \ufffd b", "a \x1b[2J b"]
    others = ["добрый день", "漢字です", "12:30 !", "a да да"]
    found = care.examine({"train": [Row((text,)) for text in (*sound, *damaged)], "test": [Row((t,)) for t in others]})
    assert {name: finding.rows for name, finding in found.damaged.items()} == {"train": 5}
    assert found.damaged["train"].examples == [Row((text,)) for text in damaged[:3]]
    assert found.writing == {"train": {"latin": 9}, "test": {"cyrillic": 2, "cjk": 1, "no letters": 1}}
    assert next(iter(found.writing["test"])) == "cyrillic"
    said = found.sentence({"train": [9, 10, 11], "test": [11, 12]}, 10)
    assert said == (
        "5 row(s) of train have damaged characters; 1 row(s) of train have more than 10 tokens; "
        "2 row(s) of test have more than 10 tokens"
    )
    assert "tokens" not in found.sentence({"train": [9, 10, 11]}, None)


def test_lengths_are_those_of_whole_rows() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(base_model.resolve(None).location)
    assert care.lengths([Row(("one two",)), Row(("one " * 2000,))] * 600, tokenizer) == [4, 2002] * 600
    assert care.lengths([Row(("one", "two three"))], tokenizer) == [6]
    assert care.lengths([], tokenizer) == []


# --- Calibration -----------------------------------------------------------------------------------------------------


def test_the_expected_calibration_error_by_hand() -> None:
    """Bins of a fifteenth: 0.6 is the upper end of the ninth, 0.61 is in the tenth, and 1 in the last."""
    answers = [(0.6, True), (0.55, False), (0.61, True), (1.0, True), (0.95, False)]
    scores = np.array([[score, 1 - score] for score, _ in answers])
    targets = np.array([0 if right else 1 for _, right in answers])
    bins = calibration.reliability(scores, targets)
    assert [(entry.rows, entry.accuracy) for entry in bins] == [(2, 0.5), (1, 1.0), (2, 0.5)]
    assert [entry.confidence for entry in bins] == pytest.approx([0.575, 0.61, 0.975])
    assert [entry.high for entry in bins] == pytest.approx([9 / 15, 10 / 15, 1])
    assert calibration.expected_error(bins) == pytest.approx((2 * 0.075 + 0.39 + 2 * 0.475) / 5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_temperature_is_found_and_mends_the_scores(temperature: float) -> None:
    chance = np.random.default_rng(0)
    logits = chance.normal(0, 2, (20_000, 4))
    true = calibration.tempered(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), 1.0)
    targets = np.array([chance.choice(4, p=row) for row in true])
    skewed = calibration.tempered(true, 1 / temperature)
    assert calibration.fit_temperature(skewed, targets) == pytest.approx(temperature, rel=0.05)
    mended = calibration.reliability(calibration.tempered(skewed, temperature), targets)
    assert calibration.expected_error(mended) < 0.02
    if temperature != 1:
        assert calibration.expected_error(calibration.reliability(skewed, targets)) > 0.05


def test_scores_of_nothing_but_zero_and_one_have_a_temperature() -> None:
    scores, targets = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), np.array([0, 1, 1])
    assert 0.05 <= calibration.fit_temperature(scores, targets) <= 20
    assert np.isfinite(calibration.tempered(scores, 20)).all()


# --- Answers left out, suspected labels, membership ------------------------------------------------------------------


def test_precision_by_coverage_by_hand() -> None:
    """Right, right, wrong, and two with one score: no threshold tells these apart."""
    answers = [(0.9, True), (0.8, True), (0.7, False), (0.6, True), (0.6, False)]
    scores = np.array([[score, 1 - score] for score, _ in answers])
    targets = np.array([0 if right else 1 for _, right in answers])
    found = calibration.precision_by_coverage(scores, targets)
    expected = [(1, 3 / 5), (3 / 5, 2 / 3), (2 / 5, 1), (1 / 5, 1)]
    assert [entry.coverage for entry in found] == pytest.approx([coverage for coverage, _ in expected])
    assert [entry.precision for entry in found] == pytest.approx([precision for _, precision in expected])
    assert [entry.threshold for entry in found] == pytest.approx([0.3, 0.65, 0.75, 0.85])
    assert calibration.abstention(scores, targets, 0.6) == found[0]
    assert calibration.abstention(scores, targets, 0.65) == found[1]
    assert calibration.abstention(scores, targets, 1.0) == found[2]
    assert calibration.abstention(scores[:1], np.array([1]), 0.5) is None


def test_labels_that_were_changed_are_suspected() -> None:
    generator = np.random.default_rng(0)
    targets = generator.integers(0, 3, 300)
    scores = np.full((300, 4), 0.02)
    scores[np.arange(300), targets] = 0.94
    changed = generator.choice(300, 12, replace=False)
    given = targets.copy()
    given[changed] = (given[changed] + 1) % 3
    names = ["a", "b", "c", "nobody's"]
    found = label_errors.suspects(scores, given, names)
    assert sorted(suspect.row for suspect in found) == sorted(changed.tolist())
    assert all((s.given, s.likely) == (names[given[s.row]], names[targets[s.row]]) for s in found)
    assert found[0].score == pytest.approx(0.94)
    assert label_errors.suspects(scores, targets, names) == []
    assert label_errors.suspects(scores[:10], given[:10], names) == []
    assert label_errors.suspects(scores, np.zeros(300, dtype=np.int64), names) == []


def test_membership_of_rows_that_are_known_by_heart(hostile: Path) -> None:
    engine = Engine(hostile)
    rows = rows_of(hostile / "validation.jsonl")
    found = evaluation.predict(engine, rows)
    best = [{**row, "target": answer[0]["label"]} for row, answer in zip(rows, found, strict=True)]
    worst = [{**row, "target": answer[-1]["label"]} for row, answer in zip(rows, found, strict=True)]
    by_heart = privacy.membership(engine, best, {"validation": worst}, {"validation": found})
    assert by_heart == {"auc": 1.0, "advantage": 1.0, "rows": len(rows), "validation_rows": len(rows)}
    splits = {"validation": worst, "test": rows}
    alike = privacy.membership(engine, rows, splits, dict.fromkeys(splits, found))
    assert alike == {"auc": 0.5, "advantage": 0.0, "rows": len(rows), "test_rows": len(rows)}
    assert privacy.membership(engine, [], {}, {}) is None


def test_answers_below_the_wished_precision_are_left_out(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    """With rows in a fog, of which nobody can tell the label."""
    fog = [(f"fog {i}", ("sun", "rain")[i % 3 == 0]) for i in range(60)]
    splits = {"train": [*weather(60), *fog[:40]], "validation": [*weather(60, 60), *fog[40:]]}
    bundle = train("--wished-precision", 0.95, steps=60, **splits)
    said = capsys.readouterr().out
    engine = Engine(bundle)
    thresholds = engine.settings.options["thresholds"]
    assert set(thresholds) == {"sun", "rain"}
    assert len(set(thresholds.values())) == 1
    rows = rows_of(bundle / "validation.jsonl")
    asked = [{"inputs": row["inputs"], "parameters": {"threshold": "learned", "top_k": 1}} for row in rows]
    answered = [(found, row) for found, row in zip(evaluation.predict(engine, asked), rows, strict=True) if found]
    right = [found[0]["label"] == row["target"] for found, row in answered]
    assert 20 < len(answered) < len(rows)
    assert np.mean(right) >= 0.95
    assert f"{len(answered) / len(rows):.1%} of validation is answered" in said
    assert f"and {np.mean(right):.1%} of the answers are right" in said
    page = Page(bundle / "report.html").text
    assert f"it answers {len(answered) / len(rows):.1%} of validation".replace("%", " %") in " ".join(page.split())


def test_a_precision_that_is_never_reached_leaves_nothing_out(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    swapped = [(text, "rain" if label == "sun" else "sun") for text, label in weather(20, 60)]
    bundle = train("--wished-precision", 0.9, train=weather(60), validation=swapped, steps=60)
    assert "not even the surest answers to validation reach it" in capsys.readouterr().out
    assert "thresholds" not in Engine(bundle).settings.options


def test_a_wished_precision_that_makes_no_sense(train: Train) -> None:
    for wished in (0, 1.5):
        with pytest.raises(UserError, match=r"--wished-precision [\d.]+: give a share up to 1, e\.g\. 0\.95"):
            train("--wished-precision", wished, train=weather(20))
    with pytest.raises(UserError, match="--wished-precision: fill-mask has no answers to leave out"):
        train("--wished-precision", 0.9, "--task", "fill-mask", train=weather(20))
    with pytest.raises(UserError, match="--wished-precision is for one label of several"):
        train("--wished-precision", 0.9, train=[(text, i / 7) for i, (text, _) in enumerate(weather(20))])


# --- Charts ----------------------------------------------------------------------------------------------------------


def test_ticks_are_round_and_inside() -> None:
    assert charts.Scale("", 0, 1).ticks() == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert charts.Scale("", 0, 243).ticks() == [0, 50, 100, 150, 200]
    assert charts.Scale("", -0.031, 0.02).ticks() == [-0.02, 0, 0.02]
    assert charts.scale("", [3.0]).ticks() == [0, 1, 2, 3]
    assert charts.scale("", [0.0, 0.0]).ticks() == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert charts.scale("", [-2.0, -1.0]) == charts.Scale("", -2, 0)


def test_a_chart_is_where_its_numbers_are_and_escapes_names() -> None:
    axes = charts.Scale("x", 0, 10), charts.Scale("y", 0, 1)
    drawn = charts.chart("<b>", *axes, lines={"<i>": [(0, 0), (10, 1)]}, bars=[(0, 5, 0.5)], rule=(5, 0, 5, 1))
    assert isinstance(drawn, Markup)
    assert '<polyline class="line0" points="44.0,178.0 350.0,24.0"/>' in drawn
    assert '<path class="bar" d="M44.0,178V101.0H197.0V178Z"/>' in drawn
    assert '<path class="rule" d="M197.0,178.0L197.0,24.0"/>' in drawn
    assert "<b>" not in drawn
    assert "<i>" not in drawn
    assert 'aria-label="&lt;b&gt;: y against x; &lt;i&gt; 0 at 0 and 1 at 10; highest 0.5 from 0 to 5"' in drawn


def test_learning_curves_have_a_scale_for_each_kind_of_figure() -> None:
    """A figure that is missing or no number, as of an epoch that diverged, is left out."""
    epochs = [
        {"epoch": 1.0, "eval_loss": 5.0, "eval_accuracy": 0.25, "eval_perplexity": 148.4, "eval_runtime": 1.0},
        {"epoch": 2.0, "eval_loss": float("nan"), "eval_perplexity": float("inf"), "eval_runtime": 1.0},
        {"epoch": 3.0, "eval_loss": 2.0, "eval_accuracy": 0.5, "eval_perplexity": 7.4, "eval_runtime": 1.0},
    ]
    drawn = report.learning_curves(epochs, [{"epoch": 0.5, "loss": 6.0}, {"epoch": 1.5, "loss": 4.0}])
    assert [re.findall(r'aria-label="([^"]+)"', curve)[0] for curve in drawn] == [
        "Loss: loss against epoch; training loss 6 at 0.5 and 4 at 1.5; validation loss 5 at 1 and 2 at 3",
        "Validation metrics: validation metrics against epoch; accuracy 0.25 at 1 and 0.5 at 3",
        "Perplexity: perplexity against epoch; perplexity 148 at 1 and 7.4 at 3",
    ]
    assert report.learning_curves([], []) == []


# --- The page --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """A page that must be well-formed: its elements, headings, text, and what it would fetch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[int] = []
        self.titles: list[str] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch(r"h\d", tag):
            self.headings.append(int(tag[1]))
            self.titles.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and re.fullmatch(r"h\d", self.open[-1]):
            self.titles[-1] += data


def check(page: Page) -> None:
    """What every report must be: alone, escaped, and open to all."""
    assert page.source.lstrip().startswith("<!doctype html>\n<html lang=")
    assert page.tags["script"] == page.tags["img"] == page.tags["link"] == page.tags["iframe"] == 0
    assert [name for _, attrs in page.attributes for name in attrs if name in ("src", "srcset", "data")] == []
    links = [str(attrs["href"]) for _, attrs in page.attributes if "href" in attrs]
    assert [link for link in links if not link.startswith("data:image/png;base64,")] == []
    assert [name for _, attrs in page.attributes for name in attrs if name.startswith("on")] == []
    [style] = re.findall(r"<style>(.*?)</style>", page.source, re.DOTALL)
    assert not re.search(r"@import|url\(|//", style)
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", page.source)
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    assert page.tags["caption"] == page.tags["table"] > 0
    assert all(attrs.get("scope") in ("row", "col") for tag, attrs in page.attributes if tag == "th")
    pictures = [attrs for tag, attrs in page.attributes if tag == "svg"]
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in pictures)
    assert len(pictures) == page.tags["figcaption"] + page.source.count('<svg class="picture"')
    assert any(attrs.get("name") == "viewport" for tag, attrs in page.attributes if tag == "meta")


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Trains a very small model from scratch on rows of (text, label), given by split."""

    def run(*options: object, steps: int = 20, **splits: list[tuple[str, Any]]) -> Path:
        folder = tmp_path_factory.mktemp("report")
        files: list[object] = []
        for name, rows in splits.items():
            path = folder / f"{name}.jsonl"
            path.write_text("".join(json.dumps({"text": t, "label": label}) + "\n" for t, label in rows))
            files += [f"--{name}-file", path]
        given = ("--from-scratch", SPEC, "--max-steps", steps, "--learning-rate", 1e-2, "--bf16", "false")
        small = ("--per-device-train-batch-size", 8, "--output-dir", folder / "bundle")
        train_here(*files, *given, *small, *(options or NO_CHECKPOINTS))
        return folder / "bundle"

    return run


def weather(count: int, start: int = 0) -> list[tuple[str, str]]:
    """Texts that tell their label."""
    return [(f"{('warm', 'cold')[i % 2]} day {i}", ("sun", "rain")[i % 2]) for i in range(start, start + count)]


@pytest.fixture(scope="module")
def hostile(train: Train) -> Path:
    """Trained on texts and labels that a careless page would obey; a few validation labels are wrong on purpose."""
    swapped = [(f"warm {HOSTILE} {i}", "<b>rain</b>") for i in range(3)]
    tame = [(text, "<b>rain</b>" if label == "rain" else label) for text, label in weather(120)]
    return train(
        *("--num-train-epochs", 8),
        steps=-1,
        train=[
            *tame,
            *tame[:2],
            ("warm day 0", "<b>rain</b>"),
            *((f"warm {HOSTILE} {i}", "sun") for i in range(10, 16)),
            (f"warm {HOSTILE}", "sun"),
            (f"cold {HOSTILE}", tame[1][1]),
        ],
        validation=[*tame[:5], *[(t, "<b>rain</b>" if x == "rain" else x) for t, x in weather(15, 130)], *swapped],
        test=[(text, "<b>rain</b>" if label == "rain" else label) for text, label in weather(10, 119)],
    )


def test_a_hostile_text_is_text(hostile: Path) -> None:
    page = Page(hostile / "report.html")
    check(page)
    assert "</style><script>alert('&lt;')</script>" in page.text
    assert "<b>rain</b>" in page.text
    assert page.tags["b"] == 0
    assert "\ufffd" in page.text, "a bell"
    assert "نص 🙂" in page.text


@pytest.mark.parametrize("width", [1100, 360])
def test_the_page_in_a_browser(hostile: Path, chromium: Browser, axe: str, width: int) -> None:
    """Offline, on a wide screen and on a phone."""
    chromium.resize(width, 900)
    chromium.open((hostile / "report.html").as_uri())
    assert chromium.text("h1") == "bundle"
    assert chromium.run("return document.documentElement.scrollWidth") <= width
    assert faults(chromium, axe) == []


def test_what_the_page_shows(hostile: Path) -> None:
    page, metrics = Page(hostile / "report.html"), load(hostile / "metrics.json")
    assert "None was tried yet. ./build_mar.sh --bundle bundle" in page.text
    assert [title.split(":")[0] for title, level in zip(page.titles, page.headings, strict=True) if level < 3] == [
        *("bundle", "Data", "Learning curves", "Validation", "Test", "Calibration", "Leaving answers out"),
        *("Hardest examples", "Suspected label errors", "Membership"),
        *("Settings of the training", "Candidates for serving", "Golden set", "Environment", "Provenance"),
    ]
    # Three histograms, two learning curves, two reliability diagrams, one of the answers that may be left out.
    assert page.tags["svg"] == 8
    assert metrics["findings"] == {
        "duplicates": {"train": 3},
        "leaks": {"train in test": 1, "train in validation": 5},
        "conflicts": 1,
        "damaged": {"train": 8, "validation": 3},
        "writing": {"train": {"latin": 131}, "validation": {"latin": 23}, "test": {"latin": 10}},
    }
    assert "Leak: 5 of 23 rows of validation are in train too" in page.titles
    assert "Leak: 1 of 10 rows of test are in train too" in page.titles
    assert "Duplicates: 3 of 131 rows of train repeat an earlier one" in page.titles
    assert "Conflicts: 1 text(s) have several labels" in page.titles
    for entry in load(hostile / "provenance.json")["data"].values():
        assert entry["sha256"] in page.text
    assert len(metrics["training_loss"]) == 8
    assert metrics["training_loss"][0].keys() == {"epoch", "step", "loss"}
    assert load(hostile / "provenance.json")["machine"]["threads"] == 1


def test_the_hardest_examples(hostile: Path) -> None:
    """The labels that are wrong on purpose, by falling score, with what `/explanations` would say."""
    engine, rows = Engine(hostile), rows_of(hostile / "validation.jsonl")
    found = mistakes.hardest(engine, rows, evaluation.predict(engine, rows))
    assert found is not None
    assert len(found) == 3
    assert {mistake.title for mistake in found} == {"<b>rain</b>, taken for sun"}
    scores = [mistake.scores["sun"] for mistake in found]
    assert scores == sorted(scores, reverse=True)
    for mistake in found:
        [words] = mistake.texts
        text = "".join(word.text for word in words)
        [row] = [row for row in rows if row["inputs"] == text]
        [result] = engine.predict([Request([text], {"top_k": 1}, explain=True)])
        assert isinstance(result, Result)
        [answer] = result.predictions[0]["explanations"]  # type: ignore[index]
        assert [(word.text, word.score) for word in words if word.score is not None] == [
            (word["word"], word["score"]) for word in answer["attributions"]
        ]
        assert sum(mistake.scores.values()) == pytest.approx(1)
        assert mistake.most == max(abs(word["score"]) for word in answer["attributions"])
        assert row["target"] == "<b>rain</b>"
    page = Page(hostile / "report.html")
    assert page.tags["mark"] == 2 + sum(word.score is not None for m in found for word in m.texts[0])
    [first, *_] = [attrs["title"] for tag, attrs in page.attributes if tag == "mark" and "title" in attrs]
    assert first == f"{next(word.score for word in found[0].texts[0] if word.score is not None):+.3f}"


def hardest(engine: Engine, examples: list[dict[str, Any]], predictions: list[Any] | None = None) -> list[Mistake]:
    """The hardest examples, by the engine's own predictions or by others."""
    found = mistakes.hardest(engine, examples, predictions or evaluation.predict(engine, examples))
    assert found is not None
    return found


def test_a_text_behind_the_last_word_that_is_seen_is_left_out(hostile: Path) -> None:
    engine, text = Engine(hostile), "warm " * 100
    example = {"inputs": text, "parameters": {"overflow": "truncate"}, "target": "<b>rain</b>"}
    [mistake] = hardest(engine, [example])
    shown = "".join(word.text for word in mistake.texts[0])
    assert re.fullmatch(r"(warm ){40,62}warm …", shown)


def test_the_words_of_a_pair_are_in_its_two_texts(hostile: Path) -> None:
    engine = Engine(hostile)
    example = {"inputs": {"text": "warm day 1", "text_pair": "warm  night"}, "parameters": {}, "target": "<b>rain</b>"}
    [mistake] = hardest(engine, [example])
    assert [[word.text for word in words] for words in mistake.texts] == [
        ["", "warm", " ", "day", " ", "1"],
        ["", "warm", "  ", "night"],
    ]
    assert [word.score is not None for word in mistake.texts[1]] == [False, True, False, True]


def test_calibration_in_the_page_is_that_of_the_scores(hostile: Path) -> None:
    engine, rows = Engine(hostile), rows_of(hostile / "validation.jsonl")
    labels = load(hostile / "metrics.json")["labels"]
    scores = evaluation.score_table(evaluation.predict(engine, rows), labels)
    targets = np.array([labels.index(row["target"]) for row in rows])
    error = calibration.expected_error(calibration.reliability(scores, targets))
    temperature = engine.settings.options["temperature"]
    raw = calibration.tempered(scores, 1 / temperature)
    without = calibration.expected_error(calibration.reliability(raw, targets))
    text = Page(hostile / "report.html").text
    assert f"ECE without temperature {temperature:.3f}" in text
    assert re.search(rf"validation[\d.]+{error:.4f}{without:.4f}\n", text)
    assert "It is applied" in text
    assert load(hostile / "metrics.json")["splits"]["validation"]["ece"] == pytest.approx(error)
    # The temperature is what the unscaled scores ask for.
    assert calibration.fit_temperature(raw, targets) == pytest.approx(temperature, rel=0.01)


def test_thresholds_of_several_labels(train: Train) -> None:
    every = {"sun": ("warm", 2), "rain": ("wet", 3), "fog": ("grey", 7)}
    seen = [[word for word, (_, days) in every.items() if day % days == 0] for day in range(160)]
    rows = [
        (f"{' and '.join(words) or 'night'} {i}", [every[word][0] for word in words]) for i, words in enumerate(seen)
    ]
    place = train(train=rows[:120], validation=rows[120:], steps=40)
    page = Page(place / "report.html")
    check(page)
    assert "Thresholds" in page.titles
    assert "Calibration" not in page.titles
    assert "Hardest examples" in page.titles
    chosen = load(place / "metrics.json")["settings"]["options"]["thresholds"]
    for label, count in (("warm", 20), ("wet", 14), ("grey", 5)):
        assert f"{label}: {count} rows, threshold {chosen[label]:.2f}" in page.text
    # A label too many is as wrong as its score is far above its threshold, one too few as it is below.
    [text] = [text for text, labels in rows if labels == ["warm"]][:1]
    example = {"inputs": text, "parameters": {}, "target": ["grey"]}
    prediction = [{"label": "warm", "score": 0.95}, {"label": "grey", "score": 0.01}, {"label": "wet", "score": 0.0}]
    wrong = hardest(Engine(place), [example], [prediction])
    assert {mistake.title: mistake.scores for mistake in wrong} == {
        "warm, which is not there": {"warm": 0.95},
        "grey, missed": {"grey": 0.01},
    }
    off = {
        "warm, which is not there": (0.95 - chosen["warm"]) / (1 - chosen["warm"]),
        "grey, missed": 1 - 0.01 / chosen["grey"],
    }
    assert [mistake.title for mistake in wrong] == sorted(off, key=lambda title: -off[title])
    assert all(mistake.most > 0 for mistake in wrong)
    # One point of the curves against scikit-learn's figures.
    engine = Engine(place)
    asked = [{"inputs": text} for text, _ in rows[120:]]
    scores = evaluation.score_table(evaluation.predict(engine, asked), ["warm"])[:, 0]
    targets = np.array(["warm" in labels for _, labels in rows[120:]])
    drawn = page.source[: page.source.index("warm: 20 rows, threshold", page.source.index("</svg><figcaption>warm"))]
    polylines = re.findall(r'<polyline class="line(\d)" points="([^"]+)"/>', drawn)[-3:]
    for (number, points), figure in zip(polylines, (precision_score, recall_score, f1_score), strict=True):
        across, down = points.split()[0].split(",")
        threshold = 0.02
        assert float(across) == pytest.approx(44 + threshold * 306, abs=0.06), number
        assert float(down) == pytest.approx(178 - 154 * figure(targets, scores >= threshold), abs=0.06), number


def test_many_labels_are_shown_by_the_most_confused_pairs(train: Train) -> None:
    rows = [(f"word{i % 22} number {i}", f"label{i % 22:02}") for i in range(88)]
    place = train(train=rows[:66], validation=rows[66:], steps=2)
    page, scores = Page(place / "report.html"), load(place / "metrics.json")["splits"]["validation"]
    check(page)
    assert "Most confused labels, validation; the whole confusion matrix is in metrics.json" in page.text
    matrix = np.array(scores["confusion_matrix"])
    np.fill_diagonal(matrix, 0)
    true, found = np.unravel_index(matrix.argmax(), matrix.shape)
    assert f"label{true:02}label{found:02}{matrix.max()}\n" in page.text


def test_a_model_that_is_right_throughout_has_no_hardest_examples(tiny_bundle: Path) -> None:
    page = Page(tiny_bundle / "report.html")
    check(page)
    assert "None: every answer to a validation example is right." in page.text
    assert "None: no row repeats another, within or between the splits." in page.text
    assert "taken from the training data" in page.text


def test_a_model_that_is_bundled_as_it_is(hostile: Path, tmp_path: Path) -> None:
    """With rows to measure it by, and without any."""
    (tmp_path / "few.csv").write_text("text,label\nwarm day,sun\ncold day,<b>rain</b>\n")
    for options in (("--test-file", tmp_path / "few.csv"), ()):
        place = tmp_path / f"bundle{len(options)}"
        train_here("--base-model", hostile, "--output-dir", place, *options)
        page = Page(place / "report.html")
        check(page)
        assert ("Calibration" in page.titles) == bool(options)
        assert not re.search("ECE with(out)? temperature", page.text), "there is no validation to fit one to"
        assert "Hardest examples" not in page.titles
        assert "Learning curves" not in page.titles


def test_the_same_run_gives_the_same_page_but_for_its_seconds(train: Train) -> None:
    splits = {"train": weather(20), "validation": weather(10, 20)}
    pages = []
    for place in (train(**splits), train(**splits)):
        source = (place / "report.html").read_text(encoding="utf-8")
        source = source.replace(str(place.parent), "FOLDER")
        pages.append(re.sub(r"in \d+ s\n\([\d.]+ samples/s\)", "", source))
    assert pages[0] == pages[1]


def test_a_leak_is_said_while_there_is_time_to_stop(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    train(train=weather(20), validation=weather(10, 20), test=weather(4, 19), steps=1)
    said = capsys.readouterr().out
    assert "the data is not clean: 1 row(s) of test are in train; 3 row(s) of test are in validation; report" in said
    assert said.index("not clean") < said.index("from scratch for 1 steps")


def test_strict_stops_at_what_is_not_clean(train: Train) -> None:
    with pytest.raises(UserError, match=r"--strict: 1 row\(s\) of test are in train; mend the data"):
        train("--strict", train=weather(20), validation=weather(10, 20), test=weather(1, 19), steps=1)
    long = [(f"{text} {'and on ' * 40}", label) for text, label in weather(20)]
    with pytest.raises(UserError, match=r"--strict: 20 row\(s\) of train have more than 64 tokens"):
        train("--strict", train=long, validation=weather(10, 20), steps=1)
    assert train("--strict", train=weather(20), validation=weather(10, 20), steps=1).is_dir()


# --- The model card --------------------------------------------------------------------------------------------------


def test_the_model_index_has_every_figure_of_every_split(hostile: Path) -> None:
    card = ModelCard.load(hostile / "README.md")
    splits = load(hostile / "metrics.json")["splits"]
    names = {"accuracy": "accuracy", "macro_f1": "f1", "ece": "ece"}
    assert {(r.dataset_split, r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results or []} == {
        (split, f"{split}.jsonl", names[key]): round(scores[key], 6)
        for split, scores in splits.items()
        for key in names
    }
    assert card.data.to_dict()["model-index"][0]["name"] == "bundle"
    assert card.data.pipeline_tag == "text-classification"


# --- Two bundles -----------------------------------------------------------------------------------------------------


def test_mcnemar_by_hand() -> None:
    ours = np.array([True] * 10 + [True] * 2 + [False] * 8 + [False] * 3)
    theirs = np.array([True] * 10 + [False] * 2 + [True] * 8 + [False] * 3)
    alone, others, chance = compare.mcnemar(ours, theirs)
    assert (alone, others) == (2, 8)
    # Both tails of ten throws of a coin: (1 + 10 + 45) / 1024 each.
    assert chance == pytest.approx(2 * 56 / 1024)
    assert compare.mcnemar(ours, ours) == (0, 0, 1.0)


def test_what_counts_as_right() -> None:
    labels = ["a", "b"]
    single = compare.judge([[{"label": "a"}, {"label": "b"}], [{"label": "a"}, {"label": "b"}]], ["a", "b"], labels)
    assert single.right.tolist() == [True, False]
    assert single.label_f1().tolist() == pytest.approx([2 / 3, 0])
    several = compare.judge([[{"label": "b"}, {"label": "a"}], [{"label": "a"}], []], [["a", "b"], ["b"], []], labels)
    assert several.right.tolist() == [True, False, True]
    assert several.micro_f1() == pytest.approx(2 * 2 / (3 + 3))
    here, there = {"entity_group": "a", "start": 0, "end": 3}, {"entity_group": "a", "start": 4, "end": 7}
    entities = compare.judge([[{**here, "score": 0.5, "word": "Ada"}, there]], [[here]], labels)
    assert entities.right.tolist() == [False]
    assert entities.micro_f1() == pytest.approx(2 / 3)


def test_the_bootstrap_holds_what_is_there() -> None:
    targets = ["a", "b"] * 50
    right = [[{"label": target}] for target in targets]
    better = compare.judge(right, targets, ["a", "b"])
    worse = compare.judge([right[0]] * 30 + right[30:], targets, ["a", "b"])
    gain, low, high = compare.bootstrap(worse, better, micro=False)
    expected = 1 - f1_score(targets, ["a"] * 30 + targets[30:], average="macro")
    assert gain == pytest.approx(expected)
    assert 0 < low < gain < high
    assert compare.bootstrap(worse, worse, micro=True) == (0, 0, 0)


@pytest.fixture(scope="module")
def pair(train: Train) -> tuple[Path, Path]:
    """A model of one step and one that has learnt, with the same splits."""
    splits = {"train": weather(120), "validation": weather(30, 120), "test": weather(10, 150)}
    return train(**splits, steps=1), train(**splits, steps=80)


def test_two_classifiers_side_by_side(pair: tuple[Path, Path]) -> None:
    before, after = (load(place / "metrics.json")["splits"] for place in pair)
    assert after["validation"]["accuracy"] == 1 > before["validation"]["accuracy"]
    rows = [line.split() for line in compare.compare(*pair).split("\n")]
    for split in ("validation", "test"):
        ours, theirs = before[split]["accuracy"], after[split]["accuracy"]
        assert ["accuracy", f"{ours:.4f}", f"{theirs:.4f}", f"{theirs - ours:+.4f}"] in rows
    wrong = round(30 * (1 - before["validation"]["accuracy"]))
    text = " ".join(" ".join(row) for row in rows)
    assert (
        f"both {30 - wrong}, A alone 0, B alone {wrong}, neither 0; McNemar's exact test: p = {2 * 0.5**wrong:.4g}"
        in text
    )
    gain = after["validation"]["macro_f1"] - before["validation"]["macro_f1"]
    assert f"macro-F1: B - A = {gain:+.4f}, 95 % interval +" in text
    assert "F1 is higher in B: 2 labels A B B - A" in text
    assert "F1 is lower in B: 0 labels" in text
    assert f"right in B alone: {wrong} rows" in text
    assert text.endswith("right in A alone: 0 rows")
    assert len([row for row in rows if row[:1] == ["true:"]]) == min(wrong, 10)


def test_the_command(pair: tuple[Path, Path]) -> None:
    assert succeeded(run(sys.executable, "-m", "training.compare", *pair)) == compare.compare(*pair) + "\n"
    done = run(sys.executable, "-m", "training.compare", pair[0], pair[0].parent)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"training\.compare: .+: this is no bundle of train\.py: .+\n", done.stderr)


def test_a_comparison_that_is_interrupted_says_nothing(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "predict", interrupt)
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, pair)])
    monkeypatch.delitem(sys.modules, "training.compare")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("training.compare", run_name="__main__")
    assert (ended.value.code, *capsys.readouterr()) == (130, "", "")


def test_entities_side_by_side(tmp_path: Path) -> None:
    rows = [
        {"tokens": ["Ada", "saw", "Rome", str(i)], "ner_tags": ["B-person", "O", "B-place", "O"]} for i in range(40)
    ]
    for name, chosen in (("train", rows[:30]), ("validation", rows[30:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    files = ("--train-file", tmp_path / "train.jsonl", "--validation-file", tmp_path / "validation.jsonl")
    places = [tmp_path / "one", tmp_path / "two"]
    for place, steps in zip(places, (1, 60), strict=True):
        given = ("--from-scratch", SPEC, "--max-steps", steps, "--learning-rate", 1e-2, "--bf16", "false")
        train_here("--task", "token-classification", *files, "--output-dir", place, *given, *NO_CHECKPOINTS)
        check(Page(place / "report.html"))
    scores = [load(place / "metrics.json")["splits"]["validation"] for place in places]
    assert scores[1]["f1"] == 1
    text = compare.compare(*places)
    assert f"micro-F1: B - A = {1 - scores[0]['f1']:+.4f}" in text
    assert "right in B alone: 10 rows" in text
    assert "true: Ada (person), Rome (place); A: " in text
    assert "; B: Ada (person), Rome (place)" in text
    matrices = [np.array(score["entity_confusion"]["confusion_matrix"]) for score in scores]
    assert matrices[1].tolist() == [[10, 0, 0], [0, 10, 0], [0, 0, 0]]
    figures = re.search(
        r"entities missed +(\d+) +0\n.*there is none +(\d+) +0\nentities of another type +(\d+) +0\n", text
    )
    assert figures is not None
    other_types = matrices[0][0, 1] + matrices[0][1, 0]
    assert list(map(int, figures.groups())) == [matrices[0][:2, 2].sum(), matrices[0][2].sum(), other_types]

    page = Page(places[1] / "report.html")
    assert "Confusion of entities, validation: rows are true labels, columns predicted" in page.text
    assert "None: every answer to a validation example is right." in page.text
    engine = Engine(places[1])
    example = rows_of(places[1] / "validation.jsonl")[0]
    assert example["inputs"].startswith("Ada saw Rome")
    ada = {"entity_group": "place", "score": 0.9, "word": "ada", "start": 0, "end": 3}
    saw = {"entity_group": "person", "score": 0.8, "word": "saw", "start": 4, "end": 7}
    found = hardest(engine, [example], [[ada, saw]])
    assert [mistake.title for mistake in found if mistake.scores.get("no entity") is None] == [
        "person (Ada), taken for place (Ada)",
        "person, where there is no entity: saw",
    ]
    [missed] = [mistake for mistake in found if "no entity" in mistake.scores]
    assert missed.title == "place, missed: Rome"
    assert [word.text for word in missed.texts[0] if word.marked] == ["Rome"]
    assert "".join(word.text for word in missed.texts[0]) == example["inputs"]
    # What the engine itself finds is explained.
    [right] = [e for e in evaluation.predict(engine, [example])[0] if e["start"] == 0]
    [mistake] = hardest(engine, [{**example, "target": example["target"][1:]}], [[right, example["target"][1]]])
    assert mistake.title == "person, where there is no entity: Ada"
    assert [(word.text, word.marked) for word in mistake.texts[0] if word.score is not None][:2] == [
        ("Ada", True),
        ("saw", False),
    ]


def test_the_confusion_of_entities_by_hand() -> None:
    def entity(kind: str, start: int, end: int) -> dict[str, Any]:
        return {"entity_group": kind, "start": start, "end": end}

    expected = [[entity("a", 0, 3), entity("a", 5, 9)], [entity("b", 0, 4), entity("b", 6, 8)], []]
    found = [[entity("a", 0, 3), entity("a", 6, 9)], [entity("a", 0, 1), entity("b", 1, 4)], [entity("a", 2, 4)]]
    assert evaluation.entity_confusion(expected, found, ["a", "b"]) == {
        "labels": ["a", "b", "O"],
        "confusion_matrix": [[2, 0, 0], [0, 1, 1], [1, 0, 0]],
        "other_borders": 2,
    }


def test_what_is_not_compared(pair: tuple[Path, Path], hostile: Path, train: Train, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="have different labels: just one of them has '<b>rain</b>', 'rain'"):
        compare.compare(pair[0], hostile)
    other = train(train=weather(120), validation=weather(30, 121), steps=1)
    with pytest.raises(UserError, match=r"different validation rows \(29 in both\)"):
        compare.compare(pair[0], other)
    entities = tmp_path / "entities"
    shutil.copytree(pair[0], entities)
    (entities / "metrics.json").write_text(json.dumps({**load(entities / "metrics.json"), "task": compare.TASKS[1]}))
    with pytest.raises(UserError, match="different tasks: text-classification and token-classification"):
        compare.compare(pair[0], entities)
    numbers = train(train=[(f"day {i}", i + 0.5) for i in range(20)], steps=1)
    with pytest.raises(UserError, match="a regression is neither right nor wrong"):
        compare.compare(numbers, numbers)
    copy = tmp_path / "copy"
    shutil.copytree(pair[0], copy)
    (copy / "validation.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no validation rows"):
        compare.compare(copy, pair[0])
    (copy / "metrics.json").write_text(json.dumps({**load(copy / "metrics.json"), "task": "fill-mask"}))
    with pytest.raises(
        UserError, match="bundles of fill-mask are not compared; those of text-classification and token"
    ):
        compare.compare(pair[0], copy)


def test_rows_in_another_order_are_the_same_rows(pair: tuple[Path, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(pair[1], copy)
    lines = (copy / "validation.jsonl").read_text().splitlines(keepends=True)
    (copy / "validation.jsonl").write_text("".join(reversed(lines)))
    assert compare.compare(pair[0], copy) == compare.compare(*pair).replace(str(pair[1]), str(copy))


def test_nothing_that_a_terminal_obeys_is_printed(train: Train) -> None:
    rows = [(f"{('warm', 'cold')[i % 2]} \x1b[2J\nday {i}", "sun\x1b[1m" if i % 2 else "rain") for i in range(140)]
    text = compare.compare(*(train(train=rows[:120], validation=rows[120:], steps=steps) for steps in (1, 80)))
    assert all(line.isprintable() for line in text.split("\n"))
    assert "\ufffd[2J day" in text
