"""Integrated gradients of a torch model, by captum."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from captum.attr import IntegratedGradients, LayerIntegratedGradients
from numpy.typing import NDArray

# Tokens, or patches, that go through the model at once.
_TOKENS = 2048
_IDS, _PIXELS = "input_ids", "pixel_values"


def integrated_gradients(
    model: Any,
    arrays: Mapping[str, torch.Tensor],
    baselines: Mapping[str, torch.Tensor],
    terms: Sequence[Sequence[tuple[str, tuple[int, ...], float]]],
    steps: int,
    tokens: int,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Attributions of each position of `input_ids`, [batch, length], or `pixel_values`, [batch, height, width].

    arrays, baselines: the model's inputs, [batch, …]. terms: of each row, what is explained: a sum of outputs, each by
    its name, its index without the batch axis, and its weight. steps: points of the path, by Gauss-Legendre
    quadrature. tokens: of one row. Returns, beside the attributions, by how much their sum, [batch], is off.
    """
    source = _IDS if _IDS in arrays else _PIXELS
    others = [name for name in arrays if name != source]

    def explained(values: torch.Tensor, rows: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        outputs = model(**{source: values}, **dict(zip(others, rest, strict=True)))
        # In single precision, whatever the model computes in: what is left is a difference.
        return torch.stack(
            [
                torch.stack([weight * outputs[name][place][index].float() for name, index, weight in terms[row]]).sum()
                for place, row in enumerate(rows.tolist())
            ]
        )

    batch = len(arrays[source])
    rows = torch.arange(batch, device=arrays[source].device)
    options = {
        "additional_forward_args": (rows, *(arrays[name] for name in others)),
        "n_steps": steps,
        "method": "gausslegendre",
        "internal_batch_size": max(batch, _TOKENS // tokens),
        "return_convergence_delta": True,
    }
    with torch.enable_grad():
        if source == _IDS:
            method = LayerIntegratedGradients(explained, model.get_input_embeddings())
        else:
            method = IntegratedGradients(explained)
        found, deltas = method.attribute(arrays[source], baselines[source], **options)
    # Over the embedding's dimensions, or the channels.
    summed = found.sum(dim=-1) if source == _IDS else found.sum(dim=1)
    return summed.detach().float().cpu().numpy(), deltas.detach().float().cpu().numpy()
