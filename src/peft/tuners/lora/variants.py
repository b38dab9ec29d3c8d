# SPDX-License-Identifier: Apache-2.0
"""Functions of the interface that find the tokens of activated adapters, as `alora_offsets`.

Calls of a model find them by themselves; these are for programs that pass them on. The classes that
the interface has here are placeholders, since this package has no variants of layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from ...base.errors import warn
from ...base.placeholders import placeholders
from .invocation import invocation_starts, offsets_of

__all__ = [
    "calculate_alora_offsets",
    "get_alora_offsets_for_forward",
    "get_alora_offsets_for_generate",
]

ALoraLinearVariant: type
ArrowLinearVariant: type
BdLoraLinearVariant: type
DoraConv1dVariant: type
DoraConv2dVariant: type
DoraConv3dVariant: type
DoraEmbeddingVariant: type
DoraLinearVariant: type
KasaLinearVariant: type
MontecloraLinearVariant: type
QALoraLinearVariant: type
VeloraLinearVariant: type

if not TYPE_CHECKING:
    __getattr__ = placeholders(__name__)


class _AdaptedModel(Protocol):
    """The members of a model with adapters that this file uses."""

    @property
    def peft_config(self) -> Mapping[str, object]: ...
    @property
    def active_adapters(self) -> Sequence[str]: ...


def calculate_alora_offsets(
    peft_config: Mapping[str, object],
    active_adapter: str,
    input_ids: Tensor,
    adapter_names: Sequence[str] | None = None,
) -> list[int | None]:
    """Return the number of tokens from the last invocation on, for each row of `input_ids`; None
    for a row without one, or whose adapter is not an activated one.

    Args:
        peft_config: The adapters' configs by name.
        active_adapter: The adapter of all rows.
        input_ids: `[rows, tokens]`.
        adapter_names: An adapter for each row in place of `active_adapter`.

    Example:
        >>> from peft import LoraConfig
        >>> configs = {"default": LoraConfig(alora_invocation_tokens=[1, 2])}
        >>> calculate_alora_offsets(configs, "default", torch.tensor([[0, 1, 2, 3], [0, 4, 5, 6]]))
        [3, None]
    """
    rows, tokens = input_ids.shape
    names = [active_adapter] * rows if adapter_names is None else adapter_names
    offsets: dict[str, list[int | None]] = {}
    for name in set(names):
        invocation = getattr(peft_config.get(name), "alora_invocation_tokens", None)
        if invocation:
            wanted = torch.tensor(invocation, device=input_ids.device)
            offsets[name] = offsets_of(invocation_starts(input_ids, wanted), tokens)
    return [offsets[name][i] if name in offsets else None for i, name in enumerate(names)]


def get_alora_offsets_for_forward(
    model: _AdaptedModel,
    input_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    **kwargs: object,
) -> dict[str, object]:
    """Return the arguments of a forward, with the `alora_offsets` of its tokens if any adapter that
    it can use is an activated one.
    """
    return _with_offsets(
        model,
        input_ids,
        kwargs,
        "Cannot calculate aLoRA offsets when only inputs_embeds are provided. Disabling aLoRA for "
        "this forward pass.",
    )


def get_alora_offsets_for_generate(
    model: _AdaptedModel, *args: object, **kwargs: object
) -> dict[str, object]:
    """Return the arguments of `generate`, with the `alora_offsets` of its prompt if any adapter
    that it can use is an activated one.
    """
    ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
    return _with_offsets(
        model,
        ids,
        kwargs,
        "Cannot calculate aLoRA offsets during generate as input_ids are not available. Disabling "
        "aLoRA.",
    )


def _with_offsets(
    model: _AdaptedModel, ids: object, arguments: dict[str, object], warning: str
) -> dict[str, object]:
    """Return arguments with `alora_offsets`, unless they have them or need none."""
    configs, names = model.peft_config, arguments.get("adapter_names")
    names = cast(Sequence[str] | None, names)
    used = model.active_adapters if names is None else names
    is_activated = any(
        getattr(configs.get(name), "alora_invocation_tokens", None) for name in set(used)
    )
    if not is_activated or arguments.get("alora_offsets") is not None:
        return arguments
    if not isinstance(ids, Tensor):
        warn(warning)
        return {**arguments, "alora_offsets": None}
    active = next(iter(model.active_adapters), "")  # none is active where `names` choose
    offsets = calculate_alora_offsets(configs, active, ids, names)
    return {**arguments, "alora_offsets": offsets}
