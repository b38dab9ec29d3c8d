# SPDX-License-Identifier: Apache-2.0
"""An adapter that is complete but not yet in the model: what stands between planning an injection
and doing it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..base.containers import walk
from ..base.errors import PeftValueError
from ..config import PeftConfig
from .adapters import AdapterParameterDict
from .auxiliary import ModulesToSaveWrapper
from .base_layer import placement
from .layer import BaseTunerLayer
from .trainable_tokens import TokenRows


@dataclass
class Construction:
    """How an adapter's parameters are made.

    Args:
        autocast: Use float32 where the base layer has 16 bits.
        device: Make all of them here; None follows each base layer.
        initialize: Draw initial values; without, memory is left as it is, to be filled from a
            checkpoint.
    """

    autocast: bool = True
    device: torch.device | None = None
    initialize: bool = True

    def options(self, base_layer: nn.Module) -> dict:
        """The arguments for `update_layer`."""
        place = placement(base_layer, self.autocast, self.device)
        if not self.initialize and place.device.type == "meta":
            place = place._replace(
                device=torch.device("cpu")
            )  # what a checkpoint fills needs memory, whatever the base has
        return {"placement": place, "initialize": self.initialize and place.device.type != "meta"}


@dataclass
class Build:
    """All that an adapter adds to a model.

    Args:
        adapter_name: Its name.
        config: Its config.
        layers: New layers around the model's own, by module path; each holds this adapter alone.
        copies: Trainable copies of the modules in `modules_to_save`, by module path.
        tokens: Trainable rows of embeddings, by module path.
        shared: Parameters that all layers share, by attribute name.
        containers: Where `shared` will go, by attribute name; the layers refer to these already.
    """

    adapter_name: str
    config: PeftConfig
    layers: dict[str, BaseTunerLayer] = field(default_factory=dict)
    copies: dict[str, nn.Module] = field(default_factory=dict)
    tokens: dict[str, TokenRows] = field(default_factory=dict)
    shared: dict[str, nn.Parameter] = field(default_factory=dict)
    containers: dict[str, AdapterParameterDict] = field(default_factory=dict)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor with the name it will have in the model; shared parameters lie at the root."""
        for path, layer in self.layers.items():
            for attribute in layer.container_names:
                for name, tensor in getattr(layer, attribute).state_dict(keep_vars=True).items():
                    yield f"{path}.{attribute}.{name}", tensor
        for path, module in self.copies.items():
            for name, tensor in module.state_dict(keep_vars=True).items():
                yield f"{path}.modules_to_save.{self.adapter_name}.{name}", tensor
        for path, tokens in self.tokens.items():
            yield f"{path}.token_adapter.trainable_tokens_delta.{self.adapter_name}", tokens.rows
        for attribute, parameter in self.shared.items():
            yield f"{attribute}.{self.adapter_name}", parameter


def plain_copy(path: str, module: nn.Module) -> nn.Module:
    """A trainable copy of the module at a path as it is without the adapters that others have in
    it.

    Raises:
        PeftValueError: Some are merged into it.
    """
    inside = [
        layer
        for _, layer in walk(module, closed=(BaseTunerLayer,))
        if isinstance(layer, BaseTunerLayer)
    ]
    if any(layer.merged for layer in inside):
        raise PeftValueError(
            f"`{path}`: adapters are merged into it; call `unmerge_adapter` before one trains a "
            "copy of it."
        )
    return ModulesToSaveWrapper.copy_of(module, {layer: layer.get_base_layer() for layer in inside})
