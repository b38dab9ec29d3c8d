# SPDX-License-Identifier: Apache-2.0
"""`BaseTuner`: puts adapters into a model, plan → build → swap.

Planning and building raise every error there is to raise and touch nothing; swapping only puts
finished parts in place. A method's tuner names its layer class and says how one is made; it may add
rules, parameters that all layers share, and transforms between its tensors and their form in a
checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..base.constants import DEFAULT_TARGET_MODULES
from ..base.containers import walk
from ..base.errors import PeftNotSupportedError, PeftRuntimeError, PeftTypeError
from ..base.geometry import Placement
from ..base.modules import get_submodules
from ..base.tensors import ordinary_tensors
from ..config import PeftConfig, check_config
from ..integrations.accelerate import end_offloading
from . import base_layer, routed_experts
from . import combining as _combining
from . import plan as _plan
from .adapted_model import AdaptedModel
from .adapters import AdapterParameterDict
from .auxiliary import ModulesToSaveWrapper
from .build import Build, Construction, plain_copy
from .combining import Combination, Combined
from .fused_paths import avoid_fused_paths
from .layer import BaseTunerLayer, layer_of
from .parameter_roles import Role
from .trainable_tokens import TrainableTokensWrapper


class BaseTuner(AdaptedModel):
    """A model with adapters of one method.

    Args:
        model: The base model; adapters are put into it in place.
        peft_config: The first adapter's config, or a dictionary with its name as key. None for a
            tuner without adapters yet.
        adapter_name: The first adapter's name.
        low_cpu_mem_usage: Make the parameters on the meta device, to be filled from a checkpoint.
        state_dict: Adapt the modules this checkpoint has parameters for, in place of those the
            config targets.
        autocast_adapter_dtype: Keep adapters in float32 where the base has 16 bits.
        shared_root: Module that parameters shared by all layers are registered on; by default this
            tuner.
        initialize: False leaves the adapter's memory as it is, for `fill` to write.
        fill: Called with the finished adapter before it is put in; fills its tensors, or raises.

    Raises:
        PeftValueError: The config is invalid or does not fit the model, which is left as it was.

    Attributes:
        model: The base model.
        peft_config: Each adapter's config, by name.
        prefix: How names of adapter parameters start.
    """

    prefix: ClassVar[str] = ""
    # What `tuner_layer_class` accepts, for messages.
    supported_modules: ClassVar[str] = ""
    default_target_modules: ClassVar[Mapping[str, Any]] = DEFAULT_TARGET_MODULES
    # Tensors that a checkpoint may have in another form, with the names and dtypes of the parts
    # `_import_state` makes them from.
    saved_forms: ClassVar[Mapping[str, Mapping[str, torch.dtype]]] = {}
    # Containers of modules that have one parameter, whose name a checkpoint leaves out, with that
    # name.
    saved_bare: ClassVar[Mapping[str, str]] = {}
    # Parameters in a checkpoint that have one entry for each token where they adapt the token
    # embedding or the output head, with the dimension.
    saved_by_token: ClassVar[Mapping[str, int]] = {}
    # Names in a checkpoint's keys of tensors in which minus infinity stands for what is left out.
    masked_names: ClassVar[tuple[str, ...]] = ()
    # What the parameters of its containers are for, by role; an optimiser gives each role a rate.
    parameter_roles: ClassVar[Mapping[str, Role]] = {}
    # What `add_weighted_adapter` can do with this method's adapters.
    combination_types: ClassVar[tuple[str, ...]] = ()
    model_methods: ClassVar[type | None] = (
        None  # what a model around this tuner has too, see `methods_of`
    )

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig] | None,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
        *,
        autocast_adapter_dtype: bool = True,
        shared_root: nn.Module | None = None,
        initialize: bool = True,
        fill: Callable[[Build], None] | None = None,
    ) -> None:
        super().__init__(model, shared_root)
        if peft_config is None:
            return
        config = peft_config if isinstance(peft_config, PeftConfig) else peft_config[adapter_name]
        self.add_adapter(
            adapter_name,
            config,
            Construction(
                autocast_adapter_dtype,
                torch.device("meta") if low_cpu_mem_usage else None,
                initialize,
            ),
            state_dict=state_dict,
            fill=fill,
        )

    def tuner_layer_class(self, config: Any, module: nn.Module) -> type[BaseTunerLayer] | None:
        """The class of layer that adapts `module`, None if the method can't."""
        raise NotImplementedError

    def tuner_layer_options(self, config: Any, path: str, build: Build) -> dict[str, Any]:
        """Further arguments for making the layer at `path`."""
        return {}

    def target_problems(self, config: Any, path: str, module: nn.Module) -> Iterator[str]:
        """What about the module at `path` conflicts with `config`, a sentence each."""
        yield from ()

    def target_remedy(self, config: Any, modules: Sequence[nn.Module]) -> str:
        """A sentence after all of the targets' problems: what would suit all of them."""
        return ""

    def complete(self, config: Any) -> None:
        """Fill in what a config says by reference to something else; called before anything is
        decided by it.

        Raises:
            PeftError: What it refers to can't be had.
        """

    def build_shared_parameters(
        self, config: Any, placement: Placement, initialize: bool
    ) -> dict[str, nn.Parameter]:
        """An adapter's parameters that all layers share, by attribute name."""
        return {}

    def attach_adapter(self, build: Build) -> None:
        """Tie a finished adapter, now in the model, to what else the method needs there."""

    @classmethod
    def check_loadable(cls, model: nn.Module, adapter_name: str) -> None:
        """Refuse new values for a merged adapter, whose old ones have to come off the weights
        first.

        Raises:
            PeftRuntimeError: It is merged.
        """
        if any(
            isinstance(module, BaseTunerLayer) and adapter_name in module.merged_adapters
            for _, module in walk(model)
        ):
            raise PeftRuntimeError(
                f"Adapter {adapter_name} is merged; call `unmerge_adapter` before loading into it."
            )

    @classmethod
    def note_loaded(cls, model: nn.Module, adapter_name: str) -> None:
        """Take note that a checkpoint was written into an adapter of `model`."""

    @classmethod
    def _export_state(cls, state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
        """An adapter's tensors in the form its checkpoint has."""
        return state

    @classmethod
    def _import_state(cls, state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
        """The tensors of a checkpoint in the form the adapter has."""
        return state

    @classmethod
    def of(cls, model: Any, config: PeftConfig) -> BaseTuner:
        """The tuner of a model's adapters of this method: a `PeftModel`'s own, or one for a model
        that they were injected into.
        """
        held = model._modules.get("base_model")
        if isinstance(held, BaseTuner):
            return held.method_of(config)
        tuner = cls(model, None, shared_root=model)
        tuner.peft_config = model.peft_config
        return tuner

    def build_for(
        self,
        adapter_name: str,
        config: PeftConfig,
        layers: Mapping[str, BaseTunerLayer],
        known: PeftConfig,
    ) -> Build:
        """An adapter as a config describes it for layers of the model, without values and away from
        the model; in the form in which the model holds the adapter of config `known`, where a
        method has several.
        """
        return self._build(
            _plan.Plan(adapter_name, config, dict(layers)), Construction(initialize=False)
        )

    def config_to_save(self, adapter_name: str) -> PeftConfig:
        """The config to write beside an adapter's weights."""
        return self.peft_config[adapter_name]

    @classmethod
    def conversion_options(cls, config: Any, **options: Any) -> dict[str, Any]:
        """What `low_rank_factors` of the layers takes besides, checked and put as they take it.

        Raises:
            PeftTypeError: An option is for another method.
        """
        if foreign := sorted(name for name, value in options.items() if value is not None):
            raise PeftTypeError(
                f"`{foreign[0]}` is for another method than {cls.__name__}; leave it out."
            )
        return {}

    @classmethod
    def conversion_tasks(cls, config: Any, tasks: Any) -> dict[str, Any]:
        """The tasks of an adapter that has a delta for each: a name for a folder, and the task.

        Raises:
            PeftNotSupportedError: It has one delta.
        """
        raise PeftNotSupportedError(
            f"An adapter of {cls.__name__} has one delta and no tasks; use `save_as_lora`."
        )

    def without_start(self, model: nn.Module, adapter_name: str) -> tuple[Any, dict[str, Tensor]]:
        """Config and tensors of an adapter that starts from the base weight, as one that does not.

        Raises:
            PeftNotSupportedError: It does not start so.
        """
        raise PeftNotSupportedError(
            "`path_initial_model_for_weight_conversion` is not supported for adapters that leave "
            "the base weight as it is, and "
            f"{adapter_name} does; leave it out."
        )

    def combine(self, request: Combination) -> Combined:
        """A new adapter's tensors, made of those of others; `request` is one of the
        `combination_types`.
        """
        raise NotImplementedError

    def method_of(self, config: PeftConfig) -> BaseTuner:
        """The tuner that plans and builds an adapter: this one, unless it holds several methods."""
        return self

    def add_adapter(
        self,
        adapter_name: str,
        config: PeftConfig,
        construction: Construction | None = None,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        fill: Callable[[Build], None] | None = None,
    ) -> None:
        """Put another adapter into the model. The first becomes the active one; later ones wait for
        `set_adapter`.

        Raises:
            PeftValueError: As for the class; model and config are left as they were.
        """
        with _restored_on_error(config), ordinary_tensors():
            method, construction = self.method_of(config), construction or Construction()
            # Clients that load a file by themselves inject a frozen adapter first.
            is_new = fill is None and construction.device is None and not config.inference_mode
            plan = _plan.make(method, adapter_name, config, state_dict, is_new=is_new)
            build = method._build(plan, construction)
            if fill is not None:
                fill(build)
            self._swap(plan, build)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        heads: str | None = None,
    ) -> dict[str, float]:
        """Make an adapter out of others, which stay as they are. It waits, frozen, until
        `set_adapter`.

        Args:
            adapters: Names of adapters of one method.
            weights: A factor for each, of any sign.
            adapter_name: The new adapter's name.
            combination_type: What the method's `combination_types` lists. "cat" is the weighted sum
                of the deltas, exactly; "svd" the nearest to it that the method has of `svd_rank`.
            svd_rank: Rank of an approximation, by default the largest of the adapters'.
            svd_clamp: Quantile at which entries of singular vectors are cut off.
            svd_full_matrices, svd_driver: For `torch.linalg.svd`; they do not change the result.
            density, majority_sign_method: The share of elements that pruning keeps; how signs are
                elected, "total" or "frequency".
            heads: What becomes of modules that several train whole: "mean" (by the weights), or the
                adapter whose is taken (so an adapter called "mean", if it is one of `adapters`).

        Returns:
            For combinations that aim at the weighted sum, each layer's distance from it, relative
            to it in the Frobenius norm.

        Raises:
            PeftTypeError: Names are no list.
            PeftValueError: A value is not allowed, or the method has no such combination, or the
                adapters do not fit together; nothing is changed.
        """
        svd = svd_rank, svd_clamp, svd_full_matrices, svd_driver
        numbers = list(weights) if isinstance(weights, Iterable) else weights
        request = Combination(
            adapters, numbers, combination_type, *svd, density, majority_sign_method, heads
        )
        return _combining.add(self, adapter_name, request)

    def _build(self, plan: _plan.Plan, construction: Construction) -> Build:
        """Make all parts of an adapter, away from the model."""
        build = Build(plan.adapter_name, plan.config)
        for name in self.shared_parameter_names:
            known: Any = self._shared_owner(name)._modules.get(name)
            if known is None:  # layers that another tuner put into the model have theirs
                known = next((getattr(layer, name) for layer in self.tuner_layers()), None)
            build.containers[name] = (
                AdapterParameterDict().train(self.training) if known is None else known
            )
        first = base_layer.innermost(next(iter(plan.targets.values())))
        build.shared = self.build_shared_parameters(plan.config, **construction.options(first))
        for path, module in plan.targets.items():
            existing = layer_of(module, self.tuner_layer_cls)
            base = module if existing is None else existing.base_layer
            layer_cls = self.tuner_layer_class(plan.config, base)
            assert layer_cls is not None  # the plan saw to it
            options = {
                **construction.options(base),
                **self.tuner_layer_options(plan.config, path, build),
            }
            layer = layer_cls(base, plan.adapter_name, plan.config, **options)  # type: ignore[call-arg, arg-type]
            for attribute in layer.container_names:
                getattr(layer, attribute).train(layer.training)
            build.layers[path] = layer
        for path, module in plan.trained_whole.items():
            build.copies[path] = plain_copy(path, module)
        for path, indices in plan.tokens.indices.items():
            module, how = self.model.get_submodule(path), construction
            build.tokens[path] = TrainableTokensWrapper.rows_of(
                module, indices, how.autocast, how.device, how.initialize
            )
        return build

    def _swap(self, plan: _plan.Plan, build: Build) -> None:
        """Put a finished adapter in its place. Nothing here can fail."""
        name, first = build.adapter_name, not self.peft_config
        method = self.method_of(build.config)
        if first:
            self._freeze_base()
        self.targeted_module_names += [
            path for path in build.layers if path not in self.targeted_module_names
        ]
        for path, layer in build.layers.items():
            known = layer_of(self.model.get_submodule(path), method.tuner_layer_cls)
            if known is not None:
                known.adopt(layer)
                continue
            for place in plan.places[path]:
                parent, _, child = get_submodules(self.model, place)
                setattr(parent, child, layer)
        avoid_fused_paths(self.model)
        for path, module in build.copies.items():
            parent, existing, child = get_submodules(self.model, path)
            if not isinstance(existing, ModulesToSaveWrapper):
                existing = ModulesToSaveWrapper(existing)
                setattr(parent, child, existing)
            existing.modules_to_save[name] = module
        self._swap_tokens(plan, build)
        routed_experts.note(
            self.model, (*build.layers, *build.copies, *build.tokens, *plan.tokens.tied)
        )
        for attribute, parameter in build.shared.items():
            self._shared_owner(attribute)._modules.setdefault(
                attribute, build.containers[attribute]
            )
            end_offloading(build.containers[attribute])
            build.containers[attribute][name] = parameter
        self.peft_config[name] = build.config
        self._train_biases(build.config)
        if first:
            self.set_adapter(name, inference_mode=build.config.inference_mode)
        else:
            self._join(build, method.tuner_layer_cls)
        method.attach_adapter(build)

    def _swap_tokens(self, plan: _plan.Plan, build: Build) -> None:
        """Put trainable rows beside embeddings, and those embeddings' rows beside the heads that
        share their weight.
        """
        for path in (*build.tokens, *plan.tokens.tied):
            parent, module, child = get_submodules(self.model, path)
            if not isinstance(module, TrainableTokensWrapper):
                owner: Any = (
                    self.model.get_submodule(plan.tokens.tied[path])
                    if path in plan.tokens.tied
                    else None
                )
                module = TrainableTokensWrapper(module, owner)
                setattr(parent, child, module)
            if path in build.tokens:
                module.add_rows(build.adapter_name, build.tokens[path])

    def _join(self, build: Build, layer_cls: type[BaseTunerLayer]) -> None:
        """Give the parts of a later adapter the state of the others: waiting and frozen."""
        active, disabled = self._active, self.adapters_disabled
        for path in (*build.layers, *build.copies, *build.tokens):
            module: Any = self.model.get_submodule(path)
            module = layer_of(module, layer_cls) or module
            module._disable_adapters = disabled
            if isinstance(module, BaseTunerLayer):
                module._active_adapter = active
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


@contextmanager
def _restored_on_error(config: PeftConfig) -> Iterator[None]:
    """Give a config its fields back if what happens inside fails."""
    check_config(config)
    before = dict(vars(config))
    try:
        yield
    except BaseException:
        vars(config).clear()
        vars(config).update(before)
        raise
