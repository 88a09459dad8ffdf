"""Many inputs: several in a request, several requests under way, results in order."""

import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, TypeAlias

from marble_client.answer import Answer, Input, ItemError, Json, ModelInfo
from marble_client.errors import BadResponse, MarbleError
from marble_client.retry import Patience
from marble_client.wire import check_model, encode_request, item_error

if TYPE_CHECKING:
    from marble_client.client import Client

BATCH_SIZE = 32
CONCURRENCY = 4
PATIENCE_S = 120.0

# The server's names for what an input does to the request it travels in.
_FAULTS_OF_INPUTS = {"UnreadableRequest", "TooLarge", "UnsupportedMediaType", "InvalidInput", "InternalError"}


@dataclass(frozen=True)
class Batch:
    """The results of inputs that follow each other, in order. `model` is None where none of them was answered."""

    results: list[Json | ItemError]
    truncated: bool
    model: ModelInfo | None


# Yields lists of inputs to send, is sent the answer or thrown the error; returns what became of all inputs.
Asking: TypeAlias = Generator[list[Input], Answer[Json], list[Batch]]


@dataclass(frozen=True)
class Plan:
    """How many inputs are asked. Raises ValueError for what could never succeed.

    batch_size: inputs a request. concurrency: requests under way. patience: seconds to wait through a server's
    trouble. timeout: seconds a request, None for the client's own.
    """

    model: str
    parameters: Mapping[str, Json] | None
    version: str | None = None
    batch_size: int = BATCH_SIZE
    concurrency: int = CONCURRENCY
    patience: float = PATIENCE_S
    timeout: float | None = None

    def __post_init__(self) -> None:
        check_model(self.model, self.version)
        encode_request(None, self.parameters)
        Patience(self.patience)
        if self.batch_size < 1 or self.concurrency < 1:
            raise ValueError("a request needs at least one input, and one request must be under way")


def batches(inputs: Iterable[Input], size: int) -> Iterator[list[Input]]:
    """Lists of `size` inputs, the last one of what is left."""
    rest = iter(inputs)
    while batch := list(islice(rest, size)):
        yield batch


def asking(inputs: list[Input]) -> Asking:
    """Asks for all inputs at once; where one of them fails the whole request, in halves until it stands alone."""
    try:
        answer = yield inputs
    except (MarbleError, ValueError, TypeError) as error:
        fault = _fault(error)
        if fault is None:
            raise
        if len(inputs) == 1:
            return [Batch([fault], False, None)]
    else:
        predictions = answer.predictions
        if not isinstance(predictions, list) or len(predictions) != len(inputs):
            raise BadResponse(f"the server did not answer with {len(inputs)} predictions for {len(inputs)} inputs")
        results = [item_error(entry) or entry for entry in predictions]
        return [Batch(results, answer.usage.truncated, answer.model)]
    half = len(inputs) // 2
    return [*(yield from asking(inputs[:half])), *(yield from asking(inputs[half:]))]


def predict_batches(client: "Client", inputs: Iterable[Input], plan: Plan) -> Generator[Batch]:
    """What becomes of `inputs`, in order and in constant memory. Raises what no single input is to blame for.

    What was answered before the failure is yielded first.
    """
    stopped = threading.Event()

    def ask(batch: list[Input]) -> Answer[Json]:
        patience = Patience(plan.patience)
        while True:
            try:
                return client.predict(plan.model, batch, plan.parameters, version=plan.version, timeout=plan.timeout)
            except MarbleError as error:
                if stopped.wait(patience.pause(error)):
                    raise

    def work(batch: list[Input]) -> list[Batch]:
        steps = asking(batch)
        try:
            batch = next(steps)
            while True:
                try:
                    answer = ask(batch)
                except (MarbleError, ValueError, TypeError) as error:
                    batch = steps.throw(error)
                else:
                    batch = steps.send(answer)
        except StopIteration as done:
            outcome: list[Batch] = done.value
            return outcome

    pool = ThreadPoolExecutor(plan.concurrency)
    waiting: deque[Future[list[Batch]]] = deque()
    try:
        for batch in batches(inputs, plan.batch_size):
            # The caller's trace goes along into the thread.
            waiting.append(pool.submit(copy_context().run, work, batch))
            # As many again wait their turn, so that a slow request at the head does not idle the others.
            if len(waiting) == 2 * plan.concurrency:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


def _fault(error: MarbleError | ValueError | TypeError) -> ItemError | None:
    """The error as that of an input; None if it says nothing about the inputs."""
    if not isinstance(error, MarbleError):
        return ItemError(str(error), 422, "InvalidInput")  # JSON cannot say it
    # Over a limit of TorchServe's, or of the memory, there is no such name, and fewer inputs may do.
    if error.type in _FAULTS_OF_INPUTS or error.code in (413, 507):
        return ItemError(error.message, error.code, error.type)
    return None
