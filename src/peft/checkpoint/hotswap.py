# SPDX-License-Identifier: Apache-2.0
"""Hotswapping: replace a loaded adapter's weights by another's, without new layers or
recompilation.

The checkpoint's own config says which tensors it should have: an adapter is built from it for the
model's layers, without values, and everything is checked before anything is changed.

Tensors of the same shape are swapped in place. Where a rank can be padded with zeros (a layer's
`rank_padding`), a tensor of smaller rank is padded and one of larger rank replaces the present one;
saving cuts the padding off. Any other difference is an error that names it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..base.calls.running import changing
from ..base.constants import CONFIG_NAME, ROOT
from ..base.containers import walk
from ..base.errors import CheckpointError, PeftValueError, warn
from ..base.modules import check_model
from ..base.registry import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    PeftType,
    lookup,
)
from ..base.tensors import ordinary_tensors
from ..integrations.distributed import check_in_place, is_unmaterialized, unwrap_model
from .checks import check_adapter_unmerged, warn_of_values
from .files import read_json
from .hub import find_file, load_peft_weights, of_one_save, only_hub_options
from .keys import TOKEN_ROWS, WHOLE_MODULES, adapter_config, adapter_tensors
from .placed_adapter import PlacedAdapter
from .protocols import AdapterConfig, AdapterLayer
from .rank_padding import Unpadded
from .state_dict import import_state, write_state

__all__ = [
    "check_hotswap_configs_compatible",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "prepare_model_for_compiled_hotswap",
]


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike,
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: object,
) -> None:
    """Replace the weights of an adapter in the model by those of a saved one; its name and layers
    stay.

    This needs no memory for a second adapter. A model compiled with `torch.compile` is not
    recompiled if `prepare_model_for_compiled_hotswap` has prepared it. On any error the model is
    left as it was.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into; compiled or not.
        model_name_or_path: A local folder, or an id on the Hub.
        adapter_name: The adapter to replace.
        torch_device: Device to read the file to, by default the CPU.
        **kwargs: Options for the Hub: `subfolder`, `revision`, `token`, `cache_dir`, …

    Raises:
        CheckpointNotFoundError: There is no such checkpoint.
        CheckpointError: It does not fit the adapter in the model; all differences are named.
        PeftRuntimeError: The adapter is merged.
        PeftValueError: The model has no such adapter, or the checkpoint is of another method.

    Example:
        >>> import tempfile, torch
        >>> from peft import LoKrConfig, get_peft_model
        >>> base, config = torch.nn.Linear(8, 8), LoKrConfig(r=2, target_modules=["0"])
        >>> one, two = (get_peft_model(torch.nn.Sequential(base), config) for _ in range(2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     two.save_pretrained(folder)
        ...     hotswap_adapter(one, folder, "default")
    """
    hub = only_hub_options(kwargs, "hotswap_adapter")
    inner = _unwrapped(model)
    adapter_config(inner, adapter_name)

    def read() -> tuple[AdapterConfig, dict[str, Tensor]]:
        peft_type = read_json(find_file(model_name_or_path, (CONFIG_NAME,), hub)).get("peft_type")
        config_cls = lookup(PEFT_TYPE_TO_CONFIG_MAPPING, peft_type)
        config = config_cls.from_pretrained(model_name_or_path, **hub).as_loaded()
        check_hotswap_configs_compatible(adapter_config(inner, adapter_name), config)
        return config, load_peft_weights(model_name_or_path, device=torch_device, **hub)

    config, state = of_one_save(model_name_or_path, hub.get("subfolder"), read)
    with changing(inner, [adapter_name]):
        _Swap(inner, adapter_name, config, state).run()


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: AdapterConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """Replace the weights of an adapter in the model by given tensors, as `hotswap_adapter` does.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into; compiled or not.
        state_dict: Tensors by checkpoint key, with or without the adapter's name.
        adapter_name: The adapter to replace.
        config: The config of the adapter in `state_dict`.
        parameter_prefix: Accepted for compatibility; the prefix follows from the config.

    Raises:
        CheckpointError, PeftRuntimeError, PeftValueError: As `hotswap_adapter`.
    """
    inner = _unwrapped(model)
    check_hotswap_configs_compatible(adapter_config(inner, adapter_name), config)
    config.validate()
    prefix = lookup(PEFT_TYPE_TO_PREFIX_MAPPING, config.peft_type)
    state = {_without_name(key, adapter_name, prefix): tensor for key, tensor in state_dict.items()}
    with changing(inner, [adapter_name]):
        _Swap(inner, adapter_name, config, state).run()


def check_hotswap_configs_compatible(config0: AdapterConfig, config1: AdapterConfig) -> None:
    """Check that the configs of two adapters are of the same method.

    Rank, scale and dropout may differ; tensors are compared when they are swapped.

    Raises:
        PeftValueError: The methods differ, or the method is not implemented.
    """
    first, second = (PeftType(config.peft_type) for config in (config0, config1))
    if first != second:
        raise PeftValueError(
            f"Incompatible PEFT types found: {first.value} and {second.value}; swap adapters of "
            "one method."
        )
    lookup(PEFT_TYPE_TO_TUNER_MAPPING, first)


@ordinary_tensors()
def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: object = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Prepare a model for `torch.compile` followed by hotswaps, so that these cause no
    recompilation.

    Scales become tensors, which compiled code reads, in place of numbers, which are constants in
    it. With a `target_rank`, low-rank factors are padded to it with zeros, so that later adapters
    of at most that rank have their shape.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into, with its first adapter
            loaded and not compiled yet.
        target_rank: The largest rank of any later adapter. It applies to methods whose tensors can
            be padded; others take adapters of the same shapes only.
        config: Accepted for compatibility; configs keep the ranks of the adapters, without padding.
        check_compiled: Reaction to a model that is compiled already, so that its next call
            recompiles it: "error", "warn" or "ignore".

    Raises:
        PeftValueError: The model has no adapters or is compiled, or `target_rank` does not fit
            them; nothing is changed.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise PeftValueError(
            f"`check_compiled`={check_compiled!r} must be one of 'error', 'warn' and 'ignore'."
        )
    if check_compiled != "ignore" and any(_is_compiled(module) for _, module in walk(model)):
        message = (
            "Call `prepare_model_for_compiled_hotswap` before compiling the model; it is compiled "
            "already"
        )
        if check_compiled == "error":
            raise PeftValueError(f"{message}.")
        warn(f"{message}, and its next call compiles it anew.")
    kinds = tuple(tuner.tuner_layer_cls for tuner in PEFT_TYPE_TO_TUNER_MAPPING.values())
    layers = [module for _, module in walk(model) if isinstance(module, kinds)]
    if not layers:
        raise PeftValueError(
            "No adapter layers found on the model; call `prepare_model_for_compiled_hotswap` after "
            "loading the first adapter and before loading the second."
        )
    if target_rank is not None:
        _pad_ranks(_unwrapped(model), target_rank)
    for layer in layers:
        for name, scale in layer.scaling.items():
            if not isinstance(scale, Tensor):
                device = next(iter(layer.adapter_tensors(name))).device
                layer.scaling[name] = torch.tensor(float(scale), device=device)


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers that replicate or compile it."""
    check_model(model)
    model = unwrap_model(model)
    return model._modules.get("_orig_mod") or model


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def _without_name(key: str, adapter_name: str, prefix: str) -> str:
    """Return a checkpoint key without the adapter's name, if it is there."""
    parts = key.split(".")
    for i in range(len(parts) - 1):
        if parts[i + 1] == adapter_name:
            if parts[i] == WHOLE_MODULES:
                return ".".join(parts[:i] + parts[i + 2 :])
            if parts[i].startswith((prefix, TOKEN_ROWS)):
                return ".".join(parts[: i + 1] + parts[i + 2 :])
    return key


def _pad_ranks(model: Any, target_rank: int) -> None:
    """Pad all adapters of a model to a rank; on an error nothing is changed."""
    todo, problems = [], []
    for name, config in model.peft_config.items():
        adapter = PlacedAdapter(model, name, config)
        for key, tensor in adapter.tensors().items():
            padding = adapter.padding(key)
            if padding is None or tensor.dim() <= padding.dim:
                continue
            if (
                isinstance(target_rank, int)
                and padding.allows(target_rank)
                and padding.size(target_rank) >= tensor.shape[padding.dim]
            ):
                todo.append((adapter, key, tensor, padding))
            else:
                problems.append(f"`{key}` has shape {list(tensor.shape)}")
    if problems:
        raise PeftValueError(
            f"Adapters can't be filled up to `target_rank`={target_rank!r}: "
            f"{'; '.join(problems[:8])}."
        )
    for adapter, key, tensor, padding in todo:
        adapter.set_unpadded(key, Unpadded(padding, tensor.shape[padding.dim]))
        tensor.data = padding.pad(tensor.data, padding.size(target_rank))
    for name, config in model.peft_config.items():
        PlacedAdapter(model, name, config).correct_sizes()


class _Swap:
    """The replacement of an adapter's tensors; `config` is that of the new ones."""

    def __init__(
        self,
        model: nn.Module,
        adapter_name: str,
        config: AdapterConfig,
        state: Mapping[str, Tensor],
    ) -> None:
        # Another thread may have replaced or deleted it since the file was read.
        known = adapter_config(model, adapter_name)
        check_hotswap_configs_compatible(known, config)
        self.adapter = PlacedAdapter(model, adapter_name, known)
        tuner, layers = self.adapter.tuner, self.adapter.layers
        self.config, state = tuner.present_names(config, state)
        self.problems: list[str] = []
        # The adapter's tensors by key: with the new ones, and those that the checkpoint lacks.
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}
        self.zeroed: dict[str, Tensor] = {}
        check_adapter_unmerged(model, adapter_name)
        check_in_place(self.adapter.tensors().values())
        for path, layer in layers.items():
            self.problems += [
                f"`{path}`: {problem}"
                for problem in tuner.target_problems(self.config, path, layer.base_layer)
            ]
        self._raise_problems()
        # Layers may share objects by adapter name, so the new adapter has a name of its own.
        self.new_name = f"{adapter_name}_incoming"
        self.build = tuner.build_for(self.new_name, self.config, layers, adapter_name)
        remove, names = "" if self.adapter.root else ROOT, self.adapter.tensors()
        self._compare(import_state(state, self.config, remove, names))
        self._raise_problems()
        values = {key: value for key, (_, value) in self.pairs.items()}
        targets = {key: tensor for key, (tensor, _) in self.pairs.items()}
        source = f"The checkpoint for adapter {adapter_name}"
        warn_of_values(source, values, targets, tuner.checkpoint_format.masked)

    def _raise_problems(self) -> None:
        if self.problems:
            cause = ", ".join(self._other_settings())
            shown = 2 if cause else 8  # the layers differ by the same cause
            listed = "; ".join(self.problems[:shown]) + (
                f"; and {len(self.problems) - shown} more" if len(self.problems) > shown else ""
            )
            raise CheckpointError(
                f"Adapter {self.adapter.name} can't be swapped; nothing was changed. "
                + (f"The configs differ in {cause}. " if cause else "")
                + f"{listed}."
            )

    def _other_settings(self) -> Iterator[str]:
        """Yield the fields that affect the delta and differ, short values with both."""
        known = vars(self.adapter.config)
        for name, value in vars(self.config).items():
            if name[0] != "_" and value != known[name] and self.config.affects_output(name):
                is_short = isinstance(value, (int, float, str))
                both = f" ({value!r}, in the model {known[name]!r})" if is_short else ""
                yield f"`{name}`{both}"

    def _compare(self, incoming: Mapping[str, Tensor]) -> None:
        """Pair old and new tensors, and collect problems."""
        adapter = self.adapter
        embeddings = {
            key: tensor for key, tensor in adapter.tensors(True).items() if key in incoming
        }
        old = {**adapter.tensors(), **embeddings}
        named = ((adapter.root + name, tensor) for name, tensor in self.build.named_tensors())
        new = adapter_tensors(named, self.config, self.new_name)  # what the new config describes
        groups: dict[str, list[str]] = {}
        for key in dict.fromkeys((*old, *new)):
            position = adapter.position(key)
            groups.setdefault(key if position is None else position.path, []).append(key)
        for path, keys in groups.items():
            if path in adapter.layers and not any(key in incoming for key in keys):
                if not self._can_be_zeroed(path, keys):
                    self.problems.append(f"`{path}`: the checkpoint has nothing for this layer")
                self.zeroed.update((key, old[key]) for key in keys if key in old)
                continue
            for key in keys:
                problem = self._difference(
                    key, old.get(key), new.get(key, incoming.get(key)), incoming.get(key)
                )
                if problem is not None:
                    self.problems.append(f"`{key}`: {problem}")
                elif path in adapter.layers and key not in new:
                    self.problems.append(f"`{key}`: by its config the checkpoint would not have it")
                else:
                    self.pairs[key] = (old[key], incoming[key])
        self.problems += [
            f"`{key}`: the adapter in the model has no such tensor"
            for key in incoming
            if key not in {**old, **new}
        ]
        if not self.pairs and not self.problems:
            self.problems.append("The checkpoint is empty")

    def _can_be_zeroed(self, path: str, keys: list[str]) -> bool:
        """Return True if a layer's adapter changes nothing when its tensors are zero."""
        layer, name = self.adapter.layers[path], self.adapter.name
        others = [getattr(layer, attribute) for attribute in layer.value_names]
        modules = [
            other[name] for other in others if isinstance(other, nn.ModuleDict) and name in other
        ]
        return all(self.adapter.padding(key) is not None for key in keys) and not any(
            list(m.buffers()) for m in modules
        )

    def _difference(
        self, key: str, old: Tensor | None, new: Tensor | None, value: Tensor | None
    ) -> str | None:
        """Return the reason why a tensor can't be replaced, None if it can."""
        padding = self.adapter.padding(key)
        if old is None:
            return "the adapter in the model has no such tensor"
        if value is None or new is None:
            return "the checkpoint lacks it"
        shape = f"the checkpoint has shape {list(value.shape)}"
        if value.shape != new.shape:
            return f"{shape}, which its config says is {list(new.shape)}"
        if old.is_floating_point() != value.is_floating_point():
            return f"the checkpoint has dtype {value.dtype}, the adapter in the model {old.dtype}"
        is_padded = padding is not None and padding.differs_in_rank_only(value, old)
        if value.shape == old.shape or (is_padded and type(old) is nn.Parameter):
            return None
        return f"{shape}, the adapter in the model {list(old.shape)}"

    @torch.no_grad()
    def run(self) -> None:
        """Replace the tensors. Nothing here can fail."""
        adapter = self.adapter
        sizes = {}
        targets = {**self.zeroed, **{key: tensor for key, (tensor, _) in self.pairs.items()}}
        values = {}
        for key, tensor in self.zeroed.items():
            if (padding := adapter.padding(key)) is not None:
                sizes[key] = Unpadded(padding, 0)
            values[key] = torch.zeros(tensor.shape, dtype=tensor.dtype)
        for key, (tensor, value) in self.pairs.items():
            padding = adapter.padding(key)
            if (
                padding is not None
                and value.dim() > padding.dim
                and value.shape[padding.dim] < tensor.shape[padding.dim]
            ):
                sizes[key] = Unpadded(padding, value.shape[padding.dim])
                value = padding.pad(value, tensor.shape[padding.dim])
            if value.shape == tensor.shape or is_unmaterialized(tensor):
                values[key] = value
            else:
                tensor.data, tensor.grad = value.to(tensor.device, tensor.dtype, copy=True), None
        write_state(adapter.model, targets, values, (adapter.name,))
        adapter.correct_sizes()
        positions = map(adapter.position, self.zeroed)
        zeroed = {position.path for position in positions if position is not None}
        for path, fresh in self.build.all_layers():  # also those whose tensors another layer has
            if path not in zeroed:
                self._adopt_values(adapter.layers[path], fresh)
        for layer in adapter.layers.values():
            layer.unpadded_sizes.pop(adapter.name, None)
        for key, size in sizes.items():
            adapter.set_unpadded(key, size)
        known = adapter.config
        vars(known).update({**vars(self.config), "inference_mode": known.inference_mode})
        adapter.tuner.note_loaded(adapter.model, adapter.name)

    def _adopt_values(self, layer: AdapterLayer, fresh: AdapterLayer) -> None:
        """Copy the new adapter's rank, scale, dropout and settings into a layer."""
        name, new = self.adapter.name, self.new_name
        for attribute in layer.value_names:
            present, wanted = getattr(layer, attribute), getattr(fresh, attribute)
            if new in wanted and not (name in present and _same(present[name], wanted[new])):
                present[name] = wanted[new]
            elif new not in wanted and name in present:
                del present[name]
        layer.hold_scale(name, fresh.scaling[new])
        layer.adopt_settings(name, fresh, new)


def _same(present: object, wanted: object) -> bool:
    """Return True if a value need not be replaced; compiled code identifies modules by `id`."""
    if isinstance(wanted, nn.Module):
        return (
            type(present) is type(wanted)
            and repr(present) == repr(wanted)
            and not any(True for _ in (*wanted.parameters(), *wanted.buffers()))
        )
    return present == wanted
