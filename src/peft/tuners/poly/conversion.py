# SPDX-License-Identifier: Apache-2.0
"""Make one Poly adapter of adapters of any methods: each becomes a skill, and each a task."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...base.calls.running import holds
from ...base.errors import (
    PeftNotSupportedError,
    PeftTypeError,
    PeftValueError,
    UnsupportedModuleError,
)
from ...base.progress import track
from ...base.registry import PEFT_TYPE_TO_TUNER_MAPPING, lookup
from ...checkpoint.paths import as_folder
from ...config import TargetedConfig, is_int
from ...core import combined_heads
from ...core.base_layer import innermost, is_linear
from ...core.conversion import (
    Conversion,
    check_convertible,
    config_of,
    layers_with,
    naming_layer,
    root_of,
    write_conversion,
)  # fmt: skip
from ...core.skeleton import exact_targets
from ...ops.low_rank import LowRank, total_error
from .config import PolyConfig
from .data.labels import TaskLabels


class PolyConversion(Conversion[PolyConfig]):
    """A Poly adapter made of others: the pair `(config, state_dict)`, and its errors.

    Attributes:
        errors: For each adapter `‖ΔW − B·A‖ / ‖ΔW‖` in the Frobenius norm over all layers; 0 where
            the conversion is exact.
        labels: Which labels of a stacked head belong to which task; None without a stacked head.
    """

    errors: dict[str, float]
    labels: TaskLabels | None = None


@holds
def convert_to_poly(
    model: nn.Module,
    adapters: Sequence[str] | Mapping[str, str],
    rank: int | None = None,
    own_weight: float = 1.0,
    *,
    task_id: int | str | None = None,
    heads: str | None = None,
) -> PolyConversion:
    """Return the Poly adapter whose skills are the deltas of other adapters, one for each task. The
    model does not change.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into.
        adapters: Names of adapters of the model, of any methods. The tasks get these names, or
            those that a dictionary has for them.
        rank: Rank of the skills; skills of a smaller rank are padded with zeros. None: the largest
            rank that an adapter needs, which makes all exact.
        own_weight: Each task's weight of its own skill, above 0; the other skills share the rest.
            With 1 each task computes the same as its adapter did, and its weights of other skills
            get almost no gradient: to train them, use a smaller value, for example 0.9.
        task_id: The task, for adapters that have tasks themselves.
        heads: How to combine modules (or rows of embeddings) that several adapters train in full.
            "mean": their mean. An adapter's name: that adapter's. "stack": a linear head with the
            labels of all, one adapter's after the other's, in which each task's logits are those of
            its adapter; it needs a base model with so many labels. An adapter named "mean" or
            "stack", if it is one of `adapters`, takes precedence.

    Returns:
        `(config, state_dict)`, as `save_as_poly` writes them; with the `errors`, and the `labels`
        of a stacked head.

    Raises:
        PeftTypeError: `adapters` is not a list of names, `rank` not an integer, or `own_weight` not
            a number.
        PeftValueError: There are no adapters, one is unknown or comes twice, or two tasks have one
            name; a value is not allowed; or several adapters train the same module, and `heads`
            does not say how to combine them or is not possible.
        PeftNotSupportedError: An adapter trains biases of the base model.
        UnsupportedModuleError: A layer has no delta, or Poly does not adapt it.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> lora = lambda: LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 6)), lora(), "sum")
        >>> model.add_adapter("max", lora())
        >>> config, state_dict = convert_to_poly(model, ["sum", "max"])
        >>> config.task_names, state_dict["base_model.model.0.poly_lora_A"].shape
        (['sum', 'max'], torch.Size([1, 2, 4, 2]))

    Source: arXiv:2202.13914, section 3 (tasks as rows of a matrix over skills)
    """
    tasks = _tasks_by_adapter(adapters)
    _check_numbers(rank, own_weight)
    configs = {name: config_of(model, name) for name in tasks}
    _check_biases(configs)
    root, prefix = root_of(model)
    companions, labels = _companions(root, configs, tasks, heads)
    skills: dict[str, dict[str, LowRank]] = {}
    for name, config in track(configs.items(), "Converting to Poly", unit="adapter"):
        skills[name] = _low_rank_deltas(root, name, config, rank, task_id)
    by_task = {task: name for name, task in tasks.items()}
    result = _assembled(root, prefix, skills, by_task, list(configs.values()), rank, own_weight)
    result.state_dict.update({prefix + key: tensor for key, tensor in companions.items()})
    result.labels = labels
    return result


def inventory_from_deltas(
    model: nn.Module,
    skills: Mapping[str, Mapping[str, LowRank]],
    tasks: Mapping[str, str],
    like: TargetedConfig,
    rank: int | None = None,
    own_weight: float = 1.0,
) -> PolyConversion:
    """Return the Poly adapter that has given deltas as skills. The model does not change.

    Args:
        model: The base model, or a model with adapters.
        skills: For each skill the factors of its delta, by module path.
        tasks: For each task the skill that it begins with.
        like: The config, of an adapter of deltas alone, that says which base model and task type
            the new adapter is for.
        rank: Rank of the skills, none smaller than that of a delta. None: the largest of these.
        own_weight: As for `convert_to_poly`.

    Returns:
        `(config, state_dict)`, with the errors of the skills.

    Raises:
        PeftError: As `convert_to_poly`.
    """
    _check_numbers(rank, own_weight)
    root, prefix = root_of(model)
    for path in dict.fromkeys(path for deltas in skills.values() for path in deltas):
        _check_linear(root.get_submodule(path), path)
    return _assembled(root, prefix, skills, tasks, [like], rank, own_weight)


def _assembled(
    root: nn.Module,
    prefix: str,
    skills: Mapping[str, Mapping[str, LowRank]],
    tasks: Mapping[str, str],
    configs: Sequence[TargetedConfig],
    rank: int | None,
    own_weight: float,
) -> PolyConversion:
    """Return the Poly adapter of skills, without modules that are trained in full."""
    paths = dict.fromkeys(path for deltas in skills.values() for path in deltas)
    r = rank or max(delta.rank for deltas in skills.values() for delta in deltas.values())
    names = list(skills)
    logits = _logits([names.index(skill) for skill in tasks.values()], len(names), own_weight)
    state: dict[str, Tensor] = {}
    for path in paths:
        A, B = _skills([deltas.get(path) for deltas in skills.values()], r)
        state[f"{prefix}{path}.poly_lora_A"], state[f"{prefix}{path}.poly_lora_B"] = A, B
        state[f"{prefix}{path}.poly_router.module_logits"] = logits.clone()
    result = PolyConversion(_poly_config(root, paths, configs, list(tasks), len(names), r), state)
    result.errors = {name: total_error(deltas.values()) for name, deltas in skills.items()}
    return result


def save_as_poly(
    path: str | os.PathLike,
    model: nn.Module,
    adapters: Sequence[str] | Mapping[str, str],
    rank: int | None = None,
    own_weight: float = 1.0,
    *,
    task_id: int | str | None = None,
    heads: str | None = None,
) -> PolyConversion:
    """Make a Poly adapter of others and write it to a folder, as `save_pretrained` writes adapters.

    Args:
        path: The folder, which is made if missing.
        model, adapters, rank, own_weight, task_id, heads: As for `convert_to_poly`.

    Returns:
        The adapter that was written, with its errors.

    Raises:
        PeftError: As `convert_to_poly`; nothing is written then.
    """
    folder = as_folder(path)
    converted = convert_to_poly(model, adapters, rank, own_weight, task_id=task_id, heads=heads)
    write_conversion(folder, model, converted)
    return converted


def _tasks_by_adapter(adapters: object) -> dict[str, str]:
    """Return the name of each adapter's task."""
    if isinstance(adapters, str) or not isinstance(adapters, Iterable):
        raise PeftTypeError(
            f"`adapters`={adapters!r} must be a list of names, or a dictionary with a task's name "
            "for each."
        )
    tasks = list(adapters.values()) if isinstance(adapters, Mapping) else list(adapters)
    names = list(adapters) if isinstance(adapters, Mapping) else tasks
    if wrong := [name for name in (*names, *tasks) if not isinstance(name, str)]:
        raise PeftTypeError(f"`adapters`={adapters!r} must have names (strings), not {wrong[0]!r}.")
    if not names:
        raise PeftValueError(f"`adapters`={adapters!r} must name at least one adapter.")
    if len(set(tasks)) < len(tasks):
        raise PeftValueError(
            f"`adapters`={adapters!r} has a name twice; each adapter is the skill of one task with "
            "a name of its own. `copy_adapter` copies an adapter."
        )
    return dict(zip(names, tasks, strict=True))


def _check_numbers(rank: object, own_weight: object) -> None:
    """Check the skills' rank and a task's weight of its own skill."""
    rule = (
        f"`rank`={rank!r} must be an integer of at least 1, or None for the rank that makes all "
        "skills exact."
    )
    if rank is not None and not is_int(rank):
        raise PeftTypeError(rule)
    if rank is not None and rank < 1:
        raise PeftValueError(rule)
    rule = f"`own_weight`={own_weight!r} must be a number above 0 and at most 1."
    if not isinstance(own_weight, Real) or isinstance(own_weight, bool):
        raise PeftTypeError(rule)
    if not 0 < float(own_weight) <= 1:  # also false for NaN
        raise PeftValueError(rule)


def _check_biases(configs: Mapping[str, TargetedConfig]) -> None:
    """Check that no adapter trains biases of the base model."""
    for name, config in configs.items():
        if config.trained_biases != "none":
            raise PeftNotSupportedError(
                f"Adapter {name} has `bias`={config.trained_biases!r}, but a model has its biases "
                "once only; skills are made of what adapters add to linear layers."
            )


def _poly_config(
    root: nn.Module,
    paths: Collection[str],
    configs: Sequence[TargetedConfig],
    task_names: list[str],
    n_skills: int,
    r: int,
) -> PolyConfig:
    """Return the config of the Poly adapter for some layers of a base model."""
    return PolyConfig(
        r=r,
        alpha=float(r),
        n_tasks=len(task_names),
        n_skills=n_skills,
        task_names=task_names,
        **combined_heads.fields_of(configs),
        **exact_targets(root, paths),
        task_type=configs[0].task_type,
        auto_mapping=configs[0].auto_mapping,
        base_model_name_or_path=configs[0].base_model_name_or_path,
        revision=configs[0].revision,
    )


def _companions(
    root: nn.Module,
    configs: Mapping[str, TargetedConfig],
    tasks: Mapping[str, str],
    heads: str | None,
) -> tuple[dict[str, Tensor], TaskLabels | None]:
    """Return the modules and embedding rows that the new adapter trains in full, by checkpoint key,
    and the labels of a stacked head.
    """
    parts = combined_heads.collect(root, configs)
    if heads == combined_heads.STACK not in configs:
        return _stacked(parts, tasks)
    return combined_heads.combine(parts, heads, can_stack=_linear_head(parts) is not None), None


def _stacked(
    parts: combined_heads.Parts, tasks: Mapping[str, str]
) -> tuple[dict[str, Tensor], TaskLabels]:
    """Return a linear head with the rows of all heads, and the labels of each task in it."""
    if not any(parts.values()):
        raise PeftValueError(
            f"`heads`={combined_heads.STACK!r} stacks heads that adapters train beside their "
            f"layers (`modules_to_save`); of {', '.join(parts)} none has one. Leave `heads` out."
        )
    head = _linear_head(parts)
    if head is None:
        raise PeftValueError(
            f"`heads`={combined_heads.STACK!r} needs one linear head in each adapter; they train "
            f'{ {name: sorted(own) for name, own in parts.items()} }. Pass `heads="mean"` or the '
            "name of the adapter whose modules are taken."
        )
    joined = {
        key: torch.cat([own[key].detach() for own in parts.values()])
        for key in next(iter(parts.values()))
    }
    return joined, TaskLabels(
        {tasks[name]: len(own[f"{head}.weight"]) for name, own in parts.items()}
    )


def _linear_head(parts: combined_heads.Parts) -> str | None:
    """Return the path of the linear layer if each adapter trains that, and only that, in full."""
    first, *others = (set(own) for own in parts.values())
    paths = {key.rpartition(".")[0] for key in first}
    if len(paths) != 1 or any(own != first for own in others):
        return None
    path = paths.pop()
    is_linear = f"{path}.weight" in first <= {f"{path}.weight", f"{path}.bias"}
    return path if is_linear else None


def _low_rank_deltas(
    root: nn.Module, name: str, config: TargetedConfig, rank: int | None, task_id: int | str | None
) -> dict[str, LowRank]:
    """Return the delta of each layer of an adapter as a low-rank product, by path."""
    layers = dict(layers_with(root, name))
    check_convertible(layers, name)
    method = lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type)
    options = method.conversion_options(config, task_id=task_id)
    result = {}
    for path, layer in layers.items():
        _check_linear(layer, path)
        with naming_layer(path):
            result[path] = layer.low_rank_factors(name, rank, **options)
    return result


def _check_linear(module: nn.Module, path: str) -> None:
    """Check that Poly adapts a module."""
    if not is_linear(module):
        raise UnsupportedModuleError(
            f"`{path}`: Poly adapts linear layers; {type(innermost(module)).__name__} is none."
        )


def _skills(deltas: Sequence[LowRank | None], r: int) -> tuple[Tensor, Tensor]:
    """Return one layer's skills, `A [1, n_skills, in, r]` and `B [1, n_skills, r, out]`; None is a
    skill without this layer, which is zero.
    """
    first = next(delta for delta in deltas if delta is not None)
    A = first.A.new_zeros(1, len(deltas), first.A.shape[1], r)
    B = first.B.new_zeros(1, len(deltas), r, first.B.shape[0])
    for skill, delta in enumerate(deltas):
        if delta is not None:
            A[0, skill] = F.pad(delta.A.detach(), (0, 0, 0, r - delta.rank)).T
            B[0, skill] = F.pad(delta.B.detach(), (0, r - delta.rank)).T
    return A, B


def _logits(own_skills: Sequence[int], n_skills: int, own_weight: float) -> Tensor:
    """Return logits `[n_tasks, n_skills]` whose mixing weights are `own_weight` for each task's own
    skill, given by number; the others share the rest equally. The gates of a task have the sum 0.5.
    """
    rest = (1 - own_weight) / max(n_skills - 1, 1)
    weights = torch.full((len(own_skills), n_skills), rest, dtype=torch.float64)
    weights[range(len(own_skills)), own_skills] = own_weight if n_skills > 1 else 1.0
    return (weights / 2).clamp(min=torch.finfo(torch.float32).tiny).logit().float()
