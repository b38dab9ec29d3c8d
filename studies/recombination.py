# SPDX-License-Identifier: Apache-2.0
"""Study 1: does knowing the tasks help on cells of a grid that nobody trained? The protocol is
`protocols/recombination.md`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from peft import (
    LoraConfig,
    PeftConfig,
    PolyConfig,
    cluster_adapters,
    get_peft_model,
    get_routed_model,
)

from . import multiemo
from .encoder import States, Upper, states, upper_layers
from .runs import Record, Run, best, rates_to_try
from .statistics import Scores
from .texts import joint_digest
from .training import Batch, accuracy, draw_texts, fit_head, logits, mixed_batches, optimize

UPPER = 2
"""Layers that are adapted, the last ones."""

STEPS, ROWS = 600, 32
"""Steps of training on the grid, and texts of a step."""

SHOTS = (4, 16, 64)
FEW_STEPS = 40
"""Texts of a new cell, and steps on them."""

PER_TASK_RANK = 2
SKILLS = 11
CLUSTERS = 6
TARGETS = r"layers\.\d+\.(attention\.self\.(query|key|value)|.*dense)"
RATES = {
    "shared": (1.5e-4, 5e-4, 1.5e-3, 5e-3, 1.5e-2),
    "own": (5e-4, 1.5e-3, 5e-3, 1.5e-2, 5e-2),
    "poly": (5e-4, 1.5e-3, 5e-3, 1.5e-2, 5e-2),
    "heads": (5e-4, 1.5e-3, 5e-3, 1.5e-2, 5e-2),
    "input": (1.5e-4, 5e-4, 1.5e-3, 5e-3, 1.5e-2),
}
"""Rates of the search for each trained arm; routers have ten times the rate of skills. The first
and last are tried where their neighbor is the best of the others.
"""

FEW_RATES = {
    "further": (2e-5, 1e-4, 5e-4, 2e-3, 1e-2),
    "new": (2e-4, 1e-3, 5e-3, 2e-2, 1e-1),
    "row": (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    "weights": (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    "clusters": (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
}
"""Rates of the search for each way to adapt to a new cell; the same rule."""

WAYS = {
    "head": (),
    "shared": ("further",),
    "own": ("new", "weights", "clusters"),
    "poly": ("row",),
    "heads": ("row",),
    "input": ("further",),
}
"""Ways of each arm to adapt to a new cell from a few texts."""


class Recombination:
    """The study's runs, measures and report."""

    name = "recombination"

    def arms(self) -> list[str]:
        """Return the names of the arms."""
        return list(WAYS)

    def runs(self, records: list[Record], seeds: Iterable[int], quick: bool) -> list[Run]:
        """Return the runs of the search on seed 100, then, arm by arm, those with its best rate;
        then the search of rates for a few texts, and the runs with these.
        """
        searches: list[Run] = []
        final = [Run("final", "head", seed) for seed in seeds]
        ways: list[Run] = []
        few: list[Run] = []
        for arm, rates in RATES.items():
            tried = {
                record["options"]["rate"]: record
                for record in records
                if record["stage"] == "rates" and record["arm"] == arm
            }
            scores = [tried[rate]["validation"] if rate in tried else None for rate in rates]
            wanted = [rates[number] for number in rates_to_try(scores)]
            searches += [Run("rates", arm, 100, {"rate": rate}) for rate in wanted]
            if not all(rate in tried for rate in wanted):
                continue
            chosen = best(tried.values(), lambda record: record["validation"])
            rate = {"rate": chosen["options"]["rate"]}
            options = {**rate, "few": _best_few_rates(chosen)}
            final += [Run("final", arm, seed, options) for seed in seeds]
            ways.append(Run("ways", arm, 100, rate))
            for record in records:
                if record["key"] == ways[-1].key:
                    options = {**rate, "few": _best_few_rates(record)}
                    few += [Run("few", arm, seed, options) for seed in seeds]
        return [*searches, *final, *ways, *few]

    def measure(self, run: Run, quick: bool) -> Record:
        """Train an arm and measure it on trained and on new cells."""
        return Measurement(run, quick).record()

    def scores(self, records: list[Record]) -> dict[str, Scores]:
        """Return the test accuracies by arm and way."""
        from .recombination_report import scores

        return scores(records)

    def report(self, records: list[Record], folder: Path) -> str:
        """Return the tables, and draw the figures."""
        from .recombination_report import report

        return report(records, folder)


def _best_few_rates(record: Record) -> dict[str, float]:
    """Return the best rate of each way on the tuning cells."""
    return {
        way: max(rates, key=lambda entry: entry["accuracy"])["rate"]
        for way, rates in record["tuning"].items()
    }


def config(arm: str, n_tasks: int) -> PeftConfig:
    """Return an arm's config; all arms train about `2 · n_tasks` ranks of each layer in all."""
    total = PER_TASK_RANK * n_tasks
    if arm in ("shared", "own"):
        rank = total if arm == "shared" else PER_TASK_RANK
        return LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS)
    # The router of an input has a number for each skill and input: it gets one skill less.
    skills = min(SKILLS - 1 if arm == "input" else SKILLS, total)
    options: dict[str, Any] = {"r": max(1, total // SKILLS), "n_skills": skills}
    if arm == "input":
        return PolyConfig(**options, poly_type="mope", target_modules=TARGETS)
    if arm == "heads":
        options |= {"n_splits": 4, "relaxed_bernoulli": False, "router_granularity": "block"}
    return PolyConfig(**options, n_tasks=n_tasks, target_modules=TARGETS)


@lru_cache(maxsize=1)
def _grid(quick: bool) -> dict[str, dict[multiemo.Cell, dict[str, States]]]:
    """Return the cells' states by their use."""
    cells = {"trained": multiemo.TRAINED, "new": multiemo.HELD_OUT, "tuning": multiemo.TUNING}
    if quick:
        cells = {"trained": multiemo.TRAINED[:3], "new": multiemo.HELD_OUT[:1]} | {
            "tuning": multiemo.TUNING[:1]
        }
    return {
        use: {cell: states(multiemo.cell_task(cell), UPPER) for cell in some}
        for use, some in cells.items()
    }


@lru_cache(maxsize=1)
def _digest() -> str:
    """Return a digest of the texts and labels of all cells."""
    cells = (*multiemo.TRAINED, *multiemo.HELD_OUT, *multiemo.TUNING)
    return joint_digest(multiemo.tasks(cells))


@lru_cache(maxsize=1)
def _head(quick: bool) -> tuple[Tensor, Tensor]:
    """Return the classifier, fitted to the frozen model on the trained cells."""
    parts = [cell["train"] for cell in _grid(quick)["trained"].values()]
    width = parts[0].hidden.shape[1]
    # With the identity as classifier, the logits are the features.
    base = Upper(upper_layers(UPPER), (torch.eye(width), torch.zeros(width)))
    features = torch.cat([logits(base, part) for part in parts])
    return fit_head(features, torch.cat([part.labels for part in parts]), len(multiemo.CLASSES))


class Measurement:
    """One run: the trained models of an arm, and what they reach."""

    def __init__(self, run: Run, quick: bool) -> None:
        self.run, self.quick = run, quick
        self.grid = _grid(quick)
        self.trained = list(self.grid["trained"])
        self.steps, self.few_steps = (4, 2) if quick else (STEPS, FEW_STEPS)
        self.base()  # The first of a process draws numbers: that is over before the seed is set.
        torch.manual_seed(run.seed)
        self.generator = torch.Generator().manual_seed(run.seed)
        self.folder: TemporaryDirectory[str] | None = None

    def base(self) -> Upper:
        """Return a fresh frozen model."""
        return Upper(upper_layers(UPPER), _head(self.quick))

    def record(self) -> Record:
        """Train, and return everything that is measured."""
        begin = time.process_time()
        self.models = self._train()
        seconds = time.process_time() - begin
        trained = {p for model in self.models for p in model.parameters() if p.requires_grad}
        found: Record = {
            "parameters": sum(p.numel() for p in trained),
            "training_seconds": round(seconds, 1),
            "data": "quick" if self.quick else _digest(),
        }
        if self.run.stage in ("ways", "few"):
            return found | (self._search() if self.run.stage == "ways" else self._new_cells())
        part = "validation" if self.run.stage == "rates" else "test"
        by_cell = {
            multiemo.name(cell): accuracy(self.model_of(i), parts[part], **self.told(i))
            for i, (cell, parts) in enumerate(self.grid["trained"].items())
        }
        found[part] = sum(by_cell.values()) / len(by_cell)
        found["trained"] = by_cell
        found |= self._search() if self.run.stage == "rates" else self._new_cells()
        return found

    def model_of(self, number: int) -> nn.Module:
        """Return the model for a trained cell."""
        return self.models[number if len(self.models) > 1 else 0]

    def told(self, number: int) -> dict[str, int]:
        """Return the arguments that tell the model the cell."""
        return {"task_ids": number} if self.run.arm in ("poly", "heads") else {}

    def _train(self) -> list[nn.Module]:
        arm, parts = self.run.arm, [cell["train"] for cell in self.grid["trained"].values()]
        if arm == "head":
            return [self.base()]
        if arm == "own":
            steps = max(1, self.steps * ROWS // (16 * len(parts)))
            return [self._trained_on([part], 16, steps) for part in parts]
        return [self._trained_on(parts, ROWS, self.steps)]

    def _trained_on(self, parts: list[States], rows: int, steps: int) -> nn.Module:
        arm, rate = self.run.arm, self.run.options["rate"]
        model = get_peft_model(self.base(), config(arm, len(self.trained))).train()
        batches = mixed_batches(parts, rows, self.generator)

        def loss() -> Tensor:
            batch, tasks = next(batches)
            return model(**batch, **({"task_ids": tasks} if self.told(0) else {}))

        optimize(model, _rates(arm, rate), steps, loss)
        return model

    def _search(self) -> Record:
        """Return, for each way and rate, the accuracy on the tuning cells from 16 texts: on their
        training texts from validation texts, since their test texts are translations of others'.
        """
        return {"tuning": {way: self._tuned(way) for way in WAYS[self.run.arm]}}

    def _tuned(self, way: str) -> list[dict[str, float]]:
        rates = FEW_RATES[way]
        scores: list[float | None] = [None] * len(rates)
        while missing := [number for number in rates_to_try(scores) if scores[number] is None]:
            for number in missing:
                scores[number] = self._mean_on_tuning(way, rates[number])
        return [
            {"rate": rate, "accuracy": score}
            for rate, score in zip(rates, scores, strict=True)
            if score is not None
        ]

    def _mean_on_tuning(self, way: str, rate: float) -> float:
        cells = self.grid["tuning"].values()
        found = [self._adapted(way, self._few(parts["validation"], 16), rate) for parts in cells]
        return sum(
            accuracy(model, parts["train"], **told)
            for (model, told, _), parts in zip(found, cells, strict=True)
        ) / len(found)

    def _few(self, states: States, count: int) -> Batch:
        """Return a few texts; those of the first runs are drawn evenly over the classes."""
        return draw_texts(states, count, self.run.seed, evenly=self.run.stage in ("rates", "final"))

    def _new_cells(self) -> Record:
        """Return the accuracy on new cells, untrained and from a few texts."""
        measured: list[Record] = []
        for cell, parts in self.grid["new"].items():
            untrained = {} if self.run.stage == "few" else self._untrained(cell)
            for way, (model, told) in untrained.items():
                measured.append(
                    {"cell": multiemo.name(cell), "way": way, "shots": 0, "numbers": 0}
                    | {"accuracy": accuracy(model, parts["test"], **told)}
                )
            for way in WAYS[self.run.arm]:
                for shots in SHOTS[:1] if self.quick else SHOTS:
                    begin = time.process_time()
                    examples = self._few(parts["train"], shots)
                    rate = self.run.options["few"][way]
                    model, told, numbers = self._adapted(way, examples, rate)
                    seconds = round(time.process_time() - begin, 2)
                    measured.append(
                        {"cell": multiemo.name(cell), "way": way, "shots": shots}
                        | {"numbers": numbers, "seconds": seconds}
                        | {"accuracy": accuracy(model, parts["test"], **told)}
                        | {"others_change": self._change(model, way)}
                    )
        return {"new": measured}

    def _untrained(self, cell: multiemo.Cell) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
        """Return an arm's models for a new cell without any text of it, by name."""
        if self.run.arm in ("poly", "heads"):
            model = copy.deepcopy(self.models[0])
            model.add_tasks(1)
            return {"mean row": (model, {"task_ids": len(self.trained)})}
        if self.run.arm != "own":
            return {"as it is": (self.models[0], {})}
        alike = [
            f"e{i}"
            for i, other in enumerate(self.trained)
            if cell[0] == other[0] or cell[1] == other[1]
        ]
        everyone = {f"e{i}": 1 / len(self.trained) for i in range(len(self.trained))}
        mean, near = self._routed("fixed"), self._routed("fixed")
        mean.set_expert_weights(everyone)
        near.set_expert_weights({name: (name in alike) / len(alike) for name in everyone})
        return {
            "mean": (mean, {}),
            "mean of row and column": (near, {}),
            "arrow": (self._routed("arrow", top_k=min(3, len(self.trained))), {}),
        }

    def _routed(self, routing: str, **options: Any) -> nn.Module:
        """Return one model of the adapters of all cells."""
        return get_routed_model(self.base(), self._folders(), routing=routing, **options)

    def _folders(self) -> dict[str, Path]:
        """Return the folders of the cells' adapters, by their names."""
        if self.folder is None:
            self.folder = TemporaryDirectory()
            for i, model in enumerate(self.models):
                model.save_pretrained(Path(self.folder.name) / f"e{i}")
        return {f"e{i}": Path(self.folder.name) / f"e{i}" for i in range(len(self.models))}

    def _clusters(self) -> nn.Module:
        """Return a blend of the mean adapters of clusters."""
        adapters = [str(place) for place in self._folders().values()]
        clusters = cluster_adapters(self.base(), adapters, k=min(CLUSTERS, len(adapters) - 1))
        with TemporaryDirectory() as folder:
            clusters.save_experts(folder)
            experts = {name: Path(folder) / name for name in clusters.members}
            return get_routed_model(self.base(), experts, routing="fixed")

    def _adapted(
        self, way: str, examples: Batch, rate: float
    ) -> tuple[nn.Module, dict[str, Any], int]:
        """Return a model for a new cell from a few texts, its arguments, and how many numbers were
        trained.
        """
        torch.manual_seed(self.run.seed)
        if way == "row":
            model = copy.deepcopy(self.models[0])
            model.add_tasks(1)
            task = len(self.trained)
            told = {"task_ids": task}
            model.fit_task(task, lambda: model(**examples, **told), self.few_steps, rate, "best")
            tables = [p for name, p in model.named_parameters() if "poly_router" in name]
            return model, told, sum(table[0].numel() for table in tables)
        if way in ("weights", "clusters"):
            model = self._routed("fixed") if way == "weights" else self._clusters()
            model.fit_weights(lambda: model(**examples), self.few_steps, rate, "equal", penalty=0.0)
            return model.eval(), {}, len(model.named_experts())
        if way == "new":
            model = get_peft_model(self.base(), config("own", len(self.trained))).train()
        else:
            model = copy.deepcopy(self.models[0]).train()
        optimize(model, _rates(self.run.arm, rate) if way == "further" else rate, self.few_steps,
                 lambda: model(**examples))  # fmt: skip
        return model, {}, sum(p.numel() for p in model.parameters() if p.requires_grad)

    def _change(self, model: nn.Module, way: str) -> float:
        """Return the largest change of logits of the first trained cell by adapting to another: 0
        where what was trained before stays beside it.
        """
        if way not in ("further", "row"):
            return 0.0  # another adapter, or weights of another model
        texts = next(iter(self.grid["trained"].values()))["validation"]
        before = logits(self.models[0], texts, **self.told(0))
        return float((logits(model, texts, **self.told(0)) - before).abs().max())


def _rates(arm: str, rate: float) -> float | dict[str, float]:
    if arm in ("poly", "heads"):
        return {"skills": rate, "router": 10 * rate}
    if arm == "input":
        return {"skills": rate, "input_router": rate}
    return rate
