"""The command `marble`.

Exit codes: 0 done; 1 the server said no, or is not ready; 2 wrong usage; 3 the server cannot be reached;
130 interrupted.
"""

import argparse
import base64
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from marble_client.answer import Answer, Input, Json, ServedModel
from marble_client.client import Client, given_options
from marble_client.errors import (
    ConnectionFailed,
    MarbleError,
    NotFound,
    StubsMissing,
    Timeout,
    Unauthorized,
)
from marble_client.many import BATCH_SIZE, CONCURRENCY, PATIENCE_S, Plan
from marble_client.rest import RestClient
from marble_client.tokens import Tokens, attached, find_tokens
from marble_client.wire import is_item_error, without_details

OK, REFUSED, USAGE, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 130
CUT = "text was cut to fit the model; --overflow window reads all of it, --overflow error refuses it"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (argparse itself exits with 2 on wrong usage)."""
    args = parser().parse_args(attached(sys.argv[1:] if argv is None else argv))
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
    given = given_options(top_k=args.top_k, function_to_apply=args.function_to_apply, overflow=args.overflow)
    parameters = given | dict(args.parameter)
    if args.input is not None:
        return _predict_file(args, client, parameters)
    inputs = _inputs(args)
    single = len(inputs) == 1
    if args.stream:
        return _stream(args, client, inputs, parameters)
    if args.output is not None and not single:
        raise ValueError("--output takes the answer to one input, not to several")
    answer = client.predict(args.name, inputs[0] if single else inputs, parameters, version=args.model_version)
    predictions = _unnest(answer.predictions) if single else answer.predictions
    if args.output is not None:
        _write(args.output, _media(predictions))
        return OK
    shown = {**asdict(answer), "predictions": predictions} if args.details else without_details(predictions)
    print(json.dumps(shown, ensure_ascii=False))
    return _outcome(answer, len(inputs))


def _predict_file(args: argparse.Namespace, client: Client, parameters: dict[str, Json]) -> int:
    from marble_client.bulk import Bulk  # takes longer to import than a prediction

    if args.output is None:
        raise ValueError("--input goes with --output FILE, where the predictions are written")
    if args.text or args.file or args.json or args.details or args.stream:
        raise ValueError("--input takes the place of TEXT, and goes without --file, --json, --details and --stream")
    plan = Plan(
        args.name,
        parameters,
        args.model_version,
        batch_size=args.batch_size,
        concurrency=args.concurrency,
        patience=args.patience,
    )
    with Bulk(args.input, args.output, plan, column=args.column, overwrite=args.overwrite) as bulk:
        try:
            _with_new_tokens(args, client, bulk.predict)
        except (KeyboardInterrupt, MarbleError):
            if bulk.done:
                _say(f"{bulk.done} of {bulk.rows} rows are done: the same command goes on from there")
            raise
        failed, truncated = bulk.finish()
    if truncated:
        _say(CUT)
    if failed:
        _say(f"{failed} of {bulk.rows} rows failed: the column of errors says why")
        return REFUSED
    return OK


def _with_new_tokens(args: argparse.Namespace, client: Client, work: Callable[[Client], None]) -> None:
    """Does the work; should the token be refused, goes on with the one that a restarted server has made."""
    tokens = find_tokens(args.token)
    with ExitStack() as stack:
        while True:
            try:
                return work(client)
            except Unauthorized:
                former, tokens = tokens, find_tokens(args.token)
                if tokens.inference == former.inference:
                    raise
                client = stack.enter_context(_connect(args, tokens))


def _outcome(answer: Answer[Json], count: int) -> int:
    """The exit code for an answer to so many inputs; says what was cut and what failed."""
    predictions = answer.predictions
    if answer.usage.truncated:
        _say(CUT)
    failed = sum(map(is_item_error, predictions)) if isinstance(predictions, list) else 0
    if failed:
        _say(f"{failed} of {count} inputs failed")
        return REFUSED
    return OK


def _explain(args: argparse.Namespace, client: Client) -> int:
    if not isinstance(client, RestClient):
        raise ValueError("TorchServe explains over REST: leave --grpc out")
    given = given_options(method=args.method, top_k=args.top_k, overflow=args.overflow)
    parameters = given | dict(args.parameter)
    if args.output is not None:
        return _draw(args, client, parameters)
    inputs = _inputs(args)
    single = len(inputs) == 1
    answer = client.explain(args.name, inputs[0] if single else inputs, parameters, version=args.model_version)
    print(json.dumps(asdict(answer) if args.details else answer.predictions, ensure_ascii=False))
    return _outcome(answer, len(inputs))


def _draw(args: argparse.Namespace, client: RestClient, parameters: dict[str, Json]) -> int:
    """Draws what speaks for the first answer over the image that was asked about."""
    try:
        from marble_client import heat
    except ImportError as error:
        raise ValueError(str(error)) from None
    if not args.file or len(args.text) != 1 or args.details:
        raise ValueError("--output draws over one image: name it with --file, and leave --details out")
    [content] = _files(args.text)
    answer = client.explain(args.name, content, parameters, version=args.model_version)
    _write(args.output, heat.draw(content, *_heat_map(answer.predictions)))
    return OK


def _heat_map(explanation: Json) -> tuple[Any, Any]:
    """Its squares and what they cover, of the first answer that is explained."""
    found = explanation.get("explanations") if isinstance(explanation, dict) else None
    first = found[0] if isinstance(found, list) and found else None
    if not (isinstance(first, dict) and "heat_map" in first):
        raise ValueError("--output: this model does not explain images; leave --output out")
    return first["heat_map"], first["box"]


def _stream(args: argparse.Namespace, client: Client, inputs: list[Input], parameters: dict[str, Json]) -> int:
    """Prints a text as it is generated; with --details each token as a line of JSON."""
    if not isinstance(client, RestClient):
        raise ValueError("--stream goes over REST: leave --grpc out")
    [prompt] = inputs if len(inputs) == 1 else [None]
    if not isinstance(prompt, str):
        raise ValueError("--stream goes on with one text, not with several, files or JSON")
    for token in client.stream(args.name, prompt, parameters, version=args.model_version):
        if args.details:
            print(json.dumps(asdict(token), ensure_ascii=False), flush=True)
        else:
            text = _harmless(token.text) if sys.stdout.isatty() else token.text
            print(text, end="" if token.end is None else "\n", flush=True)
    return OK


def _harmless(text: str) -> str:
    """A model's words must not steer the terminal."""
    return "".join(char if char.isprintable() or char in "\n\t" else "?" for char in text)


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
        client.canary(name)
    except (ConnectionFailed, Unauthorized):
        raise
    except MarbleError as error:
        return f"it did not answer its canary: {error.message}"
    return None


def _models(_: argparse.Namespace, client: Client) -> int:
    served = client.models()
    rows = [("NAME", "VERSION", "READY")]
    rows += [(model.name, model.version, f"{model.ready_workers}/{model.workers}") for model in served]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for name, version, ready in rows:
        print(f"{name:{widths[0]}}  {version:{widths[1]}}  {ready}")
    return OK


_COMMANDS = {"predict": _predict, "explain": _explain, "ready": _ready, "models": _models}


def _connect(args: argparse.Namespace, tokens: Tokens) -> Client:
    if args.grpc:
        from marble_client.grpc import GrpcClient  # takes longer to import than a prediction over REST

        return GrpcClient(
            args.grpc_target, args.grpc_management_target, tokens.inference, tokens.management, args.timeout
        )
    return RestClient(args.url, args.management_url, tokens.inference, tokens.management, args.timeout)


def _inputs(args: argparse.Namespace) -> list[Input]:
    """What to predict for: files, texts, or JSON values."""
    if args.file:
        return list(_files(args.text))
    texts = _texts(args.text)
    return [_json(text) for text in texts] if args.json else list(texts)


def _files(names: list[str]) -> list[bytes]:
    """The contents of files."""
    try:
        return [Path(name).read_bytes() for name in names]
    except OSError as error:
        raise ValueError(f"--file {error.filename}: {error.strerror}") from None


def _json(text: str) -> Json:
    try:
        value: Json = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--json: this is not JSON: {text[:60]!r} ({error})") from None
    return value


def _parameter(text: str) -> tuple[str, Json]:
    """NAME=VALUE, where a VALUE that is not JSON is a string."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, e.g. max_new_tokens=40")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _media(prediction: Json) -> bytes:
    """The image or sound that a model answered with."""
    try:
        return base64.b64decode(prediction if isinstance(prediction, str) else "-", validate=True)
    except ValueError:
        raise ValueError("--output: this model does not answer with an image or a sound; leave --output out") from None


def _write(path: Path, content: bytes) -> None:
    """A file that is there whole or not at all."""
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        try:
            unfinished.write_bytes(content)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"--output {path}: {error.strerror}") from None


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


class _InsteadOfText(argparse.Action):
    """An option that has no TEXT be required."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, text: argparse.Action, **options: Any) -> None:
        super().__init__(option_strings, dest, **options)
        self._text = text

    def __call__(self, _: object, namespace: argparse.Namespace, values: object, option: str | None = None) -> None:
        setattr(namespace, self.dest, values)
        self._text.required = False


def _add_inputs(parser: argparse.ArgumentParser) -> argparse.Action:
    """Adds the arguments of what is predicted or explained; returns that of the texts."""
    add = parser.add_argument
    add("name", metavar="NAME", help="the model")
    text = add("text", metavar="TEXT", nargs="+", help="a text, or - for one text per line of standard input")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--file", action="store_true", help="the texts are names of image or sound files")
    kind.add_argument("--json", action="store_true", help='the texts are JSON, e.g. {"question": "…", "context": "…"}')
    add("--parameter", "-p", metavar="NAME=VALUE", type=_parameter, action="append", default=[], help="of the task")
    add("--details", action="store_true", help="print usage and the model's identity too")
    add("--top-k", metavar="N", type=int, help="how many labels")
    add("--overflow", choices=["error", "truncate", "window"], help="what to do with long texts")
    add("--version", dest="model_version", metavar="V", help="the model's version")
    return text


def parser() -> argparse.ArgumentParser:
    """The command line."""
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

    marble = argparse.ArgumentParser(
        prog="marble",
        description="Call models that Marble deployed on TorchServe.",
        epilog="example:\n  marble predict sentiment 'what a film'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = marble.add_subparsers(dest="command", required=True, metavar="COMMAND")

    predict = commands.add_parser(
        "predict",
        parents=[server],
        usage="%(prog)s [options] NAME (TEXT … | --input FILE --output FILE)",
        help="predict for one input, several, or those of a file",
        description="Print predictions as JSON: the result for one input, a list of results for several.\n"
        "Or predict for every row of a csv, jsonl or parquet file, and write another file.",
        epilog="examples:\n"
        "  marble predict sentiment 'what a film' --top-k 1\n"
        "  marble predict sentiment - --grpc --details < texts.txt\n"
        "  marble predict sentiment -- '-5 degrees, and rain'\n"
        "  marble predict digits --file seven.png\n"
        '  marble predict qa --json \'{"question": "Who came?", "context": "Ann came late."}\'\n'
        "  marble predict poet 'O Romeo' -p max_new_tokens=40 -p do_sample=true --stream\n"
        "  marble predict voice 'good morning' --output morning.wav\n"
        "  marble predict sentiment --input reviews.csv --output scored.parquet",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    text = _add_inputs(predict)
    add = predict.add_argument
    add("--output", metavar="FILE", type=Path, help="where to write the image or sound, or what --input gives")
    add("--stream", action="store_true", help="print a text as it is generated (over REST)")
    add("--function-to-apply", choices=["softmax", "sigmoid", "none"], help="how to score")
    table = predict.add_argument_group(
        "a file of any size",
        "Every row of --input goes to --output with its prediction. Given again, the command of a\n"
        "run that was cut off goes on where it was.",
    )
    add = table.add_argument
    add("--input", metavar="FILE", type=Path, action=_InsteadOfText, text=text, help="a csv, jsonl or parquet file")
    add("--column", metavar="NAME", help="the input's (text; or the two of a pair, or question and context)")
    add("--overwrite", action="store_true", help="replace an output that is there")
    add("--batch-size", metavar="N", type=int, default=BATCH_SIZE, help="rows in a request (%(default)s)")
    add("--concurrency", metavar="N", type=int, default=CONCURRENCY, help="requests under way (%(default)s)")
    add(
        "--patience",
        metavar="S",
        type=float,
        default=PATIENCE_S,
        help="seconds to wait through a restart (%(default)g)",
    )

    explain = commands.add_parser(
        "explain",
        parents=[server],
        help="explain predictions",
        description="Print as JSON how much each word of a text, or square of an image, speaks for each answer: by how "
        "much the number behind it (a logit) falls without. Over REST.",
        epilog="examples:\n"
        "  marble explain sentiment 'what a film'\n"
        "  marble explain sentiment 'what a film' --method integrated_gradients\n"
        "  marble explain digits --file seven.png --output heat.png\n"
        '  marble explain qa --json \'{"question": "Who came?", "context": "Ann came late."}\'',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_inputs(explain)
    explain.add_argument(
        "--output",
        metavar="PNG",
        type=Path,
        help="where to draw the squares of an image that speak for its first answer",
    )
    explain.add_argument(
        "--method",
        choices=["occlusion", "integrated_gradients"],
        help="hide each word by itself (the default), or follow the gradients, on the torch backend",
    )

    ready = commands.add_parser(
        "ready",
        parents=[server],
        help="prove that models answer",
        description="Exit with 0 if every model named (every model served, if none is) has a READY worker "
        "and has just answered its canary, a golden example of its own.",
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
    return marble
