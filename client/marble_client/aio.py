"""The interface of a client that is awaited, and what its transports share."""

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from types import TracebackType
from typing import Self, TypeVar, overload

from marble_client.answer import Answer, Input, ItemError, Json, Label, ModelInfo, ServedModel
from marble_client.client import FunctionToApply, Overflow, classified, given_options
from marble_client.errors import MarbleError, NotFound
from marble_client.many import BATCH_SIZE, CONCURRENCY, PATIENCE_S, Ask, Batch, Pause, Plan, Prove, asking, batches
from marble_client.retry import Deadline, pause
from marble_client.wire import (
    CANARY,
    check_model,
    decode_answer,
    decode_description,
    decode_drift,
    decode_page,
    encode_request,
)

T = TypeVar("T")


class AsyncClient(ABC):
    """`Client` for asyncio: the same methods, errors, retries and deadlines. Make it where an event loop runs.

    Use it in an `async with` block, or close it. A transport supplies three exchanges of bytes. Each of them makes one
    attempt, finishes by the deadline, and raises a MarbleError when it fails.
    """

    def __init__(self, timeout: float) -> None:
        Deadline(timeout)  # refuses what can be no timeout now, not at the first call
        self._timeout = timeout

    @abstractmethod
    async def _predict(self, model: str, version: str | None, body: bytes, deadline: Deadline) -> bytes: ...

    @abstractmethod
    async def _describe(self, model: str, version: str | None, deadline: Deadline) -> bytes: ...

    @abstractmethod
    async def _list(self, page: int, deadline: Deadline) -> bytes: ...

    @abstractmethod
    async def close(self) -> None:
        """Close the connections."""

    async def predict(
        self,
        model: str,
        inputs: Input,
        parameters: Mapping[str, Json] | None = None,
        *,
        version: str | None = None,
        timeout: float | None = None,
    ) -> Answer[Json]:
        """As `Client.predict`."""
        check_model(model, version)
        body = encode_request(inputs, parameters)
        return await self._answer(lambda deadline: self._predict(model, version, body, deadline), timeout)

    async def canary(self, model: str, *, version: str | None = None, timeout: float | None = None) -> float:
        """As `Client.canary`."""
        return decode_drift((await self._canary(model, version, timeout)).predictions)

    async def identify(self, model: str, *, version: str | None = None, timeout: float | None = None) -> ModelInfo:
        """As `Client.identify`."""
        return (await self._canary(model, version, timeout)).model

    @overload
    async def classify(
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
    async def classify(
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

    async def classify(
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
        """As `Client.classify`."""
        given = given_options(top_k=top_k, function_to_apply=function_to_apply, overflow=overflow)
        return classified(texts, await self.predict(model, texts, given, version=version, timeout=timeout))

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
    ) -> AsyncGenerator[Json | ItemError]:
        """As `Client.predict_many`, for `async for`."""
        plan = Plan(model, parameters, version, batch_size, concurrency, patience, timeout)
        return self._predict_many(inputs, plan)

    async def ready(self, model: str, version: str | None = None) -> bool:
        """As `Client.ready`."""
        check_model(model, version)
        try:
            return (await self._described(model, version, Deadline(self._timeout))).ready_workers > 0
        except NotFound:
            return False

    async def models(self) -> list[ServedModel]:
        """As `Client.models`."""
        deadline = Deadline(self._timeout)
        served = []
        for name in await self._names(deadline):
            try:
                served.append(await self._described(name, None, deadline))
            except NotFound:
                continue  # unregistered since it was listed
        return sorted(served, key=lambda model: model.name)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _canary(self, model: str, version: str | None, timeout: float | None) -> Answer[Json]:
        check_model(model, version)
        return await self._answer(lambda deadline: self._predict(model, version, CANARY, deadline), timeout)

    async def _answer(self, exchange: Callable[[Deadline], Awaitable[bytes]], timeout: float | None) -> Answer[Json]:
        """The answer to an exchange of bytes, with retries. timeout: seconds, None for the client's own."""
        deadline = self._deadline(timeout)

        async def attempt() -> Answer[Json]:
            return decode_answer(await exchange(deadline))

        return await with_retries(attempt, deadline)

    def _deadline(self, timeout: float | None) -> Deadline:
        return Deadline(self._timeout if timeout is None else timeout)

    async def _described(self, model: str, version: str | None, deadline: Deadline) -> ServedModel:
        async def attempt() -> ServedModel:
            return decode_description(await self._describe(model, version, deadline))

        return await with_retries(attempt, deadline)

    async def _names(self, deadline: Deadline) -> list[str]:
        names: list[str] = []
        page: int | None = 0
        while page is not None:
            found, page = await self._page(page, deadline)
            names += found
        return names

    async def _page(self, page: int, deadline: Deadline) -> tuple[list[str], int | None]:
        async def attempt() -> tuple[list[str], int | None]:
            return decode_page(await self._list(page, deadline), page)

        return await with_retries(attempt, deadline)

    async def _predict_many(self, inputs: Iterable[Input], plan: Plan) -> AsyncGenerator[Json | ItemError]:
        gate = asyncio.Semaphore(plan.concurrency)

        async def work(inputs: list[Input]) -> list[Batch]:
            async with gate:
                return await self._ask(inputs, plan)

        waiting: deque[asyncio.Task[list[Batch]]] = deque()
        try:
            for inputs_of_one in batches(inputs, plan.batch_size):
                waiting.append(asyncio.create_task(work(inputs_of_one)))
                # As many again wait their turn, so that a slow request at the head does not idle the others.
                if len(waiting) == 2 * plan.concurrency:
                    for batch in await waiting.popleft():
                        for result in batch.results:
                            yield result
            while waiting:
                for batch in await waiting.popleft():
                    for result in batch.results:
                        yield result
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _ask(self, inputs: list[Input], plan: Plan) -> list[Batch]:
        steps = asking(inputs, plan.patience)
        try:
            step = next(steps)
            while True:
                try:
                    answer = await self._do(step, plan)
                except (MarbleError, ValueError, TypeError) as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)
        except StopIteration as done:
            outcome: list[Batch] = done.value
            return outcome

    async def _do(self, step: Ask | Pause | Prove, plan: Plan) -> Answer[Json] | float | None:
        version, timeout = plan.version, plan.timeout
        if isinstance(step, Ask):
            return await self.predict(plan.model, step.inputs, plan.parameters, version=version, timeout=timeout)
        if isinstance(step, Prove):
            return await self.canary(plan.model, version=version, timeout=timeout)
        await asyncio.sleep(step.seconds)
        return None


async def with_retries(call: Callable[[], Awaitable[T]], deadline: Deadline) -> T:
    """Await `call`, again as `pause` has it."""
    tried = 0
    while True:
        try:
            return await call()
        except MarbleError as error:
            tried += 1
            wait = pause(error, tried, deadline)
        await asyncio.sleep(wait)
