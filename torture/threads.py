# SPDX-License-Identifier: Apache-2.0
"""Let threads call one model while others change it.

Callers name adapters and tasks for each row, or name none, with gradients or without, by a forward
or by `generate`. Changers load, replace, hot swap, delete, save, switch, disable, merge and combine
adapters, and grow tasks. Every result has to be that of a freshly loaded model with the same
adapters: each in one of the versions that it has had, the same for all rows. An error has to be one
of this package, and to come only where the call asks for something that may be gone. In the end the
model is to the bit one that was changed by one thread.
"""

from __future__ import annotations

import itertools
import random
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft import PeftError, PeftModel
from peft.utils.hotswap import hotswap_adapter

from .scenarios import METHODS, adapted, base, fresh, state_of

CALLERS = 4
ROWS = 3
STABLE = {"default": 1, "second": 2}  # names that stay, and their contents
VERSIONS = {"v": (3, 4), "w": (5, 6)}  # names that come and go, one for each changer
BASE = "__base__"


@dataclass
class Mix:
    """A mix of changes.

    Args:
        name: Its name in reports.
        changes: Names of the functions of `_Changer` that are drawn.
        active: The names that may be active, None for a model without adapters.
        refuses: True if calls that name adapters may be refused meanwhile (merged adapters).
        one_name: True if all changers change the same adapter, and may find that it is gone.
    """

    name: str
    changes: tuple[str, ...]
    active: tuple[str | None, ...] = ("default",)
    refuses: bool = False
    one_name: bool = False


MIXES = (
    Mix("load and delete", ("load", "delete")),
    Mix("replace", ("load", "replace", "hotswap")),
    Mix("switch", ("switch", "disable"), ("default", "second", None)),
    Mix("merge", ("merge",), refuses=True),
    Mix("one name", ("load", "load", "delete", "hotswap"), one_name=True),
    Mix(
        "all",
        (
            *("load", "load", "delete", "replace", "hotswap", "save"),
            *("switch", "disable", "combine", "merge"),
        ),
        ("default", "second", None),
        refuses=True,
    ),
)
TASKS = Mix("tasks and skills", ("load", "delete", "grow"))


@dataclass
class Scenario:
    """A kind of model, and a mix of changes."""

    name: str
    method: str
    mix: Mix
    generates: bool = False


def scenarios() -> Iterator[Scenario]:
    """Yield the scenarios."""
    for method in METHODS:
        # A merged task is the only one that calls may name.
        poly = [mix for mix in MIXES if mix.name != "merge"] + [TASKS]
        mixes = poly if method == "POLY" else MIXES
        yield from (Scenario(f"{mix.name} {method}", method, mix) for mix in mixes)
    for method in ("LORA", "POLY"):
        for mix in (MIXES[0], MIXES[2]):
            yield Scenario(f"{mix.name} {method} in generate", method, mix, generates=True)


@dataclass
class World:
    """A model, the adapters' folders, and what a freshly loaded model gives for each of them.

    Args:
        folders: By content.
        outputs: `[rows, …]` by content (None for the base model) and task.
    """

    model: PeftModel
    scenario: Scenario
    folders: dict[int, Path]
    x: Tensor
    outputs: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)

    @property
    def tasks(self) -> int:
        """Number of tasks that calls name."""
        return 2 if self.scenario.method == "POLY" else 1

    def call(self, model: nn.Module, **arguments: Any) -> Tensor:
        """Return a call's result."""
        if not self.scenario.generates:
            return model(self.x, **arguments)
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        return model.generate(input_ids=self.x, **options, **arguments)[:, self.x.shape[1] :]

    def task_ids(self, tasks: list[int]) -> dict[str, Any]:
        """Return the argument for the tasks of the rows."""
        return {"task_ids": tasks} if self.tasks > 1 else {}


def _base(scenario: Scenario) -> nn.Module:
    if not scenario.generates:
        return nn.Sequential(*base(), base()[0])
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**settings, **heads, pad_token_id=0)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # no ties between tokens
    return model


def world(scenario: Scenario, folder: Path) -> World:
    """Return a world with the stable adapters on the model."""
    targets = ["q_proj", "v_proj"] if scenario.generates else ["0", "3"]
    x = torch.arange(3, 3 + ROWS * 4).reshape(ROWS, 4) % 29 + 3
    if not scenario.generates:
        x = torch.linspace(-1, 1, ROWS * 8).reshape(ROWS, 8)
    brought = "o_proj" if scenario.generates else "2"  # what they adapt that others do not
    folders = {}
    for content in (1, 2, 3, 4, 5, 6):
        folders[content] = folder / str(content)
        own = targets if content in STABLE.values() else [*targets, brought]
        made = adapted(scenario.method, 2, content, _base(scenario), own)
        made.save_pretrained(folders[content])
    model = PeftModel.from_pretrained(_base(scenario), folders[1], is_trainable=True).eval()
    model.load_adapter(folders[2], "second")
    result = World(model, scenario, folders, x)
    with torch.no_grad():
        plain = result.call(_base(scenario).eval())
        for task in range(result.tasks):
            result.outputs[None, task] = plain
            for content, saved in folders.items():
                alone = PeftModel.from_pretrained(_base(scenario), saved).eval()
                result.outputs[content, task] = result.call(alone, **result.task_ids([task] * ROWS))
    return result


class _Caller:
    """A thread that calls the model, and compares."""

    def __init__(self, world: World, number: int, seed: int, calls: int) -> None:
        self.world, self.calls = world, calls
        self.chance = random.Random(f"{seed} caller {number}")
        self.findings: list[tuple[str, str | None]] = []

    def __call__(self) -> None:
        self.findings += (self._call() for _ in range(self.calls))

    def _call(self) -> tuple[str, str | None]:
        world, chance = self.world, self.chance
        tasks = [chance.randrange(world.tasks) for _ in range(ROWS)]
        kind = chance.choice(["named", "one", "stable", "none"])
        present = [*STABLE, *VERSIONS, BASE]
        if kind == "none":
            names = None
        elif kind == "one" or world.scenario.method == "LORA on parameters":
            names = [chance.choice(present)] * ROWS
        else:
            names = [chance.choice([*STABLE, BASE] if kind == "stable" else present)]
            names += [chance.choice(names + list(STABLE)) for _ in range(ROWS - 1)]
        arguments = world.task_ids(tasks) | ({} if names is None else {"adapter_names": names})
        is_graded = chance.random() < 0.3 and not world.scenario.generates
        label = f"{'grad ' * is_graded}call of {sorted(set(names or ['the active adapters']))}"
        try:
            with torch.set_grad_enabled(is_graded):
                output = world.call(world.model, **arguments)
        except PeftError as error:
            is_refused = names is not None and world.scenario.mix.refuses
            if is_refused or (names is not None and not VERSIONS.keys().isdisjoint(names)):
                return label, None
            return label, f"refused: {error}"
        except Exception:
            return label, f"a bare error: {traceback.format_exc(limit=-3)}"
        return label, self._compare(output.detach(), names, tasks)

    def _compare(self, output: Tensor, names: list[str] | None, tasks: list[int]) -> str | None:
        """Return what is wrong with an output, None if nothing is."""
        active = self.world.scenario.mix.active
        if names is None:
            known = {None: None, **STABLE}
            choices = [{None: known[name]} for name in active]
            rows: list[str | None] = [None] * ROWS
        else:
            rows, used = list(names), dict.fromkeys(names)
            versions = {BASE: (None,), **{n: (c,) for n, c in STABLE.items()}, **VERSIONS}
            choices = [
                dict(zip(used, chosen, strict=True))
                for chosen in itertools.product(*(versions[name] for name in used))
            ]
            if None in active:  # disabled meanwhile
                choices.append(dict.fromkeys(used))
        for choice in choices:
            expected = [
                self.world.outputs[choice[name], task][row]
                for row, (name, task) in enumerate(zip(rows, tasks, strict=True))
            ]
            if torch.allclose(output.double(), torch.stack(expected).double(), atol=1e-4):
                return None
        return "no freshly loaded model gives this result"


class _Changer:
    """A thread that changes the model. Only the first one changes what the others share."""

    def __init__(self, world: World, number: int, seed: int, over: threading.Event) -> None:
        self.world, self.over, self.model = world, over, world.model
        self.name = list(VERSIONS)[0 if world.scenario.mix.one_name else number]
        own = ("load", "delete", "replace", "hotswap")
        kinds = world.scenario.mix.changes
        self.kinds = [kind for kind in kinds if number == 0 or kind in own]
        self.chance = random.Random(f"{seed} changer {number}")
        self.content: int | None = None
        self.has_loaded = False
        self.findings: list[tuple[str, str | None]] = []

    def __call__(self) -> None:
        while not self.over.is_set() and self.kinds:
            kind = self.chance.choice(self.kinds)
            try:
                getattr(self, f"_{kind}")()
                self.findings.append((kind, None))
            except Exception as error:
                # Another thread may have been faster.
                is_refused = isinstance(error, PeftError) and self.world.scenario.mix.one_name
                wrong = None if is_refused else f"failed: {traceback.format_exc(limit=-3)}"
                self.findings.append((kind, wrong))

    def _is_there(self, wanted: bool = True) -> bool:
        """Return whether the adapter is there, or is wanted so; it may be if others change it."""
        return self.world.scenario.mix.one_name or (self.content is not None) == wanted

    def _folder(self) -> tuple[int, Path]:
        content = self.chance.choice(VERSIONS[self.name])
        return content, self.world.folders[content]

    def _load(self) -> None:
        if self._is_there(False):
            self.content, folder = self._folder()
            self.model.load_adapter(folder, self.name)
            self.has_loaded = True

    def _delete(self) -> None:
        if self._is_there():
            self.model.delete_adapter(self.name)
            self.content = None

    def _replace(self) -> None:
        if self.content is not None:
            self.content, folder = self._folder()
            self.model.load_adapter(folder, self.name)

    def _hotswap(self) -> None:
        if self._is_there():
            self.content, folder = self._folder()
            hotswap_adapter(self.model, str(folder), self.name)

    def _switch(self) -> None:
        self.model.set_adapter(self.chance.choice(list(STABLE)))

    def _disable(self) -> None:
        with self.model.disable_adapter():
            pass

    def _merge(self) -> None:
        if self.world.tasks == 1:
            self.model.merge_adapter()
            self.model.unmerge_adapter()

    def _combine(self) -> None:
        if self.world.scenario.method in ("LORA", "LOKR"):
            self.model.add_weighted_adapter(list(STABLE), [0.5, 2.0], "sum", "svd", svd_rank=2)
            self.model.delete_adapter("sum")

    def _save(self) -> None:
        folder, world = self.world.folders[1].parent / "saved", self.world
        self.model.save_pretrained(folder, selected_adapters=["default"])
        alone = PeftModel.from_pretrained(_base(world.scenario), folder).eval()
        with torch.no_grad():
            found = world.call(alone, **world.task_ids([0] * ROWS))
        if not torch.allclose(found, world.outputs[1, 0], atol=1e-4):
            raise AssertionError("another adapter was saved")

    def _grow(self) -> None:
        if self.content is not None:
            self.model.add_tasks(1, adapter_name=self.name)
            self.model.add_skills(1, adapter_name=self.name)
            self.model.remove_tasks(2, adapter_name=self.name)


def meeting(
    scenario: Scenario, folder: Path, seed: int = 0, calls: int = 400
) -> Iterator[tuple[str, str | None]]:
    """Yield each call and change, and what was wrong, None if nothing was.

    Each caller makes so many calls, by `generate` a tenth of them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = world(scenario, fresh(folder))
        over = threading.Event()
        calls = calls // 10 if scenario.generates else calls
        callers = [_Caller(there, number, seed, calls) for number in range(CALLERS)]
        changers = [_Changer(there, number, seed, over) for number in range(len(VERSIONS))]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            calling = [threading.Thread(target=caller) for caller in callers]
            changing = [threading.Thread(target=changer) for changer in changers]
            for thread in (*changing, *calling):
                thread.start()
            for thread in calling:
                thread.join()
            over.set()
            for thread in changing:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        for work in (*callers, *changers):
            yield from work.findings
        yield "the model in the end", _difference(there, changers)


def _difference(there: World, changers: list[_Changer]) -> str | None:
    """Return how the model differs from one that was changed by one thread, None if not at all."""
    grew = "grow" in there.scenario.mix.changes
    one = PeftModel.from_pretrained(
        _base(there.scenario), there.folders[1], is_trainable=True
    ).eval()
    one.load_adapter(there.folders[2], "second")
    for changer in changers:  # what an adapter has brought stays when it is deleted
        if changer.has_loaded:
            one.load_adapter(there.folders[VERSIONS[changer.name][0]], changer.name)
            one.delete_adapter(changer.name)
    if there.scenario.mix.one_name:
        return _unknown_result(there)
    contents = {changer.name: changer.content for changer in changers}
    for name in there.model.peft_config:
        if name in VERSIONS:
            one.load_adapter(there.folders[contents[name]], name)
    for model in (one, there.model):
        model.set_adapter("default", inference_mode=True)
    if there.scenario.generates or grew:
        if sorted(one.peft_config) != sorted(there.model.peft_config):
            return f"it has the adapters {sorted(there.model.peft_config)}"
        for name in one.peft_config:
            arguments = {"adapter_names": [name] * ROWS, **there.task_ids([1] * ROWS)}
            with torch.no_grad():
                if not torch.allclose(
                    there.call(one, **arguments), there.call(there.model, **arguments), atol=1e-4
                ):
                    return f"{name} gives another result"
        return None
    return None if state_of(one) == state_of(there.model) else "it is not that of one thread"


def _unknown_result(there: World) -> str | None:
    """Return an adapter that gives what none of its contents gives, None if there is none."""
    contents = {**{name: (content,) for name, content in STABLE.items()}, **VERSIONS}
    for name in there.model.peft_config:
        with torch.no_grad():
            found = there.call(
                there.model, adapter_names=[name] * ROWS, **there.task_ids([0] * ROWS)
            )
        if not any(torch.allclose(found, there.outputs[c, 0], atol=1e-4) for c in contents[name]):
            return f"{name} gives another result"
    return None
