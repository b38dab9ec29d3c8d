# SPDX-License-Identifier: Apache-2.0
"""The plan of an injection: the modules it adapts, checked before anything changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import ClassVar, Generic, Protocol, TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from ..base.constants import (
    DUMMY_TARGET_MODULES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    OUTPUT_HEAD_NAMES,
)
from ..base.containers import AdapterContainer, walk
from ..base.errors import (
    NoMatchingPeftModuleError,
    PeftTypeError,
    PeftValueError,
    UnsupportedModuleError,
    warn,
)
from ..base.modules import get_submodules, model_type
from ..base.registry import PEFT_TYPE_TO_PREFIX_MAPPING
from ..config import PeftConfig, TargetedConfig
from ..integrations.distributed import unwrapped_name
from . import base_layer, parameter_targets, tying, unmatched_names
from . import targets as _targets
from . import trainable_tokens as _trainable_tokens
from .adapter_names import check_name
from .auxiliary import AuxiliaryTrainingWrapper
from .fused_paths import lost_reason, unfit_reason
from .layer import BaseTunerLayer
from .parameter_layer import ParameterLayer
from .parameter_targets import ParameterTarget
from .renamed_targets import config_of_now, saved_paths
from .trainable_tokens import TokenPlan

# Containers without a forward, which no wrapper can stand in for.
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)

C = TypeVar("C", bound=TargetedConfig)
C_contra = TypeVar("C_contra", bound=TargetedConfig, contravariant=True)


class TargetRules(Protocol[C_contra]):
    """The members of a method's `BaseTuner` that a plan reads."""

    model: nn.Module
    tuner_layer_cls: ClassVar[type[BaseTunerLayer]]
    supported_modules: ClassVar[str]
    default_target_modules: ClassVar[Mapping[str, str | tuple[str, ...]]]
    parameter_layer_cls: ClassVar[type[ParameterLayer] | None]

    @property
    def peft_config(self) -> Mapping[str, PeftConfig]:
        """Return the configs of the adapters that the model has, by name."""

    def complete(self, config: C_contra) -> object:
        """Return the resource that a config refers to."""

    def tuner_layer_class(self, config: C_contra, module: nn.Module) -> type[BaseTunerLayer] | None:
        """Return the class of layer that adapts a module."""

    def target_problems(self, config: C_contra, path: str, module: nn.Module) -> Iterator[str]:
        """Yield the conflicts of a module with a config."""

    def parameter_problems(self, config: C_contra, target: ParameterTarget) -> Iterator[str]:
        """Yield the conflicts of a parameter with a config."""

    def target_remedy(self, config: C_contra, modules: Sequence[nn.Module]) -> str:
        """Return a remedy for the conflicts of all modules."""


@dataclass
class Plan(Generic[C]):
    """The modules that an adapter adapts or trains.

    Args:
        adapter_name: The adapter's name.
        config: Its config, with the targets resolved.
        found: The resource that the config refers to, as `BaseTuner.complete` returned it.
        targets: Modules to adapt, by path.
        trainable_copies: Modules to make trainable copies of, by path.
        places: All paths of each targeted module, several where the model shares it.
        tokens: Embeddings to train single rows of.
        biases: Biases of the base model to train.
        parameters: Parameters to adapt, beside the modules in `targets`.
        ties: Paths of modules that share a weight with a target or copy and follow it, with the
            path of that one.
    """

    adapter_name: str
    config: C
    found: object = None
    targets: dict[str, nn.Module] = field(default_factory=dict)
    trainable_copies: dict[str, nn.Module] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    tokens: TokenPlan = field(default_factory=lambda: TokenPlan({}, {}))
    biases: list[nn.Parameter] = field(default_factory=list)
    parameters: list[ParameterTarget] = field(default_factory=list)
    ties: dict[str, str] = field(default_factory=dict)

    def bases(self) -> list[nn.Module]:
        """Return the modules that get layers, below all adapters."""
        return [
            *map(base_layer.innermost, self.targets.values()),
            *(target.module for target in self.parameters),
        ]


def make(
    tuner: TargetRules[C],
    adapter_name: str,
    config: C,
    state_dict: Mapping[str, Tensor] | None = None,
    *,
    is_new: bool = True,
    is_filled: bool = False,
) -> Plan[C]:
    """Decide which modules an adapter gets, and check all of them.

    Args:
        tuner: The method's tuner.
        adapter_name: The adapter's name.
        config: Its config; target names that it leaves open are filled in.
        state_dict: Adapt the modules that this checkpoint has parameters for.
        is_new: Warn of names in the config that match no module. An adapter that a checkpoint fills
            needs no such warning: the checkpoint either fits or is refused.
        is_filled: A checkpoint fills it, whose keys have given the config modules' present names
            where they needed it. Otherwise a config of a file gets them here.

    Raises:
        PeftValueError: The name or the config can't be used.
        NoMatchingPeftModuleError: No module is targeted.
        UnsupportedModuleError: Modules are targeted that the method can't adapt; all are named.
    """
    config.validate()
    if not is_filled:
        vars(config).update(vars(config_of_now(config, tuner.model)))
    found = tuner.complete(config)
    check_name(adapter_name, tuner.peft_config)
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type or "", "")
    if adapter_name in prefix and len(adapter_name) >= len(prefix) - 1:
        warn(
            f"Adapter name '{adapter_name}' should not be contained in the prefix '{prefix}'. "
            "Other writers confuse the two."
        )
    _check_biases(tuner, config)
    plan = Plan(adapter_name, config, found)
    modules = own_modules(tuner.model)
    plan.trainable_copies = _trainable_copies(plan.config, modules)
    tying.add_tied_copies(plan, modules)
    candidates = {
        p: m
        for p, m in modules.items()
        if not any(_targets.is_inside(p, whole) for whole in plan.trainable_copies)
    }
    if config.target_parameters:
        plan.parameters = parameter_targets.find(config, tuner.model, candidates, is_new)
    paths = (
        _saved(state_dict, tuner, config, candidates)
        if state_dict
        else _targeted(tuner, config, candidates, plan.trainable_copies)
    )
    chosen = [candidates[path] for path in paths if path in candidates]
    plan.targets = {path: modules[path] for path in _places(modules, chosen)}
    tying.add_tied_targets(plan, modules)
    plan.places = _places(modules, list(plan.targets.values()))
    if tuner.parameter_layer_cls is not None:
        plan.parameters = parameter_targets.with_parts(
            tuner.model, plan.parameters, plan.targets, plan.places
        )
    if is_new and not state_dict:
        unmatched_names.warn_of_unused(config, modules, partial(_adaptable, tuner, config, modules))
    unmatched_names.warn_of_patterns(
        _pattern_fields(config),
        [*plan.targets, *(target.pattern_path for target in plan.parameters)],
    )
    _check_modules(tuner, plan, is_new)
    _check_parameters(tuner, plan)
    plan.tokens = _trainable_tokens.plan(
        plan.config, tuner.model, modules, {*plan.targets, *plan.trainable_copies}
    )
    plan.biases = list(_biases(plan, candidates))
    tying.warn_of_ties(tuner.model, plan)
    return plan


def _places(
    modules: Mapping[str, nn.Module], targeted: Sequence[nn.Module]
) -> dict[str, list[str]]:
    """Return all paths of each targeted module by its first, under which its parameters are listed
    too.
    """
    wanted, by_module = set(map(id, targeted)), dict[int, list[str]]()
    for path, module in modules.items():
        if id(module) in wanted:
            by_module.setdefault(id(module), []).append(path)
    return {paths[0]: paths for paths in by_module.values()}


def _check_biases(tuner: TargetRules[C], config: C) -> None:
    """Raise `PeftValueError` if another adapter trains biases too."""
    if config.trained_biases != "none" and any(
        other.trained_biases != "none" for other in tuner.peft_config.values()
    ):
        raise PeftValueError(
            f"{type(tuner).__name__} supports only 1 adapter with bias. "
            "When using multiple adapters, set bias to 'none' for all adapters."
        )


def _biases(plan: Plan[C], modules: Mapping[str, nn.Module]) -> Iterator[nn.Parameter]:
    """Yield the biases that a config trains: all of the model's, or those of adapted layers."""
    chosen, tokens = plan.config.trained_biases, plan.tokens
    adapted = {*plan.targets, *(t.plain_path for t in plan.parameters if t.part_of)}
    for path, module in modules.items() if chosen != "none" else ():
        is_adapted = path in adapted or isinstance(module, BaseTunerLayer)
        bias = base_layer.innermost(module)._parameters.get("bias")
        is_free = path not in tokens.indices and path not in tokens.tied
        if bias is not None and is_free and (is_adapted or chosen == "all"):
            _check_sizes(path, [bias])
            yield bias


def _check_sizes(path: str, parameters: Iterable[nn.Parameter]) -> None:
    """Raise `PeftValueError` if parameters to train are lazy."""
    if any(map(is_lazy, parameters)):
        raise PeftValueError(
            f"`{path}` has not seen its input yet, so its parameters have no sizes, and can't be "
            "trained with the adapter; call the model once before."
        )


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model as they were without adapters, by path.

    A shared module is listed under each path. The inside of adapted layers and the modules that
    compute a weight are left out.
    """
    closed = (BaseTunerLayer, AuxiliaryTrainingWrapper, ParametrizationList)
    modules = walk(model, repeated=True, closed=closed)
    inside = (AdapterContainer, ParametrizationList)
    return {path: m for path, m in modules if path and not isinstance(m, inside)}


def _pattern_fields(config: PeftConfig) -> dict[str, dict[str, object]]:
    """Return the config's dictionaries whose keys are patterns of module names, by field."""
    names = [item.name for item in fields(config) if item.name.endswith("_pattern")]
    return {name: v for name in names if isinstance(v := getattr(config, name), dict)}


def _trainable_copies(
    config: TargetedConfig, modules: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """Return the modules of `modules_to_save` by path; raise for containers without a forward."""
    found = {p: m for p, m in modules.items() if _targets.saved(config.modules_to_save, p)}
    outermost = {
        p: m
        for p, m in found.items()
        if not any(p != other and _targets.is_inside(p, other) for other in found)
    }
    for path, module in outermost.items():
        if not isinstance(module, AuxiliaryTrainingWrapper):  # has copies, whose sizes are known
            _check_sizes(path, module.parameters())
    if unfit := {p: m for p, m in outermost.items() if isinstance(m, _CONTAINERS)}:
        named = ", ".join(f"{type(module)} (`{path}`)" for path, module in unfit.items())
        raise PeftTypeError(
            f"modules_to_save cannot be applied to modules of type {named}; name the modules in it."
        )
    return outermost


def _targeted(
    tuner: TargetRules[C],
    config: C,
    modules: Mapping[str, nn.Module],
    whole: Mapping[str, nn.Module],
) -> list[str]:
    """Return the paths of the targets; defaults and "all-linear" are written into the config."""
    if config.target_modules is None:
        kind = model_type(tuner.model)
        defaults = tuner.default_target_modules.get(kind or "")
        if defaults is None and config.target_parameters:
            return []
        if defaults is None:
            there = unmatched_names.counted_names(_adaptable(tuner, config, modules))
            more = f" Modules that can be adapted are called {there}." if there else ""
            raise PeftValueError(
                "Please specify `target_modules` in `peft_config`: none are known for model type "
                f"{kind!r}.{more}"
            )
        # Keep the default names that this model has.
        present = (
            defaults
            if isinstance(defaults, str)
            else set(defaults).difference(unmatched_names.unused(defaults, modules))
        )
        config.target_modules = present or set(defaults)
    if not config.target_modules and config.target_parameters:
        return []
    if not config.target_modules:
        raise PeftValueError(
            "`target_modules` is empty; name at least one module, or use 'all-linear'."
        )
    if config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        linear = all_linear(tuner.model, modules)
        chosen = _targets.select(linear, set(linear) or {""}, config.exclude_modules)
        config.target_modules = set(chosen)
    layers = _targets.layer_choice(config)
    paths = _targets.select(modules, config.target_modules, config.exclude_modules, *layers)
    if not paths and config.target_modules != DUMMY_TARGET_MODULES:
        _raise_unmatched(tuner, config, modules, whole)
    return paths


def _raise_unmatched(
    tuner: TargetRules[C],
    config: C,
    modules: Mapping[str, nn.Module],
    whole: Mapping[str, nn.Module],
) -> None:
    """Raise the error for targets that match no module, with the reason."""
    if config.exclude_modules and all(
        _targets.named(config.exclude_modules, path) for path in modules
    ):
        raise NoMatchingPeftModuleError(
            f"All modules were excluded by `exclude_modules`={config.exclude_modules!r}; leave out "
            "those that are to be adapted."
        )
    adaptable = _adaptable(tuner, config, modules)
    if whole or _targets.select(
        modules, config.target_modules or (), None, *_targets.layer_choice(config)
    ):
        named = _targets.select([*modules, *whole], config.target_modules or ())
        raise NoMatchingPeftModuleError(
            "No modules were targeted for adaptation. This might be caused by a combination of "
            "mismatched target modules and excluded modules. Please check your `target_modules` "
            "and `exclude_modules` configuration. You may also have only targeted modules that are "
            "marked to be saved (`modules_to_save`)."
            + ("" if named else unmatched_names.what_there_is(config, list(modules), adaptable))
        )
    raise NoMatchingPeftModuleError(unmatched_names.no_target(config, list(modules), adaptable))


def _adaptable(tuner: TargetRules[C], config: C, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the paths of the modules that a method can adapt."""
    paths = []
    for path, module in modules.items():
        if parameter_targets.is_packed(module):
            fits = tuner.parameter_layer_cls is not None
        else:
            base = base_layer.adapted_module(module, tuner.tuner_layer_cls)
            kind = tuner.tuner_layer_class(config, base)
            fits = kind is not None and not _unfit_reason(tuner.model, path)
        paths += [path] if fits else []
    return paths


def _unfit_reason(model: nn.Module, path: str) -> str | None:
    """Return the reason why the module at `path` gets no new adapter, None if it does."""
    parent, _, name = get_submodules(model, path)
    return unfit_reason(parent, name) or lost_reason(parent, name, model_type(model))


def all_linear(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the paths of the linear layers that an adapter fits in, without the output head."""
    heads = set()
    if hasattr(model, "get_output_embeddings"):
        try:
            heads.add(id(model.get_output_embeddings()))  # type: ignore[operator]
        except (NotImplementedError, AttributeError):
            pass  # some transformers models have the method without the layer
        heads |= {id(getattr(model, name)) for name in OUTPUT_HEAD_NAMES if name in model._modules}
    paths = []
    for path, module in modules.items():
        own = {id(module), id(base_layer.innermost(module))}
        if not base_layer.is_linear(module) or heads & own:
            continue
        if reason := _unfit_reason(model, path):
            warn(f"'all-linear' leaves out `{path}`: {reason}.")
        else:
            paths.append(path)
    return paths


def _saved(
    state_dict: Mapping[str, Tensor],
    tuner: TargetRules[C],
    config: C,
    modules: Mapping[str, nn.Module],
) -> list[str]:
    """Return the paths of a checkpoint's modules; warn if the config targets others."""
    if config.target_parameters:
        raise PeftValueError(
            "`state_dict` chooses modules, and can't choose parameters; leave it out for a config "
            "with `target_parameters`."
        )
    saved = saved_paths(tuner.model, state_dict, tuner.tuner_layer_cls.container_names)
    paths = [path for path in modules if unwrapped_name(path) in saved]
    if not paths:
        raise NoMatchingPeftModuleError(
            f"The `state_dict` has no parameters of a {type(tuner).__name__} adapter for modules "
            "of this model."
            + (f" It has some for {', '.join(sorted(saved)[:3])}." if saved else "")
        )
    defaults = tuner.default_target_modules.get(model_type(tuner.model) or "")
    targets = config.target_modules or defaults or ()
    if targets == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        targets = all_linear(tuner.model, modules)
    meant = _targets.select(
        modules, targets, config.exclude_modules, *_targets.layer_choice(config)
    )
    more = {"PEFT config": set(meant).difference(paths), "state_dict": set(paths).difference(meant)}
    for place, others in more.items():
        if others:
            warn(
                "While injecting the PEFT adapters, an inconsistency was discovered between the "
                "PEFT config and the provided state_dict. This is not necessarily an issue and can "
                f"be ignored if this was the intent. The {place} contained these additional target "
                f"modules: {sorted(others)}. The state_dict decides.",
                RuntimeWarning,
            )
    return paths


def _check_parameters(tuner: TargetRules[C], plan: Plan[C]) -> None:
    """Check that every targeted parameter can be adapted as configured."""
    adapted = {**plan.targets, **plan.trainable_copies}
    supported = tuner.parameter_layer_cls is not None
    parameter_targets.check(plan.parameters, adapted, supported, type(tuner).__name__)
    problems = [
        f"`{target.key}`: {problem}"
        for target in plan.parameters
        for problem in tuner.parameter_problems(plan.config, target)
    ]
    if problems:
        raise PeftValueError(" ".join(problems))


def _check_modules(tuner: TargetRules[C], plan: Plan[C], is_new: bool) -> None:
    """Check that every targeted module can be adapted as configured; errors name all offenders. Of
    saved adapters, which other programs may have made, those that would be lost get a warning.
    """
    unsupported, misfits = [], []
    for path, module in plan.targets.items():
        base = base_layer.adapted_module(module, tuner.tuner_layer_cls)
        parent, _, name = get_submodules(tuner.model, path)
        lost = lost_reason(parent, name, model_type(tuner.model))
        if lost and not is_new:
            warn(f"`{path}`: {lost}.")
        if reason := unfit_reason(parent, name) or (is_new and lost):
            unsupported.append(f"`{path}`: {reason}.")
        elif reason := parameter_targets.twice_reason(path, module):
            unsupported.append(reason)
        elif tuner.tuner_layer_class(plan.config, base) is None:
            unsupported.append(
                f"`{path}`: Target module {base_layer.describe(base)} is not supported."
            )
        elif isinstance(base, BaseTunerLayer) and base.needs_layer_alone:
            misfits.append(
                f"`{path}`: {type(base).__name__} has an adapter that needs the layer for itself."
            )
        else:
            misfits += [
                f"`{path}`: {problem}" for problem in tuner.target_problems(plan.config, path, base)
            ]
    if unsupported:
        remedy = (
            f"{type(tuner).__name__} adapts {tuner.supported_modules}; leave out others by "
            "`exclude_modules`."
        )
        raise UnsupportedModuleError(" ".join([*unsupported, remedy]))
    if misfits:
        remedy = tuner.target_remedy(
            plan.config, [base_layer.innermost(module) for module in plan.targets.values()]
        )
        raise PeftValueError(" ".join([*misfits, remedy]).strip())
