"""Hostile gRPC calls, made from a seed: row 8."""

import gzip
import json
import math
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.fault_injection import http2
from benchmarks.fault_injection.bench import MODEL
from benchmarks.fault_injection.bodies import NAUGHTY, PARAMETERS, RAW_JSON, TEXT, VALID, Bodies, mutated
from benchmarks.fault_injection.site import BODY, MODEL_INFER, PREDICTIONS
from marble_client.stubs import inference_pb2, open_inference_grpc_pb2


@dataclass(frozen=True, slots=True)
class Call:
    """One gRPC call. frames: what is sent instead of the message, on a connection of HTTP/2 with a stream that `{}`
    cannot name: the function gets its number."""

    kind: str
    method: str
    message: bytes
    metadata: Sequence[tuple[str, str | bytes]] = ()
    frames: Callable[[int], bytes] | None = None
    control: bool = False
    compressed: bool = False


class GrpcCalls(Bodies):
    """Makes gRPC calls."""

    def call(self, number: int) -> Call:
        """A gRPC call."""
        chance = random.Random(f"grpc {self.seed} {number}")
        [make] = chance.choices(
            (
                self._grpc_control,
                self._grpc_json,
                self._grpc_mutated,
                self._grpc_binary,
                self._tensors,
                self._grpc_metadata,
                self._grpc_method,
                self._grpc_framed,
            ),
            (4, 26, 26, 10, 18, 6, 2, 8),
        )
        return make(chance)

    def _grpc_control(self, chance: random.Random) -> Call:
        return Call("control", PREDICTIONS, self._predictions(json.dumps(BODY).encode()), self._bearer(), control=True)

    def _grpc_json(self, chance: random.Random) -> Call:
        body = self.shaped(chance)[1] if chance.random() < 0.7 else chance.choice(RAW_JSON)
        compressed = chance.random() < 0.05
        return Call("json", PREDICTIONS, self._predictions(body), self._bearer(), compressed=compressed)

    def _grpc_mutated(self, chance: random.Random) -> Call:
        _, value = chance.choice(VALID)
        if chance.random() < 0.5:
            message, method = self._predictions(json.dumps(value).encode()), PREDICTIONS
        else:
            message, method = self._infer().SerializeToString(), MODEL_INFER
        return Call("mutated protobuf", method, mutated(chance, message), self._bearer())

    def _grpc_binary(self, chance: random.Random) -> Call:
        name = chance.choice(("data", "body", "", "parameters", "\x00", "content-type"))
        request = inference_pb2.PredictionsRequest(model_name=MODEL, input={name: self.file(chance)})
        if chance.random() < 0.5:
            request.input[chance.choice(NAUGHTY).encode("utf-8", "replace").decode()] = b"more"
        return Call("media", PREDICTIONS, request.SerializeToString(), self._bearer())

    def _tensors(self, chance: random.Random) -> Call:
        """Open Inference requests whose fields are right and do not fit each other."""
        request = self._infer()
        tensor = request.inputs[0]
        for _ in range(chance.randint(1, 3)):
            match chance.randrange(14):
                case 0:
                    del tensor.shape[:]
                    tensor.shape.extend(chance.choice(([], [0], [-1], [2**62], [1] * 200, [1, 1, 1])))
                case 1:
                    tensor.datatype = chance.choice(("", "FP32", "INT64", "BOOL", "bytes", "UINT8", "FP64", "☃"))
                case 2:
                    tensor.contents.fp32_contents.extend((math.nan, math.inf, 1e38))
                case 3:
                    tensor.contents.fp64_contents.extend((math.nan, -math.inf))
                case 4:
                    tensor.contents.int64_contents.append(2**63 - 1)
                case 5:
                    tensor.contents.uint64_contents.append(2**64 - 1)
                case 6:
                    tensor.contents.ClearField("bytes_contents")
                case 7:
                    tensor.contents.bytes_contents.append(self.file(chance))
                case 8:
                    request.raw_input_contents.append(chance.choice((b"", b"\4\0\0\0good", b"\xff" * 30)))
                case 9:
                    request.parameters[chance.choice((*PARAMETERS, "binary_data_output"))].int64_param = -(2**63)
                case 10:
                    tensor.parameters["content_type"].string_param = (
                        chance.choice(NAUGHTY).encode("utf-8", "replace").decode()
                    )
                case 11:
                    request.id = chance.choice(("", "i" * 5000, "\0", '"}'))
                case 12:
                    request.inputs.append(tensor)
                case _:
                    del request.inputs[1:]
                    request.outputs.add(name=chance.choice(("", "label", "score", "nobody")))
        return Call("tensors", MODEL_INFER, request.SerializeToString(), self._bearer())

    def _grpc_metadata(self, chance: random.Random) -> Call:
        body = self._predictions(json.dumps(BODY).encode())
        good = self.tokens["predict"]
        choices: list[list[tuple[str, str | bytes]]] = [
            [],
            [("authorization", f"Bearer {self.tokens[chance.choice(list(self.tokens))]}")],
            [("authorization", good)],
            [("authorization", f"Bearer {good}x")],
            [("authorization", f"Bearer {good}"), ("authorization", f"Bearer {good}")],
            [*self._bearer(), ("explain", "True"), ("describe", "True")],
            [*self._bearer(), ("x-request-id", '"},{"forged')],
            [*self._bearer(), ("x-bin", bytes(range(256)))],
            [*self._bearer(), ("x-long", "y" * 6000)],
            [*self._bearer(), *((f"x-{n}", "y") for n in range(200))],
            [*self._bearer(), ("content-type-x", "text/html"), ("url_path", "../models")],
            [*self._bearer(), ("traceparent", "00-zz")],
        ]
        return Call("metadata", PREDICTIONS, body, chance.choice(choices))

    def _grpc_method(self, chance: random.Random) -> Call:
        method = chance.choice(
            (
                PREDICTIONS.replace("Predictions", "StreamPredictions"),
                PREDICTIONS.replace("Predictions", "StreamPredictions2"),
                PREDICTIONS.replace("Predictions", "Ping"),
                MODEL_INFER.replace("ModelInfer", "ServerReady"),
                "/org.pytorch.serve.grpc.management.ManagementAPIsService/ScaleWorker",
                "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                "/",
                "/x" * 200,
                PREDICTIONS + "/",
                PREDICTIONS.lower(),
            )
        )
        return Call("method", method, self._predictions(json.dumps(BODY).encode()), self._bearer())

    def _grpc_framed(self, chance: random.Random) -> Call:
        """Frames and prefixes of lengths that no library would send."""
        message = self._predictions(json.dumps(BODY).encode())
        good = b"\0" + struct.pack(">I", len(message)) + message
        content = chance.choice(
            (
                b"",
                b"\0",
                good[:7],
                good + good,
                good + b"\0\0",
                b"\1" + good[1:],
                b"\7" + good[1:],
                b"\0" + struct.pack(">I", len(message) + 9) + message,
                b"\0" + struct.pack(">I", len(message) - 9) + message,
                b"\0\xff\xff\xff\xff" + message,
                b"\0\0\0\0\0",
                mutated(chance, good),
                b"\1" + struct.pack(">I", len(packed := gzip.compress(message))) + packed,
            )
        )
        fields = [
            (b":method", chance.choice((b"POST", b"POST", b"POST", b"GET", b"PUT"))),
            (b":scheme", b"https"),
            (b":path", chance.choice((PREDICTIONS, MODEL_INFER)).encode()),
            (b":authority", b"localhost"),
            (
                b"content-type",
                chance.choice((b"application/grpc", b"application/grpc+proto", b"application/grpc-web", b"text/html")),
            ),
            (b"te", chance.choice((b"trailers", b"gzip"))),
            (b"authorization", b"Bearer " + self.tokens["predict"].encode()),
        ]
        fields += chance.choice(
            (
                [],
                [(b"grpc-encoding", chance.choice((b"gzip", b"snappy", b"", b"\xff")))],
                [(b"grpc-timeout", chance.choice((b"0n", b"99999999H", b"-1S", b"x")))],
                [(b"grpc-accept-encoding", b"x" * 500)],
                [(b"x-odd", bytes(chance.choices(range(32, 256), k=20)))],
                [(b"user-agent", b"\xf0\x9f\x92\xa9")],
            )
        )
        pieces = [content[:3], content[3:]] if chance.random() < 0.3 else [content]

        def frames(stream: int) -> bytes:
            sent = http2.frame(http2.HEADERS, http2.END_HEADERS, stream, http2.block(fields))
            for number, piece in enumerate(pieces, 1):
                sent += http2.frame(http2.DATA, http2.END_STREAM if number == len(pieces) else 0, stream, piece)
            return sent

        return Call("framing", PREDICTIONS, content, frames=frames)

    def _bearer(self) -> list[tuple[str, str | bytes]]:
        return [("authorization", f"Bearer {self.tokens['predict']}")]

    @staticmethod
    def _predictions(body: bytes) -> bytes:
        request = inference_pb2.PredictionsRequest(model_name=MODEL, input={"data": body})
        content: bytes = request.SerializeToString()
        return content

    @staticmethod
    def _infer() -> Any:
        request = open_inference_grpc_pb2.ModelInferRequest(model_name=MODEL, id="a")
        tensor = request.inputs.add(name="text", datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(TEXT.encode())
        return request
