"""The Hugging Face Trainer as every task uses it."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, EvalPrediction, PrinterCallback, ProgressCallback, Trainer
from transformers.trainer_pt_utils import nested_concat
from transformers.utils import SAFE_WEIGHTS_NAME

from training import adapters, distillation, dropout, quantization
from training.averaging import WeightAverage
from training.batches import IGNORED, TAUGHT, LengthBuckets, LongestFirst, TokenRows, parts
from training.errors import UserError
from training.options import Options, TrainerOptions
from training.progress import Progress


class SafeTrainer(Trainer):
    """Stops before gradients that are no numbers get into the weights; those of a loss that is none are none.

    A model with adapters (LoRA), or one that computes as in int8, is an ordinary one when the training is done.
    """

    def train(self, *arguments: Any, **more: Any) -> Any:
        """As Trainer's; adapters are added to the weights then, and computing as in int8 ends."""
        done = super().train(*arguments, **more)
        adapters.merge(self.model)
        quantization.remove(self.model)
        return done

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As Trainer's. Of a model with adapters it saves what learns; without a config nobody takes it for a model."""
        learnt = adapters.learnt(self.model)
        if learnt is None:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            place = Path(output_dir or str(self.args.output_dir))
            place.mkdir(parents=True, exist_ok=True)
            save_file({name: weight.contiguous() for name, weight in learnt.items()}, place / SAFE_WEIGHTS_NAME)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """As Trainer's, but for the frozen weights, which a checkpoint with adapters leaves out."""
        if load_result.unexpected_keys or adapters.learnt(self.model) is None:
            super()._issue_warnings_after_load(load_result)

    def floating_point_ops(self, inputs: Any) -> int:
        """0: nobody asks for them, and to count the weights for them takes a fiftieth of a step."""
        return 0

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        if not math.isfinite(norm):
            saved = any(Path(str(self.args.output_dir)).glob("checkpoint-*/trainer_state.json"))
            raise UserError(
                f"the loss or its gradients are not finite at step {self.state.global_step + 1} of "
                f"{self.state.max_steps}, so no bundle is written; lower --learning-rate, raise --warmup-steps, or add "
                "--bf16 false"
                + (", with --resume-from-checkpoint true to go on from the last good checkpoint" if saved else "")
            )
        return norm


class TokenTrainer(SafeTrainer):
    """Takes `TokenRows` in batches of like length, and a batch of too many tokens in parts.

    A step's loss is the mean over its examples, or over its labelled tokens, however they are spread over parts,
    accumulated batches and processes. Evaluation begins with the longest rows. Where rows have a teacher's logits, half
    of the loss is how far the model is from these.

    most_tokens: of one forward pass, padding included. token_dropout: share of the tokens, but for special ones, that
    training hides behind the mask token (word dropout, Iyyer et al. 2015, Deep Unordered Composition). ema_decay: of
    the average of the weights that is evaluated and kept, 0 for none. head_ratio: how many times as fast as the rest a
    fresh head and the pooler before it learn (discriminative fine-tuning, Howard & Ruder 2018).
    """

    def __init__(
        self,
        *arguments: Any,
        most_tokens: int,
        token_dropout: float = 0.0,
        ema_decay: float = 0.0,
        head_ratio: float = 1.0,
        **more: Any,
    ) -> None:
        super().__init__(*arguments, **more)
        self._most_tokens, self._token_dropout, self._head_ratio = most_tokens, token_dropout, head_ratio
        tokenizer: Any = self.processing_class
        self._special = torch.tensor(tokenizer.all_special_ids, device=self.args.device)
        self._average = WeightAverage(ema_decay) if ema_decay else None
        if self._average is not None:
            self.add_callback(self._average)
        # Not all models that take the number of items divide by it. None is told: `training_step` weighs their means.
        self.model_accepts_loss_kwargs = False

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As Trainer's, with groups of their own for the head."""
        begun = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        head = _fresh(self.model) if self._head_ratio != 1 and not begun else set()
        for group in [*optimizer.param_groups]:
            apart = [weight for weight in group["params"] if weight in head]
            group["params"] = [weight for weight in group["params"] if weight not in head]
            if apart:
                optimizer.add_param_group({**group, "params": apart, "lr": group["lr"] * self._head_ratio})
        return optimizer

    def evaluate(self, *arguments: Any, **more: Any) -> dict[str, float]:
        """As Trainer's; during training of the average of the weights."""
        with nullcontext() if self._average is None else self._average.in_place():
            return super().evaluate(*arguments, **more)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As SafeTrainer's, and the average of the weights beside them."""
        super()._save(output_dir, state_dict)
        if self._average is not None:
            self._average.save(Path(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._average is not None:
            self._average.load(Path(resume_from_checkpoint), self.args.device)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._average is not None:
            self._average.load(Path(str(self.state.best_model_checkpoint)), self.args.device)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthBuckets(rows.lengths, batch, seed, lambda: int(self.state.epoch or 0))

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int]:
        return LongestFirst(eval_dataset.lengths)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        assert self._signature_columns is not None
        if TAUGHT not in self._signature_columns:
            self._signature_columns.append(TAUGHT)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, *arguments: Any, **more: Any
    ) -> Any:
        """As Trainer's; the mean of it and of the distance from the teacher, if there is one."""
        teacher, labels = inputs.pop(TAUGHT, None), inputs.get("labels")
        if teacher is None:
            return super().compute_loss(model, inputs, return_outputs, *arguments, **more)
        loss, outputs = super().compute_loss(model, inputs, True, *arguments, **more)
        loss = (loss + distillation.loss(outputs["logits"], teacher, labels)) / 2
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """As Trainer's, with the items of the batches of all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.as_tensor(sum(map(_items, batches)), device=device)
        return batches, self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def _get_num_items_in_batch(self, *_: Any) -> None:
        """None: evaluation asks for it, too, part by part, of which processes have different numbers."""

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """As Trainer's, the inputs in parts, some of their tokens hidden."""
        if not model.training:  # to tell all modules takes a hundredth of a step
            model.train()
        pieces = parts(self._hidden(self._prepare_inputs(inputs)), self._most_tokens)
        total = torch.zeros((), device=self.args.device)
        for place, piece in enumerate(pieces, start=1):
            with nullcontext() if place == len(pieces) else self.accelerator.no_sync(model):
                # Gradients of several processes are averaged, not added.
                weight = _items(piece) * self.args.world_size / num_items_in_batch
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(model, piece) * weight
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _hidden(self, inputs: Any) -> Any:
        """The inputs with some tokens hidden, each batch anew."""
        if not self._token_dropout:
            return inputs
        tokenizer: Any = self.processing_class
        ids = inputs["input_ids"]
        hidden = torch.rand(ids.shape, device=ids.device) < self._token_dropout
        hidden &= ~torch.isin(ids, self._special)
        return {**inputs, "input_ids": ids.masked_fill(hidden, tokenizer.mask_token_id)}

    def prediction_step(self, model: nn.Module, inputs: Any, *arguments: Any, **more: Any) -> Any:
        """As Trainer's, the inputs in parts."""
        pieces = parts(self._prepare_inputs(inputs), self._most_tokens)
        weights = torch.tensor([float(_items(piece)) for piece in pieces], device=self.args.device)
        found = [super(TokenTrainer, self).prediction_step(model, piece, *arguments, **more) for piece in pieces]
        losses, logits, labels = zip(*found, strict=True)
        loss = (torch.stack(losses) * weights).sum() / weights.sum()
        return loss, *(None if values[0] is None else reduce(nested_concat, values) for values in (logits, labels))


def _fresh(model: Any) -> set[nn.Parameter]:
    """The weights above a base model's blocks, if they begin at random."""
    if not getattr(model, "fresh_head", False):
        return set()
    body = {id(weight) for name, weight in model.base_model.named_parameters() if "pooler" not in name}
    return {weight for weight in model.parameters() if id(weight) not in body}


def _items(batch: Mapping[str, Any]) -> Any:
    """What the loss of a batch is the mean over: its labelled tokens, or its rows."""
    labels = batch.get("labels")
    if labels is not None and labels.dim() > 1 and not labels.is_floating_point():
        return labels.ne(IGNORED).sum()
    return len(batch["input_ids"])


def weighted(options: Options, labels: Sequence[int], count: int) -> dict[str, Any]:
    """What `build` takes for --class-weights: the loss of a classifier with one label a row, the mean weight being 1.

    labels: class index of each row of the training data. count: of classes. Raises UserError for one without a row.
    """
    if options.class_weights is None:
        return {}
    rows = np.bincount(labels, minlength=count)
    if not rows.all():
        raise UserError("--class-weights: a class without a row in training has no weight; leave it out")
    weights = torch.from_numpy(len(labels) / (count * rows)).float()

    def loss(outputs: Any, targets: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        losses = nn.functional.cross_entropy(outputs["logits"].float(), targets, reduction="none")
        return (losses * weights.to(targets.device)[targets]).mean()

    return {"compute_loss_func": loss}


def prepare(model: Any, options: Options, arguments: TrainerOptions) -> None:
    """Settles how a model learns: all weights, all but the embeddings of tokens, or adapters; and whether as in int8.

    A CPU gets a dropout that suits it.

    Raises UserError for a model without such embeddings, or without linear layers for the other two.
    """
    if options.freeze_embeddings:
        embeddings = model.get_input_embeddings()
        if not isinstance(embeddings, nn.Embedding):
            raise UserError("--freeze-embeddings: this model has no embeddings of tokens; leave it out")
        embeddings.requires_grad_(False)
    if options.lora is not None:
        adapters.add(model, options.lora)
    if options.quantization_aware:
        quantization.add(model, options.task)
    if arguments.device.type == "cpu" and not arguments.torch_compile:  # a compiled model draws fewer numbers itself
        dropout.replace(model)


def _token_dropout(tokenizer: Any, options: Options, arguments: TrainerOptions) -> float:
    """The share of tokens to hide. Raises UserError if one was asked for and the tokenizer has no mask token."""
    if options.token_dropout and tokenizer.mask_token_id is None:
        if "token_dropout" not in arguments.reasons:
            raise UserError("--token-dropout: the tokenizer of this model has no mask token to hide others behind")
        options.token_dropout, arguments.reasons["token_dropout"] = 0.0, "the tokenizer has no mask token"
    return options.token_dropout or 0.0


def build(
    model: Any,
    processor: Any,
    arguments: TrainerOptions,
    options: Options,
    *,
    train: Dataset | Any,
    validation: Dataset | Any,
    collator: Callable[[list[Any]], dict[str, Any]],
    metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
    kind: type[Trainer] = SafeTrainer,
    **more: Any,
) -> Trainer:
    """A Trainer with our progress output and early stopping; `more` goes to the Trainer as it is."""
    if options.class_weights and "compute_loss_func" not in more:
        raise UserError("--class-weights: this task does not have one label for each row to weigh")
    if options.teacher and not (isinstance(train, TokenRows) and TAUGHT in train[0]):
        raise UserError("--teacher: only classifiers of texts, pairs and tokens learn from one; leave it out")
    if options.quantization_aware and arguments.activation_checkpointing:
        raise UserError("--quantization-aware: what is computed twice moves a range twice; leave out one of both")
    prepare(model, options, arguments)
    callbacks: list[Any] = [Progress()]
    if options.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(options.early_stopping_patience))
    if isinstance(train, TokenRows):
        kind, more = TokenTrainer, {**more, "most_tokens": options.most_tokens}
        more["token_dropout"] = _token_dropout(processor, options, arguments)
        more |= {"ema_decay": options.ema_decay or 0.0, "head_ratio": options.head_learning_rate_ratio or 1.0}
    elif options.token_dropout or options.ema_decay or (options.head_learning_rate_ratio or 1) != 1:
        raise UserError(
            "--token-dropout, --ema-decay and --head-learning-rate-ratio are for classifiers of texts, pairs and "
            "tokens and for question-answering; leave them out"
        )
    if options.private_epsilon is not None:
        from training import private  # here, as it is a kind of TokenTrainer

        private.freeze_embeddings(model)
        kind, more = private.PrivateTrainer, {**more, "epsilon": options.private_epsilon}
    trainer = kind(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=processor,
        data_collator=collator,
        compute_metrics=metrics,
        callbacks=callbacks,
        **more,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer
