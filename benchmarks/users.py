# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.users`: many users on one model, each with an adapter. Compares VB-LoRA
over one bank with LoRA.

It measures the bytes of a user's file, the time to load an adapter beside the others, their memory,
and the time of a batch in which every sample has another user's adapter. Each method runs in its
own process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

METHODS = ("lora", "vblora-own", "vblora-full", "vblora-shared")
NAMES = {
    "lora": "LoRA",
    "vblora-own": "VB-LoRA, a bank each",
    "vblora-full": "VB-LoRA, one bank, all logits",
    "vblora-shared": "VB-LoRA, one bank",
}


class Layers(nn.Sequential):
    """A stack of linear layers, with the methods that `adapter_names` needs."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__(*(nn.Linear(width, width) for _ in range(layers)))


def config(options: argparse.Namespace, bank: Path) -> Any:
    """Return a user's config."""
    from peft import LoraConfig, VBLoRAConfig

    targets = [str(i) for i in range(options.layers)]
    if options.method == "lora":
        return LoraConfig(r=options.rank, target_modules=targets, init_lora_weights=False)
    place: dict[str, Any] = {"bank": str(bank)}
    if options.method == "vblora-own":
        place = {"num_vectors": options.bank, "vector_length": options.length}
    compact = options.method != "vblora-full"
    return VBLoRAConfig(
        r=options.rank, topk=2, target_modules=targets, save_only_topk_weights=compact, **place
    )


def work(options: argparse.Namespace) -> dict[str, Any]:
    """Load all users' adapters into one model and run batches of them."""
    from peft import PeftModel, VectorBank, get_peft_model

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    base = Layers(options.width, options.layers).eval()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        VectorBank(torch.randn(options.bank, options.length) * 0.02).save_pretrained(
            folder / "bank"
        )
        user = get_peft_model(base, config(options, folder / "bank"))
        user.save_pretrained(folder / "user")
        base = user.unload()
        sizes = {
            file.name: file.stat().st_size
            for file in (folder / "user").iterdir()
            if file.name != "README.md"
        }
        x = torch.randn(options.batch, options.tokens, options.width)
        frozen = timed(lambda: base(x), options.repeat)
        model = PeftModel.from_pretrained(base, folder / "user", "user0")
        before, loads = memory(), []
        for i in range(1, options.users):
            start = perf_counter()
            model.load_adapter(folder / "user", f"user{i}")
            loads.append(perf_counter() - start)
        grown = memory() - before
    draw = random.Random(0)
    batches = [draw.sample(range(options.users), options.batch) for _ in range(options.repeat + 2)]
    names = iter([f"user{i}" for i in some] for some in batches)
    served = timed(lambda: model(x, adapter_names=next(names)), options.repeat)
    return {
        "method": options.method,
        "users": options.users,
        "weights_bytes": sizes["adapter_model.safetensors"],
        "bank_bytes": options.bank * options.length * 4
        if options.method in ("vblora-full", "vblora-shared")
        else 0,
        "load_ms_first": 1e3 * statistics.quantiles(loads[: max(2, len(loads) // 10)], n=4)[0],
        "load_ms_last": 1e3 * statistics.quantiles(loads[-max(2, len(loads) // 10) :], n=4)[0],
        "memory_KB": grown / 1024 / (options.users - 1),
        "batch_ms": 1e3 * served,
        "frozen_ms": 1e3 * frozen,
    }


@torch.no_grad()
def timed(call: Any, repeat: int) -> float:
    """Return the shortest time of a call, after two warm-up calls. Other work on the machine only
    adds time, so the shortest is the best estimate.
    """
    times = []
    for _ in range(repeat + 2):
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return min(times[2:])


def memory() -> int:
    """Return the peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Return the results as Markdown."""
    cores = f"{os.cpu_count()} cores, {options.threads} thread(s)"
    machine = f"{platform.machine()}, {cores}, torch {torch.__version__}"
    head = (
        f"One model of {options.layers} layers {options.width} × {options.width}, adapters of rank "
        f"{options.rank}; a bank of "
        f"{options.bank} vectors of {options.length}; batches of {options.batch} samples of "
        f"{options.tokens} token(s), each of "
        f"another user. {machine}. Of loading times the lower quartile, of batches the fastest of "
        f"{options.repeat}.\n\n"
        "| method | users | a user's weights file, KB | for all, once, KB | loading one, the first "
        "tenth, ms | the last tenth, ms "
        "| memory a user, KB | a batch, ms | without adapters, ms "
        "|\n|---|---|---|---|---|---|---|---|---|\n"
    )
    lines = []
    for row in rows:
        files = f"{row['weights_bytes'] / 1024:.1f} | {row['bank_bytes'] / 1024:.0f}"
        loads = f"{row['load_ms_first']:.1f} | {row['load_ms_last']:.1f} | {row['memory_KB']:.1f}"
        lines.append(
            f"| {NAMES[row['method']]} | {row['users']:,} | {files} | {loads} | "
            f"{row['batch_ms']:.1f} | {row['frozen_ms']:.1f} |"
        )
    return head + "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.users", description=__doc__, formatter_class=formatter
    )
    add = result.add_argument
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="methods to measure")
    add("--users", type=int, default=1000, help="users of the shared bank")
    add(
        "--others",
        type=int,
        default=200,
        help="users of the other methods, whose loading gets slower with each user there is",
    )
    add("--width", type=int, default=1024, help="width of the layers")
    add("--layers", type=int, default=8, help="layers of the model, all adapted")
    add("--rank", type=int, default=4, help="rank `r` of the adapters")
    add("--bank", type=int, default=255, help="vectors in the bank")
    add("--length", type=int, default=256, help="length of a vector")
    add("--batch", type=int, default=32, help="samples in a batch, each of another user")
    add("--tokens", type=int, default=1, help="tokens of a sample")
    add("--repeat", type=int, default=20, help="batches that are measured")
    add("--threads", type=int, default=1, help="threads that torch uses on a CPU")
    add(
        "--output",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder for the table",
    )
    add(
        "--method", choices=METHODS, help=argparse.SUPPRESS
    )  # what a process of its own is asked to do
    return result


def main() -> None:
    """Measure every method and write the results."""
    options = parser().parse_args()
    if options.method:
        print(json.dumps(work(options)))
        return
    source = str(Path(__file__).parents[1] / "src")
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": str(options.threads)}
    rows = []
    for method in options.methods:
        command = [sys.executable, "-W", "ignore", __file__, "--method", method]
        users = options.users if method == "vblora-shared" else min(options.users, options.others)
        command += ["--users", str(users)]
        for name in (
            "width",
            "layers",
            "rank",
            "bank",
            "length",
            "batch",
            "tokens",
            "repeat",
            "threads",
        ):
            command += [f"--{name}", str(getattr(options, name))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    text = table(rows, options)
    (options.output / "users.md").write_text(text)
    (options.output / "users.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
