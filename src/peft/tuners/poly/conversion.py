# SPDX-License-Identifier: Apache-2.0
"""Adapters of any method as the skills of one Poly adapter: a library of LoRA adapters becomes an
inventory to train on.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...base.errors import (
    PeftError,
    PeftNotSupportedError,
    PeftTypeError,
    PeftValueError,
    UnsupportedModuleError,
)
from ...base.registry import PEFT_TYPE_TO_TUNER_MAPPING, lookup
from ...checkpoint.files import write_adapter
from ...checkpoint.paths import as_folder
from ...checkpoint.state_dict import MODEL_ROOT, companion_tensors, in_view
from ...config import is_int
from ...core import combined_heads
from ...core import targets as _targets
from ...core.base_layer import geometry
from ...core.conversion import check_convertible, config_of, layers_with, root_of
from ...core.layer import BaseTunerLayer
from ...core.plan import own_modules
from ...integrations.distributed import state_tensors
from ...ops.low_rank import LowRank, total_error
from .config import PolyConfig
from .data.labels import TaskLabels


class _Pair(NamedTuple):
    config: PolyConfig
    state_dict: dict[str, Tensor]


class PolyConversion(_Pair):
    """A Poly adapter made of others: the pair `(config, state_dict)`, and how near it is.

    Attributes:
        config: Its config.
        state_dict: Its tensors by checkpoint key.
        errors: For each adapter `‖ΔW − B·A‖ / ‖ΔW‖` in the Frobenius norm over all layers; 0 where
            it is exact.
        labels: Which labels of a stacked head are which task's; None where none was stacked.
    """

    errors: dict[str, float]
    labels: TaskLabels | None = None

    def __repr__(self) -> str:
        return f"PolyConversion({self.config!r}, {len(self.state_dict)} tensors, errors={getattr(self, 'errors', {})})"


def convert_to_poly(
    model: nn.Module,
    adapters: Sequence[str] | Mapping[str, str],
    rank: int | None = None,
    own_weight: float = 1.0,
    *,
    task_id: Any = None,
    heads: str | None = None,
) -> PolyConversion:
    """The Poly adapter whose skills are the deltas of other adapters, one a task. The model is left
    as it is.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into.
        adapters: Names of adapters of it, of any methods; the tasks get their names, or those that
            a dictionary has for them.
        rank: Rank of the skills; None for the largest that an adapter needs, which makes all exact.
            Smaller ones are filled up.
        own_weight: How much of its own skill a task has, above 0; the other skills share the rest.
            With 1 each task computes what its adapter did, and as good as no gradient reaches its
            weights of others: to train these, leave some, say 0.9.
        task_id: For adapters that have tasks themselves.
        heads: What becomes of modules (or rows of embeddings) that several adapters train whole.
            "mean": their mean. An adapter's name: its own. "stack": a linear head with the labels
            of all, one adapter's after the other's, in which each task's logits are what its
            adapter gave; for a base model with so many labels. An adapter called "mean" or "stack",
            if it is one of `adapters`, is meant by its name.

    Returns:
        `(config, state_dict)`, to be written by `save_as_poly`; with the `errors` and the `labels`
        of a stacked head.

    Raises:
        PeftTypeError: `adapters` is no list of names, `rank` no integer, or `own_weight` no number.
        PeftValueError: An adapter is unknown, there is none, or comes twice; or two tasks have one
            name; or a value is not allowed; or several train the same module and `heads` does not
            say what becomes of it, or can't be had.
        PeftNotSupportedError: An adapter trains biases beside its layers.
        UnsupportedModuleError: A layer has no delta, or is none that Poly adapts.

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
    tasks = _tasks_of(adapters)
    _check_numbers(rank, own_weight)
    configs = {name: _checked(config_of(model, name), name) for name in tasks}
    root, prefix = root_of(model)
    beside, labels = _beside(root, configs, tasks, heads)
    parts: dict[str, dict[str, LowRank]] = {}
    layers: dict[str, BaseTunerLayer] = {}
    for name, config in configs.items():
        own = dict(layers_with(root, name))
        check_convertible(own, name)
        options = lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type).conversion_options(
            config, task_id=task_id
        )
        for path, layer in own.items():
            parts.setdefault(path, {})[name] = _factors(layer, path, name, rank, options)
        layers |= own
    r = rank or max(factors.rank for each in parts.values() for factors in each.values())
    names = list(configs)
    logits = _one_hot_logits(len(names), own_weight)
    state = {prefix + key: tensor for key, tensor in beside.items()}
    for path, each in parts.items():
        A, B = _skills(layers[path], each, names, r)
        state |= {f"{prefix}{path}.poly_lora_A": A, f"{prefix}{path}.poly_lora_B": B}
        state[f"{prefix}{path}.poly_router.module_logits"] = logits.clone()
    targets, excluded = _targets.exactly(layers, own_modules(root))
    first = next(iter(configs.values()))
    config = PolyConfig(
        r=r,
        alpha=float(r),
        n_tasks=len(names),
        n_skills=len(names),
        task_names=list(tasks.values()),
        modules_to_save=list(
            dict.fromkeys(m for c in configs.values() for m in c.modules_to_save or ())
        )
        or None,
        trainable_token_indices=next(
            (c.trainable_token_indices for c in configs.values() if c.trainable_token_indices), None
        ),
        target_modules=targets,
        exclude_modules=excluded,
        task_type=first.task_type,
        auto_mapping=first.auto_mapping,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
    )
    result = PolyConversion(config, state)
    result.labels = labels
    result.errors = {
        name: total_error(each[name] for each in parts.values() if name in each) for name in names
    }
    return result


def save_as_poly(
    path: str | os.PathLike,
    model: nn.Module,
    adapters: Sequence[str] | Mapping[str, str],
    rank: int | None = None,
    own_weight: float = 1.0,
    *,
    task_id: Any = None,
    heads: str | None = None,
) -> PolyConversion:
    """Make a Poly adapter of others and write it to a folder, as `save_pretrained` writes adapters.

    Args:
        path: The folder, made if missing.
        model, adapters, rank, own_weight, task_id, heads: As for `convert_to_poly`.

    Returns:
        What was written, with its errors.

    Raises:
        As `convert_to_poly`; nothing is written then.
    """
    folder = as_folder(path)
    converted = convert_to_poly(model, adapters, rank, own_weight, task_id=task_id, heads=heads)
    root, prefix = root_of(model)
    state = {
        key if prefix else MODEL_ROOT + key: tensor for key, tensor in converted.state_dict.items()
    }
    mapping = {"base_model_class": type(root).__name__, "parent_library": type(root).__module__}
    config = replace(converted.config, inference_mode=True)
    write_adapter(folder, state, config.to_json(None if config.task_type is not None else mapping))
    return converted


def _tasks_of(adapters: Any) -> dict[str, str]:
    """Return each adapter's task by name.

    Raises:
        PeftTypeError: `adapters` is no list or dictionary of names.
        PeftValueError: There are none, or one comes twice.
    """
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
        raise PeftValueError(f"`adapters`={adapters!r} must name some.")
    if len(set(tasks)) < len(tasks):
        raise PeftValueError(
            f"`adapters`={adapters!r} has a name twice; each adapter is the skill of one task with "
            "a name of its own. "
            "`copy_adapter` makes another adapter like one."
        )
    return dict(zip(names, tasks, strict=True))


def _check_numbers(rank: Any, own_weight: Any) -> None:
    """Insist on a rank for all skills, and on a task's share of its own.

    Raises:
        PeftTypeError: One is of another type.
        PeftValueError: One is out of range.
    """
    rule = f"`rank`={rank!r} must be an integer of at least 1, or None for what makes all skills exact."
    if rank is not None and not is_int(rank):
        raise PeftTypeError(rule)
    if rank is not None and rank < 1:
        raise PeftValueError(rule)
    rule = f"`own_weight`={own_weight!r} must be a number above 0 and at most 1."
    if not isinstance(own_weight, Real) or isinstance(own_weight, bool):
        raise PeftTypeError(rule)
    if not 0 < float(own_weight) <= 1:  # nor NaN
        raise PeftValueError(rule)


def _checked(config: Any, name: str) -> Any:
    """Return the config of an adapter of which all can be converted.

    Raises:
        PeftNotSupportedError: It trains biases of the base model.
    """
    if config.trained_biases != "none":
        raise PeftNotSupportedError(
            f"Adapter {name} has `bias`={config.trained_biases!r}, but a model has its biases once "
            "only; skills are made of "
            "what adapters add to linear layers."
        )
    return config


def _beside(
    root: nn.Module, configs: Mapping[str, Any], tasks: Mapping[str, str], heads: str | None
) -> tuple[dict[str, Tensor], TaskLabels | None]:
    """Return what the new adapter trains beside its layers, by key, and the labels of a stacked
    head.

    Raises:
        PeftValueError: As `convert_to_poly`.
    """
    rows = {
        name: config.trainable_token_indices
        for name, config in configs.items()
        if config.trainable_token_indices
    }
    if len({repr(indices) for indices in rows.values()}) > 1:
        raise PeftValueError(
            f"Adapters {', '.join(rows)} train different rows of embeddings, which can't be "
            "combined."
        )
    parts = {
        name: companion_tensors(state_tensors(root, in_view(config, name)).items(), config, name)
        for name, config in configs.items()
    }
    if heads == combined_heads.STACK not in configs:
        return _stacked(parts, tasks)
    return combined_heads.combine(parts, heads, can_stack=_linear_head(parts) is not None), None


def _stacked(
    parts: combined_heads.Parts, tasks: Mapping[str, str]
) -> tuple[dict[str, Tensor], TaskLabels]:
    """Return a linear head with the rows of all heads, and which are which task's.

    Raises:
        PeftValueError: Some adapter has no such head, or a head has other parts, which all tasks
            would share.
    """
    if not any(parts.values()):
        raise PeftValueError(
            f"`heads`={combined_heads.STACK!r} stacks heads that adapters train beside their "
            "layers (`modules_to_save`); of "
            f"{', '.join(parts)} none has one. Leave `heads` out."
        )
    head = _linear_head(parts)
    if head is None:
        raise PeftValueError(
            f"`heads`={combined_heads.STACK!r} needs one linear head in each adapter; they train "
            f'{ {name: sorted(own) for name, own in parts.items()} }. Pass `heads="mean"` or the '
            "name of the adapter whose "
            "modules are taken."
        )
    joined = {
        key: torch.cat([own[key].detach() for own in parts.values()])
        for key in next(iter(parts.values()))
    }
    return joined, TaskLabels(
        {tasks[name]: len(own[f"{head}.weight"]) for name, own in parts.items()}
    )


def _linear_head(parts: combined_heads.Parts) -> str | None:
    """Return the path of the linear layer that is all that each of some adapters trains beside its
    layers, if there is one.
    """
    first, *others = (set(own) for own in parts.values())
    paths = {key.rpartition(".")[0] for key in first}
    linear = {key.rpartition(".")[2] for key in first} <= {"weight", "bias"} and all(
        own == first for own in others
    )
    return (
        paths.pop()
        if linear and len(paths) == 1 and f"{next(iter(paths))}.weight" in first
        else None
    )


def _factors(
    layer: BaseTunerLayer, path: str, name: str, rank: int | None, options: dict[str, Any]
) -> LowRank:
    """A layer's delta as factors."""
    size = geometry(layer)
    if size is None or size.is_conv:
        raise UnsupportedModuleError(
            f"`{path}`: Poly adapts linear layers; {type(layer.get_base_layer()).__name__} is none."
        )
    try:
        return layer.low_rank_factors(name, rank, **options)
    except PeftError as error:
        raise type(error)(f"`{path}`: {error}") from None


def _skills(
    layer: BaseTunerLayer, each: Mapping[str, LowRank], names: Sequence[str], r: int
) -> tuple[Tensor, Tensor]:
    """Factors side by side: `A [1, n_skills, in, r]` and `B [1, n_skills, r, out]`; zero for
    adapters without this layer.
    """
    like, size = next(iter(each.values())), layer.geometry
    A = like.A.new_zeros(1, len(names), size.in_features, r)
    B = like.B.new_zeros(1, len(names), r, size.out_features)
    for skill, name in enumerate(names):
        if name in each:
            factors = each[name]
            A[0, skill] = F.pad(factors.A.detach(), (0, 0, 0, r - factors.rank)).T
            B[0, skill] = F.pad(factors.B.detach(), (0, r - factors.rank)).T
    return A, B


def _one_hot_logits(n: int, own_weight: float) -> Tensor:
    """Logits `[n, n]` of mixing weights that are `own_weight` on the diagonal and share the rest
    out; gates add up to a half.
    """
    rest = (1 - own_weight) / max(n - 1, 1)
    weights = torch.full((n, n), rest, dtype=torch.float64).fill_diagonal_(
        own_weight if n > 1 else 1.0
    )
    return (weights / 2).clamp(min=torch.finfo(torch.float32).tiny).logit().float()
