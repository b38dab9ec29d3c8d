# SPDX-License-Identifier: Apache-2.0
"""Parameters with adapters: whoever reads the parameter from its module gets `W + ΔW`.

A module computes with its parameters in ways that no wrapper can know. So the module itself gets a
class of its own in which a targeted parameter is a property. Layers around the module hold the
adapters (`parameter_layer.py`), and for the experts of transformers the dense sum is avoided
(`fused_experts.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..base.calls.layout import RowLayout
from ..base.calls.stack import CallStack
from ..base.errors import PeftNotSupportedError
from ..integrations.distributed import is_distributed, is_flattened, is_unreadable
from ..ops.dispatch import is_eager
from ..ops.grouped import GroupedRows

# Name of a module's attribute with the layers of each targeted parameter, the innermost first.
_LAYERS = "_parameter_layers"

# Sums that were computed during a call of a module, which may read a parameter once an expert.
_SUMS: CallStack[dict[tuple[int, str], Tensor]] = CallStack()


class AdaptingLayer(Protocol):
    """The members of a layer around a module that calls of the module use."""

    depends_on_sample: ClassVar[bool]
    is_stacked: bool
    scaling: dict[str, float]

    @property
    def layout(self) -> RowLayout:
        """The layout of the module's input."""

    @property
    def disable_adapters(self) -> bool:
        """True if the adapters are switched off."""

    def get_param(self) -> Tensor:
        """Return the parameter without adapters."""

    def acting(self) -> Sequence[str]:
        """Return the adapters whose deltas the parameter gets now."""

    def forward_delta(self, adapter_name: str) -> Tensor:
        """Return the dense delta in the parameter's layout, as a forward adds it."""

    def expert_delta(self, adapter_name: str, x: Tensor, rows: GroupedRows) -> Tensor:
        """Return the delta of rows that are sorted by expert."""


def layers_of(module: nn.Module) -> dict[str, list[AdaptingLayer]]:
    """Return the layers around a module by the parameter that they adapt."""
    return vars(module).get(_LAYERS, {})


def parameter_names(module: nn.Module) -> list[str]:
    """Return the names of a module's own parameters, computed ones last."""
    computed: list[str] = []
    if parametrize.is_parametrized(module):
        computed = list(cast(nn.ModuleDict, module.parametrizations))
    return [name for name, value in module._parameters.items() if value is not None] + computed


def plain_parameter(module: nn.Module, name: str) -> Tensor:
    """Return a parameter as it is without adapters, parametrizations of others applied."""
    if name in module._parameters:
        return cast(Tensor, module._parameters[name])
    kind = _plain_class(type(module))
    found = getattr(kind, name, None)
    if isinstance(found, property) and found.fget is not None:
        return cast(Tensor, found.fget(module))
    return cast(Tensor, vars(module)[name])


def parameter_shape(module: nn.Module, name: str) -> tuple[int, ...]:
    """Return a parameter's shape, also where DeepSpeed ZeRO-3 has emptied it."""
    parameter = plain_parameter(module, name)
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def attach(module: nn.Module, name: str, layers: Iterable[AdaptingLayer]) -> None:
    """Make a parameter of a module read as the sum with these layers' deltas."""
    held = vars(module).setdefault(_LAYERS, {})
    is_new = name not in held
    held[name] = list(layers)
    if is_new:
        names = {*vars(type(module)).get("_adapted_names", ()), name}
        kind: type = _plain_class(type(module))
        module.__class__ = _adapted_class(kind, tuple(sorted(names)))


def detach(module: nn.Module) -> None:
    """Give a module its class and its plain parameters back."""
    if vars(module).pop(_LAYERS, None) is not None:
        module.__class__ = _plain_class(type(module))


def _plain_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class below that with adapted parameters, if it is one."""
    return kind.__mro__[1] if "_adapted_names" in vars(kind) else kind


@contextmanager
def shared_sums() -> Iterator[None]:
    """Context of a call of a module, in which each sum is computed once."""
    if is_eager():
        with _SUMS.during({}):
            yield
    else:
        yield


def read(module: nn.Module, name: str) -> Tensor:
    """Return a parameter plus the deltas of its layers, in the parameter's dtype.

    A parameter that has its values elsewhere is returned as it is: engines that shard or offload it
    read it so before they bring them.

    Raises:
        PeftNotSupportedError: A forward reads a parameter that is spread over several processes.
    """
    sums = _SUMS.running if is_eager() else None
    key = id(module), name
    if sums is not None and key in sums:
        return sums[key]
    weight = result = plain_parameter(module, name)
    if is_distributed(weight) and sums is not None:
        raise PeftNotSupportedError(
            f"`{name}` of {type(module).__name__} is spread over several processes in a forward "
            "(tensor parallelism), where adapters of parameters are not supported."
        )
    if weight.is_meta or is_distributed(weight) or is_unreadable(weight):
        return weight
    for layer in layers_of(module).get(name, ()):
        for adapter_name in layer.acting():
            result = add_delta(result, layer.forward_delta(adapter_name))
    if sums is not None and result is not weight:
        sums[key] = result
    return result


def add_delta(weight: Tensor, delta: Tensor) -> Tensor:
    """Return `W + ΔW` in the dtype of `W`; a float8 sum is clamped to the dtype's range, beyond
    which a cast gives NaN.
    """
    if weight.dtype.itemsize > 1:
        return weight + delta.to(weight.dtype)
    limits = torch.finfo(weight.dtype)
    total = weight.to(delta.dtype) + delta
    return total.clamp(limits.min, limits.max).to(weight.dtype)


@cache
def _adapted_class(plain: type, names: tuple[str, ...]) -> type[nn.Module]:
    """Return a subclass in which some parameters are properties; the same for the same arguments,
    so that compiled code serves all layers.
    """

    def reduce(self: nn.Module, protocol: int) -> tuple[object, ...]:
        return (_empty, (plain, names), *cast(Any, nn.Module.__reduce_ex__(self, 2))[2:])

    members: dict[str, object] = {name: _property(name) for name in names}
    members |= {"_adapted_names": names, "__reduce_ex__": reduce, "__module__": plain.__module__}
    members |= {"__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return type(plain.__name__, (plain,), members)


def _empty(plain: type, names: tuple[str, ...]) -> nn.Module:
    """Return an object to unpickle or copy a module with adapted parameters into."""
    kind = _adapted_class(plain, names)
    return kind.__new__(kind)


def _property(name: str) -> property:
    """Return the property of a parameter. Sharding engines put plain tensors in its place and
    delete them again, as of an attribute.
    """

    def get(self: nn.Module) -> Tensor:
        parameter = self._parameters.get(name)
        if name not in vars(self):
            if parameter is None and not parametrize.is_parametrized(self, name):
                raise AttributeError(name)
            if is_flattened(parameter):  # between calls, FSDP1 looks for its own parameter
                return cast(Tensor, parameter)
        return read(self, name)

    def put(self: nn.Module, value: object) -> None:
        vars(self)[name] = value

    def delete(self: nn.Module) -> None:
        if vars(self).pop(name, None) is None:
            raise AttributeError(name)

    return property(get, put, delete)


class ParameterView(nn.Module):
    """A parameter of a module as the `weight` of a linear layer, for code that merges into one.

    Args:
        module: The module.
        name: The parameter's name.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        vars(self).update(owner=module, parameter=name, _parameters=_OneParameter(module, name))

    @property
    def out_features(self) -> int:
        """Rows of the parameter as a matrix, those of all experts one below the other."""
        rows = 1
        for size in parameter_shape(self.owner, self.parameter)[:-1]:
            rows *= size
        return rows

    @property
    def in_features(self) -> int:
        """Columns of the parameter as a matrix."""
        return parameter_shape(self.owner, self.parameter)[-1]

    def __getattr__(self, name: str) -> Any:
        """Return the parameter as `weight`, also where its module computes it."""
        if name == "weight" and "weight" not in self._parameters:
            return plain_parameter(self.owner, self.parameter)
        return super().__getattr__(name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ParameterView) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[int, str]:
        return id(self.owner), self.parameter


class _OneParameter(MutableMapping[str, "nn.Parameter | None"]):
    """A module's parameters with one of them alone, under the name `weight`."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name

    def _key(self, key: str) -> str:
        if key != "weight" or self.name not in self.module._parameters:
            raise KeyError(key)
        return self.name

    def __getitem__(self, key: str) -> nn.Parameter | None:
        return self.module._parameters[self._key(key)]

    def __setitem__(self, key: str, value: nn.Parameter | None) -> None:
        self.module._parameters[self._key(key)] = value

    def __delitem__(self, key: str) -> None:
        del self.module._parameters[self._key(key)]

    def __iter__(self) -> Iterator[str]:
        return iter(["weight"] if self.name in self.module._parameters else [])

    def __len__(self) -> int:
        return int(self.name in self.module._parameters)
