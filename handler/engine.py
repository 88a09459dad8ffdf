"""The engine: requests in, results out, in one process and with no server.

engine = Engine(Path("artifacts/reviews"))
[result] = engine.predict([Request(["A fine pair of boots."])])
result.predictions[0]  # [{"label": "positive", "score": 0.97}, …]
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from handler import backends, explain, tasks
from handler.batching import micro_batches
from handler.errors import InvalidInput, InvalidParameter, NotSupported, Overloaded, RequestError, TooLarge
from handler.explain import Explainable, Explanation, ExplanationParameters
from handler.inputs import Encoded
from handler.messages import Piece, Request, Result, Usage, Work
from handler.parameters import parse
from handler.settings import Settings
from handler.tasks import Answer, EncoderTask, GenerativeTask, Outputs, Part, StreamingTask

# A batch may hold as much work as this many requests of the largest size.
_BATCH_SHARE = 4


@dataclass(slots=True)
class _Item:
    """One input on its way through the engine; ends with a prediction, an explanation of one, or an error.

    explain: how it is explained, None if it is not; explanation: what becomes of that.
    """

    parameters: Any
    explain: ExplanationParameters | None = None
    samples: Sequence[Any] = ()
    encoded: list[Encoded] = field(default_factory=list)
    outputs: list[Outputs] = field(default_factory=list)
    missing: int = 0
    truncated: bool = False
    tokens: int = 0
    explanation: Explanation | None = None
    outcome: Any = None

    @property
    def rows(self) -> int:
        """How many rows go through the model for it: one in a generative task, which encodes by itself."""
        return sum(len(encoded.rows) for encoded in self.encoded) or 1


class Engine:
    """A loaded model that answers batches of requests.

    `model_dir` is a bundle or an unpacked archive. Keyword arguments replace single settings, e.g. `precision="bf16"`.
    Raises ValueError if the folder is not a model Marble can run, ImportError if the backend is not installed.
    `backend` runs the model of a task that needs one pass for each row; another may be put in its place. `work`: what
    was spent on the requests so far.
    """

    backend: backends.Backend

    def __init__(self, model_dir: Path, **overrides: Any) -> None:
        self.work = Work()
        self.settings = replace(Settings.load(model_dir), **overrides)
        self.task = tasks.load(self.settings.task)(model_dir, self.settings, read_config(model_dir))
        if isinstance(self.task, EncoderTask):
            names = self.task.output_names
            self.backend = backends.load(model_dir, self.settings, self.task.auto_model, names)
        elif self.settings.backend != "torch":
            raise ValueError(f"{self.settings.task} runs on the torch backend only, not on {self.settings.backend}")

    def predict(self, requests: Sequence[Request]) -> list[Result | RequestError]:
        """Answers each request, in order.

        All samples of all requests are encoded together and run in length-sorted micro-batches. What is wrong with
        one request or one of its inputs becomes its own RequestError and leaves the others alone.
        """
        started = encoded = time.perf_counter()
        jobs = [self._open(request) for request in requests]
        if isinstance(self.task, EncoderTask):
            self._encode(self.task, jobs)
            encoded = time.perf_counter()
            self._run(self.task, _open_items(jobs))
            self._explain(self.task, jobs)
        elif isinstance(self.task, GenerativeTask):
            self._ration_texts(self.task, jobs)
            encoded = time.perf_counter()
            _generate(self.task, _open_items(jobs))
        self.work.encoding_seconds += encoded - started
        self.work.inference_seconds += time.perf_counter() - encoded
        return [_outcome(job) for job in jobs]

    def stream(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Piece | Result | RequestError]]]:
        """Answers requests as `predict` does, but yields step by step what there is to say, by place in `requests`.

        A request that wants a stream has pieces, up to the last, or an error in place of the next one; the others
        have their outcome as soon as it is there.
        """
        if not isinstance(self.task, StreamingTask):
            yield list(enumerate(self.predict(requests)))
            return
        started = time.perf_counter()
        jobs = [self._open(request) for request in requests]
        self._ration_texts(self.task, jobs)
        encoded = time.perf_counter()
        self.work.encoding_seconds += encoded - started
        yield [(index, _outcome(job)) for index, job in enumerate(jobs) if not _open_items([job])]
        items = [(index, item) for index, job in enumerate(jobs) for item in _open_items([job])]
        asked = [(item.samples, item.parameters) for _, item in items]
        for step in self.task.stream(asked, [requests[index].stream for index, _ in items]) if items else ():
            said: list[tuple[int, Piece | Result | RequestError]] = []
            for place, found in step:
                index, item = items[place]
                if isinstance(found, Piece):
                    said.append((index, found))
                    continue
                _settle(item, found)
                if not _open_items([jobs[index]]):
                    said.append((index, _outcome(jobs[index])))
            yield said
        self.work.inference_seconds += time.perf_counter() - encoded

    def _ration_texts(self, task: GenerativeTask, jobs: list[list[_Item] | RequestError]) -> None:
        _ration(jobs, lambda item: sum(map(task.size, item.samples)), self.settings.max_characters, "characters")

    def _open(self, request: Request) -> list[_Item] | RequestError:
        try:
            if request.stream and not isinstance(self.task, StreamingTask):
                raise NotSupported('this model does not stream its answers; leave out "stream"')
            if request.stream and len(request.inputs) != 1:
                raise InvalidInput("a stream answers one input; send one request for each")
            how, parameters = self._parameters(request)
            if not request.inputs:
                raise InvalidInput("there is nothing to answer: the list of inputs is empty")
            if len(request.inputs) > self.settings.max_inputs:
                raise TooLarge(f"{len(request.inputs)} inputs; send at most {self.settings.max_inputs} in one request")
        except RequestError as error:
            return error
        items = []
        for value in request.inputs:
            item = _Item(parameters, how)
            try:
                item.samples = self.task.read(value, parameters)
            except RequestError as error:
                item.outcome = error
            items.append(item)
        return items

    def _parameters(self, request: Request) -> tuple[ExplanationParameters | None, Any]:
        """How a request is to be explained, if it is, and the task's parameters."""
        if not request.explain:
            return None, parse(self.task.Parameters, request.parameters)
        if not isinstance(self.task, Explainable):
            raise NotSupported("the answers of this task are not explained; ask for predictions")
        own = {name: request.parameters[name] for name in explain.NAMES if name in request.parameters}
        others = {name: value for name, value in request.parameters.items() if name not in own}
        how = parse(ExplanationParameters, own)
        if how.method == "integrated_gradients" and not hasattr(self.backend, "integrated_gradients"):
            raise InvalidParameter(
                f"this model runs on {self.settings.backend}, which has no gradients: leave the parameter 'method' "
                "out, or build the archive with --backend torch"
            )
        return how, parse(self.task.Parameters, others, beside=explain.NAMES)

    def _encode(self, task: EncoderTask, jobs: list[list[_Item] | RequestError]) -> None:
        """Encodes the samples of all items in one call and applies the limits and the overflow policy."""
        measure, limit = task.measure, getattr(self.settings, task.measure.limit)
        for item in _open_items(jobs):
            if (size := max(map(task.inputs.size, item.samples))) > limit:
                item.outcome = TooLarge(f"the {measure.what} has {size} {measure.unit}; at most {limit} are taken")
        _ration(jobs, lambda item: sum(map(task.inputs.size, item.samples)), limit, measure.unit)
        items = _open_items(jobs)
        samples = [sample for item in items for sample in item.samples]
        encoded = iter(task.inputs.encode(samples) if samples else [])
        for item in items:
            outcomes = [next(encoded) for _ in item.samples]
            try:
                item.encoded = [self._admit(item, outcome, measure.what) for outcome in outcomes]
            except RequestError as error:
                item.outcome = error
        positions = self.settings.max_tokens
        _ration(jobs, lambda item: sum(len(r) for e in item.encoded for r in e.rows), positions, "tokens to run")

    def _admit(self, item: _Item, encoded: Encoded | RequestError, what: str) -> Encoded:
        """Applies the overflow policy. Raises RequestError where the sample is broken or the policy refuses it."""
        if isinstance(encoded, RequestError):
            raise encoded
        item.tokens += encoded.tokens
        if not encoded.overflows:
            return encoded
        policy = item.parameters.overflow or self.settings.overflow
        if policy == "error":
            raise TooLarge(
                f"the {what} {_extent(encoded, self.settings.max_length)}; "
                'shorten it, or send the parameter "overflow": "truncate" or "window"'
            )
        if policy == "truncate":
            item.truncated = True
            return replace(encoded, rows=encoded.rows[:1])
        if len(encoded.rows) == 1:
            raise TooLarge(
                f"the two texts have {encoded.tokens} tokens, the model takes {self.settings.max_length}, and a pair "
                'cannot be split into windows; shorten them, or send the parameter "overflow": "truncate"'
            )
        if len(encoded.rows) > self.settings.max_windows:
            raise TooLarge(
                f"the {what} has {f'{encoded.tokens} tokens in ' if encoded.tokens else ''}{len(encoded.rows)} windows "
                f"and at most {self.settings.max_windows} windows are taken; split it into several inputs"
            )
        return encoded

    def _run(self, task: EncoderTask, items: Sequence[_Item]) -> None:
        """Puts the rows of all items through the model and writes each item's outcome.

        An item is finished as soon as its last row is through: the model is busy with others meanwhile.
        """
        owners = [(item, place) for item in items for place in range(item.rows)]
        for item in items:
            item.missing, item.outputs = item.rows, [{}] * item.rows
        for index, outputs in self._forward(task, [row for item in items for e in item.encoded for row in e.rows]):
            item, place = owners[index]
            item.outputs[place] = outputs
            item.missing -= 1
            if not item.missing:
                self._finish(task, item)

    def _finish(self, task: EncoderTask, item: _Item) -> None:
        """Turns the outputs of an item's rows into its outcome, or into the beginning of an explanation."""
        outputs = iter(item.outputs)
        parts = [
            Part(sample, encoded.rows, [next(outputs) for _ in encoded.rows])
            for sample, encoded in zip(item.samples, item.encoded, strict=True)
        ]
        item.outputs = []
        try:
            prediction = task.postprocess(parts, item.parameters)
            if item.explain is None:
                item.outcome = prediction
            else:
                assert isinstance(task, Explainable)
                [part] = parts
                budget = self.settings.max_explanation_tokens
                targets = task.targets(part, prediction, item.parameters)
                item.explanation = Explanation(task.inputs, item.explain, part, prediction, targets, budget)
        except RequestError as error:
            item.outcome = error

    def _explain(self, task: EncoderTask, jobs: list[list[_Item] | RequestError]) -> None:
        """Explains what is to be explained, all inputs of all requests together."""
        _ration(jobs, _cost_of_explanation, self.settings.max_tokens, "tokens to run")
        items = _open_items(jobs)
        found = [item.explanation for item in items if item.explanation is not None]
        occlusions = [explanation for explanation in found if explanation.method == "occlusion"]
        hidden = [(explanation, each) for explanation in occlusions for each in explanation.occluded()]
        for index, outputs in self._forward(task, [each.row for _, each in hidden]) if hidden else ():
            explanation, each = hidden[index]
            explanation.take_occluded(each, outputs)
        for explanation in found:
            if explanation.method == "integrated_gradients":
                self._integrate(task, explanation)
        for item in items:
            if item.explanation is not None:
                try:
                    item.outcome = item.explanation.answer()
                except RequestError as error:
                    item.outcome = error

    def _integrate(self, task: EncoderTask, explanation: Explanation) -> None:
        """Takes an explanation's integrated gradients; rows of like length go together."""
        paths = list(explanation.paths())
        lengths = [len(path.row) for path in paths]
        for group in micro_batches(lengths, self.settings.token_budget) if paths else ():
            chosen = [paths[index] for index in group]
            attributions, deltas = self.backend.integrated_gradients(  # type: ignore[attr-defined]
                task.inputs.collate([path.row for path in chosen]),
                task.inputs.collate([path.hidden.row for path in chosen]),
                [[(term.output, term.index, term.weight) for term in path.terms] for path in chosen],
                explanation.steps,
                max(lengths[index] for index in group),
            )
            for path, found, delta in zip(chosen, attributions, deltas, strict=True):
                explanation.take_gradients(path, found, float(delta))

    def _forward(self, task: EncoderTask, rows: Sequence[Any]) -> Iterator[tuple[int, Outputs]]:
        """The outputs of each row, with its place in `rows`, as they come."""
        kinds = [task.kind(row) for row in rows]
        groups = micro_batches(list(map(len, rows)), self.settings.token_budget, kinds, self.backend.streams)
        self.work.micro_batches += map(len, groups)
        batches = (task.inputs.collate([rows[index] for index in group]) for group in groups)
        for group, found in zip(groups, self.backend.run(batches), strict=True):
            for position, index in enumerate(group):
                yield index, task.keep(rows[index], {name: array[position] for name, array in found.items()})


def _cost_of_explanation(item: _Item) -> float:
    return 0.0 if item.explanation is None else item.explanation.cost


def _extent(encoded: Encoded, max_length: int) -> str:
    if not encoded.tokens:
        return "is longer than what the model takes at once"
    return f"has {encoded.tokens} tokens and the model takes {max_length}"


def read_config(model_dir: Path) -> dict[str, Any]:
    """The model's `config.json`, {} for a model of several parts, which has none. Raises ValueError if unreadable."""
    path = model_dir / "config.json"
    if not path.exists() and (model_dir / "model_index.json").exists():
        return {}
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); build or copy the model again") from None
    return config


def _generate(task: GenerativeTask, items: Sequence[_Item]) -> None:
    """Has a generative task answer all items."""
    outcomes = task.generate([(item.samples, item.parameters) for item in items]) if items else []
    for item, outcome in zip(items, outcomes, strict=True):
        _settle(item, outcome)


def _settle(item: _Item, outcome: Answer | RequestError) -> None:
    """Writes what a generative task found for an item."""
    if isinstance(outcome, RequestError):
        item.outcome = outcome
    else:
        item.tokens, item.truncated, item.outcome = outcome.tokens, outcome.truncated, outcome.prediction


def _open_items(jobs: Sequence[list[_Item] | RequestError]) -> list[_Item]:
    """Items of all requests that have no outcome yet."""
    return [item for job in jobs if isinstance(job, list) for item in job if item.outcome is None]


def _ration(jobs: list[list[_Item] | RequestError], cost: Callable[[_Item], float], most: float, unit: str) -> None:
    """Bounds the work of a batch, so that no request, and no number of them, keeps a worker past its response timeout.

    A request that costs more than `most` is refused for good (413). Of the others, those that would take the batch
    over four times as much are to be sent again (503).
    """
    spent = 0.0
    for index, job in enumerate(jobs):
        needed = sum(map(cost, _open_items([job])))
        if needed > most:
            jobs[index] = TooLarge(
                f"the request has {round(needed, 2)} {unit}; at most {most} are taken: send fewer inputs at once"
            )
        elif spent + needed > most * _BATCH_SHARE:
            jobs[index] = Overloaded("the server is busy with other large requests; send this one again in a moment")
        else:
            spent += needed


def _outcome(items: Sequence[_Item] | RequestError) -> Result | RequestError:
    """One result per request; a request all of whose inputs failed is the first of their errors."""
    if isinstance(items, RequestError):
        return items
    outcomes = [item.outcome for item in items]
    errors = [outcome for outcome in outcomes if isinstance(outcome, RequestError)]
    if len(errors) == len(outcomes) and errors:
        return errors[0]
    usage = Usage(
        tokens=sum(item.tokens for item in items),
        truncated=any(item.truncated for item in items),
        windows=sum(item.rows for item in items if not isinstance(item.outcome, RequestError)),
    )
    return Result(outcomes, usage, items[0].parameters.details, items[0].explain is not None)
