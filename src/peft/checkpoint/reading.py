# SPDX-License-Identifier: Apache-2.0
"""From a model to a checkpoint: an adapter's tensors, or those of the base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..base.containers import walk
from ..base.errors import CheckpointError, warn
from ..base.validation import check_flags
from ..integrations.accelerate import loaded_weights, offloaded_values
from ..integrations.distributed import (
    read_values,
    state_values,
    unwrap_model,
    unwrapped_name,
)
from .keys import (
    WHOLE_MODULES,
    adapter_config,
    adapter_tensors,
    container_names,
    in_view,
    is_embedding,
)
from .protocols import AdapterConfig, tuner_class
from .rank_padding import without_padding
from .vocabulary import was_resized

# Names that adapters insert between a module's path and the names of its tensors.
_INSERTED = ("base_layer", "original_module", "token_adapter")


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """Return an adapter's tensors by checkpoint key, in the storage format of a checkpoint.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into; where FSDP1 shards it,
            its outermost FSDP module.
        state_dict: A state dict of the model to take the tensors from, for example a gathered one,
            in place of the model's own.
        adapter_name: The adapter.
        unwrap_compiled: Accepted for compatibility; keys never have the prefixes of
            `torch.compile`.
        save_embedding_layers: True adds the token embeddings. "auto" adds those that the adapter
            adapts, and all, with a warning, if the vocabulary was resized since the base model was
            loaded.

    Returns:
        Tensors by checkpoint key: DTensors where FSDP2 shards the model; from FSDP1 gathered,
        sharded or only on the first process, as it is set to return state dicts.

    Raises:
        CheckpointError: `state_dict` has no readable tensors of the adapter.
        PeftRuntimeError: FSDP1 or ZeRO-3 hold the parameters elsewhere.
        PeftValueError: The model has no such adapter.
    """
    if save_embedding_layers != "auto":
        check_flags(save_embedding_layers=save_embedding_layers)
    model = unwrap_model(model)
    config = adapter_config(model, adapter_name)
    view = in_view(config, adapter_name)
    named = state_values(model, view) if state_dict is None else state_dict
    embeddings = (
        _embeddings_to_save(model, config, named)
        if save_embedding_layers == "auto"
        else bool(save_embedding_layers)
    )
    found = adapter_tensors(named.items(), config, adapter_name, embeddings)
    if named and not found:
        listed = ", ".join(f"`{name}`" for name in list(named)[:3])
        raise CheckpointError(
            f"The state dict has no tensors of adapter {adapter_name}; it holds {listed}, …"
        )
    # Adapters may be merged into these tensors of the base model.
    has_base = bool(embeddings) or config.trained_biases != "none"
    with unmerged(model if has_base and state_dict is None else None):
        on_meta = {id(tensor) for tensor in found.values() if getattr(tensor, "is_meta", False)}
        offloaded = offloaded_values(model, on_meta, view)
        found = {key: offloaded.get(id(tensor), tensor) for key, tensor in found.items()}
        values = read_values(model, found)
        if has_base:
            values = {key: value.detach() for key, value in values.items()}
    return tuner_class(config).export_state(without_padding(values, config), config)


def _embeddings_to_save(
    model: nn.Module, config: AdapterConfig, named: Mapping[str, object]
) -> bool | set[str]:
    """Return the token embeddings that "auto" adds to a checkpoint: keys, or True for all."""
    # Other writers of the format add the weight of adapted embeddings under these two names only.
    targets = getattr(config, "target_modules", None) or ()
    if any(name in targets for name in ("embed_tokens", "lm_head")):
        warn(
            "Setting `save_embedding_layers` to `True` as embedding layers found in "
            "`target_modules`."
        )
        names = map(unwrapped_name, named)
        return {name for name in names if is_embedding(name) and ".base_layer." in name}
    if was_resized(model, config):
        warn(
            "Setting `save_embedding_layers` to `True` as the embedding layer has been resized "
            "during finetuning."
        )
        return True
    return False


@contextmanager
def unmerged(model: nn.Module | None) -> Iterator[None]:
    """Context in which no adapter is merged into a model's base weights; afterwards all are merged
    again as they were.
    """
    layers: list[Any] = (
        []
        if model is None
        else [module for _, module in walk(model) if vars(module).get("merged_adapters")]
    )
    taken = []
    try:
        for layer in layers:
            with loaded_weights(layer, layer.merged_adapters):
                taken.append((layer, layer.take_off()))
        yield
    finally:
        for layer, merges in reversed(taken):
            with loaded_weights(layer, [merge.name for merge in merges]):
                layer.put_on(merges)


def get_base_model_state_dict(model: Any) -> dict[str, Tensor]:
    """Return the state dict that the base model of a `PeftModel` would have without adapters."""
    inside = {WHOLE_MODULES}.union(*map(container_names, model.peft_config.values()))
    result = {}
    with unmerged(model):
        state = model.get_base_model().state_dict()
    for name, tensor in state.items():
        parts = unwrapped_name(name).split(".")
        if inside.isdisjoint(parts):
            result[".".join(part for part in parts if part not in _INSERTED)] = tensor
    return result
