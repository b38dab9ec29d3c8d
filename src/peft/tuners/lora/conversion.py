# SPDX-License-Identifier: Apache-2.0
"""Convert an adapter of any method to LoRA, for programs that read no other: serving engines,
exporters, other implementations.

A layer returns its delta as a product of two factors (`low_rank_factors`), exactly where the method
is low rank. The factors become the tensors of a LoRA adapter whose scaling is 1 everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...base.calls.running import holds
from ...base.errors import PeftNotSupportedError, PeftValueError, warn
from ...base.progress import track
from ...base.registry import PEFT_TYPE_TO_TUNER_MAPPING, PeftType, lookup
from ...base.validation import number
from ...checkpoint.paths import as_folder
from ...checkpoint.state_dict import get_peft_model_state_dict
from ...config import TargetedConfig
from ...core import combined_heads, tying
from ...core import targets as _targets
from ...core.base_layer import geometry
from ...core.conversion import (
    Conversion,
    check_convertible,
    config_of,
    layers_with,
    name_of,
    naming_layer,
    root_of,
    write_conversion,
)  # fmt: skip
from ...core.layer import BaseTunerLayer
from ...core.skeleton import exact_targets
from ...ops.low_rank import LowRank, approximate, check_rank, cut, product_svd, total_error
from .base import lora_tensors
from .config import LoraConfig

# Number of tasks that `save_tasks_as_lora` holds in memory at a time.
_TASKS_AT_ONCE = 16
# Values of `bias` that mean the same in a LoRA config; any other becomes "lora_only".
_BIASES: Mapping[str, Literal["none", "all"]] = {"none": "none", "all": "all"}


class LoraConversion(Conversion[LoraConfig]):
    """A LoRA adapter made of another: the pair `(config, state_dict)`, with its errors.

    Attributes:
        config: Its config.
        state_dict: Its tensors by checkpoint key.
        errors: For each layer `‖ΔW − B·A‖ / ‖ΔW‖` in the Frobenius norm; 0 where the conversion is
            exact.
        error: The same for all layers together.
    """

    errors: dict[str, float]
    error: float

    @classmethod
    def of(
        cls,
        config: LoraConfig,
        modules: Mapping[str, nn.Module],
        deltas: Mapping[str, LowRank],
        prefix: str,
        companions: Mapping[str, Tensor],
    ) -> LoraConversion:
        """Return the adapter that gives each module its delta, with the `companions` as its other
        tensors by key. Keys of modules begin with `prefix`.
        """
        state = dict[str, Tensor]()
        for path, delta in deltas.items():
            tensors = lora_tensors(modules[path], delta.A.detach(), delta.B.detach())
            state |= {f"{prefix}{path}.{name}": tensor for name, tensor in tensors.items()}
        result = cls(config, {**state, **companions})
        result.errors = {path: delta.error for path, delta in deltas.items()}
        result.error = total_error(deltas.values())
        return result


@holds
def convert_to_lora(
    model: nn.Module,
    rank: int | float | None = None,
    adapter_name: str | Mapping[str, float] | None = None,
    progressbar: bool = False,
    compile_kwargs: dict[str, object] | None = None,
    *,
    task_id: int | str | Mapping[int | str, float] | None = None,
    heads: str | None = None,
) -> LoraConversion:
    """Return the best approximation of an adapter by a LoRA adapter. The model stays as it is.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into.
        rank: An integer: the rank of every layer. A fraction: in each layer the smallest rank that
            keeps this share of the energy, the sum of squared singular values. None: exact, of the
            smallest rank that the method's structure gives (Poly and VB-LoRA `r`, LoKr
            `rank(W1) · rank(W2)`).
        adapter_name: The adapter; by default the one called "default", else the only one that is
            active. Or a dictionary with the weight of each of several, of any methods, for the
            weighted sum of their deltas.
        progressbar: Show one.
        compile_kwargs: Accepted for compatibility, without effect.
        task_id: For Poly, whose tasks each have a delta: the task by id or name, or a dictionary
            with the share of each of several.
        heads: For modules that several adapters of a sum train in full, as for
            `add_weighted_adapter`.

    Returns:
        `(config, state_dict)`, to be written by `save_as_lora` or loaded with
        `set_peft_model_state_dict`; with `errors` by layer and the total `error`.

    Raises:
        PeftValueError: There is no such adapter or the choice is ambiguous, a rank is not allowed
            or larger than a layer's weight, or values are not finite.
        PeftTypeError: `task_id` for a method without tasks.
        PeftNotSupportedError: The adapter's delta depends on the input.
        UnsupportedModuleError: A layer has no delta that LoRA can represent.

    Example:
        >>> from peft import LoKrConfig, get_peft_model
        >>> config = LoKrConfig(r=2, target_modules=["0"], init_weights=False)
        >>> model = get_peft_model(nn.Sequential(nn.Linear(16, 16)), config)
        >>> config, state_dict = converted = convert_to_lora(model, rank=4)
        >>> config.r, state_dict["base_model.model.0.lora_A.weight"].shape, 0 < converted.error < 1
        (4, torch.Size([4, 16]), True)
    """
    check_rank(rank)
    if isinstance(adapter_name, Mapping):
        return _blend(model, adapter_name, rank, task_id, heads, progressbar)
    adapter_name = name_of(model, adapter_name)
    config = config_of(model, adapter_name)
    if config.peft_type == PeftType.LORA and not config.starts_from_weight:
        warn(
            "Converting a PEFT adapter to LoRA that is already a LoRA adapter; there is no need "
            "to, but for another rank."
        )
    tuner_cls = lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type)
    options = tuner_cls.conversion_options(config, task_id=task_id)
    return _convert(model, config, adapter_name, rank, [options], progressbar)[0]


def save_as_lora(
    path: str | os.PathLike,
    model: nn.Module,
    rank: int | float | None = None,
    adapter_name: str | Mapping[str, float] | None = None,
    progressbar: bool = False,
    compile_kwargs: dict[str, object] | None = None,
    *,
    task_id: int | str | Mapping[int | str, float] | None = None,
    heads: str | None = None,
) -> LoraConversion:
    """Convert an adapter to LoRA and write it to a folder, as `save_pretrained` writes adapters.

    Args:
        path: The folder, made if missing.
        model, rank, adapter_name, progressbar, compile_kwargs, task_id, heads: As for
            `convert_to_lora`.

    Returns:
        The conversion, with its errors.

    Raises:
        PeftError: As `convert_to_lora`; nothing is written then.
    """
    folder = as_folder(path)
    converted = convert_to_lora(
        model, rank, adapter_name, progressbar, compile_kwargs, task_id=task_id, heads=heads
    )
    write_conversion(folder, model, converted)
    return converted


@holds
def save_tasks_as_lora(
    model: nn.Module,
    folder: str | os.PathLike,
    tasks: Sequence[int | str] | None = None,
    rank: int | float | None = None,
    adapter_name: str | None = None,
    progressbar: bool = False,
) -> dict[str, float]:
    """Write each task of an adapter as a LoRA adapter; many tasks share a pass over the layers.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into.
        folder: Each task gets a folder in it: its name, or "task_0", "task_1", … where tasks have
            no names.
        tasks: Ids or names, by default all.
        rank: As for `convert_to_lora`; exact by default.
        adapter_name: The adapter; by default the one called "default", else the only one that is
            active.
        progressbar: Show one.

    Returns:
        The total error of each task's conversion, by the name of its folder.

    Raises:
        PeftValueError: As `convert_to_lora`, or a task's name can't be a folder's. Nothing is
            written then.
        PeftNotSupportedError: The adapter has no tasks.
    """
    check_rank(rank)
    parent = as_folder(folder)
    adapter_name = name_of(model, adapter_name)
    config = config_of(model, adapter_name)
    tuner_cls = lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type)
    chosen: dict[str, int] = tuner_cls.conversion_tasks(config, tasks)
    for name in chosen:
        if name in ("", ".", "..") or set(name) & set("/\\:\0"):
            raise PeftValueError(
                f"The task's name {name!r} can't be a folder's; write it with `save_as_lora` where "
                "you want it."
            )
    names, errors = list(chosen), {}
    begins = range(0, len(names), _TASKS_AT_ONCE)
    wanted = progressbar and len(begins) > 1
    for begin in track(begins, "Converting tasks to LoRA", unit="group", wanted=wanted):
        some = names[begin : begin + _TASKS_AT_ONCE]
        options = [tuner_cls.conversion_options(config, task_id=chosen[name]) for name in some]
        made = _convert(model, config, adapter_name, rank, options, progressbar)
        for name, converted in zip(some, made, strict=True):
            write_conversion(parent / name, model, converted)
            errors[name] = converted.error
    return errors


def adapter_from_deltas(
    model: nn.Module, deltas: Mapping[str, LowRank], like: TargetedConfig
) -> LoraConversion:
    """Return the LoRA adapter that has given deltas. The model stays as it is.

    Args:
        model: The base model, or a model with adapters.
        deltas: The factors of each delta, by module path; scales are in them.
        like: The config that says which base model and task type the adapter is for.

    Example:
        >>> from peft import LoraConfig
        >>> delta = approximate(torch.ones(6, 1), torch.ones(1, 4))
        >>> base = nn.Sequential(nn.Linear(4, 6))
        >>> converted = adapter_from_deltas(base, {"0": delta}, LoraConfig())
        >>> converted.config.target_modules, list(converted.state_dict)
        ({'0'}, ['0.lora_A.weight', '0.lora_B.weight'])
    """
    root, prefix = root_of(model)
    modules = {path: root.get_submodule(path) for path in deltas}
    config = _lora_config(root, like, modules, deltas, None)
    config = replace(config, modules_to_save=None, trainable_token_indices=None, bias="none")
    return LoraConversion.of(config, modules, deltas, prefix, {})


def _convert(
    model: nn.Module,
    config: TargetedConfig,
    adapter_name: str,
    rank: int | float | None,
    views: list[Mapping[str, object]],
    progressbar: bool,
) -> list[LoraConversion]:
    """Convert an adapter with each of several options of `low_rank_factors`, in one pass."""
    root, prefix = root_of(model)
    layers = dict(layers_with(root, adapter_name))
    check_convertible(layers, adapter_name)
    deltas_by_view: list[dict[str, LowRank]] = [{} for _ in views]
    for path, layer in track(layers.items(), "Converting to LoRA", wanted=progressbar):
        with naming_layer(path):
            for deltas, options in zip(deltas_by_view, views, strict=True):
                deltas[path] = _factors(layer, adapter_name, rank, options)
    companions = _companions(model, config, adapter_name)
    return [
        LoraConversion.of(
            _lora_config(root, config, layers, deltas, rank),
            layers,
            deltas,
            prefix,
            {key: tensor.detach().clone() for key, tensor in companions.items()},
        )
        for deltas in deltas_by_view
    ]


def _blend(
    model: nn.Module,
    weights: Mapping[str, float],
    rank: int | float | None,
    task_id: int | str | Mapping[int | str, float] | None,
    heads: str | None,
    progressbar: bool,
) -> LoraConversion:
    """Convert the weighted sum of several adapters' deltas."""
    root, prefix = root_of(model)
    configs = _configs_to_sum(model, weights)
    layers: dict[str, dict[str, BaseTunerLayer]] = {}
    options: dict[str, Mapping[str, object]] = {}
    for name, config in configs.items():
        tuner_cls = lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type)
        own_task = task_id if "task_id" in tuner_cls.merge_options else None
        options[name] = tuner_cls.conversion_options(config, task_id=own_task)
        adapted = dict(layers_with(root, name))
        check_convertible(adapted, name)
        for path, layer in adapted.items():
            layers.setdefault(path, {})[name] = layer
    companions = combined_heads.combine(combined_heads.collect(root, configs), heads, weights)
    companions = {prefix + key: tensor for key, tensor in companions.items()}
    firsts = {path: next(iter(by_name.values())) for path, by_name in layers.items()}
    deltas: dict[str, LowRank] = {}
    for path, by_name in track(layers.items(), "Converting to LoRA", wanted=progressbar):
        with naming_layer(path):
            summands = [
                (weights[name], layer.low_rank_factors(name, None, **options[name]))
                for name, layer in by_name.items()
            ]
            deltas[path] = _summed(summands, firsts[path].geometry.groups, rank)
    config = _lora_config(root, next(iter(configs.values())), firsts, deltas, rank)
    config = replace(config, **combined_heads.fields_of(configs.values()))
    return LoraConversion.of(config, firsts, deltas, prefix, companions)


def _configs_to_sum(model: nn.Module, weights: Mapping[str, float]) -> dict[str, TargetedConfig]:
    """Return the configs of adapters to sum, checked with their weights."""
    if not weights:
        raise PeftValueError("`adapter_name` is empty; give the weight of at least one adapter.")
    for name, weight in weights.items():
        for problem in number(f"the weight of {name}", weight):
            raise PeftValueError(problem)
    configs = {name: config_of(model, name) for name in weights}
    for name, config in configs.items():
        if config.trained_biases != "none":
            raise PeftNotSupportedError(
                f"Adapter {name} has `bias`={config.trained_biases!r}, but a model has its biases "
                "once only; the sum is of what adapters add to layers."
            )
    return configs


def _summed(
    summands: Sequence[tuple[float, LowRank]], groups: int, rank: int | float | None
) -> LowRank:
    """Return the sum of deltas of one layer, each times its weight, exact or of a rank."""
    dtype = summands[0][1].A.dtype
    A = torch.cat([delta.A.to(dtype) for _, delta in summands])
    B = torch.cat([(delta.B * weight).to(dtype) for weight, delta in summands], dim=1)
    if groups > 1:
        return _in_groups(approximate(B, A), groups, rank)
    if rank is None and A.shape[0] > min(A.shape[1], B.shape[0]):
        return cut(product_svd(B, A), None, dtype)
    factors = approximate(B, A, rank)
    return _of_rank(factors, rank) if isinstance(rank, int) else factors


def _companions(model: nn.Module, config: TargetedConfig, adapter_name: str) -> dict[str, Tensor]:
    """Return an adapter's tensors outside its layers: full modules, biases, embeddings or rows."""
    tuner_cls = lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type)
    own = (*tuner_cls.tuner_layer_cls.container_names, *tuner_cls.shared_parameter_names)
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    return {
        key: tensor
        for key, tensor in state.items()
        if not any(part.startswith(own) for part in key.split("."))
    }


def _factors(
    layer: BaseTunerLayer,
    adapter_name: str,
    rank: int | float | None,
    options: Mapping[str, object],
) -> LowRank:
    """Return a layer's delta as factors of a LoRA layer, of exactly this rank if an integer."""
    groups = layer.geometry.groups
    if groups > 1:
        return _in_groups(layer.low_rank_factors(adapter_name, None, **options), groups, rank)
    factors = layer.low_rank_factors(adapter_name, rank, **options)
    return _of_rank(factors, rank) if isinstance(rank, int) else factors


def _of_rank(factors: LowRank, rank: int) -> LowRank:
    """Pad factors with zeros to a rank."""
    A, B = factors.A, factors.B
    largest = min(A.shape[1], B.shape[0])
    if rank > largest:
        raise PeftValueError(
            f"The chosen rank {rank} is larger than the weight shape ({largest}), please choose a "
            "lower rank."
        )
    missing = rank - A.shape[0]
    return factors._replace(A=F.pad(A, (0, 0, 0, missing)), B=F.pad(B, (0, missing)))


def _in_groups(factors: LowRank, groups: int, rank: int | float | None) -> LowRank:
    """Return exact factors `A [r, in // groups · taps]`, `B [out, r]` of a grouped convolution as
    `A [groups · k, in · taps]`, `B [out, k]`. In a LoRA layer only `B` is grouped, so each group
    needs its own rows of `A`, which are zero on the channels of other groups.
    """
    if isinstance(rank, int) and rank % groups:
        raise PeftValueError(f"`rank`={rank} must be a multiple of the layer's {groups} groups.")
    each = rank // groups if isinstance(rank, int) else 1.0 if rank is None else rank
    parts = [approximate(B, factors.A, each) for B in factors.B.chunk(groups)]
    k = each if isinstance(each, int) else max(part.rank for part in parts)
    parts = [_of_rank(part, k) for part in parts]
    A = factors.A.new_zeros(groups, k, groups, factors.A.shape[1])
    for group, part in enumerate(parts):
        A[group, :, group] = part.A
    return LowRank(
        A.flatten(2).flatten(0, 1),
        torch.cat([part.B for part in parts]),
        total_error(parts),
        factors.norm,
    )


def _lora_config(
    root: nn.Module,
    config: TargetedConfig,
    layers: Mapping[str, nn.Module],
    deltas: Mapping[str, LowRank],
    rank: int | float | None,
) -> LoraConfig:
    """Return the config of a conversion, with scaling 1.

    It has the largest rank and a pattern for layers of another; if `rank` is a share of the energy,
    a pattern for all layers.
    """
    by_energy = isinstance(rank, float)
    ranks = {path: delta.rank for path, delta in deltas.items()}
    r = 1 if by_energy else max(ranks.values())
    pattern = _targets.patterns(ranks, None if by_energy else r)
    sizes = map(geometry, layers.values())
    return LoraConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        **exact_targets(root, layers),
        modules_to_save=None if config.modules_to_save is None else list(config.modules_to_save),
        trainable_token_indices=config.trainable_token_indices,
        ensure_weight_tying=tying.is_wanted(config),
        bias=_BIASES.get(config.trained_biases, "lora_only"),
        fan_in_fan_out=any(getattr(size, "transposed", False) for size in sizes),
        task_type=config.task_type,
        auto_mapping=config.auto_mapping,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
    )
