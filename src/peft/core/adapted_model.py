# SPDX-License-Identifier: Apache-2.0
"""`AdaptedModel`: a model with adapters, which can be run, switched, merged and removed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..base.calls.adapter_batch import ADAPTER_BATCHES, AdapterBatch
from ..base.calls.running import RunningCalls, changes_all, changing
from ..base.constants import DUMMY_MODEL_CONFIG
from ..base.containers import walk
from ..base.errors import PeftValueError, warn
from ..base.missing_attribute import PeftAttributeError
from ..base.modules import check_model, model_config
from ..base.plain_values import JsonObject
from ..base.tensors import ordinary_tensors
from ..base.validation import check_adapter
from ..config import PeftConfig, TargetedConfig, check_config
from ..ops.inference_cache import InferenceCache
from . import base_layer, combining, replication, switching, tied_weights
from . import model_merges as _model_merges
from . import plan as _plan
from .adapter_choice import adapter_meant
from .adapter_names import known_names, names_to_activate
from .adapters import AdapterParameterDict
from .auxiliary import AuxiliaryTrainingWrapper
from .call_arguments import CallArguments
from .config_owners import note_owner
from .filling import fill_with
from .injection import Construction, Fill, build_adapter, prepared, put_in
from .layer import BaseTunerLayer
from .merge_requests import check_merge_options, checked_names

if TYPE_CHECKING:
    from .method import Method

C = TypeVar("C", bound=TargetedConfig)
L = TypeVar("L", bound=BaseTunerLayer)


class AdaptedModel(nn.Module, Generic[C]):
    """A model with adapters, of one method (`BaseTuner`) or of several (`MixedModel`).

    Args:
        model: The base model; adapters are put into it in place.
        peft_config: The first adapter's config, alone or by name; None for no adapter.
        adapter_name: The first adapter's name.
        low_cpu_mem_usage: Make the parameters on the meta device, to be filled from a checkpoint.
        state_dict: Adapt the modules that this checkpoint has parameters for, not the targets.
        autocast_adapter_dtype: Keep adapters in float32 where the base has 16 bits.
        shared_root: Module to register the layers' shared parameters on, by default this one.
        initialize: False leaves the adapter's memory as it is, for `fill` to write.
        fill: Called with the finished adapter before it is put in; fills its tensors, or raises.

    Raises:
        PeftValueError: The config is invalid or does not fit the model, which is left as it was.

    Attributes:
        model: The base model.
        peft_config: Each adapter's config, by name.
        targeted_module_names: Paths of the modules that adapters were put into, each once.
        inference_cache: Tensors that evaluation computed from the adapters' parameters alone.
        running_calls: The calls of the base model in all threads, for which changes wait that touch
            them.
    """

    # Class of the layers that carry adapters.
    tuner_layer_cls: ClassVar[type[BaseTunerLayer]] = BaseTunerLayer
    # Attributes with parameters that all layers share.
    shared_parameter_names: ClassVar[tuple[str, ...]] = ()
    # Keyword arguments of the model's calls that are for the method.
    adapter_call_arguments: ClassVar[tuple[str, ...]] = ()
    # Arguments of a merge in addition to the common ones.
    merge_options: ClassVar[tuple[str, ...]] = ()
    # Mixin with the methods that a model around this tuner has too, see `methods_of`.
    model_methods: ClassVar[type | None] = None
    # Clients ask if a method works only inside a PeftModel; all work without.
    uses_shared_state: ClassVar[bool] = False
    # True after a merge, until the next call in training.
    _merged_lately = False

    def __init__(
        self,
        model: nn.Module,
        peft_config: C | dict[str, C] | None,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
        *,
        autocast_adapter_dtype: bool = True,
        shared_root: nn.Module | None = None,
        initialize: bool = True,
        fill: Fill | None = None,
    ) -> None:
        super().__init__()
        check_model(model)
        self.model = model
        self.peft_config: dict[str, C] = {}
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        self.inference_cache, self.running_calls = InferenceCache(), RunningCalls.of(model)
        self.training = model.training
        self._active: str | list[str] = []
        self._call_arguments = CallArguments(model)
        self._shared_root = (self if shared_root is None else shared_root,)  # not registered
        if peft_config is not None:
            config = peft_config[adapter_name] if isinstance(peft_config, dict) else peft_config
            device = torch.device("meta") if low_cpu_mem_usage else None
            construction = Construction(autocast_adapter_dtype, device, initialize)
            self.add_adapter(adapter_name, config, construction, state_dict=state_dict, fill=fill)

    def method_of(self, config: PeftConfig) -> Method:
        """Return the tuner of a config's method, which plans and builds its adapters."""
        raise NotImplementedError

    def methods(self) -> Iterable[Method]:
        """Return the tuners of the methods whose adapters the model can have."""
        raise NotImplementedError

    @staticmethod
    def get_model_config(model: nn.Module) -> JsonObject:
        """Return a model's config as a dictionary; the default has the type "custom"."""
        return model_config(model, DUMMY_MODEL_CONFIG)

    def named_tuner_layers(self) -> Iterator[tuple[str, BaseTunerLayer]]:
        """Yield the layers with adapters and their module paths."""
        kind = self.tuner_layer_cls
        return ((path, layer) for path, layer in walk(self.model) if isinstance(layer, kind))

    def tuner_layers(self) -> Iterator[BaseTunerLayer]:
        """Yield the layers with adapters."""
        return (layer for _, layer in self.named_tuner_layers())

    def adapter_layers(self, adapter_name: str, kind: type[L]) -> dict[str, L]:
        """Return the layers of a class that have an adapter, by module path."""
        named = self.named_tuner_layers()
        return {p: m for p, m in named if isinstance(m, kind) and adapter_name in m.scaling}

    def auxiliary_wrappers(self) -> Iterator[AuxiliaryTrainingWrapper]:
        """Yield the wrappers of modules that are trained beside the adapters."""
        return (module for module in self._parts() if isinstance(module, AuxiliaryTrainingWrapper))

    def _parts(self) -> Iterator[BaseTunerLayer | AuxiliaryTrainingWrapper]:
        """Yield all modules that have an entry for each adapter."""
        kinds = (self.tuner_layer_cls, AuxiliaryTrainingWrapper)
        return (module for _, module in walk(self.model) if isinstance(module, kinds))

    def shared_owner(self, name: str) -> nn.Module:
        """Return the module that the layers' shared parameters of a name are registered on."""
        root = self._shared_root[0]
        return self if root is self else base_layer.place_for_shared(root, name)

    def shared_containers(self) -> dict[str, AdapterParameterDict]:
        """Return the registered containers of shared parameters, by attribute name."""
        names = self.shared_parameter_names
        present = {name: self.shared_owner(name)._modules.get(name) for name in names}
        return {k: v for k, v in present.items() if isinstance(v, AdapterParameterDict)}

    def forward(self, *args: object, **kwargs: object) -> Any:
        """Run the base model with its adapters.

        Args:
            adapter_names: An adapter for each sample in place of the active ones, `"__base__"` for
                none.
            *args, **kwargs: Arguments of the base model.

        Raises:
            PeftTypeError: An argument is for another method.
            PeftValueError: `adapter_names` does not fit the inputs or the model.
        """
        self.refuse_foreign_arguments(kwargs)
        # This condition comes first, so that no compiled code depends on the others.
        if (
            not torch.compiler.is_compiling()
            and self._merged_lately
            and self.training
            and torch.is_grad_enabled()
        ):
            self._merged_lately = False
            _model_merges.warn_of_training(self.tuner_layers())
        during = self.running_calls.during(kwargs.get("adapter_names"))
        with during, self.inference_cache.during_call():
            batch = self.chosen_adapters(args, kwargs)
            if batch is None and ADAPTER_BATCHES.current is None:
                return self.model(*args, **kwargs)
            return ADAPTER_BATCHES.run(batch, lambda: self.model(*args, **kwargs))

    def chosen_adapters(
        self,
        args: tuple[object, ...],
        arguments: dict[str, object],
        generate: Callable[..., object] | None = None,
    ) -> AdapterBatch | None:
        """Pop and check the choice of an adapter for each sample from a call's arguments."""
        own, take = self.adapter_call_arguments, self._call_arguments.take_adapters
        batch = take(self.model, self.peft_config, own, args, arguments, generate)
        if batch is not None and self.merged_adapters:
            raise PeftValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call "
                "`unmerge_adapter` first."
            )
        return batch

    def refuse_foreign_arguments(self, arguments: Mapping[str, object]) -> None:
        """Raise `PeftTypeError` if a call has an argument of another method (`task_ids`)."""
        own, name = self.adapter_call_arguments, type(self).__name__
        self._call_arguments.refuse_foreign(arguments, own, name)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the base model that this class lacks."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
        try:
            return getattr(self.model, name)
        except AttributeError as error:
            if error.name not in (name, None) or hasattr(type(self.model), name):
                raise  # from inside a property
        raise PeftAttributeError((self, self.model), name)

    def supports_lora_conversion(self, adapter_name: str | None = None) -> bool:
        """Return whether `convert_to_lora` accepts an adapter, by default the one it chooses."""
        if adapter_name is None:
            adapter_name = adapter_meant(None, self.peft_config, self.active_adapters)
        check_adapter(adapter_name)
        own = self.adapter_layers(adapter_name, BaseTunerLayer).values()
        return bool(own) and all(layer.supports_lora_conversion(adapter_name) for layer in own)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or the names of several."""
        return self._active

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return [self._active] if isinstance(self._active, str) else list(self._active)

    @property
    def adapters_disabled(self) -> bool:
        """True while the adapters are switched off."""
        return any(layer.disable_adapters for layer in self.tuner_layers())

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that are merged into the base weights."""
        layers = self.tuner_layers()
        return list(dict.fromkeys(name for layer in layers for name in layer.merged_adapters))

    def check_names(self, adapter_names: str | Iterable[str]) -> list[str]:
        """Return adapter names as a list; raise for a wrong type or an unknown name."""
        return known_names(adapter_names, self.peft_config)

    @ordinary_tensors()
    def add_adapter(
        self,
        adapter_name: str,
        config: C,
        construction: Construction | None = None,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        fill: Fill | None = None,
    ) -> None:
        """Put another adapter into the model: plan, build, fill, swap (`injection.py`).

        The first adapter becomes the active one; later ones are inactive until `set_adapter`.

        Args:
            adapter_name: A new name.
            config: The adapter's config. The adapter has a copy, so several may be made of one.
            construction: Options for making its parameters.
            state_dict: Adapt the modules that this checkpoint has parameters for.
            fill: Writes the finished adapter's tensors before it is put in, or raises.

        Raises:
            PeftValueError: As for the class; the model is left as it was.
        """
        check_config(config)
        construction, config = construction or Construction(), config.for_adapter()
        with changing(self, [adapter_name]), prepared(method := self.method_of(config), config):
            # Clients that load a file by themselves inject a frozen adapter first.
            is_new = fill is None and construction.device is None and not config.inference_mode
            plan = _plan.make(
                method, adapter_name, config, state_dict, is_new=is_new, is_filled=fill is not None
            )
            build = build_adapter(method, plan, construction)
            if fill is not None:
                fill(build)
            put_in(self, method, plan, build)
        note_owner(build.config, self)

    def add_with_tensors(self, adapter_name: str, config: C, tensors: Mapping[str, Tensor]) -> None:
        """Put an adapter with given tensors into the model; it is inactive until `set_adapter`."""
        fill = partial(fill_with, tensors=tensors)
        self.add_adapter(adapter_name, config, Construction(initialize=False), fill=fill)

    add_weighted_adapter = combining.add_weighted_adapter

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several that add up, the active one; others are frozen.

        Args:
            adapter_name: Name or list of names.
            inference_mode: Leave the active adapters frozen too.

        Raises:
            PeftTypeError: A name is not a string.
            PeftValueError: No name, an unknown one, or adapters that can't be active together;
                nothing is changed.
        """
        with changing(self):
            names = names_to_activate(adapter_name, self.peft_config)
            self.activate(adapter_name if isinstance(adapter_name, str) else names, inference_mode)

    def activate(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones, unchecked; an empty list leaves none active."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        with self.running_calls.change((), active=True):
            parts = switching.to_change(self, self._parts())
            switching.check_can_be_active(parts, names)
            if switching.is_merged(parts):
                warn("Adapter cannot be set when the model is merged. Unmerging the model first.")
                self.unmerge_adapter()
            for part in parts:
                part.set_adapter(adapter_name, inference_mode)
            self._active = adapter_name

    def set_requires_grad(
        self, adapter_names: str | Iterable[str], requires_grad: bool = True
    ) -> None:
        """Unfreeze or freeze adapters, active or not.

        Raises:
            PeftTypeError: A name is not a string.
            PeftValueError: An unknown name.
        """
        with changing(self), changing(self, names := self.check_names(adapter_names)):
            for part in switching.to_change(self, self._parts()):
                part.set_requires_grad(names, requires_grad)

    def enable_adapter_layers(self) -> None:
        """Switch the adapters on again."""
        self._enable(True)

    @changes_all
    def disable_adapter_layers(self) -> None:
        """Switch all adapters off: the model computes as it did without them."""
        for name in self.active_adapters:
            biases = self.peft_config[name].trained_biases
            if biases != "none":
                warn(
                    f"Careful, disabling adapter layers with bias configured to be '{biases}' does "
                    "not produce the same output as the base model would without adaption."
                )
        self._enable(False)

    @changes_all
    def _enable(self, enabled: bool) -> None:
        """Switch the adapters on or off; those that are off are frozen."""
        _model_merges.prepare_to_enable(self.tuner_layers(), enabled)
        for part in list(self._parts()):
            part.enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If no other was active, the first by name becomes active.

        Raises:
            PeftTypeError: The name is not a string.
            PeftValueError: There is no such adapter, or it is merged.
        """
        # Another adapter that becomes active is unmerged first.
        with changing(self), changing(self, None if self.merged_adapters else [adapter_name]):
            parts = switching.to_change(self, self._parts())
            switching.check_deletable(parts, adapter_name, self.peft_config)
            self.method_of(self.peft_config[adapter_name]).detach_adapter(adapter_name)
            del self.peft_config[adapter_name]
            self.inference_cache.forget(adapter_name)
            switching.delete(parts, self.shared_containers().values(), adapter_name)
            if adapter_name in (active := self.active_adapters):
                self.activate(switching.left_active(active, adapter_name, self.peft_config))

    @changes_all
    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, **options: Any
    ) -> None:
        """Add adapters' deltas to the base weights; `unmerge_adapter` restores them exactly.

        Merged adapters count whether or not they are active; active ones that are not merged are
        computed in addition. A merge keeps the adapters' factors, so that unmerging takes off the
        same delta, even after training. Quantized weights are quantized again; the originals stay
        in memory until they are unmerged or unloaded.

        Args:
            adapter_names: Which adapters, by default the active ones.
            safe_merge: Check that every resulting weight is finite.
            **options: Arguments of the method, one of its `merge_options` each.

        Raises:
            PeftTypeError: `adapter_names` is not a list of strings, or an option is unknown.
            PeftValueError: An unknown name, or a weight would be NaN, or an adapter is merged with
                other options; nothing is merged then.
            PeftNotSupportedError: A weight is quantized in an unknown format, or the method can't
                be merged, or a decomposed adapter would not apply in its place among the others.
        """
        names = self._names_to_merge(adapter_names, options)
        named = dict(self.named_tuner_layers())
        by_name = {name: self._merge_options_of(name, options) for name in names}
        _model_merges.check_shared(self.model, named, by_name)
        _model_merges.merge(named, by_name, safe_merge)
        self._merged_lately = True

    def _names_to_merge(self, names: Sequence[str] | None, options: Iterable[str]) -> list[str]:
        """Return the names of the adapters to merge, by default the active ones; check options."""
        check_merge_options(options, self.merge_options, type(self).__name__)
        return self.check_names(checked_names(self.active_adapters if names is None else names))

    def _merge_options_of(
        self, adapter_name: str, options: Mapping[str, object]
    ) -> Mapping[str, object]:
        """Return the checked options of a merge that are for an adapter's method."""
        method = self.method_of(self.peft_config[adapter_name])
        own = {name: value for name, value in options.items() if name in method.merge_options}
        return method.merge_options_of(adapter_name, own)

    @changes_all
    def unmerge_adapter(self) -> None:
        """Unmerge all adapters, which restores the base weights exactly.

        Raises:
            PeftRuntimeError: A loaded state dict had them merged and lacks the original weights.
        """
        _model_merges.unmerge(self.tuner_layers())

    @changes_all
    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        **options: Any,
    ) -> nn.Module:
        """Return the base model with adapters merged into its weights, without adapter layers.

        A weight that its layer computes in each forward (`weight_norm`, …) becomes a parameter.

        Args:
            progressbar: Show one.
            safe_merge: Check that every resulting weight is finite.
            adapter_names: Which adapters, by default the active ones.
            **options: Arguments of the method, one of its `merge_options` each.

        Raises:
            As `merge_adapter`.
        """
        names = self._names_to_merge(adapter_names, options)
        chosen = {name: self._merge_options_of(name, options) for name in names if options}
        for wrapper in self.auxiliary_wrappers():
            wrapper.check_one_of(names)
        was_tied = tied_weights.is_tied(self.model)
        with _model_merges.for_good(self.model, self.tuner_layers(), names, chosen) as missing:
            if adapter_names is not None or missing:
                self.merge_adapter(adapter_names, safe_merge, **options)
        plain = self._unload(names, "Unloading and merging model" if progressbar else None)
        tied_weights.settle(plain, was_tied)
        replication.keep(plain)
        return plain

    @changes_all
    def unload(self) -> nn.Module:
        """Return the base model as it was: adapters are unmerged and removed.

        Raises:
            As `unmerge_adapter`.
        """
        if self.merged_adapters:
            self.unmerge_adapter()
        plain = self._unload([])
        replication.restore(plain)
        return plain

    def _unload(self, adapters: list[str], progressbar: str | None = None) -> nn.Module:
        """Remove the adapter layers; of full modules, keep the trained copies of some adapters."""
        _model_merges.unload(self.model, self.tuner_layer_cls, adapters, progressbar)
        for name in self.shared_parameter_names:
            self.shared_owner(name)._modules.pop(name, None)
        for method in self.methods():
            method.detach_adapters()
        self.inference_cache = InferenceCache()
        self.peft_config.clear()
        self._active = []
        return self.model
