"""The engine: requests in, results out, in one process and with no server.

engine = Engine(Path("artifacts/reviews"))
[result] = engine.predict([Request(["A fine pair of boots."])])
result.predictions[0]  # [{"label": "positive", "score": 0.97}, …]
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

from handler import backends, tasks
from handler.batching import collate, micro_batches
from handler.errors import InvalidInput, Overloaded, RequestError, TooLarge
from handler.messages import Request, Result, Usage
from handler.parameters import CommonParameters, parse
from handler.settings import Settings
from handler.tokenization import EncodedText, TextTokenizer

# A batch may hold as much work as this many requests of the largest size.
_BATCH_SHARE = 4


@dataclass(slots=True)
class _Item:
    """One input on its way through the engine; ends with a prediction or an error."""

    parameters: CommonParameters
    text: str = ""
    windows: list[Encoding] = field(default_factory=list)
    tokens: int = 0
    truncated: bool = False
    outcome: Any = None


class Engine:
    """A loaded model that answers batches of requests.

    `model_dir` is a bundle or an unpacked archive. Keyword arguments replace single settings, e.g. `precision="bf16"`.
    Raises ValueError if the folder is not a model Marble can run, ImportError if the backend is not installed.
    """

    def __init__(self, model_dir: Path, **overrides: Any) -> None:
        self.settings = replace(Settings.load(model_dir), **overrides)
        config = _read_config(model_dir / "config.json")
        self.task = tasks.load(self.settings.task)(config)
        self._tokenizer = TextTokenizer(model_dir, self.settings.max_length, self.settings.stride)
        self._pad_id = int(config.get("pad_token_id") or 0)
        self._backend = backends.load(model_dir, self.settings, self.task.auto_model)

    def predict(self, requests: Sequence[Request]) -> list[Result | RequestError]:
        """Answers each request, in order.

        All texts of all requests are tokenized together and run in length-sorted micro-batches. What is wrong with
        one request or one of its inputs becomes its own RequestError and leaves the others alone.
        """
        jobs = [self._open(request) for request in requests]
        _ration(jobs, lambda item: len(item.text), self.settings.max_characters, "characters")
        items = _open_items(jobs)
        encoded = self._tokenizer([item.text for item in items]) if items else []
        for item, text in zip(items, encoded, strict=True):
            try:
                self._admit(item, text)
            except RequestError as error:
                item.outcome = error
        _ration(jobs, lambda item: sum(map(len, item.windows)), self.settings.max_tokens, "tokens to run")
        self._run(_open_items(jobs))
        return [_close(job) if isinstance(job, list) else job for job in jobs]

    def _open(self, request: Request) -> list[_Item] | RequestError:
        try:
            parameters = parse(self.task.Parameters, request.parameters)
            if not request.inputs:
                raise InvalidInput("there is nothing to answer: the list of inputs is empty")
            if len(request.inputs) > self.settings.max_inputs:
                raise TooLarge(f"{len(request.inputs)} inputs; send at most {self.settings.max_inputs} in one request")
        except RequestError as error:
            return error
        items = []
        for value in request.inputs:
            item = _Item(parameters)
            try:
                item.text = self.task.read(value)
                if len(item.text) > self.settings.max_characters:
                    raise TooLarge(
                        f"the text has {len(item.text)} characters; at most {self.settings.max_characters} are taken"
                    )
            except RequestError as error:
                item.outcome = error
            items.append(item)
        return items

    def _admit(self, item: _Item, text: EncodedText) -> None:
        """Applies the overflow policy. Raises TooLarge where it refuses the text."""
        item.tokens, item.windows = text.tokens, text.windows
        if len(text.windows) == 1:
            return
        policy = item.parameters.overflow or self.settings.overflow
        if policy == "error":
            raise TooLarge(
                f"the text has {text.tokens} tokens and the model takes {self.settings.max_length}; "
                'shorten it, or send the parameter "overflow": "truncate" or "window"'
            )
        if policy == "truncate":
            item.windows, item.truncated = text.windows[:1], True
        elif len(text.windows) > self.settings.max_windows:
            raise TooLarge(
                f"the text has {text.tokens} tokens in {len(text.windows)} windows and at most "
                f"{self.settings.max_windows} windows are taken; split it into several inputs"
            )

    def _run(self, items: Sequence[_Item]) -> None:
        """Puts the windows of all items through the model and writes each item's outcome."""
        windows = [window for item in items for window in item.windows]
        rows = self._logits(windows)
        start = 0
        for item in items:
            end = start + len(item.windows)
            weights = np.array([len(window) for window in item.windows], dtype=np.float32)
            try:
                item.outcome = self.task.postprocess(rows[start:end], weights / weights.sum(), item.parameters)
            except RequestError as error:
                item.outcome = error
            start = end

    def _logits(self, windows: Sequence[Encoding]) -> NDArray[np.float32]:
        """Logits [windows, labels] in the order of `windows`."""
        lengths = [len(window) for window in windows]
        indices: list[int] = []
        blocks = []
        for group in micro_batches(lengths, self.settings.token_budget):
            arrays = collate([windows[index] for index in group], self._pad_id, self.settings.max_length)
            blocks.append(self._backend(arrays)["logits"])
            indices += group
        if not blocks:
            return np.empty((0, 0), dtype=np.float32)
        logits = np.concatenate(blocks)
        ordered = np.empty_like(logits)
        ordered[indices] = logits
        return ordered


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); build or copy the model again") from None
    return config


def _open_items(jobs: Sequence[list[_Item] | RequestError]) -> list[_Item]:
    """Items of all requests that have no outcome yet."""
    return [item for job in jobs if isinstance(job, list) for item in job if item.outcome is None]


def _ration(jobs: list[list[_Item] | RequestError], cost: Callable[[_Item], int], most: int, unit: str) -> None:
    """Bounds the work of a batch, so that no request, and no number of them, keeps a worker past its response timeout.

    A request that costs more than `most` is refused for good (413). Of the others, those that would take the batch
    over four times as much are to be sent again (503).
    """
    spent = 0
    for index, job in enumerate(jobs):
        needed = sum(map(cost, _open_items([job])))
        if needed > most:
            jobs[index] = TooLarge(
                f"the request has {needed} {unit}; at most {most} are taken: send fewer inputs at once"
            )
        elif spent + needed > most * _BATCH_SHARE:
            jobs[index] = Overloaded("the server is busy with other large requests; send this one again in a moment")
        else:
            spent += needed


def _close(items: Sequence[_Item]) -> Result | RequestError:
    """One result per request; a request all of whose inputs failed is the first of their errors."""
    outcomes = [item.outcome for item in items]
    errors = [outcome for outcome in outcomes if isinstance(outcome, RequestError)]
    if len(errors) == len(outcomes) and errors:
        return errors[0]
    usage = Usage(
        tokens=sum(item.tokens for item in items),
        truncated=any(item.truncated for item in items),
        windows=sum(len(item.windows) for item in items if not isinstance(item.outcome, RequestError)),
    )
    return Result(outcomes, usage, details=items[0].parameters.details)
