# SPDX-License-Identifier: Apache-2.0
"""What an injection is going to touch, decided and checked before it touches anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ..base.calls.adapter_batch import BASE_MODEL
from ..base.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, OUTPUT_HEAD_NAMES
from ..base.containers import AdapterContainer, AdapterModuleDict, walk
from ..base.errors import (
    NoMatchingPeftModuleError,
    PeftNotSupportedError,
    PeftTypeError,
    PeftValueError,
    UnsupportedModuleError,
    warn,
)
from ..base.modules import get_submodules, model_type
from ..base.registry import PEFT_TYPE_TO_PREFIX_MAPPING
from ..checkpoint.renamed_modules import ModuleNames
from ..config import PeftConfig
from ..integrations.distributed import unwrapped_name
from . import base_layer, tied_weights, unmatched_names
from . import targets as _targets
from . import trainable_tokens as _trainable_tokens
from .adapters import AdapterParameterDict
from .auxiliary import AuxiliaryTrainingWrapper
from .fused_paths import unfit_reason
from .layer import BaseTunerLayer, layer_of
from .renamed_targets import config_of_now
from .trainable_tokens import TokenPlan

if TYPE_CHECKING:
    from .tuner import BaseTuner


# What has no forward, so that nothing can stand in its place.
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


@dataclass
class Plan:
    """The modules an adapter will have parts in.

    Args:
        adapter_name: The adapter's name.
        config: Its config, with the targets resolved.
        targets: Modules to adapt, by path.
        trained_whole: Modules to make trainable copies of, by path.
        places: Every path at which a targeted module sits in the model (more than one where it is
            shared).
        tokens: Embeddings to train single rows of.
    """

    adapter_name: str
    config: Any
    targets: dict[str, nn.Module] = field(default_factory=dict)
    trained_whole: dict[str, nn.Module] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    tokens: TokenPlan = field(default_factory=lambda: TokenPlan({}, {}))


def make(
    tuner: BaseTuner,
    adapter_name: str,
    config: PeftConfig,
    state_dict: Mapping[str, Tensor] | None = None,
    *,
    is_new: bool = True,
) -> Plan:
    """Decide what to adapt, and check all of it.

    Args:
        tuner: The method's tuner.
        adapter_name: The adapter's name.
        config: Its config; names that it leaves open are filled in.
        state_dict: Adapt the modules this checkpoint has parameters for.
        is_new: Warn of names in the config that mean nothing in this model. For an adapter that a
            checkpoint fills that is no slip: the checkpoint fits, or is refused.

    Raises:
        PeftValueError: The name or the config can't be used.
        NoMatchingPeftModuleError: No module is targeted.
        UnsupportedModuleError: Modules are targeted that the method can't adapt; all are named.
    """
    config.validate()
    vars(config).update(vars(config_of_now(config, tuner.model)))
    tuner.complete(config)
    check_name(adapter_name, tuner)
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type or "", "")
    if adapter_name in prefix and len(adapter_name) >= len(prefix) - 1:
        warn(
            f"Adapter name '{adapter_name}' should not be contained in the prefix '{prefix}'. "
            "Other writers confuse the two."
        )
    _check_biases(config, tuner)
    plan = Plan(adapter_name, config)
    modules = own_modules(tuner.model)
    plan.trained_whole = _trained_whole(plan.config, modules)
    candidates = {
        p: m
        for p, m in modules.items()
        if not any(_below(p, whole) for whole in plan.trained_whole)
    }
    paths = (
        _saved(state_dict, tuner, config, candidates)
        if state_dict
        else _targeted(tuner, config, candidates, plan.trained_whole)
    )
    by_module: dict[int, list[str]] = {}
    for path, module in modules.items():
        by_module.setdefault(id(module), []).append(path)
    # A module that sits in several places goes by its first path, as its parameters do.
    firsts = {by_module[id(candidates[path])][0] for path in paths if path in candidates}
    plan.targets = {path: module for path, module in modules.items() if path in firsts}
    plan.places = {path: by_module[id(module)] for path, module in plan.targets.items()}
    if is_new and not state_dict:
        unmatched_names.warn_of_unused(config, modules)
    patterns = {
        f.name: getattr(config, f.name) for f in fields(config) if f.name.endswith("_pattern")
    }
    unmatched_names.warn_of_patterns(
        {k: v for k, v in patterns.items() if isinstance(v, dict)}, plan.targets
    )
    _check_modules(tuner, plan)
    plan.tokens = _trainable_tokens.plan(
        plan.config, tuner.model, modules, {*plan.targets, *plan.trained_whole}
    )
    _warn_of_ties(tuner.model, plan)
    return plan


def bias_names(config: PeftConfig, model: nn.Module) -> list[str]:
    """Names of the biases that a config trains: all, those of the adapted layers, or none."""
    if config.trained_biases == "none":
        return []
    names = []
    for path, module in own_modules(model).items():
        plain, name = module, path
        while isinstance(plain, BaseTunerLayer):
            plain, name = plain.base_layer, f"{name}.base_layer"
        if plain._parameters.get("bias") is not None and (
            plain is not module or config.trained_biases == "all"
        ):
            names.append(f"{name}.bias")
    return names


def check_name(name: str, tuner: BaseTuner) -> None:
    """Insist on a name that an adapter can have."""
    if not isinstance(name, str):
        raise PeftTypeError(f"The adapter's name {name!r} must be a string.")
    if not name or "." in name:
        raise PeftValueError(
            f"The adapter's name {name!r} must be a non-empty string without dots."
        )
    if name.startswith(("/", "\\")):
        raise PeftValueError(
            f"The adapter's name {name!r} must not be an absolute path: it becomes a folder's name."
        )
    if hasattr(AdapterParameterDict(), name) or hasattr(AdapterModuleDict(), name):
        raise PeftValueError(
            f"The adapter's name {name!r} is an attribute of torch's containers; choose another."
        )
    if name == BASE_MODEL:
        raise PeftValueError(
            f"The adapter's name {name!r} means no adapter in `adapter_names`; choose another."
        )
    if name in tuner.peft_config:
        raise PeftValueError(
            f"Adapter with name '{name}' already exists; choose another, or delete that one first."
        )


def _check_biases(config: PeftConfig, tuner: BaseTuner) -> None:
    if config.trained_biases != "none" and any(
        other.trained_biases != "none" for other in tuner.peft_config.values()
    ):
        raise PeftValueError(
            f"{type(tuner).__name__} supports only 1 adapter with bias. "
            "When using multiple adapters, set bias to 'none' for all adapters."
        )


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model's modules by path (each path, where there are several), seen as if there were no
    adapters: what is inside adapted layers is left out, and what computes a layer's weight.
    """
    whole = walk(
        model, repeated=True, closed=(BaseTunerLayer, AuxiliaryTrainingWrapper, ParametrizationList)
    )
    return {
        path: module
        for path, module in whole
        if path and not isinstance(module, (AdapterContainer, ParametrizationList))
    }


def _below(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")


def _trained_whole(config: Any, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules that `modules_to_save` names, by path."""
    names = config.modules_to_save
    if not names:
        return {}
    found = {path: m for path, m in modules.items() if _targets.named(set(names), path)}
    outermost = {
        p: m
        for p, m in found.items()
        if not any(p != other and _below(p, other) for other in found)
    }
    if unfit := {p: m for p, m in outermost.items() if isinstance(m, _CONTAINERS)}:
        named = ", ".join(f"{type(module)} (`{path}`)" for path, module in unfit.items())
        raise PeftTypeError(
            f"modules_to_save cannot be applied to modules of type {named}; name the modules in it."
        )
    return outermost


def _targeted(
    tuner: BaseTuner, config: Any, modules: Mapping[str, nn.Module], whole: Mapping[str, nn.Module]
) -> list[str]:
    """Paths of the modules that the config targets; writes resolved defaults and "all-linear" into
    the config.
    """
    if config.target_modules is None:
        kind = model_type(tuner.model)
        defaults = tuner.default_target_modules.get(kind or "")
        if defaults is None:
            there = unmatched_names.counted_names(_adaptable(tuner, config, modules))
            raise PeftValueError(
                "Please specify `target_modules` in `peft_config`: none are known for model type "
                f"{kind!r}."
                + (f" Modules that can be adapted are called {there}." if there else "")
            )
        # Of the names that a kind of model may have, those that this one has.
        present = (
            defaults
            if isinstance(defaults, str)
            else set(defaults).difference(unmatched_names.unused(defaults, modules))
        )
        config.target_modules = present or set(defaults)
    if not config.target_modules:
        raise PeftValueError(
            "`target_modules` is empty; name at least one module, or use 'all-linear'."
        )
    if config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        linear = _all_linear(tuner.model, modules)
        config.target_modules = set(
            _targets.select(linear, set(linear) or {""}, config.exclude_modules)
        )
    paths = _targets.select(
        modules,
        config.target_modules,
        config.exclude_modules,
        *unmatched_names.layer_choice(config),
    )
    if not paths:
        _raise_unmatched(tuner, config, modules, whole)
    return paths


def _raise_unmatched(
    tuner: BaseTuner, config: Any, modules: Mapping[str, nn.Module], whole: Mapping[str, nn.Module]
) -> None:
    if config.exclude_modules and all(
        _targets.named(config.exclude_modules, path) for path in modules
    ):
        raise NoMatchingPeftModuleError(
            f"All modules were excluded by `exclude_modules`={config.exclude_modules!r}; leave out "
            "those that are to be adapted."
        )
    adaptable = _adaptable(tuner, config, modules)
    if whole or _targets.select(
        modules, config.target_modules, None, *unmatched_names.layer_choice(config)
    ):
        named = _targets.select([*modules, *whole], config.target_modules)
        raise NoMatchingPeftModuleError(
            "No modules were targeted for adaptation. This might be caused by a combination of "
            "mismatched target modules and "
            "excluded modules. Please check your `target_modules` and `exclude_modules` "
            "configuration. You may also have only "
            "targeted modules that are marked to be saved (`modules_to_save`)."
            + ("" if named else unmatched_names.what_there_is(config, list(modules), adaptable))
        )
    raise NoMatchingPeftModuleError(unmatched_names.no_target(config, list(modules), adaptable))


def _adaptable(tuner: BaseTuner, config: Any, modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of the modules that a method can adapt."""
    bases = {
        path: (layer_of(module, tuner.tuner_layer_cls), module) for path, module in modules.items()
    }
    return [
        p
        for p, (layer, m) in bases.items()
        if tuner.tuner_layer_class(config, layer.base_layer if layer else m) is not None
    ]


def _all_linear(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of all linear layers but the output head and those where no adapter can be."""
    heads = set()
    if hasattr(model, "get_output_embeddings"):
        try:
            heads.add(id(model.get_output_embeddings()))  # type: ignore[operator]
        except (NotImplementedError, AttributeError):
            pass  # some transformers models have the method and no such layer
        heads |= {id(getattr(model, name)) for name in OUTPUT_HEAD_NAMES if name in model._modules}
    paths = []
    for path, module in modules.items():
        if (
            not base_layer.is_linear(module)
            or id(module) in heads
            or id(base_layer.innermost(module)) in heads
        ):
            continue
        parent, _, name = get_submodules(model, path)
        reason = unfit_reason(parent, name, model_type(model))
        if reason:
            warn(f"'all-linear' leaves out `{path}`: {reason}.")
        else:
            paths.append(path)
    return paths


def _warn_of_ties(model: nn.Module, plan: Plan) -> None:
    """Say so where a weight is about to change in one place that the model shares with another.

    Raises:
        PeftNotSupportedError: There is one, and the config wants such weights to stay the same.
    """
    owners = tied_weights.owners(model)
    for path, module in {**plan.targets, **plan.trained_whole}.items():
        for parameter in module.parameters(recurse=False):
            others = sorted(
                {
                    owner
                    for owner in owners.get(id(parameter), [])
                    if owner not in plan.places.get(path, [path])
                }
            )
            if others and getattr(plan.config, "ensure_weight_tying", False):
                raise PeftNotSupportedError(
                    f"`ensure_weight_tying`=True: `{path}` shares a weight with "
                    f"{', '.join(f'`{owner}`' for owner in others)}, and "
                    "adapters of both can't be tied; leave out the module or the option. "
                    "`trainable_token_indices` are tied anyway."
                )
            if others:
                warn(
                    f"`{path}` shares a weight with {', '.join(f'`{owner}`' for owner in others)}, "
                    "which will go on using it as it "
                    "is: no implementation exists to tie the adapters. `merge_adapter` changes it "
                    "in both places, "
                    "`merge_and_unload` makes two weights of it.",
                )


def _saved(
    state_dict: Mapping[str, Tensor],
    tuner: BaseTuner,
    config: Any,
    modules: Mapping[str, nn.Module],
) -> list[str]:
    """Paths of the modules that a checkpoint has parameters for; warns where the config targets
    others.
    """
    names = ModuleNames(tuner.model)
    saved = {names.now(path) or path for path in _paths_in(state_dict, tuner)}
    paths = [path for path in modules if unwrapped_name(path) in saved]
    if not paths:
        raise NoMatchingPeftModuleError(
            f"The `state_dict` has no parameters of a {type(tuner).__name__} adapter for modules "
            "of this model."
            + (f" It has some for {', '.join(sorted(saved)[:3])}." if saved else "")
        )
    targets = (
        config.target_modules
        or tuner.default_target_modules.get(model_type(tuner.model) or "")
        or ()
    )
    if targets == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        targets = _all_linear(tuner.model, modules)
    meant = _targets.select(
        modules, targets, config.exclude_modules, *unmatched_names.layer_choice(config)
    )
    for place, others in (
        ("PEFT config", set(meant).difference(paths)),
        ("state_dict", set(paths).difference(meant)),
    ):
        if others:
            warn(
                "While injecting the PEFT adapters, an inconsistency was discovered between the "
                "PEFT config and the provided "
                "state_dict. This is not necessarily an issue and can be ignored if this was the "
                "intent. "
                f"The {place} contained these additional target modules: {sorted(others)}. The "
                "state_dict decides.",
                RuntimeWarning,
            )
    return paths


def _paths_in(state_dict: Mapping[str, Tensor], tuner: BaseTuner) -> set[str]:
    """Paths of the modules that a checkpoint has parameters for, without what wrappers put into
    them.
    """
    holders = tuner.tuner_layer_cls.container_names
    paths = set()
    for key in state_dict:
        parts = unwrapped_name(key.removeprefix("base_model.model.")).split(".")
        for i, part in enumerate(parts):
            if any(part == holder or part.startswith(f"{holder}_topk") for holder in holders):
                paths.add(".".join(parts[:i]))
                break
    return paths


def _check_modules(tuner: BaseTuner, plan: Plan) -> None:
    """Check that every targeted module can be adapted as configured; report all that can't at once."""
    unsupported, misfits = [], []
    kind = model_type(tuner.model)
    for path, module in plan.targets.items():
        existing = layer_of(module, tuner.tuner_layer_cls)
        base = module if existing is None else existing.base_layer
        parent, _, name = get_submodules(tuner.model, path)
        reason = unfit_reason(parent, name, kind)
        if reason:
            unsupported.append(f"`{path}`: {reason}.")
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
        remedy = f"{type(tuner).__name__} adapts {tuner.supported_modules}; leave out others by `exclude_modules`."
        raise UnsupportedModuleError(" ".join([*unsupported, remedy]))
    if misfits:
        remedy = tuner.target_remedy(
            plan.config, [base_layer.innermost(module) for module in plan.targets.values()]
        )
        raise PeftValueError(" ".join([*misfits, remedy]).strip())
