# SPDX-License-Identifier: Apache-2.0
"""Inputs that require gradients, for activation checkpointing of transformers' models."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


def require_input_gradients(model: nn.Module) -> None:
    """Make what a model of transformers computes from its input require gradients; no other model
    is changed.

    `enable_input_require_grads` puts hooks on the embeddings, once more at each call, which fail if
    an embedding returns a tuple, as that of Swin, or its output is changed in place, as by BLIP.
    Here they are put once, and fit both.
    """
    disable, enable = (
        getattr(model, f"{verb}_input_require_grads", None) for verb in ("disable", "enable")
    )
    if disable is not None and _handles(model):
        disable()
    if enable is not None:
        enable()
    for handle in _handles(model):
        hooks = handle.hooks_dict_ref()
        if hooks is not None:
            hooks[handle.id] = _require_gradients


def _handles(model: nn.Module) -> list[RemovableHandle]:
    """Return the handles of the hooks on the embeddings; older versions of transformers keep one,
    and can't disable what was never enabled.
    """
    one = getattr(model, "_require_grads_hook", None)
    return getattr(model, "_require_grads_hooks", [] if one is None else [one])


def _require_gradients(module: nn.Module, inputs: object, output: object) -> object:
    if not isinstance(output, tuple):
        return _with_gradient(output)
    values = map(_with_gradient, output)
    return output._make(values) if hasattr(output, "_make") else tuple(values)


def _with_gradient(value: object) -> object:
    """Return a tensor that requires gradients and, as no leaf, may be changed in place: models
    such as BLIP add positions so.
    """
    if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.requires_grad:
        return value.requires_grad_(True).clone()
    return value
