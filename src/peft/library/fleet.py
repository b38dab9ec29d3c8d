# SPDX-License-Identifier: Apache-2.0
"""`AdapterFleet`: a model that serves more adapters than it holds."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import TIMEOUT_MAX, Condition
from time import monotonic

from torch import nn

from ..base.calls.adapter_batch import BASE_MODEL
from ..base.errors import PeftRuntimeError, PeftTypeError, PeftValueError
from ..base.tables import in_bytes, table
from ..base.validation import at_least, check_adapter, check_flags, number
from ..peft_model import PeftModel
from .entry import AdapterEntry
from .library import AdapterLibrary
from .naming import Names, listed, name_of
from .placing import adapter_sizes, put_on


class _BusyError(PeftRuntimeError):
    """Adapters in use are in the way."""


@dataclass
class _Held:
    """An adapter that the fleet put on the model."""

    version: object
    bytes: int


@dataclass(frozen=True)
class FleetStatus:
    """The adapters on a fleet's model. Print it for a table.

    Args:
        sizes: Bytes of each adapter on the model, by name, the least recently used first.
        in_use: Names of those that calls are using.
        others: Bytes of the adapters that the fleet did not put there; they never leave.
        loads: Number of adapters put on the model so far.
        evictions: Number of adapters that had to leave.
    """

    sizes: dict[str, int]
    in_use: tuple[str, ...]
    others: dict[str, int]
    loads: int
    evictions: int

    @property
    def bytes(self) -> int:
        """Bytes of the fleet's adapters on the model."""
        return sum(self.sizes.values())

    def __str__(self) -> str:
        rows = [
            (name, in_bytes(size), "in use" if name in self.in_use else "")
            for name, size in self.sizes.items()
        ]
        rows += [(name, in_bytes(size), "not the fleet's") for name, size in self.others.items()]
        shown = table([("adapter", "size", ""), *rows[-40:]], right=[1])
        more = [f"… {len(rows) - 40} more before these"] if len(rows) > 40 else []
        total = f"{len(self.sizes)} adapters, {in_bytes(self.bytes)}"
        return "\n".join(
            [*more, shown, f"{total}; {self.loads} loaded, {self.evictions} evicted so far"]
        )


class AdapterFleet:
    """A model that serves any adapter of a library and holds a few: those asked for last.

    No adapter becomes active by itself: a call without `adapter_names` is one of the base model
    until `activate`, and again when the active adapter has left. Active adapters leave last.
    Adapters that the fleet did not put on the model are left alone. While adapters are exchanged,
    the model holds those that come and go together, for a moment.

    Args:
        model: A `PeftModel`; or a base model, which becomes one with the first adapter, a
            `PeftMixedModel` if the library has adapters of several methods.
        library: The adapters.
        max_adapters: The most that are on the model at once; None for any number.
        max_bytes: Bound on their tensors on the model; None for any size.
        autocast_adapter_dtype: Keep adapters in float32 where the base has 16 bits.

    Raises:
        PeftTypeError: `library` is not an `AdapterLibrary`, or `model` not a torch module.
        PeftValueError: A bound is not a positive integer.

    Example:
        ```
        fleet = AdapterFleet(base_model, AdapterLibrary("users"), max_adapters=64)
        with fleet.using(["ada", "ben", "ada", "__base__"]) as names:
            fleet.model(**batch, adapter_names=names)
        ```
    """

    def __init__(
        self,
        model: nn.Module,
        library: AdapterLibrary,
        *,
        max_adapters: int | None = None,
        max_bytes: int | None = None,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        if not isinstance(library, AdapterLibrary):
            raise PeftTypeError(
                f"`library` must be an AdapterLibrary, got {type(library)}; "
                "`AdapterLibrary(folder)` makes one."
            )
        if not isinstance(model, nn.Module):
            raise PeftTypeError(f"`model` must be a torch module, got {type(model)}.")
        check_flags(autocast_adapter_dtype=autocast_adapter_dtype)
        for name, bound in (("max_adapters", max_adapters), ("max_bytes", max_bytes)):
            for problem in at_least(name, bound) if bound is not None else ():
                raise PeftValueError(problem)
        self.library = library
        self.max_adapters, self.max_bytes = max_adapters, max_bytes
        self._model = model
        self._autocast = autocast_adapter_dtype
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._uses: Counter[str] = Counter()
        self._loads = self._evictions = 0
        self._lock = Condition()  # notified when a call has ended

    @property
    def model(self) -> nn.Module:
        """The model; a `PeftModel` as soon as an adapter is on it."""
        return self._model

    def __repr__(self) -> str:
        return f"AdapterFleet({len(self._held)} of {len(self.library)} adapters on the model)"

    def __contains__(self, name: object) -> bool:
        return name_of(name) in self._on_model()

    def status(self) -> FleetStatus:
        """Return the adapters on the model, their sizes, and how often adapters came and went."""
        with self._lock:
            self._reconcile()
            others = adapter_sizes(self._model) if self._on_model() else {}
            return FleetStatus(
                {name: held.bytes for name, held in self._held.items()},
                tuple(name for name in self._held if self._uses[name]),
                {name: size for name, size in others.items() if name not in self._held},
                self._loads,
                self._evictions,
            )

    def ensure(self, names: Names) -> list[str]:
        """Put adapters on the model that are not there; the least recently used leave.

        Args:
            names: A name or entry, or one for each sample of a batch, in any number; `"__base__"`
                stands for none.

        Returns:
            The names, as the model's `adapter_names` takes them.

        Raises:
            PeftValueError: A name is unknown, or they are more than the bounds allow.
            PeftRuntimeError: Adapters that would have to leave are in use.
            CheckpointError: An adapter is broken or does not fit. In all cases the model is as it
                was, but that adapters whose files changed may have left.
        """
        asked = [None if name == BASE_MODEL else self.library[name] for name in listed(names)]
        with self._lock:
            self._reconcile()
            self._load({entry.name: entry for entry in asked if entry is not None})
            return [BASE_MODEL if entry is None else entry.name for entry in asked]

    @contextmanager
    def using(self, names: Names, timeout: float | None = 0.0) -> Iterator[list[str]]:
        """Context in which adapters are on the model and stay there, whatever other threads ask.

        Args:
            names: As for `ensure`.
            timeout: Seconds to wait for calls of other threads to end, if adapters that they use
                are in the way; None for as long as it takes.

        Yields:
            The names, as the model's `adapter_names` takes them.

        Raises:
            As `ensure`; adapters in use are an error after `timeout`. A wrong `timeout` is one too.
        """
        for problem in () if timeout is None else number("timeout", timeout):
            raise PeftValueError(problem)
        with self._lock:
            there = self._ensure_in_time(names, timeout)
            own = {name for name in there if name != BASE_MODEL}
            self._uses.update(own)
        try:
            yield there
        finally:
            with self._lock:
                self._uses.subtract(own)
                for name in own:
                    if not self._uses[name]:
                        del self._uses[name]
                self._lock.notify_all()

    def _ensure_in_time(self, names: Names, timeout: float | None) -> list[str]:
        """Do as `ensure` does, tried again whenever a call has ended until it is too late."""
        asked = listed(names)
        end = None if timeout is None else monotonic() + timeout
        while True:
            try:
                return self.ensure(asked)
            except _BusyError:
                left = TIMEOUT_MAX if end is None else end - monotonic()
                if left <= 0:
                    raise
            self._lock.wait(min(left, TIMEOUT_MAX))  # lets others have the lock meanwhile

    def activate(self, name: str) -> None:
        """Put an adapter on the model and make it the active one, frozen.

        Raises:
            PeftTypeError: It is not one name.
            As `ensure`.
        """
        entry = self.library[name]
        with self._lock:
            (there,) = self.ensure(entry)
            self._peft_model().set_adapter(there, inference_mode=True)

    def evict(self, names: Names | None = None) -> list[str]:
        """Take adapters off the model, by default all of the fleet's; return their names.

        Raises:
            PeftTypeError: One is not a name.
            PeftValueError: One is not on the model, or not the fleet's.
            PeftRuntimeError: One is in use.
        """
        with self._lock:
            self._reconcile()
            chosen = list(self._held) if names is None else [*map(name_of, listed(names))]
            for name in chosen:
                check_adapter(name)
                if name not in self._held:
                    raise PeftValueError(
                        f"{name!r} is not among the {len(self._held)} adapters that this fleet has "
                        "on the model."
                    )
            chosen = list(dict.fromkeys(chosen))
            self._check_unused(chosen)
            for name in chosen:
                self._drop(name)
            return chosen

    def _on_model(self) -> Collection[str]:
        return self._model.peft_config if isinstance(self._model, PeftModel) else ()

    def _peft_model(self) -> PeftModel:
        assert isinstance(self._model, PeftModel)
        return self._model

    def _reconcile(self) -> None:
        """Forget adapters that were deleted from the model by others."""
        there = self._on_model()
        for name in [name for name in self._held if name not in there]:
            del self._held[name]

    def _load(self, wanted: dict[str, AdapterEntry]) -> None:
        """Put adapters on the model, after others left if need be; the wanted become the latest."""
        there = self._on_model()
        stale = [
            name
            for name, entry in wanted.items()
            if name in self._held and self._held[name].version != entry.version
        ]
        missing = [name for name in wanted if name not in there or name in stale]
        count = sum(name in self._held or name in missing for name in wanted)
        if self.max_adapters is not None and count > self.max_adapters:
            raise PeftValueError(
                f"{count} adapters at once are more than `max_adapters`={self.max_adapters}; ask "
                "for fewer, or raise the bound."
            )
        self._check_unused(stale)
        contents = {name: self.library.content(name) for name in missing}
        after = len(self._held) - len(stale) + len(missing)
        leaving = self._leaving(wanted, after - (self.max_adapters or after))
        if missing:
            active = self._active()
            for name in stale:
                self._drop(name)
            methods = {entry.method for entry in self.library}
            self._model = put_on(self._model, contents, self._autocast, methods)
            self._activate([name for name in active if name in self._on_model()])
            sizes = adapter_sizes(self._model, missing)
            self._held |= {name: _Held(wanted[name].version, sizes[name]) for name in missing}
            try:
                leaving = self._leaving_by_bytes(wanted, leaving)
            except BaseException:
                for name in missing:
                    self._drop(name)
                raise
            self._loads += len(missing)
        for name in leaving:
            self._drop(name)
            self._evictions += 1
        for name in wanted:  # in the order that they were asked for
            if name in self._held:
                self._held.move_to_end(name)

    def _leaving(self, wanted: Collection[str], number: int, nbytes: int = 0) -> list[str]:
        """Return the least recently used adapters, which leave to make room; active ones last.

        Args:
            wanted: Adapters that stay.
            number: Number of adapters that have to leave at least.
            nbytes: Bytes that they have to take at least.

        Raises:
            PeftRuntimeError: Adapters in use are in the way.
        """
        active = self._active()
        free = [name for name in self._held if name not in wanted and not self._uses[name]]
        free.sort(key=lambda name: name in active)
        gone: list[str] = []
        while len(gone) < number or sum(self._held[name].bytes for name in gone) < nbytes:
            if len(gone) == len(free):
                in_use = [name for name in self._held if self._uses[name] and name not in wanted]
                raise _BusyError(
                    f"There is no room on the model for {len(wanted)} adapters beside the "
                    f"{len(in_use)} in use ({', '.join(in_use[:8])}); wait until calls have ended "
                    "(`using(…, timeout=…)`), or raise the fleet's bounds."
                )
            gone.append(free[len(gone)])
        return gone

    def _leaving_by_bytes(self, wanted: Collection[str], leaving: list[str]) -> list[str]:
        """Return the adapters that have to leave by the bound on bytes too; `leaving` have to by
        that on their number.
        """
        if self.max_bytes is None:
            return leaving
        own = sum(held.bytes for name, held in self._held.items() if name in wanted)
        if own > self.max_bytes:
            raise PeftValueError(
                f"{len(wanted)} adapters at once take {in_bytes(own)} on the model, more than "
                f"`max_bytes`={self.max_bytes}; ask for fewer, or raise the bound."
            )
        total = sum(held.bytes for held in self._held.values())
        return self._leaving(wanted, len(leaving), total - self.max_bytes)

    def _check_unused(self, names: Collection[str]) -> None:
        if busy := [name for name in names if self._uses[name]]:
            raise _BusyError(
                f"{busy[0]!r} is in use by a call, and its files changed or it is to leave; wait "
                "until the call has ended."
            )

    def _active(self) -> list[str]:
        return self._model.active_adapters if isinstance(self._model, PeftModel) else []

    def _activate(self, names: list[str]) -> None:
        """Make adapters the active ones, frozen, unless they are; none by an empty list."""
        model = self._peft_model()
        if model.active_adapters != names:
            model.base_model.activate(names, inference_mode=True)

    def _drop(self, name: str) -> None:
        """Take an adapter off the model. If it was the only active one, none is active then."""
        model = self._peft_model()
        if model.active_adapters == [name]:
            self._activate([])
        model.delete_adapter(name)
        del self._held[name]
