# SPDX-License-Identifier: Apache-2.0
"""What a library says, keeps and leaves behind where files, arguments or other processes are not as
they should be.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from helpers.methods import METHODS
from helpers.users import USERS, save_user

from peft import AdapterFleet, AdapterLibrary, AdapterPack
from peft.base.errors import CheckpointError, CheckpointNotFoundError, PeftTypeError, PeftValueError
from peft.library import adding, index, inspecting, refreshing, scanning
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
