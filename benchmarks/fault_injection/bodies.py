"""Hostile bodies, made from a seed: what the requests of row 8 carry, over REST and over gRPC.

Three sources: values that Hypothesis makes, mutations of valid bodies of every wire format, and lists of what is known
to hurt parsers. The same seed and number give the same request.
"""

import gzip
import io
import json
import random
import wave
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import hypothesis
from hypothesis import strategies
from PIL import Image

from benchmarks.fault_injection.bench import MODEL
from benchmarks.fault_injection.site import BODY

TEXT = BODY["inputs"]
HUGGING_FACE, V1, V2 = (
    f"/predictions/{MODEL}",
    f"/v1/models/{MODEL}:predict",
    f"/v2/models/{MODEL}/infer",
)
TENSOR: dict[str, Any] = {"name": "text", "datatype": "BYTES", "shape": [2], "data": [TEXT, "Dull."]}
V2_BODY: dict[str, Any] = {"id": "a", "inputs": [TENSOR], "outputs": [{"name": "label"}]}
# Valid bodies with the route of each.
VALID: list[tuple[str, Any]] = [
    (HUGGING_FACE, BODY),
    (HUGGING_FACE, {"inputs": [TEXT, "Dull."], "parameters": {"top_k": 2, "overflow": "truncate", "details": True}}),
    (HUGGING_FACE, {"inputs": TEXT, "parameters": {"function_to_apply": "sigmoid"}, "stream": False}),
    (V1, {"instances": [TEXT, "Dull."]}),
    (V1, {"instances": [{"inputs": TEXT}], "parameters": {"top_k": 1}}),
    (V2, V2_BODY),
    (HUGGING_FACE, {"canary": True}),
]
PARAMETERS = ("top_k", "function_to_apply", "overflow", "details", "truncation", "max_new_tokens", "seed", "")
# Each has broken some program that takes text.
NAUGHTY = [
    "",
    " ",
    "\0",
    "\x1b[31m",
    "\r\nX-Injected: yes",
    "[METRICS]ts_fault.Count:1|#Level:Host|#hostname:x,1",
    "PREDICTION_LOG",
    "undefined",
    "None",
    "__proto__",
    "{{7*7}}${7*7}<%= 7*7 %>",
    "${jndi:ldap://127.0.0.1/x}",
    "' OR 1=1; --",
    "../../../../etc/passwd",
    "file:///etc/passwd",
    "http://127.0.0.1:8081/models",
    "data:image/png;base64,AAAA",
    "<script>alert(1)</script>",
    "%s%n%x%d",
    "\ufeffbyte order mark",
    "\u202eright to left\u202c",
    "e" + "\u0301" * 400,
    "\U0001f468\u200d\U0001f469\u200d\U0001f467" * 30,
    "\ud800",
    "\udfff\ud800",
    "\uffff\ufffe\ufdd0",
    "ﷺ" * 50,
    "1e400",
    "-0",
    "٣",
    "a" * 3000,
    "a " * 2000,
    "\t\v\f\u2028\u2029\u00a0\u3000",
    "</s><s>[CLS][SEP][MASK][PAD]<|endoftext|>",
]
# JSON that parsers disagree about, or cannot hold.
RAW_JSON = [
    b'{"inputs": NaN}',
    b'{"inputs": [Infinity, -Infinity]}',
    b'{"inputs": "a", "parameters": {"top_k": 1e400}}',
    b'{"inputs": "a", "parameters": {"top_k": ' + b"9" * 5000 + b"}}",
    b'{"inputs": "a", "parameters": {"top_k": -1}}',
    b'{"inputs": "a", "parameters": {"top_k": 1.5}}',
    b'{"inputs": "a", "parameters": {"top_k": true}}',
    b'{"inputs": "a", "inputs": ["b"], "inputs": {"c": 1}}',
    b'{"inputs": "\\ud800"}',
    b'{"inputs": "\\udfff", "id": "\\ud800"}',
    b'{"inputs": "\xed\xa0\x80"}',
    b'{"inputs": "\xff\xfe"}',
    b'{"inputs": "a\x00b"}',
    b'{"inputs": "\\u0000"}',
    b"[" * 100_000,
    b'{"a":' * 20_000,
    b"[" * 500 + b"]" * 500,
    b'{"inputs": ' + b"[" * 900 + b'"a"' + b"]" * 900 + b"}",
    b'{"inputs": [' + b'"a",' * 3000 + b'"a"]}',
    b'{"inputs": []}',
    b'{"instances": [' + b"{}," * 200 + b"{}]}",
    b'{"inputs": "a"} trailing',
    b'{"inputs": "a",}',
    b"{'inputs': 'a'}",
    b"\xef\xbb\xbf" + b'{"inputs": "a"}',
    json.dumps(BODY).encode("utf-16"),
    json.dumps(BODY).encode("utf-32"),
    b'"a text alone"',
    b"null",
    b"0",
    b"{}",
    b"[]",
    b"",
    b"\n" * 5000,
    b'{"inputs": {"image": "AAAA"}}',
    b'{"canary": false}',
    b'{"canary": true, "inputs": "a"}',
    b'{"inputs": "a", "stream": true}',
    b'{"inputs": [{"name": "t", "datatype": "FP32", "shape": [1e9], "data": []}]}',
    b'{"inputs": [{"name": "t", "datatype": "BYTES", "shape": [-1], "data": ["a"]}]}',
    b'{"inputs": [{"name": "t", "datatype": "BYTES", "shape": [99999999999999999999], "data": ["a"]}]}',
    b'{"id": "' + b"i" * 5000 + b'", "inputs": [{"name": "t", "datatype": "BYTES", "shape": [1], "data": ["a"]}]}',
]


@dataclass
class Bodies:
    """What requests carry. tokens: by what is the matter with them; "predict" is a good one."""

    seed: int
    tokens: Mapping[str, str]
    values: Sequence[Any]
    _media: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        for form in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"):
            file = io.BytesIO()
            Image.effect_noise((24, 24), 60).convert("RGB").save(file, form)
            self._media.append(file.getvalue())
        file = io.BytesIO()
        with wave.open(file, "wb") as sound:
            sound.setnchannels(1)
            sound.setsampwidth(2)
            sound.setframerate(16000)
            sound.writeframes(b"\1\2" * 400)
        self._media += [
            file.getvalue(),
            b"fLaC\0\0\0\x22" + bytes(60),
            b"OggS" + bytes(60),
            b"%PDF-1.7",
            b"PK\3\4" + bytes(30),
        ]
        self._media += [gzip.compress(bytes(200_000)), b"\x80\x04cos\nsystem\n(S'true'\ntR."]

    def shaped(self, chance: random.Random) -> tuple[str, bytes]:
        """A route, and JSON in which one thing is a value of Hypothesis."""
        value = chance.choice(self.values)
        path, body = chance.choice(
            (
                (HUGGING_FACE, value),
                (HUGGING_FACE, {"inputs": value}),
                (HUGGING_FACE, {"inputs": [TEXT, value]}),
                (HUGGING_FACE, {"inputs": TEXT, "parameters": value}),
                (HUGGING_FACE, {"inputs": TEXT, "parameters": {chance.choice(PARAMETERS): value}}),
                (HUGGING_FACE, {"inputs": TEXT, chance.choice(("stream", "canary", "options", "id")): value}),
                (V1, {"instances": value}),
                (V1, {"instances": [value, TEXT]}),
                (V1, {"instances": [{"inputs": value, "parameters": value}], "signature_name": value}),
                (V2, {"inputs": value}),
                (V2, {**V2_BODY, chance.choice(("id", "outputs", "parameters", "model_name")): value}),
                (
                    V2,
                    {"inputs": [{**TENSOR, chance.choice(("name", "datatype", "shape", "data")): value}]},
                ),
            )
        )
        escaped = chance.random() < 0.7
        return path, json.dumps(body, ensure_ascii=escaped).encode("utf-8", "surrogatepass")

    def file(self, chance: random.Random) -> bytes:
        content = chance.choice(self._media)
        return chance.choice((content, content[: chance.randrange(len(content))], mutated(chance, content)))


def json_values(seed: int, count: int) -> list[Any]:
    """JSON values that Hypothesis makes, lone surrogates, NaN and all."""
    anything = strategies.text(strategies.characters(exclude_categories=())) | strategies.sampled_from(NAUGHTY)
    leaves = (
        strategies.none()
        | strategies.booleans()
        | strategies.integers()
        | strategies.floats()
        | strategies.text()
        | anything
    )
    names = strategies.sampled_from(("inputs", "parameters", "instances", "data", "shape", "id")) | anything
    values = strategies.recursive(
        leaves, lambda inner: strategies.lists(inner) | strategies.dictionaries(names, inner), max_leaves=12
    )
    found: list[Any] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(values)
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    return found


def mutated(chance: random.Random, content: bytes) -> bytes:
    """With one to four changes: bytes flipped, replaced, inserted, taken out, repeated, cut off."""
    changed = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(changed) + 1)
        match chance.randrange(7):
            case 0 if place < len(changed):
                changed[place] ^= 1 << chance.randrange(8)
            case 1 if place < len(changed):
                changed[place] = chance.randrange(256)
            case 2:
                changed[place:place] = chance.randbytes(chance.randint(1, 8))
            case 3:
                del changed[place : place + chance.randint(1, 16)]
            case 4:
                piece = changed[place : place + chance.randint(1, 40)]
                changed[place:place] = piece * chance.choice((1, 2, 30))
            case 5 if chance.random() < 0.3:
                del changed[place:]
            case _:
                changed[place:place] = chance.choice(
                    (b'"', b"{", b"]", b"\\", b"\0", b"\xff", b"1e999", b"null", b"\xed\xa0\x80")
                )
    return bytes(changed)
