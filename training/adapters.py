"""LoRA: small matrices beside the frozen weights of a base model learn, and are added to these in the end.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, with the peft library. The adapters are put into
the model itself, which keeps its class, so that tasks and Trainer see the model that they know.
"""

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from training.errors import UserError

# An adapter's output is multiplied by alpha / rank: the same for all ranks, so one learning rate suits all of them.
_ALPHA_OF_RANK = 2


def add(model: Any, rank: int) -> None:
    """Adapters of this rank on each linear layer of the base model's blocks: attention and feed-forward.

    The blocks and the embeddings are frozen. A pooler and the head above, which may be fresh, learn whole, but for
    scores of a vocabulary. Raises UserError for a model without such layers.
    """
    from peft import LoraConfig, inject_adapter_in_model

    body = model.base_model
    # What is one of many has a number in its name.
    blocks = {
        name: module
        for name, module in body.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and any(part.isdigit() for part in name.split("."))
    }
    if not blocks:
        raise UserError(
            f"--lora {rank}: this model ({model.config.model_type}) has no linear layers for adapters; leave it out"
        )
    body.requires_grad_(False)
    if (scores := model.get_output_embeddings()) is not None:
        scores.weight.requires_grad_(False)
    config = LoraConfig(
        r=rank,
        lora_alpha=_ALPHA_OF_RANK * rank,
        target_modules=list(blocks),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in blocks.values()),  # GPT-2's weights are transposed
    )
    inject_adapter_in_model(config, body)
    for name, parameter in body.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # in bf16, as some base models are, small steps would be lost
        if name.startswith("pooler."):
            parameter.requires_grad_(True)


def merge(model: Any) -> None:
    """Adds the adapters, if there are any, to the weights and takes them out: an ordinary model again, in fp32."""
    if adapted := [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]:
        model.float()
        for name, module in adapted:
            module.merge()
            model.set_submodule(name, module.get_base_layer())
        del model.base_model.peft_config


def learnt(model: Any) -> dict[str, torch.Tensor] | None:
    """The weights that learn, by name, of a model with adapters; None for any other."""
    if not any(hasattr(module, "lora_A") for module in model.modules()):
        return None
    return {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
