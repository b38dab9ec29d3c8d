# SPDX-License-Identifier: Apache-2.0
"""The methods of a `PeftModel` that load saved adapters."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..base.calls.running import changing
from ..base.constants import CONFIG_NAME
from ..base.errors import CheckpointError, PeftTypeError, PeftValueError
from ..base.modules import check_model
from ..base.patterns import format_patterns
from ..base.validation import check_adapter, check_flags
from ..checkpoint.checks import LoadResult
from ..checkpoint.hub import (
    HubOptions,
    load_peft_weights,
    local_folder,
    of_one_save,
    only_hub_options,
    with_mapped_keys,
)
from ..checkpoint.keys import adapter_tensors, in_view, tied_embeddings
from ..checkpoint.paths import check_path
from ..checkpoint.state_dict import import_state, set_peft_model_state_dict
from ..config import PeftConfig, TargetedConfig
from ..integrations.distributed import state_tensors
from .config_owners import has_owner
from .filling import CheckpointFill
from .injection import Build, Construction
from .renamed_targets import present_names


def from_pretrained(
    cls: Any,
    model: nn.Module,
    model_id: str | os.PathLike,
    adapter_name: str = "default",
    is_trainable: bool = False,
    config: PeftConfig | None = None,
    autocast_adapter_dtype: bool = True,
    ephemeral_gpu_offload: bool = False,
    low_cpu_mem_usage: bool = False,
    key_mapping: dict[str, str] | None = None,
    ignore_mismatched_sizes: bool = False,
    strict: bool = True,
    **kwargs: object,
) -> Any:
    """Put a saved adapter into a base model.

    Names, shapes and kinds of all tensors are checked first; after an error the model is
    exactly as it was.

    Args:
        model: The base model.
        model_id: A local folder, or an id on the Hub.
        adapter_name: Name for the adapter.
        is_trainable: False freezes it and puts the model into eval mode.
        config: Use this config in place of the saved one. The object becomes the adapter's config
            and changes with it (`inference_mode`, …); if an adapter has it already, a copy does.
        autocast_adapter_dtype: Keep it in float32 where the base has 16 bits.
        ephemeral_gpu_offload: Accepted, without effect.
        low_cpu_mem_usage: Accepted; loading never initializes parameters that the checkpoint
            fills.
        key_mapping: Renaming of module paths in the checkpoint's keys: regular expression →
            replacement. By default the base model's own, for checkpoints of its earlier
            versions. Names of modules that the model does not have, in keys and config, are
            then changed by transformers' renaming rules.
        ignore_mismatched_sizes: Leave tensors that have another shape in the checkpoint (a head
            with other classes, say) at their initial values, with a warning.
        strict: False loads the keys that fit, and names in a warning those that have no place
            in the adapter and those that the file lacks. Keys may then contain the adapter's
            name. Another shape is still an error, and so is a file without a key that fits.
        **kwargs: Options for the Hub: `subfolder`, `revision`, `token`, `cache_dir`, …

    Raises:
        CheckpointNotFoundError: There is no such adapter.
        CheckpointError: A file is damaged or does not fit.
        PeftTypeError: The model is no module, the place no path, or a switch neither True nor
            False.
        PeftValueError: The config does not fit the model.
    """
    check_flags(
        ephemeral_gpu_offload=ephemeral_gpu_offload,
        is_trainable=is_trainable,
        autocast_adapter_dtype=autocast_adapter_dtype,
        strict=strict,
        ignore_mismatched_sizes=ignore_mismatched_sizes,
    )
    _check_arguments(model, model_id)
    hub = only_hub_options(kwargs, "from_pretrained")
    given = config
    config, state = read_checkpoint(model, model_id, config, hub, key_mapping)
    write = CheckpointFill(model, state, str(model_id), ignore_mismatched_sizes, strict)
    config.inference_mode = not is_trainable

    def fill(build: Build[TargetedConfig]) -> None:
        write(build)
        if given is not None and not has_owner(given):
            # Nothing fails from here on. Callers expect the object that they passed.
            vars(given).update(vars(build.config))
            build.config = cast(TargetedConfig, given)

    peft_model = cls.class_for(config.task_type)(
        model,
        config,
        adapter_name,
        autocast_adapter_dtype,
        initialize=write.is_partial,
        fill=fill,
    )
    peft_model.base_model.method_of(config).note_loaded(model, adapter_name)
    return peft_model if is_trainable else peft_model.eval()


def load_adapter(
    self: Any,
    model_id: str | os.PathLike,
    adapter_name: str,
    is_trainable: bool = False,
    torch_device: str | torch.device | None = None,
    autocast_adapter_dtype: bool = True,
    ephemeral_gpu_offload: bool = False,
    low_cpu_mem_usage: bool = False,
    key_mapping: dict[str, str] | None = None,
    ignore_mismatched_sizes: bool = False,
    strict: bool = True,
    **kwargs: object,
) -> LoadResult:
    """Load a saved adapter under a new name, or load new values into an adapter of this model.

    Args:
        model_id: A local folder, or an id on the Hub.
        adapter_name: The name; if the model has such an adapter, its values are replaced (by
            those in the sub-folder of its name, if `save_pretrained` made one), and the names
            of its tasks by those of the file.
        is_trainable: True leaves a new adapter trainable.
        torch_device: Device to read the file to.
        autocast_adapter_dtype, ephemeral_gpu_offload, low_cpu_mem_usage: As for
            `from_pretrained`.
        key_mapping, ignore_mismatched_sizes, strict, **kwargs: As for `from_pretrained`.

    Returns:
        Names of the adapter's parameters that were not loaded, and keys of the file that have
        no place in it; none, unless `ignore_mismatched_sizes` or `strict=False` allows them.

    Raises:
        PeftRuntimeError: The adapter is merged.
        As for `from_pretrained`; model and adapters are left exactly as they were.
    """
    check_flags(
        ephemeral_gpu_offload=ephemeral_gpu_offload,
        is_trainable=is_trainable,
        autocast_adapter_dtype=autocast_adapter_dtype,
        strict=strict,
        ignore_mismatched_sizes=ignore_mismatched_sizes,
    )
    check_adapter(adapter_name)
    hub = only_hub_options(kwargs, "load_adapter")
    if adapter_name in self.peft_config:
        hub = _own_subfolder(model_id, adapter_name, hub)
    base = self.get_base_model()
    config, state = read_checkpoint(base, model_id, None, hub, key_mapping, torch_device)
    fill = CheckpointFill(base, state, str(model_id), ignore_mismatched_sizes, strict)
    with changing(self, [adapter_name]):
        # Another thread may have added or deleted it while the file was read.
        known = self.peft_config.get(adapter_name)
        if known is None:
            add_checkpoint(self, adapter_name, config, fill, is_trainable, autocast_adapter_dtype)
            return fill.result
        method = self.base_model.method_of(known)
        _check_same_function(adapter_name, method.config_to_save(adapter_name), config)
        start = method.saved_start(config)
        result = _load_into(self, adapter_name, known, fill)
        method.adopt_start(adapter_name, start)
        for name in known.labels:
            setattr(known, name, getattr(config, name))
        return result


def add_checkpoint(
    model: Any,
    adapter_name: str,
    config: PeftConfig,
    fill: CheckpointFill,
    is_trainable: bool = False,
    autocast_adapter_dtype: bool = True,
) -> None:
    """Put an adapter into a `PeftModel` under a new name, with the tensors of a checkpoint.

    Args:
        model: The model.
        adapter_name: The name.
        config: The adapter's config, under the present names of the model's modules.
        fill: Writes the tensors, which have these names too.
        is_trainable, autocast_adapter_dtype: As for `load_adapter`.
    """
    config.inference_mode = not is_trainable
    construction = Construction(autocast_adapter_dtype, initialize=fill.is_partial)
    with changing(model, [adapter_name]):
        model.add_filled_adapter(adapter_name, config, fill, construction)
        if is_trainable:
            model.base_model.set_requires_grad(adapter_name, True)
        model.base_model.method_of(config).note_loaded(model, adapter_name)


def _check_arguments(model: object, model_id: object) -> None:
    """Check that a model and a path were given, in this order."""
    if isinstance(model_id, nn.Module) and not isinstance(model, nn.Module):
        raise PeftTypeError(
            "The model comes first, then the adapter's folder: `from_pretrained(model, folder)`."
        )
    check_model(model)
    check_path(model_id)


def read_checkpoint(
    model: nn.Module,
    model_id: str | os.PathLike[str],
    config: PeftConfig | None,
    hub: HubOptions,
    key_mapping: dict[str, str] | None = None,
    device: str | torch.device | None = None,
) -> tuple[TargetedConfig, dict[str, Tensor]]:
    """Read a config, unless given, and tensors, under the present names of modules."""
    if config is None:
        config, state = of_one_save(
            model_id,
            hub.get("subfolder"),
            lambda: (
                PeftConfig.from_pretrained(model_id, **hub),
                load_peft_weights(model_id, device=device, **hub),
            ),
        )
    elif not isinstance(config, PeftConfig):
        raise PeftValueError(
            f"The input config must be a PeftConfig, got {type(config)}; "
            "`PeftConfig.from_pretrained` reads one."
        )
    else:
        config = config.for_adapter()
        state = load_peft_weights(model_id, device=device, **hub)
    check_sizes(config, sum(tensor.nbytes for tensor in state.values()), model_id)
    return named_as_now(model, config.as_loaded(), state, key_mapping)


def check_sizes(config: PeftConfig, nbytes: int, source: object) -> None:
    """Raise for a size in a config that weights of so many bytes can't hold, before memory is taken
    for it.
    """
    most = 8 * nbytes  # a value has a bit at least
    for name in config.sizes:
        value = getattr(config, name)
        entries = {name: value}
        if isinstance(value, dict):
            entries = {f"{name}[{key!r}]": size for key, size in value.items()}
        for field_name, size in entries.items():
            if isinstance(size, int) and size > most:
                raise CheckpointError(
                    f"'{source}' does not fit its config: `{field_name}`={size}, and the weights "
                    f"have {most // 8} bytes."
                )


def named_as_now(
    model: nn.Module,
    config: PeftConfig,
    state: Mapping[str, Tensor],
    key_mapping: Mapping[str, str] | None = None,
) -> tuple[TargetedConfig, dict[str, Tensor]]:
    """Return a file's config and tensors under the present names of a base model's modules."""
    if not key_mapping:
        # transformers' renaming of the modules between its versions.
        key_mapping = dict(getattr(model, "_checkpoint_conversion_mapping", None) or {})
    state = with_mapped_keys(state, key_mapping)
    return present_names(model, cast(TargetedConfig, config), state)


def _own_subfolder(
    model_id: str | os.PathLike[str], adapter_name: str, hub_options: HubOptions
) -> HubOptions:
    """Return Hub options with the sub-folder that `save_pretrained` made for an adapter, if any."""
    folder = local_folder(model_id, adapter_name)
    if (
        folder is None
        or adapter_name == "default"
        or "subfolder" in hub_options
        or not (folder / CONFIG_NAME).is_file()
    ):
        return hub_options
    return {**hub_options, "subfolder": adapter_name}


def _check_same_function(adapter_name: str, known: PeftConfig, saved: PeftConfig) -> None:
    """Raise, naming all fields, if a checkpoint's tensors would compute otherwise here."""
    if saved.peft_type != known.peft_type:
        raise PeftValueError(
            f"Cannot combine adapters with different peft types. Found {known.peft_type} and "
            f"{saved.peft_type}: the model has an adapter {adapter_name!r} already; load this one "
            "under another name."
        )
    names = [
        item.name
        for item in fields(known)
        if any(config.affects_output(item.name) for config in (known, saved))
    ]
    pairs = {n: (getattr(saved, n), getattr(known, n)) for n in names}
    pairs |= {
        n: (format_patterns(pair[0]), format_patterns(pair[1]))
        for n, pair in pairs.items()
        if n in known.patterns
    }
    differing = [
        f"`{n}`={theirs!r}, the adapter has {own!r}"
        for n, (theirs, own) in pairs.items()
        if theirs != own
    ]
    if differing:
        raise PeftValueError(
            f"The checkpoint has {'; '.join(differing)}; load it under a new name."
        )


def _load_into(
    model: nn.Module, adapter_name: str, config: PeftConfig, checkpoint: CheckpointFill
) -> LoadResult:
    """Replace an adapter's values; after a `CheckpointError` they are as before."""
    named = state_tensors(model, in_view(config, adapter_name))
    present = adapter_tensors(named.items(), config, adapter_name)
    state = checkpoint.state_for(present, config, adapter_name)
    incoming = import_state(state, config, names=present)
    if not incoming.keys() <= present.keys():
        named |= tied_embeddings(model, named.values())
    expected = adapter_tensors(named.items(), config, adapter_name, incoming)
    found = checkpoint.compare(expected, incoming)
    left = {*found.missing_keys, *found.unexpected_keys}  # missing: those of another shape
    state = {key: tensor for key, tensor in state.items() if key not in left}
    result = set_peft_model_state_dict(
        model, state, adapter_name, checkpoint.ignore_mismatched_sizes
    )
    return LoadResult(result.missing_keys, found.unexpected_keys)
