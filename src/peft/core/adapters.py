# SPDX-License-Identifier: Apache-2.0
"""`AdapterHolder`: the adapters of a layer, which of them are active and trainable, and how strong
they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..base.containers import AdapterContainer
from ..base.errors import PeftValueError
from ..base.freezing import TemporaryFreeze
from ..integrations.accelerate import end_offloading
from ..integrations.distributed import gathered_tensor
from ..ops.dispatch import are_unhooked


class AdapterParameterDict(AdapterContainer, nn.ParameterDict):
    """Parameters by adapter name, read by a call: `self.lokr_w1(adapter_name)`.

    Being called as a module is what lets libraries that move weights in just before a forward
    (offloading, sharding) see that they are needed; a plain `ParameterDict` is read behind their
    back. Where none has hooked in, there is nothing to see.
    """

    def __call__(self, adapter_name: str) -> Tensor:
        """Return an adapter's parameter, as `forward` does."""
        if are_unhooked((self,), AdapterParameterDict) and not torch.compiler.is_compiling():
            parameter = self._parameters.get(adapter_name)
            if type(parameter) is nn.Parameter:
                return parameter
        return nn.Module.__call__(self, adapter_name)

    def get(self, adapter_name: str) -> Tensor | None:  # type: ignore[override]
        """An adapter's parameter, read by a call; None if it has none here."""
        return self(adapter_name) if adapter_name in self._keys else None

    def extra_repr(self) -> str:
        """Show each adapter's shape; of thousands of adapters, the first."""
        shapes = [
            f"{name}={'x'.join(map(str, p.shape)) or 'scalar'}"
            for name, p in islice(self._parameters.items(), 3)
            if p is not None
        ]
        return ", ".join(shapes) + (f" and {len(self) - 3} more" if len(self) > 3 else "")

    def forward(self, adapter_name: str) -> Tensor:
        """Return an adapter's parameter, gathered where it is sharded."""
        own = type(self) is AdapterParameterDict
        # FSDP2, told to shard this container by itself, changes its class, and takes the memory
        # back after this call.
        parameter = gathered_tensor(self[adapter_name])
        return parameter if own else parameter.clone()


class AdapterHolder(nn.Module):
    """A module with a part for each of several adapters.

    Attributes:
        adapter_layer_names: Attributes that hold parameters or modules by adapter name, as the
            interface lists them for clients.
        other_param_names: Attributes that hold plain values by adapter name, likewise.
        container_names: All attributes of this layer that hold parameters or modules by adapter
            name; this package reads these. By default `adapter_layer_names`.
        value_names: All that hold plain values, but for `scaling`; by default `other_param_names`
            without it.
        scaling: Factor on each adapter's output, by name; its keys are the adapters there are.
        merged_adapters: Adapters whose delta is in the base weight at present, in the order they
            were merged.
    """

    adapter_layer_names: ClassVar[tuple[str, ...]] = ()
    other_param_names: ClassVar[tuple[str, ...]] = ()
    container_names: ClassVar[tuple[str, ...]] = ()
    value_names: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = vars(cls)
        if "adapter_layer_names" in own and "container_names" not in own:
            cls.container_names = cls.adapter_layer_names
        if "other_param_names" in own and "value_names" not in own:
            cls.value_names = tuple(name for name in cls.other_param_names if name != "scaling")

    def __init__(self) -> None:
        super().__init__()
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = []
        self._disable_adapters = False
        self._freeze = TemporaryFreeze()

    def base_scaling(self, adapter_name: str) -> float:
        """The factor that `scaling` starts from and `unscale_layer` returns to."""
        return 1.0

    @property
    def active_adapter(self) -> list[str]:
        """The same as `active_adapters`, by the name that diffusers' `model.active_adapters()`
        reads.
        """
        return self.active_adapters

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return (
            [self._active_adapter]
            if isinstance(self._active_adapter, str)
            else self._active_adapter
        )

    @property
    def disable_adapters(self) -> bool:
        """Whether the adapters are switched off."""
        return self._disable_adapters

    def _all_available_adapter_names(self) -> list[str]:
        return list(self.scaling)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones; they become trainable unless `inference_mode`, the others
        are frozen.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._freeze.forget()
        trained = [] if inference_mode else [name for name in names if name in self.scaling]
        for name in [*(name for name in self.unfrozen() if name not in trained), *trained]:
            self.set_requires_grad(name, name in trained)
        self._active_adapter = adapter_names if isinstance(adapter_names, str) else names

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Unfreeze or freeze adapters, active or not."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names:
            for parameter in self.adapter_parameters(name):
                if (
                    parameter.requires_grad != requires_grad
                ):  # with many adapters most are frozen and stay so
                    parameter.requires_grad_(requires_grad and parameter.is_floating_point())

    def unfrozen(self) -> list[str]:
        """Names of the adapters of which anything is trainable. With thousands of adapters that is
        a look at a flag for each parameter, and nothing else is done for those that are frozen.
        """
        found: dict[str, None] = {}
        for container in self.containers():
            parameters, modules = container._parameters, container._modules
            for name in self.scaling if parameters else ():
                parameter = parameters.get(name)
                if parameter is not None and parameter.requires_grad:
                    found[name] = None
            for name in self.scaling if modules else ():
                module = modules.get(name)
                if module is not None and _is_trainable(module):
                    found[name] = None
        return list(found)

    def containers(self) -> Iterator[nn.Module]:
        """The containers of an adapter's tensors."""
        return (self._modules[attribute] for attribute in self.container_names)  # type: ignore[misc]

    def adapter_parameters(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """The parameters that belong to an adapter."""
        return (
            tensor
            for tensor in self.adapter_tensors(adapter_name)
            if isinstance(tensor, nn.Parameter)
        )

    def adapter_tensors(self, adapter_name: str) -> Iterator[Tensor]:
        """All tensors that belong to an adapter: its parameters, and what nobody trains."""
        container: Any
        for container in self.containers():
            if adapter_name in container:
                entry = container[adapter_name]
                yield from entry.parameters() if isinstance(entry, nn.Module) else (entry,)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters off, which also freezes them, or on, which unfreezes those that were
        frozen by that.
        """
        if not enabled and not self._disable_adapters:
            names = self.unfrozen()
            self._freeze.begin(
                self.containers(),
                (p for name in names for p in self.adapter_parameters(name)),
                names,
            )
        elif enabled:
            self._freeze.end()
        self._disable_adapters = not enabled

    def adopt(self, fresh: AdapterHolder) -> None:
        """Take over the adapters of another layer of this class that was made for the same base
        layer.
        """
        for attribute in (*self.container_names, *self.value_names, "scaling"):
            container = getattr(self, attribute)
            if isinstance(container, nn.Module):
                end_offloading(container)
            for adapter_name, entry in getattr(fresh, attribute).items():
                container[adapter_name] = entry

    def adopt_settings(self, adapter_name: str, fresh: Any, fresh_name: str) -> None:
        """Give an adapter what another one, of a layer made for the same base layer, has beside
        tensors, plain values and scale; nothing, unless a method says more.
        """

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, which is then active no more.

        Raises:
            PeftValueError: It is merged.
        """
        if adapter_name in self.merged_adapters:
            raise PeftValueError(
                f"Cannot delete adapter(s) ['{adapter_name}'] while they are merged. Please "
                "unmerge them first."
            )
        for attribute in (*self.container_names, *self.value_names, "scaling"):
            container = getattr(self, attribute)
            if adapter_name in container:
                del container[adapter_name]
        if adapter_name in self.active_adapters:
            left = [name for name in self.active_adapters if name != adapter_name]
            self.set_adapter(left or self._all_available_adapter_names()[:1])

    def hold_scale(self, adapter_name: str, scale: float) -> None:
        """Set an adapter's scale. One that is held in a tensor stays in it, so that a compiled
        model sees the new value.
        """
        if isinstance(self.scaling[adapter_name], Tensor):
            self.scaling[adapter_name].fill_(scale)  # type: ignore[attr-defined]
        else:
            self.scaling[adapter_name] = scale

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scale to `scale` times its configured one; an adapter this layer lacks
        is passed over.
        """
        if adapter in self.scaling:
            self.hold_scale(adapter, scale * self.base_scaling(adapter))

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters."""
        for adapter_name in self.active_adapters:
            if adapter_name in self.scaling:
                self.hold_scale(adapter_name, self.scaling[adapter_name] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of the active adapters by `scale`; None returns to the configured one."""
        for adapter_name in self.active_adapters:
            if adapter_name in self.scaling:
                present = self.scaling[adapter_name]
                self.hold_scale(
                    adapter_name,
                    self.base_scaling(adapter_name) if scale is None else present / scale,
                )


def _is_trainable(module: nn.Module) -> bool:
    """Whether anything in a module is trainable."""
    for parameter in module._parameters.values():
        if parameter is not None and parameter.requires_grad:
            return True
    children = module._modules
    return bool(children) and any(
        child is not None and _is_trainable(child) for child in children.values()
    )
