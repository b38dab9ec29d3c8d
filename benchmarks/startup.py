# SPDX-License-Identifier: Apache-2.0
"""What comes before the second step: importing, injecting into a large model, loading beside many
adapters, files, and the first training step.

As a script it is a process that measures one of these with the library on its path, and answers
with one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # a process of its own
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.methods import Adapted, adapt
from benchmarks.work import Shape, Work, base_model

PROJECTIONS = {
    "q_proj": (4096, 4096),
    "k_proj": (4096, 4096),
    "v_proj": (4096, 4096),
    "o_proj": (4096, 4096),
}
PROJECTIONS |= {"gate_proj": (4096, 11008), "up_proj": (4096, 11008), "down_proj": (11008, 4096)}
METHODS = ("lora", "lokr", "vblora", "poly")
# Adapters that a model has when one more is loaded.
PRESENT = (1, 100, 1_000)


def ask(folder: Path, *order: Any, cache: str = "") -> dict[str, float]:
    """Measure in a new process, with the library in a folder, and Triton's kernels in another."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    if cache:
        environment["TRITON_CACHE_DIR"] = cache
    command = [sys.executable, __file__, *map(str, order)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{order}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(
    libraries: dict[str, Path],
    rounds: int,
    present: Iterable[int] = PRESENT,
    shape: Shape | None = None,
    ask: Callable[..., dict[str, float]] = ask,
) -> list[dict[str, Any]]:
    """Return rows of results, each the median of several processes' times in seconds."""
    work = [("import", "", 0)] + [("inject", method, 0) for method in METHODS]
    work += [("load beside", method, size) for method in METHODS for size in present]
    work += [(name, "poly", 0) for name in ("save", "load")]
    rows = []
    for what, method, size in work:
        for library, folder in libraries.items():
            if folder.is_dir() and (library == "ours" or what in ("import", "inject")):
                answers = [ask(folder, what, method, size) for _ in range(rounds)]
                rows.append(_row(what, method, size, library, answers))
    return rows + first_steps(libraries, rounds, shape or Shape(), ask)


def first_steps(
    libraries: dict[str, Path],
    rounds: int,
    shape: Shape,
    ask: Callable[..., dict[str, float]] = ask,
) -> list[dict[str, Any]]:
    """Return rows of the time from `get_peft_model` to the end of the first training step. On a
    GPU the first process compiles Triton's kernels; it has a row of its own.
    """
    rows: list[dict[str, Any]] = []
    frozen: dict[str, float] = {}
    size = json.dumps(dataclasses.asdict(shape))
    for method in ("frozen", *METHODS):
        for library, folder in libraries.items():
            if not folder.is_dir() or (method == "frozen" and library != "ours"):
                continue
            with tempfile.TemporaryDirectory() as cache:
                answers = [
                    ask(folder, "first step", method, size, library, cache=cache)
                    for _ in range(rounds)
                ]
            parts = {"first step": answers}
            if shape.device.startswith("cuda"):
                parts = {"first step, kernels compiled": answers[:1], "first step": answers[1:]}
            for what, some in ((what, some) for what, some in parts.items() if some):
                row = _row(what, method, 0, library, some)
                over = row["seconds"] - frozen.setdefault(what, row["seconds"])
                rows.append(row | {"over_frozen": over})
    return rows


def _row(
    what: str, method: str, size: int, library: str, answers: list[dict[str, float]]
) -> dict[str, Any]:
    row: dict[str, Any] = {"what": what, "method": method, "size": size, "library": library}
    return row | {key: statistics.median(each[key] for each in answers) for key in answers[0]}


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    beside = f"{row['size']} adapters" if row["size"] else ""
    compared = ""
    if "MB_per_s" in row:
        compared = f"{row['MB_per_s']:.0f} MB/s, plain file {row['plain_MB_per_s']:.0f}"
    elif row["method"] != "frozen" and "over_frozen" in row:
        compared = f"{row['over_frozen']:+.3f} to the frozen model's"
    seconds = f"{row['seconds']:.3f}"
    cells = [row["what"], row["method"], beside, row["library"], seconds, compared]
    return f"| {' | '.join(map(str, cells))} |"


HEAD = "| what | method | beside | library | seconds | compared |"


# --- in a process of its own
# ------------------------------------------------------------------------------------------------


def _import() -> dict[str, float]:
    """Seconds that the library's import takes after torch's."""
    import torch  # noqa: F401

    return {"seconds": _seconds(lambda: __import__("peft"))}


def _inject(method: str) -> dict[str, float]:
    """Seconds to adapt all seven projections of 32 layers of a 7B-shaped model on the meta device,
    the shortest of three.
    """
    import torch

    times = []
    for _ in range(3):
        with torch.device("meta"):
            model = _blocks(32, PROJECTIONS)
        config = _config(method, list(PROJECTIONS))
        times.append(_seconds(lambda: _adapt(model, config)))  # noqa: B023
    return {"seconds": min(times)}


def _load_beside(method: str, size: int) -> dict[str, float]:
    """Seconds to load one adapter into a model that has others already."""
    model = _adapt(
        _blocks(2, {"q_proj": (64, 64), "v_proj": (64, 64)}),
        _config(method, ["q_proj", "v_proj"], 64),
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for i in range(1, size):
            model.add_adapter(f"a{i}", _config(method, ["q_proj", "v_proj"], 64))
        model.load_adapter(folder, "first")
        return {
            "seconds": min(
                _seconds(partial(model.load_adapter, folder, f"one{i}")) for i in range(3)
            )
        }


def _files(what: str) -> dict[str, float]:
    """Seconds to write or read an adapter of 64 MiB, and a plain file of that size."""
    import peft

    config = peft.PolyConfig(r=64, n_tasks=10, n_skills=4, target_modules=["q_proj"])
    model = _adapt(_blocks(32, {"q_proj": (1024, 1024)}), config)
    with tempfile.TemporaryDirectory() as folder:
        save = _seconds(lambda: model.save_pretrained(folder))
        path = Path(folder, "adapter_model.safetensors")
        size = path.stat().st_size / 2**20
        content = path.read_bytes()
        if what == "save":
            seconds, plain = save, _seconds(lambda: _write(Path(folder, "plain"), content))
        else:
            seconds, plain = (
                _seconds(lambda: model.load_adapter(folder, "again")),
                _seconds(path.read_bytes),
            )
    return {"seconds": seconds, "MB_per_s": size / seconds, "plain_MB_per_s": size / plain}


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _first_step(method: str, size: str, library: str) -> dict[str, float]:
    """Seconds from an adapter's injection to the end of the first training step."""
    import peft  # noqa: F401

    shape = Shape(**json.loads(size))
    model = base_model(shape)

    def run() -> None:
        adapted = Adapted(model, [])
        if method != "frozen":
            adapted = adapt(model, library, method, shape)
        arguments = adapted.arguments(shape.batch, shape.device)
        Work("train", shape, adapted.run, arguments, adapted.trained)()

    return {"seconds": _seconds(run)}


def _blocks(layers: int, sizes: dict[str, tuple[int, int]]) -> Any:
    from torch import nn

    return nn.ModuleList(
        nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
        for _ in range(layers)
    )


def _config(method: str, targets: list[str], length: int = 256) -> Any:
    import peft

    return {
        "lora": lambda: peft.LoraConfig(r=8, target_modules=targets),
        "lokr": lambda: peft.LoKrConfig(r=8, alpha=8, target_modules=targets),
        "vblora": lambda: peft.VBLoRAConfig(
            r=4, num_vectors=256, vector_length=length, target_modules=targets
        ),
        "poly": lambda: peft.PolyConfig(
            r=8, n_tasks=10, n_skills=4, n_splits=4, target_modules=targets
        ),
    }[method]()


def _adapt(model: Any, config: Any) -> Any:
    import peft

    return peft.get_peft_model(model, config)


def answer(what: str, method: str, size: str, library: str = "") -> dict[str, float]:
    if what == "import":
        return _import()
    if what == "inject":
        return _inject(method)
    if what == "first step":
        return _first_step(method, size, library)
    return _load_beside(method, int(size)) if what == "load beside" else _files(what)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(answer(*sys.argv[1:])))
