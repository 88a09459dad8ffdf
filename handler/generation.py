"""Causal text generation: one decode loop over a KV cache, in which every row has parameters of its own.

A row's tokens do not depend on its neighbours: each has its own random numbers, stop sequences and length, and rows
that end leave the batch. They are the tokens that transformers' `generate` gives to the row alone, under greedy
decoding and, with the same seed, under sampling.
"""

import math
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal, TypeAlias, cast

import torch
from torch.nn.functional import pad
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.cache_utils import Cache, DynamicLayer

from handler.batching import fewest_batches, micro_batches
from handler.errors import InternalError, Overloaded, RequestError

FinishReason = Literal["length", "eos_token", "stop_sequence"]

_ROOM = 64  # positions by which a cache grows
# What a model's own configuration may want besides a `Decoding`; transformers sees to it, one row after the other.
_RARE = (
    "no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "min_length", "min_new_tokens", "min_p", "top_h",
    "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
    "forced_bos_token_id", "forced_eos_token_id", "guidance_scale", "watermarking_config", "stop_strings",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How one prompt is continued; the names are those of transformers' GenerationConfig and of the Inference API.

    seed: of a row that samples; None draws one. stop: texts that end the row. top_k: 0 keeps all tokens.
    """

    max_new_tokens: int
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    decoder_input_details: bool = False
    top_n_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, at least one; with `max_new_tokens` they must fit the model's positions.

    deadline: the `time.monotonic()` at which it is given up.
    """

    ids: Sequence[int]
    decoding: Decoding
    deadline: float = math.inf


@dataclass(frozen=True, slots=True)
class Token:
    """One token.

    text: what it adds to the text: "" for a special token, and for each token of a character but the last.
    logprob: natural logarithm of the probability the model itself gives it; None for the first token of a prompt.
    likeliest: the `top_n_tokens` likeliest tokens in its place.
    """

    id: int
    text: str
    logprob: float | None
    special: bool
    likeliest: Sequence["Token"] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished row. The texts of `tokens` make up `text`; `seed` is None unless tokens were sampled."""

    text: str
    finish_reason: FinishReason
    tokens: Sequence[Token]
    prefill: Sequence[Token]
    seed: int | None


@dataclass(frozen=True, slots=True)
class Step:
    """One more token of a row; `end` comes with its last."""

    token: Token
    end: Generation | None


Outcome: TypeAlias = tuple[int, Step | RequestError]


class Generator:
    """Continues prompts with a causal language model.

    token_budget: tokens of one prefill batch; positions: those of all rows that decode together, which is what bounds
    the memory of the cache; both with padding. Raises ValueError for a model whose state is not a cache of keys and
    values, or whose tokenizer is not a fast one.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, token_budget: int, positions: int
    ) -> None:
        if not tokenizer.is_fast:
            raise ValueError("its tokenizer has no tokenizer.json, which serving needs")
        if not all(isinstance(layer, DynamicLayer) for layer in DynamicCache(config=model.config).layers):
            raise ValueError(f"{model.config.model_type} keeps a state other than keys and values, which is not served")
        self._model: Any = model  # an nn.Module is untyped
        self._vocabulary = _Vocabulary(tokenizer, model.generation_config)
        self._token_budget, self._positions = token_budget, positions
        self._takes_positions = "position_ids" in signature(model.forward).parameters
        self._rare = any(getattr(model.generation_config, name, None) for name in _RARE)

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Prompt]) -> Iterator[list[Outcome]]:
        """Yields, step by step, the next token of every prompt that has not ended, by its place in `prompts`.

        A prompt that fails has an error instead, once. Prompts with several beams come after all the others, each
        with all its tokens at once.
        """
        rows = [_Row(index, prompt, self._vocabulary) for index, prompt in enumerate(prompts)]
        single = [row for row in rows if row.decoding.num_beams == 1 and not self._rare]
        lengths = [row.longest for row in single]
        # A model that cannot be told positions would count padding, so its rows run one by one.
        groups = (
            fewest_batches(lengths, self._positions) if self._takes_positions else [[n] for n in range(len(single))]
        )
        for group in groups:
            yield from self._decode([single[place] for place in group])
        for row in rows:
            if row.decoding.num_beams > 1 or self._rare:
                yield self._search(row)

    def _decode(self, rows: Sequence["_Row"]) -> Iterator[list[Outcome]]:
        now = time.monotonic()
        if late := [row for row in rows if now > row.deadline]:
            yield [(row.index, _late()) for row in late]
            rows = [row for row in rows if row not in late]
            if not rows:
                return
        cache, mask, logits = self._prefill(rows)
        while True:
            outcomes = self._choose(rows, logits)
            yield outcomes
            alive = [place for place, (_, step) in enumerate(outcomes) if isinstance(step, Step) and step.end is None]
            if not alive:
                return
            if len(alive) < len(rows):
                rows, mask = [rows[place] for place in alive], mask[alive]
                start = int(mask.argmax(dim=1).min())  # before it all that are left have padding
                mask = mask[:, start:]
                for layer in cache.layers:
                    assert isinstance(layer, _Layer)
                    layer.select(alive, start)
            mask = pad(mask, (0, 1), value=1)
            logits = self._forward(torch.tensor([row.ids[-1:] for row in rows]), mask, cache, keep=1)[:, -1]

    def _prefill(self, rows: Sequence["_Row"]) -> tuple[Cache, torch.Tensor, torch.Tensor]:
        """Runs the prompts in batches of like length and joins these, padded on the left.

        Returns the cache, the attention mask int64 [rows, positions] and the logits of the last position, float32
        [rows, vocabulary].
        """
        width = max(len(row.ids) for row in rows)
        order, masks, logits, caches = [], [], [], []
        for group in self._prefill_groups(rows):
            longest = max(len(rows[place].ids) for place in group)
            gaps = [longest - len(rows[place].ids) for place in group]
            ids = torch.tensor([[0] * gap + rows[place].ids for gap, place in zip(gaps, group, strict=True)])
            mask = torch.tensor([[0] * gap + [1] * (longest - gap) for gap in gaps])
            cache = Cache(layer_class_to_replicate=_Layer)
            first = rows[group[0]]
            found = self._forward(ids, mask, cache, keep=0 if first.decoding.decoder_input_details else 1)
            if first.decoding.decoder_input_details:
                first.read_prefill(found[0])
            order += group
            masks.append(pad(mask, (width - longest, 0)))
            logits.append(found[:, -1].clone())
            caches.append(cache)
        places = torch.tensor(order).argsort()
        joined = Cache(layer_class_to_replicate=_Layer)
        for number, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
            keys, values = (
                torch.cat([pad(part, (0, 0, width - part.shape[-2], 0)) for part in parts])[places]
                for parts in ([layer.keys for layer in layers], [layer.values for layer in layers])
            )
            joined.update(keys, values, number)
        return joined, torch.cat(masks)[places], torch.cat(logits)[places]

    def _prefill_groups(self, rows: Sequence["_Row"]) -> Iterator[list[int]]:
        """Places of rows that are run together; a row of whose prompt all logits are needed comes alone."""
        together = []
        for place, row in enumerate(rows):
            if row.decoding.decoder_input_details:
                yield [place]
            else:
                together.append(place)
        for group in micro_batches([len(rows[place].ids) for place in together], self._token_budget):
            yield [together[number] for number in group]

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, cache: Cache | None, keep: int) -> torch.Tensor:
        """Logits float32 [rows, positions, vocabulary] of the last `keep` positions of `ids`; 0: of all."""
        positions = {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]}
        inputs = {"input_ids": ids, "attention_mask": mask, **(positions if self._takes_positions else {})}
        output = self._model(
            **{name: value.to(self._model.device) for name, value in inputs.items()},
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=keep,
        )
        # Tokens are chosen on the CPU: the random numbers of a seed are the same wherever the model runs.
        logits: torch.Tensor = output.logits.float().cpu()
        return logits

    def _choose(self, rows: Sequence["_Row"], logits: torch.Tensor) -> list[Outcome]:
        """The next token of each row, by logits float32 [rows, vocabulary]."""
        logprobs = logits.log_softmax(dim=-1)
        sound = _sound(logits).tolist()
        now = time.monotonic()
        scores = logits.clone()
        sampled: dict[tuple[float, int, float, float], list[int]] = {}
        for place, row in enumerate(rows):
            decoding = row.decoding
            if decoding.repetition_penalty != 1:
                penalty = RepetitionPenaltyLogitsProcessor(float(decoding.repetition_penalty))
                scores[place] = penalty(torch.LongTensor([row.ids]), scores[place : place + 1])[0]
            if decoding.do_sample and sound[place]:
                warping = (decoding.temperature, decoding.top_k, decoding.top_p, decoding.typical_p)
                sampled.setdefault(warping, []).append(place)
        chosen = scores.argmax(dim=-1).tolist()
        for warping, places in sampled.items():
            warped = _warp(scores[places], *warping).softmax(dim=-1)
            for place, probabilities in zip(places, warped, strict=True):
                chosen[place] = int(torch.multinomial(probabilities[None], 1, generator=rows[place].random))
        outcomes: list[Outcome] = []
        for place, row in enumerate(rows):
            if not sound[place]:
                outcomes.append((row.index, _unsound()))
            elif now > row.deadline:
                outcomes.append((row.index, _late()))
            else:
                outcomes.append((row.index, row.take(chosen[place], logprobs[place])))
        return outcomes

    def _search(self, row: "_Row") -> list[Outcome]:
        """Generation by transformers itself: beam search, and what is rare."""
        decoding, start = row.decoding, len(row.ids)
        sampling = {"temperature", "top_k", "top_p", "typical_p"} if decoding.do_sample else set()
        names = {"do_sample", "num_beams", "length_penalty", "early_stopping", "repetition_penalty", "max_new_tokens"}
        ids = torch.tensor([row.ids], device=self._model.device)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(row.seed or 0)
                found = self._model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=GenerationConfig(
                        **{name: getattr(decoding, name) for name in names | sampling},
                        eos_token_id=sorted(self._vocabulary.ends) or None,
                        pad_token_id=0,
                        stop_strings=list(decoding.stop) or None,
                        max_time=None if row.deadline == math.inf else row.deadline - time.monotonic(),
                    ),
                    tokenizer=self._vocabulary.tokenizer,
                )
        except RuntimeError:  # torch does not sample by probabilities that are not numbers
            return [(row.index, _unsound())]
        if time.monotonic() > row.deadline:
            return [(row.index, _late())]
        logits = self._forward(found, torch.ones_like(found), None, keep=0)[0]
        if not _sound(logits).all():
            return [(row.index, _unsound())]
        if decoding.decoder_input_details:
            row.read_prefill(logits[:start])
        outcomes: list[Outcome] = []
        new = found[0, start:].tolist()
        for position, token in enumerate(new, start=1):
            step = row.take(token, logits[start + position - 2].log_softmax(dim=-1), last=position == len(new))
            outcomes.append((row.index, step))
            if step.end:
                break
        return outcomes


class _Row:
    """One prompt on its way."""

    def __init__(self, index: int, prompt: Prompt, vocabulary: "_Vocabulary") -> None:
        self.index, self.ids, self.decoding = index, list(prompt.ids), prompt.decoding
        self.longest = len(self.ids) + self.decoding.max_new_tokens
        self.deadline = prompt.deadline
        self.seed = None
        if self.decoding.do_sample:
            self.seed = secrets.randbits(32) if self.decoding.seed is None else self.decoding.seed
        self.random = torch.Generator().manual_seed(self.seed or 0)
        self._vocabulary = vocabulary
        self._start = len(self.ids)
        self._text = _Text(vocabulary)
        self._said = ""
        self._tokens: list[Token] = []
        self._prefill: list[Token] = []

    def read_prefill(self, logits: torch.Tensor) -> None:
        """The details of the prompt, by the logits float32 [positions, vocabulary] of its positions."""
        found = logits[:-1].log_softmax(dim=-1).gather(1, torch.tensor(self.ids[1:])[:, None])[:, 0].tolist()
        text = _Text(self._vocabulary)
        self._prefill = [
            Token(id, text.push(id), logprob, id in self._vocabulary.special)
            for id, logprob in zip(self.ids, [None, *found], strict=True)
        ]

    def take(self, id: int, logprobs: torch.Tensor, *, last: bool = False) -> Step:
        """Adds a token that was chosen by log probabilities float32 [vocabulary]; `last`: there is no other."""
        self.ids.append(id)
        new, text = self.ids[self._start :], self._text.push(id)
        reason: FinishReason | None = None
        if id in self._vocabulary.ends:
            reason = "eos_token"
        elif (end := self._stop(text)) is not None:
            reason, text = "stop_sequence", text[: end - len(self._said)]
        elif last or len(new) == self.decoding.max_new_tokens:
            reason = "length"
        whole = self._said + text
        if reason in ("eos_token", "length"):
            whole = self._vocabulary.text(new)
            text = whole[len(self._said) :]  # with what was held back as the beginning of a character
        self._said = whole
        likeliest = logprobs.topk(self.decoding.top_n_tokens)
        others = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        token = Token(
            id,
            text,
            float(logprobs[id]),
            id in self._vocabulary.special,
            [self._vocabulary.token(*other) for other in others],
        )
        self._tokens.append(token)
        return Step(token, Generation(whole, reason, self._tokens, self._prefill, self.seed) if reason else None)

    def _stop(self, text: str) -> int | None:
        """Where the first stop sequence that `text` completes ends, in characters of the whole text."""
        whole = self._said + text
        ends = []
        for stop in self.decoding.stop:
            found = whole.find(stop, max(0, len(self._said) - len(stop) + 1))
            if found >= 0:
                ends.append(found + len(stop))
        return min(ends, default=None)


class _Vocabulary:
    """What the rows ask of the tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, config: GenerationConfig | None) -> None:
        ends = config.eos_token_id if config is not None else None
        self.ends = frozenset([ends] if isinstance(ends, int) else ends or [])
        self.tokenizer = tokenizer
        self.special = frozenset(id for id, token in tokenizer.added_tokens_decoder.items() if token.special)

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens, without the special ones."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def token(self, id: int, logprob: float | None) -> Token:
        """A token by itself."""
        return Token(id, self.text([id]), logprob, id in self.special)


class _Text:
    """The text of tokens as they come."""

    def __init__(self, vocabulary: "_Vocabulary") -> None:
        self._vocabulary = vocabulary
        self._before: list[int] = []
        self._new: list[int] = []

    def push(self, id: int) -> str:
        """The text that a token completes, "" if it ends within a character."""
        self._new.append(id)
        # Decoders treat the beginning of a text in their own way, so some tokens before the new ones come along.
        known, text = self._vocabulary.text(self._before), self._vocabulary.text([*self._before, *self._new])
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._before, self._new = self._new, []
        return text[len(known) :]


class _Layer(DynamicLayer):
    """The cache of one layer with room ahead: a new position is written, where the base class copies all of them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._room: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds states [rows, heads, new positions, size]; returns keys and values [rows, heads, positions, size]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        assert self.keys is not None
        assert self.values is not None
        start, more = self.keys.shape[-2], key_states.shape[-2]
        end = start + more
        if not self._room or self._room[0].shape[-2] < end:
            self._room = [pad(states, (0, 0, 0, more + _ROOM)) for states in (self.keys, self.values)]
        keys, values = self._room
        keys[..., start:end, :], values[..., start:end, :] = key_states, value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values

    def select(self, rows: Sequence[int], start: int) -> None:
        """Keeps these rows, and of them the positions from `start` on."""
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys[rows][..., start:, :], self.values[rows][..., start:, :]
        self._room = []


def _warp(scores: torch.Tensor, temperature: float, top_k: int, top_p: float, typical_p: float) -> torch.Tensor:
    """Scores [rows, vocabulary] narrowed before tokens are drawn, in the order of `generate`."""
    warpers: list[LogitsProcessor] = []
    if temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(float(top_p)))
    if typical_p < 1:
        warpers.append(TypicalLogitsWarper(float(typical_p)))
    for warper in warpers:
        scores = warper(cast(torch.LongTensor, None), scores)  # none of them looks at the tokens so far
    return scores


def _sound(logits: torch.Tensor) -> torch.Tensor:
    """Whether each row of logits has a softmax: no NaN, no +inf, not -inf alone."""
    return logits.logsumexp(dim=-1).isfinite()


def _late() -> Overloaded:
    return Overloaded("the answer takes too long; ask for fewer new tokens, for a stream, or again in a moment")


def _unsound() -> InternalError:
    return InternalError("the model gave a score that is not a number; its weights or precision are unsound")
