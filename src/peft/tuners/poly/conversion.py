# SPDX-License-Identifier: Apache-2.0
"""Adapters of any method as the skills of one Poly adapter: a library of LoRA adapters becomes an inventory to train on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import as_folder
from ...utils.adapter_files import write_adapter
from ...utils.error import PeftError, PeftNotSupportedError, PeftTypeError, PeftValueError, UnsupportedModuleError
from ...utils.peft_types import PEFT_TYPE_TO_TUNER_MAPPING, lookup
from ...utils.save_and_load import MODEL_ROOT
from .. import _targets
from .._converting import check_convertible, config_of, layers_with, root_of
from .._geometry import geometry
from .._layer import BaseTunerLayer
from .._lowrank import LowRank, check_rank, total_error
from .._plan import own_modules
from .config import PolyConfig


class _Pair(NamedTuple):
    config: PolyConfig
    state_dict: dict[str, Tensor]


class PolyConversion(_Pair):
    """A Poly adapter made of others: the pair `(config, state_dict)`, and how near it is.

    Attributes:
        config: Its config.
        state_dict: Its tensors by checkpoint key.
        errors: For each adapter `‖ΔW − B·A‖ / ‖ΔW‖` in the Frobenius norm over all layers; 0 where it is exact.
    """

    errors: dict[str, float]

    def __repr__(self) -> str:
        return f"PolyConversion({self.config!r}, {len(self.state_dict)} tensors, errors={getattr(self, 'errors', {})})"


def convert_to_poly(
    model: nn.Module,
    adapters: Sequence[str] | Mapping[str, str],
    rank: int | None = None,
    own_weight: float = 1.0,
    *,
    task_id: Any = None,
) -> PolyConversion:
    """The Poly adapter whose skills are the deltas of other adapters, one a task. The model is left as it is.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into.
        adapters: Names of adapters of it, of any methods; the tasks get their names, or those that a dictionary has for them.
        rank: Rank of the skills; None for the largest that an adapter needs, which makes all exact. Smaller ones are filled up.
        own_weight: How much of its own skill a task has, above 0; the other skills share the rest. With 1 each task computes what
            its adapter did, and as good as no gradient reaches its weights of others: to train these, leave some, say 0.9.
        task_id: For adapters that have tasks themselves.

    Returns:
        `(config, state_dict)`, to be written by `save_as_poly`; with the `errors`.

    Raises:
        PeftTypeError: `adapters` is one name.
        PeftValueError: An adapter is unknown, there is none, or a value is not allowed.
        PeftNotSupportedError: An adapter trains modules, rows of embeddings or biases beside its layers.
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
    check_rank(rank)
    if isinstance(adapters, str) or isinstance(rank, float):
        raise PeftTypeError(f"`adapters`={adapters!r} must be a list of names, and `rank`={rank!r} an integer or None.")
    if not adapters or not 0 < own_weight <= 1:
        raise PeftValueError(
            f"`adapters`={list(adapters)!r} must name some, and `own_weight`={own_weight!r} be above 0 and at most 1."
        )
    configs = {name: _checked(config_of(model, name), name) for name in adapters}
    root, prefix = root_of(model)
    parts: dict[str, dict[str, LowRank]] = {}
    layers: dict[str, BaseTunerLayer] = {}
    for name, config in configs.items():
        own = dict(layers_with(root, name))
        check_convertible(own, name)
        options = lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type).conversion_options(config, task_id=task_id)
        for path, layer in own.items():
            parts.setdefault(path, {})[name] = _factors(layer, path, name, rank, options)
        layers |= own
    r = rank or max(factors.rank for each in parts.values() for factors in each.values())
    names = list(configs)
    logits = _one_hot_logits(len(names), own_weight)
    state: dict[str, Tensor] = {}
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
        task_names=list(adapters.values()) if isinstance(adapters, Mapping) else names,
        target_modules=targets,
        exclude_modules=excluded,
        task_type=first.task_type,
        auto_mapping=first.auto_mapping,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
    )
    result = PolyConversion(config, state)
    result.errors = {name: total_error(each[name] for each in parts.values() if name in each) for name in names}
    return result


def save_as_poly(
    path: str | os.PathLike,
    model: nn.Module,
    adapters: Sequence[str] | Mapping[str, str],
    rank: int | None = None,
    own_weight: float = 1.0,
    *,
    task_id: Any = None,
) -> PolyConversion:
    """Make a Poly adapter of others and write it to a folder, as `save_pretrained` writes adapters.

    Args:
        path: The folder, made if missing.
        model, adapters, rank, own_weight, task_id: As for `convert_to_poly`.

    Returns:
        What was written, with its errors.

    Raises:
        As `convert_to_poly`; nothing is written then.
    """
    folder = as_folder(path)
    converted = convert_to_poly(model, adapters, rank, own_weight, task_id=task_id)
    root, prefix = root_of(model)
    state = {key if prefix else MODEL_ROOT + key: tensor for key, tensor in converted.state_dict.items()}
    mapping = {"base_model_class": type(root).__name__, "parent_library": type(root).__module__}
    config = replace(converted.config, inference_mode=True)
    write_adapter(folder, state, config.to_json(None if config.task_type is not None else mapping))
    return converted


def _checked(config: Any, name: str) -> Any:
    """A config of an adapter that has nothing beside its layers."""
    beside = {"modules_to_save": config.modules_to_save, "trainable_token_indices": config.trainable_token_indices}
    beside["bias"] = None if config.trained_biases == "none" else config.trained_biases
    for field, value in beside.items():
        if value:
            raise PeftNotSupportedError(
                f"Adapter {name} has `{field}`={value!r}, of which a model can have one only; skills are made of what "
                "adapters add to linear layers."
            )
    return config


def _factors(layer: BaseTunerLayer, path: str, name: str, rank: int | None, options: dict[str, Any]) -> LowRank:
    """A layer's delta as factors."""
    size = geometry(layer)
    if size is None or size.is_conv:
        raise UnsupportedModuleError(f"`{path}`: Poly adapts linear layers; {type(layer.get_base_layer()).__name__} is none.")
    try:
        return layer.low_rank_factors(name, rank, **options)
    except PeftError as error:
        raise type(error)(f"`{path}`: {error}") from None


def _skills(layer: BaseTunerLayer, each: Mapping[str, LowRank], names: Sequence[str], r: int) -> tuple[Tensor, Tensor]:
    """Factors side by side: `A [1, n_skills, in, r]` and `B [1, n_skills, r, out]`; zero for adapters without this layer."""
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
    """Logits `[n, n]` of mixing weights that are `own_weight` on the diagonal and share the rest out; gates add up to a half."""
    rest = (1 - own_weight) / max(n - 1, 1)
    weights = torch.full((n, n), rest, dtype=torch.float64).fill_diagonal_(own_weight if n > 1 else 1.0)
    return (weights / 2).clamp(min=torch.finfo(torch.float32).tiny).logit().float()
