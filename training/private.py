"""--private-epsilon: training whose outcome tells little about any one row, with the noise and the figures of Opacus.

Abadi et al., "Deep Learning with Differential Privacy", 2016. Each row enters each batch by a chance of its own, its
gradient is clipped, and Gaussian noise is added to the sum; the rest is the Trainer's, as ever. docs/training.md says
what that guarantees and what it does not.
"""

import json
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers.training_args import OptimizerNames

from training.batches import Row, parts
from training.errors import UserError
from training.options import Options, TrainerOptions
from training.trainer import TokenTrainer

TASKS = ("text-classification", "zero-shot-classification")
# They learn from the gradients that the Trainer gives them; others step while these are computed, before the noise.
_OPTIMISERS = ("adamw_torch_fused", "adamw_torch", "sgd")
# Rows go through the model in parts of so few that their gradients together have no more numbers: half a gigabyte.
_MOST_NUMBERS = 2**27
# Of a row's gradient as Opacus has it, against the one that the row has alone: share of its largest number.
_TOLERANCE = 1e-3
# In each checkpoint. It holds the secret from which batches and noise follow.
_FILE = "private.json"
_BATCHES, _NOISE = range(2)  # what is drawn from the secret


def check(options: Options, arguments: TrainerOptions) -> None:
    """Raises UserError for a --private-epsilon that cannot be, or not with what else is asked for."""
    epsilon = options.private_epsilon
    if epsilon is None:
        return
    if not epsilon > 0:
        raise UserError(f"--private-epsilon {epsilon:g}: give a number above 0, e.g. 8; the lower, the more private")
    if options.task not in TASKS:
        raise UserError(f"--private-epsilon: only {' and '.join(TASKS)} can be trained so; leave it out")
    if options.train_file is None:
        raise UserError("--private-epsilon needs a --train-file: without one nothing is learnt")
    if options.validation_file is None:
        raise UserError(
            "--private-epsilon needs a --validation-file of rows that are no secret: the bundle holds rows of "
            "validation as they are"
        )
    against = {
        "--folds": (options.folds, "other models learn from the same rows, without noise"),
        "--search": (options.search, "its trials learn from the same rows, and their outcome is used"),
        "--teacher": (options.teacher, "a teacher may have learnt from the same rows, and passes on what it knows"),
        "--class-weights": (options.class_weights, "the weights are those of the rows, without noise"),
        "--from-scratch": (options.from_scratch, "the tokenizer would be made of the words of the rows"),
        "--quantization-aware": (options.quantization_aware, "its ranges are those of the rows, without noise"),
        "torchrun": (arguments.world_size > 1, "it runs in one process"),
        "--gradient-accumulation-steps": (
            arguments.gradient_accumulation_steps > 1,
            "give --per-device-train-batch-size, which --most-tokens takes in parts",
        ),
        "--activation-checkpointing": (
            arguments.activation_checkpointing or arguments.gradient_checkpointing,
            "gradients of single rows need what it throws away",
        ),
        "--torch-compile": (arguments.torch_compile, "a compiled model has no gradients of single rows"),
        "--fp16": (arguments.fp16, "it scales the loss, and with it what is clipped; give --bf16 true"),
        "--ignore-data-skip": (arguments.ignore_data_skip, "a resumed run would see the same batches again"),
    }
    for name, (given, why) in against.items():
        if given:
            raise UserError(f"--private-epsilon and {name} do not go together: {why}")
    if arguments.optim not in _OPTIMISERS:
        asked = OptimizerNames(arguments.optim).value
        raise UserError(f"--private-epsilon takes --optim {', '.join(_OPTIMISERS)}, not {asked}")
    if not 0 < arguments.max_grad_norm < 1e9:
        raise UserError("--private-epsilon needs a --max-grad-norm, e.g. 1: the norm that each row's gradient may have")


@dataclass(frozen=True, slots=True)
class Guarantee:
    """What a training is worth, by the moments (Rényi) accountant.

    epsilon, delta: as in the definition, of training files that differ by one row. noise: standard deviation of what is
    added to the sum of the rows' gradients, in units of `clipping`, the norm of each of them. rate: the probability of
    a row to be in a batch. steps: of the whole training.
    """

    epsilon: float
    delta: float
    noise: float
    clipping: float
    rate: float
    steps: int

    def spent(self, steps: int) -> float:
        """The epsilon after so many steps."""
        from opacus.accountants import RDPAccountant

        accountant = RDPAccountant()
        accountant.history = [(self.noise, self.rate, steps)]
        with warnings.catch_warnings():  # that a bound may be loose
            warnings.simplefilter("ignore")
            return float(accountant.get_epsilon(self.delta)) if steps else 0.0


def guarantee(epsilon: float, rows: int, batch: int, steps: int, clipping: float) -> Guarantee:
    """The least noise for this epsilon; delta is 1 / rows^1.1. batch: rows that one has on average.

    Raises UserError if no noise is enough.
    """
    from opacus.accountants.utils import get_noise_multiplier

    delta, rate = rows**-1.1, min(1.0, batch / rows)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            noise = get_noise_multiplier(
                target_epsilon=epsilon,
                target_delta=delta,
                sample_rate=rate,
                steps=steps,
                epsilon_tolerance=min(0.01, epsilon / 100),
            )
    except ValueError as error:
        raise UserError(
            f"--private-epsilon {epsilon:g}: no noise is enough for {steps} steps over {rows} rows; give a higher one"
        ) from error
    return Guarantee(epsilon, delta, noise, clipping, rate, steps)


def sentence(record: Mapping[str, Any]) -> str:
    """What a training was worth, for people. record: as metrics.json has it."""
    return (
        f"private: epsilon {record['spent']:.2f} at delta {record['delta']:.1g} was spent in {record['steps_done']:,} "
        f"of {record['steps']:,} steps"
    )


class PrivateTrainer(TokenTrainer):
    """A TokenTrainer whose gradients are those of single rows, clipped and with noise.

    Batches and noise follow from a secret, from epoch and step: a run that is resumed repeats what it did. The secret
    is drawn anew for each training, unless --data-seed gives one.

    epsilon: that is asked for.
    """

    def __init__(self, *arguments: Any, epsilon: float, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._epsilon = epsilon
        self._secret = secrets.randbits(128) if self.args.data_seed is None else self.args.data_seed
        self._resumed: dict[str, Any] | None = None
        self._guarantee: Guarantee | None = None
        self._noisy: Any = None

    def record(self) -> dict[str, Any]:
        """What metrics.json holds. seeded: whether whoever knows the command can take the noise away."""
        assert self._guarantee is not None
        done = self.state.global_step
        seeded = self.args.data_seed is not None
        return {**asdict(self._guarantee), "spent": self._guarantee.spent(done), "steps_done": done, "seeded": seeded}

    def train(self, *arguments: Any, **more: Any) -> Any:
        """As Trainer's. Raises UserError for a model that mixes rows, and for an epsilon that cannot be reached."""
        from opacus.grad_sample import GradSampleHooks

        try:
            hooks = GradSampleHooks(self.model)
        except NotImplementedError as error:
            raise UserError(_unfit(self.model)) from error
        try:
            _check_rows(self.model, hooks)
            with _quiet():
                return super().train(*arguments, **more)
        finally:
            hooks.cleanup()

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches by Poisson sampling, as many as are expected to make up the rows; some may be empty."""
        rows: Any = self.train_dataset
        collate = _OrEmpty(self._get_collator_with_removed_columns(self.data_collator), rows[0])
        loader = DataLoader(
            rows,
            batch_sampler=_Poisson(
                len(rows), self.args.train_batch_size, lambda: self._chance(_BATCHES, int(self.state.epoch or 0))
            ),
            collate_fn=collate,
            num_workers=self.args.dataloader_num_workers,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """As Trainer's; the gradient is that of the guarantee."""
        assert self._guarantee is not None
        if not model.training:
            model.train()
        batch = self._hidden(self._prepare_inputs(inputs))
        # Opacus keeps what is a row's, and their sum, beside the gradients.
        learning: list[Any] = [weight for weight in model.parameters() if weight.requires_grad]
        rows, width = batch["input_ids"].shape
        most_rows = max(1, _MOST_NUMBERS // sum(weight.numel() for weight in learning))
        for weight in learning:
            weight.summed_grad = torch.zeros_like(weight)
        total = torch.zeros((), device=self.args.device)
        for piece in parts(batch, min(self._most_tokens, most_rows * width)) if rows else []:
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, piece)
            self.accelerator.backward(loss)
            for weight in learning:
                weight.grad_sample = weight.grad_sample.float()  # a norm in bf16 is off by some thousandths
            self._noisy.clip_and_accumulate()
            for weight in learning:
                weight.grad = weight.grad_sample = None
            total += loss.detach() * len(piece["input_ids"])
        self._noisy.generator = self._chance(_NOISE, self.state.global_step, self.args.device)
        self._noisy.add_noise()
        for weight in learning:
            weight.grad /= self.args.train_batch_size
            weight.summed_grad = None
        return total / self.args.train_batch_size

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Checks as SafeTrainer does, and clips nothing: the rows were clipped."""
        clipping, self.args.max_grad_norm = self.args.max_grad_norm, float("inf")
        try:
            return super()._clip_grad_norm(model)
        finally:
            self.args.max_grad_norm = clipping

    def _prepare_for_training(self, max_steps: int, *more: Any) -> Any:
        """As Trainer's; settles and says the guarantee, because now the number of steps is known."""
        from opacus.optimizers import DPOptimizer

        prepared = super()._prepare_for_training(max_steps, *more)  # type: ignore[no-untyped-call]
        rows: Any = self.train_dataset
        found = guarantee(self._epsilon, len(rows), self.args.train_batch_size, max_steps, self.args.max_grad_norm)
        if self._resumed is not None and self._resumed != asdict(found):
            raise UserError(
                "--resume-from-checkpoint: the checkpoint is of other rows or settings, for which there is no "
                "guarantee; give the command as it was, or start anew without it"
            )
        # Only what it does before a step is used: the step is the Trainer's.
        self._noisy = DPOptimizer(
            self.optimizer,
            noise_multiplier=found.noise,
            max_grad_norm=found.clipping,
            expected_batch_size=None,
            loss_reduction="sum",
        )
        self._guarantee = found
        print(
            f"private: epsilon {found.epsilon:g} at delta {found.delta:.1g}: noise {found.noise:.3g}, rows clipped to "
            f"{found.clipping:g}, {found.steps:,} steps; the embeddings stay as they are",
            flush=True,
        )
        if self.args.data_seed is not None:
            print("  whoever knows --data-seed can take the noise away: it is for trials, not for what is given away")
        return prepared

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As Trainer's, with what a resumed run needs to go on with the same noise."""
        super()._save(output_dir, state_dict)
        assert self._guarantee is not None
        path = Path(output_dir or str(self.args.output_dir)) / _FILE
        path.touch(mode=0o600)
        path.write_text(json.dumps({"secret": self._secret, "guarantee": asdict(self._guarantee)}), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *more: Any) -> None:
        """As Trainer's. Raises UserError for a checkpoint of a training that was not private."""
        try:
            found = json.loads((Path(resume_from_checkpoint) / _FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"--resume-from-checkpoint: {resume_from_checkpoint} is not of a private training; start without it"
            ) from None
        self._secret, self._resumed = found["secret"], found["guarantee"]
        super()._load_from_checkpoint(resume_from_checkpoint, *more)

    def _chance(self, what: int, number: int, device: torch.device | str = "cpu") -> torch.Generator:
        """The random numbers of one epoch's batches, or of one step's noise."""
        [seed] = np.random.SeedSequence((self._secret, what, number)).generate_state(1, np.uint64)
        return torch.Generator(device).manual_seed(int(seed) >> 1)  # a seed is a signed number


class _Poisson(Sampler[list[int]]):
    """The batches of an epoch, in each of which every row is with the same probability, whatever the others are.

    batch: rows that one has on average. chance: gives the random numbers of the epoch that begins.
    """

    def __init__(self, rows: int, batch: int, chance: Callable[[], torch.Generator]) -> None:
        self._rows, self._rate, self._chance = rows, min(1.0, batch / rows), chance
        self._steps = -(-rows // batch)

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        from opacus.utils.uniform_sampler import UniformWithReplacementSampler

        yield from UniformWithReplacementSampler(
            num_samples=self._rows, sample_rate=self._rate, steps=self._steps, generator=self._chance()
        )


class _OrEmpty:
    """A collator that makes a batch of no rows, too. row: any, for the names and types."""

    def __init__(self, collate: Callable[[Sequence[Row]], dict[str, torch.Tensor]], row: Row) -> None:
        self._collate, self._row = collate, row

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        if rows:
            return self._collate(rows)
        return {name: tensor[:0] for name, tensor in self._collate([self._row]).items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that a layer's inputs have no gradients: those of the first one above the embeddings."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        yield


def freeze_embeddings(model: nn.Module) -> None:
    """Leaves them as they are: the gradient of one row is as large as the vocabulary, and the noise is on all of it."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.requires_grad_(False)


def _check_rows(model: Any, hooks: Any) -> None:
    """Raises UserError unless Opacus gives for each of two rows the gradient that the row has alone.

    Where a layer sees all rows at once it does not, and then nothing bounds what one row does. The rows are random.

    hooks: those of Opacus.
    """
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (2, 8), generator=chance).to(learning[0].device)
    was_training = model.training
    model.eval()

    def backward(rows: torch.Tensor) -> None:
        with _quiet():
            model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits.square().sum(dim=1).mean().backward()

    alone = []
    hooks.disable_hooks()
    for row in ids:
        backward(row[None])
        alone.append([weight.grad for weight in learning])
        for weight in learning:
            weight.grad = None
    hooks.enable_hooks()
    for module in model.modules():
        # Opacus looks at layers in training only; without their dropout, which both rows would have otherwise.
        module.training = any(True for _ in module.parameters(recurse=False))
    try:
        backward(ids)
        same = True
        for place, row in enumerate(alone):
            most = max(float(gradient.abs().max()) for gradient in row)
            for weight, gradient in zip(learning, row, strict=True):
                same &= float((weight.grad_sample[place] - gradient).abs().max()) <= _TOLERANCE * most
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
        same = False
    model.train(was_training)
    for weight in learning:
        weight.grad = weight.grad_sample = None
    if not same:
        raise UserError(_unfit(model))


def _unfit(model: Any) -> str:
    return (
        f"--private-epsilon: of this model ({model.config.model_type}) the gradients of single rows cannot be told; "
        "choose another --base-model, e.g. a BERT, or leave it out"
    )
