# SPDX-License-Identifier: Apache-2.0
"""Row layouts of adapted modules, and the tokens of each expert in mixtures of experts.

In transformers' older mixtures each expert is a module that gets only its own tokens. The container
of the experts knows the choice, and its calls are wrapped to read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from ..base.calls.layout import row_layout
from ..base.calls.rows import MOE_TOKENS, ExpertTokens
from ..base.calls.wrapped_methods import MethodCall, is_wrapped, unwrap_methods, wrap_method
from ..base.containers import walk
from .auxiliary import AuxiliaryTrainingWrapper
from .layer import BaseTunerLayer


def note(model: nn.Module, paths: Iterable[str]) -> None:
    """Set row layouts of adapted modules, and make mixtures of experts note their token choice."""
    has_experts = False
    for path in paths:
        module = model.get_submodule(path)
        if isinstance(module, AuxiliaryTrainingWrapper):
            module.layout = row_layout(
                model, path, int(not isinstance(module.original_module, nn.Embedding))
            )
        # Layers with adapters, of several methods one around the other.
        while isinstance(module, BaseTunerLayer):
            module.layout = row_layout(model, path, module.layout.features)
            has_experts |= module.layout.expert is not None
            module = module.base_layer
    for _, module in walk(model) if has_experts else ():
        kind: type = type(module)
        if _reader(kind) is not None and not is_wrapped(module, "forward"):
            wrap_method(module, "forward", (), _run_experts)


def forget(model: nn.Module) -> None:
    """Unwrap the calls of mixtures of experts."""
    unwrap_methods(model, _run_experts)


def _of_nllb(
    experts: nn.Module, hidden_states: Tensor, router_mask: Tensor, router_probs: Tensor
) -> Tensor:
    return F.one_hot(router_mask, num_classes=cast(int, experts.num_experts)).permute(2, 1, 0)


def _of_switch(
    experts: nn.Module, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor
) -> Tensor:
    return selected_experts.permute(2, 1, 0)


# Functions of the arguments of a container's call: `[experts, choices, tokens]`, 1 where an expert
# gets a token.
_SWITCH = "transformers.models.switch_transformers.modeling_switch_transformers"
_READERS: dict[str, Callable[..., Tensor]] = {
    "transformers.models.nllb_moe.modeling_nllb_moe.NllbMoeExperts": _of_nllb,
    f"{_SWITCH}.SwitchTransformersExperts": _of_switch,
}


@lru_cache(maxsize=4096)
def _reader(kind: type) -> Callable[..., Tensor] | None:
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in kind.__mro__)
    return next((_READERS[name] for name in names if name in _READERS), None)


def _run_experts(call: MethodCall) -> object:
    """Run a container of experts, and keep the tokens of each expert for the layers in it."""
    kind: type = type(call.module)
    reader = _reader(kind)
    assert reader is not None
    names = [name for name in call.module._modules if name.startswith("expert_")]
    chosen = ExpertTokens(
        lambda: reader(call.module, *call.args, **call.kwargs),
        {name: i for i, name in enumerate(names)},
    )
    with MOE_TOKENS.during(chosen):
        return call.run()
