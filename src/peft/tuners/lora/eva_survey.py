# SPDX-License-Identifier: Apache-2.0
"""Search for the principal directions of the inputs of a model's layers, for EVA."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from ...base.constants import MODEL_ROOT
from ...base.errors import PeftValueError, warn
from ...base.progress import remark, track
from ...base.suggestions import listed
from ...core.base_layer import geometry
from ...core.measuring import watched_inputs
from ...integrations.distributed import gathered_rows
from .config import LoraConfig
from .starts.configs import EvaConfig
from .starts.eva import PrincipalDirections, shared_ranks

Batch: TypeAlias = Any
"""A batch of data, for the function that calls the model with it."""

Prepared: TypeAlias = Any
"""What a `prepare_model_inputs_fn` makes of a batch."""

Run: TypeAlias = Callable[[nn.Module, Batch], object]
"""A function that calls the model with a batch."""

ModelInputs: TypeAlias = Callable[[Batch, LoraConfig], Prepared]
"""A function that makes of a batch what `LayerInputs` get."""

LayerInputs: TypeAlias = Callable[[Any, Prepared, str], Tensor]
"""A function of a layer's input, the model's prepared inputs and the layer's name, which returns
the rows `[n, in]` to decompose."""

# Passes over the data after which directions count as found.
_MOST_PASSES = 100


def device_of(model: nn.Module) -> torch.device | None:
    """Return the device of a model's parameters, None if there are several."""
    devices = {p.device for p in model.parameters() if not p.is_meta}
    return devices.pop() if len(devices) == 1 else None


def _moved(batch: Batch, device: torch.device | None) -> Batch:
    """Return a batch on a device."""
    if device is None:
        return batch
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _moved(entry, device) for name, entry in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_moved(entry, device) for entry in batch)
    return batch


@dataclass
class Batches:
    """Batches of a data loader, on the model's device, with what is prepared of each."""

    data: Iterable[Batch]
    device: torch.device | None
    config: LoraConfig
    prepare: ModelInputs | None
    shows_progress: bool
    shown: Iterable[Batch] = ()

    def once(self, passes: int = 1) -> Iterator[tuple[Batch, Prepared]]:
        """Yield each batch, and what is prepared of it."""
        self.shown = self.data
        if self.shows_progress and hasattr(self.data, "__len__"):
            sized = cast("Collection[Batch]", self.data)
            self.shown = track(sized, f"EVA, pass {passes}", unit="batch")
        empty = True
        for batch in self.shown:
            empty = False
            batch = _moved(batch, self.device)
            yield batch, batch if self.prepare is None else self.prepare(batch, self.config)
        if empty:
            raise PeftValueError(
                "The dataloader is empty, or can be looped over only once; EVA runs over it again "
                "and again."
            )


@dataclass
class Survey:
    """The search for the directions of a model's layers."""

    model: nn.Module
    config: LoraConfig
    layers: dict[str, nn.Module]
    functions: dict[str, LayerInputs]
    gathers: bool
    leaders: dict[str, str] = field(default_factory=dict)
    estimates: dict[str, PrincipalDirections] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    budget: int = 0
    prepared: Prepared = None

    @property
    def options(self) -> EvaConfig:
        """The settings of EVA."""
        assert self.config.eva_config is not None
        return self.config.eva_config

    def rows(self, path: str, args: tuple[object, ...]) -> Tensor:
        """Return the rows of a layer's input to use."""
        rows = self.functions[path](args, self.prepared, path)
        return gathered_rows(rows) if self.gathers else rows

    def find_equal_inputs(self, run: Run, first: tuple[Batch, Prepared]) -> None:
        """Find layers with the same input by a batch, and set the number of directions of each."""
        digests: dict[str, tuple[object, ...]] = {}

        def note(path: str, args: tuple[object, ...]) -> None:
            digests.setdefault(path, _digest(self.rows(path, args)))

        batch, self.prepared = first
        with watched_inputs(self.model, self.layers, note):
            run(self.model, batch)
        if silent := [path for path in self.layers if path not in digests]:
            raise PeftValueError(
                f"The model did not call {listed(silent)}; leave them out of the targets."
            )
        first_with: dict[tuple[object, ...], str] = {}
        limits: dict[str, int] = {}
        for path, layer in self.layers.items():
            r = self.config.rank_at(path.removeprefix(MODEL_ROOT))
            self.budget += r
            leader = self.leaders[path] = first_with.setdefault(digests[path], path)
            size = geometry(layer)
            assert size is not None
            most = min(round(r * self.options.rho), size.in_features)
            limits[leader] = max(limits.get(leader, 0), most)
        # Leaders come first, so that they win where shares are equal.
        followers = {path: leader for path, leader in self.leaders.items() if path != leader}
        self.leaders = {**dict(zip(limits, limits, strict=True)), **followers}
        self.estimates = {path: PrincipalDirections(most) for path, most in limits.items()}
        self.ranks = {path: limits[leader] for path, leader in self.leaders.items()}

    def find_directions(self, run: Run, batches: Batches) -> None:
        """Run the model until the directions in use stay the same from batch to batch."""
        done: set[str] = set()
        fewest: dict[str, int] = {}

        def note(path: str, args: tuple[object, ...]) -> None:
            if path in done:
                return
            rows, estimate = self.rows(path, args), self.estimates[path]
            if len(rows) >= estimate.count:
                estimate.add(rows)
            else:
                fewest[path] = max(fewest.get(path, 0), len(rows))

        watched = {path: self.layers[path] for path in self.estimates}
        with watched_inputs(self.model, watched, note):
            for passes in range(_MOST_PASSES):
                for batch, self.prepared in batches.once(passes + 1):
                    done = {path for path in self.estimates if self._has_settled(path)}
                    remark(batches.shown, f"{len(done)} of {len(watched)} inputs have settled")
                    if len(done) == len(watched):
                        return
                    run(self.model, batch)
                    if all(e.directions is not None for e in self.estimates.values()):
                        shares = {path: e.variance_shares for path, e in self.estimates.items()}
                        self.ranks = shared_ranks(shares, self.leaders, self.budget)
                self._check_rows(fewest)
        warn(
            f"EVA ran {_MOST_PASSES} times over the data, and some directions still change from "
            "batch to batch; they are used as they are. Pass more data, or a smaller `tau`."
        )

    def _has_settled(self, path: str) -> bool:
        similarity = self.estimates[path].similarity[: self.ranks[path]]
        return bool((similarity >= self.options.tau).all())

    def _check_rows(self, fewest: Mapping[str, int]) -> None:
        """Raise if a pass over the data had no batch with enough rows for a layer."""
        short = [path for path, estimate in self.estimates.items() if estimate.directions is None]
        if short:
            path = short[0]
            raise PeftValueError(
                f"`{path}`: every batch has fewer rows than the {self.estimates[path].count} "
                f"directions to find, at most {fewest.get(path, 0)}; use larger batches, or a "
                "smaller `r` or `rho`."
            )

    def result(self) -> dict[str, Tensor]:
        """Return the directions of each layer."""
        result = {}
        for path, rank in self.ranks.items():
            estimate = self.estimates[self.leaders[path]]
            assert estimate.directions is not None
            rows = estimate.directions[:rank]
            if self.options.whiten:
                rows = rows / estimate.singular_values[:rank].sqrt().unsqueeze(1)
            result[path] = rows
        return {path: result[path].clone() for path in self.layers}


def _digest(rows: Tensor) -> tuple[object, ...]:
    """Return a value that is the same for equal tensors only."""
    data = rows.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()
    return (*rows.shape, rows.dtype, hashlib.blake2b(data).digest())
