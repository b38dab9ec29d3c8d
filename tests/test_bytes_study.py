# SPDX-License-Identifier: Apache-2.0
"""The study of accuracy against stored bytes runs from beginning to end; what it finds is not
tested here.
"""

import json
import runpy
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.study
ROOT = Path(__file__).parents[1]


def test_the_study_in_a_few_steps(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    options = [
        "--seeds",
        "1",
        "--steps",
        "2",
        "--base-steps",
        "5",
        "--every",
        "8",
        "--output",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", ["study", *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("examples.bytes_study", run_name="__main__")
    assert not ended.value.code
    from examples.bytes_study.arms import LENGTH, all_arms
    from examples.bytes_study.report import LOOKS

    arms, runs = all_arms()[::8], json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [(run["family"], run["size"]) for run in runs[::2]] == [
        (arm.family, arm.size) for arm in arms
    ]
    assert len(runs) == 2 * len(arms) and {run["family"] for run in runs} <= LOOKS.keys()
    vectors = (
        6 * 4 * (128 + 128) // LENGTH
    )  # layers, rank, and the sides of a layer, each vector of which is one of the bank's
    for run in runs:
        assert 0 <= run["accuracy"] <= 1 and 0 < run["tensor_bytes"] < run["file_bytes"]
        if run["family"] == "LoRA":
            assert run["tensor_bytes"] == 6 * run["size"] * (128 + 128) * 4
        elif run["family"].startswith("VB-LoRA"):
            bank = 0 if "shared" in run["family"] else run["size"] * LENGTH * 4
            assert run["tensor_bytes"] == vectors * (2 * (1 if run["size"] < 256 else 2) + 4) + bank
    for name in ("accuracy_against_bytes.png", "accuracy_against_bank.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "table.md").read_text().splitlines()) == 3 + len(arms)
