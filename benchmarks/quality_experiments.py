"""What benchmarks/quality trains: each model and data set, what is measured of it, and what it must reach."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality_data import SEED, Context, example, files, mnist, shakespeare, spoken_digits
from benchmarks.quality_figures import (
    always_neutral,
    constant,
    copied_source,
    digits_named_rightly,
    first_words,
    last_perplexity,
    majority,
    metric,
    random_span,
    without_neutral,
)
from benchmarks.quality_texts import messages, phrases

SEEDS = (42, 43, 44)


@dataclass(frozen=True)
class Figure:
    """What is measured of a model. measure: of its bundle. goal: what the mean over the seeds must reach, if set."""

    name: str
    measure: Callable[[Context, Path], float]
    goal: float | None = None
    lower_is_better: bool = False


@dataclass(frozen=True)
class Experiment:
    """One model on one data set.

    arguments: those of train.py besides --output-dir and --seed. baseline: what the first figure is compared with, and
    its value. against_trainer: whether the Trainer as it is learns the same, too. int8: whether an int8 archive is
    measured, too, of the first seed.
    """

    name: str
    data: str
    arguments: Callable[[Context], Sequence[str]]
    figures: Sequence[Figure]
    baseline: str
    baseline_value: Callable[[Context, Path], float]
    seeds: Sequence[int] = (SEED,)
    against_trainer: bool = False
    int8: bool = False

    def target(self, figure: Figure, baseline: float | None) -> float | None:
        """The figure's goal; else what is clearly better than the baseline: a quarter of the way to perfection."""
        if figure.goal is not None or baseline is None:
            return figure.goal
        return baseline * 0.75 if figure.lower_is_better else baseline + (1 - baseline) / 4


EXPERIMENTS = (
    Experiment(
        "reviews-to-sst2",
        "MiniLM trained on examples/reviews, asked about SST-2 dev",
        lambda _: ["--task", "text-classification", *example("reviews"), "--num-train-epochs", "4"],
        [Figure("accuracy, neutral left out", without_neutral, goal=0.8)],
        "majority class",
        constant(444 / 872),
        seeds=SEEDS,
    ),
    Experiment(
        "sst2",
        "MiniLM on SST-2",
        lambda c: files(c, "text-classification", "sst2", "train.csv", "dev.csv", "test.csv"),
        [
            Figure("accuracy", metric("accuracy"), goal=0.90),
            Figure("expected calibration error", metric("ece"), goal=0.03, lower_is_better=True),
        ],
        "majority class",
        majority,
        seeds=SEEDS,
        against_trainer=True,
        int8=True,
    ),
    Experiment(
        "banking77",
        "MiniLM on banking77",
        lambda c: files(c, "text-classification", "banking77", "train.csv", None, "test.csv"),
        [Figure("accuracy", metric("accuracy"), goal=0.93)],
        "majority class",
        majority,
        seeds=SEEDS,
        against_trainer=True,
        int8=True,
    ),
    Experiment(
        "goemotions",
        "MiniLM on GoEmotions (8,000 rows, several labels a text)",
        lambda c: files(c, "text-classification", "goemotions", "train.jsonl", "dev.jsonl", "test.jsonl"),
        [Figure("micro-F1", metric("micro_f1"), goal=0.54), Figure("macro-F1", metric("macro_f1"), goal=0.40)],
        "always the most frequent emotion",
        always_neutral,
        seeds=SEEDS,
        against_trainer=True,
        int8=True,
    ),
    Experiment(
        "wnut17",
        "MiniLM on WNUT 2017",
        lambda c: files(c, "token-classification", "wnut17", "train.jsonl", "dev.jsonl", "test.jsonl"),
        [Figure("entity F1", metric("f1"), goal=0.43)],
        "no entity anywhere",
        constant(0.0),
        seeds=SEEDS,
        against_trainer=True,
        int8=True,
    ),
    Experiment(
        "squad",
        "MiniLM on the SQuAD subset (3,000 questions)",
        lambda c: files(c, "question-answering", "squad", "train.jsonl", None, "dev.jsonl"),
        [Figure("F1", metric("f1"), goal=0.69)],
        "three words at random",
        random_span,
        seeds=SEEDS,
        against_trainer=True,
        int8=True,
    ),
    Experiment(
        "topics",
        "MiniLM trained on the pairs of examples/topics, asked zero-shot",
        lambda _: ["--task", "zero-shot-classification", *example("topics"), "--num-train-epochs", "6"],
        [Figure("accuracy of entailment", metric("accuracy"))],
        "majority class",
        majority,
    ),
    Experiment(
        "messages",
        "T5 from scratch on examples/messages",
        lambda c: [
            *("--task", "summarization", *messages(c), "--from-scratch", "t5 vocab_size=1000"),
            *("--num-train-epochs", "15"),
        ],
        [Figure("ROUGE-L", metric("rouge_l"))],
        "the first words, as many as score best",
        first_words,
    ),
    Experiment(
        "phrases",
        "T5 from scratch on examples/phrases, English to German",
        lambda c: [
            *("--task", "translation", *phrases(c), "--from-scratch", "t5 vocab_size=800 dropout_rate=0.2"),
            *("--num-train-epochs", "30", "--learning-rate", "1e-3"),
        ],
        [Figure("chrF", metric("chrf"))],
        "the English text as it is",
        copied_source,
    ),
    Experiment(
        "shakespeare-bert",
        "BERT from scratch on Shakespeare, masked",
        lambda c: ["--task", "fill-mask", *shakespeare(c), "--from-scratch", "bert", "--num-train-epochs", "6"],
        [Figure("perplexity of hidden tokens", last_perplexity, lower_is_better=True)],
        "all 4,096 tokens alike",
        constant(4096),
    ),
    Experiment(
        "shakespeare-phi",
        "Phi from scratch on Shakespeare",
        lambda c: [
            *("--task", "text-generation", *shakespeare(c), "--num-train-epochs", "8", "--learning-rate", "3e-3"),
            *("--per-device-train-batch-size", "8", "--weight-decay", "0.1", "--adam-beta2", "0.95"),
            "--from-scratch",
            "phi hidden_size=256 intermediate_size=1024 vocab_size=1024 resid_pdrop=0.2 embd_pdrop=0.2",
        ],
        [Figure("nats per character", metric("nats_per_character"), goal=1.48, lower_is_better=True)],
        "all 65 characters alike",
        constant(math.log(65)),
        seeds=SEEDS,
        against_trainer=True,
    ),
    Experiment(
        "mnist-vit",
        "ViT from scratch on MNIST (3,000 images)",
        lambda c: [
            *("--task", "image-classification", *mnist(c), "--augment", "true", "--num-train-epochs", "30"),
            *("--learning-rate", "1e-3", "--from-scratch", "vit"),
        ],
        [Figure("accuracy", metric("accuracy"))],
        "majority class",
        majority,
    ),
    Experiment(
        "mnist-resnet",
        "ResNet from scratch on MNIST (3,000 images)",
        lambda c: [
            *("--task", "image-classification", *mnist(c), "--augment", "true", "--num-train-epochs", "40"),
            *("--learning-rate", "2e-3", "--from-scratch", "resnet"),
        ],
        [Figure("accuracy", metric("accuracy"), goal=0.985)],
        "majority class",
        majority,
        seeds=SEEDS,
        against_trainer=True,
    ),
    Experiment(
        "fsdd-ast",
        "Audio Spectrogram Transformer from scratch on spoken digits (480 sounds)",
        lambda c: [
            *("--task", "audio-classification", *spoken_digits(c, "label"), "--augment", "true"),
            *("--num-train-epochs", "60", "--per-device-train-batch-size", "16", "--learning-rate", "5e-4"),
            *("--from-scratch", "audio-spectrogram-transformer max_length=128"),
        ],
        [Figure("accuracy", metric("accuracy"), goal=0.92)],
        "majority class",
        majority,
        seeds=SEEDS,
        against_trainer=True,
    ),
    Experiment(
        "fsdd-wav2vec2",
        "Wav2Vec2 from scratch on spoken digits, written down",
        lambda c: [
            *("--task", "automatic-speech-recognition", *spoken_digits(c, "text"), "--augment", "true"),
            *("--num-train-epochs", "120", "--learning-rate", "1e-3", "--from-scratch", "wav2vec2"),
        ],
        [Figure("word accuracy", metric("word_accuracy"))],
        "the same word always",
        constant(0.1),
    ),
    Experiment(
        "mnist-vae",
        "variational autoencoder on MNIST (3,000 images)",
        lambda c: [
            *("--task", "text-to-image", *mnist(c), "--from-scratch", "marble-vae latent_size=32"),
            *("--learning-rate", "2e-3", "--num-train-epochs", "60"),
        ],
        [Figure("digits that mnist-resnet names as asked for", digits_named_rightly, goal=0.8)],
        "any digit",
        constant(0.1),
    ),
    Experiment(
        "mnist-gan",
        "generative adversarial network on MNIST (3,000 images)",
        lambda c: [
            *("--task", "text-to-image", *mnist(c), "--from-scratch", "marble-gan latent_size=32"),
            *("--learning-rate", "1e-3", "--num-train-epochs", "60"),
        ],
        [Figure("digits that mnist-resnet names as asked for", digits_named_rightly, goal=0.8)],
        "any digit",
        constant(0.1),
    ),
)
