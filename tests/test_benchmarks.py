# SPDX-License-Identifier: Apache-2.0
"""The benchmark runs and reports; how fast anything is, is not for a test to say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.study, pytest.mark.processes]
ROOT = Path(__file__).parents[1]


def test_short_form(tmp_path):
    options = "--width 128 --layers 1 --tokens 4 --batch 2 --decode-batch 2 --rounds 1 --repeat 3 --threads 1 --library ours"
    options += f" --method mhr --mode train decode --output {tmp_path}"
    command = [sys.executable, "-m", "benchmarks", *options.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "results.json").read_text())
    assert [row["mode"] for row in content["rows"]] == ["train", "decode"]
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in content["rows"])
    assert "| mhr | train | 128 | ours |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "ratios.png").stat().st_size > 1000


def run(tmp_path, *options):
    command = [sys.executable, "-m", "benchmarks", *options, "--threads", "1", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_scaling(tmp_path):
    run(tmp_path, "scaling", "--width", "64", "--sizes", "2", "--rounds", "1", "--repeat", "3")
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert {(row["axis"], row["size"]) for row in rows} == {
        ("tasks", 10), ("tasks", 100), ("adapters", 1), ("adapters", 10), ("bank", 64), ("bank", 256)
    }  # fmt: skip
    assert all(row["low"] <= row["us"] <= row["high"] for row in rows)
    assert "| tasks | poly | train | 100 |" in (tmp_path / "scaling.md").read_text()
    assert (tmp_path / "scaling.png").stat().st_size > 1000


def test_startup(monkeypatch):
    """Each kind of row; one is measured in a process of its own, as all are."""
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import startup

    apart = startup._ask

    def ask(folder, what, *more):
        return apart(folder, what, *more) if what == "import" else startup._answer(what, *map(str, more))

    monkeypatch.setattr(startup, "_ask", ask)
    monkeypatch.setattr(startup, "METHODS", ("lokr",))
    rows = startup.measure({"ours": ROOT / "src"}, rounds=1, present=(2,))
    assert [row["what"] for row in rows] == ["import", "inject", "load beside", "save", "load"]
    assert all(row["seconds"] > 0 for row in rows)
    assert "| load beside | lokr | 2 adapters | ours |" in startup.line(rows[2])
