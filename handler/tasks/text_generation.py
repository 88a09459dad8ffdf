"""Text generation: continues a text, with the parameters and answers of the Hugging Face Inference API."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from handler import backends
from handler.errors import InvalidInput, InvalidParameter, RequestError, TooLarge
from handler.generation import Decoding, Generation, Generator, Prompt, Step, Token
from handler.inputs.text import read_text
from handler.messages import Piece, Usage
from handler.parameters import CommonParameters, at_least, between
from handler.settings import Settings
from handler.tasks import Answer, StreamingTask, largest_difference

_USUAL_NEW_TOKENS = 100
_MAX_STOP_SEQUENCES, _MAX_STOP_CHARACTERS = 16, 256
_SAMPLING = ("temperature", "top_k", "top_p", "typical_p")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextGenerationParameters(CommonParameters):
    """Those of the Inference API, and transformers' for beam search. What is None is the model's own default.

    do_sample: if None, tokens are drawn where a request names temperature, top_k, top_p or typical_p, else the
    likeliest is taken. max_new_tokens: 100 if neither request nor model say. stop: texts that end the answer, and
    belong to it. seed: of drawn tokens; None draws one. return_full_text: begin with the prompt. truncate: keep that
    many tokens of the prompt, its last ones. details: add the tokens with their log probabilities; with
    decoder_input_details those of the prompt, with top_n_tokens the likeliest in each place.
    """

    overflow: Literal["error", "truncate"] | None = None
    max_new_tokens: int | None = at_least(1)
    do_sample: bool | None = None
    temperature: float | None = between(0.01, 100)
    top_k: int | None = at_least(0)
    top_p: float | None = between(1e-6, 1)
    typical_p: float | None = between(1e-6, 1)
    repetition_penalty: float | None = between(0.01, 100)
    seed: int | None = between(0, 2**64 - 1)
    stop: list[str] | None = None
    num_beams: int | None = between(1, 8)
    length_penalty: float | None = between(-100, 100)
    early_stopping: bool | None = None
    return_full_text: bool | None = None
    truncate: int | None = at_least(1)
    decoder_input_details: bool | None = None
    top_n_tokens: int | None = between(1, 20)


@dataclass(frozen=True, slots=True)
class _Job:
    """One input on its way. place: among the inputs of the batch."""

    place: int
    text: str
    parameters: TextGenerationParameters
    usage: Usage
    prompt: Prompt
    streamed: bool

    def said(self, step: Step, number: int) -> list[tuple[int, Any]]:
        """What a step, the `number`-th of its row, comes to."""
        if self.streamed:
            return [(self.place, Piece(self._event(step, number), self.usage, step.end is not None))]
        if step.end is None:
            return []
        prediction: dict[str, Any] = {"generated_text": self._text(step.end)}
        if self.parameters.details:
            prediction["details"] = _details(step.end)
        return [(self.place, Answer(prediction, self.usage.tokens, self.usage.truncated))]

    def _event(self, step: Step, number: int) -> dict[str, Any]:
        event: dict[str, Any] = {"index": number, "token": _token(step.token), "generated_text": None, "details": None}
        if step.token.likeliest:
            event["top_tokens"] = [_token(token) for token in step.token.likeliest]
        if step.end is not None:
            event["generated_text"] = self._text(step.end)
            if self.parameters.details:
                event["details"] = {
                    "finish_reason": step.end.finish_reason,
                    "generated_tokens": len(step.end.tokens),
                    "input_length": len(self.prompt.ids),
                    "seed": step.end.seed,
                }
        return event

    def _text(self, generation: Generation) -> str:
        return self.text + generation.text if self.parameters.return_full_text else generation.text


class TextGeneration(StreamingTask):
    """Continues texts with a causal language model; `Settings.max_length` bounds prompt and new tokens together."""

    Parameters: ClassVar[type[CommonParameters]] = TextGenerationParameters

    def __init__(self, model_dir: Path, settings: Settings, config: Mapping[str, Any]) -> None:
        model = backends.load_model(model_dir, settings, "AutoModelForCausalLM")
        tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
        self._tokenizer = cast(PreTrainedTokenizerFast, tokenizer)
        self._generator = Generator(model, self._tokenizer, settings.token_budget, settings.max_tokens)
        positions = getattr(model.config, "max_position_embeddings", None)
        self._context: int = min(settings.max_length, positions or settings.max_length)
        self._most = min(settings.max_new_tokens, self._context - 1)
        self._overflow, self._seconds = settings.overflow, settings.max_generation_seconds
        own = model.generation_config
        names = [field.name for field in fields(Decoding)]
        found = {name: getattr(own, name, None) for name in names}
        self._defaults = {name: value for name, value in found.items() if value is not None}
        usual = self._defaults.get("max_new_tokens", min(_USUAL_NEW_TOKENS, self._context // 2))
        self._defaults["max_new_tokens"] = min(usual, self._most)
        # What an empty prompt begins with, as in `generate`.
        self._start = own.bos_token_id if own.bos_token_id is not None else self._tokenizer.bos_token_id

    def read(self, value: Any, parameters: Any) -> Sequence[str]:
        """A string."""
        if (parameters.max_new_tokens or 0) > self._most:
            raise InvalidParameter(f"parameter 'max_new_tokens' must be at most {self._most}")
        stops = parameters.stop or []
        if len(stops) > _MAX_STOP_SEQUENCES or not all(0 < len(stop) <= _MAX_STOP_CHARACTERS for stop in stops):
            raise InvalidParameter(
                f"parameter 'stop' takes at most {_MAX_STOP_SEQUENCES} texts of 1 to {_MAX_STOP_CHARACTERS} characters"
            )
        return [read_text(value)]

    def stream(
        self, requests: Sequence[tuple[Sequence[Any], Any]], streamed: Sequence[bool]
    ) -> Iterator[list[tuple[int, Any]]]:
        """Pieces are the events of the Inference API's stream, one for each token."""
        texts = [text for [text], _ in requests]
        encoded = self._tokenizer(texts, return_attention_mask=False, return_special_tokens_mask=True, verbose=False)
        jobs, refused = [], []
        for place, ((_, parameters), stream) in enumerate(zip(requests, streamed, strict=True)):
            ids, special = encoded["input_ids"][place], encoded["special_tokens_mask"][place]
            try:
                jobs.append(self._job(place, texts[place], parameters, ids, special, stream))
            except RequestError as error:
                refused.append((place, error))
        yield refused
        steps = [0] * len(jobs)
        for outcomes in self._generator([job.prompt for job in jobs]):
            said: list[tuple[int, Any]] = []
            for index, outcome in outcomes:
                if isinstance(outcome, RequestError):
                    said.append((jobs[index].place, outcome))
                else:
                    steps[index] += 1
                    said += jobs[index].said(outcome, steps[index])
            yield said

    def _job(
        self,
        place: int,
        text: str,
        parameters: TextGenerationParameters,
        ids: Sequence[int],
        special: Sequence[int],
        streamed: bool,
    ) -> _Job:
        """Cuts the prompt to size. Raises RequestError if that is not allowed, or if there is no prompt."""
        decoding = self._decoding(parameters)
        tokens = len(ids)
        if not ids:
            if self._start is None:
                raise InvalidInput("the text is empty; this model needs at least one character to go on from")
            ids, special = [self._start], [1]
        room = self._context - decoding.max_new_tokens
        if parameters.truncate is None and len(ids) > room and (parameters.overflow or self._overflow) != "truncate":
            raise TooLarge(
                f"the text has {len(ids)} tokens, and with max_new_tokens {decoding.max_new_tokens} there is room for "
                f'{room}; shorten it, ask for fewer new tokens, or send the parameter "overflow": "truncate"'
            )
        kept = min(room, parameters.truncate or room)
        truncated = len(ids) > kept
        if truncated:
            # The beginning goes, but for the special tokens that the model expects there.
            lead = min(next((at for at, mark in enumerate(special) if not mark), 0), kept - 1)
            ids = [*ids[:lead], *ids[len(ids) - (kept - lead) :]]
        patient = streamed and decoding.num_beams == 1
        deadline = math.inf if patient else time.monotonic() + self._seconds
        return _Job(place, text, parameters, Usage(tokens, truncated, 1), Prompt(ids, decoding, deadline), streamed)

    def _decoding(self, parameters: TextGenerationParameters) -> Decoding:
        """The request's parameters, the model's own in place of those it leaves out."""
        named = {field.name: getattr(parameters, field.name) for field in fields(Decoding)}
        given = {name: value for name, value in named.items() if value is not None}
        if any(name in given for name in _SAMPLING):
            given.setdefault("do_sample", True)
        return Decoding(**(self._defaults | given))

    @staticmethod
    def drift(expected: Mapping[str, Any], found: Mapping[str, Any]) -> float:
        """Largest difference of a token's log probability, where there are details; inf if tokens or texts differ."""
        if expected["generated_text"] != found["generated_text"]:
            return math.inf
        before, after = (
            {
                (kind, place, token["id"]): token["logprob"] or 0.0
                for kind in ("prefill", "tokens")
                for place, token in enumerate(prediction.get("details", {}).get(kind, ()))
            }
            for prediction in (expected, found)
        )
        return largest_difference(before, after)


def _details(generation: Generation) -> dict[str, Any]:
    """The `details` of a whole answer."""
    details: dict[str, Any] = {
        "finish_reason": generation.finish_reason,
        "generated_tokens": len(generation.tokens),
        "seed": generation.seed,
        "prefill": [_token(token) for token in generation.prefill],
        "tokens": [_token(token) for token in generation.tokens],
    }
    if generation.tokens[0].likeliest:
        details["top_tokens"] = [[_token(other) for other in token.likeliest] for token in generation.tokens]
    return details


def _token(token: Token) -> dict[str, Any]:
    return {"id": token.id, "text": token.text, "logprob": token.logprob, "special": token.special}
