"""gRPC load: keeps so many unary calls of TorchServe's Predictions under way, with the lines of a file in turn.

    python benchmarks/grpc_load.py --target 127.0.0.1:7070 --model reviews --bodies bodies.jsonl

The token is taken from MARBLE_TOKEN. Prints one line of JSON, like speed/wrk.lua.
"""

import argparse
import asyncio
import json
import os
import time
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from marble_client.stubs import inference_pb2

_METHOD = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"
_SECONDS_TO_ANSWER = 60


def messages(model: str, bodies: Sequence[bytes]) -> list[bytes]:
    """A serialized request for each body; serialized once, which leaves the machine to the server."""
    return [
        inference_pb2.PredictionsRequest(model_name=model, input={"data": body}).SerializeToString() for body in bodies
    ]


def is_answer(reply: bytes) -> bool:
    """Whether a serialized reply is a prediction: gRPC says OK for an error of one request, too."""
    return not inference_pb2.PredictionResponse.FromString(reply).prediction.lstrip().startswith(b'{"error"')


async def load(target: str, model: str, bodies: Sequence[bytes], calls: int, seconds: float) -> dict[str, Any]:
    """Runs the load; see `benchmarks.speed.load.Sample` for what comes back."""
    requests: Iterator[bytes] = cycle(messages(model, bodies))
    metadata = [("authorization", f"Bearer {token}")] if (token := os.environ.get("MARBLE_TOKEN")) else []
    latencies: list[float] = []
    replies: list[bytes] = []
    errors = 0
    async with grpc.aio.insecure_channel(target, [("grpc.enable_http_proxy", 0)]) as channel:
        # No serializers: bytes go out and come in as they are.
        predict = channel.unary_unary(_METHOD, None, None)
        await channel.channel_ready()
        begun = time.perf_counter()
        end = begun + seconds

        async def caller() -> None:
            nonlocal errors
            while (sent := time.perf_counter()) < end:
                try:
                    reply = await predict(next(requests), metadata=metadata, timeout=_SECONDS_TO_ANSWER)
                except grpc.aio.AioRpcError:
                    errors += 1
                    continue
                if (answered := time.perf_counter()) <= end:
                    latencies.append(answered - sent)
                    replies.append(reply)

        await asyncio.gather(*(caller() for _ in range(calls)))
    errors += sum(not is_answer(reply) for reply in replies)
    p50, p99 = np.percentile(latencies, [50, 99]) * 1e3 if latencies else (0.0, 0.0)
    return {
        "requests": len(replies),
        "seconds": seconds,
        "p50_ms": round(float(p50), 3),
        "p99_ms": round(float(p99), 3),
        "errors": errors,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="127.0.0.1:7070", help="host:port")
    parser.add_argument("--model", required=True, help="name of the served model")
    parser.add_argument("--bodies", type=Path, required=True, help="one request body a line")
    parser.add_argument("--calls", type=int, default=64, help="calls under way at a time")
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    bodies = arguments.bodies.read_bytes().splitlines()
    result = asyncio.run(load(arguments.target, arguments.model, bodies, arguments.calls, arguments.seconds))
    print(f"RESULT {json.dumps(result)}")


if __name__ == "__main__":
    main()
