# SPDX-License-Identifier: Apache-2.0
"""What an adapter's routing looks like: tables by layer, split, task and skill, and how alike tasks
are.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ....base.containers import walk
from ....base.errors import PeftValueError
from ....checkpoint.files import write_report
from ....core.adapter_choice import adapter_of
from ..layer import PolyLayer
from ..router import TaskRouter
from . import metrics

# Lines of tasks and of layers that printing shows.
_SHOWN = 20
_MEASURES = ("entropy", "usage_entropy", "discreteness", "sparsity", "spread")


@dataclass(repr=False)
class RoutingReport:
    """An adapter's routing by task, in evaluation. Printing gives a table of the tasks, and one of
    the layers.

    Attributes:
        tasks: Names of the tasks, or "task_0", "task_1", ….
        weights: `[n_tasks, n_splits, n_skills]` by module path, on the CPU in float32 or wider.
        order: The tasks, by id, such that alike ones are near each other: the leaves of the tree of
            `merges`.
        similarity: `[n_tasks, n_tasks]`, the cosine of tasks' weights less their mean.
        merges: How tasks join to a tree, closest first: the two that join (a task's id, or
            `n_tasks + i` for what step `i` made), their distance (one minus similarity, the mean
            over pairs), and how many tasks they are together.
        layers: Of each layer the entropy of tasks' weights and of skills' use (0 to 1), the
            discreteness and sparsity of gates, the spread of weights over tasks (0 where all mix
            alike), and the use of each skill.
    """

    tasks: list[str]
    weights: dict[str, Tensor]
    order: list[int]
    similarity: Tensor
    merges: list[tuple[int, int, float, int]]
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"RoutingReport({len(self.tasks)} tasks, {len(self.weights)} layers)"

    def __str__(self) -> str:
        """Return two tables: each task, in `order`, with the one most like it; and each layer's
        measures with their means. Of many only the first are listed.
        """
        head = f"Routing in evaluation: tasks {len(self.tasks)}, layers {len(self.weights)}"
        return "\n".join([head, "", *self._task_lines(), "", *self._layer_lines()])

    def _task_lines(self) -> Iterator[str]:
        others = self.similarity.clone().fill_diagonal_(-torch.inf)
        width = max(len("most alike"), *map(len, self.tasks))
        yield f"{'task':{width}}  {'most alike':{width}}  cosine"
        for i in self.order[:_SHOWN]:
            j = int(others[i].argmax())
            alike = f"  {self.tasks[j]:{width}}  {float(others[i, j]):6.2f}" if j != i else ""
            yield f"{self.tasks[i]:{width}}{alike}"
        yield from _rest(self.order, "tasks")

    def _layer_lines(self) -> Iterator[str]:
        width = max(len("layer"), *map(len, self.layers))
        yield "  ".join([f"{'layer':{width}}", *_MEASURES, "most used"])
        for path, layer in list(self.layers.items())[:_SHOWN]:
            most = max(layer["usage"])
            best = f"skill {layer['usage'].index(most)} ({most:.0%})"
            yield "  ".join([f"{path:{width}}", *_aligned(layer), best])
        yield from _rest(self.layers, "layers")
        own, n = self.layers.values(), len(self.layers)
        means = {name: sum(layer[name] for layer in own) / n for name in _MEASURES}
        yield "  ".join([f"{'mean':{width}}", *_aligned(means)])

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row for each layer, split, task and skill with its `weight`."""
        for path, table in self.weights.items():
            for t, task in enumerate(self.tasks):
                for q, split in enumerate(table[t].tolist()):
                    for s, weight in enumerate(split):
                        yield {
                            "layer": path,
                            "task": task,
                            "split": q,
                            "skill": s,
                            "weight": weight,
                        }

    def to_pandas(self) -> dict[str, Any]:
        """Data frames, by name: "weights" with a row for each layer, split, task and skill;
        "layers" with the measures of each; "usage" with the use of each skill by layer;
        "similarity" of tasks, in `order`.
        """
        import pandas

        names = [self.tasks[i] for i in self.order]
        similarity = self.similarity[self.order][:, self.order]
        measures = {
            path: {k: v for k, v in layer.items() if k != "usage"}
            for path, layer in self.layers.items()
        }
        return {
            "weights": pandas.DataFrame(list(self.rows())),
            "layers": pandas.DataFrame.from_dict(measures, orient="index").rename_axis("layer"),
            "usage": pandas.DataFrame.from_dict(
                {p: layer["usage"] for p, layer in self.layers.items()}, orient="index"
            ).rename_axis("layer"),
            "similarity": pandas.DataFrame(similarity.numpy(), index=names, columns=names),
        }

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        return {
            "tasks": self.tasks,
            "weights": {path: table.tolist() for path, table in self.weights.items()},
            "layers": self.layers,
            "similarity": self.similarity.tolist(),
            "order": self.order,
            "merges": [list(merge) for merge in self.merges],
        }

    def save_json(self, path: str | os.PathLike) -> None:
        """Write all of it to a file; its folder is made if missing."""
        write_report(path, self.to_dict())

    def plot(self, path: str | os.PathLike | None = None) -> Any:
        """Draw the tree of tasks, their weights in all layers, and the use of skills by layer, in
        matplotlib.

        Args:
            path: Where to save the figure (the end of the name says in which form); None leaves
                that to the caller.

        Returns:
            The figure.
        """
        from .plotting import draw

        figure = draw(self)
        if path is not None:
            figure.savefig(path)
        return figure


def routing_report(model: nn.Module, adapter_name: str | None = None) -> RoutingReport:
    """Tables of how an adapter mixes its skills for each task in evaluation.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into.
        adapter_name: The adapter; by default the one called "default", else the only one that is
            active.

    Returns:
        The tables. Layers that share a router are one, with the first of their paths.

    Raises:
        PeftValueError: There is no such adapter, several could be meant, or no layer of it routes
            by task.

    Example:
        >>> from peft import PolyConfig, get_peft_model
        >>> config = PolyConfig(n_tasks=3, n_skills=2, target_modules=["0"])
        >>> report = routing_report(get_peft_model(nn.Sequential(nn.Linear(4, 6)), config))
        >>> report.tasks, list(report.weights), report.similarity.shape
        (['task_0', 'task_1', 'task_2'], ['0'], torch.Size([3, 3]))

    Source: arXiv:2202.13914, section 5 (measures, and the hierarchy of tasks)
    """
    root = model.base_model.model if "base_model" in model._modules else model  # type: ignore[union-attr]
    adapter_name = adapter_of(model, adapter_name, PolyLayer, " of Poly")
    weights, gates = {}, {}
    seen: set[int] = set()
    with torch.no_grad():
        for path, layer in walk(root):  # type: ignore[arg-type]
            router = (
                layer.router(adapter_name)
                if isinstance(layer, PolyLayer) and adapter_name in layer.scaling
                else None
            )
            if isinstance(router, TaskRouter) and id(router) not in seen:
                seen.add(id(router))
                table = router.task_weights().detach().cpu()
                weights[path] = table
                gates[path] = router.task_gates().detach().cpu()
    if not weights:
        raise PeftValueError(
            f"Adapter {adapter_name} routes by input and has no tables by task; `recorded_routing` "
            "keeps what it chooses in a call."
        )
    config: Any = model.peft_config[adapter_name]  # type: ignore[index]
    tasks = list(config.task_names or (f"task_{i}" for i in range(config.n_tasks)))
    similarity = metrics.task_similarity(
        torch.cat([table.flatten(1) for table in weights.values()], 1).double()
    )
    merges, order = join_closest(similarity)
    return RoutingReport(
        tasks,
        weights,
        order,
        similarity,
        merges,
        {path: _measures(w, gates[path]) for path, w in weights.items()},
    )


def _aligned(measures: Mapping[str, float]) -> list[str]:
    """Return a row's measures, each under its heading."""
    return [f"{measures[name]:{len(name)}.3f}" for name in _MEASURES]


def _rest(entries: Collection[Any], kind: str) -> list[str]:
    """Return a line that says how many entries are not listed, if any."""
    return [f"… {len(entries) - _SHOWN} more {kind}"] if len(entries) > _SHOWN else []


def _measures(weights: Tensor, gates: Tensor) -> dict[str, Any]:
    """A layer's measures."""
    use = metrics.usage(weights)
    return {
        "discreteness": float(metrics.discreteness(gates)),
        "sparsity": float(metrics.sparsity(gates)),
        "entropy": float(metrics.entropy(weights).mean()),
        "usage_entropy": float(metrics.entropy(use)),
        "spread": float(metrics.spread(weights)),
        "usage": use.tolist(),
    }


def join_closest(similarity: Tensor) -> tuple[list[tuple[int, int, float, int]], list[int]]:
    """Join what is closest until all is one, by the mean distance of pairs (average linkage).

    Args:
        similarity: `[n, n]`, symmetric; the distance is one minus it.

    Returns:
        The joins as in `RoutingReport.merges`, which is the form of scipy's linkage; and the leaves
        of the tree from left to right.

    Source: Sokal & Michener (1958), the unweighted pair-group method
    """
    n = len(similarity)
    distance = (1 - similarity).clamp(min=0).double()
    distance = ((distance + distance.T) / 2).fill_diagonal_(torch.inf)
    ids, groups = list(range(n)), [[i] for i in range(n)]  # of the places in `distance`
    merges: list[tuple[int, int, float, int]] = []
    for step in range(n - 1):
        a, b = sorted(divmod(int(distance.argmin()), n))
        x, y = len(groups[a]), len(groups[b])
        merges.append((ids[a], ids[b], float(distance[a, b]), x + y))
        joined = (x * distance[a] + y * distance[b]) / (x + y)
        distance[a], distance[:, a] = joined, joined
        distance[a, a] = distance[b] = distance[:, b] = torch.inf
        ids[a], groups[a] = n + step, groups[a] + groups[b]
    return merges, groups[0]
