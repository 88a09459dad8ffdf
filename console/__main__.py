"""scripts/console: serves the page."""

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from console.connection import Connection
from marble_client.tokens import attached

# The browser itself refuses whatever is not from here, whichever version of Gradio wants it.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; connect-src 'self' blob:; worker-src 'self' blob:; "
    "frame-ancestors 'none'"
)


class Policy:
    """ASGI middleware that has every answer carry the policy."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY.encode("ascii"))]
            await send(message)

        await self._app(scope, receive, send_with_policy)


def main() -> None:
    """Serves the page until it is interrupted."""
    args = parser().parse_args(attached(sys.argv[1:]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    connection = Connection.to(args.url, args.management_url, args.metrics_url, args.token)
    try:
        connection.open().close()
    except ValueError as error:
        sys.exit(f"scripts/console: {error}")
    with tempfile.TemporaryDirectory(prefix="marble-console-") as folder:
        # Gradio reads these when it is imported. What is uploaded goes with the folder.
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
        # It asks its own page whether it is there, which a proxy does not know.
        unproxied = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
        os.environ["no_proxy"] = ",".join(filter(None, [unproxied, args.host]))
        from starlette.middleware import Middleware

        from console.app import STYLE, THEME, page

        try:
            blocks = page(connection, Path(folder)).queue(default_concurrency_limit=8)
            blocks.launch(
                server_name=args.host,
                server_port=args.port,
                share=False,
                footer_links=[],
                quiet=True,
                prevent_thread_lock=True,
                theme=THEME,
                css=STYLE,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                enable_monitoring=False,
                app_kwargs={"middleware": [Middleware(Policy)]},
            )
        except OSError:
            sys.exit(f"scripts/console: port {args.port} on {args.host} is not free: choose another with --port")
        print(f"the console is at {blocks.local_url}", flush=True)
        blocks.block_thread()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    console = argparse.ArgumentParser(
        prog="scripts/console",
        description="A web page to ask a server's models from. Whoever can reach it asks with its token.",
        epilog="examples:\n"
        "  scripts/console                                        # of the server of this machine\n"
        "  scripts/console --url https://models.example.org --token TOKEN --port 7861",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = console.add_argument
    add("--url", default="http://127.0.0.1:8080", help="where the server predicts (default: %(default)s)")
    add("--management-url", help="where it lists its models; http://127.0.0.1:8081, for an https --url none")
    add("--metrics-url", help="where it counts; http://127.0.0.1:8082, for an https --url the same address")
    add("--token", help="the inference token; else MARBLE_TOKEN, else the one in key_file.json")
    add("--port", type=int, default=7860, help="where the page is (default: %(default)s)")
    add("--host", default="127.0.0.1", help="the address that it listens on (default: %(default)s)")
    return console


if __name__ == "__main__":
    main()
