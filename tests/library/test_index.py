# SPDX-License-Identifier: Apache-2.0
"""The index's file: what stands in it, which lines are passed over, and what a change promises."""

import errno
import json
import os
from dataclasses import replace

import pytest

from peft.library import index as index_module
from peft.library.entry import AdapterEntry, Place, Stamp
from peft.library.index import Index, IndexFile
from peft.utils.error import CheckpointError, CheckpointWriteError, PeftValueError

HEAD = {"format": "peft adapter library", "version": 1}
ADA = AdapterEntry("ada", Place("users/ada"), "LORA", tags=("x",), scores={"loss": 0.5})
BEN = AdapterEntry("ben", Place(repo="u/r", revision="a1", subfolder="s"), "LOKR", rank=2)
LINES = {
    "ada": {
        "name": "ada",
        "path": "users/ada",
        "method": "LORA",
        "bytes": 0,
        "tags": ["x"],
        "scores": {"loss": 0.5},
    },
    "ben": {
        "name": "ben",
        "repo": "u/r",
        "revision": "a1",
        "subfolder": "s",
        "method": "LOKR",
        "rank": 2,
        "bytes": 0,
    },
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter_library.jsonl"


def whole():
    return Index(
        {BEN.place: BEN, ADA.place: ADA},
        {"broken": ("There is no config.", (Stamp(1, 2, 3, 4),))},
        {Place("gone"), Place("pack", "member")},
        {Place("lost"): replace(ADA, name="lost", place=Place("lost"))},
    )


def put(content):
    return lambda index: vars(index).update(vars(content))


def written(path, *lines):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))


def test_a_line_for_each_thing_that_is_known(path):
    content = whole()
    assert IndexFile(path).change(put(content)) == content
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        HEAD,
        LINES["ada"],
        LINES["ben"],
        LINES["ada"] | {"name": "lost", "path": "lost", "lost": True},
        {"path": "broken", "left_out": "There is no config.", "stamps": [[1, 2, 3, 4]]},
        {"path": "gone", "removed": True},
        {"path": "pack", "member": "member", "removed": True},
    ]
    assert IndexFile(path).read() == content
    assert content.names() == {"ada": ADA, "ben": BEN}


def test_a_copy_is_apart(path):
    content = whole()
    other = content.copy()
    assert other == content
    for part in vars(other).values():
        part.clear()
    assert content == whole()


def test_a_file_is_read_again_only_if_it_changed(path, monkeypatch):
    read, parse = [], index_module._parsed
    monkeypatch.setattr(index_module, "_parsed", lambda *a: read.append(1) or parse(*a))
    file = IndexFile(path)
    assert file.read() == Index() and not read
    IndexFile(path).change(put(whole()))
    assert file.read() == file.read() == whole() and len(read) == 1
    IndexFile(path).change(lambda index: index.removed.clear())
    assert file.read().removed == set() and len(read) == 3
    path.unlink()
    assert file.read() == IndexFile(path).read() or file.read().entries == whole().entries
    file.change(lambda index: None)  # and so it is there again
    assert IndexFile(path).read().entries == whole().entries


def test_no_change_writes_nothing(path):
    file = IndexFile(path)
    file.change(put(whole()))
    before = os.stat(path)
    assert file.change(lambda index: index.removed.discard(Place("other"))) == whole()
    after = os.stat(path)
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_change_that_raises_changes_nothing(path):
    file = IndexFile(path)
    file.change(put(whole()))
    before = path.read_bytes()

    def change(index):
        index.entries.clear()
        raise PeftValueError("no")

    with pytest.raises(PeftValueError, match="no"):
        file.change(change)
    assert path.read_bytes() == before and file.read() == whole()


@pytest.mark.parametrize("required", [True, False])
def test_an_index_that_can_not_be_written(path, monkeypatch, required):
    file = IndexFile(path)
    file.change(put(whole()))
    before = path.read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        if required:
            with pytest.raises(CheckpointWriteError, match="full"):
                file.change(lambda index: index.removed.clear())
            assert file.read() == whole()
        else:
            content = file.change(lambda index: index.removed.clear(), required=False)
            assert content.removed == set() and content.entries == whole().entries
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_change_is_made_alone_and_cleans_up(path):
    fcntl = pytest.importorskip("fcntl")
    (path.parent / ".adapter_x.tmp").mkdir()

    def change(index):
        handle = os.open(path.parent, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(handle)
        index.removed.add(Place("gone"))

    IndexFile(path).change(change)
    assert os.listdir(path.parent) == [path.name]


def test_a_disk_that_fails_is_an_error(path, monkeypatch):
    path.mkdir()
    with pytest.raises(CheckpointError, match=f"'{path}' can't be read: it is a folder"):
        IndexFile(path).read()


ODD = {
    "twice": ("'ada' is listed twice", LINES["ada"] | {"path": "other"}),
    "place": ("'eva' is listed twice", LINES["ada"] | {"name": "eva"}),
    "list": ("it is no JSON object", [1]),
    "json": ("line 3 is damaged", "{"),
    "deep": ("line 3 is damaged", "[" * 100_000),
    "no name": ("no name, method or path", LINES["ada"] | {"name": ""}),
    "no method": ("no name, method or path", {"name": "eva", "path": "x"}),
    "no place": ("no name, method or path", {"name": "eva", "method": "LORA"}),
    "number": ("is not text", LINES["ben"] | {"name": 1}),
    "base": ("is not text", LINES["ben"] | {"base_model": 1}),
    "rank": ("`rank` or `bytes` is not an integer", LINES["ben"] | {"rank": True}),
    "bytes": ("`rank` or `bytes` is not an integer", LINES["ben"] | {"bytes": 1.0}),
    "tags": ("is not a list of words", LINES["ben"] | {"tags": "x"}),
    "tasks": ("is not a list of words", LINES["ben"] | {"tasks": [1, "x"]}),
    "scores": ("`scores` are not numbers", LINES["ben"] | {"scores": {"a": "x"}}),
    "score list": ("`scores` are not numbers", LINES["ben"] | {"scores": [1]}),
    "outside": ("leads out of the library", LINES["ben"] | {"path": "../x"}),
    "left out": ("leads out of the library", {"path": "/x", "left_out": "why"}),
}


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_line_is_named_and_passed_over(path, odd):
    message, line = ODD[odd]
    written(path, HEAD, LINES["ada"], line, LINES["ben"])
    before = path.read_bytes()
    file = IndexFile(path)
    assert file.read().names() == {"ada": ADA, "ben": BEN}
    with pytest.warns(UserWarning, match=f"(?s)was damaged.*{message}.*is built again"):
        file.change(lambda index: None)
    assert (path.parent / f"{path.name}.damaged").read_bytes() == before
    assert IndexFile(path).read().names() == {"ada": ADA, "ben": BEN}
    assert len(path.read_text().splitlines()) == 3


def test_damaged_files_are_kept_apart_and_three_lines_named(path):
    for kept in ("", "-2", "-3"):
        written(path, HEAD, *(f"<{kept}{n}" for n in range(5)))
        before = path.read_bytes()
        with pytest.warns(UserWarning, match=r"line 2 .*; line 3 .*; line 4 [^;]*; and 2 more\)"):
            IndexFile(path).change(lambda index: None)
        assert (path.parent / f"{path.name}.damaged{kept}").read_bytes() == before
    written(path, HEAD, "<", "<", "<")
    with pytest.warns(UserWarning, match=r"line 4 [^;]*\) and is built again"):
        IndexFile(path).change(lambda index: None)


@pytest.mark.parametrize(
    "head", ["", LINES["ada"], {"format": "other", "version": 1}, HEAD | {"version": "1"}]
)
def test_a_file_without_its_first_line_is_damaged(path, head):
    written(path, head, LINES["ben"])
    with pytest.warns(UserWarning, match="line 1 is damaged"):
        content = IndexFile(path).change(lambda index: None)
    assert "ben" in content.names()


def test_empty_lines_and_a_second_head_are_no_damage(path):
    written(path, HEAD, "", LINES["ada"], "  ", HEAD, LINES["ben"])
    content = IndexFile(path).change(lambda index: index.removed.add(Place("x")))
    assert content.names() == {"ada": ADA, "ben": BEN}
    assert os.listdir(path.parent) == [path.name]  # and nothing is kept beside it


def test_a_newer_version_is_refused_before_anything_is_written(path):
    written(path, HEAD | {"version": 2}, {"new": 1})
    before = path.read_bytes()
    for use in (IndexFile(path).read, lambda: IndexFile(path).change(lambda index: None)):
        with pytest.raises(CheckpointError, match="has version 2, and this package writes 1"):
            use()
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_a_damaged_file_that_can_not_be_kept_is_not_replaced(path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "full")

    written(path, HEAD, "<", LINES["ada"])
    before = path.read_bytes()
    monkeypatch.setattr(index_module.shutil, "copyfile", full)
    with pytest.raises(CheckpointWriteError, match="full"):
        IndexFile(path).change(lambda index: None)
    assert path.read_bytes() == before
