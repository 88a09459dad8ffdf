"""Many inputs: several in a request, several requests under way, results in order."""

import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from marble_client.answer import Answer, Input, ItemError, Json, ModelInfo
from marble_client.errors import BadResponse, ConnectionFailed, MarbleError, Timeout
from marble_client.retry import WORKER_DIED, Patience
from marble_client.wire import check_model, encode_request, item_error

if TYPE_CHECKING:
    from marble_client.client import Client

T = TypeVar("T")

BATCH_SIZE = 32
CONCURRENCY = 4
PATIENCE_S = 120.0
STRIKES = 3

# The server's names for what an input does to the request it travels in.
_FAULTS_OF_INPUTS = {"UnreadableRequest", "TooLarge", "UnsupportedMediaType", "InvalidInput", "InternalError"}
_OVERLOADED = "Overloaded"


@dataclass(frozen=True)
class Batch:
    """The results of inputs that follow each other, in order. `model` is None where none of them was answered."""

    results: list[Json | ItemError]
    truncated: bool
    model: ModelInfo | None


@dataclass(frozen=True)
class Ask:
    """Predict for these inputs, in one request."""

    inputs: list[Input]


@dataclass(frozen=True)
class Pause:
    """Wait so many seconds."""

    seconds: float


@dataclass(frozen=True)
class Prove:
    """Ask the canary."""


# What is to be done next, whether it is called or awaited: yields it, is sent the answer or thrown the error.
Asking: TypeAlias = Generator[Ask | Pause | Prove, Any, T]


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


def asking(inputs: list[Input], patience: float) -> Asking[list[Batch]]:
    """Asks for all inputs at once; where one of them fails the whole request, in halves until it stands alone."""
    outcome = yield from _asking_once(inputs, Patience(patience))
    if isinstance(outcome, Batch):
        return [(yield from _asking_the_late(inputs, outcome, patience))]
    if len(inputs) == 1:
        return [Batch([outcome], False, None)]
    half = len(inputs) // 2
    first = yield from asking(inputs[:half], patience)
    return first + (yield from asking(inputs[half:], patience))


def _asking_the_late(inputs: list[Input], batch: Batch, patience: float) -> Asking[Batch]:
    """Asks once more, among themselves, for inputs that were too much beside the others: texts to generate, say."""
    late = [at for at, result in enumerate(batch.results) if isinstance(result, ItemError) and result.code == 503]
    if not late or len(late) == len(inputs):
        return batch
    again = yield from asking([inputs[at] for at in late], patience)
    found = dict(zip(late, (result for part in again for result in part.results), strict=True))
    results = [found.get(at, result) for at, result in enumerate(batch.results)]
    return Batch(results, batch.truncated or any(part.truncated for part in again), batch.model)


def _asking_once(inputs: list[Input], patience: Patience) -> Asking[Batch | ItemError]:
    """Asks for all inputs in one request, through the server's trouble. An ItemError is what one of them has caused."""
    strikes = 0
    while True:
        try:
            return _batch((yield Ask(inputs)), len(inputs))
        except (ValueError, TypeError) as cause:  # JSON cannot say it
            return ItemError(str(cause), 422, "InvalidInput")
        except MarbleError as cause:
            error = cause
        fault = ItemError(error.message, error.code, error.type)
        # Over a limit of TorchServe's, or of the memory, there is no such name, and fewer inputs may do.
        if error.type in _FAULTS_OF_INPUTS or error.code in (413, 507):
            return fault
        strikes += _may_be_caused(error)
        if strikes >= STRIKES:
            if error.type == _OVERLOADED and len(inputs) > 1:
                return fault
            if error.type != _OVERLOADED and (yield from _proving()):
                return fault
        try:
            wait = patience.pause(error)
        except MarbleError:
            if error.type == _OVERLOADED:  # a handler says so: the server is well
                return fault
            raise
        yield Pause(wait)


def _may_be_caused(error: MarbleError) -> bool:
    """Whether a request may have brought the trouble about.

    A worker may die of an input, a connection of too large a request, a deadline of too slow an answer, and a model
    have too much to generate at once.
    """
    sent = isinstance(error, ConnectionFailed) and error.sent
    return sent or isinstance(error, Timeout) or error.type in (WORKER_DIED, _OVERLOADED)


def _proving() -> Asking[bool]:
    """Whether the server answers its canary, so that trouble is not its own."""
    try:
        yield Prove()
    except MarbleError:
        return False
    return True


def _batch(answer: Answer[Json], count: int) -> Batch:
    predictions = answer.predictions
    if not isinstance(predictions, list) or len(predictions) != count:
        raise BadResponse(f"the server did not answer with {count} predictions for {count} inputs")
    return Batch([item_error(entry) or entry for entry in predictions], answer.usage.truncated, answer.model)


def predict_batches(client: "Client", inputs: Iterable[Input], plan: Plan) -> Generator[Batch]:
    """What becomes of `inputs`, in order and in constant memory. Raises what no single input is to blame for.

    What was answered before the failure is yielded first.
    """
    stopped = threading.Event()

    def do(step: Ask | Pause | Prove) -> Answer[Json] | float | bool:
        if isinstance(step, Ask):
            return client.predict(plan.model, step.inputs, plan.parameters, version=plan.version, timeout=plan.timeout)
        if isinstance(step, Prove):
            return client.canary(plan.model, version=plan.version, timeout=plan.timeout)
        return stopped.wait(step.seconds)

    def work(inputs: list[Input]) -> list[Batch]:
        steps = asking(inputs, plan.patience)
        try:
            step = next(steps)
            while not stopped.is_set():
                try:
                    answer = do(step)
                except (MarbleError, ValueError, TypeError) as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)
        except StopIteration as done:
            outcome: list[Batch] = done.value
            return outcome
        return []  # nobody waits for it

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
