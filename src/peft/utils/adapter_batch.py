# SPDX-License-Identifier: Apache-2.0
"""What travels beside a call of the model, because the model does not hand it down to its layers.

A `CallStack` holds it while the call runs, and puts it back while backward runs layers again (gradient checkpointing). The choice
of an adapter for each sample, `adapter_names`, travels this way for all methods: an `AdapterBatch` on the stack `ADAPTER_BATCHES`.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .error import PeftTypeError, PeftValueError

T = TypeVar("T")

# The name that chooses no adapter for a sample.
BASE_MODEL = "__base__"
# Keyword arguments under which models take the tensor whose rows are the samples.
_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values", "inputs")


class _Thread(threading.local):
    """The calls of one thread: several may run the model at a time."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.replayed: Any = None


class CallStack(Generic[T]):
    """The calls in progress, the innermost last."""

    def __init__(self) -> None:
        self._thread = _Thread()

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts with no call in progress."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._thread = _Thread()

    @property
    def current(self) -> T | None:
        """The innermost call in progress, or the one whose backward is."""
        return self._thread.calls[-1] if self._thread.calls else self._thread.replayed

    @property
    def calls(self) -> list[T]:
        """The calls in progress; to be changed by what begins and ends them."""
        return self._thread.calls

    @contextmanager
    def during(self, call: T) -> Iterator[T]:
        """A call in progress while the context is open."""
        self._thread.calls.append(call)
        try:
            yield call
        finally:
            self._thread.calls.remove(call)

    def replay_in_backward(self, call: T, output: Any) -> None:
        """Put an ended call back when backward reaches its output, should it run layers again; they come after it."""
        if torch.is_grad_enabled() and not self._thread.calls and not torch.compiler.is_compiling():
            for tensor in _tensors(output):
                if tensor.grad_fn is not None:
                    tensor.register_hook(_Replay(self, call))

    def _replay(self, call: T) -> None:
        self._thread.replayed = call
        torch.autograd.Variable._execution_engine.queue_callback(self._forget)  # type: ignore[attr-defined]

    def _forget(self) -> None:
        self._thread.replayed = None


class _Replay:
    """A tensor hook that puts a call back."""

    def __init__(self, stack: CallStack, call: Any) -> None:
        self.stack, self.call = stack, call

    def __call__(self, gradient: Tensor) -> None:
        self.stack._replay(self.call)


class AdapterBatch:
    """The adapter that each sample of a call runs with.

    Args:
        names: An adapter's name for each sample, or `"__base__"` for none.

    Attributes:
        samples: Numbers of the samples, by adapter.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.size = len(names)
        self.samples: dict[str, list[int]] = {}
        for sample, name in enumerate(names):
            self.samples.setdefault(name, []).append(sample)
        self._rows: dict[tuple[int, torch.device], dict[str, Tensor]] = {}
        self._numbers: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        self._owners: dict[tuple[tuple[str, ...], int, torch.device], tuple[Tensor, Tensor]] = {}

    def rows(self, tensor: Tensor) -> dict[str, Tensor]:
        """The rows of a layer's input, by adapter. Each sample has the same number of successive rows: its beams, or its tokens
        where the model flattens them.

        Raises:
            PeftValueError: The rows can't be shared out evenly.
        """
        total = tensor.shape[0]
        key = total, tensor.device
        if key not in self._rows:
            if total % self.size:
                raise PeftValueError(f"A layer sees {total} rows, which {self.size} `adapter_names` can't share out evenly.")
            each = total // self.size
            self._rows[key] = {
                name: torch.tensor([s * each + i for s in samples for i in range(each)], device=tensor.device)
                for name, samples in self.samples.items()
            }
        return self._rows[key]

    def part(self, samples: dict[str, list[int]]) -> AdapterBatch:
        """The same call, of which only some samples run with an adapter."""
        part = copy.copy(self)
        part.samples = samples
        part._rows = {key: {name: rows[name] for name in samples} for key, rows in self._rows.items()}
        return part

    def numbers(self, values: tuple[int, ...], device: torch.device) -> Tensor:
        """Integers as a tensor, which all layers of a call that ask for the same share: making one waits for the device."""
        key = values, device
        if key not in self._numbers:
            self._numbers[key] = torch.tensor(values, device=device)
        return self._numbers[key]

    def owners(self, names: tuple[str, ...], tensor: Tensor) -> tuple[Tensor, Tensor]:
        """The rows, of a layer's input, of the samples that run with some adapters, and the number of the adapter that each has;
        in the order of the rows.
        """
        key = names, tensor.shape[0], tensor.device
        if key not in self._owners:
            rows = self.rows(tensor)
            own = torch.cat([rows[name] for name in names])
            number = torch.cat([torch.full_like(rows[name], i) for i, name in enumerate(names)])
            order = own.argsort()
            self._owners[key] = own[order], number[order]
        return self._owners[key]


ADAPTER_BATCHES: CallStack[AdapterBatch] = CallStack()


def adapter_batch(names: Any, known: Mapping[str, Any], args: tuple[Any, ...], arguments: Mapping[str, Any]) -> AdapterBatch:
    """The choice of adapters for a call, checked.

    Args:
        names: What the caller passed as `adapter_names`.
        known: The model's adapters by name.
        args, arguments: Positional and keyword arguments of the call.

    Raises:
        PeftTypeError: Not a list of strings.
        PeftValueError: An unknown name, or not one for each sample.
    """
    if isinstance(names, str) or not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise PeftTypeError(f"`adapter_names`={names!r} must be a list with an adapter's name for each sample.")
    unknown = sorted({name for name in names if name not in known and name != BASE_MODEL})
    if unknown:
        raise PeftValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; this model has {', '.join(known)}, and "
            f"{BASE_MODEL!r} means none."
        )
    inputs = first_input(args, arguments)
    samples = len(names) if inputs is None else inputs.shape[0]
    if len(names) != samples or not names:
        raise PeftValueError(
            "Length of `adapter_names` should be the same as the number of inputs, "
            f"but got {len(names)} and {samples} respectively."
        )
    return AdapterBatch(names)


def first_input(args: tuple[Any, ...], arguments: Mapping[str, Any], besides: tuple[str, ...] = ()) -> Tensor | None:
    """The tensor whose rows are the samples: the first positional argument, or the first that is known by name or is one and not
    among `besides`.
    """
    candidates = [*args, *(arguments.get(name) for name in _INPUTS)]
    candidates += [value for name, value in arguments.items() if name not in besides]
    return next((value for value in candidates if isinstance(value, Tensor) and value.dim() > 0), None)


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in a model's output."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)
