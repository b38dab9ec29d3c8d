# SPDX-License-Identifier: Apache-2.0
"""Run out of memory at each of torch's allocations in turn.

Each operation of a change (load, merge, switch, growing tasks …) that takes memory is made to raise
`torch.OutOfMemoryError`. After that the model is to the bit as it was, and the next try gives what
a change without a fault gives.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter

from .scenarios import METHODS, adapted, base, config, fresh, state_of


class OutOfMemoryAt(TorchDispatchMode):
    """Mode in which the allocation of a number raises; `seen` counts all of them."""

    def __init__(self, number: int | None = None) -> None:
        super().__init__()
        self.number = number
        self.seen = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation; if it took new memory, count it, and raise if it is the one."""
        result = function(*args, **(kwargs or {}))
        given = {_memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = {_memory(t) for t in tree_leaves(result) if isinstance(t, torch.Tensor)}
        if made - given - {0}:
            at, self.seen = self.seen, self.seen + 1
            if at == self.number:
                raise torch.OutOfMemoryError(f"no memory for {function}")
        return result


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or one that it was raised from, is the injected one."""
    return error is not None and (
        isinstance(error, torch.OutOfMemoryError) or _is_out_of_memory(error.__cause__)
    )


@dataclass
class Change:
    """A change of a model, made again from the start each time.

    Args:
        name: Its name in reports.
        model: Makes the model, from a folder with the adapter "saved".
        work: Changes it, or returns another model.
    """

    name: str
    model: Callable[[], nn.Module]
    work: Callable[[nn.Module, Path], nn.Module | None]
    method: str


def _two(method: str) -> PeftModel:
    """Return a model with two adapters."""
    model = adapted(method, 2)
    model.add_adapter("second", config(method, 2))
    return model


def changes() -> Iterator[Change]:
    """Yield the changes."""
    for method in METHODS:
        task = {"task_id": 1} if method == "POLY" else {}
        several: list[tuple[str, Callable[[], nn.Module], Callable[..., Any]]] = [
            ("load", base, lambda m, f: PeftModel.from_pretrained(m, f).eval()),
            (
                "load beside another",
                lambda method=method: adapted(method, 2, seed=1),
                lambda m, f: m.load_adapter(f, "second") and None,
            ),
            (
                "load over an adapter",
                lambda method=method: adapted(method, 2, seed=1),
                lambda m, f: m.load_adapter(f, "default", is_trainable=False) and None,
            ),
            (
                "add",
                lambda method=method: adapted(method, 2),
                lambda m, f, method=method: m.add_adapter("second", config(method, 2)),
            ),
            (
                "merge",
                lambda method=method: adapted(method, 2),
                lambda m, f, task=task: m.merge_adapter(**task),
            ),
            (
                "unmerge",
                lambda method=method, task=task: _merged(method, task),
                lambda m, f: m.unmerge_adapter(),
            ),
            (
                "merge and unload",
                lambda method=method: adapted(method, 2),
                lambda m, f, task=task: m.merge_and_unload(**task),
            ),
            ("switch", lambda method=method: _two(method), lambda m, f: m.set_adapter("second")),
            ("delete", lambda method=method: _two(method), lambda m, f: m.delete_adapter("second")),
        ]
        yield from (Change(f"{name} {method}", make, work, method) for name, make, work in several)
    yield Change(
        "hot swap LORA",
        lambda: adapted("LORA", 2, seed=1),
        lambda m, f: hotswap_adapter(m, str(f), "default"),
        "LORA",
    )
    poly: list[tuple[str, Callable[..., Any]]] = [
        ("add tasks", lambda m, f: m.add_tasks(1, init="mean")),
        ("remove a task", lambda m, f: m.remove_tasks(0)),
        ("reorder tasks", lambda m, f: m.reorder_tasks([1, 0])),
        ("add skills", lambda m, f: m.add_skills(1)),
        ("extract a task", lambda m, f: m.extract_tasks("one", [1])),
    ]
    for name, work in poly:
        yield Change(f"{name} POLY", lambda: adapted("POLY", 2), work, "POLY")
    yield Change(
        "combine LORA",
        lambda: _two("LORA"),
        lambda m, f: m.add_weighted_adapter(["default", "second"], [0.5, 2.0], "sum", "cat"),
        "LORA",
    )


def _merged(method: str, task: dict[str, int]) -> PeftModel:
    model = adapted(method, 2)
    model.merge_adapter(**task)
    return model


def exhausting(change: Change, folder: Path, seed: int = 0) -> Iterator[tuple[str, str | None]]:
    """Try a change with each operation failing; yield each and what was wrong, or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        place = fresh(folder)
        adapted(change.method, 2).save_pretrained(place)
        yield from _each(change, place, seed)


def _each(change: Change, place: Path, seed: int) -> Iterator[tuple[str, str | None]]:
    model = change.model()
    torch.manual_seed(seed)
    with OutOfMemoryAt() as counter:
        result = change.work(model, place)
    expected = state_of(_changed(model, result))
    for number in range(counter.seen):
        model = change.model()
        before, wrong = state_of(model), None
        torch.manual_seed(seed)
        try:
            with OutOfMemoryAt(number):
                result = change.work(model, place)
        except Exception as error:
            if not _is_out_of_memory(error):
                wrong = f"another error: {type(error).__name__}: {error}"
            elif state_of(model) != before:
                wrong = "the model has changed"
            else:
                torch.manual_seed(seed)
                result = change.work(model, place)
        if wrong is None and state_of(_changed(model, result)) != expected:
            wrong = "another model than without a fault"
        yield f"allocation {number}", wrong


def _changed(model: nn.Module, result: object) -> nn.Module:
    """Return the changed model: the one that the change returned, or the given one."""
    return result if isinstance(result, nn.Module) else model
