# SPDX-License-Identifier: Apache-2.0
"""The demo runs from beginning to end, checks of its own included; how well it does is not tested
here.
"""

import json
import runpy
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.study, pytest.mark.processes]
ROOT = Path(__file__).parents[1]


def test_the_demo_in_a_few_steps(tmp_path, monkeypatch, capfd):
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(sys, "argv", ["digits", "--quick", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("examples.multitask_digits", run_name="__main__")
    assert not ended.value.code
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["key"] for row in results["methods"]] == [
        "base",
        "shared",
        "poly",
        "mhr",
        "lora",
        "vblora",
        "lokr",
    ]
    assert all(row["bytes"] > 0 and row["trainable"] > 0 for row in results["methods"][1:])
    # one merged, six adapters read back in a process of their own, two of them once more with late
    # tasks
    assert capfd.readouterr().out.count("predictions the same") == 9
    assert all(len(way["accuracies"]) == 2 for way in results["late_tasks"])
    for name in (
        "accuracy_against_bytes.png",
        "router_poly.png",
        "router_mhr.png",
        "late_tasks.png",
        "tasks.png",
    ):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
