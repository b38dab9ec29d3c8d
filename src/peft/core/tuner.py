# SPDX-License-Identifier: Apache-2.0
"""`BaseTuner`: a model with adapters of one method, and the hooks of the method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from ..base.constants import DEFAULT_TARGET_MODULES
from ..base.errors import PeftNotSupportedError, PeftTypeError
from ..base.geometry import Placement
from ..checkpoint.format import CheckpointFormat
from ..config import PeftConfig, TargetedConfig
from ..integrations.accelerate import end_offloading
from .adapted_model import AdaptedModel
from .combining import Combination, Combined
from .injection import Build, Construction, build_adapter
from .layer import BaseTunerLayer
from .method_info import Role
from .parameter_layer import ParameterLayer
from .parameter_targets import ParameterTarget, targets_of
from .plan import Plan
from .renamed_targets import present_names

C = TypeVar("C", bound=TargetedConfig)


class BaseTuner(AdaptedModel[C]):
    """A model with adapters of one method, whose configs are of class `C`.

    A method's tuner names its layer class and says how a layer is made. It may add rules for
    targets, parameters that all layers share, and a storage format of its own.

    Args:
        As `AdaptedModel`.

    Attributes:
        prefix: Start of the names of adapter parameters.
    """

    prefix: ClassVar[str] = ""
    # Kinds of modules that `tuner_layer_class` accepts, for messages.
    supported_modules: ClassVar[str] = ""
    # Targets by model type, for configs that name none.
    default_target_modules: ClassVar[Mapping[str, str | tuple[str, ...]]] = DEFAULT_TARGET_MODULES
    # Class of the layers that adapt parameters, None for a method that has none.
    parameter_layer_cls: ClassVar[type[ParameterLayer] | None] = None
    # Conversion of an adapter's tensors to those of a checkpoint, and back.
    checkpoint_format: ClassVar[CheckpointFormat[Any]] = CheckpointFormat()
    # Roles of the parameters; an optimizer gives each role a learning rate.
    parameter_roles: ClassVar[Mapping[str, Role]] = {}
    # Values of `combination_type` that `add_weighted_adapter` takes.
    combination_types: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def of(cls, model: nn.Module, config: C) -> BaseTuner[C]:
        """Return the tuner of a `PeftModel`, or a new one for a model with injected adapters."""
        held = model._modules.get("base_model")
        if isinstance(held, AdaptedModel):
            method = held.method_of(config)
            assert isinstance(method, BaseTuner)
            return method
        tuner = cls(model, None, shared_root=model)
        tuner.peft_config = model.peft_config  # type: ignore[assignment]
        return tuner

    def tuner_layer_class(self, config: C, module: nn.Module) -> type[BaseTunerLayer] | None:
        """Return the class of layer that adapts `module`, None if the method can't."""
        raise NotImplementedError(f"{type(self).__name__} lacks `tuner_layer_class`.")

    def tuner_layer_options(self, config: C, path: str, build: Build[C]) -> dict[str, object]:
        """Return further arguments for making the layer at `path`."""
        return {}

    def target_problems(self, config: C, path: str, module: nn.Module) -> Iterator[str]:
        """Yield the conflicts of the module at `path` with `config`, a sentence each."""
        yield from ()

    def parameter_layer_class(self, target: ParameterTarget) -> type[ParameterLayer]:
        """Return the class of layer that adapts a parameter."""
        assert self.parameter_layer_cls is not None
        return self.parameter_layer_cls

    def parameter_options(
        self, config: C, target: ParameterTarget, build: Build[C]
    ) -> dict[str, object]:
        """Return further arguments for making the layer of a parameter."""
        return self.tuner_layer_options(config, target.pattern_path, build)

    def parameter_problems(self, config: C, target: ParameterTarget) -> Iterator[str]:
        """Yield the conflicts of a parameter with `config`, a sentence each."""
        yield from ()

    def target_remedy(self, config: C, modules: Sequence[nn.Module]) -> str:
        """Return a sentence to put after all targets' conflicts: a value that suits all modules."""
        return ""

    def prepare_model(self, config: C) -> Callable[[], None]:
        """Change the model before an adapter is planned, and return a function that undoes it.

        The function is called if the adapter can't be made. `detach_adapters` comes later.

        Raises:
            PeftValueError: The model can't be changed so.
        """
        return lambda: None

    def complete(self, config: C) -> object:
        """Return the resource that a config refers to, and fill in the fields that depend on it.

        Called before the adapter is planned; the result becomes `found` of the plan and the build.

        Raises:
            PeftError: The resource is missing or damaged.
        """
        return None

    @classmethod
    def shared_tensors(cls, config: C, present: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the tensors, by digest, that a config refers to and that other adapters may share.

        Those that are `present`, by digest, are not read again.

        Raises:
            PeftError: They are missing or damaged.
        """
        return {}

    def adjust_config(self, plan: Plan[C], construction: Construction) -> None:
        """Correct fields of `plan.config` that the planned layers contradict, with a warning."""

    def build_shared_parameters(
        self, build: Build[C], placement: Placement, initialize: bool
    ) -> dict[str, nn.Parameter]:
        """Return an adapter's parameters that all layers share, by attribute name."""
        return {}

    def put_shared(self, build: Build[C]) -> list[str]:
        """Put the parameters that an adapter's layers share into their containers, which the layers
        read; return the attributes of these.
        """
        for attribute, parameter in build.shared.items():
            container = build.containers[attribute]
            end_offloading(container)
            container[build.adapter_name] = parameter
        return list(build.shared)

    def attach_adapter(self, build: Build[C]) -> None:
        """Set up the method for an adapter that is now in the model."""

    def detach_adapter(self, adapter_name: str) -> None:
        """Undo `attach_adapter`, before an adapter is deleted."""

    def detach_adapters(self) -> None:
        """Undo the method's changes to the model outside its layers, when it is unloaded."""

    def build_for(
        self, adapter_name: str, config: C, layers: Mapping[str, BaseTunerLayer], like: str
    ) -> Build[C]:
        """Build an adapter for layers of the model, without values or changes to the model.

        The new one has the storage format of `like`, which it will replace.
        """
        plan = Plan(adapter_name, config, self.complete(config))
        plan.parameters = targets_of(layers)
        plan.targets = {p: m for p, m in layers.items() if not isinstance(m, ParameterLayer)}
        return build_adapter(self, plan, Construction(initialize=False, like=like))

    @classmethod
    def note_loaded(cls, model: nn.Module, adapter_name: str) -> None:
        """Update the method's state after a checkpoint was written into an adapter of `model`."""

    def file_contents(
        self, adapter_name: str, config: C, state: dict[str, Tensor]
    ) -> tuple[C, dict[str, Tensor]]:
        """Return the config and tensors to write to a file, where they differ from the model's."""
        return config, state

    def saved_start(self, config: C) -> object:
        """Return what a file's adapter starts with, where readers can't compute it; or raise.

        Called before values are loaded into an adapter that the model has.
        """
        return None

    def adopt_start(self, adapter_name: str, start: Any) -> None:
        """Give an adapter the `saved_start` of a file that was loaded into it."""

    def without_start(
        self, model: nn.Module, adapter_name: str
    ) -> tuple[PeftConfig, dict[str, Tensor]]:
        """Return an adapter's config and tensors for the original base weight, or raise."""
        raise PeftNotSupportedError(
            "`path_initial_model_for_weight_conversion` is not supported for adapters that leave "
            f"the base weight as it is, and {adapter_name} does; leave it out."
        )

    def combine(self, request: Combination, layers: Mapping[str, Any]) -> Combined:
        """Return the adapter of a request, of one of the `combination_types`.

        `layers` have any of the adapters, by module path.
        """
        raise NotImplementedError

    @classmethod
    def conversion_options(cls, config: C, **options: Any) -> Mapping[str, object]:
        """Return the checked arguments that `low_rank_factors` takes; raise for others."""
        if foreign := sorted(name for name, value in options.items() if value is not None):
            raise PeftTypeError(
                f"`{foreign[0]}` is for another method than {cls.__name__}; leave it out."
            )
        return {}

    @classmethod
    def decomposes(cls, config: C) -> bool:
        """Return whether an adapter has weight decomposition (DoRA)."""
        return False

    @classmethod
    def delta_views(cls, config: C) -> dict[str, Mapping[str, object]]:
        """Return the arguments of `low_rank_factors` for each delta of an adapter, by the name of
        its task; of a method without tasks there is one, "".
        """
        return {"": cls.conversion_options(config)}

    @classmethod
    def conversion_tasks(cls, config: C, tasks: Any) -> dict[str, int]:
        """Return folder name → task of an adapter with a delta for each task; raise for others."""
        raise PeftNotSupportedError(
            f"An adapter of {cls.__name__} has one delta and no tasks; use `save_as_lora`."
        )

    def config_to_save(self, adapter_name: str) -> C:
        """Return the config to write beside an adapter's weights."""
        return self.peft_config[adapter_name]

    def present_names(self, config: C, state: Mapping[str, Tensor]) -> tuple[C, dict[str, Tensor]]:
        """Return a checkpoint's config and tensors under the present names of the modules."""
        return present_names(self.model, config, state)

    def merge_options_of(
        self, adapter_name: str, options: Mapping[str, object]
    ) -> Mapping[str, object]:
        """Return the checked `merge_options` that an adapter is merged with, or raise."""
        return dict(options)

    def method_of(self, config: PeftConfig) -> BaseTuner[C]:
        """Return this tuner: all adapters are of its method."""
        return self

    def methods(self) -> tuple[BaseTuner[C]]:
        """Return this tuner, the only method of the model."""
        return (self,)
