"""Question answering: the spans of a context that answer a question.

Scores and parameters are those of the question-answering pipeline that transformers had before version 5: start and
end probabilities within each window, their product for a span, that of the first token for "no answer". Of several
windows that hold a span, the one with most context around it decides, as in BERT's own evaluation on SQuAD: at a
window's border models find the part of an answer that they see.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

from handler.errors import InvalidInput, InvalidParameter, RequestError, TooLarge
from handler.explain import MOST_TARGETS, Target, Term
from handler.inputs import Encoded
from handler.inputs.text import read_text
from handler.inputs.windows import Windowed, WindowInputs
from handler.parameters import CommonParameters, at_least
from handler.settings import Settings
from handler.tasks import EncoderTask, Outputs, Part
from handler.tasks.text_classification import activate, finite

Answer = dict[str, Any]

_EXPECTED = 'an object {"question": string, "context": string}'
_MAX_ANSWER_LENGTH = 15
_CONTEXT = 1  # sequence id of the context's tokens; the question's have 0, special tokens none


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionAnsweringParameters(CommonParameters):
    """top_k: answers to give, 1 if None; more than one come as a list.

    max_seq_len: tokens of a window, at most the archive's max_length. doc_stride: tokens of context that neighbouring
    windows share. max_answer_len: tokens of an answer, 15 if None. max_question_len: the question is cut to so many
    tokens. handle_impossible_answer: whether "" may be an answer, the archive's own choice if None. align_to_words:
    widen answers to whole words.
    """

    top_k: int | None = at_least(1)
    max_seq_len: int | None = at_least(1)
    doc_stride: int | None = at_least(0)
    max_answer_len: int | None = at_least(1)
    max_question_len: int | None = at_least(1)
    handle_impossible_answer: bool | None = None
    align_to_words: bool | None = None


class QuestionInputs(WindowInputs):
    """Questions, each with the windows of its context."""

    def encode(self, samples: Sequence[Windowed]) -> list[Encoded | RequestError]:
        """As `WindowInputs`; a question that leaves no room for its context is its own error.

        A stride that does not fit beside a long question is half of what the question leaves.
        """
        outcomes: dict[int, Encoded | RequestError] = {}
        fitting: dict[int, Windowed] = {}
        counts = self.counts([sample.text[0] for sample in samples])
        for index, (sample, count) in enumerate(zip(samples, counts, strict=True)):
            try:
                fitting[index] = self._fitted(sample, count)
            except TooLarge as error:
                outcomes[index] = error
        outcomes.update(zip(fitting, super().encode(list(fitting.values())), strict=True))
        return [outcomes[index] for index in range(len(samples))]

    def _fitted(self, sample: Windowed, question: int) -> Windowed:
        """The sample with a stride that fits beside a question of so many tokens. Raises TooLarge if none does."""
        room = self.room(sample.length, pair=True) - question
        if room < 1:
            raise TooLarge(
                f"the question has {question} tokens, which leave no room for the context in a window of "
                f'{sample.length}; shorten it, or have it cut with the parameter "max_question_len"'
            )
        stride = _fitted_stride(sample, room)
        self.check(sample.text[1], sample.length, room - stride)
        return replace(sample, stride=stride)


class QuestionAnswering(EncoderTask):
    """Extracts answers. Setting `options: {handle_impossible_answer: true}`: "" may be an answer unless a request says.

    The first token of a row stands for "no answer in this window".
    """

    auto_model: ClassVar[str] = "AutoModelForQuestionAnswering"
    output_names: ClassVar[tuple[str, ...]] = ("start_logits", "end_logits")
    Parameters: ClassVar[type[CommonParameters]] = QuestionAnsweringParameters

    def __init__(self, model_dir: Path, settings: Settings, config: Mapping[str, Any]) -> None:
        self.inputs: QuestionInputs = QuestionInputs(model_dir, config, settings.max_length, "only_second")
        self._settings = settings
        self._may_be_impossible = bool(settings.options.get("handle_impossible_answer", False))

    def read(self, value: Any, parameters: Any) -> Sequence[Windowed]:
        """A question and its context."""
        if not isinstance(value, dict) or set(value) != {"question", "context"}:
            raise InvalidInput(f"an input must be {_EXPECTED}")
        question, context = (read_text(value[key], _EXPECTED) for key in ("question", "context"))
        for name, text in (("question", question), ("context", context)):
            if not text.strip():
                raise InvalidInput(f"the {name} is empty; send {_EXPECTED}")
        length = min(parameters.max_seq_len or self._settings.max_length, self._settings.max_length)
        stride = parameters.doc_stride
        if stride is None:
            stride = min(self._settings.stride, length // 2)
        elif stride >= length:
            raise InvalidParameter(f"parameter 'doc_stride' must be below {length}, the tokens of a window")
        if parameters.max_question_len is not None:
            question = self.inputs.beginning(question, parameters.max_question_len)
        return [Windowed((question, context), length, stride)]

    def keep(self, row: Encoding, outputs: Outputs) -> Outputs:
        """The logits without padding."""
        return {name: outputs[name][: len(row)].copy() for name in self.output_names}

    def postprocess(self, parts: Sequence[Part], parameters: Any) -> Answer | list[Answer]:
        """The best answer, or a list of the best ones.

        Equal answers are one: within a window their probabilities add up, of several windows the surest counts.
        """
        [part] = parts
        top_k, longest = parameters.top_k or 1, parameters.max_answer_len or _MAX_ANSWER_LENGTH
        align = parameters.align_to_words is not False
        possible = parameters.handle_impossible_answer
        answers: dict[str, Answer] = {}
        no_answer = 1.0
        windows = _Windows.of(part)
        # Several spans may widen to the same words, so more of them are looked at.
        count = 2 * top_k + 10 if align else top_k
        for number, (row, outputs) in enumerate(zip(part.rows, part.outputs, strict=True)):
            first, start, end = _probabilities(row, outputs)
            no_answer = min(no_answer, float(start[0] * end[0]))
            own = partial(windows.own, number) if len(part.rows) > 1 else None
            spans = best_spans(start[1:], end[1:], count, longest, own)
            found = _answers(part.sample.text[1], row, first, spans, align=align)
            for key, answer in found.items():
                if key not in answers or answer["score"] > answers[key]["score"]:
                    answers[key] = answer
        if self._may_be_impossible if possible is None else possible:
            answers[""] = {"answer": "", "score": no_answer, "start": 0, "end": 0}
        if not answers:
            raise InvalidInput("the context has no words that the model's tokenizer knows")
        best = sorted(answers.values(), key=lambda answer: -answer["score"])[:top_k]
        return best[0] if top_k == 1 else best

    def targets(self, part: Part, prediction: Answer | list[Answer], parameters: Any) -> list[Target]:
        """Of each answer, its first token's logit to begin it and its last token's to end it, added up, in the window
        that is surest of it."""
        answers = [prediction] if isinstance(prediction, dict) else prediction
        align = parameters.align_to_words is not False
        return [Target(answer, _terms(part, answer, align=align)) for answer in answers[:MOST_TARGETS]]

    @staticmethod
    def drift(expected: Any, found: Any) -> float:
        """Largest change of an answer's score; of an answer that left the list, the least it must have changed by."""
        before, after = _scores(expected), _scores(found)
        changes = [abs(before[answer] - after[answer]) for answer in before.keys() & after.keys()]
        changes += [before[answer] - min(after.values()) for answer in before.keys() - after.keys()]
        changes += [after[answer] - min(before.values()) for answer in after.keys() - before.keys()]
        return float(np.max(changes, initial=0.0))


def best_spans(
    start: NDArray[np.float64],
    end: NDArray[np.float64],
    count: int,
    longest: int,
    allowed: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.bool_]] | None = None,
) -> list[tuple[float, int, int]]:
    """The most probable spans as (probability, first token, last token), best first; of equal ones the earlier first.

    start, end: float64 [tokens], each token's probability to begin and to end the answer. longest: tokens of a span.
    allowed: which spans count, from their first tokens [tokens, 1] and last tokens [tokens, longest].
    """
    tokens = len(start)
    if tokens == 0:
        return []
    first = np.arange(tokens)[:, None]
    last = first + np.arange(min(longest, tokens))
    counts = last < tokens
    if allowed is not None:
        counts &= allowed(first, last)
    scores = np.where(counts, start[:, None] * end[np.minimum(last, tokens - 1)], -1.0).ravel()
    least = np.partition(scores, -count)[-count] if count < len(scores) else 0.0
    candidates = np.flatnonzero(scores >= max(least, 0.0))
    order = candidates[np.argsort(-scores[candidates], kind="stable")][:count]
    return [(float(scores[index]), int(index // last.shape[1]), int(last.flat[index])) for index in order]


@dataclass(frozen=True, slots=True)
class _Windows:
    """The windows of one context. borders: first token of each and the one after its last, counted in the context."""

    borders: Sequence[tuple[int, int]]

    @classmethod
    def of(cls, part: Part) -> "_Windows":
        sizes = [row.sequence_ids.count(_CONTEXT) for row in part.rows]
        step = sizes[0] - _fitted_stride(part.sample, sizes[0])
        return cls([(number * step, number * step + size) for number, size in enumerate(sizes)])

    def own(self, number: int, first: NDArray[np.int64], last: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether a window is the one with most context around spans; their tokens are counted from its beginning."""
        begin = self.borders[number][0]
        depth = self._depth(number, first + begin, last + begin)
        own = np.ones(last.shape, dtype=bool)
        if number > 0:
            own &= depth > self._depth(number - 1, first + begin, last + begin)
        if number + 1 < len(self.borders):
            own &= depth >= self._depth(number + 1, first + begin, last + begin)
        return own

    def _depth(self, number: int, first: NDArray[np.int64], last: NDArray[np.int64]) -> NDArray[np.float64]:
        """Tokens between spans and the nearer border of a window, where the text goes on; below 0 if one cuts them."""
        begin, end = self.borders[number]
        left = first - begin if number > 0 else np.inf
        right = end - 1 - last if number + 1 < len(self.borders) else np.inf
        return np.minimum(left, right)


def _fitted_stride(sample: Windowed, room: int) -> int:
    """Tokens that windows share, where a question leaves `room` tokens of each for the context."""
    return sample.stride if sample.stride < room else room // 2


def _probabilities(row: Encoding, outputs: Outputs) -> tuple[int, NDArray[np.float64], NDArray[np.float64]]:
    """Where the context begins, and start and end probabilities [1 + tokens of context] of the row's first token,
    which stands for no answer, and of the context.

    Raises InternalError for logits that are not finite.
    """
    context = np.flatnonzero([sequence == _CONTEXT for sequence in row.sequence_ids])
    positions = np.concatenate([[0], context])
    start, end = (activate(finite(outputs[name][positions]), "softmax") for name in QuestionAnswering.output_names)
    return int(context[0]) if len(context) else 0, start, end


def _answers(
    context: str, row: Encoding, first: int, spans: Sequence[tuple[float, int, int]], *, align: bool
) -> dict[str, Answer]:
    """Answers of one window by their text in lower case. first: position of the first token of the context."""
    places = _word_places(row) if align else row.offsets
    answers: dict[str, Answer] = {}
    for score, begin, last in spans:
        start, end = places[first + begin][0], places[first + last][1]
        text = context[start:end]
        if text:
            answer = {"answer": text, "score": 0.0, "start": start, "end": end}
            answers.setdefault(text.lower(), answer)["score"] += score
    return answers


def _terms(part: Part, answer: Answer, *, align: bool) -> list[Term]:
    """The two logits behind an answer; of "", those of a row's first token where it is least probable."""
    found: list[tuple[float, int, int, int]] = []
    for number, (row, outputs) in enumerate(zip(part.rows, part.outputs, strict=True)):
        first, start, end = _probabilities(row, outputs)
        if not answer["answer"]:
            found.append((-float(start[0] * end[0]), number, 0, 0))
            continue
        places = (_word_places(row) if align else row.offsets)[first : first + len(start) - 1]
        begins = [at for at, place in enumerate(places) if place[0] == answer["start"]]
        lasts = [at for at, place in enumerate(places) if place[1] == answer["end"]]
        found += [
            (float(start[begin + 1] * end[last + 1]), number, first + begin, first + last)
            for begin in begins
            for last in lasts
            if begin <= last
        ]
    _, number, begin, last = max(found)
    return [Term(number, "start_logits", (begin,), 1.0), Term(number, "end_logits", (last,), 1.0)]


def _word_places(row: Encoding) -> list[tuple[int, int]]:
    """For each token the characters of its word, as far as the word is in this row; its own if it is of no word."""
    places = row.offsets
    keys = list(zip(row.sequence_ids, row.word_ids, strict=True))
    words: dict[tuple[int | None, int | None], tuple[int, int]] = {}
    for key, (start, end) in zip(keys, places, strict=True):
        words[key] = (words[key][0] if key in words else start, end)
    return [place if key[1] is None else words[key] for key, place in zip(keys, places, strict=True)]


def _scores(prediction: Any) -> dict[str, float]:
    """Scores by answer, of one answer or a list of them."""
    answers = [prediction] if isinstance(prediction, dict) else prediction
    return {answer["answer"].lower(): answer["score"] for answer in answers}
