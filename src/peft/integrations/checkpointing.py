# SPDX-License-Identifier: Apache-2.0
"""Inputs that require gradients, for activation checkpointing of transformers' models."""

from __future__ import annotations

import torch
from torch import nn


def require_input_gradients(model: nn.Module) -> None:
    """Make what a model of transformers computes from its input require gradients; no other model
    is changed.

    `enable_input_require_grads` puts hooks on the embeddings, once more at each call, which fail if
    an embedding returns a tuple, as that of Swin. Here they are put once, and take tuples.
    """
    for name in ("disable_input_require_grads", "enable_input_require_grads"):
        method = getattr(model, name, None)
        if method is not None:
            method()
    for handle in getattr(model, "_require_grads_hooks", ()):
        handle.hooks_dict_ref()[handle.id] = _require_gradients


def _require_gradients(module: nn.Module, inputs: object, output: object) -> None:
    for value in output if isinstance(output, tuple) else (output,):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value.requires_grad_(True)
