"""The same call from elsewhere, to copy: curl, Python and gRPC. None holds a token, all read $MARBLE_TOKEN."""

import json
import shlex
from collections.abc import Mapping
from pprint import pformat
from urllib.parse import urlsplit

from marble_client import Input, Json


def curl(url: str, model: str, inputs: Input, parameters: Mapping[str, Json], file: str | None = None) -> str:
    """For a shell. `file`: the inputs are the content of that file."""
    where = shlex.quote(f"{url}/predictions/{model}")
    token = 'curl -H "Authorization: Bearer $MARBLE_TOKEN"'
    if file is not None and not parameters:
        # A type that says nothing: else curl would say that it is a web form.
        return (
            f"{token} -H 'Content-Type: application/octet-stream' \\\n     --data-binary @{shlex.quote(file)} {where}"
        )
    typed = f"{token} -H 'Content-Type: application/json'"
    if file is not None:
        body = f"base64 < {shlex.quote(file)} | tr -d '\\n'"
        rest = shlex.quote(json.dumps(parameters, ensure_ascii=False))
        whole = f'{{ printf \'{{"inputs": "\'; {body}; printf \'", "parameters": %s}}\' {rest}; }}'
        return f"{whole} |\n{typed} \\\n     --data-binary @- {where}"
    body = json.dumps({"inputs": inputs, **({"parameters": parameters} if parameters else {})}, ensure_ascii=False)
    return f"{typed} \\\n     -d {shlex.quote(body)} {where}"


def python(url: str, model: str, inputs: Input, parameters: Mapping[str, Json], file: str | None = None) -> str:
    """With marble_client over REST."""
    return _python("RestClient", url, model, inputs, parameters, file)


def grpc(url: str, model: str, inputs: Input, parameters: Mapping[str, Json], file: str | None = None) -> str:
    """With marble_client over gRPC, at the port that config.properties or front.properties gives it."""
    parts = urlsplit(url)
    target = f"https://{parts.hostname}:8444" if parts.scheme == "https" else f"{parts.hostname}:7070"
    return _python("GrpcClient", target, model, inputs, parameters, file)


def _python(
    client: str, address: str, model: str, inputs: Input, parameters: Mapping[str, Json], file: str | None
) -> str:
    read = f"Path({file!r}).read_bytes()" if file is not None else pformat(inputs, width=110, sort_dicts=False)
    given = f", {dict(parameters)!r}" if parameters else ""
    return "\n".join(
        [
            "import os",
            *(["from pathlib import Path"] if file is not None else []),
            "",
            f"from marble_client import {client}",
            "",
            f"inputs = {read}",
            f'with {client}({address!r}, token=os.environ["MARBLE_TOKEN"]) as client:',
            f"    print(client.predict({model!r}, inputs{given}).predictions)",
        ]
    )
