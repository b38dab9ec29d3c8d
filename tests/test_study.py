# SPDX-License-Identifier: Apache-2.0
"""The study of many tasks runs from beginning to end in its short form; what it finds is not tested
here.
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
    monkeypatch.setattr(sys, "argv", ["study", "--quick", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("examples.multitask_study", run_name="__main__")
    assert not ended.value.code
    numbers = json.loads((tmp_path / "results.json").read_text())["seeds"]["0"]
    assert list(numbers) == ["base", "shared", "own", "poly", "mhr", "mope"]
    assert all(len(method["accuracies"]) == 4 and method["new"] for method in numbers.values())
    ways = {key: {result["way"] for result in method["new"]} for key, method in numbers.items()}
    assert ways["poly"] == ways["mhr"] == {"Z", "full", "mu"} and ways["own"] == {"new"}
    for name in ("trained_tasks.png", "few_examples.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
