# SPDX-License-Identifier: Apache-2.0
"""Find the experts of a config: in memory, in the saved folder, in the model, or where their
adapters are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn

from ...base.constants import CONFIG_NAME, MODEL_ROOT, WEIGHTS_FILES
from ...base.errors import CheckpointError, CheckpointNotFoundError, PeftError, PeftValueError
from ...base.plain_values import JsonObject
from ...base.progress import track
from ...base.suggestions import did_you_mean
from ...checkpoint.digests import adapter_digest
from ...checkpoint.files import read_weights
from ...checkpoint.hub import HubOptions, find_file
from ...core.low_rank_deltas import DeltaReader
from ...ops.low_rank import Deltas, approximate
from .config import RoutedConfig
from .deltas import Experts

Source: TypeAlias = JsonObject

# Experts in memory, by `key_of`, for the configs that are made while `at_hand` is open.
_AT_HAND: ContextVar[Mapping[str, Deltas]] = ContextVar("_AT_HAND", default={})  # noqa: B039
# Options for the Hub (`token`, `cache_dir`, …) of these configs, which no config holds.
_HUB: ContextVar[HubOptions] = ContextVar("_HUB", default={})  # noqa: B039
# The end of the keys under which a folder holds its experts' factors.
SAVED = "routed_experts"
_ENDS = ("down", "up", "ranks", "numbers")
# How many parts of a path, and folders around a folder, are tried for an adapter that has moved.
_LEVELS = 3


class _Loaded(NamedTuple):
    """An adapter that was read: its place, its digest, and its deltas by task."""

    place: str
    digest: str
    by_task: dict[str, Deltas]


@contextmanager
def at_hand(experts: Mapping[str, Deltas], hub_options: HubOptions | None = None) -> Iterator[None]:
    """Context in which configs find experts in memory, given by `key_of`, and read others with
    options for the Hub.
    """
    token, options = _AT_HAND.set({**_AT_HAND.get(), **experts}), _HUB.set(hub_options or {})
    try:
        yield
    finally:
        _AT_HAND.reset(token)
        _HUB.reset(options)


def deltas_digest(deltas: Deltas) -> str:
    """Return the SHA-256 of deltas in memory."""
    digest = hashlib.sha256()
    for path, delta in sorted(deltas.items()):
        for tensor in (delta.A, delta.B):
            digest.update(f"{path}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
            values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def check_free(name: str, taken: Container[str]) -> None:
    """Check that no other expert has a name, which may be an adapter's and a task's."""
    if name in taken:
        raise PeftValueError(
            f"Two experts are called {name!r}: an adapter with several tasks gives an expert for "
            "each, `name.task`. Choose another name for one of the adapters."
        )


def key_of(source: Source) -> str:
    """Return the name of an expert in memory: its adapter's digest, and its task."""
    return f"{source.get('digest')}:{source.get('task') or ''}"


def find_experts(config: RoutedConfig, model: nn.Module) -> Experts:
    """Return the experts of a config; fill in digests and ranks, and an expert for each task.

    Raises:
        CheckpointNotFoundError: There is no adapter at an expert's source.
        CheckpointError: An adapter has changed, or does not fit the base model.
        PeftValueError: An adapter has no such task, or experts in memory are no longer there.
        PeftNotSupportedError: An adapter is more than low-rank deltas.
    """
    saved = saved_experts(config) if config.save_experts and config.source is not None else None
    if saved is not None:
        return saved
    loaded: dict[object, _Loaded] = {}
    read = DeltaReader(model, deltas_only=config.deltas_only)
    found: dict[str, dict[str, Deltas]] = {"experts": {}, "general_experts": {}}
    for field_name, by_name in found.items():
        sources: dict[str, Source] = {}
        items = getattr(config, field_name).items()
        for name, source in track(items, "Reading experts", unit="expert"):
            for expert, described, deltas in _fetch(config, name, source, read, loaded):
                check_free(expert, by_name)
                sources[expert], by_name[expert] = described, deltas
        setattr(config, field_name, sources)
    config.validate()
    experts, general = found["experts"], list(found["general_experts"].values())
    if general and config.general_subtraction == "factors":
        return Experts({name: _less_factors(name, own, general) for name, own in experts.items()})
    return Experts(experts, _mean(general))


def _fetch(
    config: RoutedConfig,
    name: str,
    source: Source,
    read: DeltaReader,
    loaded: dict[object, _Loaded],
) -> Iterator[tuple[str, Source, Deltas]]:
    """Yield name, full source and deltas of an expert, or of each task of its adapter."""
    source = {key: value for key, value in source.items() if value is not None}
    if (in_memory := _AT_HAND.get().get(key_of(source))) is not None:
        yield name, {"source": None, **source, "rank": _rank(in_memory)}, in_memory
        return
    if source.get("source") is None:
        raise PeftValueError(
            f"Expert {name!r} was in memory when the model was made, and is not there now. Pass it "
            "to `get_routed_model` again; `save_experts=True` writes experts with the model."
        )
    given = _HUB.get() or (config.source[1] if config.source is not None else {})
    hub = {key: value for key, value in given.items() if key not in ("subfolder", "revision")}
    hub |= {key: source[key] for key in ("subfolder", "revision") if key in source}
    try:
        key = source["source"], source.get("digest"), hub.get("subfolder"), hub.get("revision")
        if (adapter := loaded.get(key)) is None:
            place, digest = _find(config, source, hub)
            adapter = loaded[key] = _Loaded(place, digest, read(place, **hub))
        place, digest, by_task = adapter
        tasks = [_task(source["task"], by_task)] if "task" in source else list(by_task)
    except PeftError as error:
        raise type(error)(f"Expert {name!r}: {error}") from error
    for task in tasks:
        expert = name if len(tasks) == 1 else f"{name}.{task}"
        rank = _rank(by_task[task])
        if source.get("rank", rank) != rank:
            raise CheckpointError(
                f"Expert {name!r} has rank {rank} at '{place}' now, and had {source['rank']}."
            )
        described = {**source, "source": str(place), "digest": digest, "rank": rank}
        yield expert, {**described, "task": task} if task else described, by_task[task]


def _find(config: RoutedConfig, source: Source, hub: HubOptions) -> tuple[str, str]:
    """Return the place of an adapter, a folder or Hub id, and its digest.

    If it is not at its source, or has changed there, it is looked for as if folders had been moved
    together with the one that the config was read from.
    """
    given, wanted = source["source"], source.get("digest")
    is_here, moved = os.path.isdir(given), _moved(config, given)
    place = os.path.abspath(given) if is_here else given

    def is_unchanged(digest: str) -> bool:
        return not wanted or digest == wanted

    if is_here and is_unchanged(digest := adapter_digest(place, **hub)):
        return place, digest
    for folder in moved:
        if (folder / str(hub.get("subfolder") or "") / CONFIG_NAME).is_file():
            with suppress(CheckpointError):
                if is_unchanged(digest := adapter_digest(folder, **hub)):
                    return str(folder), digest
    if not is_here:
        try:
            digest = adapter_digest(place, **hub)
        except CheckpointNotFoundError as error:
            others = ", ".join(f"'{folder}'" for folder in moved)
            also = f" Nor is it, unchanged, at any of {others}." if moved else ""
            raise CheckpointNotFoundError(f"{error}{also}") from None
        if is_unchanged(digest):
            return place, digest
    raise CheckpointError(
        f"The adapter at '{place}' has changed since the routed model was saved. Restore it, or "
        "route over the new one: take its `digest` and `rank` out of the config's `experts`, and "
        "compute its prototype or train its gate again."
    )


def _moved(config: RoutedConfig, source: str) -> list[Path]:
    """Return the folders where an adapter may be that was moved together with the folder that the
    config was read from: the last parts of its path, in that folder and those around it.
    """
    base = None if config.source is None else Path(config.source[0])
    if base is None or not base.is_dir():
        return []
    base, parts = base.resolve(), Path(source).parts
    around = [base.parent, base, *base.parents[1:_LEVELS]]
    ends = [Path(*parts[-count:]) for count in range(1, _LEVELS + 1) if count <= len(parts)]
    places = (folder / end for folder in around for end in ends if not end.is_absolute())
    return [place for place in dict.fromkeys(places) if os.fspath(place) != source]


def _task(task: object, by_task: Mapping[str, Deltas]) -> str:
    if task in by_task:
        return str(task)
    if "" in by_task:
        raise PeftValueError(f"`task`={task!r}: the adapter has one delta and no tasks.")
    raise PeftValueError(
        f"`task`={task!r} is none of the adapter's tasks, {list(by_task)[:8]}."
        f"{did_you_mean(str(task), by_task)}"
    )


def _rank(deltas: Deltas) -> int:
    return max((delta.rank for delta in deltas.values()), default=0)


def _mean(general: list[Deltas]) -> Deltas:
    """Return the mean of several adapters' deltas, of the sum of their ranks."""
    result: Deltas = {}
    for path in dict.fromkeys(path for own in general for path in own):
        parts = [own[path] for own in general if path in own]
        B = torch.cat([part.B for part in parts], dim=1) / len(general)
        result[path] = approximate(B, torch.cat([part.A for part in parts]))
    return result


def _less_factors(name: str, own: Deltas, general: list[Deltas]) -> Deltas:
    """Return deltas whose factors are less the mean factors of the general adapters."""
    result: Deltas = {}
    for path, delta in own.items():
        shapes = {
            (tuple(other[path].A.shape), tuple(other[path].B.shape)) if path in other else None
            for other in general
        }
        if shapes != {(tuple(delta.A.shape), tuple(delta.B.shape))}:
            raise PeftValueError(
                f"Expert {name!r}, `{path}`: `general_subtraction`='factors' needs general "
                f"adapters that adapt the module with rank {delta.rank}; use 'deltas'."
            )
        A = torch.stack([other[path].A for other in general]).mean(0)
        B = torch.stack([other[path].B for other in general]).mean(0)
        result[path] = approximate(delta.B - B, delta.A - A)
    return result


def saved_experts(config: RoutedConfig) -> Experts | None:
    """Return the experts in the saved folder that a config was read from; None without any."""
    assert config.source is not None
    place, hub = config.source
    state = read_weights(find_file(place, WEIGHTS_FILES, hub))
    names = [*config.experts, None]
    deltas: dict[str | None, Deltas] = {name: {} for name in names}
    for key in state:
        path, _, end = key.removeprefix(MODEL_ROOT).rpartition(f".{SAVED}.")
        if end == "down":
            start = key.removesuffix("down")
            try:
                for number, A, B in _factors(state, start, len(names)):
                    deltas[names[number]][path] = approximate(B.mT, A)
            except (KeyError, ValueError) as error:
                raise CheckpointError(
                    f"The experts of `{path}` in '{place}' are damaged: {error}."
                ) from None
    general = deltas.pop(None)
    return Experts(cast("dict[str, Deltas]", deltas), general) if any(deltas.values()) else None


def _factors(
    state: Mapping[str, Tensor], start: str, known: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield number and factors of each expert of a layer; raise unless all fit together."""
    down, up, ranks, numbers = (state[f"{start}{end}"] for end in _ENDS)
    if down.dim() != 2 or up.dim() != 2 or ranks.dim() != 1 or numbers.shape != ranks.shape:
        raise ValueError("factors are no matrices, or the lists of ranks and experts differ")
    if not (down.is_floating_point() and up.is_floating_point()):
        raise ValueError("factors have no floating-point numbers")
    sizes, experts = ranks.tolist(), numbers.tolist()
    if not all(type(size) is int and size >= 0 for size in (*sizes, *experts)):
        raise ValueError("ranks or numbers of experts are no sizes")
    if not len(down) == len(up) == sum(sizes) or max(experts, default=0) >= known:
        raise ValueError("ranks do not add up to the factors' rows, or an expert has no name")
    yield from zip(experts, down.split(sizes), up.split(sizes), strict=True)
