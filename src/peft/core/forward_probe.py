# SPDX-License-Identifier: Apache-2.0
"""Find linear layers and convolutions whose own `forward` does more than multiply by the weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base_layer import Convolution, conv_options, convolve, geometry
from .weights import is_quantized

# The largest relative difference from a product. Rounding to 8 or 4 bits in the forward makes
# less, an activation or a mask more.
_TOLERANCE = 0.25
# Roundings scatter around a product: a scale of all outputs shows in their mean from a tenth on.
_SCALES = 2.5

_PLAIN = {kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}


def changes_delta(layer: nn.Module) -> bool:
    """Return whether a layer treats a delta in its weight otherwise than one beside its output, by
    an activation, a scale, a mask or a padding of its own.

    The class's `forward` runs on a few random rows, with the weight and with its columns in reverse
    order, `W'`. Of a product, whatever is added to it, `f(W', x) - f(W, x) = (W' - W)·x`.

    False too if the layer can't be run by itself, and without a run for a plain layer of torch's.
    Hooks are not run. What the forward changes are copies of the layer's parameters, buffers,
    modules, lists and dictionaries; both runs draw the same random numbers, and take none.
    """
    return _TOLERANCE < _probed(layer, _difference) < torch.inf


def has_other_output(layer: nn.Module) -> bool:
    """Return whether a layer's output is not one tensor of the size that its settings give: it pads
    its input by itself, or returns a tuple. It is found by a run, as in `changes_delta`.
    """
    return _probed(layer, _is_other) == 1


def _probed(layer: nn.Module, measure: Callable[[nn.Module, Tensor], float]) -> float:
    """Return what is measured by runs of a layer; NaN if it has torch's `forward`, or can't be run
    by itself.
    """
    weight, size = layer._parameters.get("weight"), geometry(layer)
    unknown = float("nan")
    if size is None or size.transposed or type(layer).forward in _PLAIN:
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
            return measure(layer, weight)
    except Exception:
        return unknown  # it needs another input, other arguments, another device


def _is_other(layer: nn.Module, weight: Tensor) -> float:
    """Return 1 if a layer's output is not one tensor of a product's size, else 0."""
    x = _input(layer, weight).to(weight.dtype)
    output, product = _outputs(layer, x, weight), _product(layer, x.to("meta"), weight.to("meta"))
    return float(not isinstance(output, Tensor) or output.shape != product.shape)


def _difference(layer: nn.Module, weight: Tensor) -> float:
    """Return the relative difference of a layer's outputs from a product; NaN if sizes differ."""
    x = _input(layer, weight)
    # Outputs of some size, where activations bend.
    x = x * (2 / _product(layer, x, weight.float()).square().mean().sqrt())
    x = x.to(weight.dtype)
    other = weight.flip(*range(1, weight.dim()))
    before, after = (_outputs(layer, x, own).double() for own in (weight, other))
    product = _product(layer, x.double(), other.double().sub_(weight))
    if before.shape != product.shape:
        return float("nan")
    found = after - before
    if not found.any():  # by a bound method, for example, the twin reads the layer's own weight
        return float("nan")
    scale = (found * product).sum() / product.square().sum()
    difference = (found - product).norm() / product.norm()
    return float(torch.maximum(difference, _SCALES * (scale - 1).abs()))


def _input(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return a few random rows, or images that a kernel moves over."""
    shape: tuple[int, ...] = 16, weight.shape[1]
    if isinstance(layer, Convolution):
        options = conv_options(layer)
        steps = zip(layer.kernel_size, options["dilation"], options["stride"], strict=True)
        shape = 2, layer.in_channels, *(d * (k - 1) + 1 + s for k, d, s in steps)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    return x.to(weight.device)


def _outputs(layer: nn.Module, x: Tensor, weight: Tensor) -> Any:
    """Return what the class's `forward` makes of an input with a weight."""
    with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
        return type(layer).forward(_with_weight(layer, weight), x)


def _product(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    return convolve(layer, x, weight) if isinstance(layer, Convolution) else F.linear(x, weight)


def _with_weight(layer: nn.Module, weight: Tensor) -> nn.Module:
    """Return a layer in evaluation with another weight, and otherwise as the given one."""
    twin = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, (list, dict, set)):
            vars(twin)[name] = copy.copy(value)
    own = {**layer._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
    twin._parameters = copy.deepcopy(own)
    twin._buffers = copy.deepcopy(layer._buffers)
    twin._modules = copy.deepcopy(layer._modules)
    return twin.eval()  # of LoRA's first library, this merges into the weight
