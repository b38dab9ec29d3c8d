# SPDX-License-Identifier: Apache-2.0
"""Adapters by name whose deltas are read when they are asked for, and let go after use."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import nn

from ..base.errors import CheckpointError, PeftError, PeftTypeError, PeftValueError
from ..base.modules import check_model
from ..base.progress import track
from ..base.suggestions import adapters_there
from ..config import PeftConfig
from ..core.conversion import config_of
from ..core.low_rank_deltas import DeltaReader, Deltas, SavedAdapter, loaded_deltas

if TYPE_CHECKING:
    from typing_extensions import Self


@runtime_checkable
class Library(Protocol):
    """A library that loads adapters by name, as `AdapterLibrary`."""

    @property
    def names(self) -> list[str]:
        """Return the adapters' names."""

    def load(self, name: str) -> tuple[Any, ...]:
        """Return config and tensors of an adapter, first of all."""


# Adapters of a model by name; saved ones, each a place or a pair of config and tensors; a library.
Adapters: TypeAlias = Iterable["str | os.PathLike[str]"] | Mapping[str, SavedAdapter] | Library
# Deltas by name.
Experts: TypeAlias = dict[str, Deltas]


class _Loading(Mapping[str, SavedAdapter]):
    """The adapters of a library by name, loaded when they are asked for."""

    def __init__(self, library: Library) -> None:
        self.library, self.names = library, list(library.names)

    def __getitem__(self, name: str) -> SavedAdapter:
        return self.library.load(name)  # type: ignore[return-value]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class DeltaSource:
    """Adapters by name, on a model or saved.

    Args:
        model: The base model.
        places: For each name the saved adapter, None for one that the model has.
    """

    def __init__(self, model: nn.Module, places: Mapping[str, SavedAdapter | None]) -> None:
        self.model, self.places = model, places
        self._owners: dict[str, str] = {}  # the adapter of each delta that was read
        self._readers: dict[tuple[torch.device | None, bool], DeltaReader] = {}

    @classmethod
    def of(cls, model: nn.Module, adapters: Adapters | None) -> Self:
        """Return the source of the given adapters; None stands for all that the model has.

        A string is the name of an adapter of the model if it has one of this name, else a place.
        Places are named by their folder, or in full where two folders have one name.
        """
        check_model(model)
        configs = getattr(model, "peft_config", None)
        loaded = list(configs) if isinstance(configs, Mapping) else []
        if adapters is None:
            places: Mapping[str, SavedAdapter | None] = dict.fromkeys(loaded)
        elif isinstance(adapters, Library):
            places = _Loading(adapters)
        elif isinstance(adapters, Mapping):
            places = dict(adapters)
        else:
            places = _named(adapters, loaded)
        if not places:
            raise PeftValueError(
                "There are no adapters: the model has none, and `adapters` names none. Pass names "
                "of adapters of the model, folders, a library, or a dictionary with a saved "
                "adapter for each name."
            )
        if wrong := [name for name in places if not isinstance(name, str)]:
            raise PeftTypeError(f"`adapters` must have names (strings) as keys, not {wrong[0]!r}.")
        return cls(model, places)

    def config_of(self, expert: str) -> Any:
        """Return the config of the adapter that a delta, read before, is of."""
        name = self._owners[expert]
        place = self.places[name]
        if place is None:
            return config_of(self.model, name)
        return place[0] if isinstance(place, tuple) else PeftConfig.from_pretrained(place)

    def read(
        self, name: str, device: torch.device | None = None, deltas_only: bool = False
    ) -> Experts:
        """Return an adapter's deltas: under its name, or "name.task" for each of several tasks.

        Errors name the adapter.
        """
        try:
            views = self._views(name, device, deltas_only)
        except PeftError as error:
            if repr(name) in str(error):
                raise
            raise type(error)(f"Adapter {name!r}: {error}") from error
        several = len(views) > 1
        experts = {f"{name}.{task}" if several else name: view for task, view in views.items()}
        self._owners.update(dict.fromkeys(experts, name))
        return experts

    def _views(
        self, name: str, device: torch.device | None, deltas_only: bool
    ) -> dict[str, Deltas]:
        """Return an adapter's deltas by task, of one without tasks under ""."""
        place = self.places[name]
        if place is None:
            return loaded_deltas(self.model, name, device=device, deltas_only=deltas_only)
        key = device, deltas_only
        if key not in self._readers:
            reader = DeltaReader(self.model, device=device, deltas_only=deltas_only)
            self._readers[key] = reader
        return self._readers[key](place[:2] if isinstance(place, tuple) else place)

    def read_all(self, names: Iterable[str]) -> Experts:
        """Return the deltas of several adapters, without parts outside their layers."""
        return {k: v for name in names for k, v in self.read(name, deltas_only=True).items()}

    def read_some(self, experts: Collection[str]) -> Experts:
        """Return some deltas that were read before; raise for an adapter with further parts."""
        names = dict.fromkeys(self._owners[expert] for expert in experts)
        return {k: v for name in names for k, v in self.read(name).items() if k in experts}

    def blocks(self, memory: int) -> Iterator[tuple[list[str], Experts]]:
        """Yield the adapters in blocks whose factors fit in a number of bytes, one adapter at the
        least: their names, and the deltas.
        """
        names: list[str] = []
        block: Experts = {}
        taken, shapes = 0, dict[str, tuple[str, tuple[int, int]]]()
        for name in track(list(self.places), "Reading adapters", unit="adapter"):
            experts = self.read(name, deltas_only=True)
            _check_shapes(experts, shapes)
            size = sum(_bytes(deltas) for deltas in experts.values())
            if names and taken + size > memory:
                yield names, block
                names, block, taken = [], {}, 0
            names, block, taken = [*names, name], {**block, **experts}, taken + size
        yield names, block


def _named(
    adapters: Iterable[str | os.PathLike[str]], loaded: Collection[str]
) -> dict[str, SavedAdapter | None]:
    """Return the place of each adapter by its name."""
    given = [] if isinstance(adapters, str) or not isinstance(adapters, Iterable) else [*adapters]
    if not given or not all(isinstance(entry, (str, os.PathLike)) for entry in given):
        raise PeftTypeError(
            f"`adapters`={adapters!r} must be a list of names or folders, or a dictionary with a "
            "saved adapter for each name."
        )
    ends = [entry if entry in loaded else PurePath(entry).name for entry in given]
    places: dict[str, SavedAdapter | None] = {}
    for entry, end in zip(given, ends, strict=True):
        name = str(end) if ends.count(end) == 1 else os.fspath(entry)
        if name in places:
            raise PeftValueError(f"`adapters` has {name!r} twice.")
        places[name] = None if entry in loaded else entry
        if entry not in loaded and isinstance(entry, str) and loaded and not _is_place(entry):
            raise PeftValueError(
                f"{entry!r} is neither an adapter of the model nor a folder; the model has "
                f"{adapters_there(entry, loaded)}"
            )
    return places


def _is_place(entry: str) -> bool:
    return "/" in entry or os.path.isdir(entry)


def _check_shapes(
    experts: Mapping[str, Deltas], shapes: dict[str, tuple[str, tuple[int, int]]]
) -> None:
    """Check that deltas of one layer have one shape; `shapes` has those seen so far."""
    for name, deltas in experts.items():
        for path, delta in deltas.items():
            shape = (delta.B.shape[0], delta.A.shape[1])
            first, first_shape = shapes.setdefault(path, (name, shape))
            if first_shape != shape:
                raise CheckpointError(
                    f"`{path}`: the delta of {name} is {list(shape)}, that of {first} "
                    f"{list(first_shape)}; adapters of different base models have no similarity."
                )


def _bytes(deltas: Deltas) -> int:
    return sum(factor.nbytes for delta in deltas.values() for factor in (delta.A, delta.B))
