# SPDX-License-Identifier: Apache-2.0
"""What a library says, keeps and leaves behind where files, arguments or other processes are not as
they should be.
"""

import copy
import dataclasses
import json
import os
import shutil
import stat
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers.locks import is_locked
from helpers.methods import METHODS
from helpers.models import mlp
from helpers.users import USERS, save_user

from peft import (
    AdapterFleet,
    AdapterLibrary,
    AdapterPack,
    LoraConfig,
    get_peft_model,
    get_routed_model,
)
from peft.base.errors import CheckpointError, CheckpointNotFoundError, PeftTypeError, PeftValueError
from peft.library import adding, index, inspecting, reading, refreshing, scanning
from peft.library.entry import Place
from peft.library.index import Index
from peft.library.pruning import prune
from peft.library.refreshing import Findings

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ALL = {f"methods/{name.lower()}" for name in METHODS} | {f"users/{user}" for user in USERS}


def names(folder):
    return set(AdapterLibrary(folder).names)


def test_arguments_of_other_kinds(folder):
    library = AdapterLibrary(folder)
    calls = {
        "`names`=3 must be a name or a list of names": lambda: library.tag(3, "x"),
        "`scores`=3 must be a dictionary": lambda: library.add(folder / "users/ada", scores=3),
        "`where`=3 must be a function of an entry": lambda: library.filter(where=3),
        "`model` must be a torch module": lambda: AdapterFleet("model", library),
    }
    before = library.index_file.read_bytes()
    for message, call in calls.items():
        with pytest.raises(PeftTypeError, match=message):
            call()
    assert library.index_file.read_bytes() == before


def test_an_entry_in_words(folder):
    entry = dataclasses.replace(AdapterLibrary(folder)["methods/lora"], bytes=0)
    start, end = "methods/lora: LORA of rank 2 for base/lora, ", ", in methods/lora"
    assert str(entry).startswith(start) and str(entry).endswith(end)
    bare = dataclasses.replace(entry, rank=None, base_model=None)
    assert str(bare) == f"methods/lora: LORA{str(entry)[len(start) - 2 :]}"


# Pruning


@pytest.fixture
def spoiled(folder, made):
    """A library of which some adapters can't be used."""
    library = AdapterLibrary(folder)
    library.tag("users/ada", "x")
    shutil.rmtree(folder / "users" / "ada")
    (folder / "methods" / "poly" / CONFIG).unlink()
    (folder / "out").symlink_to(made / "methods")
    with pytest.warns(UserWarning, match="Left out"):
        library.refresh()
    (folder / "users" / "ben" / WEIGHTS).write_bytes(b"")
    save_user(folder / "users" / "cai", "bank", folder)  # other weights
    save_user(folder / "users" / "eva", "bank", folder)  # new
    return library


UNUSABLE = [
    ("users/ada", "missing"),
    ("users/ben", "damaged"),
    ("methods/poly", "left out"),
    ("out", "left out"),
]
OTHERS = [("users/cai", "changed"), ("users/eva", "not indexed")]


def problems(report):
    return sorted((problem.name, problem.kind) for problem in report.problems)


def test_a_dry_run_removes_nothing(spoiled):
    before = spoiled.index_file.read_bytes()
    assert problems(prune(spoiled, dry_run=True, delete_files=True)) == sorted(UNUSABLE)
    assert problems(spoiled.check()) == sorted(UNUSABLE + OTHERS)
    assert spoiled.index_file.read_bytes() == before
    assert (spoiled.folder / "users" / "ben" / WEIGHTS).exists()


@pytest.mark.parametrize("delete", [None, True])
def test_what_can_not_be_used_leaves_the_index(spoiled, made, delete):
    """The files stay unless they are to be deleted; links lead to what is another's."""
    folder = spoiled.folder
    options = {} if delete is None else {"delete_files": delete}
    report = prune(spoiled, **options)
    assert problems(report) == sorted(UNUSABLE) and report.checked == len(ALL) - 2
    # Deleting looks at the folder again.
    assert problems(spoiled.check()) == ([] if delete else sorted(OTHERS))
    assert (folder / "users" / "ben" / WEIGHTS).exists() != bool(delete)
    assert (folder / "methods" / "poly" / WEIGHTS).exists() != bool(delete)
    assert (folder / "out").is_symlink() and (made / "methods" / "lora" / WEIGHTS).exists()
    assert names(folder) == ALL - {"users/ada", "users/ben", "methods/poly"} | {"users/eva"}
    assert not AdapterLibrary(folder).left_out
    for problem in (lambda: prune(spoiled, dry_run="no"), lambda: prune(spoiled, delete_files=2)):
        with pytest.raises(PeftTypeError, match="must be True or False"):
            problem()


# Packs


def test_members_of_packs_that_are_gone(folder, tmp_path):
    there = tmp_path / "packs"
    there.mkdir()
    users = {user: folder / "users" / user for user in ("ada", "ben")}
    with pytest.raises(CheckpointNotFoundError, match="Can't find '.*none.adapters.safetensors'"):
        AdapterPack(there / "none.adapters.safetensors")
    pack = there / "u.adapters.safetensors"
    AdapterPack.write(pack, users).close()
    library = AdapterLibrary(there)
    assert set(library.names) == {"u/ada", "u/ben"}
    pack.unlink()
    with pytest.raises(CheckpointNotFoundError, match="Can't find the pack"):
        library.load("u/ada")
    AdapterPack.write(pack, {"ben": users["ben"]}).close()
    with pytest.raises(CheckpointNotFoundError, match="'u/ada' is no longer in .*`refresh"):
        library.load("u/ada")
    pack.unlink()
    AdapterPack.write(pack, users).close()
    library = AdapterLibrary(there)
    library.remove("u/ada", delete_files=True)
    with AdapterPack(pack) as left:
        assert list(left) == ["ben"]
    library.remove("u/ben", delete_files=True)
    assert not pack.exists()


# Other processes


def test_another_process_has_changed_the_index(folder):
    one, other = AdapterLibrary(folder), AdapterLibrary(folder)
    other.remove("users/ada")
    other.rename("users/ben", "best")
    with pytest.raises(PeftValueError, match="'users/ada' was removed .* by another process"):
        one.tag("users/ada", "x")
    with pytest.raises(PeftValueError, match="has an adapter 'best' already"):
        one.rename("users/cai", "best")
    save_user(folder / "users" / "ada", "bank", folder)
    one.refresh()
    assert names(folder) == set(one.names) == ALL - {"users/ada", "users/ben"} | {"best"}


def test_an_index_that_another_process_has_emptied_meanwhile(folder):
    """What has the same files as before the look comes back, unless it is gone or removed."""
    before = AdapterLibrary(folder)._catalog.index
    ada, ben, cai = (Place(f"users/{name}") for name in ("ada", "ben", "cai"))
    shutil.rmtree(folder / "users" / "ben")
    shutil.copytree(folder / "users" / "ada", folder / "new")
    new, gone = Place("new"), Place("gone")  # which others have added since
    added = {p: dataclasses.replace(before.entries[ada], place=p) for p in (new, gone)}
    after = Index(dict(added), removed={cai})
    Findings(before, unchanged={ada, ben, cai}).apply(folder, after)
    assert after.entries == {ada: before.entries[ada], new: added[new]}
    assert after.removed == {cai}


def test_a_lost_adapter_that_was_removed_is_new_when_it_comes_back(folder):
    library = AdapterLibrary(folder)
    library.tag("users/ada", "x")
    shutil.move(folder / "users" / "ada", folder.parent / "away")
    library.refresh()
    library.remove("users/ada")
    shutil.move(folder.parent / "away", folder / "users" / "ada")
    library.refresh()
    assert library["users/ada"].tags == ()


def test_wrong_stamps_are_read_again(folder):
    library = AdapterLibrary(folder)
    first, *lines = map(json.loads, library.index_file.read_text().splitlines())
    for line, stamps in zip(lines, ([[1]], ["x"], 3, [[1e400, 1, 1, 1]]), strict=False):
        line["stamps"] = stamps
    library.index_file.write_text("\n".join(json.dumps(line) for line in (first, *lines)))
    again = AdapterLibrary(folder)
    assert set(again.names) == ALL and again.check().ok
    assert [entry.stamps for entry in again] == [entry.stamps for entry in library]


def test_changes_in_words(folder):
    library = AdapterLibrary(folder)
    save_user(folder / "users" / "eva", "bank", folder)
    shutil.rmtree(folder / "users" / "ada")
    shutil.rmtree(folder / "users" / "ben")
    assert str(library.refresh()) == "1 added, 0 changed, 2 dropped, 0 left out"


# Files


def test_an_index_that_can_not_be_read(folder, monkeypatch):
    AdapterLibrary(folder)

    def fail(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(index, "check_regular", fail)
    with pytest.raises(CheckpointError, match="The index '.*' can't be read: .*Input/output error"):
        AdapterLibrary(folder)


def test_a_folder_in_the_place_of_an_index(folder):
    (folder / "adapter_library.jsonl").mkdir()
    with pytest.raises(CheckpointError, match="it is a folder, a pipe or a device"):
        AdapterLibrary(folder)


@pytest.mark.filterwarnings("ignore:Left out")
def test_a_config_that_is_too_large(folder, monkeypatch):
    sizes = sorted((folder / name / CONFIG).stat().st_size for name in ALL)
    monkeypatch.setattr(inspecting, "_LARGEST_CONFIG", sizes[-2])
    library = AdapterLibrary(folder)
    (left,) = library.left_out
    assert left[1] == f"'{CONFIG}' has {sizes[-1]:,} bytes; that is no config."


def test_files_that_change_while_they_are_read(folder, monkeypatch):
    digest_of = inspecting.digest_of

    def changing(file):
        os.utime(folder / "users" / "ada" / CONFIG, ns=(1, 1))
        return digest_of(file)

    library = AdapterLibrary(folder)
    save_user(folder / "users" / "ada", "bank", folder)
    with monkeypatch.context() as patch:
        patch.setattr(inspecting, "digest_of", changing)
        with pytest.warns(UserWarning, match="Its files changed while they were read"):
            library.refresh()
    assert "users/ada" not in library and names(folder) == ALL


def test_what_is_left_out_is_not_read_again(folder, monkeypatch):
    (folder / "methods" / "lora" / WEIGHTS).write_bytes(b"")
    with pytest.warns(UserWarning, match="Left out"):
        left = AdapterLibrary(folder).left_out
    monkeypatch.setattr(refreshing, "inspect_folder", None)
    library = AdapterLibrary(folder)
    assert library.left_out == left and not library.refresh()


def test_folders_that_can_not_be_listed(folder, monkeypatch):
    scandir, refused = os.scandir, [str(folder / "users")]

    def refusing(path):
        if os.fspath(path) in refused:
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(scanning.os, "scandir", refusing)
    found = scanning.scan(str(folder))
    assert found.left_out == {"users": "The folder can't be read: Permission denied."}
    assert set(found.adapters) == {name for name in ALL if name.startswith("methods")}
    refused[0] = str(folder)
    with pytest.raises(CheckpointError, match="The folder '.*' can't be read: .*denied"):
        scanning.scan(str(folder))


def test_a_ring_of_links(folder):
    (folder / "ring").symlink_to(folder / "ring")
    assert scanning.scan(str(folder)).left_out == {"ring": "A link in a ring of links."}


def test_a_table_of_entries(folder):
    library = AdapterLibrary(folder)
    library.score("users/ada", accuracy=0.5)
    head = ["name", "method", "rank", "base", "model", "tasks", "size", "tags", "accuracy"]
    assert str(library.entries).splitlines()[0].split() == head


def test_a_name_that_is_no_text(folder):
    os.rename(folder / "users" / "ada", os.fsencode(folder / "users") + b"/\xff")
    found = scanning.scan(str(folder))
    assert found.left_out == {"users/\ufffd": "Its name is not text in UTF-8."}
    assert set(found.adapters) == ALL - {"users/ada"}


# Adding


def test_a_copy_that_fails_leaves_nothing(folder, tmp_path, monkeypatch):
    there = tmp_path / "other"
    there.mkdir()
    library, write = AdapterLibrary(there), adding._write_synced

    def failing(path, source):
        if path.name == WEIGHTS:
            raise OSError(28, "No space left on device")
        write(path, source)

    before = sorted(there.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(adding, "_write_synced", failing)
        with pytest.raises(OSError, match="No space left"):
            library.add(folder / "methods" / "lora")
    assert sorted(there.iterdir()) == before and not library.names
    (there / "lora").mkdir()
    (there / "lora" / "notes.txt").write_text("mine")
    with pytest.raises(PeftValueError, match="has a folder '.*lora' already"):
        library.add(folder / "methods" / "lora")
    assert os.listdir(there / "lora") == ["notes.txt"]


def test_a_folder_of_the_library_without_an_adapter(folder):
    library = AdapterLibrary(folder)
    with pytest.raises(CheckpointError, match="bank' can't be added to the library"):
        library.add(folder / "bank")
    (folder / "methods" / "lora" / CONFIG).unlink()
    with pytest.warns(UserWarning, match="Left out"), pytest.raises(CheckpointError, match="no '"):
        library.add(folder / "methods" / "lora")


@pytest.mark.parametrize("how", ["cut", "apart"])
def test_a_broken_adapter_on_the_hub_is_not_added(folder, tmp_path, monkeypatch, how):
    snapshot = tmp_path / "hub" / "models--me--sums" / "snapshots" / ("c0ffee" * 7)
    shutil.copytree(folder / "methods" / "lora", snapshot)
    away = tmp_path / "away"
    away.mkdir()
    if how == "cut":
        (snapshot / WEIGHTS).write_bytes((snapshot / WEIGHTS).read_bytes()[:-1])
    else:
        shutil.move(snapshot / WEIGHTS, away)

    def download(repository, name, revision=None, **options):
        for there in (snapshot, away):
            if (there / name).exists():
                return str(there / name)
        raise huggingface_hub.errors.LocalEntryNotFoundError(name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    library = AdapterLibrary(folder)
    before = Path(library.index_file).read_bytes()
    with pytest.raises(CheckpointError, match="'me/sums' can't be added to the library"):
        library.add("me/sums")
    assert library.index_file.read_bytes() == before and set(library.names) == ALL


# Small libraries of LoRA adapters


@pytest.fixture(scope="session")
def lora(tmp_path_factory):
    """Folders of three adapters of other weights: `a`, `b`, `c`."""
    folder = tmp_path_factory.mktemp("lora")
    for seed, name in enumerate("abc"):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        get_peft_model(mlp(), config).save_pretrained(folder / name)
    return folder


@pytest.fixture
def small(lora, tmp_path):
    """A library of the three in `users`."""
    shutil.copytree(lora, tmp_path / "small" / "users")
    return AdapterLibrary(tmp_path / "small")


def said(library):
    return {e.name: (str(e.place), e.tags, dict(e.scores)) for e in library}


def test_what_the_owner_wrote_is_kept_while_files_are_away(small, lora):
    """A tag, a score or a name, each alone; an adapter without any is forgotten."""
    shutil.copytree(lora / "a", small.folder / "users" / "plain")
    small.refresh()
    small.tag("users/a", "x")
    small.score("users/b", acc=1)
    small.rename("users/c", "best")
    before = said(small)
    shutil.move(small.folder / "users", small.folder.parent / "away")
    assert sorted(small.refresh().dropped) == ["best", "users/a", "users/b", "users/plain"]
    assert problems(small.check()) == [(name, "missing") for name in ("best", "users/a", "users/b")]
    shutil.move(small.folder.parent / "away", small.folder / "users")
    small.refresh()
    assert said(small) == said(AdapterLibrary(small.folder)) == before


def test_a_new_name_is_a_string(small):
    before = small.index_file.read_bytes()
    with pytest.raises(PeftTypeError, match="name None must be a string"):
        small.rename("users/a", None)
    assert small.index_file.read_bytes() == before


def test_what_the_owner_wrote_follows_the_weights(small):
    """To another path, whose name an adapter gets that had none of its own."""
    small.tag("users/a", "of a")
    small.tag("users/b", "of b")
    small.rename("users/b", "best")
    shutil.move(small.folder / "users", small.folder / "new")
    (small.folder / "new" / "b").rename(small.folder / "a")
    small.refresh()
    assert said(small) == {
        "new/a": ("new/a", ("of a",), {}),
        "best": ("a", ("of b",), {}),
        "new/c": ("new/c", (), {}),
    }


@pytest.mark.parametrize(("number", "shown", "more"), [(9, 3, 6), (4, 3, 1), (3, 3, 0)])
def test_much_that_is_left_out(small, number, shown, more):
    for i in range(number):
        (small.folder / f"x{i}").mkdir()
        (small.folder / f"x{i}" / CONFIG).write_text("{}")
    with pytest.warns(UserWarning, match="Left out of the library") as told:
        assert len(small.refresh().left_out) == number
    (text,) = (str(warning.message) for warning in told)
    assert text.count("There is no") == shown
    assert text.endswith(f"; and {more} more") == bool(more)
    assert repr(small) == f"AdapterLibrary('{small.folder}', 3 adapters, {number} left out)"
    lines = str(small).splitlines()[5:]
    expected = [f"left out: 'x{i}'. There is no '{WEIGHTS}' beside '{CONFIG}'." for i in range(8)]
    assert lines == expected[:number] + ["left out: 1 more; see `left_out`"] * (number == 9)


def test_arguments_of_a_library(small, tmp_path):
    folder = small.folder
    shutil.copytree(folder / "users" / "a", folder / "new")
    shutil.rmtree(folder / "users" / "b")
    as_it_is = AdapterLibrary(folder, refresh=False, max_bytes=0)
    assert as_it_is.names == ["users/a", "users/b", "users/c"] and len(as_it_is) == 3
    assert as_it_is.load("users/a").tensors and as_it_is.loaded_bytes == 0
    assert "users/b" in as_it_is and "new" not in as_it_is
    assert AdapterLibrary(folder, refresh=False, index=tmp_path / "none").names == []
    assert AdapterLibrary(folder).names == ["new", "users/a", "users/c"]
    assert small._cache.max_bytes == 2**30  # a gibibyte
    for arguments, kind, message in (
        ({"index": 3}, PeftTypeError, "`index`=3 must be a path"),
        ({"follow_links": "no"}, PeftTypeError, "`follow_links`='no' must be True or False"),
        ({"refresh": 2}, PeftTypeError, "`refresh`=2 must be True or False"),
        ({"max_bytes": 1.5}, PeftValueError, "`max_bytes`=1.5 must be an integer"),
    ):
        with pytest.raises(kind, match=message):
            AdapterLibrary(folder, **arguments)
    with pytest.raises(PeftTypeError, match="Expected the path of a folder with adapters, got 3"):
        AdapterLibrary(3)
    with pytest.raises(PeftTypeError, match="`delete_files`='no' must be True or False"):
        small.remove("users/a", delete_files="no")
    with pytest.raises(PeftTypeError, match="`autocast_adapter_dtype`=2 must be True or False"):
        small.add_to(mlp(), "users/a", autocast_adapter_dtype=2)
    with pytest.raises(PeftTypeError, match="named by one string, not \\['b'\\]"):
        small.add_to(mlp(), {"users/a": ["b"]})
    with pytest.raises(PeftTypeError, match="`subfolder`=5 must be a path"):
        small.add(folder, subfolder=5)
    with pytest.raises(CheckpointNotFoundError, match="has no folder 'b'"):
        small.add(folder / "users", subfolder="b")


def test_what_is_gone_leaves_the_memory(small):
    small.load("users/a")
    shutil.rmtree(small.folder / "users" / "a")
    assert small.loaded_bytes > 0
    small.refresh()
    assert small.loaded_bytes == 0


def test_weights_of_a_changed_config_are_not_read_again(small, monkeypatch):
    config, before = small.folder / "users" / "a" / CONFIG, small["users/a"]
    config.write_text(config.read_text().replace('"r": 2', '"r": 4'))
    monkeypatch.setattr(inspecting, "digest_of", None)
    assert small.refresh().changed == ["users/a"]
    after = small["users/a"]
    assert (before.rank, after.rank) == (2, 4) and after.sha256 == before.sha256
    assert before.config_sha256 != after.config_sha256


def test_folders_that_look_like_other_things(small, lora):
    """Hidden ones are passed over, one of a pack's name may be an adapter, and of two files with
    weights the safe one counts.
    """
    shutil.copytree(lora / "a", small.folder / ".git" / "x")
    shutil.copytree(lora / "a", small.folder / ".adapters.safetensors")
    shutil.copytree(lora / "a", small.folder / "x.adapters.safetensors")
    torch.save({}, small.folder / "users" / "b" / "adapter_model.bin")
    (small.folder / "notes.safetensors").write_text("mine")
    assert small.refresh() == (["x_adapters_safetensors"], [], [], [])
    assert small.load("users/b").tensors and small.check().ok
    found = scanning.scan(str(small.folder))
    assert found.adapters["users/b"].weights == WEIGHTS and not found.packs
    (small.folder / "x.adapters.safetensors" / WEIGHTS).unlink()
    left = scanning.scan(str(small.folder)).left_out
    assert left == {"x.adapters.safetensors": f"There is no '{WEIGHTS}' beside '{CONFIG}'."}


def test_files_that_can_not_be_read_now(small, monkeypatch):
    def fail(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(reading, "read_folder", fail)
    (problem,) = small.check("users/a").problems
    assert (problem.name, problem.kind) == ("users/a", "damaged") and "output" in problem.detail


def test_adapters_are_put_on_frozen_and_without_chance(small):
    """Whatever the config says; in float32 on a model of 16 bits, unless told."""
    config = small.folder / "users" / "a" / CONFIG
    text = config.read_text()
    assert '"inference_mode": true' in text
    config.write_text(text.replace('"inference_mode": true', '"inference_mode": false'))
    small.refresh()
    base = mlp().bfloat16()
    before = torch.get_rng_state()
    model = small.add_to(base, "users/a")
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(p.requires_grad for p in model.parameters())
    assert model.peft_config["users/a"].inference_mode is True
    small.add_to(model, "users/b")
    small.add_to(model, "users/c", autocast_adapter_dtype=False)
    factors = model.base_model.model[0].lora_A
    assert [factors[f"users/{name}"].weight.dtype for name in "abc"] == [
        torch.float32, torch.float32, torch.bfloat16
    ]  # fmt: skip
    again = small.add_to(mlp().bfloat16(), "users/a", autocast_adapter_dtype=False)
    assert again.base_model.model[0].lora_A["users/a"].weight.dtype == torch.bfloat16


# Adding


def test_a_name_that_is_taken_copies_nothing(small, lora):
    small.rename("users/a", "best")
    for name, message in (("best", "has an adapter 'best' already"), ("a.b", "without dots")):
        with pytest.raises(PeftValueError, match=message):
            small.add(lora / "b", name)
    assert sorted(os.listdir(small.folder)) == ["adapter_library.jsonl", "users"]


def test_what_is_added(small, lora, monkeypatch):
    """A card comes along; the copy has the mode of its folder; tags are added to those that are."""
    small.folder.chmod(0o750)
    entry = small.add(lora, subfolder="b", tags="x", scores={"acc": 1})
    assert entry.name == "b" and said(small)["b"] == ("b", ("x",), {"acc": 1})
    assert sorted(os.listdir(small.folder / "b")) == ["README.md", CONFIG, WEIGHTS]
    assert stat.S_IMODE((small.folder / "b").stat().st_mode) == 0o750
    small.add(small.folder / "b", tags=["y"])
    small.add(small.folder / "b", scores={"loss": 2})
    assert said(small)["b"] == ("b", ("x", "y"), {"acc": 1, "loss": 2})
    shutil.copytree(lora / "c", small.folder.parent / "bare")
    (small.folder.parent / "bare" / "README.md").unlink()
    monkeypatch.chdir(small.folder.parent / "bare")
    with pytest.warns(UserWarning, match="^add got unexpected keyword arguments: foo"):
        entry = small.add(".", foo=1)
    assert (entry.name, str(entry.place)) == ("bare", "bare")
    assert small.add(lora / "c", "deep/er/c").name == "deep/er/c"
    monkeypatch.chdir(small.folder / "deep")
    assert small.add("er/c", tags="z").tags == ("z",)
    assert small.check().ok


def test_a_copy_over_something_damaged_is_refused(small, lora):
    shutil.copytree(lora / "b", small.folder / "b")
    (small.folder / "b" / WEIGHTS).write_bytes(b"")
    with pytest.raises(PeftValueError, match="has a folder '.*b' already; pass another `name`"):
        small.add(lora / "b")


def test_a_copy_is_on_the_disk_before_it_is_seen(small, lora, monkeypatch):
    """Its files, then their folder, then the name; all under the lock."""
    pytest.importorskip("fcntl")
    done, sync, sync_folder, rename = [], adding.sync, adding.sync_folder, Path.rename

    def synced(handle):
        done.append(os.fstat(handle).st_size)
        sync(handle)

    def synced_folder(folder):
        done.append(folder.name)
        sync_folder(folder)

    def renamed(path, target):
        done.append((path.name, target.name, is_locked(small.folder)))
        return rename(path, target)

    monkeypatch.setattr(adding, "sync", synced)
    monkeypatch.setattr(adding, "sync_folder", synced_folder)
    monkeypatch.setattr(Path, "rename", renamed)
    small.add(lora / "b")
    unfinished, *_ = done[-2]
    sizes = [(lora / "b" / name).stat().st_size for name in (CONFIG, WEIGHTS, "README.md")]
    assert done == [*sizes, unfinished, (unfinished, "b", True), "small"]


def test_all_files_of_an_adapter_are_deleted_under_its_lock(small, monkeypatch):
    pytest.importorskip("fcntl")
    held, unlink, folder = [], Path.unlink, small.folder / "users" / "a"
    (folder / ".adapter_model.safetensors.1.tmp").write_text("of a writer that was killed")

    def unlinked(path, missing_ok=False):
        if path.parent == folder:
            held.append(is_locked(folder))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlinked)
    small.remove("users/a", delete_files=True)
    assert not folder.exists() and len(held) >= 4 and all(held)
    assert small.names == ["users/b", "users/c"]


def test_routing_over_a_library_is_routing_over_its_folders(small, lora):
    base, x = mlp(), torch.randn(3, 8)
    for names, general in ((None, ()), (["users/a", "users/b"], "users/c")):
        model = small.route(copy.deepcopy(base), names, general=general, routing="fixed")
        expected = get_routed_model(
            copy.deepcopy(base),
            {name: lora / name[-1] for name in names or small.names},
            general_experts={"users/c": lora / "c"} if general else None,
            routing="fixed",
        )
        torch.testing.assert_close(model(x), expected(x))


# The Hub


@pytest.fixture
def hub(lora, tmp_path, monkeypatch):
    """A repository `me/it` with an adapter in its root and one in `s`, in the cache of two commits;
    what it is asked for.
    """
    snapshots = tmp_path / "hub" / "models--me--it" / "snapshots"
    for commit, root, inner in (("c1", "a", "b"), ("c2", "b", "c")):
        shutil.copytree(lora / root, snapshots / commit)
        shutil.copytree(lora / inner, snapshots / commit / "s")
    asked, latest = [], ["c1"]

    def download(repository, name, revision=None, subfolder=""):
        asked.append((repository, revision, subfolder))
        found = snapshots / (revision or latest[0]) / subfolder / name
        if repository != "me/it" or not found.exists():
            raise huggingface_hub.errors.LocalEntryNotFoundError(name)
        return str(found)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked, latest


def test_adapters_of_the_hub_in_folders_and_of_later_commits(small, hub, lora):
    asked, latest = hub
    entry = small.add("me/it", subfolder="s")
    assert (entry.name, entry.place) == ("me/it/s", Place("", "", "me/it", "c1", "s"))
    small.add("me/it")
    small.tag("me/it", "x")
    small.score("me/it", acc=1)
    small.rename("me/it", "far")
    asked.clear()
    latest[0] = "c2"
    assert small.check(["me/it/s", "far"]).ok
    assert set(asked) == {("me/it", "c1", "s"), ("me/it", "c1", "")}
    again = small.add("me/it")
    assert again.sha256 == small["users/b"].sha256 and again.place.revision == "c2"
    assert said(small)["far"] == ("hub:me/it@c2", ("x",), {"acc": 1})
    assert sorted(small.names) == ["far", "me/it/s", "users/a", "users/b", "users/c"]
    small.remove("far")
    assert small.add("me/it").name == "me/it"
    small.refresh()
    assert said(small)["me/it"] == ("hub:me/it@c2", (), {})
    base, x = mlp(), torch.randn(2, 8)
    alone = small.route(copy.deepcopy(base), ["users/b", "users/c"], routing="task")
    model = small.route(base, ["me/it/s", "users/c"], routing="task")
    expected = alone(x, task_ids=["users/b", "users/c"])
    torch.testing.assert_close(model(x, task_ids=["me/it/s", "users/c"]), expected)


@pytest.mark.parametrize("where", ["plain", "snapshots"])
def test_a_repository_that_is_no_cache(small, lora, tmp_path, monkeypatch, where):
    """The commit is what the caller says, if it says one."""
    shutil.copytree(lora / "a", tmp_path / where)
    shutil.copytree(lora / "a", small.folder / "me" / "it")
    small.refresh()
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repo, name, **_: str(tmp_path / where / name)
    )
    for revision in (None, "v1"):
        entry = small.add("me/it", revision=revision)
        assert entry.place == Place("", "", "me/it", revision or "")
        assert entry.name == "me/it-2"  # a folder has the other name
    (tmp_path / where / WEIGHTS).unlink()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", only_there(tmp_path / where))
    with pytest.raises(CheckpointNotFoundError, match=f"Can't find '{WEIGHTS}'"):
        small.add("me/it")


def only_there(folder):
    def download(repository, name, **options):
        if not (folder / name).exists():
            raise huggingface_hub.errors.EntryNotFoundError(name)
        return str(folder / name)

    return download


# Packs


def test_packs_are_read_if_they_changed(lora, tmp_path, monkeypatch):
    folder = tmp_path / "packs"
    folder.mkdir()
    path = folder / "u.adapters.safetensors"
    AdapterPack.write(path, {name: lora / name for name in "abc"}).close()
    (folder / "broken.adapters.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="Left out"):
        library = AdapterLibrary(folder)
    library.remove("u/a")
    library.remove("u/b", delete_files=True)
    assert library.names == ["u/c"]
    left = library.left_out
    with monkeypatch.context() as patch:
        patch.setattr(refreshing, "AdapterPack", None)
        again = AdapterLibrary(folder)
        assert not library.refresh() and again.names == ["u/c"]
        assert again.left_out == library.left_out == left
    with AdapterPack(path) as pack:  # what was deleted may come again, what was removed stays away
        pack.update(add={"b": lora / "b", "a": lora / "c", "new": lora / "a"}).close()

    def fail(path):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:  # what may be read later
        patch.setattr(refreshing, "AdapterPack", fail)
        with pytest.warns(UserWarning, match="can't be read: Input/output error"):
            assert library.refresh().dropped == ["u/c"]
    assert library.refresh() == (["u/b", "u/c", "u/new"], [], [], [])
    assert library.load("u/new").tensors and len(library.left_out) == 1


def test_a_pack_is_opened_once_for_all_its_members(lora, tmp_path, monkeypatch):
    path = tmp_path / "u.adapters.safetensors"
    AdapterPack.write(path, {name: lora / name for name in "abc"}).close()
    library, opened = AdapterLibrary(tmp_path, max_bytes=0), []

    def noted(file):
        opened.append(file)
        return AdapterPack(file)

    monkeypatch.setattr(reading, "AdapterPack", noted)
    for name in ("u/a", "u/b", "u/a"):
        assert library.load(name).tensors
    assert opened == [path]
    with AdapterPack(path) as pack:
        pack.update(remove=["b"]).close()
    assert library.load("u/c").tensors and opened == [path, path]
