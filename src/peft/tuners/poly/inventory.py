# SPDX-License-Identifier: Apache-2.0
"""Change the tasks and skills of a Poly adapter, and the mixing weights of its tasks.

`PolyModel` has a method for each, which documents the arguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...base.errors import PeftNotSupportedError, PeftTypeError, PeftValueError
from ...base.plain_values import plain
from ...base.suggestions import did_you_mean
from ...base.tensors import ordinary_tensors
from ...base.validation import is_int
from ...core.routing.task_ids import name_offences, names_shown, one_task
from .adapter import PolyAdapter, Task, Tasks
from .gating import gates, normalize
from .router import TaskRouter

if TYPE_CHECKING:
    from .config import PolyConfig

# Keywords for the routing of a new task.
_STARTS = ("mean", "uniform")

WeightTable: TypeAlias = Tensor | Sequence[object]


@ordinary_tensors()
def add_tasks(adapter: PolyAdapter, tasks: int | Sequence[str], init: Task = "mean") -> None:
    """Append tasks. Outputs for the others do not change."""
    config = adapter.config
    count, names = _new_tasks(config, tasks)
    start = init if adapter.is_keyword(init, _STARTS, "init") else _source(config, init)
    _select(adapter, [*range(config.n_tasks), *[None] * count], names, start)


@ordinary_tensors()
def remove_tasks(adapter: PolyAdapter, tasks: Tasks) -> None:
    """Remove tasks; later ones move up. Outputs for the others do not change."""
    gone = set(adapter.task_numbers(tasks))
    remaining = [task for task in range(adapter.config.n_tasks) if task not in gone]
    if not remaining:
        raise PeftValueError("An adapter needs a task; to remove all of them use `delete_adapter`.")
    _select_old(adapter, remaining)


@ordinary_tensors()
def reorder_tasks(adapter: PolyAdapter, order: Sequence[Task]) -> None:
    """Give the tasks other ids. The outputs for a task do not change."""
    numbers, n_tasks = adapter.task_numbers(order, "order"), adapter.config.n_tasks
    if sorted(numbers) != list(range(n_tasks)):
        raise PeftValueError(
            f"`order`={order!r} must have each of the adapter's {n_tasks} tasks once."
        )
    _select_old(adapter, numbers)


def _select_old(adapter: PolyAdapter, tasks: list[int]) -> None:
    """Keep some tasks, in the given order."""
    if adapter.name in adapter.tuner.merged_adapters:
        raise PeftValueError(
            f"Adapter {adapter.name} is merged for one of its tasks; call `unmerge_adapter` before "
            "changing their ids."
        )
    names = adapter.config.task_names
    trained = any(p.requires_grad for p in adapter.tuner.parameters())
    _select(adapter, tasks, names and [names[task] for task in tasks])
    if trained:
        adapter.warn_if_frozen()


def _select(
    adapter: PolyAdapter,
    origin: Sequence[int | None],
    names: list[str] | None,
    start: Task = "uniform",
) -> None:
    """Change the tasks of every router and of task-specific skills. `origin` has the number that
    each task had, None for a new one; new tasks start as "mean", "uniform", or from the task of
    number `start`.
    """
    adapter.check_unsharded("change its tasks")
    # All memory is taken first, so that an error leaves the adapter as it was.
    routers = dict.fromkeys(adapter.task_routers().values())
    logits = [_select_logits(r.module_logits.detach(), origin, start) for r in routers]
    task_skills = list(adapter.task_skills().values())
    factors = [skills.selected(origin, start) for skills in task_skills]
    for router, values in zip(routers, logits, strict=True):
        router.replace(values, origin)
    for skills, (A, B) in zip(task_skills, factors, strict=True):
        skills.A.replace(A, origin)
        skills.B.replace(B, origin)
    for layer in adapter.layers.values():
        layer.n_tasks[adapter.name] = len(origin)
    adapter.config.n_tasks, adapter.config.task_names = len(origin), names


def _select_logits(logits: Tensor, origin: Sequence[int | None], start: Task) -> Tensor:
    """Return the logits of other tasks; arguments are those of `_select`."""
    if isinstance(start, int):
        row = logits[start]
    elif start == "mean":  # of the gates
        row = logits.double().sigmoid().mean(0).clamp(1e-30, 1 - 1e-15).logit().to(logits)
    else:
        row = torch.zeros_like(logits[0])
    index = [len(logits) if task is None else task for task in origin]
    return torch.cat([logits, row.unsqueeze(0)])[index]


@torch.no_grad()
def set_router_weights(
    adapter: PolyAdapter, weights: WeightTable | Mapping[str, WeightTable]
) -> None:
    """Set the weights with which each task mixes the skills."""
    adapter.check_readable(written=True)
    routers = adapter.task_routers()
    tables = weights if isinstance(weights, Mapping) else dict.fromkeys(routers, weights)
    if unknown := sorted(set(tables) - set(routers)):
        raise PeftValueError(
            f"{unknown} are not paths of layers that route by task; those are "
            f"{names_shown(list(routers))}.{did_you_mean(str(unknown[0]), routers)}"
        )
    logits = {path: _logits_of(table, routers[path], path) for path, table in tables.items()}
    for path, values in logits.items():
        routers[path].overwrite(values)


@ordinary_tensors()
def add_skills(adapter: PolyAdapter, n: int) -> None:
    """Add skills to every layer. Outputs in evaluation change by rounding only."""
    if not is_int(n) or n < 1:
        raise PeftValueError(f"`n`={n!r} must be an integer of at least 1.")
    _check_can_grow(adapter)
    adapter.check_unsharded("add skills")
    name, config = adapter.name, adapter.config
    routers = adapter.task_routers()
    # All memory is taken first, so that an error leaves the adapter as it was.
    grown: dict[str, list[nn.Parameter]] = {}
    for path, layer in adapter.layers.items():
        old = routers[path].module_logits, layer.poly_lora_A[name], layer.poly_lora_B[name]
        grown[path] = [
            nn.Parameter(new, requires_grad=parameter.requires_grad)
            for new, parameter in zip(grow_skills(*old, n), old, strict=True)
        ]
    for path, layer in adapter.layers.items():
        router = routers[path]
        router.close_rows()
        router.module_logits, layer.poly_lora_A[name], layer.poly_lora_B[name] = grown[path]
        router.n_skills += n
        layer.n_skills[name] += n
    config.n_skills += n
    config.n_skills_pattern = {key: count + n for key, count in config.n_skills_pattern.items()}


def _check_can_grow(adapter: PolyAdapter) -> None:
    """Check that a skill's weight can be shared between the skill and its clone."""
    config = adapter.config
    required = {
        "straight_through": False,
        "n_shared_skills": 0,
        "eval_top_k": None,
        "router_granularity": "linear",
    }
    other = [field for field, value in required.items() if getattr(config, field) != value]
    if other or config.routes_by_input:
        cause = f"`{other[0]}`={getattr(config, other[0])!r}" if other else "routing by input"
        raise PeftNotSupportedError(
            f"Skills can't be added to adapter {adapter.name} without a change of what it "
            f"computes: {cause}."
        )


def grow_skills(
    logits: Tensor, A: Tensor, B: Tensor, extra: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Add skills to an inventory without changing any task's function in evaluation.

    Each split clones its most used skills (by mean weight over tasks). A clone shares its parent's
    gate, `σ(l) = f·σ(l) + (1 − f)·σ(l)`, with a random `f` in (0.25, 0.75) for each task, so that
    tasks train parent and clone differently. Sums of gates, and so mixtures, stay the same. If
    `extra` exceeds the number of skills, the inventory doubles as often as needed. In training
    parent and clone draw their gates separately, so a task's weights vary slightly less.

    Args:
        logits: `[n_tasks, n_splits·n_skills]`.
        A: `[n_splits, n_skills, in // n_splits, r]`.
        B: `[n_splits, n_skills, r, out // n_splits]`.
        generator: The source of the fractions.

    Returns:
        `logits [n_tasks, n_splits·(n_skills + extra)]`, and `A` and `B` with `n_skills + extra`
        skills, the new ones last, in their dtypes.

    Source: arXiv:2202.13914, section 3 (the gates)
    """
    n_splits, n_skills = A.shape[:2]
    clones = min(extra, n_skills)
    if clones <= 0:
        return logits, A, B

    table = logits.reshape(-1, n_splits, n_skills)
    usage = normalize(gates(table, training=False)).mean(dim=0)
    parents = usage.topk(clones, dim=-1).indices
    index = parents.expand(table.shape[0], -1, -1)
    shared = table.gather(-1, index)
    device = generator.device if generator is not None else shared.device
    dtype = torch.promote_types(shared.dtype, torch.float32)
    drawn = torch.rand(shared.shape, generator=generator, dtype=dtype, device=device)
    fraction = 0.25 + 0.5 * drawn.to(shared.device)
    kept = table.scatter(-1, index, _scale_gate(shared, 1 - fraction))
    grown = torch.cat((kept, _scale_gate(shared, fraction)), dim=-1).flatten(-2)

    split = torch.arange(n_splits, device=parents.device).unsqueeze(-1)
    A = torch.cat((A, A[split, parents]), dim=1)
    B = torch.cat((B, B[split, parents]), dim=1)
    return grow_skills(grown, A, B, extra - clones, generator)


def _scale_gate(logits: Tensor, factor: Tensor) -> Tensor:
    """Return the logits of `factor · σ(logits)` for factors well below 1, without cancellation."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scaled = factor.log() + F.logsigmoid(wide) - torch.log1p(-factor * wide.sigmoid())
    return scaled.to(logits.dtype)


def _new_tasks(config: PolyConfig, tasks: object) -> tuple[int, list[str] | None]:
    """Return the number of tasks to add, and the names of all tasks afterwards."""
    tasks = plain(tasks)
    if isinstance(tasks, int) and not isinstance(tasks, bool):
        if tasks < 1:
            raise PeftValueError(f"`tasks`={tasks} must be at least 1.")
        if config.task_names is not None:
            raise PeftValueError(
                f"The adapter's tasks have names; pass {tasks} names in place of their number."
            )
        return tasks, None
    # The order of names gives the ids, and a set has none.
    is_list = isinstance(tasks, Iterable) and not isinstance(tasks, (str, bytes, set, frozenset))
    entries = list(tasks) if isinstance(tasks, Iterable) else []
    new = [task for task in entries if isinstance(task, str)]
    if not is_list or len(new) < len(entries):
        meant = f" Did you mean [{tasks!r}]?" if isinstance(tasks, str) else ""
        raise PeftTypeError(f"`tasks`={tasks!r} must be a number or a list of names.{meant}")
    old = config.task_names or [str(i) for i in range(config.n_tasks)]
    if offence := next(chain(() if new else ["it names none"], name_offences([*old, *new])), None):
        raise PeftValueError(
            f"`tasks`={new} must be new, different names; {offence}. The adapter has "
            f"{names_shown(old)}."
        )
    return len(new), [*old, *new]


def _source(config: PolyConfig, init: object) -> int:
    """Return the number of the task that new ones start from."""
    names = config.task_names or ()
    if init is None or (isinstance(init, str) and init not in names):
        near = did_you_mean(str(init), [*_STARTS, *names])
        raise PeftValueError(
            f"`init`={init!r} must be 'mean', 'uniform', or the id or name of a task; the "
            f"adapter's are {names_shown(names) if names else f'0 to {config.n_tasks - 1}'}.{near}"
        )
    return one_task(init, config, "init")


def _logits_of(weights: WeightTable, router: TaskRouter, path: str) -> Tensor:
    """Return the logits `[n_tasks, n_splits·n_skills]` that give a table of mixing weights."""
    logits = router.module_logits
    n_tasks, shape = logits.shape[0], (logits.shape[0], router.n_splits, router.n_skills)
    try:
        is_complex = torch.as_tensor(weights).is_complex()
        w = torch.as_tensor(weights, dtype=None if is_complex else torch.float64).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise PeftTypeError(
            f"`{path}`: weights must be a table of numbers, not {type(weights).__name__}: {error}."
        ) from None
    if is_complex:
        raise PeftTypeError(f"`{path}`: weights must be real numbers, not {w.dtype}.")
    if w.shape == (n_tasks, router.n_skills):
        w = w.unsqueeze(1).expand(shape)
    if w.shape != shape:
        raise PeftValueError(
            f"`{path}`: weights of shape {list(w.shape)} must be {[n_tasks, router.n_skills]} or "
            f"{list(shape)}."
        )
    if not torch.isfinite(w).all() or (w < 0).any() or (w.sum(-1) == 0).any():
        raise PeftValueError(
            f"`{path}`: weights must be finite, not negative, and not all zero for a task."
        )
    if router.gating.always_on:
        raise PeftValueError(
            f"`{path}`: a task's weights can't be set where "
            f"`n_shared_skills`={router.gating.always_on} are always on."
        )
    if router.gating.hard:  # gates are 0 or 1: skills with any weight are on
        return torch.where(w > 0, 1.0, -1.0).flatten(1).to(logits)
    gates = w / (2 * w.sum(-1, keepdim=True))
    return gates.clamp(min=torch.finfo(torch.float32).tiny).logit().flatten(1).to(logits)
