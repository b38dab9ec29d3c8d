# SPDX-License-Identifier: Apache-2.0
"""Find subclasses of `nn.Linear` whose `forward` does more than multiply by the weight."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .weights import is_quantized

# The largest relative difference from a product. Rounding to 8 or 4 bits in the forward makes
# less, an activation or a mask more.
_TOLERANCE = 0.25


def changes_delta(layer: nn.Module) -> bool:
    """Return whether a layer treats a delta in its weight otherwise than one beside its output, by
    an activation, a scale or a mask of its own.

    The class's `forward` runs on a few random rows, with the weight and with its columns in reverse
    order, `W'`. Of a product, whatever is added to it, `f(W', x) - f(W, x) = (W' - W)·x`.

    False too if the layer can't be run by itself, and without a run for a plain `nn.Linear`. Hooks
    are not run, and what the forward changes are copies of the layer's buffers and modules.
    """
    weight = layer._parameters.get("weight")
    if not isinstance(layer, nn.Linear) or type(layer).forward is nn.Linear.forward:
        return False
    if weight is None or weight.is_meta or is_quantized(layer):
        return False
    # A forward may wait for other processes, and an offloaded layer's weights are elsewhere.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    if hasattr(layer, "_hf_hook"):
        return False
    try:
        with torch.no_grad():
            return _TOLERANCE < _difference(layer, weight) < torch.inf
    except Exception:
        return False  # it needs another input, other arguments, another device


def _difference(layer: nn.Linear, weight: Tensor) -> float:
    """Return the relative difference of a layer's outputs from a product; NaN if it is unknown."""
    x = torch.randn(16, layer.in_features, generator=torch.Generator().manual_seed(0))
    x = x.to(weight.device)
    # Outputs of some size, where activations bend.
    x = (x * (2 / F.linear(x, weight.float()).square().mean().sqrt())).to(weight.dtype)
    other = weight.flip(1)
    before, after = (
        type(layer).forward(_with_weight(layer, own), x).double() for own in (weight, other)
    )
    product = F.linear(x.double(), other.double() - weight.double())
    if before.shape != product.shape:
        return float("nan")
    return float((after - before - product).norm() / product.norm())


def _with_weight(layer: nn.Linear, weight: Tensor) -> nn.Linear:
    """Return a layer in evaluation with another weight, and otherwise as the given one."""
    twin = copy.copy(layer)
    twin._parameters = {**layer._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
    twin._buffers = copy.deepcopy(layer._buffers)
    twin._modules = copy.deepcopy(layer._modules)
    return twin.eval()
