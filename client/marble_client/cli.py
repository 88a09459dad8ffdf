"""The command `marble`.

Exit codes: 0 done; 1 the server said no, or is not ready; 2 wrong usage; 3 the server cannot be reached;
130 interrupted.
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

from marble_client.answer import Json, ServedModel
from marble_client.client import Client
from marble_client.errors import (
    ConnectionFailed,
    MarbleError,
    NotFound,
    StubsMissing,
    Timeout,
    Unauthorized,
)
from marble_client.rest import RestClient
from marble_client.tokens import Tokens, find_tokens
from marble_client.wire import is_item_error

OK, REFUSED, USAGE, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 130

CANARY = "ready?"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (argparse itself exits with 2 on wrong usage)."""
    args = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # JSON is UTF-8, and backslashreplace turns a lone surrogate into the escape that JSON has for it.
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    tokens = find_tokens(args.token, explicit_management=args.management_token)
    try:
        with _connect(args, tokens) as client:
            code = _COMMANDS[args.command](args, client)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader has seen enough; keep the interpreter from failing again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ConnectionFailed, Timeout) as error:
        _say(error.message)
        return UNREACHABLE
    except Unauthorized as error:
        _say(f"{error.message} ({tokens.origin}; keys change when the server starts, and expire)")
        return REFUSED
    except NotFound as error:
        _say(f"{error.message} ('marble models' lists what is served)")
        return REFUSED
    except StubsMissing as error:
        _say(error.message)
        return USAGE
    except MarbleError as error:
        _say(f"{error.message} ({error.type})")
        return REFUSED
    except ValueError as error:  # what the client refuses to send
        _say(str(error))
        return USAGE


def _predict(args: argparse.Namespace, client: Client) -> int:
    texts = _texts(args.text)
    given = {"top_k": args.top_k, "function_to_apply": args.function_to_apply, "overflow": args.overflow}
    parameters: dict[str, Json] = {name: value for name, value in given.items() if value is not None}
    single = len(texts) == 1
    answer = client.predict(args.name, texts[0] if single else texts, parameters, version=args.model_version)
    predictions = _unnest(answer.predictions) if single else answer.predictions
    shown = {**asdict(answer), "predictions": predictions} if args.details else predictions
    print(json.dumps(shown, ensure_ascii=False))
    if answer.usage.truncated:
        _say("text was cut to fit the model; --overflow window reads all of it, --overflow error refuses it")
    failed = sum(map(is_item_error, predictions)) if isinstance(predictions, list) else 0
    if failed:
        _say(f"{failed} of {len(texts)} texts failed")
        return REFUSED
    return OK


def _ready(args: argparse.Namespace, client: Client) -> int:
    served = {model.name: model for model in client.models()}
    names = args.names or list(served)
    if not names:
        _say("no model is served: build one with build_mar.sh and start it with scripts/serve")
    code = OK if names else REFUSED
    for name in names:
        fault = _fault(client, name, served.get(name))
        if fault is None:
            print(f"{name} ready", flush=True)
        else:
            _say(f"{name} is not ready: {fault}")
            code = REFUSED
    return code


def _fault(client: Client, name: str, model: ServedModel | None) -> str | None:
    """Why a model cannot answer, or None when it has just answered."""
    if model is None:
        return "it is not served"
    if model.ready_workers == 0:
        return f"none of its {model.workers} workers is READY"
    try:
        client.predict(name, CANARY)
    except (ConnectionFailed, Unauthorized):
        raise
    except MarbleError as error:
        return f"it did not answer a prediction: {error.message}"
    return None


def _models(_: argparse.Namespace, client: Client) -> int:
    served = client.models()
    rows = [("NAME", "VERSION", "READY")]
    rows += [(model.name, model.version, f"{model.ready_workers}/{model.workers}") for model in served]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for name, version, ready in rows:
        print(f"{name:{widths[0]}}  {version:{widths[1]}}  {ready}")
    return OK


_COMMANDS = {"predict": _predict, "ready": _ready, "models": _models}


def _connect(args: argparse.Namespace, tokens: Tokens) -> Client:
    if args.grpc:
        from marble_client.grpc import GrpcClient  # takes longer to import than a prediction over REST

        return GrpcClient(
            args.grpc_target, args.grpc_management_target, tokens.inference, tokens.management, args.timeout
        )
    return RestClient(args.url, args.management_url, tokens.inference, tokens.management, args.timeout)


def _texts(given: list[str]) -> list[str]:
    """The texts given, each '-' replaced by the lines of standard input."""
    texts: list[str] = []
    for text in given:
        texts += [line.rstrip("\r\n") for line in sys.stdin] if text == "-" else [text]
    if not texts:
        raise ValueError("standard input holds no text: write one text on each line")
    return texts


def _unnest(predictions: Json) -> Json:
    """One text's labels, which the Inference API wraps in one more list."""
    if isinstance(predictions, list) and len(predictions) == 1 and isinstance(predictions[0], list):
        labels: list[Json] = predictions[0]
        if all(isinstance(label, dict) and "label" in label for label in labels):
            return labels
    return predictions


def _say(message: str) -> None:
    """One line on standard error; a server's words must not move the cursor."""
    line = " ".join(message.split())
    print("marble:", "".join(char if char.isprintable() else "?" for char in line), file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    server = argparse.ArgumentParser(add_help=False)
    add = server.add_argument_group("server").add_argument
    add("--grpc", action="store_true", help="use gRPC instead of REST")
    add("--url", default="http://127.0.0.1:8080", help="predictions (%(default)s)")
    add("--management-url", default="http://127.0.0.1:8081", metavar="URL", help="management (%(default)s)")
    add("--grpc-target", default="127.0.0.1:7070", metavar="TARGET", help="predictions (%(default)s)")
    add("--grpc-management-target", default="127.0.0.1:7071", metavar="TARGET", help="(%(default)s)")
    add("--token", help="else MARBLE_TOKEN, else key_file.json here or in a parent folder")
    add("--management-token", metavar="TOKEN", help="else MARBLE_MANAGEMENT_TOKEN, else as above")
    add("--timeout", type=float, default=30.0, metavar="S", help="seconds, retries included (%(default)g)")

    parser = argparse.ArgumentParser(
        prog="marble",
        description="Call models that Marble deployed on TorchServe.",
        epilog="example:\n  marble predict sentiment 'what a film'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    predict = commands.add_parser(
        "predict",
        parents=[server],
        help="predict for one text or several",
        description="Print predictions as JSON: the result for one text, a list of results for several.",
        epilog="examples:\n"
        "  marble predict sentiment 'what a film' --top-k 1\n"
        "  marble predict sentiment - --grpc --details < texts.txt\n"
        "  marble predict sentiment -- '-5 degrees, and rain'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = predict.add_argument
    add("name", metavar="NAME", help="the model")
    add("text", metavar="TEXT", nargs="+", help="a text, or - for one text per line of standard input")
    add("--details", action="store_true", help="print usage and the model's identity too")
    add("--top-k", metavar="N", type=int, help="how many labels")
    add("--function-to-apply", choices=["softmax", "sigmoid", "none"], help="how to score")
    add("--overflow", choices=["error", "truncate", "window"], help="what to do with long texts")
    add("--version", dest="model_version", metavar="V", help="the model's version")

    ready = commands.add_parser(
        "ready",
        parents=[server],
        help="prove that models answer",
        description="Exit with 0 if every model named (every model served, if none is) has a READY worker "
        "and has just answered a prediction.",
        epilog="example:\n  marble ready sentiment && echo open for business",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ready.add_argument("names", metavar="NAME", nargs="*", help="a model")

    commands.add_parser(
        "models",
        parents=[server],
        help="list what is served",
        description="List each model served, its default version, and its READY workers of all its workers.",
        epilog="example:\n  marble models --grpc",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser
