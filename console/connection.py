"""How the console reaches the server: through marble_client, with the token that counts now."""

from dataclasses import dataclass

from marble_client import (
    ConnectionFailed,
    MarbleError,
    NotFound,
    RestClient,
    Timeout,
    Unauthorized,
    find_tokens,
)


@dataclass(frozen=True)
class Connection:
    """A server's addresses and, if one was given, the token for it.

    management_url: None where its list of models cannot be reached, as behind the front door.
    """

    url: str
    management_url: str | None
    metrics_url: str
    token: str | None = None

    @classmethod
    def to(cls, url: str, management_url: str | None, metrics_url: str | None, token: str | None) -> "Connection":
        """Where nothing else is said, TorchServe's own ports; for an https address, the front door, its metrics."""
        front = url.startswith("https:")
        return cls(
            url,
            management_url or (None if front else "http://127.0.0.1:8081"),
            metrics_url or (url if front else "http://127.0.0.1:8082"),
            token,
        )

    def open(self, timeout: float = 60.0) -> RestClient:
        """A client of the server. Its keys change when it starts anew: they are looked for each time."""
        tokens = find_tokens(self.token)
        return RestClient(
            self.url, self.management_url or self.url, tokens.inference, tokens.management, timeout, self.metrics_url
        )

    def words(self, error: Exception) -> str:
        """What went wrong and how to mend it, for whoever reads the page."""
        if isinstance(error, Unauthorized):
            # As the command says it: which token, so that the reader knows where to put another.
            return f"{error.message} ({find_tokens(self.token).origin}; keys change when the server starts, and expire)"
        if isinstance(error, ConnectionFailed | Timeout):
            return f"{error.message}. This page needs no reload: ask again when the server is back."
        if isinstance(error, NotFound):
            where = "the table above lists what is served" if self.management_url else "is that a model's name?"
            return f"{error.message} ({where})"
        if isinstance(error, MarbleError):
            return f"{error.message} ({error.type})"
        return str(error)
