# SPDX-License-Identifier: Apache-2.0
"""Tables of an adapter's routing by layer, task, split and skill, and the similarity of tasks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypedDict, get_args

import torch
from torch import Tensor, nn

from ....base.calls.running import holds
from ....base.containers import walk
from ....base.errors import PeftValueError
from ....base.tables import left_out, table
from ....checkpoint.files import write_report
from ....core.adapter_choice import adapter_of
from ....ops.clustering import Link, linkage
from ..layer import PolyLayer
from ..router import Router, TaskRouter
from . import metrics
from .plotting import plot_routing

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from ..config import PolyConfig

Measure = Literal["entropy", "usage_entropy", "discreteness", "sparsity", "spread"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
# Largest number of tasks and of layers that printing lists.
_LISTED = 20


class LayerMeasures(TypedDict):
    """Measures of a layer's routing.

    Attributes:
        entropy: Mean entropy of tasks' weights, 0 to 1.
        usage_entropy: Entropy of the skills' use, 0 to 1.
        discreteness, sparsity, spread: As in `metrics`.
        usage: Each skill's share of use.
    """

    entropy: float
    usage_entropy: float
    discreteness: float
    sparsity: float
    spread: float
    usage: list[float]


@dataclass(repr=False)
class RoutingReport:
    """An adapter's routing by task in evaluation. `print` shows a table of the tasks and a table of
    the layers.

    Attributes:
        tasks: Names of the tasks, or "task_0", "task_1", ….
        weights: `[n_tasks, n_splits, n_skills]` by module path, on the CPU in float32 or float64.
        order: The tasks by id, similar ones next to each other: the leaves of the tree of `merges`.
            By id where scipy is not installed.
        similarity: `[n_tasks, n_tasks]`, the cosine of tasks' weights less their mean.
        merges: The tree of tasks, closest first; empty where scipy is not installed.
        layers: Measures of each layer, by module path.
    """

    tasks: list[str]
    weights: dict[str, Tensor]
    order: list[int]
    similarity: Tensor
    merges: list[Link]
    layers: dict[str, LayerMeasures] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"RoutingReport({len(self.tasks)} tasks, {len(self.weights)} layers)"

    def __str__(self) -> str:
        """Return two tables: each task, in `order`, with the most similar one; and each layer's
        measures, with their means. Long tables are cut.
        """
        head = f"Routing in evaluation: tasks {len(self.tasks)}, layers {len(self.weights)}"
        return "\n".join([head, "", *self._task_lines(), "", *self._layer_lines()])

    def _task_lines(self) -> Iterator[str]:
        others = self.similarity.clone().fill_diagonal_(-torch.inf)
        rows = [("task", "most alike", "cosine")]
        for i in self.order[:_LISTED]:
            j = int(others[i].argmax())
            nearest = (self.tasks[j], f"{float(others[i, j]):.2f}") if j != i else ("", "")
            rows.append((self.tasks[i], *nearest))
        yield table(rows, right=[2])
        yield from left_out(len(self.order), _LISTED, "tasks")

    def _layer_lines(self) -> Iterator[str]:
        rows: list[tuple[str, ...]] = [("layer", *MEASURES, "most used")]
        for path, layer in list(self.layers.items())[:_LISTED]:
            most = max(layer["usage"])
            best = f"skill {layer['usage'].index(most)} ({most:.0%})"
            rows.append((path, *_numbers(layer), best))
        rows.append(("mean", *_numbers(mean_measures(self.layers)), ""))
        yield table(rows, right=range(1, 1 + len(MEASURES)))
        yield from left_out(len(self.layers), _LISTED, "layers")

    def rows(self) -> Iterator[dict[str, str | int | float]]:
        """Yield a row for each layer, task, split and skill with its `weight`."""
        for path, weights in self.weights.items():
            for task, splits in zip(self.tasks, weights.tolist(), strict=True):
                for q, skills in enumerate(splits):
                    for s, weight in enumerate(skills):
                        yield {
                            "layer": path,
                            "task": task,
                            "split": q,
                            "skill": s,
                            "weight": weight,
                        }

    def to_pandas(self) -> dict[str, DataFrame]:
        """Return data frames by name.

        "weights" has a row for each layer, split, task and skill; "layers" the measures of each
        layer; "usage" the use of each skill by layer; "similarity" that of tasks, in `order`.
        """
        import pandas

        names = [self.tasks[i] for i in self.order]
        similarity = self.similarity[self.order][:, self.order].numpy()
        layers = pandas.DataFrame.from_dict(self.layers, orient="index").drop(columns="usage")
        usage = {path: layer["usage"] for path, layer in self.layers.items()}
        return {
            "weights": pandas.DataFrame(list(self.rows())),
            "layers": layers.rename_axis("layer"),
            "usage": pandas.DataFrame.from_dict(usage, orient="index").rename_axis("layer"),
            "similarity": pandas.DataFrame(similarity, index=names, columns=names),
        }

    def to_dict(self) -> dict[str, object]:
        """Return the report as values of JSON."""
        return {
            "tasks": self.tasks,
            "weights": {path: table.tolist() for path, table in self.weights.items()},
            "layers": self.layers,
            "similarity": self.similarity.tolist(),
            "order": self.order,
            "merges": [list(merge) for merge in self.merges],
        }

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write the report to a file; a missing folder is created."""
        write_report(path, self.to_dict())

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the tree of tasks, their weights in all layers, and the skills' use by layer, with
        matplotlib.

        Args:
            path: A file for the figure, its suffix says the format; None saves nothing.
        """
        figure = plot_routing(
            self.tasks,
            {path: table.mean(1) for path, table in self.weights.items()},
            {path: torch.tensor(layer["usage"]) for path, layer in self.layers.items()},
            self.order,
            self.merges,
        )
        if path is not None:
            figure.savefig(path)
        return figure


@holds
def routing_report(model: nn.Module, adapter_name: str | None = None) -> RoutingReport:
    """Return tables of the weights with which an adapter mixes its skills for each task in
    evaluation.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into.
        adapter_name: The adapter; by default "default", else the only active one.

    Returns:
        The tables. Layers that share a router are one layer, at the first of their paths.

    Raises:
        PeftValueError: There is no such adapter, the choice is ambiguous, or no layer of it routes
            by task.

    Example:
        >>> from peft import PolyConfig, get_peft_model
        >>> config = PolyConfig(n_tasks=3, n_skills=2, target_modules=["0"])
        >>> report = routing_report(get_peft_model(nn.Sequential(nn.Linear(4, 6)), config))
        >>> report.tasks, list(report.weights), report.similarity.shape
        (['task_0', 'task_1', 'task_2'], ['0'], torch.Size([3, 3]))

    Source: arXiv:2202.13914, section 5 (measures, and the hierarchy of tasks)
    """
    name = poly_adapter(model, adapter_name)
    routers = task_routers(model, name)
    weights = {path: router.task_weights().detach().cpu() for path, router in routers.items()}
    config: PolyConfig = getattr(model, "peft_config")[name]  # noqa: B009
    tasks = list(config.task_names or (f"task_{i}" for i in range(config.n_tasks)))
    similarity = metrics.task_similarity(
        torch.cat([table.flatten(1) for table in weights.values()], 1).double()
    )
    merges, order = linkage(similarity)
    return RoutingReport(tasks, weights, order, similarity, merges, layer_measures(routers))


def poly_adapter(model: nn.Module, adapter_name: str | None) -> str:
    """Return the name of a Poly adapter: the given one, "default", or the only active one."""
    return adapter_of(model, adapter_name, PolyLayer, " of Poly")


def adapter_routers(model: nn.Module, adapter_name: str) -> dict[Router, str]:
    """Return an adapter's routers, each with the path of the first layer that has it.

    Paths begin at the base model of a `PeftModel`, and at other models themselves.
    """
    tuner = model._modules.get("base_model")
    root = model if tuner is None else tuner.get_submodule("model")
    routers: dict[Router, str] = {}
    for path, layer in walk(root):
        if isinstance(layer, PolyLayer) and adapter_name in layer.scaling:
            routers.setdefault(layer.router(adapter_name), path)
    return routers


def task_routers(model: nn.Module, adapter_name: str) -> dict[str, TaskRouter]:
    """Return an adapter's routers by task, by module path; one that layers share comes once."""
    every = adapter_routers(model, adapter_name)
    routers = {path: router for router, path in every.items() if isinstance(router, TaskRouter)}
    if not routers:
        raise PeftValueError(
            f"Adapter {adapter_name} routes by input and has no tables by task; `recorded_routing` "
            "keeps the weights of a call."
        )
    return routers


@torch.no_grad()
def layer_measures(routers: Mapping[str, TaskRouter]) -> dict[str, LayerMeasures]:
    """Return the measures of routers by task in evaluation."""
    result: dict[str, LayerMeasures] = {}
    for path, router in routers.items():
        weights, gates = router.task_weights().cpu(), router.task_gates().cpu()
        use = metrics.usage(weights)
        result[path] = {
            "entropy": float(metrics.entropy(weights).mean()),
            "usage_entropy": float(metrics.entropy(use)),
            "discreteness": float(metrics.discreteness(gates)),
            "sparsity": float(metrics.sparsity(gates)),
            "spread": float(metrics.spread(weights)),
            "usage": use.tolist(),
        }
    return result


def mean_measures(layers: Mapping[str, LayerMeasures]) -> dict[str, float]:
    """Return the means of measures over layers."""
    return {name: sum(layer[name] for layer in layers.values()) / len(layers) for name in MEASURES}


def _numbers(measures: Mapping[str, float] | LayerMeasures) -> list[str]:
    """Return the cells of measures in a table."""
    return [f"{measures[name]:.3f}" for name in MEASURES]
