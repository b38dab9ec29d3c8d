# SPDX-License-Identifier: Apache-2.0
"""Time of a step that routes over LoRA adapters by Arrow, of this package and of Hugging Face PEFT
in turns, over the frozen model's and beside a step of one adapter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from .run import Workers
from .work import Shape

EXPERTS, TOP_K = (4, 16, 64, 256), (1, 2, 4)
HEAD = "| experts | top_k | mode | width | library | time / frozen | quartiles | / one adapter |"


def measure(
    shape: Shape,
    libraries: Iterable[str],
    threads: int,
    rounds: int,
    repeat: int,
    modes: Iterable[str],
    experts: Iterable[int] = EXPERTS,
    top_k: Iterable[int] = TOP_K,
) -> list[dict[str, Any]]:
    """Return a row for each number of experts, `top_k`, mode and library."""
    libraries = [name for name in libraries if name != "lycoris"]
    rows, modes, top_k = [], list(modes), list(top_k)
    with Workers(shape, ["ours"], threads) as workers:
        alone = {mode: workers.measure("lora", mode, rounds, repeat)[0]["ratio"] for mode in modes}
    for number in experts:
        for k in (k for k in top_k if k <= number):
            one = dataclasses.replace(shape, experts=number, top_k=k)
            with Workers(one, libraries, threads) as workers:
                for mode in modes:
                    for row in workers.measure("arrow", mode, rounds, repeat):
                        rows.append({**row, "alone": alone[mode]})
                        print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    cells = [str(row[name]) for name in ("experts", "top_k", "mode", "width", "library")]
    if "failed" in row:
        cells += [row["failed"], "", ""]
    else:
        cells += [f"{row['ratio']:.3f}", f"{row['low']:.3f}-{row['high']:.3f}"]
        cells += [f"{row['ratio'] / row['alone']:.3f}"]
    return f"| {' | '.join(cells)} |"
