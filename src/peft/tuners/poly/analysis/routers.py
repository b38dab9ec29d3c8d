# SPDX-License-Identifier: Apache-2.0
"""The routers of an adapter, each once."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ....base.containers import walk
from ....core.adapter_choice import adapter_of
from ..config import PolyConfig
from ..layer import PolyLayer
from ..router import Router


def poly_adapter(model: nn.Module, adapter_name: str | None) -> str:
    """Return the name of a Poly adapter: the given one, "default", or the only active one.

    Raises:
        PeftValueError: There is no such adapter, or several could be meant.
    """
    return adapter_of(model, adapter_name, PolyLayer, " of Poly")


def adapter_routers(model: nn.Module, adapter_name: str) -> dict[Router, str]:
    """Return an adapter's routers, each with the path of the first layer that has it.

    Paths begin at the base model of a `PeftModel`, and at other models themselves.
    """
    tuner = model._modules.get("base_model")
    root = model if tuner is None else tuner.get_submodule("model")
    routers: dict[Router, str] = {}
    for path, layer in walk(root):
        if isinstance(layer, PolyLayer) and adapter_name in layer.scaling:
            routers.setdefault(layer.router(adapter_name), path)
    return routers


def adapter_config(model: nn.Module, adapter_name: str) -> PolyConfig:
    """Return the config of an adapter of a `PeftModel`, or of a model with injected adapters."""
    configs: Mapping[str, PolyConfig] = getattr(model, "peft_config")  # noqa: B009
    return configs[adapter_name]
