# SPDX-License-Identifier: Apache-2.0
"""Small functions of tensors and parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .errors import PeftRuntimeError


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Context in which operations record no gradients, and new tensors can be trained later even
    inside `torch.inference_mode`.

    Example:
        >>> with torch.inference_mode(), ordinary_tensors():
        ...     torch.zeros(1).is_inference()
        False
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """Return the transpose of a weight if `fan_in_fan_out`; a parameter gives a parameter."""
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def check_values(factor: Tensor, x: Tensor) -> None:
    """Raise `PeftRuntimeError` if a factor is on the meta device and the input that it is applied
    to is not: torch would return memory that nothing was written to.
    """
    if factor.is_meta and not x.is_meta:
        raise PeftRuntimeError(
            "The adapter is on the meta device and has no values yet: load a checkpoint into it, "
            "or run the function that initializes it."
        )


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """Return device, address and bytes of a tensor's storage, equal for tensors that share it."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


@ordinary_tensors()
def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast a model for mixed precision: trainable parameters to float32, frozen ones to `dtype`.

    Args:
        model: The model, changed in place.
        dtype: Dtype of the frozen parameters, for example `torch.float16`.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
