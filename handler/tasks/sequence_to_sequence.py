"""Text to text with an encoder-decoder model: what summarization and translation share."""

import math
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast

from handler import backends
from handler.batching import fewest_batches
from handler.errors import InternalError, InvalidInput, InvalidParameter, Overloaded, RequestError, TooLarge
from handler.inputs.text import read_text
from handler.parameters import CommonParameters, at_least, between, parse
from handler.settings import Settings
from handler.tasks import Answer, GenerativeTask

_USUAL_NEW_TOKENS = 64
# Each step of decoding reads all weights: rows that decode together may have more tokens than a pass of an encoder.
_BUDGETS = 8
_SAMPLING = ("temperature", "top_k", "top_p", "typical_p")
_FLOATS = ("temperature", "top_p", "typical_p", "repetition_penalty", "length_penalty")


@dataclass(frozen=True, kw_only=True)
class GenerateParameters:
    """What transformers' `generate` takes; None is the model's own default (its generation_config.json).

    max_length and min_length count the token that the answer begins with, max_new_tokens and min_new_tokens do not.
    do_sample: if None, tokens are drawn where a request names temperature, top_k, top_p or typical_p, else the
    likeliest is taken. seed: of drawn tokens; None draws one.
    """

    max_new_tokens: int | None = at_least(1)
    max_length: int | None = at_least(2)
    min_new_tokens: int | None = at_least(0)
    min_length: int | None = at_least(0)
    do_sample: bool | None = None
    temperature: float | None = between(0.01, 100)
    top_k: int | None = at_least(0)
    top_p: float | None = between(1e-6, 1)
    typical_p: float | None = between(1e-6, 1)
    repetition_penalty: float | None = between(0.01, 100)
    no_repeat_ngram_size: int | None = at_least(0)
    num_beams: int | None = between(1, 8)
    length_penalty: float | None = between(-100, 100)
    early_stopping: bool | None = None
    seed: int | None = between(0, 2**64 - 1)


@dataclass(frozen=True, kw_only=True)
class SequenceToSequenceParameters(CommonParameters, GenerateParameters):
    """Those of the Inference API. generate_parameters: any of GenerateParameters, which may stand beside it, too.

    truncation: as the overflow policy, by the names of tokenizers; "do_not_truncate" is "error".
    clean_up_tokenization_spaces: take out blanks before punctuation; None is the tokenizer's own default.
    """

    overflow: Literal["error", "truncate"] | None = None
    truncation: Literal["do_not_truncate", "longest_first", "only_first", "only_second"] | None = None
    clean_up_tokenization_spaces: bool | None = None
    generate_parameters: dict | None = None  # type: ignore[type-arg]


@dataclass(frozen=True, slots=True)
class Source:
    """A text to answer. decoding: how, without what counts the first token; languages: of text and answer."""

    text: str
    decoding: GenerateParameters
    languages: tuple[str, str] | None = None


class SequenceToSequence(GenerativeTask):
    """Each answer is the one that `generate` gives to the text alone; equal requests run together.

    answer: the name of the answer's field. `Settings.options["prefix"]` is put before each text.
    """

    answer: ClassVar[str]
    Parameters: ClassVar[type[CommonParameters]] = SequenceToSequenceParameters
    nests_single: ClassVar[bool] = True

    def __init__(self, model_dir: Path, settings: Settings, config: Mapping[str, Any]) -> None:
        if not config.get("is_encoder_decoder"):
            raise ValueError(f"{model_dir}: {config.get('model_type')} is no encoder-decoder model, such as T5 or BART")
        self._model = backends.load_model(model_dir, settings, "AutoModelForSeq2SeqLM")
        tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
        self.tokenizer = cast(PreTrainedTokenizerFast, tokenizer)
        self._settings = settings
        self._prefix = str(settings.options.get("prefix", ""))
        positions = getattr(self._model.config, "max_position_embeddings", None) or math.inf
        self._longest = int(min(settings.max_length, positions))
        self._most = int(min(settings.max_new_tokens, positions - 1))
        own = self._model.generation_config
        usual = own.max_new_tokens or (own.max_length - 1 if own.max_length else _USUAL_NEW_TOKENS)
        self._usual = max(1, min(usual, self._most))
        self._least = own.min_new_tokens or max(0, (own.min_length or 0) - 1)

    def read(self, value: Any, parameters: Any) -> Sequence[Source]:
        """A string."""
        if parameters.truncation == "only_second":
            raise InvalidParameter("parameter 'truncation' cannot be \"only_second\": there is only one text")
        if parameters.truncation and parameters.overflow:
            raise InvalidParameter("'truncation' and 'overflow' are two names for one thing; send one of them")
        return [Source(read_text(value), self._decoding(parameters))]

    def size(self, sample: Source) -> int:
        """Characters of the text."""
        return len(sample.text)

    def generate(self, requests: Sequence[tuple[Sequence[Any], Any]]) -> list[Any]:
        """See GenerativeTask. Requests with the same parameters run together; those that sample run alone."""
        deadline = time.monotonic() + self._settings.max_generation_seconds
        sources: list[Source] = [source for [source], _ in requests]
        answers: list[Any] = [None] * len(requests)
        ids: dict[int, list[int]] = {}
        encoded = self._encode(sources)
        for index, (whole, (_, parameters)) in enumerate(zip(encoded, requests, strict=True)):
            try:
                ids[index] = self._cut(whole, sources[index], parameters)
            except RequestError as error:
                answers[index] = error
        for group in self._groups(sources, ids):
            outputs = self._run([ids[index] for index in group], sources[group[0]], deadline)
            for index, output in zip(group, outputs, strict=True):
                if isinstance(output, RequestError):
                    answers[index] = output
                    continue
                clean = requests[index][1].clean_up_tokenization_spaces
                text = self.tokenizer.decode(output, skip_special_tokens=True, clean_up_tokenization_spaces=clean)
                tokens = len(encoded[index])
                answers[index] = Answer({self.answer: text}, tokens, truncated=tokens > len(ids[index]))
        return answers

    @staticmethod
    def drift(expected: Any, found: Any) -> float:
        """0 if the texts are equal, else inf: there are no scores."""
        return 0.0 if expected == found else math.inf

    def language(self, source: Source) -> dict[str, int]:
        """What `generate` has to know of the language of the answer."""
        return {}

    def tokenize(self, texts: Sequence[str], languages: tuple[str, str] | None) -> list[list[int]]:
        """Token ids of whole texts, special tokens included. Long ones are cut by `_cut`."""
        ids: list[list[int]] = self.tokenizer(list(texts), return_attention_mask=False, verbose=False)["input_ids"]
        return ids

    def _decoding(self, parameters: SequenceToSequenceParameters) -> GenerateParameters:
        """What a request says of decoding, lengths in new tokens. Raises InvalidParameter where that is impossible."""
        names = [field.name for field in fields(GenerateParameters)]
        beside = {name: getattr(parameters, name) for name in names if getattr(parameters, name) is not None}
        within = parameters.generate_parameters or {}
        if twice := beside.keys() & within.keys():
            raise InvalidParameter(f"parameter {min(twice)!r} is given twice, in 'generate_parameters' and beside it")
        given = replace(parse(GenerateParameters, within), **beside)
        if given.max_new_tokens is not None and given.max_length is not None:
            raise InvalidParameter("send 'max_new_tokens' or 'max_length', not both")
        if given.min_new_tokens is not None and given.min_length is not None:
            raise InvalidParameter("send 'min_new_tokens' or 'min_length', not both")
        most, least = given.max_new_tokens, given.min_new_tokens
        if given.max_length is not None:
            most = given.max_length - 1
        if given.min_length is not None:
            least = max(0, given.min_length - 1)
        if max(most or 0, least or 0) > self._most:
            raise InvalidParameter(f"this model answers with at most {self._most} new tokens; ask for fewer")
        if most is None:
            most = max(self._usual, least or 0)
        if least is None:
            least = min(self._least, most)
        if least > most:
            raise InvalidParameter(f"an answer cannot have at least {least} and at most {most} new tokens")
        # JSON's 1 may be meant for 1.0, and `generate` insists.
        numbers = {name: getattr(given, name) for name in _FLOATS}
        floats: dict[str, Any] = {name: float(number) for name, number in numbers.items() if number is not None}
        given = replace(given, **floats)
        sampling = any(getattr(given, name) is not None for name in _SAMPLING)
        sample = sampling if given.do_sample is None and sampling else given.do_sample
        if sample is False:
            given = replace(given, **dict.fromkeys(_SAMPLING))
        return replace(
            given, max_new_tokens=most, min_new_tokens=least, max_length=None, min_length=None, do_sample=sample
        )

    def _encode(self, sources: Sequence[Source]) -> list[list[int]]:
        """Token ids of the whole texts, in one tokenizer call for each pair of languages."""
        encoded: list[list[int]] = [[]] * len(sources)
        for indices in _by_key([source.languages for source in sources]):
            texts = [self._prefix + sources[index].text for index in indices]
            for index, ids in zip(indices, self.tokenize(texts, sources[indices[0]].languages), strict=True):
                encoded[index] = ids
        return encoded

    def _cut(self, ids: list[int], source: Source, parameters: SequenceToSequenceParameters) -> list[int]:
        """The ids that the model takes. Raises RequestError for a text that must not be cut, or is empty."""
        if not ids:
            raise InvalidInput("the text is empty; this model needs at least one character")
        if len(ids) <= self._longest:
            return ids
        policy = parameters.overflow or self._settings.overflow
        if parameters.truncation is not None:
            policy = "error" if parameters.truncation == "do_not_truncate" else "truncate"
        if policy != "truncate":
            raise TooLarge(
                f"the text has {len(ids)} tokens and the model takes {self._longest}; shorten it, or send the "
                'parameter "overflow": "truncate"'
            )
        # The special tokens at the end stay.
        special = self.tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
        tail = special[::-1].index(0) if 0 in special else 0
        return [*ids[: self._longest - tail], *ids[len(ids) - tail :]]

    def _groups(self, sources: Sequence[Source], ids: Mapping[int, Sequence[int]]) -> Iterable[list[int]]:
        """Indices of texts that run together: same parameters, like lengths, as many as the token budget allows."""
        indices = sorted(ids)
        # Random numbers are drawn for the rows of a batch together, so a text whose tokens are drawn is alone.
        keys = [
            (source.decoding, source.languages, index if source.decoding.do_sample else None)
            for index, source in ((index, sources[index]) for index in indices)
        ]
        for places in _by_key(keys):
            decoding = sources[indices[places[0]]].decoding
            beams = decoding.num_beams or self._model.generation_config.num_beams or 1
            cost = [max(len(ids[indices[place]]), decoding.max_new_tokens or 0) * beams for place in places]
            for group in fewest_batches(cost, _BUDGETS * self._settings.token_budget):
                yield [indices[places[number]] for number in group]

    @torch.inference_mode()
    def _run(self, rows: Sequence[Sequence[int]], source: Source, deadline: float) -> list[Any]:
        """Token ids of each row's answer, or its error. source: any of the texts, which have equal parameters."""
        late = Overloaded("the answer takes too long; ask for fewer new tokens, for fewer beams, or again in a moment")
        if time.monotonic() > deadline:
            return [late] * len(rows)
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        given = {name: value for name, value in asdict(source.decoding).items() if value is not None}
        seed = given.pop("seed", None)
        device, checking = self._model.device, _Soundness(len(rows))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(secrets.randbits(32) if seed is None else seed)
            try:
                found = self._model.generate(
                    input_ids=torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device),
                    attention_mask=torch.tensor(
                        [[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device
                    ),
                    logits_processor=LogitsProcessorList([checking]),
                    max_time=deadline - time.monotonic(),
                    max_length=None,
                    min_length=None,
                    **given,
                    **self.language(source),
                )
            except RuntimeError:  # torch does not draw by probabilities that are not numbers
                if checking.sound.all():
                    raise
                found = torch.zeros(len(rows), 0)
        if time.monotonic() > deadline:
            return [late] * len(rows)
        unsound = InternalError("the model gave a score that is not a number; its weights or precision are unsound")
        return [row if sound else unsound for row, sound in zip(found.tolist(), checking.sound.tolist(), strict=True)]


class _Soundness(LogitsProcessor):
    """Watches for rows whose scores are not numbers. sound: bool [rows]."""

    def __init__(self, rows: int) -> None:
        self.sound = torch.ones(rows, dtype=torch.bool)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """scores: float32 [rows × beams, vocabulary]."""
        # Not of the sum of them all: scores of -inf are tokens that are ruled out.
        self.sound &= scores.logsumexp(dim=-1).isfinite().view(len(self.sound), -1).all(dim=-1).cpu()
        return scores


def _by_key(keys: Sequence[Any]) -> list[list[int]]:
    """Places of equal keys."""
    places: dict[Any, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return list(places.values())
