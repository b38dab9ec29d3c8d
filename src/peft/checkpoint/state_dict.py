# SPDX-License-Identifier: Apache-2.0
"""Tensors from a model to a checkpoint and back: those of an adapter, or of the base model."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..base.calls.running import changing, holds
from ..base.constants import MODEL_ROOT, ROOT
from ..base.containers import walk
from ..base.errors import CheckpointError, PeftTypeError, warn
from ..base.suggestions import listed
from ..base.tensors import ordinary_tensors
from ..base.validation import check_flags
from ..integrations.accelerate import (
    end_offloading,
    execution_device,
    loaded_weights,
    offloaded_values,
)
from ..integrations.distributed import (
    is_unmaterialized,
    read_values,
    shard_like,
    state_tensors,
    state_values,
    unwrap_model,
    unwrapped_name,
    write_values,
)
from .checks import (
    LoadResult,
    check_adapter_unmerged,
    check_complete,
    check_state,
    check_unmerged,
    warn_of_values,
)
from .keys import (
    WHOLE_MODULES,
    adapter_config,
    adapter_tensors,
    checkpoint_key,
    container_names,
    in_view,
    is_embedding,
    tied_embeddings,
)
from .protocols import AdapterConfig, tuner_class
from .rank_padding import Unpadded
from .renamed_modules import plain_path, renamed_state
from .vocabulary import was_resized

# Other writers that save all biases or embeddings repeat those of a fully trained module under
# these names.
_COPIES = frozenset([WHOLE_MODULES, "original_module"])


@holds
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
    embeddings: bool | set[str] = bool(save_embedding_layers)
    if save_embedding_layers == "auto":
        embeddings = _embeddings_to_save(model, config, named)
    found = adapter_tensors(named.items(), config, adapter_name, embeddings)
    if named and not found:
        shown = ", ".join(f"`{name}`" for name in list(named)[:3])
        raise CheckpointError(
            f"The state dict has no tensors of adapter {adapter_name}; it holds {shown}, …"
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
    state = _without_padding(model, values, config, adapter_name)
    return tuner_class(config).checkpoint_format.export_state(state, config)


def _without_padding(
    model: nn.Module, state: dict[str, Tensor], config: AdapterConfig, adapter_name: str
) -> dict[str, Tensor]:
    """Return an adapter's tensors without rank padding."""
    sizes: dict[str | None, Unpadded] = {}
    containers = container_names(config)
    for path, module in walk(model):
        for container, size in vars(module).get("unpadded_sizes", {}).get(adapter_name, {}).items():
            name = unwrapped_name(f"{path}.{container}.{adapter_name}")
            sizes[checkpoint_key(name, adapter_name, containers)] = size
    result = {}
    for key, tensor in state.items() if sizes else ():
        size = sizes.get(key) or sizes.get(key.rpartition(".")[0])
        if size is None or size.size:
            result[key] = tensor if size is None else size.cut(tensor)
    return result if sizes else state


def _embeddings_to_save(
    model: nn.Module, config: AdapterConfig, named: Mapping[str, object]
) -> bool | set[str]:
    """Return the token embeddings that "auto" adds to a checkpoint: keys, or True for all."""
    # Other writers of the format add the weight of adapted embeddings under these two names only.
    targets = getattr(config, "target_modules", None) or ()
    names = map(unwrapped_name, named)
    if any(name in targets for name in ("embed_tokens", "lm_head")) and (
        adapted := {name for name in names if is_embedding(name) and ".base_layer." in name}
    ):
        warn(
            "Setting `save_embedding_layers` to `True` as embedding layers found in "
            "`target_modules`."
        )
        return adapted
    if was_resized(model, config):
        warn(
            "Setting `save_embedding_layers` to `True` as the embedding layer has been resized "
            "during finetuning."
        )
        return True
    return False


@contextmanager
def unmerged(model: nn.Module | None) -> Iterator[None]:
    """Context in which no adapter is merged; afterwards all are merged as before. No call runs
    meanwhile, unless there is nothing to do.
    """
    every = () if model is None else walk(model)
    layers: list[Any] = [module for _, module in every if vars(module).get("merged_adapters")]
    taken = []
    with changing(model, None if layers else ()):
        try:
            for layer in layers:
                with loaded_weights(layer, layer.merged_adapters):
                    taken.append((layer, layer.take_off()))
            yield
        finally:
            for layer, merges in reversed(taken):
                with loaded_weights(layer, [merge.name for merge in merges]):
                    layer.put_on(merges)


@holds
def get_base_model_state_dict(model: Any) -> dict[str, Tensor]:
    """Return the state dict that the base model of a `PeftModel` would have without adapters.

    Raises:
        PeftRuntimeError: A loaded state dict had adapters merged and lacks the original weights.
    """
    inside = {WHOLE_MODULES}.union(*map(container_names, model.peft_config.values()))
    with unmerged(model):
        state = model.get_base_model().state_dict()
    return {
        plain_path(name): tensor
        for name, tensor in state.items()
        if inside.isdisjoint(unwrapped_name(name).split("."))
    }


@holds
def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Write a checkpoint's tensors into an adapter of a model.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into; where FSDP1 shards it,
            its outermost FSDP module.
        peft_model_state_dict: Tensors by checkpoint key, the same on all processes: full, or
            sharded as from a sharded model.
        adapter_name: The adapter.
        ignore_mismatched_sizes: Leave out tensors of other shapes; they count as missing.
        low_cpu_mem_usage: Accepted for compatibility; parameters on the meta device are always
            replaced.

    Returns:
        Names of the adapter's parameters that the checkpoint lacks, and keys of the checkpoint that
        the adapter lacks.

    Raises:
        CheckpointError: Shape or kind of a tensor differ, or a parameter would stay on the meta
            device; nothing is changed.
        PeftRuntimeError: The adapter is merged, or FSDP1 or ZeRO-3 hold the parameters elsewhere;
            nothing is changed.
        PeftTypeError: `peft_model_state_dict` is not a dictionary of tensors.
        PeftValueError: The model has no such adapter.
    """
    check_flags(ignore_mismatched_sizes=ignore_mismatched_sizes)
    _check_tensors(
        peft_model_state_dict, "peft_model_state_dict", "; `load_peft_weights` reads one"
    )
    model = unwrap_model(model)
    config = adapter_config(model, adapter_name)
    view = in_view(config, adapter_name)
    named = list(state_tensors(model, view).items())
    present = adapter_tensors(named, config, adapter_name)
    is_native = not any(key.startswith(ROOT) for key in present)
    base = model if is_native else getattr(model, "get_base_model", lambda: model)()
    imported = import_state(peft_model_state_dict, config, ROOT if is_native else "", present)
    state = renamed_state(base, imported, container_names(config)).state
    if not state.keys() <= present.keys():
        named += tied_embeddings(model, [tensor for _, tensor in named])
    expected = adapter_tensors(named, config, adapter_name, state)
    # A checkpoint may hold trained biases for an adapter that trains none.
    for name, tensor in named:
        if name.endswith(".bias") and unwrapped_name(name) in state:
            expected.setdefault(unwrapped_name(name), tensor)
    result = check_state(expected, state, ignore_mismatched_sizes)
    if empty := [key for key in result.missing_keys if key in expected and expected[key].is_meta]:
        raise CheckpointError(
            "Parts of the adapter would stay on the meta device; nothing was loaded. Missing: "
            f"{listed(empty)}."
        )
    tuner = tuner_class(config)
    check_adapter_unmerged(model, adapter_name)
    values = {k: v for k, v in state.items() if k in expected and k not in result.missing_keys}
    check_unmerged(model, [expected[key] for key in values])
    source = f"The checkpoint for adapter {adapter_name}"
    warn_of_values(source, values, expected, tuner.checkpoint_format.masked)
    with changing(model, [adapter_name]):
        write_state(model, expected, values, view)
        tuner.note_loaded(model, adapter_name)
    names = adapter_tensors(((name, name) for name, _ in named), config, adapter_name, state)
    return LoadResult([names.get(key, key) for key in result.missing_keys], result.unexpected_keys)


@holds
def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True
) -> LoadResult:
    """Load weights of the base model without adapters into one that has adapters.

    Args:
        model: A `PeftModel`.
        state_dict: Tensors by the base model's own names.
        strict: Raise an error if names are missing or unexpected.

    Returns:
        The names that are missing, and those that are unexpected.

    Raises:
        CheckpointError: A shape differs, or a name if `strict`; nothing is changed.
        PeftRuntimeError: Adapters are merged into the base model's weights.
        PeftTypeError: `state_dict` is not a dictionary of tensors.
    """
    check_flags(strict=strict)
    _check_tensors(state_dict, "state_dict")
    check_unmerged(model)
    expected = get_base_model_state_dict(model)
    result = check_state(expected, state_dict)
    if strict:
        check_complete(result, "state_dict")
    values = {key: tensor for key, tensor in state_dict.items() if key in expected}
    with changing(model, None):
        write_state(None, expected, values)
    return result


def _check_tensors(state: object, argument: str, remedy: str = "") -> None:
    """Raise `PeftTypeError` if an argument is not a dictionary of tensors."""
    if not isinstance(state, Mapping):
        raise PeftTypeError(
            f"`{argument}` must be a dictionary of tensors, got {type(state)}{remedy}."
        )
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise PeftTypeError(f"`{key}` must be a tensor, not {value!r}; nothing was changed.")


def import_state(
    state: Mapping[str, Tensor],
    config: AdapterConfig,
    remove: str = "",
    names: Collection[str] = (),
) -> dict[str, Tensor]:
    """Return a checkpoint's tensors in the storage format of the model.

    Args:
        remove: `base_model.` for a model without `PeftModel`, whose names lack that prefix.
        names: Keys of the adapter's tensors in the model, for methods with several storage formats
            there.
    """
    tuner = tuner_class(config)
    result = {}
    converted = tuner.checkpoint_format.import_state(dict(state), config, names)
    for key, tensor in converted.items():
        is_repeated = _repeats(key, converted)
        end = key.removeprefix(MODEL_ROOT)
        if end in tuner.shared_parameter_names:
            key = ROOT + end  # some writers use the prefix of modules
        if remove:
            key = key.removeprefix(MODEL_ROOT).removeprefix(ROOT)
        if key in names or not is_repeated:  # the model may have a module of such a name
            result[key] = tensor
    return result


def _repeats(key: str, state: Container[str]) -> bool:
    """Return True for a tensor of a fully trained module that the checkpoint has under another
    key, or of the module that it stands for.
    """
    parts = key.split(".")
    if _COPIES.isdisjoint(parts):
        return False
    return parts[-1] == "bias" or ".".join(part for part in parts if part not in _COPIES) in state


@ordinary_tensors()
def write_state(
    model: nn.Module | None,
    expected: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    adapters: Collection[str] | None = None,
) -> None:
    """Copy checked values into tensors.

    Parameters on the meta device are replaced by parameters on the device where their module runs,
    or on that of the model's other parameters.
    """
    on_meta, pairs = {}, []
    for key, value in state.items():
        if is_unmaterialized(expected[key]):
            on_meta[id(expected[key])] = value
        else:
            pairs.append((expected[key], value))
    write_values(model, pairs)
    if not on_meta or model is None:
        return
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    for _, module in walk(model, adapters):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in on_meta:
                place = execution_device(module) or device
                end_offloading(module)
                value = on_meta[id(parameter)].to(place, parameter.dtype, copy=True)
                module._parameters[name] = nn.Parameter(
                    shard_like(parameter, value), requires_grad=parameter.requires_grad
                )
