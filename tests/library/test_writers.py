# SPDX-License-Identifier: Apache-2.0
"""Several writers of one index lose nothing of each other's; a killed one leaves it whole."""

import os
import shutil
import threading

import pytest
from helpers.killing import CHANGING, KILLED, run_killed
from helpers.users import USERS, save_user

from peft import AdapterLibrary, AdapterPack
from peft.library.index import IndexFile
from peft.library.refreshing import look

NAMES = {f"users/{user}" for user in USERS}


@pytest.fixture
def users(folder):
    shutil.rmtree(folder / "methods")
    return folder


def state(folder):
    """What a reader of the index has: annotations by place, and what is removed."""
    file = IndexFile(folder / "adapter_library.jsonl")
    found = file.read()
    assert not file._problems
    entries = {
        str(place): (entry.name, entry.tags, tuple(entry.scores.items()), entry.sha256)
        for place, entry in found.entries.items()
    }
    return entries, {str(place) for place in found.removed}


CHANGES = {
    "tag": lambda library: library.tag("users/ada", "x"),
    "refresh": lambda library: library.refresh(),
    "copy": lambda library: library.add(library.folder.parent / "eva"),
    "delete": lambda library: library.remove("users/ada", delete_files=True),
}


@pytest.mark.processes
@pytest.mark.parametrize("change", CHANGES)
def test_a_writer_is_killed_at_each_of_its_steps(users, change, tmp_path):
    """Readers see the index before or after, an adapter is whole or not there, nothing is left."""
    AdapterLibrary(users)
    save_user(tmp_path / "eva", "bank", users)
    if change == "refresh":
        save_user(users / "users" / "ada", "bank", users)
        shutil.rmtree(users / "users" / "cai")

    def made(step):
        return shutil.copytree(users, tmp_path / f"step{step}" / "library")

    done = made("done")
    shutil.copytree(tmp_path / "eva", done.parent / "eva")
    CHANGES[change](AdapterLibrary(done, refresh=False))
    before, after, clean = state(users), state(done), files_in(done)
    steps = 0
    for step in range(60):
        here = made(step)
        shutil.copytree(tmp_path / "eva", here.parent / "eva")
        code = run_killed(
            lambda here=here: CHANGES[change](AdapterLibrary(here, refresh=False)),
            here,
            step,
            CHANGING,
        )
        assert code in (0, KILLED)
        entries, removed = state(here)
        assert (entries, removed) in (before, after) or change in ("delete", "copy")
        library = AdapterLibrary(here)
        assert not library.left_out and library.check().ok
        assert NAMES - {"users/ada", "users/cai"} <= set(library.names)
        if change == "copy" and "eva" not in library:
            library.add(here.parent / "eva")
        elif change == "delete" and (here / "users" / "ada").exists():
            library.remove("users/ada", delete_files=True)
        elif change not in ("copy", "delete") and state(here) != after:
            CHANGES[change](library)
        library.tag("users/ben", "touched")  # a write cleans up after those that were killed
        assert files_in(here) == clean
        steps = step
        if code == 0:
            break
    assert code == 0 and steps >= 3


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.processes
def test_processes_at_once(users):
    library = AdapterLibrary(users)
    children = []
    for number in range(4):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                own = AdapterLibrary(users)
                for i in range(5):
                    own.tag(sorted(NAMES)[i % 4], f"t{number}_{i}")
                    own.score("users/ada", **{f"s{number}_{i}": i})
                save_user(users / "new" / f"u{number}", "bank", users)
                own.refresh()
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    library.refresh()
    assert {tag for entry in library for tag in entry.tags} == {
        f"t{number}_{i}" for number in range(4) for i in range(5)
    }
    assert len(library["users/ada"].scores) == 20
    assert set(library.names) == NAMES | {f"new/u{number}" for number in range(4)}


def test_threads_at_once(users):
    library, errors = AdapterLibrary(users), []

    def work(number):
        try:
            for i in range(5):
                library.tag("users/ada", f"t{number}_{i}")
                library.refresh()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(AdapterLibrary(users)["users/ada"].tags) == 20


def test_what_others_change_between_a_look_and_its_result_stays(users):
    """The look of one library is the slow part and runs without the lock."""
    library, other = AdapterLibrary(users), AdapterLibrary(users)
    save_user(users / "users" / "ben", "bank", users)
    save_user(users / "users" / "eva", "bank", users)
    findings = look(users, IndexFile(library.index_file).read(), False)
    other.tag(["users/ada", "users/ben"], "other")
    other.rename("users/cai", "theirs")
    other.remove("users/dora")
    save_user(users / "users" / "fay", "bank", users)
    save_user(users / "users" / "ben", "bank", users)
    other.refresh()
    library._change(lambda index: findings.apply(users, index))
    expected = (NAMES | {"users/eva", "users/fay", "theirs"}) - {"users/cai", "users/dora"}
    assert set(library.names) == expected
    assert library["users/ben"].tags == library["users/ada"].tags == ("other",)
    assert library["users/ben"].sha256 == other["users/ben"].sha256  # the later reading
    assert library.check().ok and not library.refresh()


@pytest.mark.processes
def test_a_pack_is_rewritten_whole_or_not_at_all(users, tmp_path):
    folders = {user: users / "users" / user for user in USERS}
    source = AdapterPack.write(tmp_path / "x.adapters.safetensors", folders)
    old = source.path.read_bytes()
    save_user(users / "users" / "ada", "bank", users)
    for step in range(30):
        here = tmp_path / f"step{step}"
        here.mkdir()
        path = here / "x.adapters.safetensors"
        path.write_bytes(old)
        change = {"add": {"ada": folders["ada"], "eva": folders["ben"]}, "remove": ["cai"]}
        code = run_killed(
            lambda path=path, change=change: AdapterPack(path).update(**change),
            here,
            step,
            CHANGING,
        )
        if code == 0:
            break
        with AdapterPack(path) as pack:
            assert path.read_bytes() == old or sorted(pack) == ["ada", "ben", "dora", "eva"]
            assert all(pack.read(name) for name in pack)
            again = pack.update(**change) if "cai" in pack else pack
            assert sorted(again) == ["ada", "ben", "dora", "eva"]
            assert again.read("ada") == (folders["ada"] / "adapter_model.safetensors").read_bytes()
    assert code == 0 and step >= 2
