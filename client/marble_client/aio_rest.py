"""Marble over REST, for asyncio."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager

import requests

try:
    import aiohttp
except ImportError as error:
    raise ImportError(f"AsyncRestClient needs aiohttp ({error}): pip install 'marble-client[async]'") from None

from marble_client.aio import AsyncClient, with_retries
from marble_client.answer import Answer, Input, Json, Token
from marble_client.rest import good, headers, host_of, hung_up, model_path, no_host, no_server
from marble_client.retry import Deadline
from marble_client.tokens import bearer, is_loopback
from marble_client.wire import Stream, check_model, encode_request


class AsyncRestClient(AsyncClient):
    """An AsyncClient over REST, by aiohttp: `pip install 'marble-client[async]'`. Otherwise as RestClient."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8080",
        management_url: str = "http://127.0.0.1:8081",
        token: str | None = None,
        management_token: str | None = None,
        timeout: float = 30.0,
    ) -> None:
        super().__init__(timeout)
        self._inference = _Endpoint(url, token)
        self._management = _Endpoint(management_url, management_token)
        # No limits of its own: callers bound what is under way, and every call has its deadline.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
        )

    async def close(self) -> None:
        await self._session.close()

    def stream(
        self,
        model: str,
        prompt: str,
        parameters: Mapping[str, Json] | None = None,
        *,
        version: str | None = None,
        timeout: float | None = None,
    ) -> AsyncGenerator[Token]:
        """As `RestClient.stream`, for `async for`; what is not iterated to its end is best closed by `aclosing`."""
        check_model(model, version)
        body = encode_request(prompt, parameters, stream=True)
        return self._stream(f"/predictions/{model_path(model, version)}", body, self._deadline(timeout))

    async def explain(
        self,
        model: str,
        inputs: Input,
        parameters: Mapping[str, Json] | None = None,
        *,
        version: str | None = None,
        timeout: float | None = None,
    ) -> Answer[Json]:
        """As `RestClient.explain`."""
        check_model(model, version)
        body, path = encode_request(inputs, parameters), f"/explanations/{model_path(model, version)}"
        return await self._answer(
            lambda deadline: self._inference.exchange(self._session, "POST", path, deadline, body), timeout
        )

    async def _stream(self, path: str, body: bytes, deadline: Deadline) -> AsyncGenerator[Token]:
        async def begin() -> tuple[Token, AsyncGenerator[Token]]:
            tokens = self._tokens(path, body, deadline)
            return await anext(tokens), tokens

        first, rest = await with_retries(begin, deadline)
        async with aclosing(rest):
            yield first
            async for token in rest:
                yield token

    async def _tokens(self, path: str, body: bytes, deadline: Deadline) -> AsyncGenerator[Token]:
        """Tokens up to the last one, at least one. Raises BadResponse if that is missing."""
        stream = Stream()
        async with aclosing(self._inference.pieces(self._session, path, deadline, body)) as pieces:
            async for piece in pieces:
                for token in stream.tokens(piece):
                    yield token
                    if token.end is not None:
                        return  # the server may keep the connection open a little longer
        raise stream.broken_off()

    async def _predict(self, model: str, version: str | None, body: bytes, deadline: Deadline) -> bytes:
        path = f"/predictions/{model_path(model, version)}"
        return await self._inference.exchange(self._session, "POST", path, deadline, body)

    async def _describe(self, model: str, version: str | None, deadline: Deadline) -> bytes:
        return await self._management.exchange(self._session, "GET", f"/models/{model_path(model, version)}", deadline)

    async def _list(self, page: int, deadline: Deadline) -> bytes:
        path = f"/models?limit=100&next_page_token={page}"
        return await self._management.exchange(self._session, "GET", path, deadline)


class _Endpoint:
    """One base URL with its token."""

    def __init__(self, url: str, token: str | None) -> None:
        local = is_loopback(host_of(url))
        self._url = url.rstrip("/")
        authorization = bearer(token)
        self._authorization = {} if authorization is None else {"Authorization": authorization}
        # aiohttp's own look at the environment would send what ~/.netrc has for this host.
        self._proxy = None if local else requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url))

    async def exchange(
        self, session: aiohttp.ClientSession, method: str, path: str, deadline: Deadline, body: bytes | None = None
    ) -> bytes:
        """Send one request; returns the body of a good reply."""
        async with self._response(session, method, path, deadline, body) as response:
            return await self._content(response, deadline)

    async def pieces(
        self, session: aiohttp.ClientSession, path: str, deadline: Deadline, body: bytes
    ) -> AsyncGenerator[bytes]:
        """Send one request; yields the body of a good reply as it comes."""
        async with self._response(session, "POST", path, deadline, body) as response:
            if response.status >= 300:
                await self._content(response, deadline)
            # The time is that of each wait: while its caller has the tokens, nothing may be cancelled.
            while True:
                async with asyncio.timeout(deadline.left()):
                    piece = await response.content.readany()
                if not piece:
                    return
                yield piece

    @asynccontextmanager
    async def _response(
        self, session: aiohttp.ClientSession, method: str, path: str, deadline: Deadline, body: bytes | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A reply whose body is yet to be read, in terms of our errors."""
        try:
            async with asyncio.timeout(deadline.left()):
                response = await session.request(
                    method,
                    self._url + path,
                    data=body,
                    headers=self._authorization | headers(body),
                    proxy=self._proxy,
                    allow_redirects=False,
                )
            async with response:
                _tell_of_loss(response)
                yield response
        except TimeoutError as error:
            raise deadline.missed() from error
        except aiohttp.ClientConnectorDNSError as error:
            raise no_host(self._url) from error
        except aiohttp.ClientConnectorError as error:
            raise no_server(self._url) from error
        except aiohttp.ClientError as error:
            raise hung_up(self._url, error) from error

    async def _content(self, response: aiohttp.ClientResponse, deadline: Deadline) -> bytes:
        """The whole body of a reply. Raises the error that it is instead."""
        async with asyncio.timeout(deadline.left()):
            content = await response.read()
        return good(self._url, response.status, content, response.headers.get("Retry-After", ""))


def _tell_of_loss(response: aiohttp.ClientResponse) -> None:
    """Has whoever waits for the body know that the connection is gone.

    aiohttp 3.14 closes it without a word where a chunk does not begin like one: TorchServe writes a whole new reply
    into a stream whose worker has died.
    """
    connection, content = response.connection, response.content
    lost = connection.protocol.closed if connection is not None and connection.protocol is not None else None

    def tell(_: object) -> None:
        if not content.is_eof():
            content.set_exception(aiohttp.ClientPayloadError("the reply broke off"))

    if lost is not None:
        lost.add_done_callback(tell)
