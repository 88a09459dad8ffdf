"""Explanations: occlusion and integrated gradients equal to what transformers and captum give for the same weights."""

import io
import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from captum.attr import IntegratedGradients, LayerIntegratedGradients
from PIL import Image
from test_formats import JSON, rest
from test_service import context, serve
from text_models import FAMILIES, converted, labelled, real_texts, write

from benchmarks import explanations
from handler.engine import Engine
from handler.errors import (
    InternalError,
    InvalidInput,
    InvalidParameter,
    NotSupported,
    Overloaded,
    RequestError,
    TooLarge,
)
from handler.messages import Request, Result
from handler.service import Service
from training import bundle, scratch

CLASSIFIER = transformers.AutoModelForSequenceClassification
TAGGER = transformers.AutoModelForTokenClassification
READER = transformers.AutoModelForQuestionAnswering
LABELS = ("no", "so", "yes")
ENTITIES = ("O", "B-person", "I-person", "B-group")
PAIR = {"text": "Nobody came to the party.", "text_pair": "The party was empty, wasn't it?"}
QUESTION = {"question": "Who wrote to Charles?", "context": "Ada Lovelace wrote to Charles, and he answered her twice."}
STEPS = 16


@pytest.fixture(scope="module")
def texts(shared: Path) -> list[str]:
    return real_texts(shared, 12)


@pytest.fixture(scope="module")
def models(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A bundle of a family for a task, made once."""
    place, made = tmp_path_factory.mktemp("models"), {}

    def make(family: str, task: str) -> Path:
        if (family, task) not in made:
            folder = place / f"{family}-{task}"
            if task == "text-classification":
                golden: list[Any] = [*texts[::6], PAIR]
                made[family, task] = write(folder, family, CLASSIFIER, task, golden, **labelled(*LABELS))
            elif task == "token-classification":
                made[family, task] = write(folder, family, TAGGER, task, texts[::6], **labelled(*ENTITIES))
            else:
                made[family, task] = write(folder, family, READER, task, [QUESTION])
        return made[family, task]

    return make


def explained(engine: Engine, value: Any, **parameters: Any) -> dict[str, Any]:
    """The explanation of one input."""
    [result] = engine.predict([Request([value], parameters, explain=True)])
    assert isinstance(result, Result)
    assert result.explains, result
    assert json.loads(json.dumps(result.predictions))
    return result.predictions[0]


def refusal(engine: Engine, value: Any, **parameters: Any) -> RequestError:
    [outcome] = engine.predict([Request([value], parameters, explain=True)])
    assert isinstance(outcome, RequestError)
    return outcome


def scores(explanation: dict[str, Any]) -> list[float]:
    return [word["score"] for word in explanation["attributions"]]


class Reference:
    """The model by transformers, with its own tokenizer: one row at a time."""

    def __init__(self, folder: Path, auto_model: Any) -> None:
        self.model = auto_model.from_pretrained(folder).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def encode(self, *texts: str) -> Any:
        return self.tokenizer(*texts, return_tensors="pt", truncation=True, max_length=64)

    def neutral(self) -> int:
        """What stands for a hidden token: the mask, or, for a model without, a space."""
        if self.tokenizer.mask_token_id is not None:
            return int(self.tokenizer.mask_token_id)
        return int(self.tokenizer(" ")["input_ids"][0])

    def words(self, encoding: Any) -> list[list[int]]:
        """The positions of each word, in order, of both texts of a pair."""
        found: dict[tuple[int, int], list[int]] = {}
        keys = zip(encoding.sequence_ids(0), encoding.word_ids(0), strict=True)
        for position, (field, word) in enumerate(keys):
            if field is not None:
                found.setdefault((field, word), []).append(position)
        return [found[key] for key in sorted(found)]

    def hidden(self, encoding: Any, positions: Sequence[int], *, attended: bool = False) -> Any:
        changed = transformers.BatchEncoding({name: tensor.clone() for name, tensor in encoding.items()})
        changed["input_ids"][0, list(positions)] = self.neutral()
        if not attended:
            changed["attention_mask"][0, [position for position in positions if position]] = 0
        return changed

    def occlusion(self, encoding: Any, number: Callable[[Any], torch.Tensor]) -> list[float]:
        """By how much the number falls without each word."""
        with torch.no_grad():
            whole = number(self.model(**encoding))
            return [float(whole - number(self.model(**self.hidden(encoding, word)))) for word in self.words(encoding)]

    def gradients(self, encoding: Any, number: Callable[[Any], torch.Tensor]) -> tuple[list[float], float]:
        """Captum's integrated gradients of each word, and by how much their sum is off."""
        words = self.words(encoding)
        baseline = self.hidden(encoding, [position for word in words for position in word], attended=True)
        rest = {name: tensor for name, tensor in encoding.items() if name != "input_ids"}

        def forward(ids: torch.Tensor) -> torch.Tensor:
            beside = {name: tensor.expand(len(ids), -1) for name, tensor in rest.items()}
            return number(self.model(input_ids=ids, **beside))

        method = LayerIntegratedGradients(forward, self.model.get_input_embeddings())
        found, delta = method.attribute(
            encoding["input_ids"], baseline["input_ids"], n_steps=STEPS, return_convergence_delta=True
        )
        each = found.sum(-1)[0]
        return [float(each[word].sum()) for word in words], float(delta)


def logit(index: int) -> Callable[[Any], torch.Tensor]:
    return lambda outputs: outputs.logits[:, index]


# --- Equal to the reference -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_and_pairs_of_every_family(family: str, texts: list[str], models: Callable[[str, str], Path]) -> None:
    folder = models(family, "text-classification")
    reference, engine = Reference(folder, CLASSIFIER), Engine(folder)
    for value in (*texts[:6], PAIR):
        encoding = reference.encode(*(value.values() if isinstance(value, dict) else [value]))
        by_hiding = explained(engine, value)
        by_gradients = explained(engine, value, method="integrated_gradients", steps=STEPS)
        assert [entry["label"] for entry in by_hiding["explanations"]] == [
            entry["label"] for entry in by_hiding["prediction"]
        ]
        for one, other in zip(by_hiding["explanations"], by_gradients["explanations"], strict=True):
            number = logit(LABELS.index(one["label"]))
            assert one["value"] == pytest.approx(number(reference.model(**encoding)).item(), abs=1e-4)
            assert scores(one) == pytest.approx(reference.occlusion(encoding, number), abs=1e-4)
            expected, delta = reference.gradients(encoding, number)
            assert scores(other) == pytest.approx(expected, abs=1e-5)
            assert other["convergence_delta"] == pytest.approx(delta, abs=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_entities(family: str, texts: list[str], models: Callable[[str, str], Path]) -> None:
    folder = models(family, "token-classification")
    reference, engine = Reference(folder, TAGGER), Engine(folder)
    checked = 0
    for text in texts[:6]:
        encoding = reference.encode(text)
        found = explained(engine, text, aggregation_strategy="simple")
        gradients = explained(engine, text, aggregation_strategy="simple", method="integrated_gradients", steps=STEPS)
        offsets = [encoding.token_to_chars(at) for at in range(encoding["input_ids"].shape[1])]
        logits = reference.model(**encoding).logits[0]
        for one, other in zip(found["explanations"][:2], gradients["explanations"][:2], strict=True):
            places = [
                at for at, span in enumerate(offsets) if span and one["start"] <= span.start and span.end <= one["end"]
            ]
            kinds = [index for index, label in enumerate(ENTITIES) if label.endswith(one["entity_group"])]
            best = [kinds[int(logits[at, kinds].argmax())] for at in places]

            def number(outputs: Any, places: list[int] = places, best: list[int] = best) -> torch.Tensor:
                return outputs.logits[:, places, best].mean(1)

            assert scores(one) == pytest.approx(reference.occlusion(encoding, number), abs=1e-4)
            expected, _ = reference.gradients(encoding, number)
            assert scores(other) == pytest.approx(expected, abs=1e-5)
            checked += 1
    assert checked >= 6


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_answers_to_questions(family: str, models: Callable[[str, str], Path]) -> None:
    folder = models(family, "question-answering")
    reference, engine = Reference(folder, READER), Engine(folder)
    encoding = reference.encode(*QUESTION.values())
    outputs = reference.model(**encoding)
    context_tokens = [at for at, field in enumerate(encoding.sequence_ids(0)) if field == 1]
    for parameters in ({}, {"top_k": 3}, {"handle_impossible_answer": True, "top_k": 30, "max_answer_len": 1}):
        found = explained(engine, QUESTION, align_to_words=False, **parameters)
        gradients = explained(
            engine, QUESTION, align_to_words=False, method="integrated_gradients", steps=STEPS, **parameters
        )
        answers = found["prediction"] if isinstance(found["prediction"], list) else [found["prediction"]]
        for answer, one, other in zip(answers, found["explanations"], gradients["explanations"], strict=False):
            assert {name: one[name] for name in answer} == answer
            begin, end = 0, 0
            if answer["answer"]:
                spans = {at: encoding.token_to_chars(at) for at in context_tokens}
                begin = next(at for at in context_tokens if spans[at].start == answer["start"])
                end = next(at for at in context_tokens if spans[at].end == answer["end"] and at >= begin)

            def number(given: Any, begin: int = begin, end: int = end) -> torch.Tensor:
                return given.start_logits[:, begin] + given.end_logits[:, end]

            assert one["value"] == pytest.approx(number(outputs).item(), abs=1e-4)
            assert scores(one) == pytest.approx(reference.occlusion(encoding, number), abs=1e-4)
            expected, _ = reference.gradients(encoding, number)
            assert scores(other) == pytest.approx(expected, abs=1e-5)
    assert any(entry["answer"] == "" for entry in found["prediction"])


def test_every_backend_hides_words_alike(texts: list[str], models: Callable[[str, str], Path]) -> None:
    folder = models("bert", "text-classification")
    torch_engine, openvino_engine = Engine(folder), Engine(converted(folder))
    for text in texts[:6]:
        one, other = explained(torch_engine, text), explained(openvino_engine, text)
        for left, right in zip(one["explanations"], other["explanations"], strict=True):
            assert scores(left) == pytest.approx(scores(right), abs=1e-3)
    refused = refusal(openvino_engine, texts[0], method="integrated_gradients")
    assert isinstance(refused, InvalidParameter)
    assert "--backend torch" in str(refused)


# --- What an answer says --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_words_lie_where_they_are_said_to(family: str, texts: list[str], models: Callable[[str, str], Path]) -> None:
    engine = Engine(models(family, "text-classification"))
    for text in [*texts[:8], "  two  spaces\tand a 漢字 é\u0301 😀 end ", "don't-stop"]:
        words = explained(engine, text)["explanations"][0]["attributions"]
        assert words
        assert all(text[word["start"] : word["end"]] == word["word"] == word["word"].strip() for word in words)
        assert [word["start"] for word in words] == sorted(word["start"] for word in words)
    pair = explained(engine, PAIR)["explanations"][0]["attributions"]
    given = list(PAIR.values())
    assert {word["text"] for word in pair} == {0, 1}
    assert all(given[word["text"]][word["start"] : word["end"]] == word["word"] for word in pair)


@pytest.mark.parametrize("method", ["occlusion", "integrated_gradients"])
def test_long_texts(method: str, texts: list[str], models: Callable[[str, str], Path]) -> None:
    """Windows add up to the text's own number; what they share is one word with the sum of both."""
    folder = models("bert", "text-classification")
    text = " ".join(texts)[:2500]
    engine = Engine(folder, overflow="window", max_tokens=200_000, max_explanation_tokens=100_000)
    found = explained(engine, text, method=method)["explanations"][0]
    words = found["attributions"]
    assert all(text[word["start"] : word["end"]] == word["word"] for word in words)
    assert all(one["end"] <= other["start"] for one, other in pairwise(words))
    assert len(words) > 300
    if method == "integrated_gradients":
        # The number less that of the text hidden as a whole.
        windows = engine.task.inputs.encode([text])[0].rows  # type: ignore[attr-defined]
        reference = Reference(folder, CLASSIFIER)
        lengths = np.array([len(row) for row in windows])
        hidden = []
        for row in windows:
            ids = [
                reference.neutral() if field is not None else token
                for token, field in zip(row.ids, row.sequence_ids, strict=True)
            ]
            outputs = reference.model(torch.tensor([ids]))
            hidden.append(float(outputs.logits[0, LABELS.index(found["label"])]))
        baseline = float(lengths / lengths.sum() @ np.array(hidden))
        assert sum(scores(found)) == pytest.approx(found["value"] - baseline + found["convergence_delta"], abs=1e-3)
    short = explained(Engine(folder, overflow="window", max_explanation_tokens=2000), text, method="occlusion")
    runs = short["explanations"][0]["attributions"]
    assert len(runs) < len(words) / 5
    assert "".join("".join(run["word"] for run in runs).split()) == "".join("".join(w["word"] for w in words).split())


def test_no_answer_no_explanation(texts: list[str], models: Callable[[str, str], Path]) -> None:
    engine = Engine(models("bert", "text-classification"))
    found = explained(engine, texts[0], threshold=1.0)
    assert found == {"method": "occlusion", "prediction": [], "explanations": []}
    tagger = Engine(models("bert", "token-classification"))
    assert explained(tagger, texts[0], ignore_labels=list(ENTITIES))["explanations"] == []


@pytest.mark.parametrize("size", [{"height": 28, "width": 28}, {"shortest_edge": 32}])
def test_images(size: dict[str, int], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    spec = (
        "vit hidden_size=16 num_hidden_layers=2 num_attention_heads=2 intermediate_size=32 image_size=28 patch_size=7"
    )
    config = transformers.ViTConfig(**scratch.parse_spec(spec).sizes, num_channels=3, **labelled(*LABELS))
    config.initializer_range = 0.3
    transformers.set_seed(2)
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(folder)
    square = "height" in size
    processor = transformers.ViTImageProcessor(
        size=size, do_center_crop=not square, **({} if square else {"crop_size": {"height": 28, "width": 28}})
    )
    processor.save_pretrained(folder)
    saved = json.loads((folder / "preprocessor_config.json").read_text())
    saved |= {"do_resize": True, "do_rescale": True, "do_normalize": True}
    if not square:
        saved |= {"do_center_crop": True, "crop_size": {"height": 28, "width": 28}, "size": size}
        saved["image_processor_type"] = "BitImageProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(saved))
    bundle.write_model_config(folder, "image-classification", {"threads": 1})
    engine = Engine(folder)
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (40, 60, 3)).astype(np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")

    found = explained(engine, buffer.getvalue(), top_k=2)
    task: Any = engine.task
    [row] = task.inputs.encode([task.read(buffer.getvalue(), None)[0]])[0].rows
    pixels = task.inputs.collate([row])["pixel_values"]
    grid = np.array(found["explanations"][0]["heat_map"])
    assert len(found["explanations"]) == 2
    assert grid.shape == (14, 14)
    # One square of 2 x 2 pixels, in the image's mean colour.
    hidden = row.pixels.copy()
    hidden[:, 6:8, 10:12] = row.pixels.mean(axis=(1, 2), keepdims=True).astype(np.uint8)
    label = LABELS.index(found["explanations"][0]["label"])
    values = engine.task.inputs.processor.normalise(np.stack([row.pixels, hidden]))  # type: ignore[attr-defined]
    with torch.no_grad():
        whole, without = model(torch.from_numpy(values)).logits[:, label].tolist()
    assert grid[3, 5] == pytest.approx(whole - without, abs=1e-4)
    box = found["explanations"][0]["box"]
    if square:
        assert box == {"xmin": 0, "ymin": 0, "xmax": 60, "ymax": 40}
    else:  # 60 x 40 becomes 48 x 32, of which the middle 28 x 28 are seen
        assert box == pytest.approx({"xmin": 12.5, "ymin": 2.5, "xmax": 47.5, "ymax": 37.5})

    gradients = explained(engine, buffer.getvalue(), method="integrated_gradients", steps=STEPS)["explanations"][0]
    mean = np.broadcast_to(row.pixels.mean(axis=(1, 2), keepdims=True).astype(np.uint8), row.pixels.shape)
    baseline = torch.from_numpy(engine.task.inputs.processor.normalise(mean[None]))  # type: ignore[attr-defined]
    method = IntegratedGradients(lambda values: model(values).logits[:, LABELS.index(gradients["label"])])
    expected, delta = method.attribute(torch.from_numpy(pixels), baseline, n_steps=STEPS, return_convergence_delta=True)
    squares = expected[0].sum(0).reshape(14, 2, 14, 2).sum((1, 3)).detach().numpy()
    assert np.abs(squares - np.array(gradients["heat_map"])).max() < 1e-5
    assert gradients["convergence_delta"] == pytest.approx(float(delta), abs=1e-5)


# --- Batches, limits, bad input -------------------------------------------------------------------------------------


def test_a_batch_of_everything(texts: list[str], models: Callable[[str, str], Path]) -> None:
    """Predictions and explanations of both kinds, lists and bad ones among them: each as if it were alone."""
    engine = Engine(models("roberta", "text-classification"))
    gradients = {"method": "integrated_gradients", "steps": 8}
    requests = [
        Request([texts[0]], {}),
        Request([texts[1]], {}, explain=True),
        Request([3], {}, explain=True),
        Request([texts[2], 7, texts[3], PAIR], {"top_k": 1}, many=True, explain=True),
        Request([texts[4]], gradients, explain=True),
        Request([texts[5]], {"nothing": 1}, explain=True),
        Request([texts[6], texts[7]], gradients, many=True, explain=True),
        Request([texts[8]], {"function_to_apply": "none"}),
    ]
    together = engine.predict(requests)
    assert [type(outcome).__name__ for outcome in together] == [
        *("Result", "Result", "InvalidInput", "Result", "Result", "InvalidParameter", "Result", "Result")
    ]
    assert isinstance(together[3], Result)
    assert isinstance(together[3].predictions[1], InvalidInput)
    for request, outcome in zip(requests, together, strict=True):
        [alone] = engine.predict([request])
        if isinstance(outcome, Result):
            assert isinstance(alone, Result)
            assert rounded(outcome.predictions) == rounded(alone.predictions)
            assert outcome.usage == alone.usage


def rounded(value: Any) -> Any:
    """A JSON value with its numbers as they are to three digits behind the point."""
    if isinstance(value, dict):
        return {name: rounded(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry) for entry in value]
    if isinstance(value, RequestError):
        return value.body()
    return pytest.approx(value, abs=2e-4) if isinstance(value, float) else value


def test_parameters(texts: list[str], models: Callable[[str, str], Path]) -> None:
    engine = Engine(models("bert", "text-classification"))
    for parameters, what in (
        ({"method": "shap"}, "'occlusion' or 'integrated_gradients'"),
        ({"steps": 0}, "at least 1"),
        ({"steps": 5000}, "at most 1024"),
        ({"steps": "many"}, "an integer"),
        ({"topk": 1}, "function_to_apply, method, overflow, steps, temperature, threshold, top_k"),
    ):
        refused = refusal(engine, texts[0], **parameters)
        assert isinstance(refused, InvalidParameter)
        assert what in str(refused)
    [plain] = engine.predict([Request([texts[0]], {"method": "occlusion"})])
    assert isinstance(plain, InvalidParameter), "a prediction takes no method"
    steps = Engine(models("bert", "text-classification"), max_explanation_tokens=300)
    assert explained(steps, texts[0], method="integrated_gradients")


def test_numbers_that_are_none(texts: list[str], models: Callable[[str, str], Path]) -> None:
    """Where the model breaks only for a text with a word hidden, that explanation fails and no other does."""
    engine = Engine(models("bert", "text-classification"))
    run, mask = engine.backend.run, Reference(models("bert", "text-classification"), CLASSIFIER).neutral()
    broken = engine.task.inputs.encode([texts[1]])[0].rows[0].ids[1]  # type: ignore[attr-defined]

    def breaks(batches: Any) -> Any:
        kept = list(batches)
        for arrays, outputs in zip(kept, run(kept), strict=True):
            ids = arrays["input_ids"]
            outputs["logits"][(ids[:, 1] == broken) & (ids == mask).any(axis=1)] = np.nan
            yield outputs

    engine.backend.run = breaks  # type: ignore[method-assign]
    good, bad = engine.predict([Request([text], {}, explain=True) for text in texts[:2]])
    assert isinstance(good, Result)
    assert isinstance(bad, InternalError)


def test_too_much_to_explain(texts: list[str], models: Callable[[str, str], Path]) -> None:
    engine = Engine(models("bert", "text-classification"), max_tokens=2000, max_explanation_tokens=1500)
    many = Request([" ".join(texts)[:250]] * 3, {}, many=True, explain=True)
    [refused] = engine.predict([many])
    assert isinstance(refused, TooLarge)
    assert "tokens to run" in str(refused)
    one = Request([" ".join(texts)[:250]], {}, explain=True)
    outcomes = engine.predict([one] * 12 + [Request([texts[0]])])
    assert isinstance(outcomes[0], Result)
    assert isinstance(outcomes[-1], Result)
    assert any(isinstance(outcome, Overloaded) for outcome in outcomes)
    steps = refusal(engine, texts[0], method="integrated_gradients", steps=1000)
    assert isinstance(steps, TooLarge)


def test_tasks_that_are_not_explained(texts: list[str], tmp_path: Path) -> None:
    folder = write(
        tmp_path / "pairs",
        "bert",
        CLASSIFIER,
        "zero-shot-classification",
        [],
        **labelled("contradiction", "entailment", "neutral"),
    )
    assert isinstance(refusal(Engine(folder), texts[0], candidate_labels=["a"]), NotSupported)


# --- TorchServe's side ----------------------------------------------------------------------------------------------


def test_formats(bundle: Path) -> None:
    service = Service(context(bundle))
    text = "The room was cold, the staff were warm."

    def ask(body: Any) -> Any:
        sent = rest(body, JSON)
        [answer] = serve(service, context(bundle), type(sent)(sent.parts, {**sent.headers, "explain": "True"}))
        assert answer.status == 200, answer.body
        return answer.body

    single = ask({"inputs": text})
    assert single["method"] == "occlusion"
    assert single["explanations"][0]["attributions"][0]["word"] == "The"
    assert ask({"inputs": [text, text]}) == rounded([single, single])
    details = ask({"inputs": text, "parameters": {"details": True}})
    assert details["predictions"] == rounded(single)
    assert details["model"]["task"] == "text-classification"
    assert ask({"instances": [text]})["predictions"] == rounded([single])
    tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "data": [text]}
    [output] = ask({"inputs": [tensor]})["outputs"]
    assert json.loads(output["data"][0]) == rounded(single)


def test_explanations_are_counted_apart(bundle: Path) -> None:
    service = Service(context(bundle))
    service._metrics._waiting.clear()
    sent = rest({"inputs": ["a", "b"]}, JSON)
    serve(service, context(bundle), type(sent)(sent.parts, {**sent.headers, "explain": "True"}), sent)
    totals = service._metrics._waiting
    assert totals["marble_explanations_total",] == 2
    assert sum(value for series, value in totals.items() if series[0] == "marble_predictions_total") == 2


# --- The benchmark --------------------------------------------------------------------------------------------------


def test_curves_and_their_areas(texts: list[str], models: Callable[[str, str], Path]) -> None:
    """Of a text all of whose words are shown, and hidden; and of one that an order takes apart."""
    folder = models("bert", "text-classification")
    judge, reference = explanations.Judge(folder), Reference(folder, CLASSIFIER)
    text = max(texts, key=len)[:70]
    encoding = reference.encode(text)
    words = reference.words(encoding)
    order = explanations.at_random(judge, 3)(text)
    assert sorted(order) == list(range(len(words)))
    deletion, insertion = judge.curves(text, order)
    count = round(0.3 * len(words))

    def probability(hidden: Sequence[int]) -> float:
        whole = reference.model(**encoding).logits.softmax(-1)[0]
        positions = [position for word in hidden for position in words[word]]
        return float(reference.model(**reference.hidden(encoding, positions)).logits.softmax(-1)[0, whole.argmax()])

    assert deletion[0] == pytest.approx(probability([]), abs=1e-4)
    assert deletion[3] == pytest.approx(probability(order[:count]), abs=1e-4)
    assert insertion[3] == pytest.approx(probability(order[count:]), abs=1e-4)
    assert deletion[-1] == pytest.approx(insertion[0], abs=1e-6)
    assert insertion[-1] == pytest.approx(deletion[0], abs=1e-6)
    assert explanations.area(np.array([np.ones(11), np.linspace(0, 1, 11)])) == pytest.approx([1, 0.5])
    assert explanations.interval(np.full(20, 0.25)) == (0.25, 0.25)


def test_an_explanation_orders_words_by_their_score(texts: list[str], models: Callable[[str, str], Path]) -> None:
    engine = Engine(models("bert", "text-classification"))
    found = scores(explained(engine, texts[0], top_k=1)["explanations"][0])
    order = explanations.explained(engine, "occlusion")(texts[0])
    assert [found[index] for index in order] == pytest.approx(sorted(found, reverse=True), abs=1e-5)


def test_figures_are_those_of_the_results() -> None:
    results = json.loads(explanations.RESULTS.read_text(encoding="utf-8"))
    text = explanations.DOCUMENT.read_text(encoding="utf-8")
    assert explanations.document(results, text) == text
    assert explanations.targets(results) == [{**target, "met": target["met"]} for target in results["targets"]]
    worse = json.loads(json.dumps(results))
    worse["faithfulness"]["ways"]["occlusion, torch fp32"]["deletion"]["interval"] = [-0.1, 0.1]
    assert [target["met"] for target in explanations.targets(worse)].count(False) == 1 + sum(
        not target["met"] for target in results["targets"]
    )
