# SPDX-License-Identifier: Apache-2.0
"""The study of accuracy against stored bytes runs from beginning to end; what it finds is not tested here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from examples.bytes_study.arms import BANK_SIZES, LENGTH, all_arms  # noqa: E402
from examples.bytes_study.report import LOOKS, points  # noqa: E402

KEPT = ROOT / "examples" / "bytes_study"


def test_the_study_in_a_few_steps(tmp_path):
    options = ["--seeds", "1", "--steps", "2", "--base-steps", "5", "--every", "8", "--output"]
    command = [sys.executable, "-m", "examples.bytes_study", *options, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["runs"]) == 2 * len(all_arms()[::8])
    assert {run["family"] for run in results["runs"]} <= LOOKS.keys()
    for run in results["runs"]:
        assert 0 <= run["accuracy"] <= 1 and 0 < run["tensor_bytes"] < run["file_bytes"]
    for name in ("accuracy_against_bytes.png", "accuracy_against_bank.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "table.md").read_text().splitlines()) == 3 + len(all_arms()[::8])


def test_what_is_checked_in_is_the_study():
    """Every arm, five seeds, two users; and the bytes are those that the formulas give."""
    runs = json.loads((KEPT / "results.json").read_text())["runs"]
    found = points(runs)
    assert {(p.family, p.size) for p in found} == {(arm.family, arm.size) for arm in all_arms()}
    assert len(runs) == 10 * len(found)
    positions = 6 * 4 * (128 + 128) // LENGTH
    for point in found:
        if point.family == "LoRA":
            assert point.tensor_bytes == 6 * point.size * (128 + 128) * 4
        elif point.family.startswith("VB-LoRA"):
            index = 1 if point.size < 256 else 2
            bank = 0 if "shared" in point.family else point.size * LENGTH * 4
            assert point.tensor_bytes == positions * (2 * index + 4) + bank
            assert point.size in BANK_SIZES
    table = (KEPT / "table.md").read_text()
    for point in found:
        assert f"| {point.family} | {point.size} | {point.accuracy:.1f} |" in table


@pytest.mark.parametrize("name", ["accuracy_against_bytes.png", "accuracy_against_bank.png"])
def test_the_figures_are_there(name):
    assert (KEPT / name).read_bytes().startswith(b"\x89PNG")
    assert name in (KEPT / "README.md").read_text()
