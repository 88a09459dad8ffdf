"""The interface of a client, and what its transports share."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Literal, Protocol, Self, overload

from marble_client.answer import Answer, Input, ItemError, Json, Label, ModelInfo, ServedModel
from marble_client.errors import BadResponse, NotFound, error_for
from marble_client.many import BATCH_SIZE, CONCURRENCY, PATIENCE_S, Plan, predict_batches
from marble_client.retry import Deadline, with_retries
from marble_client.wire import (
    CANARY,
    check_model,
    decode_answer,
    decode_description,
    decode_drift,
    decode_labels,
    decode_page,
    encode_request,
)

FunctionToApply = Literal["softmax", "sigmoid", "none"]
Overflow = Literal["error", "truncate", "window"]


class Client(Protocol):
    """A connection to a Marble server, the same over any transport. Use it in a `with` block, or close it.

    Every method raises a subclass of MarbleError when the call fails, and ValueError or TypeError when it
    could never succeed. Timeouts are overall deadlines in seconds, retries included; None means the client's
    own. Only 429, 503 and a refused connection are tried again, at most three times in all.
    """

    @abstractmethod
    def predict(
        self,
        model: str,
        inputs: Input,
        parameters: Mapping[str, Json] | None = None,
        *,
        version: str | None = None,
        timeout: float | None = None,
    ) -> Answer[Json]:
        """Predict for `inputs`, in the Hugging Face Inference API's shapes; a list gives a list.

        Images and sounds are sent as `bytes`; those that a model answers with come as base64 strings.
        """

    @abstractmethod
    def canary(self, model: str, *, version: str | None = None, timeout: float | None = None) -> float:
        """Have the model answer its first golden example; returns how far a score drifts from the golden answer.

        Raises ServerError of the type WrongAnswer if it answers wrongly.
        """

    @abstractmethod
    def identify(self, model: str, *, version: str | None = None, timeout: float | None = None) -> ModelInfo:
        """Which model answers, and what its task is; asked with its canary. Raises what `canary` raises."""

    @abstractmethod
    def ready(self, model: str, version: str | None = None) -> bool:
        """Whether a worker of the model is READY. Only `canary` proves that it answers."""

    @abstractmethod
    def models(self) -> list[ServedModel]:
        """The default version of every registered model, sorted by name."""

    @abstractmethod
    def close(self) -> None:
        """Close the connections."""

    @overload
    def classify(
        self,
        model: str,
        texts: str,
        *,
        top_k: int | None = None,
        function_to_apply: FunctionToApply | None = None,
        overflow: Overflow | None = None,
        version: str | None = None,
        timeout: float | None = None,
    ) -> Answer[list[Label]]: ...

    @overload
    def classify(
        self,
        model: str,
        texts: list[str] | tuple[str, ...],
        *,
        top_k: int | None = None,
        function_to_apply: FunctionToApply | None = None,
        overflow: Overflow | None = None,
        version: str | None = None,
        timeout: float | None = None,
    ) -> Answer[list[list[Label] | ItemError]]: ...

    def classify(
        self,
        model: str,
        texts: str | list[str] | tuple[str, ...],
        *,
        top_k: int | None = None,
        function_to_apply: FunctionToApply | None = None,
        overflow: Overflow | None = None,
        version: str | None = None,
        timeout: float | None = None,
    ) -> Answer[list[Label]] | Answer[list[list[Label] | ItemError]]:
        """Classify one text, or a list of texts in one request.

        One text gives its labels. A list gives one entry for each text, in order: its labels, or an
        ItemError where that text alone failed. Options left at None are the model's own.
        """
        given = given_options(top_k=top_k, function_to_apply=function_to_apply, overflow=overflow)
        return classified(texts, self.predict(model, texts, given, version=version, timeout=timeout))

    def predict_many(
        self,
        model: str,
        inputs: Iterable[Input],
        parameters: Mapping[str, Json] | None = None,
        *,
        version: str | None = None,
        batch_size: int = BATCH_SIZE,
        concurrency: int = CONCURRENCY,
        patience: float = PATIENCE_S,
        timeout: float | None = None,
    ) -> Iterator[Json | ItemError]:
        """Predict for any number of inputs, in constant memory: one result for each, in order.

        `batch_size` inputs travel in a request, and `concurrency` requests are under way. An input that fails is an
        ItemError in its place. For `patience` seconds a request waits through the server's trouble: besides what every
        call tries again, a lost connection, a worker that died, an answer later than `timeout` (seconds a request).
        What no input is to blame for is raised, after the results before it.
        """
        plan = Plan(model, parameters, version, batch_size, concurrency, patience, timeout)
        return (result for batch in predict_batches(self, inputs, plan) for result in batch.results)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TransportClient(Client):
    """A client in terms of three exchanges of bytes, which are all that a transport has to supply.

    Each of them makes one attempt, finishes by the deadline, and raises a MarbleError when it fails.
    """

    def __init__(self, timeout: float) -> None:
        Deadline(timeout)  # refuses what can be no timeout now, not at the first call
        self._timeout = timeout

    @abstractmethod
    def _predict(self, model: str, version: str | None, body: bytes, deadline: Deadline) -> bytes: ...

    @abstractmethod
    def _describe(self, model: str, version: str | None, deadline: Deadline) -> bytes: ...

    @abstractmethod
    def _list(self, page: int, deadline: Deadline) -> bytes: ...

    def predict(
        self,
        model: str,
        inputs: Input,
        parameters: Mapping[str, Json] | None = None,
        *,
        version: str | None = None,
        timeout: float | None = None,
    ) -> Answer[Json]:
        check_model(model, version)
        body = encode_request(inputs, parameters)
        return self._answer(lambda deadline: self._predict(model, version, body, deadline), timeout)

    def canary(self, model: str, *, version: str | None = None, timeout: float | None = None) -> float:
        return decode_drift(self._canary(model, version, timeout).predictions)

    def identify(self, model: str, *, version: str | None = None, timeout: float | None = None) -> ModelInfo:
        return self._canary(model, version, timeout).model

    def ready(self, model: str, version: str | None = None) -> bool:
        check_model(model, version)
        try:
            return self._described(model, version, Deadline(self._timeout)).ready_workers > 0
        except NotFound:
            return False

    def models(self) -> list[ServedModel]:
        deadline = Deadline(self._timeout)
        served = []
        for name in self._names(deadline):
            try:
                served.append(self._described(name, None, deadline))
            except NotFound:
                continue  # unregistered since it was listed
        return sorted(served, key=lambda model: model.name)

    def _canary(self, model: str, version: str | None, timeout: float | None) -> Answer[Json]:
        check_model(model, version)
        return self._answer(lambda deadline: self._predict(model, version, CANARY, deadline), timeout)

    def _answer(self, exchange: Callable[[Deadline], bytes], timeout: float | None) -> Answer[Json]:
        """The answer to an exchange of bytes, with retries. timeout: seconds, None for the client's own."""
        deadline = Deadline(self._timeout if timeout is None else timeout)
        return with_retries(lambda: decode_answer(exchange(deadline)), deadline)

    def _names(self, deadline: Deadline) -> list[str]:
        names: list[str] = []
        page = 0
        while True:
            found, following = self._page(page, deadline)
            names += found
            if following is None:
                return names
            page = following

    def _page(self, page: int, deadline: Deadline) -> tuple[list[str], int | None]:
        return with_retries(lambda: decode_page(self._list(page, deadline), page), deadline)

    def _described(self, model: str, version: str | None, deadline: Deadline) -> ServedModel:
        return with_retries(lambda: decode_description(self._describe(model, version, deadline)), deadline)


def given_options(**options: Json) -> dict[str, Json]:
    """Those that are not left at None, which is the model's own."""
    return {name: value for name, value in options.items() if value is not None}


def classified(
    texts: str | Sequence[str], answer: Answer[Json]
) -> Answer[list[Label]] | Answer[list[list[Label] | ItemError]]:
    """The answer to a classification of one text or several. Raises BadResponse if it is no such answer."""
    single = isinstance(texts, str)
    count = 1 if single else len(texts)
    if not isinstance(answer.predictions, list) or len(answer.predictions) != count:
        raise BadResponse(f"the server did not answer with {count} predictions for {count} texts")
    entries = [decode_labels(entry) for entry in answer.predictions]
    if not single:
        return Answer(entries, answer.usage, answer.model)
    if isinstance(entries[0], ItemError):
        raise error_for(entries[0].code, entries[0].type, entries[0].error)
    return Answer(entries[0], answer.usage, answer.model)
