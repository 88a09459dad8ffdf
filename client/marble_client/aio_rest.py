"""Marble over REST, for asyncio."""

import asyncio

import requests

try:
    import aiohttp
except ImportError as error:
    raise ImportError(f"AsyncRestClient needs aiohttp ({error}): pip install 'marble-client[async]'") from None

from marble_client.aio import AsyncClient
from marble_client.rest import good, headers, host_of, hung_up, model_path, no_host, no_server
from marble_client.retry import Deadline
from marble_client.tokens import bearer, is_loopback


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
        try:
            async with (
                asyncio.timeout(deadline.left()),
                session.request(
                    method,
                    self._url + path,
                    data=body,
                    headers=self._authorization | headers(body),
                    proxy=self._proxy,
                    allow_redirects=False,
                ) as response,
            ):
                content = await response.read()
        except TimeoutError as error:
            raise deadline.missed() from error
        except aiohttp.ClientConnectorDNSError as error:
            raise no_host(self._url) from error
        except aiohttp.ClientConnectorError as error:
            raise no_server(self._url) from error
        except aiohttp.ClientError as error:
            raise hung_up(self._url, error) from error
        return good(self._url, response.status, content, response.headers.get("Retry-After", ""))
