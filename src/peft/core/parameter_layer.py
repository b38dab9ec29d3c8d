# SPDX-License-Identifier: Apache-2.0
"""`ParameterLayer`: a layer around a module that adapts one of the module's parameters.

A parameter `[out, in]` is a linear layer. A parameter `[experts, out, in]` is as many linear layers
of one size, and an adapter has the tensors of each, stacked. A method mixes this class into its own
layer and supplies `delta_recipe` for stacked tensors and, to avoid the dense delta, `expert_delta`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..base.calls.adapter_batch import ADAPTER_BATCHES
from ..base.errors import PeftNotSupportedError, PeftValueError, UnsupportedModuleError
from ..base.geometry import Geometry
from ..base.tables import sizes
from ..ops.dispatch import without_autocast
from ..ops.grouped import GroupedRows
from .adapted_parameters import ParameterView, parameter_shape, plain_parameter
from .base_layer import innermost
from .fused_experts import interface_names, run
from .layer import BaseTunerLayer
from .merges import Merges


class ParameterLayer(BaseTunerLayer):
    """A layer around a module that adapts one of the module's parameters: whoever reads it there
    gets `W + Σ Δ` over the active adapters.

    Several such layers may lie around one module, one inside the other.

    Args:
        base_layer: The module, or the layer around it for another parameter or method.
        adapter_name: The first adapter's name.
        config: Its config.
        parameter_name: The parameter's name in the module.
        **options: Arguments of `update_layer`.

    Attributes:
        parameter_name: The parameter's name in the module.
        num_experts: The first dimension of a parameter `[experts, …]`; 1 for a matrix.
        is_stacked: True for a parameter `[experts, …]`.
    """

    num_experts: int
    is_stacked: bool
    parameter_name: str
    # True for a method whose deltas depend on the sample.
    depends_on_sample: ClassVar[bool] = False

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: Any,
        parameter_name: str,
        **options: Any,
    ) -> None:
        self.parameter_name = parameter_name
        super().__init__(base_layer, adapter_name, config, **options)  # type: ignore[call-arg]

    def note_base(self, base_layer: nn.Module) -> None:
        """Note size and merges of the parameter."""
        module = innermost(base_layer)
        self.geometry = size = parameter_geometry(module, self.parameter_name)
        self.in_features, self.out_features = size.in_features, size.out_features
        shape = parameter_shape(module, self.parameter_name)
        self.is_stacked = len(shape) == 3
        self.num_experts = shape[0] if self.is_stacked else 1
        self._expert_arguments = interface_names(type(module))
        inner = base_layer
        while isinstance(inner, ParameterLayer) and inner.parameter_name != self.parameter_name:
            inner = inner.base_layer
        self._merges = inner._merges if isinstance(inner, ParameterLayer) else Merges()

    @property
    def holder(self) -> nn.Module:
        """The parameter as the weight of a module, for merges."""
        return ParameterView(innermost(self), self.parameter_name)

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """True for an attention with one packed projection; torch's transformer layers ask."""
        return bool(innermost(self)._qkv_same_embed_dim)

    def __getitem__(self, key: Any) -> Any:
        """Return an item of a list or dictionary of parameters, plus the deltas."""
        return cast(Any, innermost(self))[key]

    def __iter__(self) -> Iterator[Any]:
        """Return an iterator over a list of parameters, plus the deltas, or a dictionary's keys."""
        return iter(cast(Any, innermost(self)))

    def __len__(self) -> int:
        """Return the number of items of a list or dictionary of parameters."""
        return len(cast(Any, innermost(self)))

    def __bool__(self) -> bool:
        """Return True, as of any module."""
        return True

    def get_param(self) -> Tensor:
        """Return the parameter, without adapters that are not merged."""
        return plain_parameter(innermost(self), self.parameter_name)

    def forward(self, *args: object, **kwargs: object) -> Any:
        """Run the module with the active adapters of all its parameters."""
        base: nn.Module = self._modules["base_layer"]
        if self._disable_adapters and self.merged_adapters:
            self._merges.suspend(self)
        if isinstance(base, ParameterLayer):
            return base(*args, **kwargs)
        return run(base, self._expert_arguments, args, kwargs)

    def acting(self) -> Sequence[str]:
        """Return the adapters whose deltas the parameter gets now.

        Raises:
            UnsupportedModuleError: The call chose different adapters for its samples, and the
                module reads one parameter for all.
        """
        if self._disable_adapters:
            return ()
        batch = ADAPTER_BATCHES.current
        if batch is not None and not self.merged_adapters:
            names = [name for name in batch.samples if name in self.scaling]
            if batch.only is None and names:
                raise self._mixed_batch()
            return names
        merged = self.merged_adapters
        return [n for n in self.active_adapters if n in self.scaling and n not in merged]

    def _mixed_batch(self) -> UnsupportedModuleError:
        """Return the error for a call with different adapters for its samples."""
        method = type(self).__module__.split(".")[-2]
        return UnsupportedModuleError(
            f"{method}.{type(self).__name__} does not support mixed adapter batches yet. "
            f"{type(innermost(self)).__name__} reads `{self.parameter_name}` once for all "
            "samples. Give all samples of a call the same adapter, or call the model with one "
            "sample at a time."
        )

    def forward_delta(self, adapter_name: str) -> Tensor:
        """Return the dense delta in the parameter's layout, as a forward adds it."""
        with without_autocast(self.get_param()):
            return self.delta_recipe(adapter_name).weight()

    def expert_delta(self, adapter_name: str, x: Tensor, rows: GroupedRows) -> Tensor:
        """Return the delta of rows that are sorted by expert, by default with the dense matrices.

        Args:
            adapter_name: The adapter.
            x: `[rows, in]`.
            rows: The expert and token of each row.
        """
        delta = self.delta_recipe(adapter_name).weight().to(x.dtype)
        return rows.product(x, delta if self.geometry.transposed else delta.mT)

    def check_mergeable(self, adapter_names: Sequence[str]) -> None:
        """Raise if the parameter can't be merged into."""
        if self.parameter_name not in innermost(self)._parameters:
            raise PeftNotSupportedError(
                f"{type(innermost(self)).__name__} computes `{self.parameter_name}` in each "
                "forward, so a delta merged into it would be lost; make it a parameter first."
            )
        super().check_mergeable(adapter_names)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return False: adapters of parameters are converted by their files' layout only."""
        return False

    def extra_repr(self) -> str:
        """Show the parameter's name and shape."""
        shape = sizes(parameter_shape(innermost(self), self.parameter_name))
        return f"parameter_name='{self.parameter_name}' ({shape})"


def parameter_geometry(module: nn.Module, name: str) -> Geometry:
    """Return the size of a parameter's linear map, or of one expert's if it is a stack.

    A stack is `[experts, out, in]`, or `[experts, in, out]` in a module with `is_transposed`.

    Raises:
        PeftValueError: It has neither two nor three dimensions, or an empty one.
    """
    shape = parameter_shape(module, name)
    if len(shape) not in (2, 3) or 0 in shape:
        raise PeftValueError(
            f"`{name}` has the shape {list(shape)}; adapters are for matrices and stacks of "
            "matrices, of two or three dimensions."
        )
    rows, columns = shape[-2:]
    if len(shape) == 3 and getattr(module, "is_transposed", False):
        return Geometry(columns, rows, transposed=True)
    return Geometry(rows, columns)


def stored(delta: Tensor, transposed: bool) -> Tensor:
    """Return deltas `[…, out, in]` in the layout of a parameter."""
    return delta.mT if transposed else delta


def stacked_product(transposed: bool, A: Tensor, B: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Return `scale · B·A` in a parameter's layout, with `A […, r, in]` and `B […, out, r]`."""
    return stored(torch.matmul(B, A) * scale, transposed)
