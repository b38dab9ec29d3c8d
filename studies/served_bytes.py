# SPDX-License-Identifier: Apache-2.0
"""Study 2: how much accuracy does a byte buy? The protocol is `protocols/served_bytes.md`. Study 3
compares LoKr and LoRA on the same runs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PolyConfig,
    VectorBank,
    get_peft_model,
    get_routed_model,
)

from . import short_sets
from .encoder import States, Upper, name_head, states, upper_layers
from .package_data import cache
from .runs import Record, Run, rates_to_try
from .size_arms import EVERY, arms, own_bank, source_poly
from .statistics import Scores
from .texts import joint_digest
from .training import accuracy, mixed_batches, optimize

UPPER = 2
"""Layers that are adapted, the last ones."""

STEPS, ROWS = 100, 16
SOURCE_STEPS = 400
"""Steps of training on a task, texts of a step, and steps of training the shared parts."""

TESTED = 12
"""Tasks that are tested, of all candidates."""

BANK = 256
"""Vectors of a shared bank."""

FULL = "full training of the layers"

Trained = tuple[nn.Module, dict[str, Any], dict[str, Tensor]]
"""A model as it is served, its further arguments, and the tensors that are stored for its task."""


class ServedBytes:
    """The study's runs, measures and report."""

    name = "served_bytes"

    def arms(self) -> list[str]:
        """Return the names of the arms."""
        return list(arms())

    def runs(self, records: list[Record], seeds: Iterable[int], quick: bool) -> list[Run]:
        """Return the runs that select the tasks; then those of the search on tuning tasks, arm by
        arm; then those with the best rates on the tested tasks, seed by seed.
        """
        found = [Run("selection", FULL, 100, {"task": t, "rate": 2}) for t in short_sets.CANDIDATES]
        tasks = tested(records)
        if tasks is None:
            return found
        for name, arm in arms().items():
            scores = _scores(records, name)
            wanted = rates_to_try(scores) if arm.rates else []
            found += [
                Run("rates", name, 100, {"task": task, "rate": number})
                for number in wanted
                for task in short_sets.TUNING
            ]
            if all(scores[number] is not None for number in wanted):
                rate = max(wanted, key=lambda number: scores[number] or 0.0, default=0)
                found += [
                    Run("final", name, seed, {"task": task, "rate": rate})
                    for seed in seeds
                    for task in tasks
                ]
        stages = "selection", "rates", "final"
        return sorted(found, key=lambda run: (stages.index(run.stage), run.seed))

    def measure(self, run: Run, quick: bool) -> Record:
        """Train an arm on a task, store it, and test what was stored."""
        return Measurement(run, quick).record()

    def scores(self, records: list[Record]) -> dict[str, Scores]:
        """Return the test accuracies by arm."""
        from .served_bytes_report import scores_of

        final = [record for record in records if record["stage"] == "final"]
        return {name: scores_of(final, name) for name in arms()}

    def report(self, records: list[Record], folder: Path) -> str:
        """Return the tables, and draw the figure."""
        from .served_bytes_report import report

        return report(records, folder)


def tested(records: list[Record]) -> list[str] | None:
    """Return the tested tasks: those where full training gains most over the most frequent label on
    the validation texts. None if that is not known yet.
    """
    selection = [record for record in records if record["stage"] == "selection"]
    if len(selection) < len(short_sets.CANDIDATES):
        return None
    ranked = sorted(
        selection, key=lambda r: (r["validation"] - r["most_frequent"], r["key"]), reverse=True
    )
    return [record["options"]["task"] for record in ranked[:TESTED]]


def _scores(records: list[Record], arm: str) -> list[float | None]:
    """Return, for each rate of an arm, its mean on the tuning tasks; None where one is missing."""
    found: dict[int, dict[str, float]] = {}
    for record in records:
        if record["stage"] == "rates" and record["arm"] == arm:
            options = record["options"]
            found.setdefault(options["rate"], {})[options["task"]] = record["validation"]
    by_rate = [found.get(number, {}) for number in range(len(arms()[arm].rates))]
    return [
        mean(own[task] for task in short_sets.TUNING)
        if own.keys() >= {*short_sets.TUNING}
        else None
        for own in by_rate
    ]


@lru_cache(maxsize=32)
def _task(name: str) -> tuple[tuple[str, ...], dict[str, States], str]:
    """Return a task's labels, its states by part, and a digest of its texts."""
    task = short_sets.set_task(name)
    return task.classes, states(task, UPPER), joint_digest([task])


@lru_cache(maxsize=1)
def _sources_digest() -> str:
    """Return a digest of the sources' texts."""
    return joint_digest(short_sets.tasks(short_sets.SOURCES))


class Measurement:
    """One run: an arm trained on one task, stored, read back and tested."""

    def __init__(self, run: Run, quick: bool) -> None:
        self.run, self.arm = run, arms()[run.arm]
        self.steps = 2 if quick else STEPS
        self.classes, self.parts, self.digest = _task(run.options["task"])
        self.shared = SharedParts(run.seed, quick)
        self.base()  # The first of a process may draw numbers: that is over before the seed is set.
        torch.manual_seed(run.seed)
        self.batches = mixed_batches([self.parts["train"]], ROWS, _generator(run.seed))
        self.rates = self.arm.rates[run.options["rate"]] if self.arm.rates else {}

    def record(self) -> Record:
        """Train, store, read back, and return what is measured."""
        begin = time.process_time()
        model, told, stored = self._trained()
        labels = self.parts["validation"].labels
        found: Record = {
            "training_seconds": round(time.process_time() - begin, 2),
            "numbers": sum(tensor.numel() for tensor in stored.values()),
            "tensor_bytes": sum(t.numel() * t.element_size() for t in stored.values()),
            "file_bytes": len(save(stored)) if stored else 0,
            "validation": accuracy(model, self.parts["validation"], **told),
            "most_frequent": labels.bincount().max().item() / len(labels),
            "data": self.digest,
        }
        if self.run.stage == "final":
            found["test"] = accuracy(model, self.parts["test"], **told)
        return found

    def base(self) -> Upper:
        """Return a fresh frozen model with the labels' names as its classifier."""
        return Upper(upper_layers(UPPER), name_head(self.classes))

    def _trained(self) -> Trained:
        special: dict[str, Callable[[], Trained]] = {
            "frozen model": lambda: (self.base(), {}, {}),
            "full training of the layers": lambda: self._unfrozen(lambda name: "layers." in name),
            "biases": lambda: self._unfrozen(lambda n: "layers." in n and n.endswith("bias")),
            "classifier": lambda: self._unfrozen(lambda name: name.startswith("head.")),
            "row of a shared Poly adapter": self._row,
            "weights of shared LoRA adapters": self._weights,
        }
        return special.get(self.run.arm, self._adapter)()

    def _optimize(self, model: nn.Module) -> None:
        def loss() -> Tensor:
            return model(**next(self.batches)[0])

        rates = self.rates.get("all", self.rates)
        optimize(model.train(), rates, self.steps, loss)

    def _unfrozen(self, is_trained: Callable[[str], bool]) -> Trained:
        """Train some of the model's own parameters."""
        model = self.base()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_trained(name))
        self._optimize(model)
        trained = {n: p.detach().half() for n, p in model.named_parameters() if p.requires_grad}
        model.load_state_dict({n: t.float() for n, t in trained.items()}, strict=False)
        return model, {}, trained

    def _adapter(self) -> Trained:
        """Train an adapter of the arm's config; it is stored in half precision."""
        assert self.arm.config is not None
        config = self.arm.config(self.shared.folder)
        with TemporaryDirectory() as folder:
            model = get_peft_model(self.base(), config)
            self._optimize(model)
            model.save_pretrained(folder)
            path = Path(folder) / "adapter_model.safetensors"
            stored = {
                name: tensor.half() if tensor.is_floating_point() else tensor
                for name, tensor in load_file(path).items()
            }
            save_file(stored, path)
            served = PeftModel.from_pretrained(self.base(), folder)
        return served, {}, stored

    def _row(self) -> Trained:
        """Fit a task's row of the sources' Poly adapter."""
        model = self.shared.poly(self.base())
        model.add_tasks(1)
        task = model.peft_config["default"].n_tasks - 1
        own = {"task_ids": task}
        model.fit_task(
            task, lambda: model(**next(self.batches)[0], **own), self.steps, self.rates["all"]
        )
        tables = [p for name, p in model.named_parameters() if "poly_router" in name]
        rows = torch.stack([table[task].detach() for table in tables]).half()
        with torch.no_grad():
            for table, row in zip(tables, rows, strict=True):
                table[task] = row.float()
        return model, own, {"rows": rows}

    def _weights(self) -> Trained:
        """Fit one weight for each of the sources' LoRA adapters."""
        model = get_routed_model(self.base(), self.shared.adapters(), routing="fixed")
        fit = model.fit_weights(
            lambda: model(**next(self.batches)[0]), self.steps, self.rates["all"], "equal",
            penalty=0.0,
        )  # fmt: skip
        weights = torch.tensor(list(fit.weights.values())).half()
        names = list(fit.weights)
        model.set_expert_weights(dict(zip(names, weights.tolist(), strict=True)))
        return model.eval(), {}, {"weights": weights}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class SharedParts:
    """Banks, skills and adapters that all users build on, trained on the sources; made once for
    each seed and kept in the cache folder.

    Args:
        seed: Of their training.
        quick: Train for two steps.
    """

    def __init__(self, seed: int, quick: bool) -> None:
        self.seed, self.steps = seed, 2 if quick else SOURCE_STEPS
        self.place = cache() / "shared" / f"{_sources_digest()}-{seed}-{self.steps}"

    @property
    def folder(self) -> Path:
        """The folder with the parts, which are made where they are missing."""
        if not self.place.exists():
            self.place.parent.mkdir(parents=True, exist_ok=True)
            unfinished = TemporaryDirectory(dir=self.place.parent)
            with unfinished as folder, torch.random.fork_rng(devices=[]):
                self._make(Path(folder))
                with contextlib.suppress(OSError):  # another process was faster
                    Path(folder).rename(self.place)
                    Path(folder).mkdir()
        return self.place

    def poly(self, base: Upper) -> nn.Module:
        """Return a model with the Poly adapter of the sources."""
        return PeftModel.from_pretrained(base, self.folder / "poly")

    def adapters(self) -> dict[str, Path]:
        """Return the folders of the sources' LoRA adapters."""
        return {f"source{i}": self.folder / str(i) for i in range(len(short_sets.SOURCES))}

    def _make(self, folder: Path) -> None:
        sources = [_task(name) for name in short_sets.SOURCES]
        parts = [source[1]["train"] for source in sources]
        head = name_head(sources[0][0])
        torch.manual_seed(1000 + self.seed)

        def train(config: PeftConfig, own: list[States], rates: Any, steps: int) -> nn.Module:
            model = get_peft_model(Upper(upper_layers(UPPER), head), config).train()
            batches = mixed_batches(own, ROWS, _generator(self.seed))
            told = isinstance(config, PolyConfig)

            def loss() -> Tensor:
                batch, tasks = next(batches)
                return model(**batch, **({"task_ids": tasks} if told else {}))

            optimize(model, rates, steps, loss)
            return model

        for i, part in enumerate(parts):
            config = LoraConfig(r=4, lora_alpha=4, target_modules=EVERY)
            steps = max(1, self.steps // 4)
            train(config, [part], 4e-3, steps).save_pretrained(folder / str(i))
        poly = train(source_poly(len(parts)), parts, {"skills": 4e-3, "router": 4e-2}, self.steps)
        poly.save_pretrained(folder / "poly")
        banked = train(own_bank(BANK), parts, {"bank": 1e-2, "logits": 1e-1}, self.steps)
        bank = VectorBank.of(banked)
        bank.save_pretrained(folder / "trained")
        random = torch.randn(bank.vectors.shape, generator=_generator(self.seed))
        VectorBank(random * bank.vectors.std()).save_pretrained(folder / "random")
