# SPDX-License-Identifier: Apache-2.0
"""`plan`: size, cost and rank of an adapter before it is made. It works on the meta device and
changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from .base.registry import PEFT_TYPE_TO_TUNER_MAPPING, PeftType, lookup
from .base.tables import alike, counted, linear_map, sizes, table
from .config import PeftConfig, check_config
from .core import plan as _plan
from .core.base_layer import innermost
from .core.injection import Build, Construction, build_adapter, prepared
from .core.layer import BaseTunerLayer
from .core.parameter_layer import ParameterLayer
from .core.tuner import BaseTuner


@dataclass
class LayerPlan:
    """An adapter on one layer, as planned.

    Args:
        path: The layer's path.
        layer: The layer's class and size.
        tensors: Shapes of the adapter's tensors by name.
        parameters: Number of the adapter's parameters.
        bytes: Their size in memory.
        multiplications: Multiplications that the adapter adds for each row of the layer's input,
            or position of a convolution's output.
        base_multiplications: Multiplications of the layer itself.
        rank: Largest rank that the delta can have.
        full_rank: Largest rank that the layer's weight can have.
        remarks: Sentences about options that probably do not have the intended effect.
    """

    path: str
    layer: str
    tensors: dict[str, tuple[int, ...]]
    parameters: int
    bytes: int
    multiplications: int
    base_multiplications: int
    rank: int
    full_rank: int
    remarks: tuple[str, ...] = ()


@dataclass(repr=False)
class AdapterPlan:
    """An adapter on a model, as planned. Print it for a table.

    In the table, layers that are adapted alike and differ only by a number in their path share a
    row: `layers.*.q_proj` stands for all such layers of the model, `layers.{0-3,7}.q_proj` for
    some.

    Args:
        method: The method's name.
        layers: The adapter on each layer.
        shared: Number of elements, by name, of tensors that belong to no single layer: parameters
            shared by all layers, modules to save, trainable rows of embeddings.
        bytes: Size of the adapter in memory.
        base_parameters: Number of the model's parameters.
        module_paths: Paths of the model's modules.
    """

    method: str
    layers: list[LayerPlan] = field(default_factory=list)
    shared: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    base_parameters: int = 0
    module_paths: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(layer.parameters for layer in self.layers) + sum(self.shared.values())

    @property
    def multiplications(self) -> int:
        """Multiplications of the adapter in all layers, for one row through each."""
        return sum(layer.multiplications for layer in self.layers)

    @property
    def base_multiplications(self) -> int:
        """Multiplications of the adapted layers themselves."""
        return sum(layer.base_multiplications for layer in self.layers)

    @property
    def remarks(self) -> dict[str, list[str]]:
        """Paths of the layers that each remark is about."""
        result: dict[str, list[str]] = {}
        for layer in self.layers:
            for remark in layer.remarks:
                result.setdefault(remark, []).append(layer.path)
        return result

    def to_dict(self) -> dict[str, object]:
        """Return the plan as values of JSON."""
        return {
            "method": self.method,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "base_parameters": self.base_parameters,
            "multiplications": self.multiplications,
            "base_multiplications": self.base_multiplications,
            "shared": self.shared,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        heading = ("module", "layer", "factors", "parameters", "FLOPs a row", "rank")
        lines = [table([heading, *alike(self._cells(), self.module_paths)])]
        lines += [f"{name}: {numbers:,} parameters" for name, numbers in self.shared.items()]
        share = self.parameters / max(self.base_parameters, 1)
        layers = counted(len(self.layers), "layer")
        work = self.multiplications / max(self.base_multiplications, 1)
        lines.append(
            f"{self.method} on {layers}: {self.parameters:,} parameters ({share:.2%} of the "
            f"model's), {self.bytes:,} bytes; FLOPs a row {2 * self.multiplications:,} "
            f"({work:.1%} of those layers' own)"
        )
        for remark, paths in self.remarks.items():
            where = f"`{paths[0]}`" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
            lines.append(f"! {where}: {remark}")
        return "\n".join(lines)

    def _cells(self) -> dict[str, tuple[str, ...]]:
        """Return the other cells of each layer's row, by path."""
        return {
            plan.path: (
                plan.layer,
                ", ".join(f"{name} {sizes(shape)}" for name, shape in plan.tensors.items()),
                f"{plan.parameters:,}",
                f"{2 * plan.multiplications:,}",
                f"{plan.rank} of {plan.full_rank}",
            )
            for plan in self.layers
        }

    def __repr__(self) -> str:
        return (
            f"<AdapterPlan: {self.method} on {counted(len(self.layers), 'layer')}, "
            f"{self.parameters:,} parameters, {self.bytes:,} bytes; print it for a table>"
        )

    def _repr_pretty_(self, printer: _Printer, cycle: bool) -> None:
        """Show the table in a notebook."""
        printer.text(str(self))


class _Printer(Protocol):
    """The printer that IPython passes to `_repr_pretty_`."""

    def text(self, text: str) -> None: ...


def plan(model: nn.Module, config: PeftConfig, adapter_name: str = "default") -> AdapterPlan:
    """Plan an adapter without making it: count its tensors, parameters, bytes, FLOPs and largest
    rank, for each layer and in total. Remarks name options that probably do not have the intended
    effect.

    Nothing is allocated, and neither model nor config is changed. A model on the meta device gives
    the same plan as a loaded one.

    Args:
        model: A base model, on any device.
        config: A config of any method.
        adapter_name: The adapter's name.

    Returns:
        A plan, to print or to read.

    Raises:
        PeftTypeError: `config` is not a config.
        PeftValueError: The config is invalid or does not fit the model, as for `get_peft_model`.

    Example:
        >>> from peft import LoKrConfig, plan
        >>> with torch.device("meta"):
        ...     model = nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 64))
        >>> print(plan(model, LoKrConfig(r=8, target_modules=["0", "2"])))  # doctest: +ELLIPSIS
        module  layer ...
        0       Linear 4096->4096  lokr_w1 64x64, lokr_w2_a 64x8, lokr_w2_b 8x64  5,120  196,608 ...
        2       Linear 4096->64    lokr_w1 8x64, lokr_w2_a 8x8, lokr_w2_b 8x64    1,088  ...
        LOKR on 2 layers: 6,208 parameters (0.04% of the model's), 24,832 bytes; FLOPs a row ...
    """
    check_config(config)
    config = config.for_adapter()
    tuner: BaseTuner = lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type)(model, None)
    with prepared(tuner, config, keep=False):
        return _adapter_plan(tuner, adapter_name, config)


def _adapter_plan(tuner: BaseTuner, adapter_name: str, config: PeftConfig) -> AdapterPlan:
    """Return the plan of an adapter in a model that is ready for it."""
    model = tuner.model
    targets = _plan.make(tuner, adapter_name, config)
    build = build_adapter(tuner, targets, Construction(device=torch.device("meta")))
    tensors = {id(tensor): tensor for _, tensor in build.named_tensors()}
    return AdapterPlan(
        method=PeftType(config.peft_type).value,
        layers=[
            _layer_plan(path, layer, adapter_name, config) for path, layer in build.named_layers()
        ],
        shared=_shared(build),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        base_parameters=sum(parameter.numel() for parameter in model.parameters()),
        module_paths=(*_plan.own_modules(model), *(target.key for target in targets.parameters)),
    )


def _layer_plan(
    path: str, layer: BaseTunerLayer, adapter_name: str, config: PeftConfig
) -> LayerPlan:
    size, cost = layer.geometry, layer.adapter_cost(adapter_name, config)
    tensors = dict(_named_tensors(layer, adapter_name))
    return LayerPlan(
        path=path,
        layer=_kind(layer),
        tensors={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        multiplications=cost.multiplications,
        base_multiplications=size.out_features * size.columns,
        rank=cost.rank,
        full_rank=min(size.out_features, size.columns),
        remarks=cost.remarks,
    )


def _named_tensors(layer: BaseTunerLayer, adapter_name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield an adapter's tensors in a layer, by the names of container and parameter."""
    for attribute in layer.container_names:
        container = getattr(layer, attribute)
        if adapter_name not in container:
            continue
        entry = container[adapter_name]
        if isinstance(entry, nn.Module):
            for name, parameter in entry.named_parameters():
                yield f"{attribute}.{name}", parameter
        else:
            yield attribute, entry


def _kind(layer: BaseTunerLayer) -> str:
    """Return a layer's class and size in words: "Conv2d 4->8 3x3"."""
    size = layer.geometry
    is_stack = isinstance(layer, ParameterLayer) and layer.is_stacked
    experts = f"{layer.num_experts}x " if is_stack else ""
    kind = type(innermost(layer)).__name__
    return f"{kind} {experts}{linear_map(size.in_features, size.out_features, size.kernel_size)}"


def _shared(build: Build) -> dict[str, int]:
    """Return `AdapterPlan.shared` of a finished adapter."""
    shared = {name: parameter.numel() for name, parameter in build.shared.items()}
    copies = {
        path: sum(p.numel() for p in module.parameters()) for path, module in build.copies.items()
    }
    rows = {f"rows of {path}": tokens.rows.numel() for path, tokens in build.tokens.items()}
    return {**shared, **copies, **rows}
