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


TINY = "--width 128 --layers 1 --tokens 4 --batch 2 --decode-batch 2 --rounds 1 --repeat 3"


def test_short_form(benchmarks, tmp_path):
    benchmarks(f"{TINY} --library ours --method mhr --mode train decode")
    rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert [row["mode"] for row in rows] == ["train", "decode"]
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in rows)
    # A layer's error is measured against float64: rounding of float32, and neither 0 nor much more.
    assert all(1e-8 < row["error"] < 1e-5 for row in rows)
    assert all(row["peak_MB"] > 0 for row in rows)
    assert "| train | mhr | ours |" in (tmp_path / "steps.md").read_text()
    assert (tmp_path / "steps.png").stat().st_size > 1000


def test_full_matrices_in_a_stack(benchmarks, tmp_path):
    """A row has the factor in its name, and the tables keep other work."""
    for method in ("lora", "lokr-full-8"):
        benchmarks(f"{TINY} --library ours --mode prefill --add --method {method} --model stack")
    rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["lora", "lokr-full-8"]
    assert (tmp_path / "steps.md").read_text().count("## Stack: width 128, 7 linear layers") == 1


@pytest.mark.compile
def test_compiled(benchmarks, tmp_path):
    benchmarks(f"{TINY} --library ours --method lora --mode prefill --model stack --compile")
    (row,) = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert row["compiled"] and (row["breaks"], row["recompilations"]) == (0, 0)
    assert 1e-8 < row["error"] < 1e-5
    assert "both sides compiled" in (tmp_path / "steps.md").read_text()


def test_what_cannot_be_measured_is_refused(benchmarks, capsys):
    for options, words in (
        ("--graph", "--graph captures a CUDA graph, and --device is cpu"),
        ("--compile --mode generate", "--mode generate is neither captured nor compiled"),
    ):
        with pytest.raises(SystemExit):
            benchmarks(options)
        assert words in capsys.readouterr().err


def test_a_failing_row_is_named_and_the_next_one_measured(benchmarks, tmp_path, capsys):
    """A bank of 2 vectors is too small for VB-LoRA's `topk` of 2 + 1; LoRA has no bank."""
    with pytest.raises(SystemExit) as ended:
        benchmarks(
            f"{TINY} --library ours --method vblora lora --mode prefill --bank 1 --model stack"
        )
    assert ended.value.code == 1
    bad, good = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert bad["method"] == "vblora" and "num_vectors" in bad["failed"]
    assert good["method"] == "lora" and good["ratio"] > 0
    assert f"vblora prefill, stack of width 128, ours: {bad['failed']}" in capsys.readouterr().out


@pytest.mark.parametrize("factor", [4, 16])
def test_every_library_gets_the_same_matrices(factor, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.methods import METHODS, adapt, libraries_with
    from benchmarks.work import Shape, Stack

    method, shape = f"lokr-full-{factor}", Shape(width=64)
    model = adapt(Stack(64, 1).requires_grad_(False), "ours", method, shape)
    assert {tuple(p.shape) for p in model.trained} == {(factor, factor), (64 // factor,) * 2}
    theirs = METHODS[method].lycoris(shape)
    assert (theirs["factor"], theirs["full_matrix"]) == (factor, True)
    with_lycoris = {name for name in METHODS if "lycoris" in libraries_with(name)}
    assert with_lycoris == {name for name in METHODS if name.startswith("lokr")}


def test_scaling(benchmarks, tmp_path):
    benchmarks("scaling --width 64 --sizes 2 --rounds 1 --repeat 3")
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert {(row["axis"], row["size"]) for row in rows} == {
        ("tasks", 10), ("tasks", 100), ("adapters", 1), ("adapters", 10), ("bank", 64), ("bank", 256)
    }  # fmt: skip
    assert all(row["low"] <= row["us"] <= row["high"] for row in rows)
    table = (tmp_path / "scaling.md").read_text()
    assert "| tasks | 10 | 100 |" in table and "| poly, train | " in table
    assert (tmp_path / "scaling.png").stat().st_size > 1000


def test_routing(benchmarks, tmp_path):
    size = "--width 64 --layers 1 --tokens 4 --batch 2 --decode-batch 2 --rounds 1 --repeat 3"
    benchmarks(f"routing {size} --library ours --mode train --experts 2 3 --top-k 1 3")
    rows = json.loads((tmp_path / "routing.json").read_text())["rows"]
    assert [(row["experts"], row["top_k"]) for row in rows] == [(2, 1), (3, 1), (3, 3)]
    assert all(row["low"] <= row["ratio"] <= row["high"] and row["alone"] > 0 for row in rows)
    assert "| 3 | 3 | train | 64 | ours |" in (tmp_path / "routing.md").read_text()


def test_first_step_over_the_frozen_model(benchmarks, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.startup.METHODS", ("poly",))
    benchmarks(
        "first-step --model stack --width 64 --layers 1 --tokens 2 --rounds 1 --library ours"
    )
    frozen, *rows = json.loads((tmp_path / "first-step.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["poly"]
    assert all(row["over_frozen"] == row["seconds"] - frozen["seconds"] for row in rows)
    assert "to the frozen model's" in (tmp_path / "first-step.md").read_text()


def test_startup_is_the_median_of_rounds(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import startup

    orders, seconds = [], itertools.cycle([3.0, 1.0, 2.0])

    def ask(folder, *order, cache=""):
        orders.append((folder.name, *order))
        return {"seconds": next(seconds)}

    rows = startup.measure(
        {"ours": ROOT / "src", "peer": ROOT / "tests"}, rounds=3, present=(2, 5), ask=ask
    )
    assert {row["seconds"] for row in rows} == {2.0} and len(orders) == 3 * len(rows)
    asked = {(row["library"], row["what"]) for row in rows}
    ours = {("ours", what) for what in ("import", "inject", "load beside", "save", "load")}
    ours.add(("ours", "first step"))
    assert asked == ours | {("peer", what) for what in ("import", "inject", "first step")}
    assert {row["size"] for row in rows if row["what"] == "load beside"} == {2, 5}
    (row,) = (
        row
        for row in rows
        if row["what"] == "load beside" and row["method"] == "lokr" and row["size"] == 5
    )
    assert startup.line(row) == "| load beside | lokr | 5 adapters | ours | 2.000 |  |"
    steps = [row for row in rows if row["what"] == "first step"]
    assert [row["library"] for row in steps if row["method"] == "frozen"] == ["ours"]
    assert all(row["over_frozen"] == 0 for row in steps)


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
