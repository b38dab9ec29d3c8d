# SPDX-License-Identifier: Apache-2.0
"""`get_peft_model`: add an adapter to a model."""

from __future__ import annotations

from typing import Any, Literal, Protocol, TypeVar, overload

from torch import nn

from .base.errors import warn
from .base.plain_values import plain
from .base.registry import TaskType
from .base.validation import check_flags
from .config import PeftConfig, check_config
from .mixed_model import PeftMixedModel
from .peft_model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel

M = TypeVar("M", covariant=True)


class _Typed(Protocol[M]):
    """A config that tells type checkers the class of its models."""

    def adapts_as(self) -> M: ...


@overload
def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = ...,
    *,
    mixed: Literal[True],
    autocast_adapter_dtype: bool = ...,
    revision: str | None = ...,
    low_cpu_mem_usage: bool = ...,
) -> PeftMixedModel: ...


@overload
def get_peft_model(
    model: nn.Module,
    peft_config: _Typed[M],
    adapter_name: str = ...,
    mixed: Literal[False] = ...,
    autocast_adapter_dtype: bool = ...,
    revision: str | None = ...,
    low_cpu_mem_usage: bool = ...,
) -> M: ...


@overload
def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = ...,
    mixed: bool = ...,
    autocast_adapter_dtype: bool = ...,
    revision: str | None = ...,
    low_cpu_mem_usage: bool = ...,
) -> PeftModel: ...


def get_peft_model(
    model: nn.Module,
    peft_config: Any,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Add an adapter to a model, and freeze the base model.

    Args:
        model: The base model. It is changed in place, and the result runs it.
        peft_config: The adapter's config; its `task_type` decides the class of the result. The
            adapter has a copy of it, in the result's `peft_config`.
        adapter_name: The adapter's name.
        mixed: True returns a `PeftMixedModel`, which takes adapters of other methods too.
        autocast_adapter_dtype: True keeps the adapter in float32 on a base of 16 bits.
        revision: The base model's revision, noted in the config.
        low_cpu_mem_usage: True makes the adapter on the meta device, for a checkpoint to fill.

    Returns:
        The model with the adapter, which is active and trainable.

    Raises:
        PeftTypeError: `peft_config` is not a config, or a switch is neither True nor False.
        PeftValueError: The config is invalid or does not fit; the model is left as it was.

    Example:
        >>> import torch
        >>> from peft import PolyConfig, get_peft_model
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> config = PolyConfig(r=2, n_tasks=3, n_skills=2, target_modules=["0"])
        >>> model = get_peft_model(base, config)
        >>> model(torch.zeros(5, 8), task_ids=[0, 1, 2, 1, 0]).shape
        torch.Size([5, 8])
    """
    check_config(peft_config)
    check_flags(mixed=mixed)
    model_cls = PeftMixedModel if mixed else PeftModel
    if not mixed and peft_config.task_type is not None:
        model_cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[TaskType(peft_config.task_type)]
    result = model_cls(
        model,
        peft_config,
        adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    config = result.peft_config[adapter_name]
    before, name = config.base_model_name_or_path, plain(getattr(model, "name_or_path", None))
    if name and before not in (None, name):
        warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{before}' to '{name}'. "
            "Please ensure that the correct base model is loaded when loading this checkpoint."
        )
    config.base_model_name_or_path = name or before
    if revision is not None:
        if config.revision not in (None, revision):
            warn(
                f"peft config has already set base model revision to {config.revision}, "
                f"overwriting with revision {revision}"
            )
        config.revision = revision
    return result
