# SPDX-License-Identifier: Apache-2.0
"""`AdaptedModel`: a model with adapters in it, and all that can be done with them: run, switch,
merge, delete, take out.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..base.calls.adapter_batch import ADAPTER_BATCHES, AdapterBatch, adapter_batch
from ..base.calls.arguments import bind_arguments, positional_names
from ..base.calls.rows import call_rows, generation_rows
from ..base.constants import DUMMY_MODEL_CONFIG
from ..base.containers import walk
from ..base.errors import PeftTypeError, PeftValueError, warn
from ..base.freezing import TemporaryFreeze
from ..base.missing_attribute import PeftAttributeError
from ..base.modules import check_model
from ..base.registry import PEFT_TYPE_TO_TUNER_MAPPING
from ..base.suggestions import no_adapter
from ..base.validation import check_adapter
from ..config import PeftConfig
from ..ops.inference_cache import InferenceCache
from . import base_layer, routed_experts, tied_weights
from . import model_merges as _model_merges
from .adapter_choice import adapter_meant
from .adapters import AdapterParameterDict
from .auxiliary import AuxiliaryTrainingWrapper
from .computed_weights import made_plain
from .fused_paths import restore_fused_paths
from .layer import BaseTunerLayer
from .merge_requests import checked_names
from .renamed_targets import present_names


class AdaptedModel(nn.Module):
    """A model whose layers of class `tuner_layer_cls` carry adapters.

    Args:
        model: The model.
        shared_root: Module that parameters shared by all layers are registered on, by default this
            one.

    Attributes:
        model: The model.
        peft_config: Each adapter's config, by name.
        targeted_module_names: Paths of the modules that its adapters were put into, each once.
        inference_cache: What evaluation computed from the adapters' tensors alone.
    """

    tuner_layer_cls: ClassVar[type[BaseTunerLayer]] = BaseTunerLayer
    # Clients ask whether a method works only inside a PeftModel; none here does.
    uses_shared_state: ClassVar[bool] = False
    # Keyword arguments of the model's forward and generate that are meant for the method and not
    # for the model.
    adapter_call_arguments: ClassVar[tuple[str, ...]] = ()
    # Arguments that merging takes beside the common ones.
    merge_options: ClassVar[tuple[str, ...]] = ()
    shared_parameter_names: ClassVar[tuple[str, ...]] = ()
    # Whether adapters were merged, and no call in training has been looked at since.
    _merged_lately = False

    def __init__(self, model: nn.Module, shared_root: nn.Module | None = None) -> None:
        super().__init__()
        check_model(model)
        self.model = model
        self.peft_config: dict[str, PeftConfig] = {}
        self.targeted_module_names: list[str] = []
        self._active: str | list[str] = []
        self._freeze: TemporaryFreeze | None = None
        self.inference_cache = InferenceCache()
        every = {
            name
            for tuner in PEFT_TYPE_TO_TUNER_MAPPING.values()
            for name in getattr(tuner, "adapter_call_arguments", ())
        }
        self._positional_names = positional_names(model.forward)
        self._methods_arguments = tuple(
            sorted(every.difference(inspect.signature(model.forward).parameters))
        )
        self._shared_root = (
            self if shared_root is None else shared_root,
        )  # in a tuple, not to be registered
        self.training = model.training

    def detach_adapter(self, adapter_name: str) -> None:
        """Undo what ties an adapter to the model beside its layers, before it is deleted."""

    def detach_adapters(self) -> None:
        """Undo what ties the method to the model beside its layers, when the last adapter is taken
        out.
        """

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """A model's config as a dictionary; of a model without one, that its type is "custom"."""
        config: Any = getattr(model, "config", DUMMY_MODEL_CONFIG)
        if is_dataclass(config) and not isinstance(config, type):
            return asdict(config)
        return config if isinstance(config, dict) else config.to_dict()

    def form_to_save(
        self, adapter_name: str, config: Any, state: dict[str, Tensor]
    ) -> tuple[Any, dict[str, Tensor]]:
        """An adapter's config and tensors as a file has them, where that is another form than
        `get_peft_model_state_dict` gives.
        """
        return config, state

    def present_names(
        self, config: Any, state: Mapping[str, Tensor]
    ) -> tuple[Any, dict[str, Tensor]]:
        """A checkpoint's config and tensors under the names that the model's modules have now."""
        return present_names(self.model, config, state)

    def named_tuner_layers(self) -> Iterator[tuple[str, BaseTunerLayer]]:
        """This method's layers, with their module paths."""
        for path, module in walk(self.model):
            if isinstance(module, self.tuner_layer_cls):
                yield path, module

    def tuner_layers(self) -> Iterator[BaseTunerLayer]:
        """This method's layers."""
        return (layer for _, layer in self.named_tuner_layers())

    def auxiliary_wrappers(self) -> Iterator[AuxiliaryTrainingWrapper]:
        """The modules of which something is trained beside the adapters."""
        return (module for module in self._parts() if isinstance(module, AuxiliaryTrainingWrapper))

    def _parts(self) -> Iterator[BaseTunerLayer | AuxiliaryTrainingWrapper]:
        """All modules that have something for each adapter."""
        kinds = (self.tuner_layer_cls, AuxiliaryTrainingWrapper)
        return (module for _, module in walk(self.model) if isinstance(module, kinds))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward, adapters included.

        Args:
            adapter_names: An adapter for each sample in place of the active ones, `"__base__"` for
                none.
            *args, **kwargs: For the base model.

        Raises:
            PeftTypeError: An argument is for another method.
            PeftValueError: `adapter_names` does not fit the inputs or the model.
        """
        self.refuse_foreign_arguments(kwargs)
        # First of all conditions, so that no compiled code depends on the others.
        if (
            not torch.compiler.is_compiling()
            and self._merged_lately
            and self.training
            and torch.is_grad_enabled()
        ):
            self._merged_lately = False
            _model_merges.warn_of_training(self.tuner_layers())
        batch = self.chosen_adapters(args, kwargs)
        with self.inference_cache.during_call():
            if batch is None and ADAPTER_BATCHES.current is None:
                return self.model(*args, **kwargs)
            return ADAPTER_BATCHES.run(batch, lambda: self.model(*args, **kwargs))

    def chosen_adapters(
        self, args: tuple[Any, ...], arguments: dict[str, Any], generate: Any = None
    ) -> AdapterBatch | None:
        """The choice of an adapter for each sample, taken out of a call's keyword arguments; None
        if it makes none.

        Args:
            args, arguments: What the call was given.
            generate: The method, if it is a call of `generate`.

        Raises:
            PeftValueError: It does not fit the inputs or the model, or adapters are merged.
        """
        names = arguments.pop("adapter_names", None)
        if names is None:
            return None
        own = self.adapter_call_arguments
        if generate is None:
            bound = bind_arguments(self._positional_names, args, arguments)
            rows = call_rows(self.model, bound, own)
        else:
            bound = bind_arguments(positional_names(generate), args, arguments)
            rows = generation_rows(self.model, bound, own)
        batch = adapter_batch(names, self.peft_config, rows)
        if self.merged_adapters:
            raise PeftValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call "
                "`unmerge_adapter` first."
            )
        return batch

    def __getattr__(self, name: str) -> Any:
        """What the tuner lacks is read from the base model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
        try:
            return getattr(self.model, name)
        except AttributeError as error:
            if error.name not in (name, None) or hasattr(type(self.model), name):
                raise  # what happened inside a property
        raise PeftAttributeError((self, self.model), name)

    def refuse_foreign_arguments(self, arguments: dict[str, Any]) -> None:
        """Raise rather than ignore what is for another method (`task_ids`): models that take any
        keyword would swallow it.
        """
        for name in self._methods_arguments:
            if arguments.get(name) is not None and name not in self.adapter_call_arguments:
                raise PeftTypeError(
                    f"`{name}` is for another method than {type(self).__name__}, and the model has "
                    "no such argument; leave it out."
                )

    def supports_lora_conversion(self, adapter_name: str | None = None) -> bool:
        """Whether all of an adapter's layers have low-rank factors; by default of the one that
        `convert_to_lora` would take.
        """
        if adapter_name is None:
            adapter_name = adapter_meant(None, self.peft_config, self.active_adapters)
        check_adapter(adapter_name)
        own = [layer for layer in self.tuner_layers() if adapter_name in layer.scaling]
        return bool(own) and all(layer.supports_lora_conversion(adapter_name) for layer in own)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or their list."""
        return self._active

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return [self._active] if isinstance(self._active, str) else list(self._active)

    @property
    def adapters_disabled(self) -> bool:
        """Whether the adapters are switched off."""
        return any(layer.disable_adapters for layer in self.tuner_layers())

    @property
    def merged_adapters(self) -> list[str]:
        """Adapters that are merged into the base weights."""
        return list(
            dict.fromkeys(name for layer in self.tuner_layers() for name in layer.merged_adapters)
        )

    def check_names(self, adapter_names: str | Iterable[str]) -> list[str]:
        """The names as a list.

        Raises:
            PeftTypeError: One is no string.
            PeftValueError: One is not an adapter of this model.
        """
        if not isinstance(adapter_names, (str, Iterable)):
            raise PeftTypeError(
                f"Adapters are named by a string or a list of strings, got {adapter_names!r}."
            )
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names:
            check_adapter(name, self.peft_config)
        return names

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several that add up, the active one; others are frozen.

        Args:
            adapter_name: Name or list of names.
            inference_mode: Leave the active adapters frozen too.

        Raises:
            PeftValueError: No name, an unknown one, or adapters that can't be active together;
                nothing is changed.
        """
        names = self.check_names(adapter_name)
        if not names:
            raise PeftValueError(
                f"`adapter_name`={adapter_name!r} names no adapter. To run the model without "
                "adapters use the context "
                "`disable_adapter()`, or `disable_adapter_layers()`."
            )
        if len(set(names)) < len(names):
            raise PeftValueError(
                f"`adapter_name`={names} names an adapter twice; active adapters add up, each once."
            )
        self._activate(adapter_name if isinstance(adapter_name, str) else names, inference_mode)

    def _activate(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters, all of them known, the active ones; none is the state after the last was
        deleted.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        parts = list(self._parts())
        for part in parts:
            if isinstance(part, AuxiliaryTrainingWrapper):
                part.check_one_of(names)
        if any(
            isinstance(part, BaseTunerLayer) and (part.merged or part.is_suspended)
            for part in parts
        ):
            warn("Adapter cannot be set when the model is merged. Unmerging the model first.")
            self.unmerge_adapter()
        for part in parts:
            part.set_adapter(adapter_name, inference_mode)
        for name, parameter in (item for container in self._shared() for item in container.items()):
            if parameter.requires_grad != (name in names and not inference_mode):
                parameter.requires_grad_(not parameter.requires_grad)
        self._freeze = None
        self._active = adapter_name

    def set_requires_grad(
        self, adapter_names: str | Iterable[str], requires_grad: bool = True
    ) -> None:
        """Unfreeze or freeze adapters, active or not.

        Raises:
            PeftValueError: An unknown name.
        """
        names = self.check_names(adapter_names)
        for module in self._parts():
            module.set_requires_grad(names, requires_grad)
        for container in self._shared():
            for name in names:
                if name in container:
                    container[name].requires_grad_(requires_grad)

    def enable_adapter_layers(self) -> None:
        """Switch the adapters on again."""
        self._enable(True)

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off, so that the model computes what it did without them."""
        for name in self.active_adapters:
            biases = self.peft_config[name].trained_biases
            if biases != "none":
                warn(
                    f"Careful, disabling adapter layers with bias configured to be '{biases}' does "
                    "not produce the same output as "
                    "the base model would without adaption.",
                )
        self._enable(False)

    def _enable(self, enabled: bool) -> None:
        parts = list(self._parts())
        _model_merges.prepare_to_enable(self.tuner_layers(), enabled)
        for module in parts:
            module.enable_adapters(enabled)
        if not enabled and self._freeze is None:
            self._freeze = TemporaryFreeze()
            self._freeze.begin(
                self._shared(),
                (p for container in self._shared() for p in container._parameters.values()),
            )
        elif enabled and self._freeze is not None:
            self._freeze.end()
            self._freeze = None

    def _shared(self) -> Iterator[AdapterParameterDict]:
        for name in self.shared_parameter_names:
            container = self._shared_owner(name)._modules.get(name)
            if isinstance(container, AdapterParameterDict):
                yield container

    def _shared_owner(self, name: str) -> nn.Module:
        """The module on which the layers' shared parameters of a name are, or will be, registered."""
        root = self._shared_root[0]
        return self if root is self else base_layer.place_for_shared(root, name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was active, the others that were stay so, else the first by name
        becomes active.

        Raises:
            PeftValueError: There is no such adapter, or it is merged.
        """
        if not isinstance(adapter_name, str):
            raise PeftTypeError(
                f"`adapter_name`={adapter_name!r} must be one adapter's name; delete several one "
                "by one."
            )
        if adapter_name not in self.peft_config:
            raise PeftValueError(no_adapter(adapter_name, self.peft_config, "does not exist"))
        parts = list(self._parts())
        if any(
            isinstance(part, BaseTunerLayer) and adapter_name in part.merged_adapters
            for part in parts
        ):
            raise PeftValueError(
                f"Cannot delete adapter(s) ['{adapter_name}'] while they are merged. Please "
                "unmerge them first."
            )
        active = self.active_adapters
        self.detach_adapter(adapter_name)
        del self.peft_config[adapter_name]
        self.inference_cache.forget(adapter_name)
        for part in parts:
            part.delete_adapter(adapter_name)
        for container in self._shared():
            if adapter_name in container:
                del container[adapter_name]
        if adapter_name in active:
            left = [name for name in active if name != adapter_name]
            if not left and self.peft_config:
                left = [min(self.peft_config)]
                warn(
                    f"Adapter {adapter_name} was active which is now deleted. Setting active "
                    f"adapter to {left[0]}."
                )
            self._activate(left[0] if len(left) == 1 else left)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, **options: Any
    ) -> None:
        """Add adapters' deltas to the base weights, for speed; `unmerge_adapter` takes them off
        again exactly.

        Merged adapters count whether or not they are active; active ones that are not merged are
        computed besides.

        What is taken off is what was added, even if the adapters were trained, loaded or scaled
        meanwhile: a merge keeps a copy of the adapters' factors. Weights that bitsandbytes or
        torchao quantised are quantised again in their own form; the originals stay in memory until
        they are unmerged or unloaded.

        Args:
            adapter_names: Which adapters, by default the active ones.
            safe_merge: Check that every resulting weight is finite.
            **options: What the method needs to know besides.

        Raises:
            PeftValueError: An unknown name, or a weight would break, or an adapter is merged with
                other options; nothing is merged then.
            PeftNotSupportedError: A weight is quantised in another form, or the method can't be
                merged, or a decomposed adapter would not apply in its place among the others.
        """
        self.check_merge_options(options)
        names = self.check_names(
            checked_names(self.active_adapters if adapter_names is None else adapter_names)
        )
        named, each = (
            dict(self.named_tuner_layers()),
            {name: self.merge_options_of(name, options) for name in names},
        )
        _model_merges.warn_of_ties(self.model, named, each)
        _model_merges.merge(named, each, safe_merge)
        self._merged_lately = True

    def merge_options_of(self, adapter_name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """What one adapter is to be merged with, of the options of a merge, checked.

        Raises:
            PeftValueError: The adapter can't be merged so.
        """
        return dict(options)

    def check_merge_options(self, options: Iterable[str]) -> None:
        """Insist that merging knows its options.

        Raises:
            PeftTypeError: One is unknown.
        """
        unknown = sorted(set(options) - set(self.merge_options))
        if unknown:
            known = ", ".join(
                map("`{}`".format, ("adapter_names", "safe_merge", *self.merge_options))
            )
            raise PeftTypeError(
                f"Merging got unexpected keyword arguments: {', '.join(unknown)}. With "
                f"{type(self).__name__} it takes {known}."
            )

    def unmerge_adapter(self) -> None:
        """Take all merged deltas off the base weights again."""
        _model_merges.unmerge(self.tuner_layers())

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        **options: Any,
    ) -> nn.Module:
        """The base model with adapters merged into its weights, and nothing of this package left in
        it. A weight that its layer computes in each forward (`weight_norm`, `spectral_norm`,
        `parametrize`, `prune`) becomes a plain parameter.

        Args:
            progressbar: Show one.
            safe_merge: Check that every resulting weight is finite.
            adapter_names: Which adapters, by default the active ones.
            **options: What the method needs to know besides.

        Raises:
            As `merge_adapter`.
        """
        self.check_merge_options(options)
        names = self.check_names(
            checked_names(self.active_adapters if adapter_names is None else adapter_names)
        )
        chosen = {name: self.merge_options_of(name, options) for name in names if options}
        for wrapper in self.auxiliary_wrappers():
            wrapper.check_one_of(names)
        was_tied = tied_weights.is_tied(self.model)
        own = [
            (layer, name)
            for layer in self.tuner_layers()
            for name in names
            if name in layer.scaling
        ]
        changed = list(
            dict.fromkeys(
                [
                    *(layer for layer in self.tuner_layers() if layer.merged),
                    *(layer for layer, _ in own),
                ]
            )
        )
        with (
            _model_merges.without_other_merges(self.tuner_layers(), chosen),
            _model_merges.apart(self.model, changed),
        ):
            if adapter_names is not None or any(
                name not in layer.merged_adapters for layer, name in own
            ):
                bases = dict.fromkeys(
                    layer.get_base_layer()
                    for layer, name in own
                    if name not in layer.merged_adapters
                )
                with made_plain(bases):
                    self.merge_adapter(adapter_names, safe_merge, **options)
        plain = self._unload(names, "Unloading and merging model" if progressbar else None)
        tied_weights.settle(plain, was_tied)
        return plain

    def unload(self) -> nn.Module:
        """The base model as it was: adapters are taken out, merged ones taken off."""
        if self.merged_adapters:
            self.unmerge_adapter()
        return self._unload([])

    def _unload(self, adapters: list[str], progressbar: str | None = None) -> nn.Module:
        _model_merges.unload(self.model, self.tuner_layer_cls, adapters, progressbar)
        for name in self.shared_parameter_names:
            self._shared_owner(name)._modules.pop(name, None)
        restore_fused_paths(self.model)
        routed_experts.forget(self.model)
        self.detach_adapters()
        self.inference_cache = InferenceCache()
        self.peft_config.clear()
        self._active = []
        return self.model
