"""Marble over REST."""

import email.utils
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from urllib.parse import urlsplit

import requests
import urllib3

from marble_client.answer import Answer, Input, Json, Token
from marble_client.client import TransportClient
from marble_client.errors import BadResponse, ConnectionFailed, MarbleError
from marble_client.metrics import ModelMetrics, decode_metrics
from marble_client.retry import Deadline, with_retries
from marble_client.tokens import bearer, is_loopback
from marble_client.trace import traceparent
from marble_client.wire import Stream, check_model, decode_error, encode_request

CHUNK_BYTES = 64 * 1024
MOST_CONNECTIONS = 64  # kept open for threads that share a client; requests' own pool keeps ten


class RestClient(TransportClient):
    """A client over REST. `url` serves predictions, `management_url` what is served, `metrics_url` what was counted."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8080",
        management_url: str = "http://127.0.0.1:8081",
        token: str | None = None,
        management_token: str | None = None,
        timeout: float = 30.0,
        metrics_url: str = "http://127.0.0.1:8082",
    ) -> None:
        super().__init__(timeout)
        self._inference = _Endpoint(url, token)
        self._management = _Endpoint(management_url, management_token)
        # TorchServe's own port asks for no token, the front door for one with the role `metrics`.
        self._metrics = _Endpoint(metrics_url, token)

    def close(self) -> None:
        self._inference.close()
        self._management.close()
        self._metrics.close()

    def metrics(self) -> dict[str, ModelMetrics]:
        """What the server counts, by model. Only REST has them."""
        return decode_metrics(self._metrics.exchange("GET", "/metrics", Deadline(self._timeout)))

    def stream(
        self,
        model: str,
        prompt: str,
        parameters: Mapping[str, Json] | None = None,
        *,
        version: str | None = None,
        timeout: float | None = None,
    ) -> Iterator[Token]:
        """Generate text, one token at a time; returns when the first one is there.

        Only 429, 503 and a refused connection before it are tried again. Closing the iterator hangs up; the server
        generates on to the end.
        """
        check_model(model, version)
        body = encode_request(prompt, parameters, stream=True)
        deadline = Deadline(self._timeout if timeout is None else timeout)

        def begin() -> tuple[Token, Generator[Token]]:
            tokens = self._tokens(f"/predictions/{model_path(model, version)}", body, deadline)
            return next(tokens), tokens

        return _again(*with_retries(begin, deadline))

    def explain(
        self,
        model: str,
        inputs: Input,
        parameters: Mapping[str, Json] | None = None,
        *,
        version: str | None = None,
        timeout: float | None = None,
    ) -> Answer[Json]:
        """Explain the predictions for `inputs`; a list gives a list. TorchServe explains over REST alone."""
        check_model(model, version)
        body, path = encode_request(inputs, parameters), f"/explanations/{model_path(model, version)}"
        return self._answer(lambda deadline: self._inference.exchange("POST", path, deadline, body=body), timeout)

    def _tokens(self, path: str, body: bytes, deadline: Deadline) -> Generator[Token]:
        """Tokens up to the last one, at least one. Raises BadResponse if that is missing."""
        stream = Stream()
        with closing(self._inference.pieces(path, deadline, body)) as pieces:
            for piece in pieces:
                for token in stream.tokens(piece):
                    yield token
                    if token.end is not None:
                        return  # the server may keep the connection open a little longer
        raise stream.broken_off()

    def _predict(self, model: str, version: str | None, body: bytes, deadline: Deadline) -> bytes:
        return self._inference.exchange("POST", f"/predictions/{model_path(model, version)}", deadline, body=body)

    def _describe(self, model: str, version: str | None, deadline: Deadline) -> bytes:
        return self._management.exchange("GET", f"/models/{model_path(model, version)}", deadline)

    def _list(self, page: int, deadline: Deadline) -> bytes:
        return self._management.exchange("GET", f"/models?limit=100&next_page_token={page}", deadline)


class _Endpoint:
    """One base URL with its token and its pool of connections."""

    def __init__(self, url: str, token: str | None) -> None:
        host = host_of(url)
        self._url = url.rstrip("/")
        # A local server is never behind a proxy, whatever the environment says.
        self._proxies = {"no_proxy": host} if is_loopback(host) else None
        self._authorization = bearer(token)
        self._session = requests.Session()
        self._session.mount(self._url, requests.adapters.HTTPAdapter(pool_maxsize=MOST_CONNECTIONS))
        # Set even when there is no token: else requests would send what ~/.netrc has for this host.
        self._session.auth = self._authorize

    def close(self) -> None:
        self._session.close()

    def exchange(self, method: str, path: str, deadline: Deadline, body: bytes | None = None) -> bytes:
        """Send one request; returns the body of a good reply."""
        with self._response(method, path, deadline, body) as response:
            return self._content(response, deadline)

    def pieces(self, path: str, deadline: Deadline, body: bytes) -> Generator[bytes]:
        """Send one request; yields the body of a good reply as it comes."""
        with self._response("POST", path, deadline, body) as response:
            if response.status_code >= 300:
                self._content(response, deadline)
            yield from _chunks(response, deadline)

    @contextmanager
    def _response(self, method: str, path: str, deadline: Deadline, body: bytes | None) -> Iterator[requests.Response]:
        """A reply whose body is yet to be read, in terms of our errors."""
        try:
            with self._session.request(
                method,
                self._url + path,
                data=body,
                headers=headers(body),
                timeout=deadline.left(),
                proxies=self._proxies,
                allow_redirects=False,
                stream=True,
            ) as response:
                yield response
        except (requests.Timeout, urllib3.exceptions.ReadTimeoutError) as error:
            raise deadline.missed() from error
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            if not deadline.allows(0):
                raise deadline.missed() from error  # a send that timed out calls itself an aborted connection
            raise self._unreachable(error) from error

    def _content(self, response: requests.Response, deadline: Deadline) -> bytes:
        """The whole body of a reply. Raises the error that it is instead."""
        content = b"".join(_chunks(response, deadline))
        return good(self._url, response.status_code, content, response.headers.get("Retry-After", ""))

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._authorization is not None:
            request.headers["Authorization"] = self._authorization
        return request

    def _unreachable(self, error: Exception) -> MarbleError:
        cause = error.args[0] if error.args else error
        reason = getattr(cause, "reason", cause)
        if isinstance(reason, urllib3.exceptions.NameResolutionError):
            return no_host(self._url)
        if isinstance(reason, urllib3.exceptions.NewConnectionError):
            return no_server(self._url)
        if "CERTIFICATE_VERIFY_FAILED" in str(reason):
            return ConnectionFailed(
                f"the certificate of {self._url} is not trusted: name its file in CURL_CA_BUNDLE", sent=False
            )
        return hung_up(self._url, reason)


def host_of(url: str) -> str:
    """The host of an address. Raises ValueError if it is none of HTTP."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no http:// or https:// address")
    return parts.hostname


def headers(body: bytes | None) -> dict[str, str]:
    """Those of a request, but for its token."""
    return {"traceparent": traceparent()} | ({} if body is None else {"Content-Type": "application/json"})


def good(url: str, status: int, content: bytes, retry_after: str) -> bytes:
    """The body of a reply. Raises the error that it is instead; `retry_after` is its header."""
    if status >= 400:
        raise decode_error(status, content, _seconds(retry_after.strip()))
    if status >= 300:
        raise BadResponse(f"{url} redirects elsewhere: give the server's own address")
    return content


def no_host(url: str) -> ConnectionFailed:
    """What is raised when a name has no address."""
    return ConnectionFailed(f"cannot find the host of {url}: check the address", sent=False)


def no_server(url: str) -> ConnectionFailed:
    """What is raised when nobody listens."""
    return ConnectionFailed(f"no server at {url}: start one with scripts/serve", sent=False)


def hung_up(url: str, reason: object) -> ConnectionFailed:
    """What is raised when a connection broke."""
    return ConnectionFailed(f"the connection to {url} failed before an answer came: {reason}", sent=True)


def model_path(model: str, version: str | None) -> str:
    """The end of an address that names a model."""
    return model if version is None else f"{model}/{version}"


def _again(first: Token, rest: Generator[Token]) -> Iterator[Token]:
    """All tokens, the first of which has been taken already."""
    with closing(rest):
        yield first
        yield from rest


def _chunks(response: requests.Response, deadline: Deadline) -> Iterator[bytes]:
    """The body, by the deadline even if it trickles: requests' timeout starts anew at every byte."""
    while True:
        left = deadline.left()
        connection = response.raw.connection
        if connection is not None and connection.sock is not None:
            connection.sock.settimeout(left)
        chunk = response.raw.read1(CHUNK_BYTES, decode_content=True)
        if not chunk:
            return
        yield chunk


def _seconds(value: str) -> float | None:
    """How long to wait, from a header that holds either seconds or a date."""
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
