# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint into a model: an adapter's tensors, or those of the base model."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ..base.containers import walk
from ..base.errors import CheckpointError, PeftTypeError
from ..base.tensors import ordinary_tensors
from ..base.validation import check_flags
from ..integrations.accelerate import end_offloading, execution_device
from ..integrations.distributed import (
    is_unmaterialized,
    shard_like,
    state_tensors,
    unwrap_model,
    unwrapped_name,
    write_values,
)
from .checks import LoadResult, check_complete, check_state, check_unmerged
from .keys import (
    MODEL_ROOT,
    ROOT,
    WHOLE_MODULES,
    adapter_config,
    adapter_tensors,
    container_names,
    in_view,
)
from .protocols import AdapterConfig, tuner_class
from .reading import get_base_model_state_dict
from .renamed_modules import renamed_state
from .values import some, warn_of_values

# Other writers that save all biases repeat those of a module trained whole under these names.
_COPIES = frozenset([WHOLE_MODULES, "original_module"])


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
        PeftRuntimeError: FSDP1 or ZeRO-3 hold the parameters elsewhere; nothing is changed.
        PeftTypeError: `peft_model_state_dict` is not a dictionary.
        PeftValueError: The model has no such adapter.
    """
    check_flags(ignore_mismatched_sizes=ignore_mismatched_sizes)
    if not isinstance(peft_model_state_dict, Mapping):
        raise PeftTypeError(
            "`peft_model_state_dict` must be a dictionary of tensors, got "
            f"{type(peft_model_state_dict)}; `load_peft_weights` reads one."
        )
    model = unwrap_model(model)
    config = adapter_config(model, adapter_name)
    view = in_view(config, adapter_name)
    named = list(state_tensors(model, view).items())
    is_native = not any(
        key.startswith(ROOT) for key in adapter_tensors(named, config, adapter_name)
    )
    base = model if is_native else getattr(model, "get_base_model", lambda: model)()
    imported = import_state(peft_model_state_dict, config, ROOT if is_native else "")
    state = renamed_state(base, imported, container_names(config)).state
    expected = adapter_tensors(named, config, adapter_name, state)
    # A checkpoint may hold trained biases for an adapter that trains none.
    for name, tensor in named:
        if name.endswith(".bias") and unwrapped_name(name) in state:
            expected.setdefault(unwrapped_name(name), tensor)
    result = check_state(expected, state, ignore_mismatched_sizes)
    if empty := [key for key in result.missing_keys if key in expected and expected[key].is_meta]:
        raise CheckpointError(
            "Parts of the adapter would stay on the meta device; nothing was loaded. Missing: "
            f"{some(empty)}."
        )
    tuner = tuner_class(config)
    tuner.check_loadable(model, adapter_name)
    values = {k: v for k, v in state.items() if k in expected and k not in result.missing_keys}
    check_unmerged(model, [expected[key] for key in values])
    source = f"The checkpoint for adapter {adapter_name}"
    warn_of_values(source, values, expected, tuner.masked_names)
    write_state(model, expected, values, view)
    tuner.note_loaded(model, adapter_name)
    names = adapter_tensors(((name, name) for name, _ in named), config, adapter_name, state)
    return LoadResult([names.get(key, key) for key in result.missing_keys], result.unexpected_keys)


def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True
) -> LoadResult:
    """Load weights of the base model without adapters into one that has adapters.

    Args:
        model: A `PeftModel`.
        state_dict: Tensors by the base model's own names.
        strict: Raise an error if names are missing or unexpected.

    Raises:
        CheckpointError: A shape differs, or a name if `strict`; nothing is changed.
        PeftRuntimeError: Adapters are merged into the base model's weights.
    """
    check_flags(strict=strict)
    check_unmerged(model)
    expected = get_base_model_state_dict(model)
    result = check_state(expected, state_dict)
    if strict:
        check_complete(result, "state_dict")
    values = {key: tensor for key, tensor in state_dict.items() if key in expected}
    write_state(None, expected, values)
    return result


def import_state(
    state: Mapping[str, Tensor], config: AdapterConfig, remove: str = ""
) -> dict[str, Tensor]:
    """Return a checkpoint's tensors in the storage format of the model.

    Args:
        state: Tensors by checkpoint key.
        config: The adapter's config.
        remove: `base_model.` for a model without `PeftModel`, whose names lack that prefix.
    """
    tuner = tuner_class(config)
    result = {}
    for key, tensor in tuner.import_state(dict(state), config).items():
        if key.endswith(".bias") and not _COPIES.isdisjoint(key.split(".")):
            continue
        end = key.removeprefix(MODEL_ROOT)
        if end in tuner.shared_parameter_names:
            key = ROOT + end  # some writers use the prefix of modules
        if remove:
            key = key.removeprefix(MODEL_ROOT).removeprefix(ROOT)
        result[key] = tensor
    return result


@ordinary_tensors()
def write_state(
    model: nn.Module | None,
    expected: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    adapters: Collection[str] | None = None,
) -> None:
    """Copy checked values into tensors. Parameters on the meta device are replaced by parameters on
    the device where their module runs, or on that of the model's other parameters.

    Args:
        model: The model, None for an adapter that is not in it yet.
        expected: The tensors to write to, by checkpoint key.
        state: Their values.
        adapters: Adapters that the tensors can belong to; None for all.
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
