# SPDX-License-Identifier: Apache-2.0
"""Wrappers of modules trained beside an adapter, in full (`modules_to_save`) or by rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..base.calls.adapter_batch import ADAPTER_BATCHES, AdapterBatch
from ..base.calls.layout import SAMPLES_FIRST, RowLayout
from ..base.containers import AdapterModuleDict
from ..base.errors import PeftNotSupportedError, PeftValueError
from ..base.freezing import TemporaryFreeze
from ..integrations.distributed import gathered

R = TypeVar("R")


class AuxiliaryTrainingWrapper(nn.Module):
    """A module with trainable parameters for each of several adapters, used while the adapter is
    active.

    Args:
        module_to_save: The original module, used while no such adapter is active.

    Attributes:
        layout: The row layout of its input.
    """

    __module__ = "peft.utils.other"  # where pickles look for it

    adapter_layer_names: ClassVar[tuple[str, ...]] = ()
    other_param_names: ClassVar[tuple[str, ...]] = ()
    layout: RowLayout = SAMPLES_FIRST

    def __init__(self, module_to_save: nn.Module) -> None:
        super().__init__()
        self._active_adapter: list[str] = []
        self._disable_adapters = False
        self._freeze = TemporaryFreeze()
        self.training = module_to_save.training

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that have parameters in this module."""
        raise NotImplementedError

    def has(self, adapter_name: str) -> bool:
        """Return whether an adapter has parameters in this module."""
        raise NotImplementedError

    def parameters_of(self, adapter_name: str) -> list[nn.Parameter]:
        """Return an adapter's parameters."""
        raise NotImplementedError

    def remove(self, adapter_name: str) -> None:
        """Remove an adapter's parameters."""
        raise NotImplementedError

    def plain(self, adapter_names: Collection[str]) -> nn.Module:
        """Return the module to put in place of this wrapper: with an adapter's parameters if one of
        these adapters has any, else the original module.
        """
        raise NotImplementedError

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Return the parameter name in this module for each key that an adapter is saved under."""
        raise NotImplementedError

    @property
    def active_adapter(self) -> str | list[str]:
        """The adapter whose parameters are in use, or a list if there is none or several."""
        return self._active_adapter[0] if len(self._active_adapter) == 1 else self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        """The adapters whose parameters are in use."""
        return self._active_adapter

    @property
    def disable_adapters(self) -> bool:
        """True while the original module is used, whatever adapters are active."""
        return self._disable_adapters

    def enable_adapters(self, enabled: bool) -> None:
        """Use the active adapter's parameters, or the original module and freeze all parameters."""
        if not enabled and not self._disable_adapters:
            parameters = {name: self.parameters_of(name) for name in self.adapters}
            trained = [n for n, own in parameters.items() if any(p.requires_grad for p in own)]
            self._freeze.begin([self], (p for name in trained for p in parameters[name]), trained)
        elif enabled:
            self._freeze.end()
        self._disable_adapters = not enabled

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Use an adapter's parameters and (unless `inference_mode`) train them; freeze all others.

        Raises:
            PeftValueError: Several of the adapters train the same parameters of this module.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self.check_one_of(names)
        active = self.among(names)
        self._freeze.forget()
        for name in self.adapters:
            self.set_requires_grad(name, name in active and not inference_mode)
        self._active_adapter = active

    def among(self, adapter_names: Iterable[str]) -> list[str]:
        """Return the names of those adapters that have parameters in this module."""
        return [name for name in adapter_names if self.has(name)]

    def check_one_of(self, adapter_names: Iterable[str]) -> None:
        """Raise `PeftValueError` if several of some adapters train the same parameters."""
        if len(names := self.among(adapter_names)) > 1:
            raise PeftValueError(
                f"Only one adapter can be set at a time for {type(self).__name__}: "
                f"{', '.join(names)} each train the same module. Make one adapter of them with "
                "`add_weighted_adapter(…, heads=…)`, or give each sample its own with "
                "`adapter_names`."
            )

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Unfreeze or freeze adapters' parameters."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for parameter in self.parameters_of(name) if self.has(name) else ():
                # With many adapters most are frozen and stay so.
                if parameter.requires_grad != requires_grad:
                    parameter.requires_grad_(requires_grad and _can_be_trained(parameter))

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter's parameters, if it has any."""
        if self.has(adapter_name):
            self.remove(adapter_name)
        self._active_adapter = [name for name in self._active_adapter if name != adapter_name]

    def _run_for_samples(
        self,
        batch: AdapterBatch,
        run: Callable[..., R],
        args: tuple[Any, ...],
        kwargs: dict[str, object],
    ) -> R | Tensor:
        """Call `run(adapter, …)` with the rows of each adapter's samples; join the outputs."""
        if batch.only is not None:
            return run(batch.only, *args, **kwargs)
        owners = batch.row_owners(args[0], self)
        dim = int(owners.sequence_first)
        total = args[0].shape[dim]

        def select(value: object, rows: Tensor) -> object:
            if isinstance(value, Tensor) and value.dim() > dim and value.shape[dim] == total:
                return value.index_select(dim, rows)
            return value

        by_adapter = batch.rows_by_adapter(total, args[0].device, owners)
        outputs = [
            run(
                name,
                *(select(value, rows) for value in args),
                **{key: select(value, rows) for key, value in kwargs.items()},
            )
            for name, rows in by_adapter.items()
        ]
        tensors: list[Tensor] = [output for output in outputs if isinstance(output, Tensor)]
        if len(tensors) < len(outputs):
            raise PeftNotSupportedError(
                "`adapter_names` needs modules in `modules_to_save` that return a tensor; "
                f"{type(self.original_module).__name__} does not."
            )
        order = torch.cat(list(by_adapter.values())).argsort()
        return torch.cat(tensors, dim).index_select(dim, order)

    def _current(self) -> nn.Module:
        """Return the module whose attributes this one shows."""
        return self.original_module

    def __getattr__(self, name: str) -> Any:
        """Return a public attribute that this wrapper lacks (`weight`, …) of the module in use."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            inner = ("original_module", "modules_to_save", "token_adapter")
            if name.startswith("_") or name in inner:
                raise
            return getattr(self._current(), name)


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """A module with a full, trainable copy for each adapter that lists it in `modules_to_save`.

    Attributes:
        original_module: The original module.
        modules_to_save: The copies by adapter name.
    """

    __module__ = "peft.utils.other"  # where pickles look for it

    adapter_layer_names: ClassVar[tuple[str, ...]] = ("modules_to_save",)

    def __init__(self, module_to_save: nn.Module) -> None:
        super().__init__(module_to_save)
        self.original_module = module_to_save
        self.modules_to_save: AdapterModuleDict[nn.Module] = AdapterModuleDict()
        self.modules_to_save.training = self.training

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that have a copy."""
        return list(self.modules_to_save)

    def has(self, adapter_name: str) -> bool:
        """Return whether an adapter has a copy."""
        return adapter_name in self.modules_to_save

    @staticmethod
    def copy_of(module: nn.Module, plain: Mapping[nn.Module, nn.Module]) -> nn.Module:
        """Return a trainable copy of a module, or of the original one if it is wrapped already.

        `plain` maps modules inside it to the modules to copy in their place.
        """
        if isinstance(module, ModulesToSaveWrapper):
            module = module.original_module
        with gathered(module.parameters()):
            instead: dict[int, object] = {
                id(layer): copy.deepcopy(inner) for layer, inner in plain.items()
            }
            # Tensors that a hook computed have a gradient history, which torch does not copy.
            for inner in module.modules():
                computed = [
                    value
                    for value in vars(inner).values()
                    if isinstance(value, Tensor) and not value.is_leaf
                ]
                instead.update({id(value): value.detach().clone() for value in computed})
            fresh = copy.deepcopy(module, instead)
        for parameter in fresh.parameters():
            parameter.requires_grad_(_can_be_trained(parameter))
        return fresh

    def parameters_of(self, adapter_name: str) -> list[nn.Parameter]:
        """Return the parameters of an adapter's copy."""
        return list(self.modules_to_save[adapter_name].parameters())

    def remove(self, adapter_name: str) -> None:
        """Remove an adapter's copy."""
        del self.modules_to_save[adapter_name]

    def forward(self, *args: object, **kwargs: object) -> object:
        """Run the module in use, or for each sample the copy of the adapter that the call chose."""
        batch = ADAPTER_BATCHES.current
        if batch is None or self._disable_adapters:
            return self._current()(*args, **kwargs)
        return self._run_for_samples(
            batch, lambda name, *own, **more: self._of(name)(*own, **more), args, kwargs
        )

    def plain(self, adapter_names: Collection[str]) -> nn.Module:
        """Return the copy of one of some adapters, or the original module."""
        return next(
            (self.modules_to_save[name] for name in self.among(adapter_names)), self.original_module
        )

    def _of(self, adapter_name: str) -> nn.Module:
        """Return an adapter's copy, or the original module if it has none."""
        if adapter_name in self.modules_to_save:
            return self.modules_to_save[adapter_name]
        return self.original_module

    def _current(self) -> nn.Module:
        if self._disable_adapters or not self._active_adapter:
            return self.original_module
        return self.modules_to_save[self._active_adapter[0]]

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Return the key of an adapter's copy for each key of the wrapped module's state dict."""
        if adapter_name not in self.modules_to_save:
            return {}
        return {
            key: f"modules_to_save.{adapter_name}.{key}"
            for key in self.modules_to_save[adapter_name].state_dict()
        }


def _can_be_trained(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()
