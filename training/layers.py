"""Fewer layers: a base model that keeps some of its own, to be fine-tuned into a smaller and faster one.

As DistilBERT's student is made of BERT (Sanh et al. 2019), and as models are pruned by Fan, Grave and Joulin, "Reducing
Transformer Depth on Demand with Structured Dropout", 2019.
"""

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from training.errors import UserError


def keep(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """A model with `count` layers of `model`, evenly spaced, the first and the last among them; its config says so.

    Raises UserError if there are fewer, or if the model is not one stack of layers: encoder-decoders have two.
    """
    kind, total = model.config.model_type, getattr(model.config, "num_hidden_layers", None)
    stacks = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == total
        and not any(part.isdigit() for part in name.split("."))
    ]
    if total is None or len(stacks) != 1 or model.config.is_encoder_decoder:
        raise UserError(f"--layers {count}: a model of the type {kind} is not one stack of layers; leave it out")
    if count > total:
        raise UserError(f"--layers {count}: this base model has {total}; give 1 to {total}")
    kept = spaced(count, total)
    config = copy.deepcopy(model.config)
    for name, value in vars(model.config).items():
        # Such as layer_types, which says of each layer what kind of attention it has.
        if "layer" in name and isinstance(value, list) and len(value) == total:
            setattr(config, name, [value[place] for place in kept])
    config.num_hidden_layers = count
    [stack] = stacks
    places = {f"{stack}.{old}.": f"{stack}.{new}." for new, old in enumerate(kept)}
    weights: dict[str, Any] = {}
    for name, weight in model.state_dict().items():
        if not name.startswith(f"{stack}."):
            weights[name] = weight
        else:
            place = name.removeprefix(f"{stack}.").partition(".")[0]
            if (old := f"{stack}.{place}.") in places:
                weights[places[old] + name.removeprefix(old)] = weight
    # Built anew from the config, as it will be when the bundle is loaded: layers may know their number.
    smaller: Any = type(model)(config)
    smaller.to(model.dtype)
    try:
        smaller.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"--layers {count}: the layers of {kind} cannot take each other's place; leave it out"
        ) from error
    if model.can_generate():
        smaller.generation_config = model.generation_config
    found: PreTrainedModel = smaller.eval()
    return found


def spaced(count: int, total: int) -> list[int]:
    """`count` of the numbers from 0 to `total` - 1, evenly spaced, with both ends; 0 alone if it is one."""
    return [round(place * (total - 1) / max(1, count - 1)) for place in range(count)]
