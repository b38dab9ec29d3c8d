# SPDX-License-Identifier: Apache-2.0
"""The command line: each command does what the functions do, and says in one line what is wrong."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from helpers.methods import METHODS
from helpers.models import llama

import peft
from peft.checkpoint import files
from peft.cli import program

TARGETS = ["q_proj", "v_proj"]
IDS = torch.arange(6).view(1, 6)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A base model and an adapter of each method, in folders."""
    folder = tmp_path_factory.mktemp("store")
    torch.manual_seed(0)
    base = llama()
    base.save_pretrained(folder / "base")
    (folder / "base" / "tokenizer.json").write_text("{}")
    for name, method in METHODS.items():
        base = type(base).from_pretrained(folder / "base")
        config = method.config(target_modules=TARGETS, task_type="CAUSAL_LM")
        peft.get_peft_model(base, config).save_pretrained(folder / name)
    return folder


@pytest.fixture
def run(store, tmp_path, monkeypatch):
    """Run a command line in a folder that has the store's folders; return its result."""
    monkeypatch.chdir(tmp_path)
    for path in store.iterdir():
        shutil.copytree(path, path.name)

    def call(line, code=0):
        result = CliRunner().invoke(program, line.split())
        assert result.exit_code == code, (result.output, result.exception)
        if "--json" in line and code == 0:
            result.data = json.loads(result.stdout)
        if code == 1:
            assert result.stdout == "" and result.stderr.startswith("Error: ")
            assert len(result.stderr.splitlines()) == 1
        return result

    return call


def names_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def base_model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained("base")


@pytest.mark.parametrize("name", METHODS)
def test_inspect(name, run):
    table = run(f"inspect {name}").stdout
    assert f"{name}, from peft" in table and "model.layers.*.self_attn.q_proj (2x)" in table
    assert run(f"inspect {name} --json").data == peft.inspect_adapter(name).to_dict()


def test_inspect_a_folder_of_adapters(run, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/adapter_config.json").write_text("{")
    (tmp_path / "broken/adapter_model.safetensors").write_bytes(b"no")
    result = run("inspect . --json").data
    assert {contents["methods"][0] for contents in result["adapters"]} == set(METHODS)
    assert "not a readable weights file" in result["broken"]["broken/adapter_model.safetensors"]
    assert "! broken/adapter_model.safetensors: " in run("inspect .").stdout


def test_inspect_a_pack_and_a_bank(run):
    peft.AdapterPack.write("users.adapters.safetensors", {"ada": "LORA", "ben": "LOKR"})
    table = run("inspect users.adapters.safetensors").stdout
    assert re.search(r"^ben +LOKR +512$", table, re.M) and "2 adapters" in table
    data = run("inspect users.adapters.safetensors --json").data
    assert data["adapters"][0] == {"name": "ada", "method": "LORA", "bytes": 1024}
    peft.VectorBank(torch.ones(8, 4)).save_pretrained("bank")
    assert "a bank of 8 vectors of length 4" in run("inspect bank/vector_bank.safetensors").stdout


def test_plan_needs_no_weights(run, tmp_path):
    config = peft.LoKrConfig(r=2, target_modules=["q_proj", "o_proj"], decompose_factor=2)
    line = "--method lokr --rank 2 --target q_proj,o_proj --set decompose_factor=2"
    (tmp_path / "only").mkdir()
    (tmp_path / "only/config.json").write_bytes((tmp_path / "base/config.json").read_bytes())
    for model in ("base", "only", "only/config.json"):
        assert run(f"plan {model} {line}").stdout == f"{peft.plan(llama(), config)}\n"
    assert run(f"plan only {line} --json").data == json.loads(
        json.dumps(peft.plan(llama(), config).to_dict())
    )
    own = peft.plan(llama(), peft.PeftConfig.from_pretrained("POLY"))
    assert run("plan only --config POLY --json").data["parameters"] == own.parameters


@pytest.mark.parametrize("name", ["LOHA", "LOKR", "VBLORA", "POLY"])
def test_convert_to_lora(name, run):
    task = "--task 1" if name == "POLY" else ""
    result = run(f"convert {name} out --to lora {task} --json").data
    assert result["methods"] == ["LORA"] and result["error"] == 0
    options = {"task_ids": 1} if name == "POLY" else {}
    wanted = peft.PeftModel.from_pretrained(base_model(), name)(IDS, **options).logits
    found = peft.PeftModel.from_pretrained(base_model(), "out")(IDS).logits
    torch.testing.assert_close(found, wanted)
    approximated = run(
        f"convert {name} small --to lora --rank 1 {task} --dtype bfloat16 --json"
    ).data
    assert 0 < approximated["error"] < 1 and peft.inspect_adapter("small").ranks == {1: 4}
    assert list(peft.inspect_adapter("small").dtypes) == ["bfloat16"]


def test_convert_to_poly_and_extract(run):
    run("convert LOHA LOKR tasks --to poly")
    model = peft.PeftModel.from_pretrained(base_model(), "tasks")
    wanted = {
        name: peft.PeftModel.from_pretrained(base_model(), name)(IDS).logits
        for name in ("LOHA", "LOKR")
    }
    torch.testing.assert_close(model(IDS, task_ids="LOKR").logits, wanted["LOKR"])
    run("extract tasks one --task LOHA")
    one = peft.PeftModel.from_pretrained(base_model(), "one")
    torch.testing.assert_close(one(IDS).logits, wanted["LOHA"])
    assert list(run("extract tasks all --all-tasks --json").data["tasks"]) == ["LOHA", "LOKR"]
    path = "model.layers.0.self_attn.q_proj"
    run("extract tasks blend --task LOHA=0.25 --task LOKR=0.75")
    run("extract LOHA LOKR sum --weight 0.25 --weight 0.75")
    deltas = [
        peft.load_standalone(name).base_model.model.get_submodule(path).get_delta_weight("default")
        for name in ("blend", "sum", "LOHA", "LOKR")
    ]
    torch.testing.assert_close(deltas[1], 0.25 * deltas[2] + 0.75 * deltas[3])
    assert deltas[0].shape == deltas[1].shape


@pytest.mark.parametrize(
    ("options", "task"),
    [
        ("--task a", "a"),
        ("--task a=0.5", "a=0.5"),
        ("--task 2", 2),
        ("--task 0", "0"),
        ("--task a=0.5=0.25", {"a=0.5": 0.25}),
        ("--task a=0.25 --task a=0.5=0.75 --task 1=2", {"a": 0.25, "a=0.5": 2.75}),
        ("--task a=0.5 --task 0", {"a=0.5": 0.5, "0": 0.5}),
    ],
)
def test_a_task_of_exactly_that_name_comes_before_a_share_and_a_number(options, task, run):
    """Its id is not what its name looks like."""
    fields = {"n_tasks": 3, "task_names": ["a", "a=0.5", "0"], "target_modules": TARGETS}
    model = peft.get_peft_model(base_model(), METHODS["POLY"].config(**fields))
    model.save_pretrained("named")
    run(f"extract named one {options}")
    found = peft.load_peft_weights("one")
    for key, tensor in peft.convert_to_lora(model, task_id=task).state_dict.items():
        torch.testing.assert_close(found[key], tensor)


@pytest.mark.parametrize("layout", ["kohya", "lycoris", "diffusers", "ai-toolkit"])
def test_convert_between_layouts(layout, run):
    run(f"convert LOKR style.safetensors --to {layout}")
    model = "--model base" if layout in ("kohya", "lycoris") else ""
    run(f"convert style.safetensors again --to folder {model}")
    first, second = (peft.PeftModel.from_pretrained(base_model(), n) for n in ("LOKR", "again"))
    torch.testing.assert_close(second(IDS).logits, first(IDS).logits)
    run(f"convert style.safetensors as-lora --to lora {model}")
    third = peft.PeftModel.from_pretrained(base_model(), "as-lora")
    torch.testing.assert_close(third(IDS).logits, first(IDS).logits)


def test_a_file_without_paths_asks_for_the_model(run):
    run("convert LOKR style.safetensors --to kohya")
    assert "pass the model that it is for" in run("convert style.safetensors x --to lora", 1).stderr


@pytest.mark.parametrize("name", METHODS)
def test_merge(name, run, tmp_path):
    task = "--task 1" if name == "POLY" else ""
    assert run(f"merge {name} merged --base base {task} --json").data == {"output": "merged"}
    options = {"task_ids": 1} if name == "POLY" else {}
    wanted = peft.PeftModel.from_pretrained(base_model(), name)(IDS, **options).logits
    found = type(base_model()).from_pretrained("merged")(IDS).logits
    torch.testing.assert_close(found, wanted)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(
        names_below(tmp_path / "merged")
    )
    assert not [name for name in names_below(tmp_path) if name.startswith(".")]
    if name == "LORA":
        run("merge LORA again")  # into the base model that the adapter names
        run(f"merge {name} merged --base base --dtype bfloat16 --force")
        assert type(base_model()).from_pretrained("merged", dtype="auto").dtype == torch.bfloat16


def test_compare(run):
    table = run("compare LOHA LOKR LORA").stdout
    assert "most alike" in table and "configs differ in" in table
    data = run("compare LOHA LOKR --json").data
    deltas = {}
    for name in ("LOHA", "LOKR"):
        model = peft.PeftModel.from_pretrained(base_model(), name)
        layers = dict(model.base_model.named_tuner_layers())
        deltas[name] = torch.cat(
            [layer.get_delta_weight("default").flatten() for layer in layers.values()]
        )
    cosine = torch.nn.functional.cosine_similarity(deltas["LOHA"], deltas["LOKR"], dim=0)
    assert data["cosines"][0][1] == pytest.approx(float(cosine), abs=1e-4)


@pytest.mark.parametrize(("name", "field"), [("LORA", "use_dora"), ("LOKR", "weight_decompose")])
def test_compare_says_what_it_does_not_compare(name, field, run):
    config = METHODS[name].config(target_modules=TARGETS, **{field: True})
    peft.get_peft_model(base_model(), config).save_pretrained("decomposed")
    for line in (
        "compare decomposed LOHA",
        "compare LOHA decomposed",
        f"compare {name} decomposed",
    ):
        assert "Adapter 'decomposed': It has weight decomposition (DoRA)" in run(line, 1).stderr


def test_bench(run):
    data = run("bench base --config LORA --length 8 --rounds 1 --train --json").data
    assert data["method"] == "LORA" and data["forward"]["adapter"] > 0 < data["training"]["base"]
    line = "bench base/config.json --random --method poly --set n_tasks=2 --rounds 1 --batch 2"
    assert "forward" in run(line).stdout


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("inspect nowhere", "there is no folder 'nowhere'"),
        ("inspect LOR", "did you mean"),
        ("inspect broken.safetensors", "not a readable weights file"),
        ("convert LOKR taken --to lora", "'taken' exists already; `--force` replaces it"),
        (
            "convert LOKR base --to lora --force",
            "without 'adapter_config.json', and is not replaced",
        ),
        ("convert LOKR LOKR --to lora --force", "'LOKR' is also a source"),
        ("convert LOKR x --to lora --rank 99", "rank 99 is larger than the weight"),
        ("convert LOKR broken.safetensors/x --to lora", "'broken.safetensors' is a file"),
        ("convert broken.safetensors x --to lora", "not a readable weights file"),
        (
            "convert LORA x.safetensors --to kohya",
            "'LORA' is a LORA adapter, and `--to kohya` writes files of LoKr only",
        ),
        ("extract LOKR nowhere x", "there is no folder 'nowhere'"),
        ("merge LOKR taken --base base", "'taken' exists already; `--force` replaces it"),
        ("merge LOKR LORA --base base --force", "without 'config.json', and is not replaced"),
        ("merge LOKR x --base nowhere", "there is no folder 'nowhere'"),
        ("merge LOKR x --base LORA", "Can't find 'config.json'"),
        ("merge LOKR x --base hollow", "The base model 'hollow' can't be loaded"),
        ("plan base --method lora --set bla=3", "unexpected keyword argument 'bla'"),
        ("plan LORA --method lora", "Can't find 'config.json'"),
        ("plan base --method vblora --target q_proj", "must be divisible by `vector_length`"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_changes(line, message, run, tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"0123456789")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow/config.json").write_bytes((tmp_path / "base/config.json").read_bytes())
    before = names_below(tmp_path)
    assert re.search(message, run(line, 1).stderr), line
    assert names_below(tmp_path) == before


@pytest.mark.parametrize(
    "line",
    [
        "nothing",
        "inspect",
        "plan base",
        "plan base --method lora --config LORA",
        "plan base --method lora --set r",
        "convert LOKR x",
        "convert LOKR LORA x --to lora",
        "convert LOKR x --to lora --rank many",
        "extract LOKR LORA x --weight 1",
        "extract POLY x --task a=b",
        "extract POLY x",
        "extract LORA x --task 1",
        "merge unnamed x",
        "merge POLY x --base base",
        "compare LOKR",
    ],
)
def test_wrong_usage(line, run, tmp_path):
    peft.LoraConfig(target_modules=TARGETS).save_pretrained("unnamed")
    before = names_below(tmp_path)
    assert "Usage: peft" in run(line, 2).stderr
    assert names_below(tmp_path) == before


LINES = [
    "convert LOKR x --to lora",
    "convert LOKR x.safetensors --to kohya",
    "extract LOKR LORA x",
    "merge LOKR x --base base",
]


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("kind", ["full disk", "Ctrl-C"])
def test_an_interruption_leaves_nothing(line, kind, run, tmp_path, monkeypatch):
    """The disk is full, or the user interrupts, after a part of the weights was written."""
    error = (
        KeyboardInterrupt()
        if kind == "Ctrl-C"
        else OSError(errno.ENOSPC, "No space left on device")
    )

    def fail(tensors, path, *args, **kwargs):
        with open(path, "wb") as file:
            file.write(b"some")
        raise error

    monkeypatch.setattr(files, "save_file", fail)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    before = names_below(tmp_path)
    result = run(line, 130 if kind == "Ctrl-C" else 1)
    assert ("Stopped" if kind == "Ctrl-C" else "No space left on device") in result.stderr
    assert names_below(tmp_path) == before


def test_what_libraries_print_is_not_in_the_output(run, monkeypatch):
    real = peft.meta_model

    def noisy(*args, **kwargs):
        print("noise")
        return real(*args, **kwargs)

    monkeypatch.setattr(sys.modules["peft.cli.plan"], "meta_model", noisy)
    result = run("plan base --method lora --json")
    assert result.data["method"] == "LORA" and "noise" in result.stderr


def test_debug_shows_where(run):
    result = CliRunner().invoke(program, ["inspect", "nowhere", "--debug"])
    assert isinstance(result.exception, peft.PeftError)


@pytest.mark.processes
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_as_a_process_whose_output_has_no_room(store, unbuffered):
    command = [sys.executable, "-m", "peft", "inspect", str(store / "LORA"), "--json"]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment
        )
    assert result.returncode == 1 and result.stderr.endswith("Error: No space left on device\n")


def test_library(run, tmp_path):
    for name in ("base", "VBLORA"):
        shutil.rmtree(tmp_path / name)
    changes = run("library index . --json").data
    assert changes["added"] == sorted(set(METHODS) - {"VBLORA"}) and changes["adapters"] == 4
    peft.AdapterLibrary(".").tag("LORA", "math")
    assert run("library list . --tag math --json").data["adapters"][0]["name"] == "LORA"
    assert [e["name"] for e in run("library list . --method lokr --json").data["adapters"]] == [
        "LOKR"
    ]
    assert "4 adapters" in run("library list .").stdout
    assert "sound" in run("library check .").stdout
    weights = tmp_path / "LOHA/adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # still a sound file
    (tmp_path / "LOKR").rename(tmp_path / "away")
    for _ in range(2):  # a check does not make what it finds the new index
        report = CliRunner().invoke(program, ["library", "check", ".", "--json"])
        kinds = {p["name"]: p["kind"] for p in json.loads(report.stdout)["problems"]}
        assert kinds == {"LOHA": "changed", "LOKR": "missing", "away": "not indexed"}
        assert report.exit_code == 1
    weights.write_bytes(content)
    (tmp_path / "away").rename(tmp_path / "LOKR")
    shutil.rmtree(tmp_path / "LORA")
    (tmp_path / "LOKR/adapter_config.json").write_text("{")
    with pytest.warns(UserWarning, match="Left out"):
        peft.AdapterLibrary(".")
    result = CliRunner().invoke(program, ["library", "check", ".", "--json"])
    problems = {p["name"]: p["kind"] for p in json.loads(result.stdout)["problems"]}
    assert result.exit_code == 1 and (problems["LORA"], problems["LOKR"]) == ("missing", "left out")
    before = names_below(tmp_path)
    assert "Would remove 'LOKR': left out" in run("library prune . --dry-run").stdout
    assert "pass `--force` too" in run("library prune . --delete-files", 2).stderr
    assert names_below(tmp_path) == before
    removed = run("library prune . --json").data["removed"]
    assert {p["name"] for p in removed} == {"LORA", "LOKR"} and (tmp_path / "LOKR").is_dir()
    assert run("library prune . --dry-run --json").data["removed"] == []
    (tmp_path / "POLY/adapter_config.json").write_text("{")
    run("library prune . --delete-files --force")
    assert not (tmp_path / "POLY").exists() and (tmp_path / "LOKR").is_dir()
    assert "There is no folder 'nowhere'" in run("library list nowhere", 1).stderr


def commands_of(group):
    for command in group.commands.values():
        yield from commands_of(command) if hasattr(command, "commands") else [command]


def test_every_option_is_described():
    for command in commands_of(program):
        assert command.help
        for parameter in command.params:
            assert parameter.param_type_name == "argument" or parameter.help, parameter.name
        assert {"as_json", "debug"} <= {parameter.name for parameter in command.params}
