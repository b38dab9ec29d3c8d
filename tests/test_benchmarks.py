# SPDX-License-Identifier: Apache-2.0
"""The benchmark runs and reports; how fast anything is, is not for a test to say."""

import itertools
import json
import runpy
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.study, pytest.mark.processes]
ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmarks(tmp_path, monkeypatch):
    """Runs `python -m benchmarks` with options in this process; what it starts itself are
    processes.
    """
    monkeypatch.syspath_prepend(ROOT)

    def run(options):
        monkeypatch.setattr(
            sys,
            "argv",
            ["benchmarks", *options.split(), "--threads", "1", "--output", str(tmp_path)],
        )
        runpy.run_module("benchmarks", run_name="__main__")

    return run


def test_short_form(benchmarks, tmp_path):
    options = "--width 128 --layers 1 --tokens 4 --batch 2 --decode-batch 2 --rounds 1 --repeat 3 --library ours"
    benchmarks(f"{options} --method mhr --mode train decode")
    content = json.loads((tmp_path / "results.json").read_text())
    assert [row["mode"] for row in content["rows"]] == ["train", "decode"]
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in content["rows"])
    assert "| mhr | train | 128 | ours |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "ratios.png").stat().st_size > 1000


def test_scaling(benchmarks, tmp_path):
    benchmarks("scaling --width 64 --sizes 2 --rounds 1 --repeat 3")
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert {(row["axis"], row["size"]) for row in rows} == {
        ("tasks", 10), ("tasks", 100), ("adapters", 1), ("adapters", 10), ("bank", 64), ("bank", 256)
    }  # fmt: skip
    assert all(row["low"] <= row["us"] <= row["high"] for row in rows)
    assert "| tasks | poly | train | 100 |" in (tmp_path / "scaling.md").read_text()
    assert (tmp_path / "scaling.png").stat().st_size > 1000


def test_routing(benchmarks, tmp_path):
    size = "--width 64 --layers 1 --tokens 4 --batch 2 --decode-batch 2 --rounds 1 --repeat 3"
    benchmarks(f"routing {size} --library ours --mode train --experts 2 3 --top-k 1 3")
    rows = json.loads((tmp_path / "routing.json").read_text())["rows"]
    assert [(row["experts"], row["top_k"]) for row in rows] == [(2, 1), (3, 1), (3, 3)]
    assert all(row["low"] <= row["ratio"] <= row["high"] and row["alone"] > 0 for row in rows)
    assert "| 3 | 3 | train | 64 | ours |" in (tmp_path / "routing.md").read_text()


def test_startup_is_the_median_of_rounds(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import startup

    orders, seconds = [], itertools.cycle([3.0, 1.0, 2.0])

    def ask(folder, *order):
        orders.append((folder.name, *order))
        return {"seconds": next(seconds)}

    rows = startup.measure(
        {"ours": ROOT / "src", "peer": ROOT / "tests"}, rounds=3, present=(2, 5), ask=ask
    )
    assert {row["seconds"] for row in rows} == {2.0} and len(orders) == 3 * len(rows)
    asked = {(row["library"], row["what"]) for row in rows}
    ours = {("ours", what) for what in ("import", "inject", "load beside", "save", "load")}
    assert asked == ours | {("peer", "import"), ("peer", "inject")}
    assert {row["size"] for row in rows if row["what"] == "load beside"} == {2, 5}
    (row,) = (
        row
        for row in rows
        if row["what"] == "load beside" and row["method"] == "lokr" and row["size"] == 5
    )
    assert startup.line(row) == "| load beside | lokr | 5 adapters | ours | 2.000 |  |"


def test_startup_measures_each_thing(monkeypatch):
    """In a process of its own, as all of them are, what it takes to import."""
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import startup

    found = [
        startup.answer(*order)
        for order in (
            ("inject", "lokr", "0"),
            ("load beside", "vblora", "2"),
            ("save", "poly", "0"),
        )
    ]
    found.append(startup.ask(ROOT / "src", "import", "", 0))
    assert all(0 < each["seconds"] < 300 for each in found)
    assert found[2].keys() == {"seconds", "MB_per_s", "plain_MB_per_s"}
