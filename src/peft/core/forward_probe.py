# SPDX-License-Identifier: Apache-2.0
"""Find linear layers and convolutions whose own `forward` does more than multiply by the weight."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base_layer import Convolution, conv_options, convolve
from .weights import is_quantized

# The largest relative difference from a product. Rounding to 8 or 4 bits in the forward makes
# less, an activation or a mask more.
_TOLERANCE = 0.25
# Roundings scatter around a product: a scale of all outputs shows in their mean from a tenth on.
_SCALES = 2.5

_OTHER_SIZE = -1.0

_PLAIN = {kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}


def changes_delta(layer: nn.Module) -> bool:
    """Return whether a layer treats a delta in its weight otherwise than one beside its output, by
    an activation, a scale, a mask or a padding of its own.

    The class's `forward` runs on a few random rows, with the weight and with its columns in reverse
    order, `W'`. Of a product, whatever is added to it, `f(W', x) - f(W, x) = (W' - W)·x`.

    False too if the layer can't be run by itself, and without a run for a plain layer of torch's.
    Hooks are not run, and what the forward changes are copies of the layer's buffers and modules.
    """
    return _TOLERANCE < _probed(layer) < torch.inf


def resizes_output(layer: nn.Module) -> bool:
    """Return whether a convolution's outputs have another size than its settings give, as those of
    one that pads its input by itself. It is found by a run, as in `changes_delta`.
    """
    return isinstance(layer, Convolution) and _probed(layer) == _OTHER_SIZE


def _probed(layer: nn.Module) -> float:
    """Return the relative difference of a layer's outputs from a product, `_OTHER_SIZE` if their
    sizes differ; NaN if it is unknown.
    """
    weight = layer._parameters.get("weight")
    unknown = float("nan")
    if not isinstance(layer, nn.Linear | Convolution) or type(layer).forward in _PLAIN:
        return unknown
    if weight is None or weight.is_meta or is_quantized(layer):
        return unknown
    # A forward may wait for other processes, and an offloaded layer's weights are elsewhere.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return unknown
    if hasattr(layer, "_hf_hook"):
        return unknown
    try:
        with torch.no_grad():
            return _difference(layer, weight)
    except Exception:
        return unknown  # it needs another input, other arguments, another device


def _difference(layer: nn.Linear | Convolution, weight: Tensor) -> float:
    x = torch.randn(_input_shape(layer), generator=torch.Generator().manual_seed(0))
    x = x.to(weight.device)
    # Outputs of some size, where activations bend.
    x = x * (2 / _product(layer, x, weight.float()).square().mean().sqrt())
    x = x.to(weight.dtype)
    other = weight.flip(*range(1, weight.dim()))
    forward: Any = type(layer).forward
    before, after = (forward(_with_weight(layer, own), x).double() for own in (weight, other))
    product = _product(layer, x.double(), other.double() - weight.double())
    if before.shape != product.shape:
        return _OTHER_SIZE
    found = after - before
    scale = (found * product).sum() / product.square().sum()
    difference = (found - product).norm() / product.norm()
    return float(torch.maximum(difference, _SCALES * (scale - 1).abs()))


def _input_shape(layer: nn.Linear | Convolution) -> tuple[int, ...]:
    """Return the shape of a few rows, or of an image that a kernel moves over."""
    if isinstance(layer, nn.Linear):
        return 16, layer.in_features
    options = conv_options(layer)
    steps = zip(layer.kernel_size, options["dilation"], options["stride"], strict=True)
    return 2, layer.in_channels, *(d * (k - 1) + 1 + s for k, d, s in steps)


def _product(layer: nn.Linear | Convolution, x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight) if isinstance(layer, nn.Linear) else convolve(layer, x, weight)


def _with_weight(layer: nn.Module, weight: Tensor) -> nn.Module:
    """Return a layer in evaluation with another weight, and otherwise as the given one."""
    twin = copy.copy(layer)
    twin._parameters = {**layer._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
    twin._buffers = copy.deepcopy(layer._buffers)
    twin._modules = copy.deepcopy(layer._modules)
    return twin.eval()
