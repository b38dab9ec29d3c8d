# SPDX-License-Identifier: Apache-2.0
"""The adapters of a layer: containers for their tensors, and functions on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from itertools import islice
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..base.containers import AdapterContainer
from ..base.errors import PeftNotSupportedError, PeftRuntimeError
from ..integrations.accelerate import end_offloading, is_offloaded
from ..integrations.distributed import check_whole, gathered_tensor, is_managed, is_sharded
from ..ops.dispatch import are_unhooked


class AdapterParameterDict(AdapterContainer, nn.ParameterDict):
    """Parameters by adapter name, read by a call: `self.lokr_w1(adapter_name)`.

    Libraries that move weights in just before a forward (offloading, sharding) hook into the calls
    of modules. A plain `ParameterDict` is read without a call, and so without its weights. Where no
    library has hooked in, the call is skipped.
    """

    __module__ = "peft.tuners.tuners_utils"  # where pickles look for it

    def __delitem__(self, adapter_name: str) -> None:
        held = self._parameters.get(adapter_name)
        super().__delitem__(adapter_name)
        if held is not None and is_managed(held):
            # An engine has noted the parameter's place here, where it looks for it, and puts it
            # back in each call.
            held.requires_grad_(False)
            self._parameters[adapter_name] = held

    def make_room(self, adapter_name: str, entry: object) -> None:
        """Check that no engine will put the parameter of a deleted adapter in the entry's place."""
        if is_managed(self._parameters.get(adapter_name)) and adapter_name not in self._keys:
            raise PeftRuntimeError(
                f"An engine that shards the model still holds the parameters of adapter "
                f"{adapter_name}, which was deleted; choose another name."
            )

    def __call__(self, adapter_name: str) -> Tensor:
        """Return an adapter's parameter, as `forward` does."""
        if are_unhooked((self,), AdapterParameterDict) and not torch.compiler.is_compiling():
            parameter = self._parameters.get(adapter_name)
            if type(parameter) is nn.Parameter:
                return parameter
        return nn.Module.__call__(self, adapter_name)

    def get(self, adapter_name: str) -> Tensor | None:  # type: ignore[override]
        """Return an adapter's parameter, read by a call; None if it has none here."""
        return self(adapter_name) if adapter_name in self._keys else None

    def extra_repr(self) -> str:
        """Show the shapes of the first adapters."""
        shapes = [
            f"{name}={'x'.join(map(str, p.shape)) or 'scalar'}"
            for name, p in islice(self._parameters.items(), 3)
            if p is not None
        ]
        return ", ".join(shapes) + (f" and {len(self) - 3} more" if len(self) > 3 else "")

    def forward(self, adapter_name: str) -> Tensor:
        """Return an adapter's parameter, gathered where it is sharded."""
        parameter = gathered_tensor(self[adapter_name])
        # FSDP2, told to shard this container by itself, changes its class and frees the memory
        # after this call.
        return parameter if type(self) is AdapterParameterDict else parameter.clone()


def read(adapter_name: str, containers: Sequence[AdapterParameterDict]) -> list[Tensor]:
    """Return an adapter's parameters, one of each container; check once for hooks."""
    return read_optional(adapter_name, containers)  # type: ignore[return-value]


def read_optional(
    adapter_name: str, containers: Sequence[AdapterParameterDict]
) -> list[Tensor | None]:
    """Return an adapter's parameters, None of a container without one; check once for hooks."""
    if torch.compiler.is_compiling():
        return [container.get(adapter_name) for container in containers]
    found: list[Tensor | None] = [c._parameters.get(adapter_name) for c in containers]
    held = []
    for container, parameter in zip(containers, found, strict=True):
        if type(parameter) is nn.Parameter:
            held.append(container)
        elif adapter_name in container._keys:  # held elsewhere by a sharding engine until a call
            break
    else:
        if are_unhooked(held, AdapterParameterDict):
            return found
    return [container.get(adapter_name) for container in containers]


class _Layer(Protocol):
    """The members of a layer that this file uses, as `BaseTunerLayer` has them."""

    container_names: ClassVar[tuple[str, ...]]
    value_names: ClassVar[tuple[str, ...]]
    scaling: dict[str, float]

    def containers(self) -> Iterable[nn.Module]: ...


def unfrozen(layer: _Layer) -> list[str]:
    """Return the names of adapters with a trainable parameter, by one flag of each parameter."""
    found: dict[str, None] = {}
    for container in layer.containers():
        parameters, modules = container._parameters, container._modules
        for name in layer.scaling if parameters else ():
            parameter = parameters.get(name)
            if parameter is not None and parameter.requires_grad:
                found[name] = None
        for name in layer.scaling if modules else ():
            module = modules.get(name)
            if module is not None and _is_trainable(module):
                found[name] = None
    return list(found)


def tensors_of(layer: _Layer, adapter_name: str) -> Iterator[Tensor]:
    """Yield all tensors of an adapter, trainable or not."""
    for container in layer.containers():
        entry = container._modules.get(adapter_name)
        if entry is not None:
            yield from entry.parameters()
        elif adapter_name in container:  # type: ignore[operator]
            yield container[adapter_name]  # type: ignore[index]


def lacks_values(layer: _Layer, adapter_name: str) -> bool:
    """Return whether an adapter is on the meta device, and not because it is offloaded."""
    for container in layer.containers():
        if not is_offloaded(container):
            entry = container._modules.get(adapter_name, container._parameters.get(adapter_name))
            tensors = entry.parameters() if isinstance(entry, nn.Module) else [entry]
            if any(tensor is not None and tensor.is_meta for tensor in tensors):
                return True
    return False


def check_readable(layer: _Layer, adapter_name: str) -> None:
    """Check that the values of an adapter's tensors can be read here.

    Raises:
        PeftRuntimeError: An engine holds them elsewhere.
        PeftNotSupportedError: Its modules were quantized.
    """
    check_whole(tensors_of(layer, adapter_name))
    for attribute in layer.container_names:
        entry = getattr(layer, attribute)._modules.get(adapter_name)
        for module in () if entry is None else entry.modules():
            if callable(getattr(module, "weight", None)):  # `quantize_dynamic` makes a method of it
                raise PeftNotSupportedError(
                    f"`{attribute}` of adapter {adapter_name} is quantized, by `quantize_dynamic` "
                    "for example; read, merge or convert the adapter before you quantize the model."
                )


def check_unsharded(layers: Mapping[str, _Layer], adapter_name: str, action: str) -> None:
    """Check that no engine has sharded an adapter's tensors, which an action, "add skills",
    replaces.
    """
    for path, layer in layers.items():
        if any(map(is_sharded, tensors_of(layer, adapter_name))):
            raise PeftRuntimeError(
                f"`{path}`: an engine has sharded adapter {adapter_name}; {action} before that."
            )


def adopt(layer: _Layer, fresh: _Layer) -> None:
    """Move the adapters of another layer, made for the same base layer, into this one."""
    for own, other in zip(_by_adapter(layer), _by_adapter(fresh), strict=True):
        if isinstance(own, nn.Module):
            end_offloading(own)
        for adapter_name, entry in other.items():
            own[adapter_name] = entry


def make_room(layer: _Layer, fresh: _Layer) -> None:
    """Take the memory that `adopt` will need, so that it can't fail."""
    for own, other in zip(_by_adapter(layer), _by_adapter(fresh), strict=True):
        if isinstance(own, AdapterContainer):
            for adapter_name, entry in other.items():
                own.make_room(adapter_name, entry)


def drop(layer: _Layer, adapter_name: str) -> None:
    """Delete an adapter's tensors, values and scale."""
    for entries in _by_adapter(layer):
        if adapter_name in entries:
            del entries[adapter_name]


def _by_adapter(layer: _Layer) -> Iterator[MutableMapping[str, object]]:
    """Yield the containers and dictionaries of a layer that have an entry for each adapter."""
    for attribute in (*layer.container_names, *layer.value_names, "scaling", "unpadded_sizes"):
        yield getattr(layer, attribute)


def _is_trainable(module: nn.Module) -> bool:
    """Return whether a module has a trainable parameter."""
    for parameter in module._parameters.values():
        if parameter is not None and parameter.requires_grad:
            return True
    children = module._modules
    return bool(children) and any(
        child is not None and _is_trainable(child) for child in children.values()
    )
