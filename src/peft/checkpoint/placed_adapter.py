# SPDX-License-Identifier: Apache-2.0
"""An adapter in a model: its layers, and its tensors by checkpoint key."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ..base.constants import MODEL_ROOT
from ..base.containers import walk
from ..integrations.distributed import state_tensors, unwrapped_name
from .keys import adapter_tensors, checkpoint_keys, in_view
from .protocols import AdapterConfig, AdapterLayer, Tuner, tuner_class
from .rank_padding import RankPadding, Unpadded

# Stands for any container, where the path of a layer is looked up.
_ANY = "container"


class Position(NamedTuple):
    """The layer's path and the container's name of a tensor."""

    path: str
    container: str


class PlacedAdapter:
    """An adapter in a model.

    Attributes:
        tuner: The tuner of its method.
        root: Prefix of its modules' keys.
        layers: Its layers by path.
    """

    def __init__(self, model: nn.Module, name: str, config: AdapterConfig) -> None:
        self.model, self.name, self.config = model, name, config
        self.tuner: Tuner = tuner_class(config).of(model, config)
        self.root = "" if self.tuner.model is model else MODEL_ROOT
        self.layers: dict[str, AdapterLayer] = {}
        own = {
            f"{unwrapped_name(path)}.{_ANY}.{name}": layer
            for path, layer in self.tuner.named_tuner_layers()
            if name in layer.scaling
        }
        for tensor, key in checkpoint_keys(own, name, (_ANY,), ()).items():
            self.layers[key.removesuffix(f".{_ANY}")] = own[tensor]

    def tensors(self, embeddings: bool = False) -> dict[str, Tensor]:
        """Return the adapter's tensors by checkpoint key, with all token embeddings if asked."""
        named = state_tensors(self.model, in_view(self.config, self.name))
        return adapter_tensors(named.items(), self.config, self.name, embeddings)

    def position(self, key: str) -> Position | None:
        """Return the layer and container of a tensor; None if it belongs to no layer."""
        parts = key.removeprefix(self.root).split(".")
        containers = self.tuner.tuner_layer_cls.container_names
        found = next((i for i, part in enumerate(parts) if part in containers), None)
        return None if found is None else Position(".".join(parts[:found]), parts[found])

    def padding(self, key: str) -> RankPadding | None:
        """Return the rank dimension of a tensor; None if it can't be padded."""
        position = self.position(key)
        if position is None or position.path not in self.layers:
            return None
        return self.layers[position.path].rank_padding(position.container)

    def set_unpadded(self, key: str, size: Unpadded) -> None:
        """Record the unpadded size of a tensor, unless it was padded before."""
        position = self.position(key)
        if position is not None:
            sizes = self.layers[position.path].unpadded_sizes.setdefault(self.name, {})
            sizes.setdefault(position.container, size)

    def correct_sizes(self) -> None:
        """Set `in_features`, `out_channels`, … of modules in containers by their weights."""
        containers = [
            getattr(layer, name) for layer in self.layers.values() for name in layer.container_names
        ]
        for module in (module for c in containers for _, module in walk(c, (self.name,))):
            if isinstance(module, nn.Linear) and module.weight.dim() == 2:
                module.out_features, module.in_features = module.weight.shape
            elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.weight.dim() > 2:
                module.out_channels = module.weight.shape[0]
                module.in_channels = module.weight.shape[1] * module.groups
