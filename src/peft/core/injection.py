# SPDX-License-Identifier: Apache-2.0
"""Injection: put an adapter into a model.

`BaseTuner.add_adapter` goes through four steps. The first three raise every error and leave the
model as it is; the last can't fail.

1. `plan.make` chooses the modules (`plan.py`).
2. `build_adapter` makes all parts of the adapter; the model does not change.
3. A function `fill` may write the tensors of a checkpoint into them (`filling.py`).
4. `put_in` swaps the modules of the model for the finished parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..base.containers import AdapterContainer, walk
from ..base.errors import PeftValueError
from ..base.geometry import Placement
from ..base.modules import get_submodules
from ..base.progress import track
from ..config import TargetedConfig
from ..integrations.distributed import check_can_grow
from . import moe_tokens, resizing, tying
from .adapters import AdapterParameterDict, adopt, make_room
from .auxiliary import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from .base_layer import adapted_module, layer_of
from .fused_paths import avoid_fused_paths
from .layer import BaseTunerLayer
from .parameter_layer import ParameterLayer
from .parameter_targets import ParameterTarget, layer_for, nested_paths, put_layers
from .plan import Plan
from .trainable_tokens import TokenRows, TrainableTokensWrapper
from .weights import placement

C = TypeVar("C", bound=TargetedConfig)


@dataclass
class Construction:
    """Options for making an adapter's parameters.

    Args:
        autocast: Use float32 where the base layer has 16 bits.
        device: Make all of them on this device; None follows each base layer.
        initialize: Draw initial values. False leaves the memory as it is, for a checkpoint to fill.
        like: An adapter of the model whose storage format the new one has, where a method has
            several; None lets the method choose.
    """

    autocast: bool = True
    device: torch.device | None = None
    initialize: bool = True
    like: str | None = None

    def place(self, base_layer: nn.Module) -> tuple[Placement, bool]:
        """Return device and dtype of a layer's parameters, and whether they get initial values."""
        place = placement(base_layer, self.autocast, self.device)
        if place.device.type == "meta" and not self.initialize:
            # A checkpoint is filled in on the CPU if the base layer is on the meta device.
            place = place._replace(device=torch.device("cpu"))
        return place, self.initialize and place.device.type != "meta"


@dataclass
class Build(Generic[C]):
    """All parts that an adapter adds to a model.

    Args:
        adapter_name: Its name.
        config: Its config.
        found: The resource that the config refers to, as `BaseTuner.complete` returned it.
        layers: New layers around the model's own, by module path; each holds this adapter alone.
        copies: Trainable copies of the modules in `modules_to_save`, by module path.
        tokens: Trainable rows of embeddings, by module path.
        shared: Parameters that all layers share, by attribute name.
        containers: Containers that `shared` will go into, by attribute name; the layers refer to
            these already.
        parameters: Parameters with the new layers that adapt them, by the layer's path in a file.
        ties: Paths of modules that follow another one with the same weight, see `Plan`.
    """

    adapter_name: str
    config: C
    found: object = None
    layers: dict[str, BaseTunerLayer] = field(default_factory=dict)
    copies: dict[str, nn.Module] = field(default_factory=dict)
    tokens: dict[str, TokenRows] = field(default_factory=dict)
    shared: dict[str, nn.Parameter] = field(default_factory=dict)
    containers: dict[str, AdapterParameterDict] = field(default_factory=dict)
    parameters: dict[str, tuple[ParameterTarget, ParameterLayer]] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)

    def all_layers(self) -> Iterator[tuple[str, BaseTunerLayer]]:
        """Yield the new layers with their paths in a file."""
        yield from self.layers.items()
        yield from ((path, layer) for path, (_, layer) in self.parameters.items())

    def named_layers(self) -> Iterator[tuple[str, BaseTunerLayer]]:
        """Yield the new layers with the paths of the modules and parameters that they adapt."""
        yield from self.layers.items()
        yield from ((target.key, layer) for target, layer in self.parameters.values())

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each tensor with its name in the model; shared parameters lie at the root."""
        for path, layer in self.all_layers():
            for attribute in layer.container_names:
                for name, tensor in getattr(layer, attribute).state_dict(keep_vars=True).items():
                    yield f"{path}.{attribute}.{name}", tensor
        for path, module in self.copies.items():
            for name, tensor in module.state_dict(keep_vars=True).items():
                yield f"{path}.modules_to_save.{self.adapter_name}.{name}", tensor
        for path, tokens in self.tokens.items():
            yield f"{path}.token_adapter.trainable_tokens_delta.{self.adapter_name}", tokens.rows
        for attribute, parameter in self.shared.items():
            yield f"{attribute}.{self.adapter_name}", parameter


Fill = Callable[[Build], None]
"""A function that writes the tensors of a finished adapter, not yet in the model, or raises."""


class AdapterMethod(Protocol[C]):
    """The members of a method's `BaseTuner` that building an adapter uses."""

    model: nn.Module
    tuner_layer_cls: ClassVar[type[BaseTunerLayer]]

    def prepare_model(self, config: C) -> Callable[[], None]:
        """Change the model before planning, and return a function that undoes it."""

    @property
    def shared_parameter_names(self) -> tuple[str, ...]:
        """Return the attributes with parameters that layers share."""

    def shared_containers(self) -> dict[str, AdapterParameterDict]:
        """Return the registered containers of shared parameters, by attribute name."""

    def tuner_layers(self) -> Iterator[BaseTunerLayer]:
        """Yield the model's layers of the method."""

    def adjust_config(self, plan: Plan[C], construction: Construction) -> None:
        """Correct a config that does not fit the planned layers."""

    def build_shared_parameters(
        self, build: Build[C], placement: Placement, initialize: bool
    ) -> dict[str, nn.Parameter]:
        """Return an adapter's parameters that layers share, by attribute name."""

    def tuner_layer_class(self, config: C, module: nn.Module) -> type[BaseTunerLayer] | None:
        """Return the class of layer that adapts a module."""

    def tuner_layer_options(self, config: C, path: str, build: Build[C]) -> dict[str, object]:
        """Return further arguments for making a layer."""

    def put_shared(self, build: Build[C]) -> list[str]:
        """Put the parameters that an adapter's layers share into their containers."""

    def parameter_layer_class(self, target: ParameterTarget) -> type[ParameterLayer]:
        """Return the class of layer that adapts a parameter."""

    def parameter_options(
        self, config: C, target: ParameterTarget, build: Build[C]
    ) -> dict[str, object]:
        """Return further arguments for making the layer of a parameter."""

    def attach_adapter(self, build: Build[C]) -> None:
        """Set up the method for an adapter that is now in the model."""


class Host(Protocol[C]):
    """The members of a model's `BaseTuner` that an adapter is put into."""

    model: nn.Module
    peft_config: dict[str, C]
    targeted_module_names: list[str]
    targeted_parameter_names: list[str]

    @property
    def active_adapter(self) -> str | list[str]:
        """Return the name of the active adapter, or the names of several."""

    @property
    def adapters_disabled(self) -> bool:
        """Return whether the adapters are switched off."""

    def shared_owner(self, name: str) -> nn.Module:
        """Return the module that shared parameters of a name are registered on."""

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make an adapter the active one."""


@contextmanager
def prepared(method: AdapterMethod[C], config: C, keep: bool = True) -> Iterator[None]:
    """Context with a model as an adapter of a method needs it; without `keep`, or after an error,
    the model is as it was.
    """
    undo = method.prepare_model(config)
    try:
        yield
    except BaseException:
        undo()
        raise
    if not keep:
        undo()


def build_adapter(method: AdapterMethod[C], plan: Plan[C], construction: Construction) -> Build[C]:
    """Make all parts of an adapter, without changing the model."""
    method.adjust_config(plan, construction)
    build = Build(plan.adapter_name, plan.config, plan.found, containers=_containers(method))
    first = next(iter(plan.bases()), method.model)
    build.shared = method.build_shared_parameters(build, *construction.place(first))
    for path, module in track(plan.targets.items(), "Making the adapter"):
        base = adapted_module(module, method.tuner_layer_cls)
        layer_cls = method.tuner_layer_class(plan.config, base)
        assert layer_cls is not None  # the plan checked it
        place, initialize = construction.place(base)
        options = method.tuner_layer_options(plan.config, path, build)
        make: Callable[..., BaseTunerLayer] = layer_cls
        build.layers[path] = make(
            base, plan.adapter_name, plan.config, placement=place, initialize=initialize, **options
        )
    _build_parameter_layers(method, plan, construction, build)
    for _, layer in build.all_layers():
        _check_layer(layer, plan.adapter_name, method.shared_parameter_names)
        for container in layer.containers():
            container.train(layer.training)
    for path, module in plan.trainable_copies.items():
        build.copies[path] = _trainable_copy(path, module)
    build.ties = plan.ties
    tying.tie_copies(build.copies, plan.ties)
    for path, indices in plan.tokens.indices.items():
        module = method.model.get_submodule(path)
        place, initialize = construction.place(module)
        build.tokens[path] = TrainableTokensWrapper.rows_of(module, indices, place, initialize)
    return build


def _build_parameter_layers(
    method: AdapterMethod[C], plan: Plan[C], construction: Construction, build: Build[C]
) -> None:
    """Make the layers of the targeted parameters."""
    for path, target in nested_paths(plan.parameters).items():
        place, initialize = construction.place(target.module)
        layer = method.parameter_layer_class(target)(
            target.module,
            plan.adapter_name,
            plan.config,
            target.name,
            placement=place,
            initialize=initialize,
            **method.parameter_options(plan.config, target, build),
        )
        build.parameters[path] = target, layer


def _check_layer(layer: BaseTunerLayer, adapter_name: str, shared: Sequence[str]) -> None:
    """Check that a (third-party) layer has the adapter's scale and lists all containers."""
    kind = type(layer).__qualname__
    if adapter_name not in layer.scaling:
        raise PeftValueError(f"{kind}.update_layer must set `scaling` of adapter {adapter_name!r}.")
    listed = {*layer.container_names, *layer.value_names, *shared}
    for name, module in layer.named_children():
        if isinstance(module, AdapterContainer) and name not in listed:
            raise PeftValueError(f"{kind}.adapter_layer_names must list the container `{name}`.")


def _containers(method: AdapterMethod[C]) -> dict[str, AdapterParameterDict]:
    """Return the containers of a method's shared parameters, new ones where there are none."""
    containers = method.shared_containers()
    for name in method.shared_parameter_names:
        if name not in containers:
            # Layers from another tuner of the same model refer to its containers.
            known = next((getattr(layer, name) for layer in method.tuner_layers()), None)
            fresh = AdapterParameterDict().train(method.model.training)
            containers[name] = fresh if known is None else known
    return containers


def _trainable_copy(path: str, module: nn.Module) -> nn.Module:
    """Return a trainable copy of a module without adapters; raise if some are merged into it."""
    every = walk(module, closed=(BaseTunerLayer,))
    inside = [layer for _, layer in every if isinstance(layer, BaseTunerLayer)]
    if any(layer.merged for layer in inside):
        raise PeftValueError(
            f"`{path}`: adapters are merged into it; call `unmerge_adapter` before one trains a "
            "copy of it."
        )
    return ModulesToSaveWrapper.copy_of(module, {layer: layer.get_base_layer() for layer in inside})


def put_in(host: Host[C], method: AdapterMethod[C], plan: Plan[C], build: Build[C]) -> None:
    """Put a finished adapter into a model; once it has the memory, nothing here can fail.

    `method` is the tuner of the adapter's method: `host` itself, unless the model mixes methods.

    Raises:
        PeftRuntimeError: An engine that runs the model can't take it; nothing is changed.
    """
    model, name, is_first = host.model, build.adapter_name, not host.peft_config
    check_can_grow(model)
    for path, layer in build.layers.items():
        if (present := layer_of(model.get_submodule(path), method.tuner_layer_cls)) is not None:
            make_room(present, layer)
    if is_first:
        _freeze_base(model)
    else:  # calls of other threads go through a layer from the moment that it is in the model
        for _, layer in build.all_layers():
            _copy_state(host, layer)
    _put_layers(model, plan, build, method.tuner_layer_cls)
    put_layers(model, build.parameters.values(), method.tuner_layer_cls)
    known, targets = set(host.targeted_module_names), [t for t, _ in build.parameters.values()]
    packed = dict.fromkeys(target.part_of for target in targets if target.part_of)
    host.targeted_module_names += [p for p in (*build.layers, *packed) if p not in known]
    keys = [target.key for target in targets if not target.part_of]
    host.targeted_parameter_names += [k for k in keys if k not in host.targeted_parameter_names]
    avoid_fused_paths(model)
    _put_copies(model, build)
    _put_tokens(model, plan, build)
    outer = dict.fromkeys(target.path for target in plan.parameters)
    paths = (*build.layers, *build.copies, *build.tokens, *plan.tokens.tied, *outer)
    moe_tokens.note(model, paths)
    resizing.guard(model)
    for attribute in method.put_shared(build):
        host.shared_owner(attribute)._modules.setdefault(attribute, build.containers[attribute])
    host.peft_config[name] = build.config
    for bias in plan.biases:
        bias.requires_grad_(not build.config.inference_mode)
    if is_first:
        host.set_adapter(name, inference_mode=build.config.inference_mode)
    else:
        _leave_waiting(host, build, method.tuner_layer_cls)
    method.attach_adapter(build)


def _put_layers(
    model: nn.Module, plan: Plan[C], build: Build[C], layer_cls: type[BaseTunerLayer]
) -> None:
    """Put new layers around the model's own; layers of the method that are there adopt theirs."""
    for path, layer in build.layers.items():
        present = layer_of(model.get_submodule(path), layer_cls)
        if present is not None:
            adopt(present, layer)
            continue
        for place in plan.places[path]:
            parent, _, child = get_submodules(model, place)
            setattr(parent, child, layer)


def _put_copies(model: nn.Module, build: Build[C]) -> None:
    """Put the trainable copies of full modules beside the originals."""
    for path, copy in build.copies.items():
        parent, module, child = get_submodules(model, path)
        if not isinstance(module, ModulesToSaveWrapper):
            module = ModulesToSaveWrapper(module)
            setattr(parent, child, module)
        module.modules_to_save[build.adapter_name] = copy


def _put_tokens(model: nn.Module, plan: Plan[C], build: Build[C]) -> None:
    """Put trainable rows beside embeddings, and beside the heads that share their weight."""
    for path in (*build.tokens, *plan.tokens.tied):
        parent, module, child = get_submodules(model, path)
        if not isinstance(module, TrainableTokensWrapper):
            owner = plan.tokens.tied.get(path)
            embedding = None if owner is None else model.get_submodule(owner)
            assert embedding is None or isinstance(embedding, TrainableTokensWrapper)
            module = TrainableTokensWrapper(module, embedding)
            setattr(parent, child, module)
        if path in build.tokens:
            module.add_rows(build.adapter_name, build.tokens[path])


def _leave_waiting(host: Host[C], build: Build[C], layer_cls: type[BaseTunerLayer]) -> None:
    """Give the parts of a later adapter the state of the others; it stays inactive and frozen."""
    parts: list[nn.Module | None] = [
        layer_for(host.model, target.path, target.name, layer_cls)
        for target, _ in build.parameters.values()
    ]
    for path in (*build.layers, *build.copies, *build.tokens):
        module = host.model.get_submodule(path)
        parts.append(layer_of(module, layer_cls) or module)
    for part in parts:
        assert isinstance(part, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        _copy_state(host, part)
        part.set_requires_grad(build.adapter_name, False)
    for parameter in build.shared.values():
        parameter.requires_grad_(False)


def _copy_state(host: Host[C], part: BaseTunerLayer | AuxiliaryTrainingWrapper) -> None:
    """Switch a part on or off as the host is, with the same adapters active."""
    part._disable_adapters = host.adapters_disabled
    if isinstance(part, BaseTunerLayer):
        part._active_adapter = host.active_adapter


def _freeze_base(model: nn.Module) -> None:
    """Freeze every parameter that belongs to no adapter."""
    adapters: set[int] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            adapters |= {id(p) for name in module.scaling for p in module.adapter_parameters(name)}
        elif isinstance(module, AdapterParameterDict):
            adapters |= {id(p) for p in module.parameters()}
        elif isinstance(module, ModulesToSaveWrapper):
            adapters |= {id(p) for p in module.modules_to_save.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in adapters:
            parameter.requires_grad = False  # a lazy parameter has no methods
