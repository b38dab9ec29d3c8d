# SPDX-License-Identifier: Apache-2.0
"""Hotswapping: another adapter's weights in the place of a loaded one's, without new layers, and
without compiling a model anew.

A checkpoint is read by what its own config says of it: the adapter that this describes is made for
the model's layers, though without values, and tells what shapes and scales the tensors have. All of
it is checked before anything is changed.

Tensors of the same shape are swapped in place, whatever the method. Where zeros that fill up a rank
are without effect (a layer's `rank_room`) a tensor of smaller rank is filled up with them and one
of larger rank replaces the present one; saving leaves out again what was filled up. Any other
difference is an error that names it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

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
from ..integrations.distributed import (
    is_unmaterialized,
    state_tensors,
    unwrap_model,
    unwrapped_name,
)
from .hub import only_hub_options
from .rank_padding import RankRoom, filled_up
from .state_dict import (
    MODEL_ROOT,
    ROOT,
    adapter_config,
    adapter_tensors,
    import_state,
    in_view,
    load_peft_weights,
    write_state,
)
from .values import warn_of_values

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
    **kwargs: Any,
) -> None:
    """Put a saved adapter's weights in the place of an adapter of the model, which keeps its name
    and its layers.

    It is quicker than loading a second adapter and needs no memory for it. A model that is compiled
    with `torch.compile` is not compiled anew if it was made ready by
    `prepare_model_for_compiled_hotswap` before. On any error the model is left as it was.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into; compiled or not.
        model_name_or_path: A local folder, or an id on the Hub.
        adapter_name: The adapter to replace.
        torch_device: Where to read the file to, by default the CPU.
        **kwargs: Options for the Hub: `subfolder`, `revision`, `token`, `cache_dir`, …

    Raises:
        CheckpointNotFoundError: There is no such checkpoint.
        CheckpointError: It does not fit the adapter in the model; all differences are named.
        PeftRuntimeError: The adapter is merged.
        PeftValueError: There is no such adapter, or the checkpoint is of another method.

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
    known = adapter_config(_plain(model), adapter_name)
    peft_type = type(known)._get_peft_type(model_name_or_path, **hub)
    config = lookup(PEFT_TYPE_TO_CONFIG_MAPPING, peft_type).from_pretrained(
        model_name_or_path, **hub
    )
    check_hotswap_configs_compatible(known, config)
    state = load_peft_weights(model_name_or_path, device=torch_device, **hub)
    _Swap(_plain(model), adapter_name, known, config, state).carry_out()


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: Any,
    parameter_prefix: str = "lora_",
) -> None:
    """As `hotswap_adapter`, from tensors in memory.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into; compiled or not.
        state_dict: Tensors by checkpoint key, with or without the adapter's name in it.
        adapter_name: The adapter to replace.
        config: The config of what `state_dict` holds.
        parameter_prefix: Accepted for compatibility; the config says how names of parameters start.

    Raises:
        As `hotswap_adapter`.
    """
    plain = _plain(model)
    known = adapter_config(plain, adapter_name)
    check_hotswap_configs_compatible(known, config)
    config.validate()
    prefix = lookup(PEFT_TYPE_TO_PREFIX_MAPPING, config.peft_type)
    state = {_without_name(key, adapter_name, prefix): tensor for key, tensor in state_dict.items()}
    _Swap(plain, adapter_name, known, config, state).carry_out()


def check_hotswap_configs_compatible(config0: Any, config1: Any) -> None:
    """Insist that an adapter of one config can take the place of one of another as far as configs
    tell: they are of one method.

    Rank, scale and dropout may differ; which tensors there are is compared when they are swapped.

    Raises:
        PeftValueError: The methods differ, or this one is not provided.
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
    config: Any = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Make a model ready for being compiled now and having its adapters swapped later, without
    being compiled anew then.

    Scales become tensors, which compiled code reads, in place of numbers, which it contains. With a
    `target_rank`, low-rank factors are filled up to it with zeros, so that every later adapter of
    at most that rank has their shape.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into, with its first adapter
            loaded and not compiled yet.
        target_rank: The largest rank of any adapter to come. It concerns methods whose tensors can
            be filled up; others take adapters of the same shapes only.
        config: Accepted for compatibility; configs go on saying what the adapters' ranks are,
            whatever room they have.
        check_compiled: What to do if the model is compiled already, so that its next call compiles
            it anew: "error", "warn" or "ignore".

    Raises:
        PeftValueError: The model has no adapters or is compiled, or `target_rank` does not fit
            them; nothing is changed.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise PeftValueError(
            f"`check_compiled`={check_compiled!r} must be one of 'error', 'warn' and 'ignore'."
        )
    if check_compiled != "ignore" and any(_is_compiled(module) for _, module in walk(model)):
        message = "Call `prepare_model_for_compiled_hotswap` before compiling the model; it is compiled already"
        if check_compiled == "error":
            raise PeftValueError(f"{message}.")
        warn(f"{message}, and its next call compiles it anew.")
    kinds = tuple(tuner.tuner_layer_cls for tuner in PEFT_TYPE_TO_TUNER_MAPPING.values())  # type: ignore[attr-defined]
    layers: list[Any] = [module for _, module in walk(model) if isinstance(module, kinds)]
    if not layers:
        raise PeftValueError(
            "No adapter layers found on the model; call `prepare_model_for_compiled_hotswap` after "
            "loading the first adapter and "
            "before loading the second."
        )
    if target_rank is not None:
        _make_room(_plain(model), target_rank)
    for layer in layers:
        for name, scale in layer.scaling.items():
            if not isinstance(scale, Tensor):
                device = next(iter(layer.adapter_tensors(name))).device
                layer.scaling[name] = torch.tensor(float(scale), device=device)


def _plain(model: Any) -> Any:
    """The model inside what replicates or compiles it."""
    check_model(model)
    model = unwrap_model(model)
    return model._modules.get("_orig_mod") or model


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def _without_name(key: str, adapter_name: str, prefix: str) -> str:
    """A checkpoint key, given with or without the adapter's name in it."""
    parts = key.split(".")
    for i in range(len(parts) - 1):
        if parts[i + 1] == adapter_name:
            if parts[i] == "modules_to_save":
                return ".".join(parts[:i] + parts[i + 2 :])
            if parts[i].startswith((prefix, "trainable_tokens_delta")):
                return ".".join(parts[: i + 1] + parts[i + 2 :])
    return key


class _Adapter:
    """An adapter in a model: its layers, and their tensors by the keys they are saved under.

    Args:
        model: The model.
        name: The adapter's name.
        config: Its config.
    """

    def __init__(self, model: Any, name: str, config: Any) -> None:
        self.model, self.name, self.config = model, name, config
        self.tuner: Any = lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type).of(model, config)
        self.root = "" if self.tuner.model is model else MODEL_ROOT
        self.layers: dict[str, Any] = {}
        for path, layer in self.tuner.named_tuner_layers():
            if name in layer.scaling:
                self.layers[unwrapped_name(path).removesuffix(".base_layer")] = layer

    def tensors(self, embeddings: bool = False) -> dict[str, Tensor]:
        """All of the adapter's tensors."""
        named = state_tensors(self.model, in_view(self.config, self.name))
        return adapter_tensors(named.items(), self.config, self.name, embeddings)

    def place(self, key: str) -> tuple[str, str] | None:
        """The path of the layer that a tensor belongs to, and the name of its container; None if it
        belongs to no layer.
        """
        parts = key.removeprefix(self.root).split(".")
        holders = self.tuner.tuner_layer_cls.container_names
        found = next((i for i, part in enumerate(parts) if part in holders), None)
        return None if found is None else (".".join(parts[:found]), parts[found])

    def correct_sizes(self) -> None:
        """Have the modules that adapters are made of say what sizes their weights have now."""
        holders = [
            getattr(layer, name) for layer in self.layers.values() for name in layer.container_names
        ]
        for module in (module for holder in holders for _, module in walk(holder, (self.name,))):
            if isinstance(module, nn.Linear) and module.weight.dim() == 2:
                module.out_features, module.in_features = module.weight.shape
            elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.weight.dim() > 2:
                module.out_channels, module.in_channels = (
                    module.weight.shape[0],
                    module.weight.shape[1] * module.groups,
                )

    def room(self, key: str) -> RankRoom | None:
        """Where a tensor has a rank that can be filled up."""
        place = self.place(key)
        return (
            None
            if place is None or place[0] not in self.layers
            else self.layers[place[0]].rank_room(place[1])
        )


def _make_room(model: Any, target_rank: int) -> None:
    """Fill up all adapters' ranks.

    Raises:
        PeftValueError: A rank is larger, or can't be had; nothing is changed.
    """
    todo, problems = [], []
    for name, config in model.peft_config.items():
        adapter = _Adapter(model, name, config)
        for key, tensor in adapter.tensors().items():
            room = adapter.room(key)
            if room is None or tensor.dim() <= room.dim:
                continue
            if (
                not isinstance(target_rank, int)
                or not room.holds(target_rank)
                or room.size(target_rank) < tensor.shape[room.dim]
            ):
                problems.append(f"`{key}` has shape {list(tensor.shape)}")
            else:
                todo.append((config, key, tensor, room))
    if problems:
        raise PeftValueError(
            f"Adapters can't be filled up to `target_rank`={target_rank!r}: "
            f"{'; '.join(problems[:8])}."
        )
    for config, key, tensor, room in todo:
        filled_up(config).setdefault(key, (room, tensor.shape[room.dim]))
        tensor.data = room.filled(tensor.data, room.size(target_rank))
    for name, config in model.peft_config.items():
        _Adapter(model, name, config).correct_sizes()


class _Swap:
    """One adapter's tensors in the place of another's.

    Args:
        model: The model.
        adapter_name: The adapter that is replaced.
        known: Its config.
        config: The config of what replaces it.
        state: The tensors that do, by checkpoint key.

    Raises:
        CheckpointError: They do not fit; all differences are named.
        PeftRuntimeError: The adapter is merged.
    """

    def __init__(
        self, model: Any, adapter_name: str, known: Any, config: Any, state: Mapping[str, Tensor]
    ) -> None:
        self.adapter = _Adapter(model, adapter_name, known)
        self.config, state = config, _ = self.adapter.tuner.present_names(config, state)
        self.problems: list[str] = []
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}
        self.silent: dict[str, Tensor] = {}
        tuner, layers = self.adapter.tuner, self.adapter.layers
        tuner.check_loadable(model, adapter_name)
        for path, layer in layers.items():
            self.problems += [
                f"`{path}`: {problem}"
                for problem in tuner.target_problems(config, path, layer.base_layer)
            ]
        self._insist()
        self.incoming_name = (
            f"{adapter_name}_incoming"  # of its own: layers may share what belongs to a name
        )
        self.build = tuner.build_for(self.incoming_name, config, layers, known)
        self._compare(import_state(state, config, "" if self.adapter.root else ROOT))
        self._insist()
        values = {key: value for key, (_, value) in self.pairs.items()}
        places = {key: tensor for key, (tensor, _) in self.pairs.items()}
        warn_of_values(
            f"The checkpoint for adapter {adapter_name}", values, places, tuner.masked_names
        )

    def _insist(self) -> None:
        if self.problems:
            listed = "; ".join(self.problems[:8]) + (
                f"; and {len(self.problems) - 8} more" if len(self.problems) > 8 else ""
            )
            raise CheckpointError(
                f"Adapter {self.adapter.name} can't be swapped; nothing was changed. {listed}."
            )

    def _compare(self, incoming: Mapping[str, Tensor]) -> None:
        """Note which tensor goes where, and what is in the way."""
        adapter = self.adapter
        embeddings = {
            key: tensor for key, tensor in adapter.tensors(True).items() if key in incoming
        }
        old = {**adapter.tensors(), **embeddings}
        new = adapter_tensors(self._described(), self.config, self.incoming_name)
        groups: dict[str, list[str]] = {}
        for key in dict.fromkeys((*old, *new)):
            place = adapter.place(key)
            groups.setdefault(key if place is None else place[0], []).append(key)
        for path, keys in groups.items():
            if path in adapter.layers and not any(key in incoming for key in keys):
                if not self._can_be_silent(path, keys):
                    self.problems.append(f"`{path}`: the checkpoint has nothing for this layer")
                self.silent.update((key, old[key]) for key in keys if key in old)
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

    def _can_be_silent(self, path: str, keys: list[str]) -> bool:
        """Whether a layer's adapter is without effect if its tensors are zero."""
        layer, name = self.adapter.layers[path], self.adapter.name
        others = [getattr(layer, attribute) for attribute in layer.value_names]
        modules = [
            other[name] for other in others if isinstance(other, nn.ModuleDict) and name in other
        ]
        return all(self.adapter.room(key) is not None for key in keys) and not any(
            list(m.buffers()) for m in modules
        )

    def _described(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the adapter that the new config describes, named as in the model."""
        for name, tensor in self.build.named_tensors():
            is_shared = name.partition(".")[0] in self.build.shared
            yield (
                (
                    ROOT
                    if is_shared and self.adapter.root
                    else self.adapter.root
                    if not is_shared
                    else ""
                )
                + name,
                tensor,
            )

    def _difference(
        self, key: str, old: Tensor | None, new: Tensor | None, value: Tensor | None
    ) -> str | None:
        """Why a tensor can't be put in place of the present one, None if it can."""
        room = self.adapter.room(key)
        if old is None:
            return "the adapter in the model has no such tensor"
        if value is None or new is None:
            return "the checkpoint lacks it"
        if value.shape != new.shape:
            return f"the checkpoint has shape {list(value.shape)}, which its config says is {list(new.shape)}"
        if old.is_floating_point() != value.is_floating_point():
            return f"the checkpoint has dtype {value.dtype}, the adapter in the model {old.dtype}"
        if value.shape == old.shape or (
            room is not None and room.fits(value, old) and type(old) is nn.Parameter
        ):
            return None
        return f"the checkpoint has shape {list(value.shape)}, the adapter in the model {list(old.shape)}"

    @torch.no_grad()
    def carry_out(self) -> None:
        """Swap. Nothing here can fail."""
        own: dict[str, tuple[Any, int]] = {key: (self.adapter.room(key), 0) for key in self.silent}
        targets = {**self.silent, **{key: tensor for key, (tensor, _) in self.pairs.items()}}
        values = {
            key: torch.zeros(tensor.shape, dtype=tensor.dtype)
            for key, tensor in self.silent.items()
        }
        for key, (tensor, value) in self.pairs.items():
            room = self.adapter.room(key)
            if (
                room is not None
                and value.dim() > room.dim
                and value.shape[room.dim] < tensor.shape[room.dim]
            ):
                own[key] = (room, value.shape[room.dim])
                value = room.filled(value, tensor.shape[room.dim])
            if value.shape == tensor.shape or is_unmaterialized(tensor):
                values[key] = value
            else:
                tensor.data, tensor.grad = value.to(tensor.device, tensor.dtype, copy=True), None
        write_state(self.adapter.model, targets, values, (self.adapter.name,))
        self.adapter.correct_sizes()
        swapped = {place[0] for place in map(self.adapter.place, self.pairs) if place is not None}
        for path, fresh in self.build.layers.items():
            if path in swapped:
                self._adopt_values(self.adapter.layers[path], fresh)
        known = self.adapter.config
        vars(known).update(
            {**vars(self.config), "inference_mode": known.inference_mode, "_filled_up": own}
        )
        self.adapter.tuner.note_loaded(self.adapter.model, self.adapter.name)

    def _adopt_values(self, layer: Any, fresh: Any) -> None:
        """Give a layer what belongs to the new adapter beside its tensors: rank, scale, dropout, …"""
        name, new = self.adapter.name, self.incoming_name
        for attribute in layer.value_names:
            present, wanted = getattr(layer, attribute), getattr(fresh, attribute)
            if new in wanted and not (name in present and _same(present[name], wanted[new])):
                present[name] = wanted[new]
            elif new not in wanted and name in present:
                del present[name]
        layer.hold_scale(name, fresh.scaling[new])
        layer.adopt_settings(name, fresh, new)


def _same(present: Any, wanted: Any) -> bool:
    """Whether a value need not be replaced; compiled code knows modules by their identity."""
    if isinstance(wanted, nn.Module):
        return (
            type(present) is type(wanted)
            and repr(present) == repr(wanted)
            and not wanted.state_dict()
        )
    return present == wanted
