# SPDX-License-Identifier: Apache-2.0
"""The demo runs from beginning to end, checks of its own included; how well it does is not tested here."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_demo_in_a_few_steps(tmp_path):
    command = [sys.executable, "-m", "examples.multitask_digits", "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["key"] for row in results["methods"]] == ["base", "shared", "poly", "mhr", "vblora", "lokr"]
    assert all(row["bytes"] > 0 and row["trainable"] > 0 for row in results["methods"][1:])
    assert (
        done.stdout.count("predictions the same") == 8
    )  # one merged, five adapters read back, two of them once more with late tasks
    assert all(len(way["accuracies"]) == 2 for way in results["late_tasks"])
    for name in ("accuracy_against_bytes.png", "router_poly.png", "router_mhr.png", "late_tasks.png", "tasks.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
