"""Ray Serve with its batching on. Environment: MODEL_DIR, PORT."""

import os
import threading
from typing import Any

import ray
from ray import serve
from starlette.requests import Request
from torch_classifier import Classifier

CPUS = len(os.sched_getaffinity(0))


# Ray sets OMP_NUM_THREADS to the CPUs an actor asks for; by default that is one.
@serve.deployment(ray_actor_options={"num_cpus": CPUS}, max_ongoing_requests=1024)
class TextClassifier:
    def __init__(self) -> None:
        self.model = Classifier()

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.002)
    async def classify(self, texts: list[str]) -> list[list[dict[str, Any]]]:
        return self.model(texts)

    async def __call__(self, request: Request) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = await self.classify((await request.json())["inputs"])
        return found


if __name__ == "__main__":
    ray.init(num_cpus=CPUS, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(os.environ["PORT"])})
    serve.run(TextClassifier.bind(), route_prefix="/predict")
    threading.Event().wait()
