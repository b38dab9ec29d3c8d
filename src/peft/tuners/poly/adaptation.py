# SPDX-License-Identifier: Apache-2.0
"""New tasks from few examples: which part of an adapter trains, adapters made of one, and a task's routing fitted in seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ...utils.error import PeftTypeError, PeftValueError
from .. import _combining
from .._combining import Combined
from .inventory import InventoryTuner
from .layer import is_fixed
from .mixing import task_factors
from .regimes import Regime, regime_named
from .router import InputRouter, TaskRouter


@dataclass
class TaskFit:
    """What fitting a task's routing came to.

    Attributes:
        task: The task's id.
        losses: The loss before each step, and last after all.
        seconds: How long it took.
        start: The task whose routing it started from, None where it was not another's.
    """

    task: int
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    start: int | None = None


class AdaptingTuner(InventoryTuner):
    """A tuner whose adapters can be trained in part."""

    def train_only(
        self,
        *,
        skills: bool = False,
        tasks: Any = None,
        companions: bool = False,
        adapter_name: str | None = None,
    ) -> None:
        """Say what of an adapter trains: its skills, the routing of some tasks, or both. All else is frozen.

        The rows of tasks become parameters by themselves (in the memory of the table), so that an optimiser sees no other: those
        have no gradient, no weight decay and no state. Make the optimiser afterwards. `set_adapter` trains all again.

        Args:
            skills: Whether the skills train.
            tasks: Whose routing trains: ids or names, "all", or None for no one's. Input routing trains with "all".
            companions: Whether modules and embedding rows train that the adapter has beside its layers.
            adapter_name: By default the active adapter.

        Raises:
            PeftTypeError, PeftValueError: A task is unknown; nothing is changed.
            PeftRuntimeError: The model is sharded already.

        Example:
            >>> from torch import nn
            >>> from peft import PolyConfig, get_peft_model
            >>> config = PolyConfig(r=2, n_tasks=2, n_skills=2, task_names=["sum", "max"], target_modules=["0"])
            >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 6)), config)
            >>> model.add_tasks(["sort"])
            >>> model.train_only(tasks=["sort"])
            >>> [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
            [('base_model.model.0.poly_router.default.rows.0', (1, 2))]

        Source: arXiv:2211.03831, section 3.3
        """
        every, name = isinstance(tasks, str) and tasks == "all", self.one_adapter(adapter_name)
        numbers = [] if every or tasks is None else self.task_numbers(self.task_routed(name), tasks)
        for other in self.peft_config:
            self.set_requires_grad(other, False)
        for wrapper in self.auxiliary_wrappers():
            wrapper.set_requires_grad(name, companions)
        for _, layer in self.poly_layers(name):
            for holder in (layer.poly_lora_A, layer.poly_lora_B):
                holder[name].requires_grad_(skills)
            router = layer.router(name)
            if every and not is_fixed(router):
                router.requires_grad_(True)
            elif numbers and isinstance(router, TaskRouter) and not is_fixed(router) and router.opened != sorted(set(numbers)):
                router.open_rows(numbers)

    def begin_regime(
        self, regime: str, tasks: Any = None, adapter_name: str | None = None, new_adapter: str | None = None
    ) -> Regime:
        """Set an adapter up as a regime of the multi-head routing paper adapts it to new tasks. `REGIMES` describes all.

        Args:
            regime: "Z", "full", "mu-Z", "mu", "random" or "shared"; "μ" may stand for "mu".
            tasks: The new tasks, by id or name, which the adapter has already (`add_tasks`). "mu" and "shared" make an adapter of
                one task and take none.
            adapter_name: By default the active adapter.
            new_adapter: Name of the adapter that "mu", "random" and "shared" make, by default the old one's with the regime's. It
                becomes the active one; the old one stays as it is.

        Returns:
            The regime, with the paper's learning rates.

        Raises:
            PeftValueError: The regime or a task is unknown, or tasks are missing.

        Source: arXiv:2211.03831, section 3.3 and 4
        """
        chosen = regime_named(regime)
        name = self.task_routed(adapter_name)
        if chosen.needs_tasks != (tasks is not None):
            raise PeftValueError(
                f"Regime {chosen.name!r} takes {'the new tasks' if chosen.needs_tasks else 'no tasks'}: {tasks!r}."
            )
        numbers = None if tasks is None else self.task_numbers(name, tasks)
        if chosen.name == "mu":
            name = self._activate_new(name, new_adapter or f"{name}_mu", self.average_skills)
        elif chosen.name in ("shared", "random"):
            name = self._activate_new(name, new_adapter or f"{name}_{chosen.name}", self._redraw, shared=chosen.name == "shared")
        elif chosen.name == "mu-Z":
            for router in dict.fromkeys(self.task_routers(name).values()):
                with torch.no_grad():
                    router.module_logits[numbers] = 0
        self.train_only(skills=chosen.skills, tasks=numbers if chosen.routing else None, adapter_name=name)
        if chosen.name == "mu-Z":
            self._hold_routing(name)
        return chosen

    def _hold_routing(self, name: str) -> None:
        """Take a task's weights as they are in training too."""
        for router in dict.fromkeys(self.task_routers(name).values()):
            router.fixed, router.how = True, router.how._replace(relaxed=False, dropout=0.0)
        self.peft_config[name].routing = "fixed"  # type: ignore[attr-defined]

    def _activate_new(self, source: str, new: str, make: Callable[..., None], **options: Any) -> str:
        make(new, adapter_name=source, **options)
        self.set_adapter(new)
        return new

    # --- adapters made of one -------------------------------------------------------------------------------------------

    def average_skills(self, new_adapter: str, adapter_name: str | None = None) -> None:
        """Make an adapter of one task whose only skill is the mean of an adapter's skills. It waits, frozen, until `set_adapter`.

        Args:
            new_adapter: Its name.
            adapter_name: By default the active adapter.

        Raises:
            PeftValueError: There is no such adapter, or the new name can't be used.

        Source: arXiv:2211.03831, section 3.3 (MHR-μ)
        """
        adapter_name = self.one_adapter(adapter_name)
        layers = dict(self.poly_layers(adapter_name))
        equal = {
            path: layer.poly_lora_A[adapter_name].new_ones(layer.poly_lora_A[adapter_name].shape[:2])
            for path, layer in layers.items()
        }
        self._one_skill(new_adapter, adapter_name, {path: w / w.shape[1] for path, w in equal.items()})

    def extract_tasks(self, new_adapter: str, tasks: Any, adapter_name: str | None = None) -> None:
        """Make a smaller adapter of some tasks, which compute what they did. It waits, frozen, until `set_adapter`.

        Args:
            new_adapter: Its name.
            tasks: Ids or names: the new adapter has these, in this order, and all skills. A dictionary with a share for each: the
                new adapter has one task and one skill, the blend whose skills are mixed by the sum of the tasks' weights, each
                times its share; `{task: 1.0}` is one task as it was.
            adapter_name: By default the active adapter.

        Raises:
            PeftTypeError: A task is neither a number nor a name.
            PeftValueError: A task is unknown or comes twice, or the new name can't be used; nothing is changed.
        """
        name = self.task_routed(adapter_name)
        if isinstance(tasks, Mapping):
            shares = {self.task_numbers(name, task)[0]: float(share) for task, share in tasks.items()}
            weights = {
                path: sum((router.task_weights()[task] * share for task, share in shares.items()), torch.zeros(()))
                for path, router in self._all_task_routers(name).items()
            }
            self._one_skill(new_adapter, name, weights)
            return
        numbers = self.task_numbers(name, tasks)
        if len(set(numbers)) != len(numbers):
            raise PeftValueError(f"`tasks`={tasks!r} has a task twice.")
        config: Any = self.peft_config[name]
        tensors: dict[str, Tensor] = {}
        for path, layer in self.poly_layers(name):
            for holder in ("poly_lora_A", "poly_lora_B"):
                tensors[f"{path}.{holder}"] = getattr(layer, holder)[name].detach().clone()
        for path, router in self._firsts(name):
            key = "module_logits" if isinstance(router, TaskRouter) else "weight"
            table = getattr(router, key).detach()
            tensors[f"{path}.poly_router.{key}"] = (table[numbers] if isinstance(router, TaskRouter) else table).clone()
        names = config.task_names and [config.task_names[task] for task in numbers]
        _combining.derive(self, new_adapter, name, Combined(replace(config, n_tasks=len(numbers), task_names=names), tensors))

    def _firsts(self, name: str) -> Iterator[tuple[str, Any]]:
        """An adapter's routers, each once, with the path of the first layer that has it."""
        seen: set[int] = set()
        for path, layer in self.poly_layers(name):
            router = layer.router(name)
            if id(router) not in seen:
                seen.add(id(router))
                yield _combining.outer_path(path), router

    def _all_task_routers(self, name: str) -> dict[str, TaskRouter]:
        """The routers by path, all of which have to route by task.

        Raises:
            PeftValueError: Some layer routes by input.
        """
        routers = self.task_routers(name)
        by_input = [path for path, layer in self.poly_layers(name) if isinstance(layer.router(name), InputRouter)]
        if by_input:
            raise PeftValueError(f"`{by_input[0]}` routes by input; there are no weights to make one skill with.")
        return routers

    def _one_skill(self, new_adapter: str, name: str, weights: Mapping[str, Tensor]) -> None:
        """Make an adapter of one task and one skill, which is a mixture: weights `[n_splits, n_skills]` by path."""
        config: Any = self.peft_config[name]
        tensors: dict[str, Tensor] = {}
        for path, layer in self.poly_layers(name):
            A, B = layer.poly_lora_A[name].detach(), layer.poly_lora_B[name].detach()
            left, right = task_factors(weights[path].to(A.dtype), A, B)
            key = _combining.outer_path(path)
            tensors[f"{key}.poly_lora_A"], tensors[f"{key}.poly_lora_B"] = left.T[None, None], right.T[None, None]
            tensors[f"{key}.poly_router.module_logits"] = A.new_zeros(1, 1)
        plain = {field: value for field, value in type(config).absent_values.items() if field not in _KEPT}
        small = replace(config, **{**plain, "poly_type": "poly", "n_tasks": 1, "n_skills": 1, "n_splits": 1})
        _combining.derive(self, new_adapter, name, Combined(small, tensors))

    def _redraw(self, new_adapter: str, adapter_name: str, shared: bool) -> None:
        """Add an adapter like another with values of its own; `shared`: with one task and one skill of as many parameters."""
        config: Any = self.peft_config[adapter_name]
        fields: dict[str, Any] = {}
        if shared:
            plain = {field: value for field, value in type(config).absent_values.items() if field not in _KEPT}
            ranks = {key: r * config.n_skills for key, r in config.rank_pattern.items()}
            fields = {**plain, "rank_pattern": ranks, "r": config.r * config.n_skills, "poly_type": "poly"}
            fields |= {"n_tasks": 1, "n_skills": 1, "n_splits": 1}
        self.add_adapter(new_adapter, replace(config, inference_mode=False, **fields))

    # --- fitting --------------------------------------------------------------------------------------------------------

    def fit_task(
        self,
        task: int | str,
        loss: Callable[[], Tensor] | Iterable[Mapping[str, Any]],
        steps: int = 40,
        lr: float = 0.1,
        init: str | None = None,
        adapter_name: str | None = None,
    ) -> TaskFit:
        """Fit a task's routing to a few examples, in place; nothing else of the model is touched. Takes seconds.

        The model runs in evaluation mode meanwhile (gates are not drawn, dropout is off) and Adam steps on the task's rows. What
        trains, and training mode, are as before when it is done. The rows that gave the least loss are kept.

        Args:
            task: Id or name of a task that the adapter has; see `add_tasks`.
            loss: A function that gives the loss of the model on the examples, called with no arguments and passing the task itself;
                or batches as keyword arguments for the model, whose output has a `loss`. `task_ids` are filled in there.
            steps: How many; each goes through one batch, or calls the function once.
            lr: Learning rate, by default the paper's for the router.
            init: None: from the task's present weights. "best": from those of the task that has the least loss on the examples, one
                forward for each task; "equal": from equal weights.
            adapter_name: By default the active adapter.

        Returns:
            The losses, and how long it took.

        Raises:
            PeftTypeError: `loss` is neither a function nor batches.
            PeftValueError: The task is unknown, or a value is not allowed; nothing is changed.

        Source: arXiv:2211.03831, section 3.3 (MHR-z)
        """
        name, begin = self.task_routed(adapter_name), perf_counter()
        number = self.task_numbers(name, task)[0]
        if name not in self.active_adapters or self.merged_adapters:
            raise PeftValueError(
                f"Adapter {name} must be active and not merged to be fitted; the active ones are {self.active_adapters}."
            )
        if steps < 0 or not lr > 0 or init not in (None, "best", "equal"):
            raise PeftValueError(
                f"`steps`={steps!r}, `lr`={lr!r} and `init`={init!r} must be at least 0, positive, and None, 'best' or 'equal'."
            )
        closure, batches = self._closure(loss, number)
        fit = TaskFit(number)
        routers = list(dict.fromkeys(self.task_routers(name).values()))
        with self._fitting(name, number), torch.enable_grad():
            if init is not None:
                fit.start = self._start_from(routers, number, init, closure, batches)
            parameters = [row for router in routers for row in router.rows]
            optimizer = torch.optim.Adam(parameters, lr=lr)
            best, kept = float("inf"), [row.detach().clone() for row in parameters]
            for step in range(steps + 1):
                value = closure()
                fit.losses.append(float(value.detach()))
                if fit.losses[-1] < best or batches > 1:  # losses of different batches do not compare
                    best, kept = fit.losses[-1], [row.detach().clone() for row in parameters]
                if step < steps:
                    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
                    for row, gradient in zip(parameters, gradients, strict=True):
                        row.grad = gradient
                    optimizer.step()
            with torch.no_grad():
                for row, values in zip(parameters, kept, strict=True):
                    row.copy_(values)
        fit.seconds = perf_counter() - begin
        return fit

    def _closure(self, loss: Any, task: int) -> tuple[Callable[[], Tensor], int]:
        """A function that gives the loss of the next batch, and after how many calls it has gone through all."""
        if callable(loss):
            return loss, 1
        batches = list(loss) if isinstance(loss, Iterable) else []
        if not batches or not all(isinstance(batch, Mapping) for batch in batches):
            raise PeftTypeError("`loss` must be a function without arguments, or batches: keyword arguments for the model.")
        turn = iter(range(1 << 62))

        def of_next() -> Tensor:
            return self(**{**batches[next(turn) % len(batches)], "task_ids": task}).loss

        return of_next, len(batches)

    @contextmanager
    def _fitting(self, name: str, task: int) -> Iterator[None]:
        """A context in which one task's rows train and the model is in evaluation mode."""
        parameters = [(p, p.requires_grad) for p in self.parameters()]
        modes = [(module, module.training) for module in self.modules()]
        routers = dict.fromkeys(self.task_routers(name).values())
        opened = [(router, router.rows, router.runs) for router in routers]
        self.eval()
        for p, _ in parameters:
            p.requires_grad_(False)
        for router in routers:
            router.open_rows([task])
        try:
            yield
        finally:
            for router, rows, runs in opened:
                router.rows, router.runs = rows, runs
            for p, required in parameters:
                p.requires_grad_(required)
            for module, training in modes:
                module.training = training

    @torch.no_grad()
    def _start_from(
        self, routers: Sequence[TaskRouter], task: int, init: str, closure: Callable[[], Tensor], batches: int
    ) -> int | None:
        """Give a task's rows the values they start from; the task they are from."""
        best: int | None = None
        if init == "best":
            least = float("inf")
            for other in range(len(routers[0].module_logits)):
                if other == task:
                    continue
                for router in routers:
                    router.module_logits[task] = router.module_logits[other]
                value = sum(float(closure()) for _ in range(batches))
                if value < least:
                    least, best = value, other
        for router in routers:
            router.module_logits[task] = 0 if best is None else router.module_logits[best]
        return best


# Additions of the config that say something else than how skills are mixed.
_KEPT = ("trainable_token_indices", "alpha", "rank_pattern")
