# SPDX-License-Identifier: Apache-2.0
"""Files and folders are written in one step under a lock, and what the disk refuses is named."""

import errno
import hashlib
import json
import os
import stat
import sys
import tarfile
import tempfile
import zipfile

import pytest
import torch
from helpers.locks import is_locked
from safetensors import safe_open
from torch import nn

from peft import LoraConfig
from peft.checkpoint import files, headers, paths
from peft.checkpoint.new_folder import new_folder
from peft.utils.error import (
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointWriteError,
    PeftTypeError,
    PeftValueError,
)

STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}
WEIGHTS, CONFIG, LEGACY = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"


def content(folder):
    """All that is in a folder: bytes of files, None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def raising(error):
    def call(*args, **kwargs):
        raise error

    return call


WRITERS = {
    "adapter": lambda folder: files.write_adapter(folder, STATE, "{}"),
    "legacy adapter": lambda folder: files.write_adapter(folder, STATE, "{}", False),
    "config": lambda folder: files.write_config(folder, "{}"),
    "tensors": lambda folder: files.write_tensors(folder / "bank.safetensors", STATE, {}),
    "report": lambda folder: files.write_report(folder / "report.json", [1]),
}


@pytest.fixture(params=WRITERS)
def write(request):
    return WRITERS[request.param]


def test_a_writer_waits_for_the_lock_holds_it_and_lets_it_go(write, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    other, naps, held = os.open(tmp_path, os.O_RDONLY), [], []
    fcntl.flock(other, fcntl.LOCK_EX)

    def nap(seconds):
        naps.append(seconds)
        assert len(naps) < 100
        if len(naps) == 3:
            os.close(other)

    def replacing(source, target, replace=os.replace):
        held.append(is_locked(tmp_path))
        replace(source, target)

    monkeypatch.setattr(files.time, "sleep", nap)
    monkeypatch.setattr(os, "replace", replacing)
    write(tmp_path)
    assert len(naps) == 3
    assert held and all(held)
    assert not is_locked(tmp_path)


def test_a_writer_does_not_wait_for_ever(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    other, naps = os.open(tmp_path, os.O_RDONLY), []
    fcntl.flock(other, fcntl.LOCK_EX)
    monkeypatch.setattr(files.time, "sleep", naps.append)
    with pytest.raises(CheckpointWriteError, match="Another process .* for ten minutes; nothing"):
        files.write_adapter(tmp_path, STATE, "{}")
    os.close(other)
    assert 590 < sum(naps) < 610
    assert content(tmp_path) == {}


@pytest.mark.parametrize("missing", ["module", "locks"])
def test_where_there_are_no_locks_files_are_written_without(write, tmp_path, monkeypatch, missing):
    if missing == "module":  # Windows
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:  # some network shares
        fcntl = pytest.importorskip("fcntl")
        monkeypatch.setattr(fcntl, "flock", raising(OSError(errno.ENOLCK, "No locks")))
    write(tmp_path / "new")
    assert len(content(tmp_path / "new")) > 0


def test_what_killed_writers_left_is_deleted(write, tmp_path):
    write(tmp_path)
    clean = content(tmp_path)
    left, waiting = tmp_path / ".adapter_x.tmp", tmp_path / ".adapter_config.1.2.json"
    if write not in (WRITERS["config"], WRITERS["legacy adapter"]):  # these leave them to others
        left.mkdir()
        (left / "part").write_text("part")
    if write in (WRITERS["config"], WRITERS["adapter"]):
        waiting.write_text("{}")
    write(tmp_path)
    assert content(tmp_path).keys() == clean.keys()


def test_a_file_is_readable_by_those_who_may_read_new_files(write, tmp_path):
    mask = os.umask(0o027)
    try:
        write(tmp_path / "new")
    finally:
        os.umask(mask)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").iterdir()}
    assert modes == {0o640}


def test_a_folder_that_the_disk_refuses_leaves_none(write, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", raising(OSError(errno.EIO, "broken")))
    with pytest.raises(CheckpointWriteError, match="broken") as failure:
        write(tmp_path / "new" / "er")
    assert failure.value.errno == errno.EIO
    assert content(tmp_path) == {}


@pytest.mark.parametrize("error", [RuntimeError("torch"), OSError(errno.ENOSPC, "full")])
def test_a_writer_that_raises_leaves_the_file_and_names_it(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(CheckpointWriteError, match=f"'{path}' can't be written, and is as it was"):
        files.write_file(path, raising(error))
    assert content(tmp_path) == {"file": b"old"}


def test_an_error_of_this_package_passes_through(tmp_path):
    with pytest.raises(PeftValueError, match="mine"):
        files.write_file(tmp_path / "file", raising(PeftValueError("mine")))
    assert content(tmp_path) == {}


def test_an_existing_folder_stays_after_an_error(tmp_path):
    folder = tmp_path / "there"
    folder.mkdir()
    with pytest.raises(KeyError), files.folder_for(folder):
        raise KeyError
    assert folder.is_dir()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EROFS])
def test_a_system_that_can_not_sync_folders_is_no_error(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", raising(OSError(number, "no sync")))
    files.sync_folder(tmp_path)


@pytest.mark.parametrize("error", [PermissionError, IsADirectoryError])
def test_a_system_that_can_not_open_folders_is_no_error(tmp_path, monkeypatch, error):
    monkeypatch.setattr(os, "open", raising(error()))
    files.sync_folder(tmp_path)


def test_a_sync_that_fails_is_an_error_and_leaves_no_handle(tmp_path, monkeypatch):
    handles = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    monkeypatch.setattr(os, "fsync", raising(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        files.sync_folder(tmp_path)
    assert handles is None or set(os.listdir("/proc/self/fd")) == handles


def test_an_adapter_file_says_that_it_is_pytorchs_and_whose_config_it_goes_with(tmp_path):
    files.write_adapter(tmp_path, STATE, '{"r": 1}')
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "adapter_config_sha256": hashlib.sha256(b'{"r": 1}').hexdigest(),
        }
    files.write_tensors(tmp_path / "other.safetensors", STATE, {"name": "x"})
    assert files.read_metadata(tmp_path / "other.safetensors") == {"format": "pt", "name": "x"}


def test_one_format_replaces_the_other(tmp_path):
    for safe, names in ((False, {LEGACY, CONFIG}), (True, {WEIGHTS, CONFIG})) * 2:
        files.write_adapter(tmp_path, STATE, "{}", safe)
        assert set(content(tmp_path)) == names
    assert (tmp_path / CONFIG).read_text() == "{}"


def test_tensors_that_share_memory_are_written_apart(tmp_path):
    whole = torch.arange(8.0)
    given = {
        "whole": whole,
        "again": whole,
        "third": whole,
        "part": whole[2:4],
        "cut": torch.ones(2, 3).T,
    }
    for safe in (True, False):
        files.write_adapter(tmp_path, given, "{}", safe)
        written = files.read_weights(tmp_path / (WEIGHTS if safe else LEGACY))
        assert written.keys() == given.keys()
        for key, tensor in given.items():
            torch.testing.assert_close(written[key], tensor, rtol=0, atol=0)
    assert (tmp_path / LEGACY).stat().st_size < 8000
    with pytest.raises(CheckpointError, match="`m` is on the meta device"):
        files.write_adapter(tmp_path, {"m": torch.empty(2, device="meta")}, "{}")


def test_a_report_is_json_that_ends_in_a_line(tmp_path):
    files.write_report(tmp_path / "new" / "report.json", {"a": [1]})
    text = (tmp_path / "new" / "report.json").read_text()
    assert json.loads(text) == {"a": [1]} and text.endswith("}\n")


@pytest.mark.parametrize("name", ["there.json", "adapter_config.json"])
@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, CheckpointNotFoundError, "Can't find"),
        (b"{", CheckpointError, "not valid JSON"),
        (b"\xff\xfe", CheckpointError, "not valid JSON"),
        (b"[" * 100_000, CheckpointError, "not valid JSON"),
        (b"[1]", CheckpointError, "must hold a JSON object, not a list"),
    ],
)
def test_json_that_can_not_be_read(tmp_path, name, text, error, message):
    if text is not None:
        (tmp_path / name).write_bytes(text)
    with pytest.raises(error, match=message):
        files.read_json(tmp_path / name)


def test_json_is_utf_8(tmp_path):
    for name in ("there.json", "adapter_config.json"):
        (tmp_path / name).write_bytes('{"name": "é"}'.encode())
        assert files.read_json(tmp_path / name) == {"name": "é"}


@pytest.mark.parametrize("read", [files.read_weights, files.read_shapes, headers.read_header])
@pytest.mark.parametrize("name", [WEIGHTS, LEGACY])
def test_weights_that_can_not_be_read(tmp_path, read, name):
    path = tmp_path / name
    with pytest.raises((CheckpointNotFoundError, CheckpointError), match=str(path)):
        read(path)
    path.write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=f"'{path}' is not a readable weights file"):
        read(path)


@pytest.mark.parametrize(
    "value", [[torch.ones(1)], {1: torch.ones(1)}, {"a": 1}, {"a": 1, "b": torch.ones(1)}]
)
def test_a_legacy_file_of_anything_else(tmp_path, value):
    torch.save(value, tmp_path / LEGACY)
    with pytest.raises(CheckpointError, match="dictionary of named tensors"):
        files.read_weights(tmp_path / LEGACY)


class Listing:
    def __reduce__(self):
        return (os.listdir, (".",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": Listing()}, r"it holds `\w+\.listdir`"),
        (b"", "it is damaged"),
        (b"no", "it is damaged"),
        (b"\x80\x02h\x05.", "it is damaged"),  # it reads what it has not written
    ],
    ids=["objects", "empty", "text", "memo"],
)
def test_a_legacy_file_that_torch_does_not_trust(tmp_path, content, message):
    path = tmp_path / LEGACY
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(CheckpointError, match=message) as refused:
        files.read_weights(path)
    assert "weights_only" not in str(refused.value)  # no advice to run it


SHORT = {
    "strides": (lambda: torch.zeros(1).expand(900), "takes 3,600 bytes, which the file does not"),
    "sparse": (lambda: torch.eye(2).to_sparse(), "is not a dense tensor"),
    "meta": (lambda: torch.ones(2, device="meta"), "is quantized, or has no values"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8),
        "is quantized, or has no values",
    ),
}


@pytest.mark.filterwarnings("ignore")  # torch deprecates quantized tensors
@pytest.mark.parametrize("kind", SHORT)
def test_a_legacy_file_that_claims_more_than_it_holds(tmp_path, kind):
    make, message = SHORT[kind]
    torch.save({"b": torch.ones(2), "a": make()}, tmp_path / LEGACY)
    with pytest.raises(CheckpointError, match=f"`a` {message}.*. Save the adapter in the safetens"):
        files.read_weights(tmp_path / LEGACY)


def test_names_of_one_tensor_in_a_legacy_file(tmp_path):
    """Tied weights have several; thousands of names would take memory that the file has not."""
    tied, path = torch.arange(4000.0), tmp_path / LEGACY
    state = {"a": tied, "b": tied, "c": nn.Parameter(tied), "d": tied[:8], "empty": torch.ones(0)}
    torch.save(state, path)
    found = files.read_weights(path)
    assert found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in state)
    torch.save({str(i): tied for i in range(12)}, path)
    with pytest.raises(CheckpointError, match="its tensors take more bytes than it has"):
        files.read_weights(path)


def test_a_legacy_file_without_values(tmp_path):
    torch.save(STATE, tmp_path / LEGACY)
    found = files.read_weights(tmp_path / LEGACY, "meta")
    assert {key: (t.shape, t.device.type) for key, t in found.items()} == {
        key: (t.shape, "meta") for key, t in STATE.items()
    }


def test_a_legacy_file_that_is_an_archive_of_another_kind(tmp_path):
    """One whose data is packed, in part or all of it, or listed twice; and one of tar."""
    path, plain = tmp_path / LEGACY, tmp_path / "plain.bin"
    torch.save({"a": torch.randint(0, 255, (4000,), dtype=torch.uint8)}, plain)
    assert files.read_weights(plain)["a"].shape == (4000,)

    def written(kind, listed=1):
        with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w") as target:
            for part in source.infolist():
                is_data = part.filename.endswith("data/0")
                target.writestr(part.filename, source.read(part), kind if is_data else 0)
                target.filelist += target.filelist[-1:] * (listed - 1) * is_data

    written(zipfile.ZIP_STORED)
    assert files.read_weights(path)["a"].shape == (4000,)
    for change in ((zipfile.ZIP_DEFLATED,), (zipfile.ZIP_STORED, 9)):
        written(*change)
        with pytest.raises(CheckpointError, match="its data is compressed, as torch never writes"):
            files.read_weights(path)
    plain.write_bytes(b"values")
    with tarfile.open(path, "w") as archive:
        archive.add(plain, "storages")
    with pytest.raises(CheckpointError, match="it is an archive as torch wrote before 2017"):
        files.read_weights(path)


@pytest.mark.parametrize("safe", [True, False])
def test_what_is_in_a_file_is_told_without_its_tensors(tmp_path, safe):
    given = {**STATE, "c": torch.zeros(2, 2, dtype=torch.bfloat16)}
    files.write_adapter(tmp_path, given, "{}", safe)
    path = tmp_path / (WEIGHTS if safe else LEGACY)
    assert files.read_shapes(path) == {"a": (2, 3), "b": (2,), "c": (2, 2)}
    header = headers.read_header(path)
    assert {key: (t.shape, t.dtype, t.nbytes, t.numel) for key, t in header.tensors.items()} == {
        "a": ((2, 3), "float32", 24, 6),
        "b": ((2,), "int64", 16, 2),
        "c": ((2, 2), "bfloat16", 8, 4),
    }
    assert header.file_bytes == path.stat().st_size
    assert header.header_bytes == (path.stat().st_size - 48 if safe else 0)
    assert header.metadata.get("format") == ("pt" if safe else None)


def test_a_disk_that_fails_is_told_from_a_damaged_file(tmp_path, monkeypatch):
    """A damaged file has no metadata; of one that can't be read now nobody knows."""
    files.write_tensors(tmp_path / "a.safetensors", STATE, {})
    (tmp_path / "b.safetensors").write_bytes(b"damaged")
    assert files.read_metadata(tmp_path / "b.safetensors") == {}
    with pytest.raises(CheckpointNotFoundError, match="Can't find"):
        files.read_metadata(tmp_path / "missing.safetensors")
    monkeypatch.setattr(files, "safe_open", raising(OSError(errno.EIO, "broken")))
    for read in (files.read_metadata, files.read_shapes, files.read_weights):
        with pytest.raises(CheckpointError, match="broken"):
            read(tmp_path / "a.safetensors")


def test_a_new_folder_appears_whole_and_readable(tmp_path):
    mask = os.umask(0o027)
    try:
        with new_folder(tmp_path / "new" / "er", CONFIG, False) as folder:
            (folder / CONFIG).write_text("1")
            assert not (tmp_path / "new" / "er").exists()
            assert folder.name.startswith(".") and folder.name.endswith(".tmp")
    finally:
        assert os.umask(mask) == 0o027
    assert content(tmp_path / "new") == {"er": None, f"er/{CONFIG}": b"1"}
    assert stat.S_IMODE((tmp_path / "new" / "er").stat().st_mode) == 0o750


def test_only_a_folder_of_its_kind_is_replaced_and_only_if_asked(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / CONFIG).write_text("old")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter").write_text("old")
    before = content(tmp_path)
    for name, replace, message in (
        ("own", False, "exists already and is not empty"),
        ("other", False, "exists already and is not empty"),
        ("other", True, f"has no '{CONFIG}', so it is not replaced"),
    ):
        with (
            pytest.raises(PeftValueError, match=message),
            new_folder(tmp_path / name, CONFIG, replace),
        ):
            pass
    assert content(tmp_path) == before
    for name, replace in (("own", True), ("empty", False)):
        with new_folder(tmp_path / name, CONFIG, replace) as folder:
            (folder / "new").write_text("new")
        assert content(tmp_path / name) == {"new": b"new"}
    assert set(os.listdir(tmp_path)) == {"own", "other", "empty"}


def test_an_error_while_a_folder_is_filled_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / CONFIG).write_text("old")
    before = content(tmp_path)
    for error, kind in (
        (KeyError(), KeyError),
        (OSError(errno.ENOSPC, "full"), CheckpointWriteError),
        (PeftValueError("mine"), PeftValueError),
    ):
        with pytest.raises(kind) as failure, new_folder(tmp_path / "own", CONFIG, True):
            raise error
        assert content(tmp_path) == before
        assert getattr(failure.value, "errno", None) == getattr(error, "errno", None)
    renames = []

    def second_fails(source, target, replace=os.replace):
        renames.append(target)
        if len(renames) == 2:
            raise OSError(errno.EIO, "broken")
        replace(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with (
        pytest.raises(CheckpointWriteError, match="broken"),
        new_folder(tmp_path / "own", CONFIG, True),
    ):
        pass
    assert len(renames) == 3  # the third puts the old one back
    assert content(tmp_path) == before


def test_a_folder_that_can_not_be_made(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "mkdtemp", raising(OSError(errno.EROFS, "read-only")))
    monkeypatch.setattr("peft.checkpoint.new_folder.mkdtemp", tempfile.mkdtemp)
    with (
        pytest.raises(CheckpointWriteError, match="can't be written") as failure,
        new_folder(tmp_path / "new", CONFIG, False),
    ):
        pass
    assert failure.value.errno == errno.EROFS


def test_paths_that_are_none():
    with pytest.raises(PeftValueError, match="The path '' is empty"):
        paths.check_path("")
    for value in (None, True, 1, 1.5, b"x"):
        with pytest.raises(PeftTypeError, match=f"got {value!r}. Pass that of the folder"):
            paths.check_path(value)
    with pytest.raises(PeftTypeError, match="check their order"):
        paths.check_path(torch.nn.Linear(1, 1))
    with pytest.raises(PeftTypeError, match="an object of type LoraConfig. A config is passed as"):
        paths.check_path(LoraConfig())
    with pytest.raises(
        PeftTypeError, match="Expected a folder's path, got an object of type list.$"
    ):
        paths.as_folder([])
    with pytest.raises(PeftTypeError, match="`path`=1 must be a path, not int"):
        paths.as_file(1)
    with pytest.raises(PeftTypeError, match="`name`=1 must be a path or None, not int"):
        paths.as_path(1, "name", " or None")


def test_a_path_below_a_file_names_the_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PeftValueError, match="is a file; give the path of a folder"):
        paths.as_folder(tmp_path / "file")
    with pytest.raises(PeftValueError, match=f"can't be a folder: '{tmp_path / 'file'}' is a file"):
        paths.as_folder(tmp_path / "file" / "a" / "b")
    with pytest.raises(PeftValueError, match="is a folder; give the path of a file in it"):
        paths.as_file(tmp_path)
    with pytest.raises(PeftValueError, match=f"since '{tmp_path / 'file'}' is a file"):
        paths.as_file(tmp_path / "file" / "a" / "b")
    assert paths.as_file(str(tmp_path / "new")) == tmp_path / "new"
    assert paths.as_folder(str(tmp_path / "new")) == tmp_path / "new"
