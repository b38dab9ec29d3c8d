# SPDX-License-Identifier: Apache-2.0
"""`get_routed_model`: put many adapters into one model that chooses among them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from ...base.errors import PeftError, PeftTypeError, PeftValueError
from ...base.plain_values import plain
from ...checkpoint.hub import HubOptions
from ...config import PeftConfig
from ...core.low_rank_deltas import deltas_by_task
from ...ops.low_rank import Deltas, LowRank
from ...peft_model import PeftModel
from .config import RoutedConfig
from .sources import Source, at_hand, check_free, deltas_digest, key_of

Expert: TypeAlias = (
    "str | os.PathLike[str] | Source | tuple[PeftConfig, Mapping[str, Tensor]] "
    "| tuple[PeftConfig, Mapping[str, Tensor], Mapping[str, Tensor]] | Deltas"
)
"""A folder, a Hub id, a dictionary with `source`, `subfolder`, `revision` and `task`; a pair of
config and tensors, or what `AdapterLibrary.load` returns; or deltas by module path.
"""


def get_routed_model(
    model: nn.Module,
    experts: Mapping[str, Expert],
    config: RoutedConfig | None = None,
    adapter_name: str = "default",
    *,
    general_experts: Mapping[str, Expert] | None = None,
    hub_options: HubOptions | None = None,
    autocast_adapter_dtype: bool = True,
    **options: Any,
) -> PeftModel:
    """Return a model that routes over experts: saved adapters of any method and rank.

    Args:
        model: The base model; the routing is put into it in place.
        experts: Name → folder, Hub id, dictionary with `source`, `subfolder`, `revision` and
            `task`, a pair `(config, state_dict)`, what `AdapterLibrary.load` returns, or factors by
            module path. An adapter with several tasks gives an expert for each.
        config: The routing, without experts; by default one of the `options`.
        adapter_name: A name for the routed adapter.
        general_experts: Adapters whose mean delta is subtracted from each expert's.
        hub_options: `token`, `cache_dir`, … for experts on the Hub.
        autocast_adapter_dtype: Keep factors and gates in float32 where the base has 16 bits.
        **options: Fields of `RoutedConfig`, in place of `config`.

    Raises:
        CheckpointNotFoundError: There is no adapter at an expert's source.
        CheckpointError: An adapter is damaged, or does not fit the base model.
        PeftNotSupportedError: An adapter is more than low-rank deltas.
        PeftValueError: A value is not allowed. The model is left as it was after any error.

    Example:
        >>> import torch
        >>> from peft import LoKrConfig, get_peft_model, get_peft_model_state_dict
        >>> experts = {}
        >>> for name in ("sql", "law"):
        ...     one = LoKrConfig(r=1, target_modules=["0"], init_weights=False)
        ...     tuned = get_peft_model(nn.Sequential(nn.Linear(4, 4)), one)
        ...     experts[name] = one, get_peft_model_state_dict(tuned)
        >>> base = nn.Sequential(nn.Linear(4, 4))
        >>> model = get_routed_model(base, experts, routing="arrow", top_k=1)
        >>> model(torch.randn(2, 3, 4)).shape
        torch.Size([2, 3, 4])

    Source: arXiv:2405.11157, section 3.2
    """
    for field, given in (("experts", experts), ("hub_options", hub_options or {})):
        if not isinstance(given, Mapping):
            kind = "name → folder" if field == "experts" else "option → value"
            raise PeftTypeError(f"`{field}` must be a dictionary, {kind}, got {given!r}.")
    if not experts:
        raise PeftValueError("There are no experts to route over; name at least one adapter.")
    if config is not None and options:
        raise PeftTypeError(
            f"Pass `config`, or its fields: {', '.join(map(repr, options))} came with a config."
        )
    if config is None:
        config = RoutedConfig(**options)
    elif not isinstance(config, RoutedConfig):
        raise PeftTypeError(f"`config` must be a RoutedConfig, got {type(config).__name__}.")
    if config.experts or config.general_experts:
        raise PeftValueError(
            "The config names experts already; use `get_peft_model(model, config)`, or leave them "
            "out of it."
        )
    config = config.for_adapter()
    config.experts, in_memory = described(model, experts, config.deltas_only)
    config.general_experts, general = described(model, general_experts or {}, config.deltas_only)
    config.base_model_name_or_path = (
        plain(getattr(model, "name_or_path", None)) or config.base_model_name_or_path
    )
    config.validate()
    with at_hand({**in_memory, **general}, hub_options):
        return PeftModel.class_for(config.task_type)(
            model, config, adapter_name, autocast_adapter_dtype
        )


def described(
    model: nn.Module, experts: Mapping[str, Expert], deltas_only: bool
) -> tuple[dict[str, Source], dict[str, Deltas]]:
    """Return experts as the fields of a config, and the deltas of those in memory, by `key_of`."""
    if not isinstance(experts, Mapping):
        raise PeftTypeError(f"Experts must be a dictionary, name → folder, got {experts!r}.")
    sources: dict[str, Source] = {}
    in_memory: dict[str, Deltas] = {}
    for name, expert in experts.items():
        if not isinstance(name, str):
            raise PeftTypeError(f"An expert's name must be a string, not {name!r}.")
        if isinstance(expert, (str, os.PathLike)):
            check_free(name, sources)
            sources[name] = {"source": os.fspath(expert)}
        elif isinstance(expert, Mapping) and expert and "source" in expert:
            check_free(name, sources)
            sources[name] = dict(expert)
        else:
            for task, deltas in _in_memory(model, name, expert, deltas_only).items():
                source = {"source": None, "digest": deltas_digest(deltas)}
                in_memory[key_of(source)] = deltas
                expert_name = f"{name}.{task}" if task else name
                check_free(expert_name, sources)
                sources[expert_name] = source
    return sources, in_memory


def _in_memory(model: nn.Module, name: str, expert: object, deltas_only: bool) -> dict[str, Deltas]:
    """Return the deltas of an expert in memory, by task."""
    if isinstance(expert, tuple) and not isinstance(expert, LowRank):
        pair = expert[:2] if len(expert) == 3 else expert
        try:
            return deltas_by_task(model, pair, deltas_only=deltas_only)  # type: ignore[arg-type]
        except PeftError as error:
            raise type(error)(f"Expert {name!r}: {error}") from error
    is_deltas = isinstance(expert, Mapping) and all(
        isinstance(part, LowRank) for part in expert.values()
    )
    if not is_deltas or not expert:
        raise PeftTypeError(
            f"Expert {name!r} must be a folder, a Hub id, a dictionary with `source`, a pair of "
            f"config and tensors, or factors by module path; got {type(expert).__name__}."
        )
    return {"": dict(expert)}  # type: ignore[call-overload]
