# SPDX-License-Identifier: Apache-2.0
"""Tensors that an engine spreads over processes: read and write them as full tensors.

- DTensor (FSDP2, tensor parallelism): a parameter is a DTensor. It is passed on as such, and a full
  tensor is sharded like it.
- FullyShardedDataParallel (FSDP1): parameters are slices of flat ones. A stand-in on the meta
  device takes a parameter's place until it is read or written; one unit at a time is gathered for
  that, as in a forward.
- DeepSpeed ZeRO-3: a parameter is empty outside `deepspeed.zero.GatheredParameters`; reading or
  writing it there is an error.

All processes have to call the functions that gather.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from ..base.containers import StateDict, named_tensors, state_of, walk
from ..base.errors import PeftRuntimeError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

T = TypeVar("T")
# A module of FSDP1, whose internals have no public types.
_Unit: TypeAlias = Any

# Parts of module paths that FSDP, activation checkpointing and torch.compile insert.
_FSDP_PARTS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_WRAPPERS = _FSDP_PARTS | {"_orig_mod"}
_WRAPPED = re.compile("|".join([r"^module\.", *sorted(_WRAPPERS)]))
_FLAT = "_fsdp_wrapped_module._flat_param"


class _Source(NamedTuple):
    """The FSDP unit of a stand-in's parameter, its name there, and its key in state dicts."""

    unit: _Unit
    name: str
    key: str


def unwrapped_name(name: str) -> str:
    """Return a tensor's name without the parts that wrappers of modules insert."""
    if not _WRAPPED.search(name):
        return name
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    is_data_parallel = parts[:2] == ["module", "base_model"]
    return ".".join(parts[1:] if is_data_parallel else parts)


def unwrap_model(model: T) -> T:
    """Return the model inside DataParallel, DistributedDataParallel and DeepSpeed's engine."""
    library = sys.modules.get("deepspeed.runtime.engine")
    engine = getattr(library, "DeepSpeedEngine", nn.DataParallel)
    while isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel, engine)):
        model = model.module
    return model


def state_tensors(model: nn.Module, adapters: Collection[str] | None) -> dict[str, Tensor]:
    """Return a model's state dict with the tensors themselves, each once, by its first name; those
    of trainable copies of modules by every name, since copies of tied modules share them.

    Stand-ins take the place of parameters that FSDP1 flattened.

    Raises:
        PeftRuntimeError: The model is inside an FSDP module that holds parameters of it.
    """
    modules = list(walk(model, adapters))
    units = _fsdp1_units(modules)
    named = list(named_tensors(modules, adapters, buffers=True))
    flattened = [name for name, tensor in named if is_flattened(tensor)]
    if not units and not flattened:
        state, seen = {}, set()
        for name, tensor in state_of(model, adapters).items():
            is_new = id(tensor) not in seen or ".modules_to_save." in name
            if isinstance(tensor, Tensor) and is_new:
                state[name] = tensor
                seen.add(id(tensor))
        return state
    stand_ins = _stand_ins(units)
    flat = {f"{path}.{_FLAT}".lstrip(".") for path in units}
    outside = [name for name in flattened if name not in flat and _fsdp1_key(name) not in stand_ins]
    if outside:
        raise PeftRuntimeError(
            f"`{outside[0]}` is a slice held by a FullyShardedDataParallel module around this "
            "model; pass that module to `get_peft_model_state_dict` or "
            "`set_peft_model_state_dict`, or the gathered tensors to `save_pretrained` as "
            "`state_dict`."
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


def state_values(model: nn.Module, adapters: Collection[str] | None) -> StateDict:
    """Return `state_tensors`, or sharded tensors if the user has set FSDP1 to return these."""
    library = sys.modules.get("torch.distributed.fsdp")
    if library is not None and _fsdp1_units(walk(model, adapters)):
        kind = library.FullyShardedDataParallel.get_state_dict_type(model).state_dict_type
        if kind is library.StateDictType.SHARDED_STATE_DICT:
            return model.state_dict()
    return dict(state_tensors(model, adapters))


def read_values(model: nn.Module, tensors: Mapping[str, Tensor]) -> StateDict:
    """Return the values of tensors from `state_values`, by the same keys.

    The value of a stand-in is a full copy, on the processes and the device that the user has set
    FSDP1 to gather to. Other tensors are returned themselves, detached.

    Raises:
        PeftRuntimeError: ZeRO-3 has emptied a tensor.
    """
    check_gathered(tensors.values())
    wanted: dict[int, dict[str, str]] = {}
    result = {}
    for key, tensor in tensors.items():
        source = _source(tensor)
        if source is None:
            is_trained = isinstance(tensor, Tensor) and tensor.requires_grad
            result[key] = tensor.detach() if is_trained else tensor
        else:
            wanted.setdefault(id(source.unit), {})[source.name] = key
    units = _fsdp1_units(model.named_modules()) if wanted else {}
    for unit in units.values():
        unit.check_is_root()  # sets up the inner units, which has to come first
    for unit in units.values():
        if id(unit) not in wanted:
            continue
        options = type(unit).get_state_dict_type(model).state_dict_config
        with type(unit).summon_full_params(unit, recurse=False, writeback=False):
            if getattr(options, "rank0_only", False) and unit.rank != 0:
                continue
            for name, tensor in unit.named_parameters():
                found = wanted[id(unit)].get(unwrapped_name(name))
                if found is not None:
                    result[found] = tensor.detach().to(
                        "cpu" if options.offload_to_cpu else tensor.device, copy=True
                    )
    return {key: result[key] for key in tensors if key in result}


def write_values(model: nn.Module | None, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy values into tensors of `state_tensors`, sharded or gathered as each target needs it."""
    held: StateDict = {}
    for target, value in pairs:
        source = _source(target)
        if source is None:
            write_value(target, value)
        else:
            held[source.key] = gathered_tensor(value)
    if held and model is not None:
        library = sys.modules["torch.distributed.fsdp"]
        is_sharded = any(hasattr(value, "local_shards") for value in held.values())
        kind = library.FullyShardedDataParallel.state_dict_type(
            model, library.StateDictType.FULL_STATE_DICT
        )
        with (
            _silenced("torch.distributed.fsdp._state_dict_utils"),
            nullcontext() if is_sharded else kind,
        ):
            model.load_state_dict(held, strict=False)


def check_gathered(tensors: Iterable[object], written: bool = False) -> None:
    """Check that ZeRO-3 has emptied none of some tensors, nor made copies of some to be `written`.

    Parameters below `stage3_param_persistence_threshold` are full copies after a forward. What is
    written to these is lost in the next step, so they are gathered for that too.
    """
    for tensor in tensors:
        if _is_emptied(tensor) or (written and _is_copy(tensor)):
            raise PeftRuntimeError(
                "DeepSpeed ZeRO-3 has distributed the adapter's parameters over the processes; "
                "do this inside `deepspeed.zero.GatheredParameters(...)`, or pass the gathered "
                "tensors (`accelerator.get_state_dict(model)`) as `state_dict`."
            )


def check_whole(tensors: Iterable[Tensor], written: bool = False) -> None:
    """Check that an adapter's tensors can be read, or `written`: neither ZeRO-3 nor FSDP1 holds
    them elsewhere.
    """
    every = list(tensors)
    check_gathered(every, written)
    slices = [tensor for tensor in every if is_flattened(tensor)]
    if slices and all(tensor.dim() < 2 for tensor in slices):
        raise PeftRuntimeError(
            "FullyShardedDataParallel holds slices of the adapter's parameters; do this inside "
            "`FullyShardedDataParallel.summon_full_params(model)` on every process, or before the "
            "model is sharded."
        )


def check_in_place(tensors: Iterable[Tensor]) -> None:
    """Check that tensors of `state_tensors` can be exchanged where they are."""
    every = list(tensors)
    check_whole(every, written=True)
    if any(_source(tensor) is not None for tensor in every):
        raise PeftRuntimeError(
            "FullyShardedDataParallel holds slices of the adapter's parameters; "
            "`set_peft_model_state_dict` writes an adapter of the same rank into such a model."
        )


def check_can_grow(model: nn.Module) -> None:
    """Check that no ZeRO-3 engine runs a model: it fails in modules that it did not prepare."""
    library = sys.modules.get("deepspeed.runtime.zero.parameter_offload")
    kind = getattr(library, "ZeROOrderedDict", ())
    if library is not None and any(isinstance(m._parameters, kind) for _, m in walk(model)):
        raise PeftRuntimeError(
            "DeepSpeed ZeRO-3 runs this model, and fails in modules that are put in later; add or "
            "load all adapters before `deepspeed.initialize`."
        )


def take_back(root: nn.Module) -> None:
    """Let FSDP2 take back the full copies of a model's parameters that it leaves after a forward.
    What is written to a copy, or to its `requires_grad`, is lost when it does. Every change of
    parameters begins with this. While a forward or a backward runs, the copies stay.
    """
    library = torch.distributed
    if not (library.is_available() and library.is_initialized()):
        return
    for _, module in walk(root, None):
        for hook in list(module._state_dict_pre_hooks.values()):
            # A state dict has sharded parameters, so a unit takes back its copies before one.
            if getattr(hook, "__qualname__", "").startswith("FSDPParamGroup."):
                units = [cell.cell_contents for cell in getattr(hook, "__closure__", None) or ()]
                states = [getattr(unit, "_training_state", None) for unit in units]
                if all(getattr(state, "name", "IDLE") == "IDLE" for state in states):
                    hook(module, "", True)


@torch.no_grad()
def write_value(target: Tensor, value: Tensor) -> None:
    """Copy a full value into a parameter that `check_whole` has passed. Every process has to call,
    with the same value.
    """
    target.copy_(shard_like(target, value))


def gathered(parameters: Iterable[Tensor]) -> AbstractContextManager[None]:
    """Return a context in which parameters that ZeRO-3 has emptied are full, to be read."""
    return gather_params_ctx(filter(_is_emptied, parameters), modifier_rank=None)


@contextmanager
def gather_params_ctx(
    param: Tensor | Iterable[Tensor],
    modifier_rank: int | None = 0,
    fwd_module: nn.Module | None = None,
) -> Iterator[None]:
    """Context in which parameters that ZeRO-3 has emptied are full; others are as they are.

    Args:
        param: A parameter, or several.
        modifier_rank: The process whose changes to them are kept; None if they are only read.
        fwd_module: As for `deepspeed.zero.GatheredParameters`.
    """
    parameters = [param] if isinstance(param, Tensor) else list(param)
    if not any(hasattr(parameter, "ds_numel") for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(
        parameters, modifier_rank=modifier_rank, fwd_module=fwd_module
    ):
        yield


def is_unmaterialized(tensor: Tensor) -> bool:
    """Return True for a tensor of `state_tensors` on the meta device, stand-ins excepted."""
    return tensor.is_meta and _source(tensor) is None


def is_unreadable(tensor: object) -> bool:
    """Return True for a matrix that ZeRO-3 has emptied or FSDP1 has cut into flat slices."""
    is_slice = isinstance(tensor, Tensor) and is_flattened(tensor) and tensor.dim() < 2
    return is_slice or _is_emptied(tensor)


def is_managed(tensor: object) -> bool:
    """Return True for a parameter of an engine, which must not be replaced by another."""
    return is_distributed(tensor) or is_flattened(tensor)


def is_sharded(tensor: object) -> bool:
    """Return True for a parameter of an engine, ZeRO-3 included, whose shape must stay."""
    return is_managed(tensor) or hasattr(tensor, "ds_numel")


def is_distributed(tensor: object) -> TypeGuard[DTensor]:
    """Return True for a DTensor."""
    library = sys.modules.get("torch.distributed.tensor")
    return library is not None and isinstance(tensor, library.DTensor)


def gathered_tensor(tensor: Tensor) -> Tensor:
    """Return a DTensor gathered from all processes, any other tensor as it is."""
    return tensor.full_tensor() if is_distributed(tensor) else tensor


def full_sizes(model: nn.Module) -> dict[int, int]:
    """Return the number of elements of each parameter that FSDP1 has cut into slices, by its id; 0
    for one that shares another's.
    """
    sizes: dict[int, int] = {}
    for unit in _fsdp1_units(walk(model, None)).values():
        if unit._handle is None:
            continue
        flat = unit._handle.flat_param
        numels = [shape.numel() for shape in flat._shapes]
        if flat._params is None:  # without `use_orig_params` the flat one is the only parameter
            sizes[id(flat)] = sum(numels)
            continue
        sizes |= dict.fromkeys(map(id, flat._shared_params), 0)
        sizes |= zip(map(id, flat._params), numels, strict=True)
    return sizes


def needs_all_processes(model: nn.Module) -> bool:
    """Return True if all processes have to call to read a model's tensors, or to find the same
    error: FSDP holds its parameters. FSDP2 leaves them full after a forward until the next
    backward, or the next `state_dict`. Of ZeRO-3 the first process alone gets a gathered state.
    """
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    return any(isinstance(module, kind) for _, module in walk(model)) or any(
        is_managed(parameter) for parameter in model.parameters()
    )


def check_alike(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Check that the DTensors among named tensors are the same in all processes, in the same order.

    Collectives pair up by their order alone, in a gathering of these tensors as in a forward: of
    different adapters they would give mixtures.
    """
    lines: dict[tuple[DeviceMesh, tuple[bool, ...]], list[str]] = {}
    for name, tensor in tensors:
        if is_distributed(tensor):
            whole = tuple(placement.is_replicate() for placement in tensor.placements)
            text = f"{name} {tuple(tensor.shape)} {tensor.dtype}"
            lines.setdefault((tensor.device_mesh, whole), []).append(text)
    for (mesh, whole), own in lines.items():
        from torch.distributed.tensor import DTensor, Replicate, Shard

        digest = zlib.crc32("\n".join(own).encode())
        placements = [Replicate() if is_whole else Shard(0) for is_whole in whole]
        local = torch.tensor([digest], device=mesh.device_type)
        if set(DTensor.from_local(local, mesh, placements).full_tensor().tolist()) != {digest}:
            raise PeftRuntimeError(
                "Another process has other adapters, or has them in another order, or saves "
                f"others; this one has {len(own)} sharded tensors, such as `{own[0]}`. Nothing was "
                "written. Load the same adapters in the same order on every process, since sharded "
                "tensors are paired by their order, in calls too; and pass the same "
                "`selected_adapters`."
            )


def gathered_rows(rows: Tensor) -> Tensor:
    """Return the rows of all processes, one after the other; in one process, `rows`.

    Every process has to call, with tensors that differ in the first size only.
    """
    library = torch.distributed
    if not (library.is_available() and library.is_initialized()) or library.get_world_size() < 2:
        return rows
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(library.get_world_size())]
    library.all_gather(counts, count)
    sizes = [int(size) for size in counts]
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    library.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def shard_like(target: Tensor, value: Tensor) -> Tensor:
    """Return `value` sharded like `target`, without communication unless `value` is a DTensor."""
    if not is_distributed(target):
        return gathered_tensor(value)
    mesh, placements = target.device_mesh, target.placements
    if is_distributed(value):
        return value.redistribute(mesh, placements)
    from torch.distributed.tensor import distribute_tensor

    own = value.detach().to(mesh.device_type)
    if "src_data_rank" in inspect.signature(distribute_tensor).parameters:
        return distribute_tensor(own, mesh, placements, src_data_rank=None)
    return distribute_tensor(own, mesh, placements)


def _is_emptied(tensor: object) -> bool:
    # DeepSpeed notes the size of a parameter that it distributes as `ds_numel`.
    return (
        bool(getattr(tensor, "ds_numel", 0)) and isinstance(tensor, Tensor) and not tensor.numel()
    )


def _is_copy(tensor: object) -> bool:
    """Return True for a full copy that ZeRO-3 keeps of a small parameter, outside of a context that
    gathers it.
    """
    is_kept = getattr(tensor, "ds_persist", False) and not _is_emptied(tensor)
    library = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    depth = getattr(library, "DS_Z3_GATHERED_PARAM_CONTEXT_DEPTH_ATTR", None) if is_kept else None
    return depth is not None and not getattr(tensor, depth, 0)


def is_flattened(tensor: object) -> bool:
    """Return True for a parameter whose memory is part of a flat parameter of FSDP1."""
    return getattr(tensor, "_fsdp_flattened", False)


def _source(tensor: object) -> _Source | None:
    return getattr(tensor, "_peft_source", None)


@contextmanager
def _silenced(name: str) -> Iterator[None]:
    """Context without a logger's warnings: FSDP1 logs one for each key of the base model."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _fsdp1_key(name: str) -> str:
    """Return a name as it is in FSDP1's state dicts."""
    return ".".join(part for part in name.split(".") if part not in _FSDP_PARTS)


def _fsdp1_units(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, _Unit]:
    """Return the FSDP1 modules of a model by path, outer ones first."""
    library = sys.modules.get("torch.distributed.fsdp")
    if library is None:
        return {}
    return {
        path: module
        for path, module in modules
        if isinstance(module, library.FullyShardedDataParallel)
    }


def _stand_ins(units: Mapping[str, _Unit]) -> dict[str, Tensor]:
    """Return a tensor on the meta device for each parameter that FSDP1 holds, by state-dict key."""
    result = {}
    for path, unit in units.items():
        if unit._handle is None:
            continue
        flat = unit._handle.flat_param
        for name, shape in zip(flat._fqns, flat._shapes, strict=True):
            key = _fsdp1_key(f"{path}.{name}".lstrip("."))
            tensor: Any = torch.empty(shape, dtype=flat.dtype, device="meta")
            tensor._peft_source = _Source(unit, unwrapped_name(name), key)
            result[key] = tensor
    return result
