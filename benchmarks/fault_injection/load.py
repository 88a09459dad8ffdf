"""Clients that go on asking while something is done to the server, and what became of each request."""

import asyncio
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType

import aiohttp
import grpc
import numpy as np

from benchmarks.fault_injection.site import BODY, PREDICTIONS, Site, message
from marble_client.stubs import inference_pb2

_SECONDS_TO_ANSWER = 60


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one request. at: time.monotonic() when it ended; status: "200", "OK", or what it failed with."""

    at: float
    protocol: str
    status: str
    seconds: float

    @property
    def good(self) -> bool:
        """Whether it was answered."""
        return self.status in ("200", "OK")


class Load:
    """Keeps so many REST and gRPC requests under way in a `with` block, at most `rate` a second if it is given.

    Each client sends its next request when the last one has ended, over a connection that is kept. `outcomes` has what
    became of them all once the block has ended.
    """

    def __init__(self, site: Site, model: str, rest: int = 0, grpc_calls: int = 0, rate: float | None = None) -> None:
        self._site = site
        self._model = model
        self._clients = (rest, grpc_calls)
        self._rate = rate
        self._over = False
        self._sent = 0
        self.outcomes: list[Outcome] = []
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="load")

    def __enter__(self) -> "Load":
        self._begun = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._over = True
        self._thread.join()

    async def _run(self) -> None:
        rest, calls = self._clients
        trusted = ssl.create_default_context(cafile=str(self._site.certificate))
        credentials = grpc.ssl_channel_credentials(self._site.certificate.read_bytes())
        target, options = f"localhost:{self._site.grpc}", [("grpc.enable_http_proxy", 0)]
        headers = {"Authorization": f"Bearer {self._site.tokens['predict']}"}
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ssl=trusted),
                timeout=aiohttp.ClientTimeout(total=_SECONDS_TO_ANSWER),
                headers=headers,
            ) as session,
            grpc.aio.secure_channel(target, credentials, options) as channel,
        ):
            method = channel.unary_unary(PREDICTIONS, None, None)
            await asyncio.gather(
                *(self._ask_rest(session) for _ in range(rest)), *(self._ask_grpc(method) for _ in range(calls))
            )

    async def _ask_rest(self, session: aiohttp.ClientSession) -> None:
        url = f"{self._site.url}/predictions/{self._model}"
        while await self._turn():
            begun = time.monotonic()
            try:
                async with session.post(url, json=BODY) as answer:
                    await answer.read()
                    status = str(answer.status)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                status = type(error).__name__
            self._note("REST", status, begun)

    async def _ask_grpc(self, method: "grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]") -> None:
        request = message(self._model)
        metadata = [("authorization", f"Bearer {self._site.tokens['predict']}")]
        while await self._turn():
            begun = time.monotonic()
            try:
                reply = await method(request, metadata=metadata, timeout=_SECONDS_TO_ANSWER)
                answer = inference_pb2.PredictionResponse.FromString(reply).prediction
                # TorchServe says OK for an error of one request, too.
                status = "an error in the body" if answer.lstrip().startswith(b'{"error"') else "OK"
            except grpc.aio.AioRpcError as error:
                status = error.code().name
            self._note("gRPC", status, begun)

    async def _turn(self) -> bool:
        """Waits until the next request is due; False when no more is to be sent."""
        if self._rate is not None:
            due = self._begun + self._sent / self._rate
            self._sent += 1
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        return not self._over

    def _note(self, protocol: str, status: str, begun: float) -> None:
        now = time.monotonic()
        self.outcomes.append(Outcome(now, protocol, status, now - begun))


def statuses(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """How often each status came, by protocol."""
    return dict(sorted(Counter(f"{entry.protocol} {entry.status}" for entry in outcomes).items()))


def between(outcomes: Iterable[Outcome], begin: float, end: float) -> list[Outcome]:
    """Those that ended in a time of time.monotonic()."""
    return [entry for entry in outcomes if begin <= entry.at < end]


def percentile(values: Sequence[float], share: float) -> float:
    """In the units of the values; 0 if there are none."""
    return round(float(np.percentile(values, share)), 4) if values else 0.0
