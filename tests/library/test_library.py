# SPDX-License-Identifier: Apache-2.0
"""A library's index says what is in its folder, after every change of files and of entries."""

import hashlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers.methods import METHODS
from helpers.models import mlp
from helpers.users import USERS, save_user
from safetensors.torch import load_file, save_file

from peft import AdapterLibrary, AdapterPack, PeftConfig, PeftModel
from peft.base.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointWriteError,
    PeftTypeError,
    PeftValueError,
)
from peft.library import index, inspecting, refreshing

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ALL = {f"methods/{name.lower()}" for name in METHODS} | {f"users/{user}" for user in USERS}


@pytest.fixture
def inspected(monkeypatch):
    """Names of the folders whose files are read for the index."""
    paths, inspect = [], refreshing.inspect_folder

    def noted(path, files, known=None):
        paths.append(path.name)
        return inspect(path, files, known)

    monkeypatch.setattr(refreshing, "inspect_folder", noted)
    return paths


def on_disk(path):
    """What an entry should say, by the files alone."""
    config = json.loads((path / CONFIG).read_text())
    raw = (path / WEIGHTS).read_bytes()
    tasks = config.get("task_names") or [f"task_{i}" for i in range(config.get("n_tasks") or 0)]
    return (
        config["peft_type"],
        config["base_model_name_or_path"],
        config["task_type"],
        config["r"],
        tuple(tasks),
        len(raw),
        hashlib.sha256(raw).hexdigest(),
    )


def test_an_entry_says_what_the_files_say(folder):
    library = AdapterLibrary(folder)
    assert set(library.names) == ALL and not library.left_out
    for entry in library:
        facts = (entry.method, entry.base_model, entry.task_type, entry.rank, entry.tasks)
        assert (*facts, entry.bytes, entry.sha256) == on_disk(folder / entry.name)
        assert str(entry.place) == entry.name and library[entry.name] is entry
    assert repr(library).endswith("9 adapters)")
    lines = (folder / "adapter_library.jsonl").read_text().splitlines()
    assert len(lines) == 1 + len(ALL) and all(json.loads(line) for line in lines)
    shown = str(library).splitlines()
    assert len(shown) == 2 + len(ALL) and shown[0].split()[:3] == ["name", "method", "rank"]


def test_the_library_itself_may_be_an_adapter_and_names_have_no_dots(folder):
    shutil.copytree(folder / "methods" / "lora", folder, dirs_exist_ok=True)
    shutil.copytree(folder / "methods" / "lora", folder / "qwen2.5" / "v1.0")
    shutil.copytree(folder / "methods" / "lora", folder / "items")  # a method of dictionaries
    library = AdapterLibrary(folder)
    assert set(library.names) == ALL | {"default", "qwen2_5/v1_0", "adapter_items"}
    assert library["qwen2.5/v1.0"].name == "qwen2_5/v1_0" and library["."].name == "default"
    model = library.add_to(mlp(), ["qwen2_5/v1_0", "adapter_items", "default"])
    assert set(model.peft_config) == {"qwen2_5/v1_0", "adapter_items", "default"}


def test_only_what_changed_is_read_again(folder, inspected):
    library = AdapterLibrary(folder)
    assert len(inspected) == len(ALL)
    inspected.clear()
    assert AdapterLibrary(folder).names == library.names and not inspected
    assert not library.refresh()
    save_user(folder / "users" / "eva", "bank", folder)
    save_user(folder / "users" / "ada", "bank", folder)
    shutil.rmtree(folder / "users" / "cai")
    changes = library.refresh()
    assert changes == (["users/eva"], ["users/ada"], ["users/cai"], [])
    assert sorted(inspected) == ["ada", "eva"]
    for name in ("users/ada", "users/eva"):
        assert library[name].sha256 == on_disk(folder / name)[-1]
    config = folder / "methods" / "lora" / CONFIG
    config.write_text(config.read_text().replace('"r": 2', '"r": 3'))
    assert library.refresh().changed == ["methods/lora"] and library["methods/lora"].rank == 3


def test_a_change_that_keeps_size_and_time_is_seen(folder):
    library = AdapterLibrary(folder)
    path = folder / "users" / "ada" / WEIGHTS
    before, found = path.read_bytes(), path.stat()
    with open(path, "rb+") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([before[-1] ^ 1]))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert path.stat().st_size == found.st_size and path.stat().st_mtime_ns == found.st_mtime_ns
    assert library.refresh().changed == ["users/ada"]
    assert library["users/ada"].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_the_owner_writes_stays(folder):
    library = AdapterLibrary(folder)
    library.tag(["users/ada", "users/ben"], "good", "new")
    library.tag("users/ben", remove="new")
    library.score("users/ada", accuracy=0.5, loss=2)
    library.score("users/ada", loss=None, speed=3.5)
    library.rename("users/ada", "best")
    expected = ("users/ada", ("good", "new"), {"accuracy": 0.5, "speed": 3.5})

    def written(library, name="best"):
        entry = library[name]
        return str(entry.place), entry.tags, dict(entry.scores)

    assert written(library) == expected == written(AdapterLibrary(folder))
    assert "users/ada" not in library.names and library["users/ada"].name == "best"
    save_user(folder / "users" / "ada", "bank", folder)  # other weights
    library.refresh()
    assert written(library) == expected
    (folder / "users" / "ada").rename(folder / "moved")
    assert library.refresh() == (["best"], [], ["best"], [])
    assert written(AdapterLibrary(folder)) == ("moved", *expected[1:])
    (folder / "moved").rename(folder.parent / "away")  # a disk that is not mounted
    library.refresh()
    assert "best" not in library and library.check().problems[0][:2] == ("best", "missing")
    shutil.copy(library.index_file, folder.parent / "index")
    library.remove("best")  # not only away
    assert library.check().ok
    shutil.move(folder.parent / "index", library.index_file)
    (folder.parent / "away").rename(folder / "moved")
    library.refresh()
    assert written(library) == ("moved", *expected[1:])
    weights = (folder / "moved" / WEIGHTS).read_bytes()
    (folder / "moved" / WEIGHTS).write_bytes(weights[:-1])
    with pytest.warns(UserWarning, match="Left out of the library.*'moved'"):
        library.refresh()
    (folder / "moved" / WEIGHTS).write_bytes(weights)
    library.refresh()
    assert written(library) == ("moved", *expected[1:])


def test_filters(folder):
    library = AdapterLibrary(folder)
    library.tag(["users/ada", "users/ben"], "x")
    library.tag(["users/ben", "methods/lora"], "y")
    library.score("users/ada", acc=0.5)
    library.score("methods/lora", acc=0.9)
    assert library.filter(tags="x").names == ["users/ada", "users/ben"]
    assert library.filter(tags=["x", "y"]).names == ["users/ben"]
    assert library.filter(method=["lora", "POLY"]).names == ["methods/lora", "methods/poly"]
    assert library.filter(base_model="base/loha").names == ["methods/loha"]
    assert library.filter(task="task_1").names == ["methods/poly"]
    assert library.filter(min_scores={"acc": 0.6}).names == ["methods/lora"]
    assert library.filter(rank=3).names == [] == library.filter(task_type="CAUSAL_LM").names
    chosen = library.filter(method="VBLORA", where=lambda entry: entry.name > "users/c")
    assert chosen.names == ["users/cai", "users/dora"]
    assert chosen.bytes == sum(library[name].bytes for name in chosen.names)
    assert [line["name"] for line in chosen.to_json()] == chosen.names
    with pytest.raises(PeftValueError, match="'LORRA' is none of.*Did you mean 'LORA'"):
        library.filter(method="lorra")
    with pytest.raises(PeftValueError, match="No adapter has a score 'acct'.*Did you mean 'acc'"):
        library.filter(min_scores={"acct": 1})


def test_removed_adapters_stay_away(folder):
    library = AdapterLibrary(folder)
    library.remove(["users/ada", "methods/lora"])
    assert set(AdapterLibrary(folder).names) == ALL - {"users/ada", "methods/lora"}
    assert (folder / "users" / "ada" / WEIGHTS).exists()
    entry = library.add(folder / "users" / "ada", "ada", tags=["back"], scores={"a": 1})
    assert (entry.name, entry.tags, entry.scores) == ("ada", ("back",), {"a": 1})
    assert set(AdapterLibrary(folder).names) == ALL - {"users/ada", "methods/lora"} | {"ada"}
    (folder / "users" / "ben" / "notes.txt").write_text("mine")
    library.remove(["users/ben", "users/cai"], delete_files=True)
    assert os.listdir(folder / "users" / "ben") == ["notes.txt"]
    assert not (folder / "users" / "cai").exists()
    save_user(folder / "users" / "cai", "bank", folder)
    assert library.refresh().added == ["users/cai"]


def test_adapters_from_elsewhere_are_copied(folder, made, tmp_path):
    (tmp_path / "other").mkdir()
    library = AdapterLibrary(tmp_path / "other")
    entry = library.add(folder / "methods" / "lora", "sums", tags="math")
    assert (
        entry.tags == ("math",) and library["sums"].sha256 == on_disk(folder / "methods/lora")[-1]
    )
    for name in (CONFIG, WEIGHTS):
        copied, source = tmp_path / "other" / "sums" / name, folder / "methods" / "lora" / name
        assert copied.read_bytes() == source.read_bytes()
    assert library.add(folder / "methods" / "poly").name == "poly"
    assert {path.name for path in library.folder.iterdir()} == {
        "adapter_library.jsonl", "sums", "poly"
    }  # fmt: skip
    with pytest.raises(PeftValueError, match="has a folder '.*sums' already"):
        library.add(folder / "methods" / "loha", "sums")
    shutil.copytree(folder / "methods" / "lora", tmp_path / "poly")
    with pytest.raises(PeftValueError, match="has a folder '.*poly' already"):
        library.add(tmp_path / "poly")
    assert library.add(folder / "methods" / "poly").name == "poly"  # it is there already
    with pytest.raises(CheckpointError, match="can't be added.*no 'adapter_config.json'"):
        library.add(folder / "bank")
    assert library.names == ["poly", "sums"]


def test_adapters_on_the_hub_keep_their_commit(folder, tmp_path, monkeypatch):
    commit, cache = "c0ffee" * 7, tmp_path / "hub"
    snapshot = cache / "models--me--sums" / "snapshots" / commit
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        shutil.copy(folder / "methods" / "lora" / name, blobs / name)
        (snapshot / name).symlink_to(Path("..", "..", "blobs", name))
    asked = []

    def download(repository, name, revision=None, **options):
        asked.append((repository, revision))
        if repository != "me/sums" or not (snapshot / name).exists():
            raise huggingface_hub.errors.LocalEntryNotFoundError(name)
        return str(snapshot / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    library = AdapterLibrary(folder)
    entry = library.add("me/sums", tags=["far"])
    assert entry.name == "me/sums" and entry.sha256 == library["methods/lora"].sha256
    library = AdapterLibrary(folder)
    assert library["me/sums"].tags == ("far",) and library["me/sums"].place.revision == commit
    asked.clear()
    tensors = library.load("me/sums").tensors
    assert set(asked) == {("me/sums", commit)}
    expected = load_file(folder / "methods" / "lora" / WEIGHTS)
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert library.check().ok
    with pytest.raises(PeftValueError, match="is on the Hub; its files belong to the cache"):
        library.remove("me/sums", delete_files=True)
    library.remove("me/sums")
    assert set(AdapterLibrary(folder).names) == ALL
    with pytest.raises(CheckpointNotFoundError):
        library.add("me/nothing")
    with pytest.raises(PeftValueError, match="HF_HUB_CACHE"):
        library.add("me/sums", cache_dir=cache)


def test_a_folder_that_can_not_be_written_to_has_its_index_elsewhere(folder, tmp_path, monkeypatch):
    library = AdapterLibrary(folder, index=tmp_path / "mine.jsonl")
    library.tag("users/ada", "x")
    assert not (folder / "adapter_library.jsonl").exists()
    assert AdapterLibrary(folder, index=tmp_path / "mine.jsonl").filter(tags="x").names
    AdapterLibrary(folder, index=tmp_path / "new" / "mine.jsonl").tag("users/ada", "x")
    assert (tmp_path / "new" / "mine.jsonl").exists()

    def refuse(path, text):
        raise CheckpointWriteError(f"'{path}' can't be written")

    monkeypatch.setattr(index, "write_text", refuse)
    library = AdapterLibrary(folder)
    assert set(library.names) == ALL  # for reading it is enough
    assert not library.refresh() and set(library.names) == ALL
    with pytest.raises(OSError, match="can't be written"):
        library.tag("users/ada", "y")
    assert not library["users/ada"].tags


def header(text, data=b"", length=None):
    raw = text if isinstance(text, bytes) else json.dumps(text).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def weights(raw):
    return lambda path: (path / WEIGHTS).write_bytes(raw)


def config(change):
    def edit(path):
        content = json.loads((path / CONFIG).read_text())
        (path / CONFIG).write_text(json.dumps(change(content)))

    return edit


def cut(path):
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-1])


def longer(path):
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes() + b"x")


def folder_for_config(path):
    (path / CONFIG).unlink()
    (path / CONFIG).mkdir()


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
BROKEN = {
    "not JSON": (lambda path: (path / CONFIG).write_text("{"), "not valid JSON"),
    "not text": (lambda path: (path / CONFIG).write_bytes(b"\xff\xfe{}"), "can't decode|not valid"),
    "deep": (lambda path: (path / CONFIG).write_text("[" * 10**5), "not valid JSON"),
    "a list": (config(lambda content: [content]), "must hold a JSON object"),
    "no method": (config(lambda content: content | {"peft_type": None}), "has no `peft_type`"),
    "unknown method": (config(lambda c: c | {"peft_type": "NEW"}), "'NEW'.*names no method"),
    "foreign method": (config(lambda c: c | {"peft_type": "IA3"}), "'IA3' is not provided"),
    "bad value": (config(lambda content: content | {"r": -1}), "`r`=-1 must be an integer"),
    "odd value": (config(lambda content: content | {"r": {"x": []}}), "`r`="),
    "no config": (lambda path: (path / CONFIG).unlink(), "no 'adapter_config.json' beside"),
    "no weights": (lambda path: (path / WEIGHTS).unlink(), "no 'adapter_model.safetensors' beside"),
    "a folder": (folder_for_config, "can't be read: it is no regular file"),
    "empty": (weights(b""), "it has 0 bytes"),
    "cut": (cut, "the file is damaged or cut"),
    "longer": (longer, "its header says"),
    "long header": (weights((1 << 60).to_bytes(8, "little") + b"{}"), "its header would take"),
    "no JSON header": (weights(header(b"{")), "its header is not valid JSON"),
    "list header": (weights(header([])), "not a JSON object"),
    "gap": (weights(header({"lora_A": ONE | {"data_offsets": [4, 8]}}, b"12345678")), "a gap"),
    "overlap": (weights(header({"lora_A": ONE, "lora_B": ONE}, b"1234")), "gap or an overlap"),
    "wrong size": (weights(header({"lora_A": ONE | {"shape": [2]}}, b"1234")), "do not fit its"),
    "negative": (weights(header({"lora_A": ONE | {"shape": [-1]}}, b"1234")), "no sizes"),
    "odd dtype": (weights(header({"lora_A": ONE | {"dtype": "F7"}}, b"1234")), "dtype 'F7'"),
    "no entry": (weights(header({"lora_A": []})), "not that of a tensor"),
    "no tensors": (weights(header({})), "no tensor of LORA.*it is empty"),
    "of another method": (weights(header({"a.lokr_w1": ONE}, b"1234")), "no tensor of LORA"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_the_broken_are_named_and_left_out(folder, how):
    break_it, reason = BROKEN[how]
    library = AdapterLibrary(folder)
    path = folder / "methods" / "lora"
    break_it(path)
    with pytest.raises(Exception):  # noqa: B017, PT011  loading fails too, whatever the error
        PeftModel.from_pretrained(mlp(), path)
    with pytest.warns(UserWarning, match="Left out of the library.*methods/lora"):
        assert library.refresh().left_out == ["methods/lora"]
    assert set(library.names) == ALL - {"methods/lora"}
    ((name, why),) = library.left_out
    assert name == "methods/lora" and re.search(reason, why)
    assert why in str(library) and "1 left out" in repr(library)
    again = AdapterLibrary(folder)  # without another warning
    assert again.left_out == library.left_out and again.names == library.names
    with pytest.raises(PeftValueError, match="no adapter 'methods/lora'.*It is left out: "):
        again.load("methods/lora")
    shutil.rmtree(path)
    assert not AdapterLibrary(folder).left_out


def test_an_error_of_the_disk_does_not_last(folder, monkeypatch):
    library = AdapterLibrary(folder)
    library.tag("users/ada", "x")
    save_user(folder / "users" / "ada", "bank", folder)

    def fail(file):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(inspecting, "digest_of", fail)
        with pytest.warns(UserWarning, match="Left out.*It can't be read: Input/output error"):
            library.refresh()
    assert "users/ada" not in library
    assert AdapterLibrary(folder)["users/ada"].tags == ("x",)


def test_links_lead_nowhere_unless_asked(folder, made):
    (folder / "out").symlink_to(made / "methods")
    (folder / "loop").symlink_to(folder)
    (folder / "gone").symlink_to(folder / "nothing")
    (folder / "ring").symlink_to(folder / "ring")
    shutil.copytree(folder / "methods" / "lora", folder / "partly")
    (folder / "partly" / WEIGHTS).unlink()
    (folder / "partly" / WEIGHTS).symlink_to(made / "methods" / "lora" / WEIGHTS)
    (folder / "users" / "eva").symlink_to(folder / "methods" / "loha")
    with pytest.warns(UserWarning, match="Left out"):
        library = AdapterLibrary(folder)
    reasons = dict(library.left_out)
    assert set(library.names) == ALL
    assert reasons.keys() == {"out", "loop", "gone", "ring", "partly", "users/eva"}
    assert "a folder that it is in" in reasons["loop"] and "is missing" in reasons["gone"]
    assert "`follow_links=True`" in reasons["out"] and "out of the library" in reasons["partly"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = AdapterLibrary(folder, follow_links=True)
    outside = {f"out/{name.lower()}" for name in METHODS}
    assert set(library.names) == ALL | outside | {"partly"}
    assert dict(library.left_out).keys() == {"loop", "gone", "ring", "users/eva"}
    assert "under another path" in dict(library.left_out)["users/eva"]
    assert library.check().ok


def test_legacy_weights_are_read_without_running_code(folder):
    lora = folder / "methods" / "lora"
    expected = load_file(lora / WEIGHTS)
    (lora / WEIGHTS).unlink()
    torch.save(expected, lora / "adapter_model.bin")

    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(folder / "run"),)

    torch.save({"lora_A": Runs()}, folder / "methods" / "loha" / "adapter_model.bin")
    (folder / "methods" / "loha" / WEIGHTS).unlink()
    with pytest.warns(UserWarning, match="Left out.*methods/loha"):
        library = AdapterLibrary(folder)
    assert not (folder / "run").exists() and set(library.names) == ALL - {"methods/loha"}
    tensors = library.load("methods/lora").tensors
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert library.check(["methods/lora"]).ok


@pytest.mark.parametrize("size", range(0, 3000, 211))
def test_a_damaged_index_is_built_again_with_what_its_sound_lines_say(folder, size):
    library = AdapterLibrary(folder)
    library.tag(library.names, "x")
    file = folder / "adapter_library.jsonl"
    raw = file.read_bytes()
    sound = {json.loads(line)["name"] for line in raw[:size].split(b"\n")[1:-1]}
    file.write_bytes(raw[:size] + b"\x00<<<\n")
    with pytest.warns(UserWarning, match="was damaged.*is built again"):
        library = AdapterLibrary(folder)
    assert set(library.names) == ALL
    assert set(library.filter(tags="x").names) == sound
    assert (folder / "adapter_library.jsonl.damaged").read_bytes() == raw[:size] + b"\x00<<<\n"
    assert AdapterLibrary(folder).names == library.names


def test_an_index_of_a_newer_version_is_left_alone(folder):
    file = folder / "adapter_library.jsonl"
    file.write_text('{"format": "peft adapter library", "version": 2}\n{"new": "things"}\n')
    with pytest.raises(CheckpointError, match="has version 2.*Nothing was changed"):
        AdapterLibrary(folder)
    assert file.read_text().endswith('{"new": "things"}\n')


@pytest.mark.parametrize("path", ["../secret", "/etc", "a/../../b"])
def test_an_index_leads_to_nothing_outside(folder, path):
    AdapterLibrary(folder)
    file = folder / "adapter_library.jsonl"
    lines = file.read_text().splitlines()
    evil = json.loads(lines[1]) | {"path": path, "name": "evil"}
    file.write_text("\n".join([*lines, json.dumps(evil)]))
    with pytest.warns(UserWarning, match="leads out of the library"):
        library = AdapterLibrary(folder)
    assert "evil" not in library and set(library.names) == ALL


def test_a_check_finds_what_a_refresh_has_not_seen(folder):
    library = AdapterLibrary(folder)
    report = library.check()
    assert report.ok and report.checked == len(ALL) and not report.problems
    assert report.bytes == sum(entry.bytes for entry in library)
    shutil.rmtree(folder / "users" / "ada")
    raw = bytearray((folder / "users" / "ben" / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (folder / "users" / "ben" / WEIGHTS).write_bytes(raw)
    cut(folder / "users" / "cai")
    config(lambda content: content | {"r": 3})(folder / "methods" / "lora")
    save_user(folder / "users" / "eva", "bank", folder)
    report = library.check()
    assert [problem[:2] for problem in report.problems] == [
        ("users/ada", "missing"),
        ("users/cai", "damaged"),
        ("methods/lora", "changed"),
        ("users/ben", "changed"),
        ("users/eva", "not indexed"),
    ]
    assert not report.ok and "not sound" in str(report) and json.dumps(report.to_json())
    assert library.check("methods/loha").ok
    shutil.rmtree(folder / "bank")
    (problem,) = library.check("users/dora").problems
    assert problem.kind == "missing" and "bank" in problem.detail


def test_bad_arguments_change_nothing(folder):
    library = AdapterLibrary(folder)
    before = (folder / "adapter_library.jsonl").read_bytes()
    calls = {
        "no adapter 'users/adda'.*Did you mean 'users/ada'": lambda: library["users/adda"],
        "has an adapter 'users/ben' already": lambda: library.rename("users/ada", "users/ben"),
        "without dots": lambda: library.rename("users/ada", "a.b"),
        "a tag is a word in one line": lambda: library.tag("users/ada", "a\nb"),
        "must be a .*finite number": lambda: library.score("users/ada", x=float("nan")),
        "no adapter 'x'": lambda: library.tag(["users/ada", "x"], "y"),
        "`max_bytes`=-1 must be": lambda: AdapterLibrary(folder, max_bytes=-1),
    }
    for message, call in calls.items():
        with pytest.raises(PeftValueError, match=message):
            call()
    wrong = {
        "named by a string, got 3": lambda: library.load(3),
        "`tags`=3 must be a word or a list": lambda: library.filter(tags=3),
        "must be a torch module|got <class 'str'>": lambda: library.add_to("model", "users/ada"),
        "a dictionary: name": lambda: AdapterPack.write(
            folder / "x.adapters.safetensors", ["users/ada"]
        ),
    }
    for message, call in wrong.items():
        with pytest.raises(PeftTypeError, match=message):
            call()
    with pytest.raises(PeftValueError, match="No adapter was named"):
        library.add_to(mlp(), [])
    with pytest.raises(CheckpointNotFoundError, match="There is no folder"):
        AdapterLibrary(folder / "nothing")
    assert (folder / "adapter_library.jsonl").read_bytes() == before


def test_a_thousand_adapters(made, tmp_path, inspected):
    raw = {name: (made / "methods" / "lora" / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    for i in range(1000):
        path = tmp_path / "library" / str(i % 7) / f"user{i}"
        path.mkdir(parents=True)
        for name, content in raw.items():
            (path / name).write_bytes(content)
    library = AdapterLibrary(tmp_path / "library")
    assert len(library) == len(inspected) == 1000 and not library.left_out
    inspected.clear()
    state = load_file(made / "methods" / "lora" / WEIGHTS)
    key = next(iter(state))
    save_file(state | {key: state[key] + 1}, tmp_path / "library" / "3" / "user10" / WEIGHTS)
    assert library.refresh() == ([], ["3/user10"], [], []) and inspected == ["user10"]
    assert torch.equal(library.load("3/user10").tensors[key], state[key] + 1)
    packed = AdapterPack.write(
        tmp_path / "packed.adapters.safetensors",
        {entry.name: library.folder / entry.place.path for entry in library},
    )
    (tmp_path / "packs").mkdir()
    shutil.move(packed.path, tmp_path / "packs")
    assert len(AdapterLibrary(tmp_path / "packs")) == 1000
    assert "… 960 more" in str(library)


def test_configs_of_newer_writers_are_indexed_without_warnings(folder):
    config(lambda content: content | {"new_option": True})(folder / "methods" / "lora")
    assert set(AdapterLibrary(folder).names) == ALL
    with pytest.warns(UserWarning, match="new_option"):
        PeftConfig.from_pretrained(folder / "methods" / "lora")
