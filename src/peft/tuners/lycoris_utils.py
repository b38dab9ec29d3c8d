# SPDX-License-Identifier: Apache-2.0
"""Code that LyCORIS methods share: alpha scaling, patterns by module, rank and module dropout.

Source: arXiv:2309.14859
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..config import LycorisConfig
from ..core.adapters import AdapterParameterDict
from ..core.base_layer import geometry
from ..core.layer import BaseTunerLayer
from ..core.method_info import AdapterCost
from ..core.parameter_layer import ParameterLayer
from ..core.tuner import BaseTuner
from ..ops.grouped import GroupedRows

__all__ = ["LycorisConfig", "LycorisLayer", "LycorisTuner"]


class _DropoutConfig(Protocol):
    """Dropout rates of an adapter."""

    rank_dropout: float
    module_dropout: float

    @property
    def rank_dropout_scale(self) -> bool: ...


C = TypeVar("C", bound=LycorisConfig)


class LycorisLayer(BaseTunerLayer):
    """A layer whose adapters are scaled by `alpha / r`. A method states its delta as `product`.

    Attributes:
        r, alpha: Rank and alpha by adapter name.
        rank_dropout: Probability that an output row of the delta is dropped in training.
        rank_dropout_scale: True if rank dropout divides by the share that is kept.
        module_dropout: Probability that a training forward goes without the adapter.
    """

    other_param_names: ClassVar[tuple[str, ...]] = (
        "r", "alpha", "scaling", "rank_dropout", "rank_dropout_scale", "module_dropout",
    )  # fmt: skip

    r: dict[str, int]
    alpha: dict[str, float]
    rank_dropout: dict[str, float]
    rank_dropout_scale: dict[str, bool]
    module_dropout: dict[str, float]

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        for name in self.container_names:
            setattr(self, name, AdapterParameterDict())
        for name in self.value_names:
            setattr(self, name, {})

    def set_hyperparameters(
        self, adapter_name: str, config: _DropoutConfig, r: int, alpha: float
    ) -> None:
        """Record an adapter's rank, scale and dropout rates."""
        self.r[adapter_name] = r
        self.alpha[adapter_name] = alpha
        self.rank_dropout[adapter_name] = config.rank_dropout
        self.rank_dropout_scale[adapter_name] = config.rank_dropout_scale
        self.module_dropout[adapter_name] = config.module_dropout
        self.scaling[adapter_name] = self.base_scaling(adapter_name)

    def base_scaling(self, adapter_name: str) -> float:
        """Return `alpha / r`."""
        return self.alpha[adapter_name] / self.r[adapter_name]

    def product(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return `ΔW x`, without dropout."""
        raise NotImplementedError

    def delta_activations(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return `ΔW x`, in training with rank and module dropout."""
        delta = self.product(adapter_name, x)
        if not self.training:
            return delta
        return self.drop_module(adapter_name, self.drop_rows(adapter_name, delta))

    def drops(self, adapter_name: str) -> bool:
        """Return whether dropout changes the delta now."""
        return self.training and bool(
            self.rank_dropout[adapter_name] or self.module_dropout[adapter_name]
        )

    def drop_rows(self, adapter_name: str, delta: Tensor) -> Tensor:
        """Apply rank dropout. Dropping a row of ΔW is dropping an output feature of the delta."""
        if p := self.rank_dropout[adapter_name]:
            spatial = len(self.geometry.kernel_size)
            features = delta.shape[-1 - spatial]
            keep = (torch.rand(features, device=delta.device) >= p).to(delta.dtype)
            if self.rank_dropout_scale[adapter_name]:
                keep = keep / keep.mean().clamp_min(1 / len(keep))
            delta = delta * keep.view(-1, *[1] * spatial)
        return delta

    def drop_module(self, adapter_name: str, delta: Tensor) -> Tensor:
        """Apply module dropout. A dropped module is multiplied by zero and not skipped, so that
        every parameter has a gradient on every process, and nothing waits for the device.
        """
        if p := self.module_dropout[adapter_name]:
            delta = delta * (torch.rand((), device=delta.device) >= p).to(delta.dtype)
        return delta


class LycorisParameters(ParameterLayer, LycorisLayer):
    """A layer around a module with adapters of a LyCORIS method on one of its parameters; those of
    a stack have each tensor of a linear layer `[experts, …]`.
    """

    def update_layer(
        self, adapter_name: str, config: Any, initialize: bool = True, **options: Any
    ) -> None:
        """Make an adapter's tensors by its config, in place of any that it has."""
        super().update_layer(adapter_name, config, initialize=False, **options)
        for container in self._own_containers(adapter_name) if self.is_stacked else ():
            tensor = container._parameters[adapter_name]
            assert tensor is not None
            shape = (self.num_experts, *tensor.shape)
            container[adapter_name] = nn.Parameter(tensor.new_empty(shape))
        if initialize:
            self.reset_adapter_parameters(adapter_name, config.init_weights)

    def reset_adapter_parameters(self, adapter_name: str, init_weights: bool | str = True) -> None:
        """Draw an adapter's tensors again, those of each expert as those of a linear layer."""
        for expert in range(self.num_experts):
            with self._as_expert(adapter_name, expert):
                super().reset_adapter_parameters(adapter_name, init_weights)  # type: ignore[misc]

    def adapter_cost(self, adapter_name: str, config: object) -> AdapterCost:
        """Return the cost for a row, which goes to one expert."""
        with self._as_expert(adapter_name, 0):
            return super().adapter_cost(adapter_name, config)

    @contextmanager
    def _as_expert(self, adapter_name: str, expert: int) -> Iterator[None]:
        """Context in which an adapter has the tensors of one expert, in the memory of the stack."""
        containers = self._own_containers(adapter_name) if self.is_stacked else []
        stacks = [container._parameters[adapter_name] for container in containers]
        try:
            for container, stack in zip(containers, stacks, strict=True):
                assert stack is not None
                own = nn.Parameter(stack.data[expert], stack.requires_grad)
                container._parameters[adapter_name] = own
            yield
        finally:
            for container, stack in zip(containers, stacks, strict=True):
                container._parameters[adapter_name] = stack

    def _own_containers(self, adapter_name: str) -> list[AdapterParameterDict]:
        """Return the containers with a tensor of an adapter."""
        own = [c for c in self.containers() if isinstance(c, AdapterParameterDict)]
        return [container for container in own if adapter_name in container._parameters]

    def forward_delta(self, adapter_name: str) -> Tensor:
        """Return the dense delta in the parameter's layout, in training with dropout."""
        delta = super().forward_delta(adapter_name)
        if not self.drops(adapter_name):
            return delta
        turned = self.geometry.transposed
        delta = self._dropped(adapter_name, delta if turned else delta.mT)  # features come last
        return delta if turned else delta.mT

    def expert_delta(self, adapter_name: str, x: Tensor, rows: GroupedRows) -> Tensor:
        """Return the delta of rows that are sorted by expert, in training with dropout."""
        delta = self.expert_product(adapter_name, x, rows)
        return self._dropped(adapter_name, delta) if self.drops(adapter_name) else delta

    def expert_product(self, adapter_name: str, x: Tensor, rows: GroupedRows) -> Tensor:
        """Return the delta of rows that are sorted by expert, without dropout."""
        return super().expert_delta(adapter_name, x, rows)

    def _dropped(self, adapter_name: str, delta: Tensor) -> Tensor:
        return self.drop_module(adapter_name, self.drop_rows(adapter_name, delta))


class LycorisTuner(BaseTuner[C]):
    """A model with adapters of a LyCORIS method, which adapts linear layers and convolutions."""

    # Classes of layers by the number of axes of the kernel.
    layer_classes: ClassVar[tuple[type[LycorisLayer], ...]]
    supported_modules: ClassVar[str] = (
        "nn.Linear (also quantized), Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d and "
        "nn.MultiheadAttention"
    )

    def tuner_layer_class(self, config: C, module: nn.Module) -> type[LycorisLayer] | None:
        """Return the class of layer for the module's number of kernel axes."""
        size = geometry(module)
        return None if size is None else self.layer_classes[len(size.kernel_size)]
