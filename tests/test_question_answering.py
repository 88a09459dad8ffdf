"""Question answering: answers as a plain reference finds them, trained, archived, served, called."""

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from backends import Replayed
from conftest import CPUS, NO_CHECKPOINTS, HubClient, Served, build_here, train_here
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, PreTrainedTokenizerBase

import train
from archiver import source
from archiver.convert import Converter
from handler.engine import Engine
from handler.errors import InternalError, InvalidInput, InvalidParameter, RequestError, TooLarge, UnreadableRequest
from handler.messages import Request, Result
from handler.tasks.question_answering import QuestionAnswering as Task
from handler.tasks.question_answering import best_spans
from training import base_model, evaluation, mistakes, scratch
from training.errors import UserError
from training.options import Options
from training.tasks.question_answering import QuestionAnswering, answer_span, normalized, overlap

FAMILIES = ["bert", "roberta"]
SIZES = "hidden_size=32 num_hidden_layers=2 num_attention_heads=2 intermediate_size=64"
LENGTH, STRIDE = 128, 40
QUESTION, CONTEXT = "Who wrote to Charles?", "Ada Lovelace wrote to Charles Babbage, and he answered her."

# --- what the tests ask, and whom


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture(scope="module")
def squad(shared: Path) -> list[dict[str, Any]]:
    """Real questions with their contexts; every second one is the next of its article."""
    return lines(shared / "squad" / "dev.jsonl")


@pytest.fixture(scope="module")
def naughty(shared: Path) -> list[str]:
    return [row["text"] for row in lines(shared / "naughty_strings" / "naughty.jsonl")]


@pytest.fixture(scope="module")
def untrained(squad: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models that know nothing, but are sure of it."""
    folders = {}
    for family in FAMILIES:
        transformers.set_seed(0)
        specification = scratch.parse_spec(f"{family} {SIZES}")
        if family == "bert":
            tokenizer = AutoTokenizer.from_pretrained(base_model.resolve(None).location)
        else:
            specification = scratch.parse_spec(f"{family} {SIZES} vocab_size=1000")
            tokenizer = scratch.train_tokenizer(specification, [row["context"] for row in squad[:200]])
        model = AutoModelForQuestionAnswering.from_config(scratch.build_config(specification, tokenizer))
        model.qa_outputs.weight.data *= 40
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "model-config.yaml").write_text(
            f"handler: {{task: question-answering, max_length: {LENGTH}, stride: {STRIDE}, overflow: window}}"
        )
        folders[family] = folder
    return folders


@pytest.fixture(scope="module")
def engines(untrained: dict[str, Path]) -> dict[str, Engine]:
    return {family: Engine(folder, threads=1) for family, folder in untrained.items()}


def ask(engine: Engine, question: Any, context: Any, **parameters: Any) -> Any:
    [result] = engine.predict([Request([{"question": question, "context": context}], parameters)])
    assert isinstance(result, Result), result
    return result.predictions[0]


def refusal(engine: Engine, value: Any, **parameters: Any) -> RequestError:
    [error] = engine.predict([Request([value], parameters)])
    assert isinstance(error, RequestError)
    assert str(error).isascii()
    return error


# --- equality with a plain reference


class Reference:
    """The question-answering pipeline of transformers 4, written as plainly as it can be.

    It differs where there are several windows: there each span counts in the window with most context around it, and
    of several windows that give one answer the best counts, where that pipeline adds their scores, beyond 1.
    """

    def __init__(self, folder: Path) -> None:
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForQuestionAnswering.from_pretrained(folder)

    def __call__(
        self,
        question: str,
        context: str,
        *,
        top_k: int = 1,
        max_seq_len: int = LENGTH,
        doc_stride: int = STRIDE,
        max_answer_len: int = 15,
        handle_impossible_answer: bool = False,
        align_to_words: bool = True,
    ) -> Any:
        encoded = self.tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=max_seq_len,
            stride=doc_stride,
            return_overflowing_tokens=True,
        )
        answers: list[dict[str, Any]] = []
        impossible = 1.0
        contexts = [[at for at, s in enumerate(e.sequence_ids) if s == 1] for e in encoded.encodings]
        begins = [number * (len(contexts[0]) - doc_stride) for number in range(len(contexts))]
        sizes = [len(tokens) for tokens in contexts]
        for number, (encoding, tokens) in enumerate(zip(encoded.encodings, contexts, strict=True)):
            start, end = self.probabilities(encoding, tokens)
            impossible = min(impossible, start[0] * end[0])
            spans = [
                (-start[first] * end[last], first, last)
                for first in tokens
                for last in tokens
                if first <= last < first + max_answer_len
            ]
            here = (
                span
                for span in sorted(spans)
                if number == most_context(*(begins[number] + at - tokens[0] for at in span[1:]), begins, sizes)
            )
            found: list[dict[str, Any]] = []
            for score, first, last in itertools.islice(here, 2 * top_k + 10 if align_to_words else top_k):
                begin, stop = encoding.offsets[first][0], encoding.offsets[last][1]
                if align_to_words:
                    begin = encoding.word_to_chars(encoding.token_to_word(first), 1)[0]
                    stop = encoding.word_to_chars(encoding.token_to_word(last), 1)[1]
                answer = context[begin:stop]
                for other in found:
                    if other["answer"].lower() == answer.lower():
                        other["score"] -= score
                        break
                else:
                    found.append({"answer": answer, "score": -score, "start": begin, "end": stop})
            for entry in found:
                equal = [other for other in answers if other["answer"].lower() == entry["answer"].lower()]
                if not equal:
                    answers.append(entry)
                elif entry["score"] > equal[0]["score"]:
                    equal[0].update(entry)
        if handle_impossible_answer:
            answers.append({"answer": "", "score": impossible, "start": 0, "end": 0})
        answers.sort(key=lambda entry: -entry["score"])
        return answers[0] if top_k == 1 else answers[:top_k]

    def probabilities(self, encoding: Any, tokens: list[int]) -> Any:
        """Start and end probabilities by position, of the first token and those of the context."""
        with torch.inference_mode():
            ids, types = torch.tensor([encoding.ids]), torch.tensor([encoding.type_ids])
            output = self.model(input_ids=ids, token_type_ids=types, attention_mask=torch.ones_like(ids))
        both = []
        for logits in (output.start_logits[0].double(), output.end_logits[0].double()):
            kept = torch.full_like(logits, -torch.inf)
            kept[[0, *tokens]] = logits[[0, *tokens]]
            both.append(kept.softmax(0).tolist())
        return both


def most_context(first: int, last: int, begins: list[int], sizes: list[int]) -> int:
    """The window in which a span of the context is farthest from a border behind which the context goes on."""
    depths = []
    for number, (begin, size) in enumerate(zip(begins, sizes, strict=True)):
        left = first - begin if number > 0 else 10**9
        right = begin + size - 1 - last if number + 1 < len(begins) else 10**9
        depths.append(min(left, right))
    return depths.index(max(depths))


@pytest.fixture(scope="module")
def references(untrained: dict[str, Path]) -> dict[str, Reference]:
    return {family: Reference(folder) for family, folder in untrained.items()}


def same(found: Any, expected: Any) -> None:
    """Equal in everything, and within 1e-4 in their scores."""
    assert isinstance(found, dict) == isinstance(expected, dict)
    for one, other in zip(*([each] if isinstance(each, dict) else each for each in (found, expected)), strict=True):
        assert list(one) == ["answer", "score", "start", "end"]
        assert {**one, "score": 0} == {**other, "score": 0}
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"top_k": 4},
        {"top_k": 3, "handle_impossible_answer": True},
        {"top_k": 2, "align_to_words": False, "max_answer_len": 3},
        {"max_seq_len": 100, "doc_stride": 10},
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_reference(
    family: str,
    parameters: dict[str, Any],
    engines: dict[str, Engine],
    references: dict[str, Reference],
    squad: list[dict[str, Any]],
) -> None:
    """Real questions; many contexts take several windows."""
    rows = squad[:110] if not parameters else squad[110:150]
    requests_ = [Request([{"question": row["question"], "context": row["context"]}], parameters) for row in rows]
    windows = 0
    for row, result in zip(rows, engines[family].predict(requests_), strict=True):
        assert isinstance(result, Result)
        same(result.predictions[0], references[family](row["question"], row["context"], **parameters))
        windows += result.usage.windows
    assert windows > 1.3 * len(rows)


def test_answers_stand_where_they_say(engines: dict[str, Engine]) -> None:
    context = "Zoë İstanbul'da\u00a0e\u0301tait là — 漢字 ＡＢＣ 😀😀 ok"
    for engine in engines.values():
        for align in (True, False):
            answers = ask(engine, "Où?", context, top_k=50, align_to_words=align)
            assert len(answers) > 10
            assert all(answer["answer"] == context[answer["start"] : answer["end"]] != "" for answer in answers)
            assert len({answer["answer"].lower() for answer in answers}) == len(answers)


def test_aligned_answers_are_whole_words(engines: dict[str, Engine]) -> None:
    context = "Brobdingnagian Lilliputians overwhelmingly outnumbered Houyhnhnms"
    whole = {answer["answer"] for answer in ask(engines["bert"], "Who?", context, top_k=100)}
    words = context.split()
    assert whole == {" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}
    parts = {answer["answer"] for answer in ask(engines["bert"], "Who?", context, top_k=100, align_to_words=False)}
    assert not parts <= whole


def test_probabilities_of_all_spans_and_no_answer_add_up(engines: dict[str, Engine]) -> None:
    """With every span looked at, what is missing to 1 are ends before starts, and one border at the first token."""
    answers = ask(engines["bert"], QUESTION, CONTEXT, top_k=1000, max_answer_len=1000, handle_impossible_answer=True)
    assert 0 < sum(answer["score"] for answer in answers) <= 1 + 1e-9
    assert [answer["score"] for answer in answers] == sorted((a["score"] for a in answers), reverse=True)


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
@pytest.mark.parametrize("longest", [1, 3, 1000])
def test_best_spans_are_those_of_a_double_loop(count: int, longest: int) -> None:
    generator = np.random.default_rng(0)
    for tokens in (0, 1, 2, 9, 30):
        # Few distinct values, so that there are ties, and zeros.
        start, end = (generator.integers(0, 4, tokens) / 10 for _ in range(2))
        spans = [
            (-start[first] * end[last], first, last)
            for first in range(tokens)
            for last in range(first, min(tokens, first + longest))
        ]
        expected = [(-score, first, last) for score, first, last in sorted(spans)[:count]]
        assert best_spans(start, end, count, longest) == expected


# --- windows, with logits made up


def crafted(engine: Engine, monkeypatch: pytest.MonkeyPatch, scores: Callable[[int, str], float]) -> None:
    """Has the model's logits be `scores(position, token)`, for start and end alike."""
    tokenizer = engine.task.inputs.tokenizer  # type: ignore[attr-defined]

    def backend(arrays: dict[str, Any]) -> dict[str, Any]:
        logits = np.array(
            [[scores(position, tokenizer.id_to_token(int(token))) for position, token in enumerate(row)]
             for row in arrays["input_ids"]],
            dtype=np.float32,
        )  # fmt: skip
        return {"start_logits": logits, "end_logits": logits}

    monkeypatch.setattr(engine, "backend", Replayed(backend))


def test_one_answer_in_two_windows_counts_once(engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    crafted(engines["bert"], monkeypatch, lambda _, token: 9.0 if token == "berlin" else 0.0)
    words = ["and"] * 200
    words[75] = "Berlin"  # both of the first two windows have it
    answers = ask(engines["bert"], "Where?", " ".join(words), top_k=5)
    assert [answer["answer"] for answer in answers].count("Berlin") == 1
    assert answers[0]["answer"] == "Berlin"
    assert 0.5 < answers[0]["score"] <= 1


def test_equal_answers_of_one_window_add_up(engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    crafted(engines["bert"], monkeypatch, lambda _, token: 9.0 if token == "berlin" else 0.0)
    once = ask(engines["bert"], "Where?", "In BERLIN and there", max_answer_len=1)
    twice = ask(engines["bert"], "Where?", "In BERLIN and Berlin", max_answer_len=1)
    assert (once["answer"], twice["answer"], twice["start"]) == ("BERLIN", "BERLIN", 3)
    # Two of four start, end pairs: both begin and end at one place.
    assert (once["score"], twice["score"]) == (pytest.approx(1, abs=1e-2), pytest.approx(0.5, abs=1e-2))


def test_no_answer_needs_all_windows(engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token's score counts by the window that says it least."""
    crafted(engines["bert"], monkeypatch, lambda at, token: {0: 6.0}.get(at, 12.0 if token == "berlin" else 0.0))
    words = ["and"] * 300
    engine = engines["bert"]
    nothing = ask(engine, "Where?", " ".join(words), handle_impossible_answer=True)
    assert (nothing["answer"], nothing["start"], nothing["end"]) == ("", 0, 0)
    words[150] = "Berlin"
    assert ask(engine, "Where?", " ".join(words), handle_impossible_answer=True)["answer"] == "Berlin"
    assert ask(engine, "Where?", " ".join(["and"] * 9), handle_impossible_answer=False)["answer"] != ""


def test_the_part_of_an_answer_that_a_window_sees_is_no_answer(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window that begins, or ends, within an answer is as sure of what it sees as the others of the whole."""
    engine = engines["bert"]

    def backend(arrays: dict[str, Any]) -> dict[str, Any]:
        starts = np.zeros(arrays["input_ids"].shape, dtype=np.float32)
        ends = starts.copy()
        id_of = engine.task.inputs.tokenizer.token_to_id  # type: ignore[attr-defined]
        for number, row in enumerate(arrays["input_ids"].tolist()):
            seen = [at for at, token in enumerate(row) if token in (id_of("golden"), id_of("crown"))]
            if seen:
                starts[number, seen[0]], ends[number, seen[-1]] = 9, 9
        return {"start_logits": starts, "end_logits": ends}

    monkeypatch.setattr(engine, "backend", Replayed(backend))
    for offset in range(250):
        words = ["and"] * 250
        words[offset : offset + 1] = ["golden", "crown"]
        assert ask(engine, "What?", " ".join(words))["answer"] == "golden crown"


def test_answers_cross_no_window_and_none_is_lost_at_a_border(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer of four tokens at every offset of a context of several windows."""
    engine = engines["bert"]

    def backend(arrays: dict[str, Any]) -> dict[str, Any]:
        ids = arrays["input_ids"]
        first, last = (engine.task.inputs.tokenizer.token_to_id(word) for word in ("new", "city"))  # type: ignore[attr-defined]
        outputs = {"start_logits": 9.0 * (ids == first), "end_logits": 9.0 * (ids == last)}
        return {name: values.astype(np.float32) for name, values in outputs.items()}

    monkeypatch.setattr(engine, "backend", Replayed(backend))
    for offset in range(0, 250, 3):
        words = ["and"] * 250
        words[offset : offset + 1] = ["New", "York", "Big", "City"]
        answer = ask(engine, "Where?", " ".join(words))
        assert (answer["answer"], answer["start"]) == ("New York Big City", 4 * offset)


# --- what is refused


@pytest.mark.parametrize(
    ("value", "kind", "says"),
    [
        ("text", InvalidInput, "question"),
        ({"question": QUESTION}, InvalidInput, "context"),
        ({"question": QUESTION, "context": CONTEXT, "text": ""}, InvalidInput, "context"),
        ({"question": 1, "context": CONTEXT}, InvalidInput, "question"),
        ({"question": QUESTION, "context": [CONTEXT]}, InvalidInput, "context"),
        ({"question": "", "context": CONTEXT}, InvalidInput, "the question is empty"),
        ({"question": QUESTION, "context": " \n"}, InvalidInput, "the context is empty"),
        ({"question": QUESTION, "context": "\u200b\x00"}, InvalidInput, "no words"),
        ({"question": "half \ud83d", "context": CONTEXT}, UnreadableRequest, "surrogate"),
        ({"question": QUESTION, "context": "\ude00"}, UnreadableRequest, "surrogate"),
        ({"question": "word " * 200, "context": CONTEXT}, TooLarge, "max_question_len"),
        ({"question": "word " * 125, "context": CONTEXT}, TooLarge, "max_question_len"),
        ({"question": QUESTION, "context": "word " * 20_000}, TooLarge, "windows"),
        ({"question": "word " * 124, "context": "word " * 100_000}, TooLarge, "windows"),
    ],
)
def test_bad_inputs_are_refused(value: Any, kind: type[RequestError], says: str, engines: dict[str, Engine]) -> None:
    error = refusal(engines["bert"], value)
    assert type(error) is kind
    assert says in str(error)


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"top_k": 0}, "at least 1"),
        ({"top_k": 1.5}, "an integer"),
        ({"doc_stride": -1}, "at least 0"),
        ({"doc_stride": LENGTH}, "below 128"),
        ({"doc_stride": 50, "max_seq_len": 50}, "below 50"),
        ({"max_answer_len": 0}, "at least 1"),
        ({"max_seq_len": 0}, "at least 1"),
        ({"max_question_len": 0}, "at least 1"),
        ({"align_to_words": 1}, "true or false"),
        ({"topk": 1}, "top_k"),
    ],
)
def test_bad_parameters_are_refused(parameters: dict[str, Any], says: str, engines: dict[str, Engine]) -> None:
    error = refusal(engines["bert"], {"question": QUESTION, "context": CONTEXT}, **parameters)
    assert type(error) is InvalidParameter
    assert says in str(error)


def test_one_bad_question_hurts_no_other(engines: dict[str, Engine], squad: list[dict[str, Any]]) -> None:
    good = {"question": squad[0]["question"], "context": squad[0]["context"]}
    inputs = [good, {"question": "word " * 200, "context": "x"}, {**good, "question": ""}, good]
    [result] = engines["bert"].predict([Request(inputs, {}, many=True)])
    [alone] = engines["bert"].predict([Request([good])])
    assert isinstance(result, Result)
    assert isinstance(alone, Result)
    assert [type(entry) for entry in result.predictions] == [dict, TooLarge, InvalidInput, dict]
    same(result.predictions[3], alone.predictions[0])


def test_a_long_question_leaves_the_stride_less(engines: dict[str, Engine]) -> None:
    """100 tokens of question, 25 left for the context: less than the stride, which is 40."""
    answer = ask(engines["bert"], "word " * 100, " ".join(f"w{number}" for number in range(30)))
    assert answer["answer"]


def test_a_question_is_cut_where_that_is_asked_for(engines: dict[str, Engine]) -> None:
    question = "Which of the overwhelmingly many words " + "word " * 300
    cut = ask(engines["bert"], question, CONTEXT, max_question_len=4)
    same(cut, ask(engines["bert"], "Which of the overwhelmingly", CONTEXT))


def test_windows_may_be_shorter_than_the_models_length(engines: dict[str, Engine]) -> None:
    context = " ".join(f"w{number}" for number in range(60))
    parameters = [{}, {"max_seq_len": 40}, {"max_seq_len": 4000}]
    usages = []
    for given in parameters:
        [result] = engines["bert"].predict([Request([{"question": "Who?", "context": context}], given)])
        assert isinstance(result, Result)
        usages.append(result.usage.windows)
    assert usages[1] > usages[0] == usages[2]


def test_truncation_is_told(engines: dict[str, Engine]) -> None:
    value = {"question": QUESTION, "context": f"{CONTEXT} " * 40}
    [cut] = engines["bert"].predict([Request([value], {"overflow": "truncate", "top_k": 20})])
    assert isinstance(cut, Result)
    assert (cut.usage.truncated, cut.usage.windows) == (True, 1)
    assert all(answer["end"] < 600 for answer in cut.predictions[0])
    assert isinstance(refusal(engines["bert"], value, overflow="error"), TooLarge)


def test_scores_that_are_no_numbers_never_leave(engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    crafted(engines["bert"], monkeypatch, lambda at, _: float("nan") if at == 8 else 0.0)
    assert isinstance(refusal(engines["bert"], {"question": QUESTION, "context": CONTEXT}), InternalError)


# --- drift


def answers_(**scores: float) -> list[dict[str, Any]]:
    return [{"answer": answer, "score": score, "start": 0, "end": 1} for answer, score in scores.items()]


@pytest.mark.parametrize(
    ("expected", "found", "drift"),
    [
        (answers_(a=0.6)[0], answers_(a=0.5)[0], 0.1),
        (answers_(a=0.6, b=0.2), answers_(b=0.2, a=0.55), 0.05),
        # What left the list is now below its last.
        (answers_(a=0.6, b=0.2), answers_(a=0.6, c=0.1), 0.1),
        (answers_(a=0.6, b=0.2), answers_(c=0.3, d=0.1), 0.5),
        (answers_(a=0.31)[0], answers_(b=0.32)[0], 0.01),
        (answers_(A=0.6)[0], answers_(a=0.6)[0], 0.0),
        (answers_(a=0.6)[0], answers_(a=float("nan"))[0], float("nan")),
    ],
)
def test_drift(expected: Any, found: Any, drift: float) -> None:
    assert Task.drift(expected, found) == pytest.approx(drift, nan_ok=True)


# --- data


def data_file(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(context: str = CONTEXT, text: str | None = "Ada Lovelace", start: int = 0, **more: Any) -> dict[str, Any]:
    answers = {"text": [], "answer_start": []} if text is None else {"text": [text], "answer_start": [start]}
    return {"id": "1", "title": "t", "question": QUESTION, "context": context, "answers": answers, **more}


def splits(train_file: Path, **options: Any) -> Any:
    return QuestionAnswering().read(Options(train_file=str(train_file), **options), 0, base_model.resolve(None))


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (row(start=1), "does not have at its answer_start"),
        (row(start=-5), "does not have at its answer_start"),
        (row(start=10_000), "does not have at its answer_start"),
        (row(text=" "), "does not have at its answer_start"),
        (row(question=" "), "an empty question"),
        (row(context=""), "an empty context"),
        (row(question=None), "an empty question"),
        (row(answers={"text": ["Ada"], "answer_start": []}), "a place each"),
        (row(answers={"text": ["Ada"], "answer_start": None}), "a place each"),
        (row(answers=None), "a place each"),
    ],
)
def test_bad_rows_are_named_or_left_out(bad: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = data_file(tmp_path, row(), row(f"{CONTEXT} Soon."), bad, row(f"{CONTEXT} Later."))
    with pytest.raises(UserError, match="row 3") as caught:
        splits(path)
    assert says in str(caught.value)
    found = splits(path, skip_bad_rows=True)
    assert (len(found.train) + len(found.validation), found.skipped) == (3, 1)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([row(text=None), row(text=None)], "no question has an answer"),
        ([row(), row()], "one context"),
        ([{"question": QUESTION, "answers": {}}], "no column 'context'"),
        ([{"question": QUESTION, "context": CONTEXT}], "no column 'answer_text'"),
    ],
)
def test_data_that_cannot_be_learnt_from(rows: list[dict[str, Any]], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        splits(data_file(tmp_path, *rows))


def test_a_context_is_in_one_split_only(tmp_path: Path) -> None:
    rows = [row(f"{CONTEXT} Part {number}.", question=f"{n}?") for number in range(20) for n in range(3)]
    found = splits(data_file(tmp_path, *rows), validation_share=0.2)
    assert not set(found.train["context"]) & set(found.validation["context"])
    assert len(found.validation) == 12


def test_csv_files_have_one_answer_or_none(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text(
        "question,context,answer_text,answer_start\nWho?,Ada wrote.,Ada,0\nWho?,It rained.,,\nWhat?,Ada sang.,sang,4\n"
    )
    found = splits(path, validation_file=str(path))
    assert found.train["texts"] == [["Ada"], [], ["sang"]]
    assert found.train["starts"] == [[0], [], [4]]
    path.write_text("question,context,answer_text,answer_start\nWho?,Ada wrote.,Ada,first\n")
    with pytest.raises(UserError, match="a place each"):
        splits(path)


def test_a_question_that_fills_the_window_is_named(tmp_path: Path) -> None:
    path = data_file(tmp_path, row(), row(f"{CONTEXT} So.", question="word " * 50))
    task, base = QuestionAnswering(), base_model.resolve(None)
    options = Options(train_file=str(path), validation_file=str(path), max_length=64)
    found = task.read(options, 0, base)
    model, tokenizer = task.load(base, found, options)
    arguments = train.parse(["--train-file", str(path), "--output-dir", str(tmp_path / "out")])[1]
    with pytest.raises(UserError, match="row 2"):
        task.trainer(model, tokenizer, found, options, arguments, task.settings(model, tokenizer, options))


def test_the_usual_length(tmp_path: Path) -> None:
    path = data_file(tmp_path, row(), row(f"{CONTEXT} So."))
    task, base = QuestionAnswering(), base_model.resolve(None)
    options = Options(train_file=str(path))
    model, tokenizer = task.load(base, task.read(options, 0, base), options)
    assert task.settings(model, tokenizer, options) == {"max_length": 384, "stride": 128, "overflow": "window"}


# --- windows of training


def test_answers_are_labelled_in_the_windows_that_hold_them(untrained: dict[str, Path]) -> None:
    context = "and so " * 40 + "Ada Lovelace-Byron!" + " and so" * 40
    start, end = context.index("Ada"), context.index("!")
    for folder in untrained.values():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        windows = tokenizer(
            "Who?", context, truncation="only_second", max_length=48, stride=16, return_overflowing_tokens=True
        ).encodings
        spans = [answer_span(window, start, end) for window in windows]
        assert (0, 0) in spans
        assert any(span != (0, 0) for span in spans)
        for window, (first, last) in zip(windows, spans, strict=True):
            places = [place for place, s in zip(window.offsets, window.sequence_ids, strict=True) if s == 1]
            inside = places[0][0] <= start and end <= places[-1][1]
            assert inside == ((first, last) != (0, 0))
            if inside:
                assert (window.offsets[first][0], window.offsets[last][1]) == (start, end)


# --- metrics


@pytest.mark.parametrize(
    ("found", "expected", "exact", "f1"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1, 1.0),
        ("Eiffel  tower", "the Eiffel-Tower", 0, 0.0),
        ("in Paris, France", "Paris", 0, 0.5),
        ("", "", 1, 1.0),
        ("", "Paris", 0, 0.0),
        ("Paris", "", 0, 0.0),
        ("a a the", "", 1, 1.0),
        ("one two two", "two two two", 0, 2 / 3),
    ],
)
def test_answers_are_compared_as_squad_does(found: str, expected: str, exact: int, f1: float) -> None:
    assert (normalized(found) == normalized(expected)) == bool(exact)
    assert overlap(found, expected) == pytest.approx(f1)


def test_scores_take_the_best_of_several_right_answers() -> None:
    predictions = [{"answer": "in Paris"}, {"answer": ""}, {"answer": "Rome"}]
    score = QuestionAnswering().score(predictions, [["Paris", "in Paris"], [], []], [])
    assert score == {
        "rows": 3,
        "f1": pytest.approx(2 / 3),
        "exact_match": pytest.approx(2 / 3),
        "without_answer": {"rows": 2, "exact_match": 0.5},
    }


# --- trained on a toy pattern, for real

TREASURES = ["golden crown", "silver spoon", "ruby", "emerald", "old map"]
TEXT = "the a of river walked slowly under green bridge and then some rain fell on quiet stones near market"
FILLER = TEXT.split()


def toy_row(generator: random.Random) -> dict[str, Any]:
    words = generator.choices(FILLER, k=generator.choice([10, 40, 100]))
    if generator.random() < 0.4:
        return row(" ".join(words), None, question="What was found?")
    before = words[: generator.randint(0, len(words))]
    treasure = generator.choice(TREASURES)
    context = " ".join([*before, treasure, *words[len(before) :]])
    return row(context, treasure, len(" ".join(before)) + bool(before), question="What was found?")


def trained(place: Path, *arguments: object, threads: int = 1) -> Path:
    train_here(
        "--task",
        "question-answering",
        "--output-dir",
        place,
        "--bf16",
        "false",
        *NO_CHECKPOINTS,
        *arguments,
        threads=threads,
    )
    return place


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RoBERTa from scratch that knows the treasures, and that there may be none."""
    folder = tmp_path_factory.mktemp("toy")
    generator = random.Random(0)
    path = data_file(folder, *(toy_row(generator) for _ in range(600)))
    specification = f"roberta {SIZES} vocab_size=400 max_position_embeddings=130"
    return trained(
        folder / "bundle",
        *("--train-file", path, "--from-scratch", specification, "--max-steps", 240, "--learning-rate", 5e-3),
    )


@pytest.fixture(scope="module")
def toy_openvino(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("openvino")
    Converter(source.check(toy)).write("openvino", "fp32", folder)
    (folder / "model-config.yaml").write_bytes((toy / "model-config.yaml").read_bytes())
    return folder


@pytest.fixture(scope="module", params=["torch", "openvino"])
def toy_engine(request: pytest.FixtureRequest, toy: Path, toy_openvino: Path) -> Engine:
    return Engine(toy if request.param == "torch" else toy_openvino, backend=request.param, threads=1)


def test_training_learns_and_says_how_well(toy: Path) -> None:
    metrics = json.loads((toy / "metrics.json").read_text())
    assert metrics["splits"]["validation"]["f1"] > 0.95
    assert metrics["splits"]["validation"]["exact_match"] > 0.9
    assert metrics["splits"]["validation"]["without_answer"]["exact_match"] > 0.9
    assert metrics["settings"]["options"] == {"handle_impossible_answer": True}
    assert any(len(example["target"]) == 0 for example in lines(toy / "validation.jsonl"))


def test_the_hardest_questions_are_those_with_the_surest_wrong_answers(toy: Path) -> None:
    engine = Engine(toy, threads=1)
    rows = [row for row in lines(toy / "validation.jsonl") if row["target"]][:3]
    predictions = evaluation.predict(engine, rows)
    rows[0]["target"], rows[1]["target"] = [], [f"{predictions[1]['answer']} of old"]
    found = mistakes.hardest(engine, rows, predictions)
    assert found is not None
    first, second = found[:2]
    assert first.title == f"no answer, taken for {predictions[0]['answer']}"
    assert second.title == f"{predictions[1]['answer']} of old, taken for {predictions[1]['answer']}"
    question, context = first.texts
    assert "".join(word.text for word in question) == rows[0]["inputs"]["question"]
    assert " ".join(word.text for word in context if word.marked and word.score is not None) == predictions[0]["answer"]
    assert first.most > 0


def test_an_answer_at_every_tenth_of_a_long_document(toy_engine: Engine) -> None:
    """5,000 tokens; the answer is found at each place."""
    words = random.Random(1).choices(FILLER, k=5000)
    assert toy_engine.task.inputs.counts([" ".join(words)])[0] >= 5000  # type: ignore[attr-defined]
    for tenth in range(11):
        before, after = words[: tenth * 500], words[tenth * 500 :]
        answer = ask(toy_engine, "What was found?", " ".join([*before, "golden crown", *after]))
        start = len(" ".join(before)) + bool(before)
        assert (answer["answer"], answer["start"], answer["end"]) == ("golden crown", start, start + 12)
        assert answer["score"] > 0.5
    nothing = ask(toy_engine, "What was found?", " ".join(words))
    assert nothing["answer"] == ""


def test_backends_agree(toy: Path, toy_openvino: Path, squad: list[dict[str, Any]]) -> None:
    values = [{"question": row["question"], "context": row["context"][:300]} for row in squad[:30]]
    requests_ = [Request([value], {"top_k": 3}) for value in values]
    first = Engine(toy, threads=1).predict(requests_)
    second = Engine(toy_openvino, backend="openvino", threads=1).predict(requests_)
    for one, other in zip(first, second, strict=True):
        assert isinstance(one, Result)
        assert isinstance(other, Result)
        assert Task.drift(one.predictions[0], other.predictions[0]) < 1e-4


# --- end to end


@pytest.fixture(scope="module")
def few(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM after a few steps on real questions."""
    folder = tmp_path_factory.mktemp("squad")
    (folder / "validation").mkdir()
    path = data_file(folder, *lines(shared / "squad" / "train.jsonl")[:100])
    validation = data_file(folder / "validation", *lines(shared / "squad" / "dev.jsonl")[:20])
    return trained(
        folder / "bundle",
        *("--train-file", path, "--validation-file", validation, "--max-steps", 3, "--learning-rate", 5e-4),
        *("--per-device-train-batch-size", 8, "--max-length", 192),
        threads=CPUS,
    )


@pytest.fixture(scope="module")
def served(few: Path, toy: Path, shared_store: Path, serve_models: Callable[..., Served]) -> Served:
    """A TorchServe with `qa` (BERT, openvino) and `qa-toy` (RoBERTa, torch)."""
    build_here(few, shared_store, "qa", "openvino")
    build_here(toy, shared_store, "qa-toy", "torch")
    return serve_models("qa", "qa-toy")


def test_inference_client(inference_client: HubClient) -> None:
    context = "the river walked slowly and a silver spoon fell on quiet stones"
    client = inference_client("qa-toy")
    answer = client.question_answering("What was found?", context)
    assert (answer.answer, answer.start, answer.end) == ("silver spoon", 30, 42)
    several = client.question_answering(
        "What was found?",
        context,
        top_k=3,
        doc_stride=10,
        max_answer_len=20,
        max_seq_len=64,
        max_question_len=30,
        handle_impossible_answer=False,
        align_to_words=True,
    )
    assert isinstance(several, list)
    assert (several[0].answer, len(several)) == ("silver spoon", 3)
    nothing = client.question_answering("What was found?", "the river walked slowly and rain fell")
    assert (nothing.answer, nothing.start, nothing.end) == ("", 0, 0)


def test_inference_client_equals_the_reference_of_the_bundle(
    inference_client: HubClient, few: Path, squad: list[dict[str, Any]]
) -> None:
    reference, client = Reference(few), inference_client("qa")
    for given in squad[200:210]:
        found = client.question_answering(given["question"], given["context"], top_k=3)
        expected = reference(given["question"], given["context"], top_k=3, max_seq_len=192, doc_stride=64)
        same([{key: getattr(entry, key) for key in expected[0]} for entry in found], expected)


def test_marble_clients_agree_over_rest_and_grpc(served: Served) -> None:
    contexts = ["a ruby fell on stones", "rain", "quiet emerald near market"]
    inputs = [{"question": "What was found?", "context": context} for context in contexts]
    with served.rest_client() as rest, served.grpc_client() as grpc:
        [one, other] = [client.predict("qa-toy", inputs).predictions for client in (rest, grpc)]
        single = rest.predict("qa-toy", inputs[0]).predictions
    assert one == other
    assert [answer["answer"] for answer in one] == ["ruby", "", "emerald"]
    assert single == one[0]


def test_naughty_strings_end_no_worker(served: Served, naughty: list[str], same_workers: None) -> None:
    for model in ("qa", "qa-toy"):
        inputs = [{"question": text, "context": f"before {text} after"} for text in naughty]
        inputs += [{"question": "What was found?", "context": text} for text in naughty]
        answered = 0
        with served.rest_client() as client:
            for start in range(0, len(inputs), 250):
                batch = inputs[start : start + 250]
                predictions = client.predict(model, batch, {"max_question_len": 40}).predictions
                for value, prediction in zip(batch, predictions, strict=True):
                    if "error" in prediction:
                        assert prediction["code"] == 422  # an empty one, or one without a word
                    else:
                        answered += 1
                        assert prediction["answer"] == value["context"][prediction["start"] : prediction["end"]]
        assert answered > 0.9 * len(inputs)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"inputs": {"question": "half \\ud83d", "context": "a"}}', 400),
        (b'{"inputs": {"question": "a", "context": "half \\ud83d"}}', 400),
        (b'{"inputs": {"question": "", "context": "a"}}', 422),
        (b'{"inputs": {"question": "a", "context": ""}}', 422),
        (b'{"inputs": "a"}', 422),
        (b'{"inputs": {"question": "a", "context": "b"}, "parameters": {"doc_stride": 100000}}', 422),
        (b'{"inputs": {"question": "' + b"a " * 500 + b'", "context": "b"}}', 413),
    ],
)
def test_errors_reach_the_client(served: Served, body: bytes, code: int, same_workers: None) -> None:
    answer = served.post("/predictions/qa", body, "application/json")
    assert (answer.status_code, answer.json()["code"]) == (code, code)
