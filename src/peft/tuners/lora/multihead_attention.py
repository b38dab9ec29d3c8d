# SPDX-License-Identifier: Apache-2.0
"""`MultiheadAttention`: LoRA on torch's multi-head attention."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from ...core.base_layer import innermost
from .param_wrapper import ParamWrapper


class MultiheadAttention(ParamWrapper):
    """A layer around `nn.MultiheadAttention` with LoRA on its packed projection of query, key and
    value, `in_proj_weight [3 · embed_dim, embed_dim]`.

    A layer inside, `OutProjection`, adapts the weight of `out_proj`. The module computes with the
    sums `W + s·B·A`, on its fused inference path too, so dropout on the adapter's input has no
    effect.
    """

    @property
    def out_proj(self) -> nn.Module:
        """The module's output projection, whose weight is read with the adapter's delta."""
        return innermost(self.get_base_layer().get_submodule("out_proj"))


class OutProjection(ParamWrapper):
    """A layer around the `out_proj` of multi-head attention, with twice the scale of other layers.

    Hugging Face PEFT adds the delta twice, in the forward and when it merges. Adapters were trained
    so, and files mean the same only if this does too.
    """

    unit_scale: ClassVar[float] = 2.0
