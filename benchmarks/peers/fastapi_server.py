"""FastAPI and `transformers.pipeline`. Environment: MODEL_DIR, PORT, TASK."""

import os
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import pipeline

TASK = os.environ["TASK"]
OPTIONS: dict[str, Any] = {
    "text-classification": {"top_k": None},
    "token-classification": {"aggregation_strategy": "simple"},
}[TASK]
answer = pipeline(TASK, model=os.environ["MODEL_DIR"], **OPTIONS)
app = FastAPI()


class Request(BaseModel):
    inputs: str


@app.post("/predict")
def predict(request: Request) -> list[dict[str, Any]]:
    [found] = answer([request.inputs])
    # Spans have NumPy scores.
    return [{**entry, "score": float(entry["score"])} for entry in found]


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ["PORT"]), log_level="warning")
