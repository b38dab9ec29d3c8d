# SPDX-License-Identifier: Apache-2.0
"""Between a model with adapters and a checkpoint: which tensors belong to an adapter, their keys,
and putting them back.

A checkpoint's keys are the parameters' names with the adapter's name left out:
`…q_proj.lokr_w1.default` in the model is `…q_proj.lokr_w1` in the file. Loading never parses keys:
it lists the adapter's tensors in the model by the key each would be saved under, checks the file
against that list, and only then writes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..base.constants import SEQ_CLS_HEAD_NAMES
from ..base.containers import walk
from ..base.errors import CheckpointError, PeftRuntimeError, PeftTypeError, warn
from ..base.registry import PEFT_TYPE_TO_TUNER_MAPPING, lookup
from ..base.tensors import ordinary_tensors
from ..base.validation import check_adapter, check_flags
from ..integrations.accelerate import (
    end_offloading,
    execution_device,
    loaded_weights,
    offloaded_values,
)
from ..integrations.distributed import (
    check_gathered,
    is_unmaterialized,
    read_values,
    shard_like,
    state_tensors,
    state_values,
    unwrap_model,
    unwrapped_name,
    write_values,
)
from .files import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, read_weights
from .hub import find_file, only_hub_options
from .rank_padding import without_filling
from .renamed_modules import renamed_state
from .values import some, warn_of_values
from .vocabulary import was_resized

ROOT = "base_model."
MODEL_ROOT = "base_model.model."
# What adapters put between a module's path and the names of its own tensors.
_INSIDE = ("base_layer", "original_module", "token_adapter")
# A module that an adapter trains whole is saved under its own path. Other writers, saving all
# biases, repeat its bias under these.
_COPIES = frozenset(["modules_to_save", "original_module"])
# Names of token embeddings and of the output head that mirrors them.
_EMBEDDINGS = (
    "embed_tokens",
    "lm_head",
    "wte",
    "word_embeddings",
    "shared",
    "embed_in",
    "embed_out",
)


class LoadResult(NamedTuple):
    """What did not fit between a checkpoint and an adapter."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def checkpoint_key(
    name: str, adapter_name: str, holders: Collection[str], shared: Collection[str] = ()
) -> str | None:
    """The key under which a tensor of the model is saved, None if it does not belong to the
    adapter.

    Args:
        name: The tensor's name in the model, without what wrappers put into it.
        adapter_name: The adapter.
        holders: Names of the containers that have an entry for each adapter.
        shared: Those of them that all layers share; wherever they are registered, they are saved at
            the root.
    """
    if f".{adapter_name}" not in name:
        return None
    parts = name.split(".")
    for i in range(len(parts) - 1):
        if parts[i + 1] == adapter_name:
            if parts[i] in shared:
                return (ROOT if name.startswith(ROOT) else "") + parts[i]
            if parts[i] in holders:
                layer = parts[:i]
                while layer[-1:] == [
                    "base_layer"
                ]:  # inside a layer of another method; alone, it would not be
                    layer.pop()
                return ".".join([*layer, parts[i], *parts[i + 2 :]])
            if parts[i] == "modules_to_save":
                return ".".join(parts[:i] + parts[i + 2 :])
    return None


def adapter_tensors(
    named: Iterable[tuple[str, Any]],
    config: Any,
    adapter_name: str,
    embeddings: bool | Container[str] = False,
) -> dict[str, Any]:
    """Of a model's named tensors those that make up an adapter, by checkpoint key; with them all
    token embeddings, or those whose keys are given.
    """
    own = holders(config)
    shared = lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type).shared_parameter_names
    tensors = {unwrapped_name(name): tensor for name, tensor in named}
    result = {}
    for name, tensor in tensors.items():
        key = checkpoint_key(name, adapter_name, own, shared)
        if key is not None:
            result[key] = tensor
    if config.trained_biases != "none":
        adapted = {
            name.rpartition(f".{holder}.")[0]
            for name in tensors
            for holder in own
            if f".{holder}." in name
        }
        inside = {*_COPIES, *own}  # biases in there are an adapter's own
        for name, tensor in tensors.items():
            layer = name.removesuffix(".base_layer.bias")
            is_trained = config.trained_biases == "all" or layer in adapted
            if name.endswith(".bias") and is_trained and inside.isdisjoint(name.split(".")):
                result.setdefault(
                    name, tensor
                )  # a copy of the module in `modules_to_save` has a bias of this key
    for name, tensor in tensors.items() if embeddings else ():
        if is_embedding(name) and (
            embeddings is True or (not isinstance(embeddings, bool) and name in embeddings)
        ):
            result.setdefault(name, tensor)  # an adapter's own copy of the module comes first
    return result


def in_view(config: Any, *adapter_names: str) -> tuple[str, ...] | None:
    """Which adapters' tensors a look at some of them has to take in, None for all: biases are
    trained in the layers of each.
    """
    return adapter_names if config.trained_biases == "none" else None


def companion_tensors(
    named: Iterable[tuple[str, Any]], config: Any, adapter_name: str
) -> dict[str, Any]:
    """What an adapter has beside its layers' own tensors, by checkpoint key: whole modules, rows of
    embeddings, trained biases.
    """
    tuner = lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type)
    own = {*tuner.tuner_layer_cls.container_names, *tuner.shared_parameter_names}
    return {
        key: tensor
        for key, tensor in adapter_tensors(named, config, adapter_name).items()
        if own.isdisjoint(key.split("."))
    }


def is_embedding(name: str) -> bool:
    """Whether a tensor is the weight of a token embedding or of the output head that mirrors it."""
    if not name.endswith(".weight"):
        return False
    parts = name.replace(".token_adapter", "").replace(".base_layer", "").split(".")
    return len(parts) > 1 and parts[-1] == "weight" and parts[-2] in _EMBEDDINGS


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """An adapter's tensors in the form and under the keys a checkpoint has.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into; where FSDP1 shards it,
            its outermost FSDP module.
        state_dict: Take the tensors from this state dict of the model (a gathered one, say) in
            place of the model's own.
        adapter_name: The adapter.
        unwrap_compiled: Accepted for compatibility; keys never have the prefixes of
            `torch.compile`.
        save_embedding_layers: True adds the token embeddings. "auto" adds those that the adapter
            adapts, and all, with a warning, if the vocabulary was resized since the base model was
            loaded.

    Returns:
        Tensors by checkpoint key: DTensors where FSDP2 shards the model; from FSDP1 whole, in
        pieces or only on the first process, as it is set to give state dicts.

    Raises:
        CheckpointError: `state_dict` holds nothing of the adapter, in a form from which it can be
            read.
        PeftRuntimeError: FSDP1 or ZeRO-3 hold the parameters elsewhere.
        PeftValueError: The model has no such adapter.
    """
    if save_embedding_layers != "auto":
        check_flags(save_embedding_layers=save_embedding_layers)
    model = unwrap_model(model)
    config = adapter_config(model, adapter_name)
    view = in_view(config, adapter_name)
    named = state_values(model, view) if state_dict is None else state_dict
    embeddings: bool | set[str] = save_embedding_layers is True
    # Other writers of the format add the weight of adapted embeddings under these two names only.
    if save_embedding_layers == "auto" and any(
        name in (config.target_modules or ()) for name in ("embed_tokens", "lm_head")
    ):
        warn(
            "Setting `save_embedding_layers` to `True` as embedding layers found in "
            "`target_modules`."
        )
        embeddings = {
            name
            for name in map(unwrapped_name, named)
            if is_embedding(name) and ".base_layer." in name
        }
    elif save_embedding_layers == "auto" and was_resized(model, config):
        warn(
            "Setting `save_embedding_layers` to `True` as the embedding layer has been resized "
            "during finetuning."
        )
        embeddings = True
    found = adapter_tensors(named.items(), config, adapter_name, embeddings)
    if named and not found:
        some = ", ".join(f"`{name}`" for name in list(named)[:3])
        raise CheckpointError(
            f"The state dict has no tensors of adapter {adapter_name}; it holds {some}, …"
        )
    has_base = (
        bool(embeddings) or config.trained_biases != "none"
    )  # tensors that adapters may be merged into
    with unmerged(model if has_base and state_dict is None else None):
        offloaded = offloaded_values(
            model,
            {id(tensor) for tensor in found.values() if getattr(tensor, "is_meta", False)},
            view,
        )
        found = {key: offloaded.get(id(tensor), tensor) for key, tensor in found.items()}
        values = read_values(model, found)
        values = (
            {key: value.detach() for key, value in values.items()} if has_base else values
        )  # as they are now
    state = without_filling(values, config)
    return lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type)._export_state(state, config)


@contextmanager
def unmerged(model: nn.Module | None) -> Iterator[None]:
    """A context in which nothing is merged into a model's base weights; they are merged again as
    they were.
    """
    layers: Any = (
        ()
        if model is None
        else [module for _, module in walk(model) if vars(module).get("merged_adapters")]
    )
    taken: list[Any] = []
    try:
        for layer in layers:
            with loaded_weights(layer, layer.merged_adapters):
                taken.append((layer, layer.take_off()))
        yield
    finally:
        for layer, merges in reversed(taken):
            with loaded_weights(layer, [merge.name for merge in merges]):
                layer.put_on(merges)


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
        peft_model_state_dict: Tensors by checkpoint key, the same on all processes: whole, or in
            pieces as from a sharded model.
        adapter_name: The adapter.
        ignore_mismatched_sizes: Leave out tensors of other shapes; they count as missing.
        low_cpu_mem_usage: Accepted for compatibility; parameters on the meta device are always
            replaced.

    Returns:
        Names of the adapter's parameters that the checkpoint lacks, and its keys that the adapter
        has no place for.

    Raises:
        CheckpointError: A tensor has another shape or kind, or a parameter would stay on the meta
            device; nothing is changed.
        PeftRuntimeError: FSDP1 or ZeRO-3 hold the parameters elsewhere; nothing is changed.
        PeftValueError: The model has no such adapter.
    """
    check_flags(ignore_mismatched_sizes=ignore_mismatched_sizes)
    if not isinstance(peft_model_state_dict, Mapping):
        given = type(peft_model_state_dict)
        raise PeftTypeError(
            f"`peft_model_state_dict` must be a dictionary of tensors, got {given}; "
            "`load_peft_weights` reads one."
        )
    model = unwrap_model(model)
    config = adapter_config(model, adapter_name)
    view = in_view(config, adapter_name)
    named = list(state_tensors(model, view).items())
    is_native = not any(
        key.startswith(ROOT) for key in adapter_tensors(named, config, adapter_name)
    )
    base = model if is_native else getattr(model, "get_base_model", lambda: model)()
    state = renamed_state(
        base,
        import_state(peft_model_state_dict, config, ROOT if is_native else ""),
        holders(config),
    ).state
    expected = adapter_tensors(named, config, adapter_name, state)
    # Biases that the checkpoint's writer trained have a place here even if this adapter trains
    # none.
    expected.update(
        {
            unwrapped_name(n): t
            for n, t in named
            if n.endswith(".bias") and unwrapped_name(n) in state.keys() - expected.keys()
        }
    )
    result = check_state(expected, state, ignore_mismatched_sizes)
    if empty := [key for key in result.missing_keys if key in expected and expected[key].is_meta]:
        raise CheckpointError(
            "Parts of the adapter would stay on the meta device; nothing was loaded. Missing: "
            f"{some(empty)}."
        )
    tuner = lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type)
    tuner.check_loadable(model, adapter_name)
    values = {k: v for k, v in state.items() if k in expected and k not in result.missing_keys}
    _check_nothing_is_merged(model, [expected[key] for key in values])
    warn_of_values(
        f"The checkpoint for adapter {adapter_name}", values, expected, tuner.masked_names
    )
    write_state(model, expected, values, view)
    tuner.note_loaded(model, adapter_name)
    names = adapter_tensors(((name, name) for name, _ in named), config, adapter_name, state)
    return LoadResult([names.get(key, key) for key in result.missing_keys], result.unexpected_keys)


def get_base_model_state_dict(model: Any) -> dict[str, Tensor]:
    """The state dict the base model would have without adapters."""
    inside = {"modules_to_save"}.union(*(holders(config) for config in model.peft_config.values()))
    result = {}
    with unmerged(model):
        state = model.get_base_model().state_dict()
    for name, tensor in state.items():
        parts = unwrapped_name(name).split(".")
        if inside.isdisjoint(parts):
            result[".".join(part for part in parts if part not in _INSIDE)] = tensor
    return result


def set_base_model_state_dict(
    model: Any, state_dict: Mapping[str, Tensor], strict: bool = True
) -> LoadResult:
    """Load weights of the base model as it is without adapters into one that has them.

    Args:
        model: A `PeftModel`.
        state_dict: Tensors by the base model's own names.
        strict: Whether names that do not fit are an error.

    Raises:
        CheckpointError: A shape differs, or a name and `strict`; nothing is changed.
        PeftRuntimeError: Adapters are merged into the base model's weights.
    """
    check_flags(strict=strict)
    _check_nothing_is_merged(model)
    expected = get_base_model_state_dict(model)
    result = check_state(expected, state_dict)
    if strict:
        check_complete(result, "state_dict")
    write_state(
        None, expected, {key: tensor for key, tensor in state_dict.items() if key in expected}
    )
    return result


def _check_nothing_is_merged(model: nn.Module, targets: Collection[Tensor] | None = None) -> None:
    """Refuse to write weights that adapters are merged into: any, or those among some tensors."""
    ids = None if targets is None else {id(target) for target in targets}
    for path, module in walk(model):
        if names := vars(module).get("merged_adapters"):
            layer: Any = module
            if ids is None or not ids.isdisjoint(map(id, layer.get_base_layer().parameters())):
                raise PeftRuntimeError(
                    f"`{path}`: {', '.join(names)} is merged into the weight that is to be "
                    "written; call `unmerge_adapter` before."
                )


def import_state(state: Mapping[str, Tensor], config: Any, remove: str = "") -> dict[str, Tensor]:
    """A checkpoint's tensors in the form the model has them.

    Args:
        state: Tensors by checkpoint key.
        config: The adapter's config.
        remove: `base_model.` for a model that is not inside a `PeftModel`, whose names lack that
            prefix.
    """
    tuner = lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type)
    state = tuner._import_state(dict(state), config)
    result = {}
    for key, tensor in state.items():
        if key.endswith(".bias") and not _COPIES.isdisjoint(key.split(".")):
            continue
        end = key.removeprefix(MODEL_ROOT)
        if end in tuner.shared_parameter_names:
            key = ROOT + end  # some writers put the prefix of modules before it
        if remove:
            key = key.removeprefix(MODEL_ROOT).removeprefix(ROOT)
        result[key] = tensor
    return result


def check_state(
    expected: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    ignore_mismatched_sizes: bool | None = None,
) -> LoadResult:
    """Compare a checkpoint with the tensors it is for.

    Args:
        expected: The tensors, by checkpoint key.
        state: The checkpoint.
        ignore_mismatched_sizes: Warn of other shapes and count them as missing; None where the
            caller does not offer it.

    Raises:
        CheckpointError: A tensor's shape or kind differs.
        PeftRuntimeError: ZeRO-3 has emptied one.
    """
    check_gathered(expected)
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    mismatched = []
    for key, tensor in expected.items():
        if key not in state:
            continue
        if state[key].shape != tensor.shape:
            shapes = f"found shape {list(state[key].shape)} in the checkpoint and {list(tensor.shape)} in the model"
            mismatched.append(f"size mismatch for {key}: {shapes}")
        elif state[key].is_floating_point() != tensor.is_floating_point():
            mismatched.append(
                f"dtype mismatch for {key}: found {state[key].dtype}, the model has {tensor.dtype}"
            )
    if mismatched and not ignore_mismatched_sizes:
        message = (
            "The checkpoint does not fit the model; nothing was loaded. "
            + "; ".join(mismatched)
            + "."
        )
        if number := _labels_in(expected, state):
            message += f" The head in it has {number} labels: load the base model with `num_labels={number}`"
            message += " (of a stacked head, `num_labels=labels.total`)."
        if ignore_mismatched_sizes is not None:
            message += " `ignore_mismatched_sizes=True` leaves these tensors as they are, and loads the others."
        raise CheckpointError(message)
    if mismatched:
        warn(
            "Not loaded, because you passed `ignore_mismatched_sizes=True`: "
            + "; ".join(mismatched)
        )
        missing += [message.split(": ")[0].rpartition(" ")[2] for message in mismatched]
    return LoadResult(missing, unexpected)


def _labels_in(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> int | None:
    """Return how many labels a checkpoint's head has, if that is another number than the model's
    has.
    """
    for key in expected.keys() & state.keys():
        own, given, path = expected[key].shape, state[key].shape, key.split(".")[:-1]
        if (
            len(given)
            and path[-1:]
            and path[-1] in SEQ_CLS_HEAD_NAMES
            and own[:1] != given[:1]
            and own[1:] == given[1:]
        ):
            return given[0]
    return None


def check_complete(result: LoadResult, source: str, remedy: str = "") -> None:
    """Insist that a checkpoint had every tensor of its adapter and no other.

    Raises:
        CheckpointError: It had not; keys are named.
    """
    if not result.missing_keys and not result.unexpected_keys:
        return
    parts = [f"'{source}' does not hold this adapter's weights; nothing was loaded."]
    if result.missing_keys:
        parts.append(f"Missing keys: {some(result.missing_keys)}.")
    if result.unexpected_keys:
        parts.append(f"Unexpected keys: {some(result.unexpected_keys)}.")
    raise CheckpointError(" ".join([*parts, *([remedy] if remedy else [])]))


@ordinary_tensors()
def write_state(
    model: nn.Module | None,
    expected: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    adapters: Collection[str] | None = None,
) -> None:
    """Copy checked tensors into place; parameters on the meta device become real, on the device of
    the model's other parameters.

    Args:
        model: The model, None for an adapter that is not in it yet.
        expected: The tensors in place, by checkpoint key.
        state: Their values.
        adapters: The adapters whose tensors they may be; None for any.
    """
    on_meta = {
        id(expected[key]): tensor
        for key, tensor in state.items()
        if is_unmaterialized(expected[key])
    }
    write_values(
        model,
        [
            (expected[key], tensor)
            for key, tensor in state.items()
            if id(expected[key]) not in on_meta
        ],
    )
    if not on_meta or model is None:
        return
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    for _, module in walk(model, adapters):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in on_meta:
                place = execution_device(module) or device
                end_offloading(module)
                value = shard_like(
                    parameter, on_meta[id(parameter)].to(place, parameter.dtype, copy=True)
                )
                module._parameters[name] = nn.Parameter(
                    value, requires_grad=parameter.requires_grad
                )


def load_peft_weights(
    model_id: str | os.PathLike,
    device: str | torch.device | None = None,
    key_mapping: dict[str, str] | None = None,
    **hub_options: Any,
) -> dict[str, Tensor]:
    """The tensors of a saved adapter.

    Args:
        model_id: A local folder, or an id on the Hub.
        device: Where to put them, by default the CPU.
        key_mapping: Renaming of module paths in keys: regular expression → replacement; the first
            that applies counts.
        **hub_options: `subfolder`, `revision`, `token`, `cache_dir`, …

    Raises:
        CheckpointNotFoundError: There is no weights file.
        CheckpointError: It can't be read.
    """
    options = only_hub_options(hub_options, "load_peft_weights")
    state = read_weights(
        find_file(model_id, (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME), options), device or "cpu"
    )
    return {_renamed(key, key_mapping or {}): tensor for key, tensor in state.items()}


def _renamed(key: str, key_mapping: Mapping[str, str]) -> str:
    """A key after the first renaming that applies to the module path in it."""
    prefix = MODEL_ROOT if key.startswith(MODEL_ROOT) else ""
    path = key.removeprefix(prefix)
    for pattern, replacement in key_mapping.items():
        renamed, count = re.subn(pattern, replacement, path)
        if count:
            return prefix + renamed
    return key


def holders(config: Any) -> set[str]:
    """Names of the containers that have an entry for each adapter of a config's method."""
    tuner = lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type)
    return {
        *tuner.tuner_layer_cls.container_names,
        *tuner.shared_parameter_names,
        "trainable_tokens_delta",
    }


def adapter_config(model: Any, adapter_name: str) -> Any:
    """The config of an adapter in a model.

    Raises:
        PeftTypeError: The name is no string.
        PeftValueError: There is no such adapter.
    """
    configs: Any = getattr(model, "peft_config", None)
    check_adapter(adapter_name, configs if isinstance(configs, dict) else ())
    return configs[adapter_name]
