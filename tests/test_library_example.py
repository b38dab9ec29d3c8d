# SPDX-License-Identifier: Apache-2.0
"""The example of a library of adapters runs from beginning to end, its own check included; how well
it does is not tested here.
"""

import json
import runpy
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.study
ROOT = Path(__file__).parents[1]


def test_a_library_in_a_few_steps(tmp_path, monkeypatch, capfd):
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(sys, "argv", ["library", "--quick", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("examples.library_of_adapters", run_name="__main__")
    assert not ended.value.code
    results = json.loads((tmp_path / "results.json").read_text())
    assert "learned gate" in results["routing"] and len(results["routing"]["Arrow, top 1"]) == 8
    assert results["routing"]["named by a rule"] == results["routing"]["its own adapter"]
    clusters = results["clusters"]["clusters"]
    assert sum(cluster["size"] for cluster in clusters) == 8
    for cluster in clusters:
        assert (tmp_path / "experts" / cluster["cluster"] / "adapter_model.safetensors").is_file()
    assert list(results["composition"]) == ["columns-dim", "corner"]
    assert "predict the same." in capfd.readouterr().out
    for name in ("similarity.png", "clusters.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
