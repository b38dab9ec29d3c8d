# SPDX-License-Identifier: Apache-2.0
"""The only file that knows how engines spread a model's tensors over processes, and how to read and
write them whole.

- DTensor (FSDP2, tensor parallelism): a parameter is a DTensor; it is passed on as such, and a
  whole tensor is cut to its pieces.
- FullyShardedDataParallel (FSDP1): parameters are slices of flat ones. A stand-in on the meta
  device, which knows its unit, takes a parameter's place until it is read or written; one unit at a
  time is made whole for that, as in a forward.
- DeepSpeed ZeRO-3: a parameter is empty outside `deepspeed.zero.GatheredParameters`; reading or
  writing it there is refused.

All that gathers has to be called by all processes.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..base.containers import named_tensors, state_of, walk
from ..base.errors import PeftRuntimeError

# What wrappers put into module paths: torch.compile, FSDP, activation checkpointing.
_FSDP_PARTS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_WRAPPERS = _FSDP_PARTS | {"_orig_mod"}
_WRAPPED = re.compile("|".join([r"^module\.", *sorted(_WRAPPERS)]))
_FLAT = "_fsdp_wrapped_module._flat_param"


class Place(NamedTuple):
    """Where a stand-in's parameter is.

    Args:
        unit: The FSDP module that holds it.
        name: Its name in there.
        key: Its name in the model's state dict.
    """

    unit: Any
    name: str
    key: str


def unwrapped(name: str) -> str:
    """A tensor's name without what wrappers around modules put into it."""
    if not _WRAPPED.search(name):
        return name
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(
        parts[1:] if parts[:2] == ["module", "base_model"] else parts
    )  # DistributedDataParallel


def unparallel(model: Any) -> Any:
    """The model inside wrappers that replicate it."""
    while isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        model = model.module
    return model


def own_state(model: nn.Module, adapters: Collection[str] | None) -> dict[str, Tensor]:
    """A model's state dict with the tensors themselves, each once: one that sits in several places
    by its first name. Parameters that FSDP1 flattened are replaced by stand-ins.

    Args:
        model: The model.
        adapters: The adapters whose tensors are wanted; others' are not looked at. None for all.

    Raises:
        PeftRuntimeError: The model lies inside an FSDP module that holds parameters of it.
    """
    modules = list(walk(model, adapters))
    units = _fsdp1_units(modules)
    named = list(named_tensors(modules, adapters, buffers=True))
    flattened = [name for name, tensor in named if getattr(tensor, "_fsdp_flattened", False)]
    if not units and not flattened:
        state, seen = {}, set()
        for name, tensor in state_of(model, adapters).items():
            if isinstance(tensor, Tensor) and id(tensor) not in seen:
                state[name] = tensor
                seen.add(id(tensor))
        return state
    stand_ins = {place.key: tensor for tensor, place in _stand_ins(units)}
    flat = {f"{path}.{_FLAT}".lstrip(".") for path in units}
    outside = [name for name in flattened if name not in flat and _fsdp1_key(name) not in stand_ins]
    if outside:
        raise PeftRuntimeError(
            f"`{outside[0]}` is a slice held by a FullyShardedDataParallel module around this "
            "model; pass that module in place of "
            "this one, or the gathered tensors as `state_dict`."
        )
    transient = {
        f"{path}.{name}".lstrip(".")
        for path, module in modules
        for name in module._non_persistent_buffers_set
    }
    plain = {
        _fsdp1_key(name): tensor
        for name, tensor in named
        if name not in transient and name not in flattened
    }
    return {**plain, **stand_ins}


def own_values(model: nn.Module, adapters: Collection[str] | None) -> dict[str, Any]:
    """A model's state dict for reading: as `own_state`, or in pieces where the user has set FSDP1
    to give them so.
    """
    library = sys.modules.get("torch.distributed.fsdp")
    if library is not None and _fsdp1_units(walk(model, adapters)):
        kind = library.FullyShardedDataParallel.get_state_dict_type(model).state_dict_type
        if kind is library.StateDictType.SHARDED_STATE_DICT:
            return model.state_dict()
    return dict(own_state(model, adapters))


def read(model: nn.Module, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Values for tensors of `own_values`, by the same keys: for a stand-in a whole copy, on the
    processes and the device that the user has set FSDP1 to gather to; else the tensor itself,
    detached.

    Raises:
        PeftRuntimeError: ZeRO-3 has emptied one.
    """
    refuse_empty(tensors)
    wanted: dict[int, dict[str, str]] = {}
    for key, tensor in tensors.items():
        if _place(tensor) is not None:
            wanted.setdefault(id(_place(tensor).unit), {})[_place(tensor).name] = key
    result = {key: _detached(tensor) for key, tensor in tensors.items() if _place(tensor) is None}
    units = _fsdp1_units(model.named_modules()) if wanted else {}
    for unit in units.values():
        # Sets up the units inside it, which has to happen before they are used.
        unit.check_is_root()
    for unit in units.values():
        if id(unit) not in wanted:
            continue
        options: Any = type(unit).get_state_dict_type(model).state_dict_config
        with type(unit).summon_full_params(unit, recurse=False, writeback=False):
            if getattr(options, "rank0_only", False) and unit.rank != 0:
                continue
            for name, tensor in unit.named_parameters():
                found = wanted[id(unit)].get(unwrapped(name))
                if found is not None:
                    result[found] = tensor.detach().to(
                        "cpu" if options.offload_to_cpu else tensor.device, copy=True
                    )
    return {key: result[key] for key in tensors if key in result}


def write(model: nn.Module | None, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy values into tensors of `own_state`; a whole value is cut where its target is in pieces,
    and the other way round.
    """
    held = {
        _place(target).key: whole(value) for target, value in pairs if _place(target) is not None
    }
    if held and model is not None:
        library: Any = sys.modules["torch.distributed.fsdp"]
        in_pieces = any(hasattr(value, "local_shards") for value in held.values())
        kind = library.FullyShardedDataParallel.state_dict_type(
            model, library.StateDictType.FULL_STATE_DICT
        )
        with (
            _silenced("torch.distributed.fsdp._state_dict_utils"),
            nullcontext() if in_pieces else kind,
        ):
            model.load_state_dict(held, strict=False)
    for target, value in pairs:
        if _place(target) is None:
            target.copy_(cut_like(target, value))


def refuse_empty(tensors: Mapping[str, Any]) -> None:
    """Refuse what ZeRO-3 has emptied."""
    for tensor in tensors.values():
        if _is_emptied(tensor):
            raise PeftRuntimeError(
                "DeepSpeed ZeRO-3 has distributed the adapter's parameters over the processes; do "
                "this inside "
                "`deepspeed.zero.GatheredParameters(...)`, or pass the gathered tensors "
                "(`accelerator.get_state_dict(model)`) as "
                "`state_dict`."
            )


@contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """A context in which parameters that ZeRO-3 has emptied are whole, to be read."""
    emptied = [parameter for parameter in parameters if _is_emptied(parameter)]
    if not emptied:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(emptied):
        yield


def is_without_memory(tensor: Tensor) -> bool:
    """Whether a tensor of `own_state` is on the meta device and no stand-in."""
    return tensor.is_meta and _place(tensor) is None


def is_elsewhere(tensor: Any) -> bool:
    """Whether a matrix is not here as a whole, nor in the form of a DTensor: FSDP1's slices have
    one dimension.
    """
    return _is_emptied(tensor) or (getattr(tensor, "_fsdp_flattened", False) and tensor.dim() < 2)


def is_managed(tensor: Any) -> bool:
    """Whether a parameter's memory belongs to an engine: what takes its place would not be seen."""
    return is_distributed(tensor) or getattr(tensor, "_fsdp_flattened", False)


def is_distributed(tensor: Any) -> bool:
    """Whether a tensor is a DTensor."""
    library = sys.modules.get("torch.distributed.tensor")
    return library is not None and isinstance(tensor, library.DTensor)


def whole(tensor: Any) -> Any:
    """A DTensor gathered from all processes; any other tensor as it is."""
    return tensor.full_tensor() if is_distributed(tensor) else tensor


def cut_like(target: Tensor, value: Tensor) -> Tensor:
    """`value` in pieces as `target` is, whole if that is, without asking other processes where
    `value` is whole.
    """
    if not is_distributed(target):
        return whole(value)
    if is_distributed(value):
        return value.redistribute(target.device_mesh, target.placements)  # type: ignore[attr-defined]
    from torch.distributed.tensor import distribute_tensor

    mesh: Any = target.device_mesh  # type: ignore[attr-defined]
    known = inspect.signature(distribute_tensor).parameters
    options: dict[str, Any] = {"src_data_rank": None} if "src_data_rank" in known else {}
    placements: Any = target.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.detach().to(mesh.device_type), mesh, placements, **options)


def _is_emptied(tensor: Any) -> bool:
    full = getattr(tensor, "ds_numel", 0)  # what DeepSpeed notes of a parameter that it distributes
    return bool(full) and tensor.numel() == 0


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) and value.requires_grad else value


def _place(tensor: Any) -> Any:
    return getattr(tensor, "_peft_place", None)


@contextmanager
def _silenced(name: str) -> Iterator[None]:
    """Without a logger's warnings: FSDP1 has one for each parameter that a state dict lacks, which
    is all of the base's here.
    """
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _fsdp1_key(name: str) -> str:
    """A name as it is in FSDP1's state dicts."""
    return ".".join(part for part in name.split(".") if part not in _FSDP_PARTS)


def _fsdp1_units(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, Any]:
    """Those of a model's modules that are FSDP1's, by path, outer ones first."""
    library = sys.modules.get("torch.distributed.fsdp")
    if library is None:
        return {}
    return {
        path: module
        for path, module in modules
        if isinstance(module, library.FullyShardedDataParallel)
    }


def _stand_ins(units: Mapping[str, Any]) -> list[tuple[Tensor, Place]]:
    """A tensor without memory for each parameter that FSDP1 holds."""
    result = []
    for path, unit in units.items():
        flat: Any = None if unit._handle is None else unit._handle.flat_param
        for name, shape in () if flat is None else zip(flat._fqns, flat._shapes, strict=True):
            tensor: Any = torch.empty(shape, dtype=flat.dtype, device="meta")
            tensor._peft_place = Place(
                unit, unwrapped(name), _fsdp1_key(f"{path}.{name}".lstrip("."))
            )
            result.append((tensor, tensor._peft_place))
    return result
