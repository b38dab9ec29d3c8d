# SPDX-License-Identifier: Apache-2.0
"""The study runs from beginning to end in its short form, and the results that are checked in are those that its README tells."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "multitask_study"
KEYS = ["base", "shared", "own", "poly", "mhr", "mope"]


def test_the_study_in_a_few_steps(tmp_path):
    command = [sys.executable, "-m", "examples.multitask_study", "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    numbers = json.loads((tmp_path / "results.json").read_text())["seeds"]["0"]
    assert list(numbers) == KEYS
    assert all(len(method["accuracies"]) == 4 and method["new"] for method in numbers.values())
    ways = {key: {result["way"] for result in method["new"]} for key, method in numbers.items()}
    assert ways["poly"] == ways["mhr"] == {"Z", "full", "mu"} and ways["own"] == {"new"}
    for name in ("trained_tasks.png", "few_examples.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_what_the_readme_tells_is_what_was_measured():
    results = json.loads((FOLDER / "results" / "results.json").read_text())
    readme = (FOLDER / "README.md").read_text()
    tables = (FOLDER / "results" / "results.md").read_text()
    assert all(line in readme for line in tables.splitlines() if line.startswith("|"))
    for key in KEYS:
        scores = [mean(seed[key]["accuracies"].values()) for seed in results["seeds"].values()]
        assert f" {100 * mean(scores):.1f} ± " in tables
    sizes = [next(iter(results["seeds"].values()))[key]["parameters"] for key in KEYS[1:]]
    assert max(sizes) < 1.05 * min(sizes)
