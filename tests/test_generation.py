"""The decode loop: equal to transformers' `generate`, each row by itself, text that is whole at every step."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    BartConfig,
    BartForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)

from handler.errors import InternalError, RequestError
from handler.generation import Decoding, Generation, Generator, Prompt, Step, Token

POSITIONS = 96
TEXTS = ["To be, or not to be", "漢字 and 🙂", "a", "The quality of mercy is not strained, it droppeth", "naïve", "O"]
EOS = "<|endoftext|>"
OTHER_END = 5  # a token that the texts do not have


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: most characters beyond ASCII are several tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=[EOS], show_progress=False)
    backend.train_from_iterator(TEXTS[:1] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, bos_token=EOS)


def gpt2(vocabulary: int) -> GPT2LMHeadModel:
    # Wide weights: what a model of small ones says is the same token over and over.
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=POSITIONS, n_embd=32, n_layer=2, n_head=2, initializer_range=0.4,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama(vocabulary: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary, max_position_embeddings=POSITIONS, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, initializer_range=0.4,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module", params=[gpt2, llama])
def model(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> Any:
    torch.manual_seed(3)
    return request.param(len(tokenizer)).eval()


@pytest.fixture
def generator(model: Any, tokenizer: PreTrainedTokenizerFast) -> Generator:
    return Generator(model, tokenizer, token_budget=32, positions=256)


def prompts(tokenizer: PreTrainedTokenizerFast, **decoding: Any) -> list[Prompt]:
    return [Prompt(tokenizer(text)["input_ids"], Decoding(**{"max_new_tokens": 24, **decoding})) for text in TEXTS]


def run(generator: Generator, asked: Sequence[Prompt]) -> list[Generation | RequestError]:
    """What becomes of each prompt; checks that the steps belong together."""
    found: dict[int, Generation | RequestError] = {}
    tokens: dict[int, list[Token]] = {index: [] for index in range(len(asked))}
    for outcomes in generator(asked):
        for index, outcome in outcomes:
            assert index not in found
            if isinstance(outcome, RequestError):
                found[index] = outcome
                continue
            tokens[index].append(outcome.token)
            if outcome.end:
                found[index] = outcome.end
                assert list(outcome.end.tokens) == tokens[index]
                assert "".join(token.text for token in tokens[index]) == outcome.end.text
    return [found[index] for index in range(len(asked))]


def finished(generator: Generator, asked: Sequence[Prompt]) -> list[Generation]:
    outcomes = run(generator, asked)
    assert all(isinstance(outcome, Generation) for outcome in outcomes)
    return outcomes  # type: ignore[return-value]


def ids(generation: Generation) -> list[int]:
    return [token.id for token in generation.tokens]


def by_transformers(model: Any, prompt: Prompt, **config: Any) -> list[int]:
    given = torch.tensor([prompt.ids])
    settings = {"eos_token_id": 0, "pad_token_id": 0, "max_new_tokens": prompt.decoding.max_new_tokens, **config}
    if prompt.decoding.seed is not None:
        torch.manual_seed(prompt.decoding.seed)
    found = model.generate(given, attention_mask=torch.ones_like(given), generation_config=GenerationConfig(**settings))
    new: list[int] = found[0, given.shape[1] :].tolist()
    return new


# --- the tokens


def test_greedy_rows_equal_generate(generator: Generator, model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    asked = prompts(tokenizer)
    found = finished(generator, asked)
    assert [ids(generation) for generation in found] == [by_transformers(model, prompt) for prompt in asked]
    assert len({generation.text for generation in found}) == len(TEXTS)
    assert all(generation.seed is None for generation in found)
    texts = [tokenizer.decode(ids(generation), skip_special_tokens=True) for generation in found]
    assert [generation.text for generation in found] == texts


def test_rows_of_a_model_without_position_ids_run_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(3)
    config = BartConfig(
        vocab_size=len(tokenizer), max_position_embeddings=POSITIONS, d_model=32, decoder_layers=2,
        decoder_attention_heads=2, decoder_ffn_dim=64, is_decoder=True, init_std=0.4, bos_token_id=0, eos_token_id=0,
        forced_eos_token_id=None,
    )  # fmt: skip
    model = BartForCausalLM(config).eval()
    asked = prompts(tokenizer, max_new_tokens=9)
    found = finished(Generator(model, tokenizer, 32, 256), asked)
    assert [ids(generation) for generation in found] == [by_transformers(model, prompt) for prompt in asked]


@pytest.mark.parametrize("rare", [{"no_repeat_ngram_size": 2}, {"suppress_tokens": list(range(90, 260))}])
def test_what_a_model_itself_wants_besides(tokenizer: PreTrainedTokenizerFast, rare: dict[str, Any]) -> None:
    torch.manual_seed(3)
    model = gpt2(len(tokenizer)).eval()
    asked = [*prompts(tokenizer), *prompts(tokenizer, do_sample=True, seed=3, temperature=1.3)]
    ways = [{}] * len(TEXTS) + [{"do_sample": True, "temperature": 1.3, "top_k": 0}] * len(TEXTS)
    before = [by_transformers(model, prompt, **way) for prompt, way in zip(asked, ways, strict=True)]
    model.generation_config.update(**rare)
    expected = [by_transformers(model, prompt, **way) for prompt, way in zip(asked, ways, strict=True)]
    assert expected != before
    found = finished(Generator(model, tokenizer, 64, 256), asked)
    assert [ids(generation) for generation in found] == expected


SAMPLING = [
    {"temperature": 0.7},
    {"temperature": 1.7, "top_k": 20},
    {"top_p": 0.8},
    {"temperature": 1.5, "top_k": 90, "top_p": 0.9, "repetition_penalty": 1.3},
    {"typical_p": 0.6},
    {},
]


def test_seeded_rows_equal_generate(generator: Generator, model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    ways = [{"do_sample": True, "seed": 40 + number, **way} for number, way in enumerate(SAMPLING)]
    asked = [
        replace(prompt, decoding=Decoding(max_new_tokens=24, **way))
        for prompt, way in zip(prompts(tokenizer), ways, strict=True)
    ]
    expected = [
        by_transformers(model, prompt, **{"top_k": 0, **{name: way[name] for name in way if name != "seed"}})
        for prompt, way in zip(asked, ways, strict=True)
    ]
    found = finished(generator, asked)
    assert [ids(generation) for generation in found] == expected
    assert [generation.seed for generation in found] == [way["seed"] for way in ways]


def test_repetition_penalty_of_a_greedy_row(
    generator: Generator, model: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    asked = prompts(tokenizer, repetition_penalty=1.5)
    expected = [by_transformers(model, prompt, repetition_penalty=1.5) for prompt in asked]
    assert [ids(generation) for generation in finished(generator, asked)] == expected
    assert expected != [by_transformers(model, prompt) for prompt in asked]


def test_a_row_is_the_same_alone_and_among_others(generator: Generator, tokenizer: PreTrainedTokenizerFast) -> None:
    choose = random.Random(0)
    asked = [
        replace(
            prompt,
            decoding=Decoding(
                max_new_tokens=choose.randrange(1, 30),
                do_sample=choose.random() < 0.7,
                seed=choose.randrange(2**40),
                temperature=choose.choice([0.5, 1.0, 2.0]),
                top_k=choose.choice([0, 5, 50]),
                top_p=choose.choice([0.5, 1.0]),
                repetition_penalty=choose.choice([1.0, 1.2]),
            ),
        )
        for prompt in prompts(tokenizer) * 3
    ]
    together = finished(generator, asked)
    alone = [finished(generator, [prompt])[0] for prompt in asked]
    assert [ids(generation) for generation in together] == [ids(generation) for generation in alone]
    for ours, theirs in zip(together, alone, strict=True):
        assert (ours.text, ours.finish_reason, ours.seed) == (theirs.text, theirs.finish_reason, theirs.seed)
        found = [token.logprob for token in ours.tokens]
        assert found == pytest.approx([token.logprob for token in theirs.tokens], abs=1e-4)


def test_a_drawn_seed_gives_the_same_again(generator: Generator, tokenizer: PreTrainedTokenizerFast) -> None:
    [prompt] = prompts(tokenizer, do_sample=True, temperature=2.0)[:1]
    first, second = finished(generator, [prompt, prompt])
    assert first.text != second.text
    assert first.seed != second.seed
    again = Prompt(prompt.ids, replace(prompt.decoding, seed=first.seed))
    assert finished(generator, [again])[0].text == first.text


def test_beams_equal_generate_beside_other_rows(
    generator: Generator, model: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    ways: list[dict[str, Any]] = [
        {"num_beams": 4},
        {},
        {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
        {"num_beams": 2, "do_sample": True, "seed": 9, "temperature": 1.3},
    ]
    asked = [
        replace(prompt, decoding=Decoding(max_new_tokens=16, **way))
        for prompt, way in zip(prompts(tokenizer)[: len(ways)], ways, strict=True)
    ]
    found = finished(generator, asked)
    for prompt, way, generation in zip(asked, ways, found, strict=True):
        config = {"top_k": 0, **{name: way[name] for name in way if name != "seed"}}
        assert ids(generation) == by_transformers(model, prompt, **config)
    assert [generation.seed for generation in found] == [None, None, None, 9]


def test_beam_search_leaves_the_random_numbers_of_others_alone(
    generator: Generator, tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3).tolist()
    torch.manual_seed(1)
    finished(generator, prompts(tokenizer, num_beams=2, do_sample=True, seed=5, max_new_tokens=3)[:1])
    assert torch.rand(3).tolist() == expected


# --- details


def test_logprobs_are_the_models_own(generator: Generator, model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    asked = prompts(tokenizer, decoder_input_details=True, top_n_tokens=3, temperature=3.0, do_sample=True, seed=1)
    asked += prompts(tokenizer, decoder_input_details=True, top_n_tokens=2, num_beams=2, max_new_tokens=5)[:1]
    for prompt, generation in zip(asked, finished(generator, asked), strict=True):
        whole = [*prompt.ids, *ids(generation)]
        with torch.inference_mode():
            expected = model(torch.tensor([whole])).logits[0].log_softmax(dim=-1)
        told = [*generation.prefill, *generation.tokens]
        assert [token.id for token in told] == whole
        assert told[0].logprob is None
        found = [token.logprob for token in told[1:]]
        assert found == pytest.approx([float(expected[at, id]) for at, id in enumerate(whole[1:])], abs=1e-4)
        for at, token in enumerate(generation.tokens, start=len(prompt.ids) - 1):
            best = expected[at].topk(prompt.decoding.top_n_tokens)
            assert [other.id for other in token.likeliest] == best.indices.tolist()
            assert [other.logprob for other in token.likeliest] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert "".join(token.text for token in finished(generator, asked[1:2])[0].prefill) == TEXTS[1]


def test_prefill_and_likeliest_tokens_are_told_only_when_asked_for(
    generator: Generator, tokenizer: PreTrainedTokenizerFast
) -> None:
    [found] = finished(generator, prompts(tokenizer)[:1])
    assert found.prefill == []
    assert all(not token.likeliest for token in found.tokens)


# --- what the model says is given: a model that recites a text from the position it is at


class Recital:
    """Says the tokens of `script` one after the other, wherever a prompt breaks off; NaN for a prompt with a NaN."""

    device = torch.device("cpu")

    def __init__(self, script: Sequence[int], vocabulary: int, broken: int | None = None) -> None:
        self.config = GPT2Config(vocab_size=vocabulary, n_layer=0)
        self.generation_config = GenerationConfig(eos_token_id=[0, OTHER_END])
        self.rows: list[int] = []
        self._script, self._broken = torch.tensor([*script, 0]), broken

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any) -> None:
        """Its signature is asked for `position_ids`."""

    def __call__(self, input_ids: Any, position_ids: Any, logits_to_keep: int, **_: Any) -> Any:
        self.rows.append(len(input_ids))
        following = self._script[(position_ids + 1).clamp(max=len(self._script) - 1)]
        logits = torch.nn.functional.one_hot(following, self.config.vocab_size).float() * 9
        if self._broken is not None:
            logits[(input_ids == self._broken).any(dim=1)] = math.nan
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


def recite(tokenizer: PreTrainedTokenizerFast, text: str, start: int = 1, **decoding: Any) -> list[Step]:
    """The steps of a model that recites `text` from its token `start` on."""
    script = tokenizer(text)["input_ids"]
    generator = Generator(Recital(script, len(tokenizer)), tokenizer, 64, 256)  # type: ignore[arg-type]
    steps = generator([Prompt(script[:start], Decoding(**{"max_new_tokens": 90, **decoding}))])
    return [step for [(_, step)] in steps if isinstance(step, Step)]


def test_text_comes_in_whole_characters(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "x naïve 漢字, 🙂🙂 and 🇪🇺!"
    steps = recite(tokenizer, text)
    pieces = [step.token.text for step in steps]
    assert "x" + "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert {"漢", "字", "🙂"} <= set(pieces)
    assert pieces.count("") > 10  # the first bytes of those characters
    assert steps[-1].end is not None
    assert steps[-1].end.finish_reason == "eos_token"
    assert (steps[-1].token.text, steps[-1].token.special) == ("", True)


def test_half_a_character_comes_with_the_last_token_if_at_all(tokenizer: PreTrainedTokenizerFast) -> None:
    script = tokenizer("x漢")["input_ids"]
    assert len(script) == 4
    steps = recite(tokenizer, "x漢", max_new_tokens=2)
    assert [step.token.text for step in steps] == ["", "\ufffd"]
    assert steps[-1].end is not None
    assert steps[-1].end.text == tokenizer.decode(script[1:3]) == "\ufffd"
    assert [step.token.text for step in recite(tokenizer, "x漢", max_new_tokens=3)] == ["", "", "漢"]


def test_broken_bytes_do_not_hold_the_text_up(tokenizer: PreTrainedTokenizerFast) -> None:
    script = tokenizer("x漢")["input_ids"]
    broken = [*script[:3], *tokenizer("yes")["input_ids"]]
    generator = Generator(Recital(broken, len(tokenizer)), tokenizer, 64, 256)  # type: ignore[arg-type]
    [generation] = finished(generator, [Prompt(broken[:1], Decoding(max_new_tokens=20))])
    assert generation.text == "\ufffdyes"
    assert [token.text for token in generation.tokens[:3]] == ["", "", "\ufffdy"]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["mercy"], " quality of mercy"),  # over several tokens
        (["qual"], " qual"),
        (["zebra", "is", "of m"], " quality of m"),  # whichever comes first
        (["t"], " qualit"),
        (["漢"], " quality of mercy 漢"),
    ],
)
def test_stop_sequences_end_the_text(tokenizer: PreTrainedTokenizerFast, stop: list[str], expected: str) -> None:
    steps = recite(tokenizer, "The quality of mercy 漢 is", start=len(tokenizer("The")["input_ids"]), stop=stop)
    end = steps[-1].end
    assert end is not None
    assert (end.text, end.finish_reason) == (expected, "stop_sequence")
    assert "".join(step.token.text for step in steps) == expected


def test_a_stop_sequence_within_a_token_cuts_its_text(tokenizer: PreTrainedTokenizerFast) -> None:
    [token] = tokenizer(" not")["input_ids"]
    steps = recite(tokenizer, "To be, or not to be", stop=["n"])
    assert (steps[-1].token.id, steps[-1].token.text) == (token, " n")


def test_a_stop_sequence_in_the_prompt_alone_does_not_count(tokenizer: PreTrainedTokenizerFast) -> None:
    start = len(tokenizer("The quality")["input_ids"])
    end = recite(tokenizer, "The quality of", start=start, stop=["quality", "y of"])[-1].end
    assert end is not None
    assert (end.text, end.finish_reason) == (" of", "eos_token")


def test_every_end_token_of_the_model_ends_a_row(tokenizer: PreTrainedTokenizerFast) -> None:

    script = [*tokenizer("ab")["input_ids"], OTHER_END, *tokenizer("cd")["input_ids"]]
    generator = Generator(Recital(script, len(tokenizer)), tokenizer, 64, 256)  # type: ignore[arg-type]
    [generation] = finished(generator, [Prompt(script[:1], Decoding(max_new_tokens=9))])
    assert (ids(generation), generation.finish_reason) == ([script[1], OTHER_END], "eos_token")


def test_rows_that_end_leave_the_batch(tokenizer: PreTrainedTokenizerFast) -> None:
    script = tokenizer("abcdefghij")["input_ids"]
    recital = Recital(script, len(tokenizer))
    generator = Generator(recital, tokenizer, 64, 256)  # type: ignore[arg-type]
    finished(generator, [Prompt(script[:1], Decoding(max_new_tokens=most)) for most in (1, 4, 2, 4)])
    assert recital.rows == [4, 3, 2, 2]


def test_prompts_run_in_batches_of_like_length(tokenizer: PreTrainedTokenizerFast) -> None:
    script = tokenizer("abcdefghijklmnopqrstuvwxyz" * 3)["input_ids"]
    recital = Recital(script, len(tokenizer))
    generator = Generator(recital, tokenizer, token_budget=80, positions=10_000)  # type: ignore[arg-type]
    lengths = (70, 1, 5, 3, 2)
    found = finished(generator, [Prompt(script[:length], Decoding(max_new_tokens=2)) for length in lengths])
    assert recital.rows == [1, 4, 5]
    assert [ids(generation) for generation in found] == [script[length : length + 2] for length in lengths]


def test_no_more_rows_decode_together_than_there_is_room_for(tokenizer: PreTrainedTokenizerFast) -> None:
    script = tokenizer("abcdefghij")["input_ids"]
    recital = Recital(script, len(tokenizer))
    generator = Generator(recital, tokenizer, token_budget=64, positions=16)  # type: ignore[arg-type]
    found = finished(generator, [Prompt(script[:1], Decoding(max_new_tokens=5))] * 5)
    assert recital.rows == [2] * 5 + [2] * 5 + [1] * 5
    assert [ids(generation) for generation in found] == [script[1:6]] * 5


@pytest.mark.parametrize("decoding", [{}, {"do_sample": True, "seed": 0}])
def test_scores_that_are_no_numbers_fail_that_row_alone(
    tokenizer: PreTrainedTokenizerFast, decoding: dict[str, Any]
) -> None:
    script = tokenizer("abcdefghij")["input_ids"]
    recital = Recital(script, len(tokenizer), broken=script[3])
    generator = Generator(recital, tokenizer, 64, 256)  # type: ignore[arg-type]
    decodings = [Decoding(max_new_tokens=most, **decoding) for most in (2, 5)]
    good, bad = run(generator, [Prompt(script[:1], entry) for entry in decodings])
    assert isinstance(good, Generation)
    assert isinstance(bad, InternalError)
    assert "not a number" in str(bad)


def test_beams_of_a_model_without_numbers_fail_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    broken = gpt2(len(tokenizer)).eval()
    torch.nn.init.constant_(broken.transformer.ln_f.weight, math.nan)
    generator = Generator(broken, tokenizer, 64, 256)
    for sampling in (False, True):
        asked = [Prompt([5], Decoding(max_new_tokens=4, num_beams=3, do_sample=sampling))]
        [error] = run(generator, asked)
        assert isinstance(error, InternalError)


def test_a_row_ends_at_its_deadline(tokenizer: PreTrainedTokenizerFast) -> None:
    script = tokenizer("abcdefghij")["input_ids"]
    generator = Generator(Recital(script, len(tokenizer)), tokenizer, 64, 256)  # type: ignore[arg-type]
    late, early = run(
        generator, [Prompt(script[:1], Decoding(max_new_tokens=4), deadline) for deadline in (math.inf, 0.0)]
    )
    assert isinstance(late, Generation)
    assert isinstance(early, RequestError)
    assert early.code == 503


def test_beam_search_ends_at_its_deadline(tokenizer: PreTrainedTokenizerFast) -> None:
    generator = Generator(gpt2(len(tokenizer)).eval(), tokenizer, 64, 256)
    [error] = run(generator, [Prompt([5], Decoding(max_new_tokens=60, num_beams=2), 0.0)])
    assert isinstance(error, RequestError)
    assert error.code == 503


def test_text_of_a_byte_fallback_tokenizer() -> None:
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    for word in ("▁", "a", "b", "▁the"):
        vocabulary[word] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<unk>")

    def pieces(script: list[int]) -> Iterator[str]:
        recital = Recital([1, *script], len(vocabulary))
        generator = Generator(recital, tokenizer, 64, 256)  # type: ignore[arg-type]
        for [(_, step)] in generator([Prompt([1], Decoding(max_new_tokens=len(script)))]):
            assert isinstance(step, Step)
            yield step.token.text

    assert list(pieces(tokenizer("a 漢 b")["input_ids"])) == ["a", " ", "", "", "漢", " ", "b"]
    choose = random.Random(0)
    for _ in range(50):  # bytes that make no characters: whatever comes, it comes without an exception
        list(pieces([choose.randrange(1, len(vocabulary)) for _ in range(12)]))


def test_models_with_another_state_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match="mamba"):
        Generator(MambaForCausalLM(config), tokenizer, 64, 256)
