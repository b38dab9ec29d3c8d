# SPDX-License-Identifier: Apache-2.0
"""Kill one process of two while they save a sharded adapter together.

FSDP2 gathers the tensors inside `save_pretrained`, DeepSpeed ZeRO-3 before it. A process is killed
at one of its Python calls. Half of them are drawn from all that the save makes, the other half from
those that talk to the other process or to the disk. After it a reader finds the old adapter or the
new one, the other process has ended with an error or has saved, and the next save leaves the same
files as one without a fault. What bounds the wait of the other process is the `timeout` of torch's
process group.
"""

from __future__ import annotations

import datetime
import os
import pickle
import random
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import Process, get_context
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from peft import PeftModel

from .scenarios import METHODS, adapted, base, experts, fresh, read_adapter

WORLD = 2
TIMEOUT = 40.0  # seconds, of the process group
# Names of calls that talk to the other process or to the disk.
TALKS = re.compile(
    r"all_?gather|broadcast|all_?reduce|wait|full_tensor"
    r"|^_?(open|replace|rename|link|unlink|remove|fsync|flock|mkdir|rmdir|write|serialize_file)$"
)
PATIENCE = 120.0  # seconds until a process that has not ended counts as hanging


@dataclass
class Scenario:
    """A way to shard a model of a method, and to save it.

    Args:
        method: One of `scenarios.config`.
        base: Returns the base model.
        shard: Returns what `save` needs; called in both processes.
        save: Writes the adapter into a folder; called in both processes.
        imports: Modules that these import.
    """

    name: str
    method: str
    base: Callable[[], nn.Module]
    shard: Callable[[PeftModel], Any]
    save: Callable[[Any, Path], None]
    imports: tuple[str, ...] = ("torch.distributed.fsdp", "torch._dynamo")

    def model(self, scale: int) -> PeftModel:
        """Return a model with an adapter."""
        return adapted(self.method, scale, model=self.base())


def scenarios() -> Iterator[Scenario]:
    """Yield the scenarios."""
    bases: dict[str, Callable[[], nn.Module]] = {**dict.fromkeys(METHODS, base)}
    bases["LORA on experts"] = experts
    for method, own in bases.items():
        yield Scenario(f"FSDP2 {method}", method, own, _fully_shard, _save)
        if find_spec("deepspeed"):
            imports = "deepspeed", "torch._dynamo"
            yield Scenario(f"ZeRO-3 {method}", method, own, _zero, _save_zero, imports)


def _fully_shard(model: PeftModel) -> PeftModel:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


def _save(model: PeftModel, folder: Path) -> None:
    model.save_pretrained(folder, is_main_process=dist.get_rank() == 0)


def _zero(model: PeftModel) -> Any:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first
    deepspeed.init_distributed("gloo", verbose=False)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    return deepspeed.initialize(
        model=model, model_parameters=trained, optimizer=optimizer, config=settings
    )[0]


def _save_zero(engine: Any, folder: Path) -> None:
    state = engine._zero3_consolidated_16bit_state_dict()
    engine.module.save_pretrained(
        folder, is_main_process=dist.get_rank() == 0, state_dict=state if state else {}
    )


def killing(
    scenario: Scenario, folder: Path, seed: int = 0, kills: int = 12
) -> Iterator[tuple[str, str | None]]:
    """Kill each process at so many moments; yield each and what was wrong, or None."""
    for name in scenario.imports:  # once, before the processes fork
        import_module(name)
    place = fresh(folder) / "place"

    def start() -> None:
        fresh(place)
        scenario.model(1).save_pretrained(place)

    start()
    old = read_adapter(place, scenario.base)
    clean = _run(scenario, folder, None)
    if set(clean) != set(range(WORLD)) or any("error" in report for report in clean.values()):
        raise RuntimeError(f"{scenario.name} fails without a fault: {clean}")
    new, files = read_adapter(place, scenario.base), sorted(os.listdir(place))
    if old == new:
        raise RuntimeError(f"{scenario.name}: the old content and the new one are the same")
    chance = random.Random(f"{seed} {scenario.name}")
    for rank in range(WORLD):
        calls, talks = clean[rank]["calls"], clean[rank]["talks"]
        at_talks = chance.sample(talks, min((kills + 1) // 2, len(talks)))
        elsewhere = chance.sample(range(calls), min(kills - len(at_talks), calls))
        for at in sorted({*at_talks, *elsewhere}):
            start()
            reports = _run(scenario, folder, (rank, at))
            yield (
                f"rank {rank} killed at call {at} of {calls}",
                _wrong(reports, 1 - rank, scenario, place, (old, new), files),
            )


def _wrong(
    reports: dict[int, dict[str, Any]],
    other: int,
    scenario: Scenario,
    place: Path,
    contents: tuple[object, object],
    files: list[str],
) -> str | None:
    """Return what is wrong after a kill, None if nothing is."""
    if other not in reports:
        return f"rank {other} hangs"
    try:
        found: object = read_adapter(place, scenario.base)
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    if found not in contents:
        return f"a reader finds {found}"
    scenario.model(2).save_pretrained(place)
    if read_adapter(place, scenario.base) != contents[1]:
        return "the next save leaves another adapter"
    if (left := sorted(os.listdir(place))) != files:
        return f"other files than without a fault: {sorted(set(left) ^ set(files))}"
    return None


def _run(
    scenario: Scenario, folder: Path, kill: tuple[int, int] | None
) -> dict[int, dict[str, Any]]:
    """Save in two processes; return the reports of those that came to an end."""
    store = folder / "store"
    store.unlink(missing_ok=True)
    context = get_context("fork")
    processes: list[Process] = []
    for rank in range(WORLD):
        at = kill[1] if kill is not None and kill[0] == rank else None
        arguments = scenario, folder, rank, at
        processes.append(context.Process(target=_work, args=arguments))  # type: ignore[arg-type]
        processes[-1].start()
    reports = {}
    for rank, process in enumerate(processes):
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()
        report = folder / f"report{rank}"
        if report.exists():
            reports[rank] = pickle.loads(report.read_bytes())
            report.unlink()
    return reports


def _work(scenario: Scenario, folder: Path, rank: int, kill_at: int | None) -> None:
    """Save as one of the processes, and write a report."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    seen, talks = 0, []

    def watch(frame: FrameType, event: str, argument: object) -> None:
        nonlocal seen
        if event in ("call", "c_call"):
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if TALKS.search(getattr(argument, "__name__", frame.f_code.co_name)):
                talks.append(seen)
            seen += 1

    report: dict[str, Any] = {}
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=WORLD,
            timeout=datetime.timedelta(seconds=TIMEOUT),
        )
        sharded = scenario.shard(scenario.model(2))
        dist.barrier()
        sys.setprofile(watch)
        try:
            scenario.save(sharded, folder / "place")
        finally:
            sys.setprofile(None)
        report["calls"], report["talks"] = seen, talks
        dist.barrier()
    except Exception as error:
        report["error"] = f"{type(error).__name__}: {error}"
    (folder / f"report{rank}").write_bytes(pickle.dumps(report))
    os._exit(0)  # destroying the group would wait for the other process
