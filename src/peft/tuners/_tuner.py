# SPDX-License-Identifier: Apache-2.0
"""`BaseTuner`: puts adapters into a model (plan → build → swap), switches, merges and removes them.

Planning and building raise every error there is to raise and touch nothing; swapping only puts finished parts in place. A method's
tuner names its layer class and says how one is made; it may add rules, parameters that all layers share, and transforms between
its tensors and their form in a checkpoint.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import PeftConfig
from ..utils.constants import DEFAULT_TARGET_MODULES
from ..utils.error import PeftTypeError, PeftValueError
from ..utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, get_submodules
from . import _geometry, _plan
from ._build import Build, Construction
from ._geometry import Placement
from ._layer import AdapterParameterDict, BaseTunerLayer, names_to_merge


class BaseTuner(nn.Module):
    """A model with adapters of one method.

    Args:
        model: The base model; adapters are put into it in place.
        peft_config: The first adapter's config, or a dictionary with its name as key.
        adapter_name: The first adapter's name.
        low_cpu_mem_usage: Make the parameters on the meta device, to be filled from a checkpoint.
        state_dict: Adapt the modules this checkpoint has parameters for, in place of those the config targets.
        autocast_adapter_dtype: Keep adapters in float32 where the base has 16 bits.
        shared_root: Module that parameters shared by all layers are registered on; by default this tuner.
        initialise: False leaves the adapter's memory as it is, for `check` to fill.
        check: Called with the finished adapter before it is put in; may fill its tensors, or raise.

    Raises:
        PeftValueError: The config is invalid or does not fit the model, which is left as it was.

    Attributes:
        model: The base model.
        peft_config: Each adapter's config, by name.
        prefix: How names of adapter parameters start.
    """

    prefix: ClassVar[str] = ""
    tuner_layer_cls: ClassVar[type[BaseTunerLayer]] = BaseTunerLayer
    shared_parameter_names: ClassVar[tuple[str, ...]] = ()
    # Keyword arguments of the model's forward and generate that are meant for the method and not for the model.
    call_arguments: ClassVar[tuple[str, ...]] = ()
    # What `layer_class` accepts, for messages.
    supported: ClassVar[str] = ""
    default_target_modules: ClassVar[Mapping[str, Any]] = DEFAULT_TARGET_MODULES

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
        *,
        autocast_adapter_dtype: bool = True,
        shared_root: nn.Module | None = None,
        initialise: bool = True,
        check: Callable[[Build], None] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.peft_config: dict[str, PeftConfig] = {}
        self._active: str | list[str] = []
        self._shared_root = (self if shared_root is None else shared_root,)  # in a tuple, not to be registered
        self.train(model.training)
        config = peft_config if isinstance(peft_config, PeftConfig) else peft_config[adapter_name]
        self.add_adapter(
            adapter_name,
            config,
            Construction(autocast_adapter_dtype, torch.device("meta") if low_cpu_mem_usage else None, initialise),
            state_dict=state_dict,
            check=check,
        )

    # --- what a method supplies ---------------------------------------------------------------------------------------

    def layer_class(self, config: Any, module: nn.Module) -> type[BaseTunerLayer] | None:
        """The class of layer that adapts `module`, None if the method can't."""
        raise NotImplementedError

    def layer_options(self, config: Any, path: str, build: Build) -> dict[str, Any]:
        """Further arguments for making the layer at `path`."""
        return {}

    def problems(self, config: Any, path: str, module: nn.Module) -> Iterator[str]:
        """What about the module at `path` conflicts with `config`, a sentence each."""
        yield from ()

    def build_shared(self, config: Any, placement: Placement, initialise: bool) -> dict[str, nn.Parameter]:
        """An adapter's parameters that all layers share, by attribute name."""
        return {}

    def attach(self, build: Build) -> None:
        """Tie a finished adapter, now in the model, to what else the method needs there."""

    def detach(self) -> None:
        """Undo `attach`, when no adapter is left."""

    @classmethod
    def loaded(cls, model: nn.Module, adapter_name: str) -> None:
        """Take note that a checkpoint was written into an adapter of `model`."""

    def call_context(self, args: tuple[Any, ...], arguments: dict[str, Any]) -> AbstractContextManager[None]:
        """A context for a whole call that runs the model many times (`generate`). The method takes its own entries out of
        `arguments`, the call's keyword arguments.
        """
        return nullcontext()

    @classmethod
    def _export_state(cls, state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
        """An adapter's tensors in the form its checkpoint has."""
        return state

    @classmethod
    def _import_state(cls, state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
        """The tensors of a checkpoint in the form the adapter has."""
        return state

    def saved_config(self, adapter_name: str) -> PeftConfig:
        """The config to write beside an adapter's weights."""
        return self.peft_config[adapter_name]

    # --- putting adapters in ------------------------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        config: PeftConfig,
        construction: Construction | None = None,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        check: Callable[[Build], None] | None = None,
    ) -> None:
        """Put another adapter into the model. The first becomes the active one; later ones wait for `set_adapter`.

        Raises:
            PeftValueError: As for the class; model and config are left as they were.
        """
        with _restored_on_error(config):
            plan = _plan.make(self, adapter_name, config, state_dict)
            build = self._build(plan, construction or Construction())
            if check is not None:
                check(build)
            self._swap(plan, build)

    def _build(self, plan: _plan.Plan, construction: Construction) -> Build:
        """Make all parts of an adapter, away from the model."""
        build = Build(plan.adapter_name, plan.config)
        root = self._shared_root[0]
        for name in self.shared_parameter_names:
            build.containers[name] = root._modules.get(name) or AdapterParameterDict()  # type: ignore[assignment]
        first = _geometry.innermost(next(iter(plan.targets.values())))
        build.shared = self.build_shared(plan.config, **construction.options(first))
        for path, module in plan.targets.items():
            base = module.base_layer if isinstance(module, self.tuner_layer_cls) else module
            layer_cls = self.layer_class(plan.config, base)
            assert layer_cls is not None  # the plan saw to it
            options = {**construction.options(base), **self.layer_options(plan.config, path, build)}
            build.layers[path] = layer_cls(base, plan.adapter_name, plan.config, **options)  # type: ignore[call-arg, arg-type]
        for path, module in plan.trained_whole.items():
            build.copies[path] = ModulesToSaveWrapper.copy_of(module)
        return build

    def _swap(self, plan: _plan.Plan, build: Build) -> None:
        """Put a finished adapter in its place. Nothing here can fail."""
        name, first = build.adapter_name, not self.peft_config
        if first:
            self._freeze_base()
        for path, layer in build.layers.items():
            existing = self.model.get_submodule(path)
            if isinstance(existing, self.tuner_layer_cls):
                existing.adopt(layer)
                continue
            for place in plan.places[path]:
                parent, _, child = get_submodules(self.model, place)
                setattr(parent, child, layer)
                _geometry.keep_off_fast_path(parent, layer)
        for path, module in build.copies.items():
            parent, existing, child = get_submodules(self.model, path)
            if not isinstance(existing, ModulesToSaveWrapper):
                existing = ModulesToSaveWrapper(existing)
                setattr(parent, child, existing)
            existing.modules_to_save[name] = module
        root = self._shared_root[0]
        for attribute, parameter in build.shared.items():
            root._modules.setdefault(attribute, build.containers[attribute])
            build.containers[attribute][name] = parameter
        self.peft_config[name] = build.config
        self._train_biases(build.config)
        if first:
            self.set_adapter(name, inference_mode=build.config.inference_mode)
        else:
            self._join(build)
        self.attach(build)

    def _join(self, build: Build) -> None:
        """Give the parts of a later adapter the state of the others: waiting and frozen."""
        active = self._active
        for path in (*build.layers, *build.copies):
            module: Any = self.model.get_submodule(path)
            if isinstance(module, BaseTunerLayer):
                module._active_adapter = active
                module._disable_adapters = self.disabled
            module.set_requires_grad(build.adapter_name, False)
        for parameter in build.shared.values():
            parameter.requires_grad_(False)

    def _freeze_base(self) -> None:
        """Freeze every parameter that belongs to no adapter."""
        own: set[int] = set()
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer):
                own |= {id(p) for name in module.scaling for p in module.adapter_parameters(name)}
            elif isinstance(module, AdapterParameterDict):
                own |= {id(p) for p in module.parameters()}
            elif isinstance(module, ModulesToSaveWrapper):
                own |= {id(p) for p in module.modules_to_save.parameters()}
        for parameter in self.model.parameters():
            if id(parameter) not in own:
                parameter.requires_grad_(False)

    def _train_biases(self, config: PeftConfig) -> None:
        """Unfreeze the biases that a config's `bias` names."""
        for name in _plan.bias_names(config, self.model):
            self.model.get_parameter(name).requires_grad_(not config.inference_mode)

    # --- walking ------------------------------------------------------------------------------------------------------

    def named_layers(self) -> Iterator[tuple[str, BaseTunerLayer]]:
        """This method's layers, with their module paths."""
        for path, module in self.model.named_modules():
            if isinstance(module, self.tuner_layer_cls):
                yield path, module

    def layers(self) -> Iterator[BaseTunerLayer]:
        """This method's layers."""
        return (layer for _, layer in self.named_layers())

    def wrappers(self) -> Iterator[ModulesToSaveWrapper]:
        """The modules that are trained whole."""
        return (module for module in self.model.modules() if isinstance(module, ModulesToSaveWrapper))

    def _parts(self) -> Iterator[BaseTunerLayer | ModulesToSaveWrapper]:
        """All modules that have something for each adapter."""
        yield from self.layers()
        yield from self.wrappers()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward, adapters included."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What the tuner lacks is read from the base model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    # --- switching ----------------------------------------------------------------------------------------------------

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or their list."""
        return self._active

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return [self._active] if isinstance(self._active, str) else list(self._active)

    @property
    def disabled(self) -> bool:
        """Whether the adapters are switched off."""
        return any(layer.disable_adapters for layer in self.layers())

    @property
    def merged_adapters(self) -> list[str]:
        """Adapters that are merged into the base weights."""
        return list(dict.fromkeys(name for layer in self.layers() for name in layer.merged_adapters))

    def check_names(self, adapter_names: str | Iterable[str]) -> list[str]:
        """The names as a list.

        Raises:
            PeftValueError: One is not an adapter of this model.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names:
            if name not in self.peft_config:
                raise PeftValueError(f"Adapter {name} not found; this model has {', '.join(self.peft_config) or 'none'}.")
        return names

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several that add up, the active one; others are frozen.

        Args:
            adapter_name: Name or list of names.
            inference_mode: Leave the active adapters frozen too.

        Raises:
            PeftValueError: An unknown name, or adapters that can't be active together; nothing is changed.
        """
        names = self.check_names(adapter_name)
        for wrapper in self.wrappers():
            if sum(name in wrapper.modules_to_save for name in names) > 1:
                raise PeftValueError(f"Only one adapter can be set at a time where several train a copy of one module: {names}.")
        if self.merged_adapters:
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
            self.unmerge_adapter()
        for module in self._parts():
            module.set_adapter(adapter_name, inference_mode)
        for container in self._shared():
            for name in container:
                container[name].requires_grad_(name in names and not inference_mode)
        self._active = adapter_name

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
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
            if self.peft_config[name].bias != "none":
                warnings.warn(
                    f"Careful, disabling adapter layers with bias configured to be '{self.peft_config[name].bias}' does not "
                    "produce the same output as the base model would without adaption.",
                    stacklevel=2,
                )
        self._enable(False)

    def _enable(self, enabled: bool) -> None:
        for module in self._parts():
            module.enable_adapters(enabled)

    def _shared(self) -> Iterator[AdapterParameterDict]:
        for name in self.shared_parameter_names:
            container = self._shared_root[0]._modules.get(name)
            if isinstance(container, AdapterParameterDict):
                yield container

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was active, the others that were stay so, else the first by name becomes active.

        Raises:
            PeftValueError: There is no such adapter.
        """
        if adapter_name not in self.peft_config:
            raise PeftValueError(f"Adapter {adapter_name} does not exist; this model has {', '.join(self.peft_config) or 'none'}.")
        active = self.active_adapters
        del self.peft_config[adapter_name]
        for module in self._parts():
            module.delete_adapter(adapter_name)
        for container in self._shared():
            if adapter_name in container:
                del container[adapter_name]
        if adapter_name in active:
            left = [name for name in active if name != adapter_name]
            if not left and self.peft_config:
                left = sorted(self.peft_config)[:1]
                message = f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {left[0]}."
                warnings.warn(message, stacklevel=2)
            self.set_adapter(left[0] if len(left) == 1 else left)

    # --- merging and removing -----------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False, **options: Any) -> None:
        """Add adapters' deltas to the base weights, for speed; `unmerge_adapter` takes them off again exactly.

        Args:
            adapter_names: Which adapters, by default the active ones.
            safe_merge: Check first that every resulting weight is finite.
            **options: What the method needs to know besides.

        Raises:
            PeftValueError: An unknown name, or a weight would break; nothing is merged then.
            PeftNotSupportedError: A weight is quantised, or the method can't be merged.
        """
        if adapter_names is not None and not isinstance(adapter_names, str):
            self.check_names(adapter_names)
        names = names_to_merge(self, adapter_names)
        layers = list(self.layers())
        for layer in layers:
            _geometry.dense_weight(layer.get_base_layer())
            if safe_merge:
                layer.check_merge(names, **options)
        for layer in layers:
            layer.merge(adapter_names=names, **options)

    def unmerge_adapter(self) -> None:
        """Take all merged deltas off the base weights again."""
        merged = [layer for layer in self.layers() if layer.merged]
        if not merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        for layer in merged:
            layer.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        **options: Any,
    ) -> nn.Module:
        """The base model with adapters merged into its weights, and nothing of this package left in it.

        Args:
            progressbar: Show one.
            safe_merge: Check first that every resulting weight is finite.
            adapter_names: Which adapters, by default the active ones.
            **options: What the method needs to know besides.

        Raises:
            As `merge_adapter`.
        """
        if not (adapter_names is None and self.merged_adapters == self.active_adapters):
            self.merge_adapter(adapter_names, safe_merge, **options)
        return self._unload(progressbar, "Unloading and merging model", trained_copies=True)

    def unload(self) -> nn.Module:
        """The base model as it was: adapters are taken out, merged ones taken off."""
        if self.merged_adapters:
            self.unmerge_adapter()
        return self._unload(False, "Unloading model", trained_copies=False)

    def _unload(self, progressbar: bool, description: str, trained_copies: bool) -> nn.Module:
        modules = list(self.model.named_modules(remove_duplicate=False))
        if progressbar:
            from tqdm import tqdm

            modules = tqdm(modules, desc=description)  # type: ignore[assignment]
        for path, module in modules:
            plain: nn.Module | None = None
            if isinstance(module, self.tuner_layer_cls):
                plain = module.base_layer
            elif isinstance(module, AuxiliaryTrainingWrapper):
                plain = module._current() if trained_copies and isinstance(module, ModulesToSaveWrapper) else None
                plain = plain or module.original_module
            if plain is not None:
                parent, _, child = get_submodules(self.model, path)
                setattr(parent, child, plain)
        for name in self.shared_parameter_names:
            self._shared_root[0]._modules.pop(name, None)
        self.detach()
        self.peft_config.clear()
        self._active = []
        return self.model


@contextmanager
def _restored_on_error(config: PeftConfig) -> Iterator[None]:
    """Give a config its fields back if what happens inside fails."""
    if not isinstance(config, PeftConfig):
        raise PeftTypeError(f"The config must be a PeftConfig, got {type(config)}.")
    before = dict(vars(config))
    try:
        yield
    except BaseException:
        vars(config).clear()
        vars(config).update(before)
        raise
