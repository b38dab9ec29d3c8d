# SPDX-License-Identifier: Apache-2.0
"""What adapted modules and a model's mixtures of experts say of whose rows are whose.

The experts of transformers' older mixtures are modules of their own, which see only the tokens that
they are handed. Their container is told which, so it is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..base.calls.layout import row_layout
from ..base.calls.rows import ROUTED_TOKENS, RoutedTokens
from ..base.containers import walk
from .auxiliary import AuxiliaryTrainingWrapper
from .entry_points import Entry, put_entry, remove_entries


def note(model: nn.Module, paths: Iterable[str]) -> None:
    """Have the adapted modules at some paths know how their rows lie, and mixtures of experts say,
    while they run, which token goes to which expert, where that can be read.
    """
    has_experts = False
    for path in paths:
        module: Any = model.get_submodule(path)
        if isinstance(module, AuxiliaryTrainingWrapper):
            module.layout = row_layout(
                model, path, int(not isinstance(module.original_module, nn.Embedding))
            )
        # Layers with adapters, of several methods one around the other.
        while "base_layer" in module._modules and hasattr(module, "layout"):
            module.layout = row_layout(model, path, module.layout.features)
            has_experts |= module.layout.expert is not None
            module = module.base_layer
    for _, module in walk(model) if has_experts else ():
        kind: Any = type(module)
        if _reader(kind) is not None and not isinstance(vars(module).get("forward"), Entry):
            put_entry(module, "forward", (), _conduct)


def forget(model: nn.Module) -> None:
    """Have mixtures of experts say nothing any more."""
    for _, module in walk(model):
        remove_entries(module, _conduct)


def _of_nllb(
    experts: Any, hidden_states: Tensor, router_mask: Tensor, router_probs: Tensor
) -> Tensor:
    return F.one_hot(router_mask, num_classes=experts.num_experts).permute(2, 1, 0)


def _of_switch(
    experts: Any, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor
) -> Tensor:
    return selected_experts.permute(2, 1, 0)


# How containers of experts choose, from what they are called with: `[experts, choices, tokens]`, as
# they go by it themselves.
_READERS: dict[str, Callable[..., Tensor]] = {
    "transformers.models.nllb_moe.modeling_nllb_moe.NllbMoeExperts": _of_nllb,
    "transformers.models.switch_transformers.modeling_switch_transformers.SwitchTransformersExperts": _of_switch,
}


@lru_cache(maxsize=4096)
def _reader(kind: type) -> Callable[..., Tensor] | None:
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in kind.__mro__)
    return next((_READERS[name] for name in names if name in _READERS), None)


def _conduct(
    function: Callable[..., Any],
    experts: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    names: tuple[str, ...],
) -> Any:
    """A call of a container of experts."""
    kind: Any = type(experts)
    reader: Any = _reader(kind)
    places = [name for name in experts._modules if name.startswith("expert_")]
    routed = RoutedTokens(
        lambda: reader(experts, *args, **kwargs), {name: i for i, name in enumerate(places)}
    )
    with ROUTED_TOKENS.during(routed):
        return function(experts, *args, **kwargs)
