# SPDX-License-Identifier: Apache-2.0
"""Kill a training run, and resume it from each checkpoint that it left.

A run by transformers' `Trainer`, or by a loop with `peft.optimizers`, is killed at one of its
Python calls from the first step on: in a step, between steps, or in a save. Each whole checkpoint
that it left is resumed in a new process, whose random numbers start elsewhere. The adapter and the
optimizer in the end are to the bit those of a run that was never killed. Runs draw random numbers:
dropout of each kind that the method has, Poly's gates, the order of the samples. A checkpoint that
was killed in the middle holds a whole adapter or none.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peft
from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PolyConfig,
    VBLoRAConfig,
    get_peft_model,
)
from peft.utils.error import CheckpointNotFoundError

from .scenarios import digest, fresh

STEPS, SAVE_EVERY, BATCH = 6, 2, 3
TARGETS = ["net.0", "net.2"]
MARK = "trainer_state.json"  # is written last: a checkpoint with it is whole


class Net(nn.Module):
    """A small network that returns a loss, as `Trainer` wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return outputs, and the loss if there are labels."""
        outputs = self.net(x)
        if labels is None:
            return {"logits": outputs}
        return {"loss": (outputs - labels).square().mean(), "logits": outputs}


@dataclass
class Scenario:
    """A kind of run, and a method."""

    name: str
    config: PeftConfig
    train: Callable[[PeftModel, Path, Path | None], None]
    imports: tuple[str, ...]

    def model(self, seed: int) -> PeftModel:
        """Return a new model; its base is the same for all seeds."""
        torch.manual_seed(0)
        base = Net()
        torch.manual_seed(seed)
        return get_peft_model(base, self.config)


def scenarios() -> Iterator[Scenario]:
    """Yield the scenarios."""
    common = {"r": 2, "target_modules": TARGETS, "init_weights": False}
    bank = {"num_vectors": 8, "vector_length": 4, "vblora_dropout": 0.3}
    configs: dict[str, PeftConfig] = {
        "LORA": LoraConfig(
            r=2, lora_dropout=0.3, target_modules=TARGETS, init_lora_weights=False, use_dora=True
        ),
        "LOKR": LoKrConfig(rank_dropout=0.3, module_dropout=0.3, **common),
        "LOHA": LoHaConfig(rank_dropout=0.3, module_dropout=0.3, **common),
        "POLY": PolyConfig(n_tasks=2, n_skills=2, **common),
        "VBLORA": VBLoRAConfig(r=2, target_modules=TARGETS, **bank),
    }
    for name, config in configs.items():
        libraries = ("torch._dynamo", "accelerate", "transformers.trainer")
        yield Scenario(f"Trainer {name}", config, _by_trainer, libraries)
        yield Scenario(f"loop {name}", config, _by_loop, libraries[:1])


def _samples(config: PeftConfig) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tasks = getattr(config, "n_tasks", 0)
    return [
        {
            "x": torch.randn(8, generator=generator),
            "labels": torch.randn(8, generator=generator),
            **({"task_ids": torch.tensor(i % tasks)} if tasks else {}),
        }
        for i in range(9)
    ]


def _by_trainer(model: PeftModel, folder: Path, start: Path | None) -> None:
    """Train by transformers' `Trainer`, from a checkpoint if one is given."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        save_strategy="steps",
        save_steps=SAVE_EVERY,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=1,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=_samples(model.peft_config["default"]),
        optimizer_cls_and_kwargs=peft.optimizers.trainer_optimizer(lr=1e-2),
    )
    trainer.train(resume_from_checkpoint=None if start is None else str(start))


def _by_loop(model: PeftModel, folder: Path, start: Path | None) -> None:
    """Train by a loop that saves the adapter, and then all else that a step depends on."""
    samples, done = _samples(model.peft_config["default"]), 0
    if start is not None:
        model.load_adapter(start, "default", is_trainable=True)
    optimizer = peft.optimizers.create_optimizer(model, lr=1e-2)
    if start is not None:
        state = torch.load(start / "optimizer.pt")
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        done = state["step"]
    model.train()
    for step in range(done, STEPS):
        rows = torch.randint(len(samples), (BATCH,))
        batch = [samples[row] for row in rows.tolist()]
        loss = model(**{name: torch.stack([b[name] for b in batch]) for name in batch[0]})["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % SAVE_EVERY == 0:
            place = folder / f"checkpoint-{step + 1}"
            model.save_pretrained(place)
            state = {"optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save({**state, "random": torch.get_rng_state()}, place / "optimizer.pt")
            (place / MARK).write_text("{}")


def _run(
    scenario: Scenario, folder: Path, start: Path | None, seed: int, kill_at: int | None = None
) -> int | None:
    """Train in a process of its own; return the number of its Python calls, None if it was killed.

    Raises:
        RuntimeError: The run failed.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            text = _child(scenario, folder, start, seed, kill_at)
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writer, text.encode()[:4000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
        return None
    if not text.isdigit():
        raise RuntimeError(text)
    return int(text)


def _child(
    scenario: Scenario, folder: Path, start: Path | None, seed: int, kill_at: int | None
) -> str:
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    warnings.simplefilter("ignore")
    seen = 0

    def watch(frame: FrameType, event: str, argument: object) -> None:
        nonlocal seen
        if event == "call":
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    def begin(*_: object) -> None:
        handle.remove()
        sys.setprofile(watch)

    model = scenario.model(seed)
    handle = model.register_forward_pre_hook(begin)  # a library's own preparations do not count
    scenario.train(model, folder, start)
    sys.setprofile(None)
    return str(seen)


def _result(folder: Path) -> str:
    """Return a digest of the adapter and the optimizer in the end."""
    last = folder / f"checkpoint-{STEPS}"
    adapter = load_file(last / "adapter_model.safetensors")
    state = torch.load(last / "optimizer.pt")
    return digest(repr(_plain([*sorted(adapter.items()), state.get("optimizer", state)])).encode())


def _plain(value: Any) -> Any:
    """Return a value with its tensors as lists."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return [(key, _plain(own)) for key, own in value.items()]
    return [_plain(own) for own in value] if isinstance(value, (list, tuple)) else value


def resuming(
    scenario: Scenario, folder: Path, seed: int = 0, kills: int = 6
) -> Iterator[tuple[str, str | None]]:
    """Kill a run at so many moments; yield each checkpoint and what was wrong, None if nothing."""
    # Once, before processes fork.
    for name in scenario.imports:
        import_module(name)
    whole = fresh(folder) / "whole"
    calls = _run(scenario, whole, None, 5)
    assert calls is not None
    expected = _result(whole)
    yield from _each(scenario, whole, folder, expected, "a run that was not killed")
    chance = random.Random(f"{seed} {scenario.name}")
    for at in sorted(chance.sample(range(calls), kills)):
        killed = fresh(folder / "killed")
        if _run(scenario, killed, None, 5, at) is not None:
            yield f"a kill at call {at}", None  # the run has made fewer calls this time
        yield from _each(scenario, killed, folder, expected, f"a kill at call {at} of {calls}")


def _each(
    scenario: Scenario, left: Path, folder: Path, expected: str, what: str
) -> Iterator[tuple[str, str | None]]:
    """Resume each checkpoint of a run; yield each and what was wrong, None if nothing was."""
    again = folder / "again"
    for checkpoint in sorted(left.glob("checkpoint-*")):
        label = f"{checkpoint.name} after {what}"
        if not (checkpoint / MARK).exists():
            yield f"unfinished {label}", _broken(checkpoint, scenario)
            continue
        fresh(again)
        shutil.copytree(checkpoint, again / checkpoint.name)
        try:
            _run(scenario, again, again / checkpoint.name, 77)
        except RuntimeError as error:
            yield label, f"it can't be resumed: {error}"
            continue
        same = _result(again) == expected
        yield label, None if same else "another adapter or optimizer in the end"


def _broken(checkpoint: Path, scenario: Scenario) -> str | None:
    """Return what is wrong with the adapter in an unfinished checkpoint, None if nothing is."""
    try:
        PeftModel.from_pretrained(Net(), checkpoint)
    except CheckpointNotFoundError:
        return None
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
