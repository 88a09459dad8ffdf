"""A server for tests of the console, which speaks the JSON of a Marble server: a model of each task, named after it."""

import base64
import http.server
import io
import json
import re
import threading
import wave
from collections import Counter
from typing import Any

from PIL import Image

TOKEN = "the-right-token"
DIGEST = "ab" * 32
HOSTILE = "<img src=x onerror=alert(1)>"


def png(side: int = 24) -> bytes:
    """A small image."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), "#3366cc").save(buffer, "PNG")
    return buffer.getvalue()


def wav() -> bytes:
    """A tenth of a second of silence."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(1600))
    return buffer.getvalue()


def _labels(*names: str) -> list[dict[str, Any]]:
    return [{"label": name, "score": score} for name, score in zip(names, (0.75, 0.25), strict=True)]


PREDICTIONS: dict[str, Any] = {
    "text-classification": [_labels("positive", HOSTILE)],
    "token-classification": [{"entity_group": "PER", "score": 0.97, "word": "Ada", "start": 0, "end": 3}],
    "question-answering": {"answer": "Ann", "score": 0.9, "start": 0, "end": 3},
    "fill-mask": [{"token_str": "warm", "score": 0.6, "token": 7, "sequence": "it was warm"}],
    "summarization": [{"summary_text": "short"}],
    "sentence-similarity": [0.8, 0.1],
    "zero-shot-classification": _labels("weather", "sport"),
    "image-classification": _labels("seven", "one"),
    "audio-classification": _labels("bark", "meow"),
    "automatic-speech-recognition": {"text": "good morning"},
    "translation": [{"translation_text": "kurz"}],
    "text-to-speech": base64.b64encode(wav()).decode(),
    "text-to-image": base64.b64encode(png()).decode(),
    "feature-extraction": [0.5] * 40,
    "of-another-kind": {"anything": [1, 2]},
}
TASKS = (*PREDICTIONS, "text-generation")
WORDS = ("once ", "upon ", "a ", "time")


def _explanation(model: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"label": "positive", "score": 0.75, "value": 1.3}
    if model == "image-classification":
        entry |= {"heat_map": [[0.5, -0.2], [0.0, 0.1]], "box": {"xmin": 0, "ymin": 0, "xmax": 24, "ymax": 24}}
    else:
        entry["attributions"] = [
            {"word": "warm", "start": 0, "end": 4, "score": 0.94},
            {"word": "room", "start": 5, "end": 9, "score": -0.2},
        ]
    return {"method": "occlusion", "prediction": [], "explanations": [entry]}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    fake: "FakeServer"

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self._send(200, self.fake.metrics().encode())
        elif self.path.startswith("/models?"):
            self._say(200, {"models": [{"modelName": name, "modelUrl": "x"} for name in self.fake.models]})
        else:
            name = self.path.removeprefix("/models/")
            self._say(200, [{"modelName": name, "modelVersion": "1.0", "workers": [{"status": "READY"}]}])

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        # What is no JSON is an image or a sound as it is.
        body = json.loads(content) if self.headers["Content-Type"] == "application/json" else {"inputs": None}
        self.fake.asked.append(content if body.get("inputs", "") is None else body)
        kind, model = re.fullmatch(r"/(predictions|explanations)/([^/]+)", self.path).groups()  # type: ignore[union-attr]
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            message = "Token Authorization failed. Token either incorrect, expired, or not provided correctly"
            return self._say(400, {"code": 400, "type": "InvalidKeyException", "message": message})
        text = body.get("inputs")
        refused = isinstance(text, str) and "refuse" in text
        if body != {"canary": True}:
            self.fake.counted[model, 422 if refused else 200] += 1
        if refused:
            return self._say(422, {"error": "this text is refused", "code": 422, "type": "InvalidInput"})
        if body.get("stream"):
            return self._stream()
        if body == {"canary": True}:
            return self._answer({"drift": 0.0}, model)
        return self._answer(
            _explanation(model) if kind == "explanations" else PREDICTIONS[model.partition("_")[0]], model
        )

    def _answer(self, predictions: Any, model: str) -> None:
        usage = {"tokens": 12, "truncated": True, "windows": 1}
        facts = {"name": model, "version": "1.0", "digest": DIGEST, "task": model.partition("_")[0]}
        self._say(200, {"predictions": predictions, "usage": usage, "model": facts})

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        for number, word in enumerate(WORDS, start=1):
            event: dict[str, Any] = {"token": {"id": number, "text": word, "logprob": -0.1, "special": False}}
            if number == len(WORDS):
                event |= {
                    "generated_text": "".join(WORDS),
                    "details": {"finish_reason": "length", "generated_tokens": number, "seed": None},
                }
            self.wfile.write(b"data:" + json.dumps(event).encode() + b"\n\n")
            self.wfile.flush()
        self.close_connection = True

    def _say(self, status: int, reply: Any) -> None:
        self._send(status, json.dumps(reply).encode())

    def _send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


class FakeServer:
    """Serves predictions, a list of models and metrics at one port, which it keeps when it is stopped and started.

    A model is named after its task; what follows a `_` in its name says nothing.
    """

    def __init__(self) -> None:
        self.port = 0
        self.models: list[str] = list(TASKS)
        self.asked: list[Any] = []  # what predictions were asked with: JSON, or bytes
        self.counted: Counter[tuple[str, int]] = Counter()  # predictions and explanations, by model and status
        self.start()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Begins to answer."""
        handler = type("Handler", (_Handler,), {"fake": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def metrics(self) -> str:
        """What is counted, as TorchServe writes it: each request took from 10 to 25 ms, and waited 2 ms before."""
        lines = ["# HELP marble_requests_total Torchserve prometheus counter metric with unit: Count"]
        for (model, code), count in self.counted.items():
            known = f'model="{model}",version="1.0"'
            lines.append(f'marble_requests_total{{{known},protocol="rest",code="{code}",Hostname="h",}} {count}.0')
        for model in {model for model, _ in self.counted}:
            count = sum(number for (name, _), number in self.counted.items() if name == model)
            for le, below in (("0.01", 0), ("0.025", count), ("+Inf", count)):
                lines.append(f'marble_request_seconds_bucket{{model="{model}",version="1.0",le="{le}",}} {below}.0')
            known = f'model_name="{model}",model_version="default",hostname="h",'
            lines.append(f"ts_inference_requests_total{{{known}}} {count}.0")
            lines.append(f"ts_queue_latency_microseconds{{{known}}} {2000 * count}.0")
        return "\n".join(lines) + "\n"

    def stop(self) -> None:
        """Closes the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
