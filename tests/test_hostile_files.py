# SPDX-License-Identifier: Apache-2.0
"""Ten thousand damaged and forged files, those that were read wrongly once, and planted faults."""

import os
import random
import re
from pathlib import Path

import pytest
import torch
from torture import corpus, damage, hostile, scenarios, slow_reading, tensor_files, tracer
from torture.hostile_targets import CONFIG, Target

from peft import PeftModel
from peft.base import expressions
from peft.utils.error import PeftValueError

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not tracer.is_supported(), reason="reads peaks of memory as Linux tells"),
]
CORPUS = Path(__file__).parent / "torture_corpus.jsonl"
TARGETS = {target.name: target for target in hostile.targets()}


@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_refused_or_read(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tries = hostile.inputs(50, parsed=900)(TARGETS[name], tmp_path, seed=1)
    assert not [f"{what}: {wrong}" for what, wrong in tries if wrong is not None]


@pytest.mark.parametrize("name", sorted({case.target for case in corpus.read(CORPUS)}))
def test_kept_cases_are_refused_or_read(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attack = hostile.Attack(TARGETS[name], tmp_path)
    cases = [case for case in corpus.read(CORPUS) if case.target == name]
    found = [(case.what, attack.judged({**attack.valid, **case.files})) for case in cases]
    assert not [(what, wrong) for what, wrong in found if wrong is not None]


def _reads_elsewhere(model, folder):
    (folder.parent / "other").read_bytes()


def _lists_and_writes(model, folder):
    (folder.parent / "other").write_text("changed")


def _runs_code(model, folder):
    eval("1 + 1")


def _starts_a_program(model, folder):
    os.system("true")


def _takes_memory(model, folder):
    torch.ones(2**24)


def _changes_the_model(model, folder):
    with torch.no_grad():
        model[0].weight[0, 0] = 1
    raise PeftValueError("refused")


def _raises_a_bare_error(model, folder):
    raise KeyError("r")


def _never_ends(model, folder):
    while True:
        pass


@pytest.mark.parametrize(
    ("read", "finding"),
    [
        (_reads_elsewhere, "opens .*other"),
        (_lists_and_writes, "writes .*other"),
        (_runs_code, "runs code"),
        (_starts_a_program, "starts a program"),
        (_takes_memory, "bytes of memory"),
        (_changes_the_model, "the model has changed"),
        (_raises_a_bare_error, "a bare error: KeyError"),
        (_never_ends, "more than"),
    ],
)
def test_a_reader_that_does_harm_is_found(read, finding, tmp_path, monkeypatch):
    (tmp_path / "other").write_text("other")
    monkeypatch.setattr(hostile.judge, "SECONDS", 0.2)
    harmless = Target("harmless", lambda f: (f / CONFIG).write_text("{}"), lambda m, f: None)
    attack = hostile.Attack(harmless, tmp_path)
    attack.target = Target("harmful", harmless.write, read)
    assert re.search(finding, attack.judged(attack.valid))


def test_a_loaded_model_that_is_not_its_file_is_found(tmp_path):
    scenarios.adapted("LORA", 2).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(scenarios.base(), tmp_path)
    assert slow_reading.difference(model, tmp_path) is None
    layer = model.base_model.model[2]
    layer.scaling["default"] *= 1.01
    assert "outputs differ" in slow_reading.difference(model, tmp_path)
    with torch.no_grad():
        layer.lora_A["default"].weight[0, 0] += 1
    assert "other values" in slow_reading.difference(model, tmp_path)


def test_decisions_come_from_bytes_and_then_from_a_fixed_generator():
    one, two, other = (damage.Decisions(data) for data in (b"abcdef", b"abcdef", b"abcdeg"))
    draws = [[chance.getrandbits(8) for _ in range(20)] for chance in (one, two, other)]
    assert draws[0] == draws[1]
    assert draws[0][:5] == draws[2][:5] == [*b"abcde"]
    assert draws[0] != draws[2]


def test_a_change_of_a_size_that_no_file_holds_makes_a_small_file():
    shape, content = [2**31, 2**31], bytes(8)
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, len(content)]}
    for seed in range(200):
        changed, _ = tensor_files.tensors(
            tensor_files.joined({"0.weight": entry}, content), random.Random(seed)
        )
        assert len(changed) < 2**22


def test_a_size_that_no_file_holds_is_refused_before_memory_is_taken(tmp_path):
    scenarios.adapted("LORA", 1).save_pretrained(tmp_path)
    path = tmp_path / CONFIG
    path.write_text(path.read_text().replace('"r": 2,', '"r": 1000000000,'))
    with pytest.raises(ValueError, match="`r`=1000000000, and the weights have .* bytes"):
        PeftModel.from_pretrained(scenarios.base(), tmp_path)


def _expression(chance, depth):
    kind = chance.randrange(12)
    if depth <= 0 or kind < 3:
        return chance.choice(["a", "b", ".", "[ab]", "[^a]", r"\w", r"\.", "c", "A"])
    inner = _expression(chance, depth - 1)
    if kind < 6:
        return inner + _expression(chance, depth - 1)
    if kind < 8:
        return f"({inner}|{_expression(chance, depth - 1)})"
    if kind == 8:
        return chance.choice(["(?=", "(?!", "(?:"]) + inner + ")"
    if kind == 9:
        return chance.choice(["^", "$", r"\b", r"\B", "(?<=a)", "(?<!b)"]) + inner
    return f"({inner})" + chance.choice(["*", "+", "?", "*?", "+?", "{2}", "{1,3}", "{0,2}?"])


def test_expressions_match_as_in_python():
    chance, compared = random.Random(1), 0
    for _ in range(2000):
        flags = chance.choice(["", "", "(?i)", "(?s)", "(?m)", "(?a)", "(?x)"])
        pattern = flags + _expression(chance, 4)
        text = "".join(chance.choice("ab.c1Aé\n") for _ in range(chance.randrange(9)))
        try:
            expected = re.compile(pattern)
            machine = expressions._Machine(expressions.parser.parse(pattern))
        except (re.error, expressions.TooManyWaysError):  # lookarounds in lookarounds
            continue
        for start in {0, len(text) // 2}:
            compared += 1
            matches = expected.fullmatch(text, start) is not None
            assert (len(text) in machine.ends(text, [start])) == matches, (pattern, text, start)
    assert compared > 2000


@pytest.mark.parametrize(
    "pattern",
    ["(.+)+!", r"(?i)(\W*\w+)+!", ".*" * 12 + "!", "(.|.)*!", "(?:(?=.*!).)*!", ".*(.+){50}!"],
)
def test_an_expression_with_many_ways_ends(pattern):
    path = "text_encoder.text_model.encoder.layers.11.self_attn.out_proj"
    assert not expressions.fullmatch(pattern, path)
    assert expressions.fullmatch(pattern, path + "!")


def test_an_expression_with_too_many_ways_is_refused():
    for pattern, problem in {
        r"(.+)+\1!": "groupref is in it",
        "((.+){99}){99}": "too many",
    }.items():
        with pytest.raises(ValueError, match=f"may take exponential time .* {problem}"):
            expressions.check_expression(pattern)
