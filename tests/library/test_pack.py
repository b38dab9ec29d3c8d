# SPDX-License-Identifier: Apache-2.0
"""A pack gives back the files that it was made of, to the bit, one at a time."""

import copy
import hashlib
import json
import os
import shutil
import struct
import threading

import pytest
import torch
from helpers.models import mlp
from helpers.users import USERS, save_user
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft import AdapterLibrary, AdapterPack, PeftModel
from peft.base.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    PeftRuntimeError,
    PeftTypeError,
    PeftValueError,
)
from peft.library import pack as pack_module

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def folders(folder):
    """Adapters of all methods by name, folders by name."""
    found = {path.parent.name: path.parent for path in sorted(folder.rglob(CONFIG))}
    config = folder / "users" / "dora" / CONFIG
    config.write_bytes(config.read_bytes().replace(b"\n", b"\r\n"))  # of another system
    return found


@pytest.fixture
def pack(folder, folders):
    return AdapterPack.write(folder / "all.adapters.safetensors", folders)


def test_folders_come_back_to_the_bit(pack, folders, tmp_path):
    assert len(pack) == 9 and set(pack) == set(folders) == set(pack.names)
    for name, folder in folders.items():
        pack.unpack(name, tmp_path / "again" / name)
        for file in (CONFIG, WEIGHTS):
            assert (tmp_path / "again" / name / file).read_bytes() == (folder / file).read_bytes()
        assert pack.read(name) == (folder / WEIGHTS).read_bytes()
        assert set(os.listdir(tmp_path / "again" / name)) == {CONFIG, WEIGHTS}
    with pytest.raises(PeftValueError, match="has an adapter already"):
        pack.unpack("ada", tmp_path / "again" / "ada")


def test_an_adapter_is_loaded_without_its_folder(pack, folders):
    for name, folder in folders.items():
        config, tensors, shared = pack.load(name)
        expected = load_file(folder / WEIGHTS)
        assert tensors.keys() == expected.keys() and config.peft_type
        assert all(torch.equal(tensors[key], expected[key]) for key in expected)
        assert bool(shared) == (name in USERS)
    assert pack.load("ada").shared.keys() == pack.load("ben").shared.keys()
    (bank,) = pack.load("ada").shared.values()
    assert all(bank is other for other in pack.load("ben").shared.values())


def test_safetensors_alone_reads_it(pack, folders):
    """The recipe in the documentation, without this package."""
    with safe_open(pack.path, framework="pt") as file:
        kinds = json.loads(file.metadata()["kinds"])
        number, row = next(
            (number, kind["members"].index("cai"))
            for number, kind in enumerate(kinds)
            if "cai" in kind["members"]
        )
        header = kinds[number]["header"].encode()
        data = bytes(file.get_slice(f"adapters.{number}")[row].tolist())
    raw = len(header).to_bytes(8, "little") + header + data
    assert raw == (folders["cai"] / WEIGHTS).read_bytes()
    assert kinds[number]["config"] == (folders["cai"] / CONFIG).read_text()


def test_headers_are_stored_once(folder, tmp_path):
    folders = {}
    for number in range(50):
        folders[f"user{number}"] = tmp_path / f"user{number}"
        shutil.copytree(folder / "users" / "ada", tmp_path / f"user{number}")
    pack = AdapterPack.write(tmp_path / "users.adapters.safetensors", folders)
    sizes = pack.sizes()
    files = [path for own in folders.values() for path in (own / CONFIG, own / WEIGHTS)]
    assert sizes.separate == sum(path.stat().st_size for path in files)
    assert sizes.file == pack.path.stat().st_size and sizes.members == 50
    raw = (folder / "users" / "ada" / WEIGHTS).read_bytes()
    assert sizes.data == 50 * (len(raw) - 8 - int.from_bytes(raw[:8], "little"))
    one = AdapterPack.write(tmp_path / "one.adapters.safetensors", {"x": folders["user0"]})
    each = (sizes.file - one.file_size) / 49 - sizes.data / 50
    assert each < 32 + 16  # beside its data a digest and a name


def test_only_the_asked_for_is_read(pack, folders, monkeypatch):
    count, preadv = [0], os.preadv

    def counted(handle, buffers, offset):
        count[0] += sum(map(len, buffers))
        return preadv(handle, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    raw = pack.read("ada")
    assert count[0] == len(raw) - len(pack.kind_of("ada").layout.prefix) + 32


def test_members_are_added_replaced_and_removed(pack, folder, folders):
    old = pack.read("ada")
    save_user(folders["ada"], "bank", folder)
    new = pack.update(add={"ada": folders["ada"], "eva": folders["ben"]}, remove=["cai", "poly"])
    assert set(new) == set(folders) - {"cai", "poly"} | {"eva"}
    assert new.read("ada") == (folders["ada"] / WEIGHTS).read_bytes()
    assert new.read("eva") == new.read("ben") == (folders["ben"] / WEIGHTS).read_bytes()
    assert new.read("lokr") == (folders["lokr"] / WEIGHTS).read_bytes()
    assert pack.read("ada") == old != new.read("ada") and "cai" in pack  # open as it was
    for change in ({"remove": ["nobody"]}, {"add": {"": folders["ben"]}}):
        before = pack.path.read_bytes()
        with pytest.raises(PeftValueError, match="has no adapter 'nobody'|non-empty string"):
            new.update(**change)
        assert pack.path.read_bytes() == before
    with pytest.raises(CheckpointNotFoundError):
        new.update(add={"x": folder / "bank"})
    with pytest.raises(PeftValueError, match="at least one adapter"):
        new.update(remove=new.names)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("all", "all.adapters.safetensors"),
        ("all.safetensors", "all.adapters.safetensors"),
        (".all.adapters.safetensors", "all.adapters.safetensors"),
        (".adapters.safetensors", "users.adapters.safetensors"),
    ],
)
def test_a_pack_has_a_name_by_which_a_library_finds_it(folder, folders, name, instead):
    before, adapters = sorted(folder.iterdir()), {"ada": folders["ada"]}
    with pytest.raises(PeftValueError, match=f"not '.*/{name}'. Write '{folder / instead}'"):
        AdapterPack.write(folder / name, adapters)
    assert sorted(folder.iterdir()) == before
    AdapterPack.write(folder / instead, adapters)
    assert f"{instead.split('.')[0]}/ada" in AdapterLibrary(folder)


def test_damage_is_found_where_it_is(pack, folders, tmp_path):
    raw = bytearray(pack.path.read_bytes())
    at = raw.index(pack.content("ada").data)
    raw[at] ^= 1
    pack.path.write_bytes(raw)
    with AdapterPack(pack.path) as damaged:
        with pytest.raises(CheckpointError, match="'ada' in .* is damaged"):
            damaged.read("ada")
        with pytest.raises(CheckpointError, match="is damaged"):
            damaged.update(remove=["ben"])  # damage is not copied with a new digest
        assert damaged.read("ben") == (folders["ben"] / WEIGHTS).read_bytes()
        mended = damaged.update(add={"ada": folders["ada"]})
        assert mended.read("ada") == (folders["ada"] / WEIGHTS).read_bytes()


@pytest.mark.parametrize("cut", [0, 7, 8, 100, -1])
def test_a_damaged_pack_is_refused(pack, cut):
    raw = pack.path.read_bytes()
    pack.path.write_bytes(raw[:cut])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        AdapterPack(pack.path)


def test_other_files_are_no_packs(pack, folders, tmp_path):
    with pytest.raises(CheckpointError, match="is no pack of adapters"):
        AdapterPack(folders["lora"] / WEIGHTS)
    with safe_open(pack.path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    changes = {
        "of version 2": metadata | {"peft_adapter_pack": "2"},
        "damaged pack": metadata | {"kinds": "[{"},
        "row for each": metadata | {"kinds": metadata["kinds"].replace('"ada"', '"ada","more"')},
        "damaged": metadata | {"kinds": metadata["kinds"].replace("data_offsets", "offsets")},
    }
    for message, changed in changes.items():
        save_file(tensors, tmp_path / "x.adapters.safetensors", changed)
        with pytest.raises(CheckpointError, match=message):
            AdapterPack(tmp_path / "x.adapters.safetensors")
    with pytest.raises(CheckpointNotFoundError):
        AdapterPack(tmp_path / "nothing")


def test_a_library_has_the_members_of_packs(folder, pack, folders):
    for name in ("users", "methods"):
        shutil.rmtree(folder / name)
    library = AdapterLibrary(folder)
    assert set(library.names) == {f"all/{name}" for name in folders} and not library.left_out
    library.tag("all/ada", "x")
    base = mlp()
    same = copy.deepcopy(base)
    expected = PeftModel.from_pretrained(same, pack_folder(pack, "ben", folder), "all/ben")
    model = library.add_to(base, ["all/ada", "all/ben"])
    model.set_adapter("all/ben")
    x = torch.randn(3, 8)
    torch.testing.assert_close(model(x), expected(x))
    pack.update(remove=["cai"])
    assert library.refresh().dropped == ["all/cai"] and library["all/ada"].tags == ("x",)
    assert library.check().ok
    library.remove(["all/poly"])
    library.remove(["all/lokr", "all/loha"], delete_files=True)
    assert set(AdapterPack(pack.path)) == set(folders) - {"cai", "lokr", "loha"}
    assert "all/poly" not in AdapterLibrary(folder)
    raw = bytearray(pack.path.read_bytes())
    raw[-1] ^= 1  # of a digest
    pack.path.write_bytes(raw)
    assert len(library.refresh().changed) == len(library)  # the file changed
    assert [problem.kind for problem in library.check().problems] == ["damaged"]
    pack.path.write_bytes(raw[:99])
    with pytest.warns(UserWarning, match="Left out"):
        library.refresh()
    assert not library.names


def pack_folder(pack, name, folder):
    pack.unpack(name, folder.parent / name)
    shutil.copytree(folder / "bank", folder.parent / "bank", dirs_exist_ok=True)
    return folder.parent / name


def rewritten(pack, path, change):
    """A pack with other kinds in its metadata."""
    with safe_open(pack.path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    kinds = json.loads(metadata["kinds"])
    change(kinds)
    save_file(tensors, path, metadata | {"kinds": json.dumps(kinds)})
    return path


def many(kinds):
    """The kind with several members, the users."""
    return max(kinds, key=lambda kind: len(kind["members"]))["members"]


KINDS = {
    "a kind is no object": lambda kinds: kinds.__setitem__(0, 1),
    "a kind has no members": lambda kinds: kinds[0].pop("members"),
    "a number of members": lambda kinds: kinds[0].__setitem__("members", 1),
    "a kind too many": lambda kinds: kinds.append(kinds[0] | {"members": ["x"]}),
    "a name twice": lambda kinds: many(kinds).__setitem__(0, many(kinds)[1]),
    "a member of two kinds": lambda kinds: many(kinds).__setitem__(0, kinds[0]["members"][0]),
    "a name that is a number": lambda kinds: many(kinds).__setitem__(0, 1),
    "a name that is a list": lambda kinds: many(kinds).__setitem__(0, []),
    "a header too short": lambda kinds: kinds[0].__setitem__("header", "{}"),
    "a config that is a number": lambda kinds: kinds[0].__setitem__("config", 1),
    "a header that is a number": lambda kinds: kinds[0].__setitem__("header", 1),
}


@pytest.mark.parametrize("damage", KINDS)
def test_kinds_that_do_not_fit_the_tensors(pack, tmp_path, damage):
    path = rewritten(pack, tmp_path / "x.adapters.safetensors", KINDS[damage])
    with pytest.raises(CheckpointError, match="is a damaged pack of adapters"):
        AdapterPack(path)
    nested = tmp_path / "deep.adapters.safetensors"
    raw = {"peft_adapter_pack": "1", "kinds": "[" * 100_000}
    save_file({"a": torch.ones(1)}, nested, raw)
    with pytest.raises(CheckpointError, match="is a damaged pack of adapters"):
        AdapterPack(nested)


def test_digests_and_sizes_are_those_of_the_files(pack, folders):
    files = {name: (folder / WEIGHTS).read_bytes() for name, folder in folders.items()}
    expected = {name: hashlib.sha256(raw).hexdigest() for name, raw in files.items()}
    assert pack.digests() == expected == {name: pack.digest(name) for name in pack}
    sizes = pack.sizes()
    assert sizes.members == len(files) and sizes.file == pack.path.stat().st_size
    assert sizes.separate == sum(
        len(raw) + (folders[name] / CONFIG).stat().st_size for name, raw in files.items()
    )
    heads = sum(8 + struct.unpack("<Q", raw[:8])[0] for raw in files.values())
    assert sizes.data == sum(map(len, files.values())) - heads
    assert repr(pack) == f"AdapterPack('{pack.path}', 9 adapters, {sizes.file:,} bytes)"
    raw = pack.path.read_bytes()
    assert struct.unpack("<Q", raw[:8])[0] % 8 == 0  # readers map tensors at this position
    with safe_open(pack.path, framework="pt") as file:
        assert file.metadata()["format"] == "pt"


def test_a_closed_pack_reads_nothing_and_an_open_one_without_preadv(pack, folders, monkeypatch):
    monkeypatch.delattr(os, "preadv")  # Windows
    with AdapterPack(pack.path) as other:
        for name in reversed(other.names):
            assert other.read(name) == (folders[name] / WEIGHTS).read_bytes()
        handle = other._handle
    with pytest.raises(PeftRuntimeError, match=f"The pack '{pack.path}' was closed"):
        other.read("ada")
    with pytest.raises(OSError):  # noqa: PT011
        os.fstat(handle)


@pytest.mark.parametrize("has_preadv", [True, False])
def test_a_pack_that_is_cut_while_it_is_open(pack, monkeypatch, has_preadv):
    if not has_preadv:
        monkeypatch.delattr(os, "preadv")
    os.truncate(pack.path, pack.file_size - 40)
    with pytest.raises(CheckpointError, match="was cut while it was open"):
        pack.digest(pack.names[-1])


def test_what_is_no_pack_file(pack, tmp_path):
    with pytest.raises(PeftTypeError, match="`path`=1 must be a path"):
        AdapterPack(1)
    with pytest.raises(PeftTypeError, match="`path`=1 must be a path"):
        AdapterPack.write(1, {})
    with pytest.raises(CheckpointError, match=f"'{tmp_path}' can't be read"):
        AdapterPack(tmp_path)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(CheckpointError, match=f"'{loop}' can't be read"):
        AdapterPack(loop)


def test_arguments_that_are_none(pack, folder, folders):
    before = pack.path.read_bytes()
    for add in ([folders["ada"]], 0, ""):
        with pytest.raises(PeftTypeError, match="must be a dictionary: name → folder"):
            pack.update(add=add)
    with pytest.raises(PeftTypeError, match="got list"):
        AdapterPack.write(pack.path, [folders["ada"]])
    for remove in (None, 1):
        with pytest.raises(PeftTypeError, match="must be a name or a list of names"):
            pack.update(remove=remove)
    for name in (None, ["ada"]):
        with pytest.raises(PeftValueError, match="has no adapter"):
            pack.load(name)
    for name in ("", 1, "a\nb"):
        with pytest.raises(PeftValueError, match="must be a non-empty string"):
            pack.update(add={name: folders["ada"]})
    with pytest.raises(CheckpointNotFoundError, match="'eva'; packs hold adapters in safetensors"):
        pack.update(add={"eva": folder / "bank"})
    assert pack.path.read_bytes() == before
    assert "ada" not in pack.update(remove="ada")


def test_changes_of_others_stay(pack, folders):
    """Also those of threads that change the file at once, by the same open pack."""
    pack.update(add={"eva": folders["ben"]})
    pack.update(add={"ben": folders["ada"]})
    names = [f"new{number}" for number in range(4)]
    threads = [
        threading.Thread(target=pack.update, kwargs={"add": {name: folders["cai"]}})
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pack.update(remove=["ada"])
    with pytest.raises(PeftValueError, match="has no adapter 'ada'"):
        pack.update(remove=["ada"])
    assert "ada" in pack and "eva" not in pack
    with AdapterPack(pack.path) as now:
        assert set(now) == {*folders, "eva", *names} - {"ada"}
        sources = {"eva": "ben", "ben": "ada", **dict.fromkeys(names, "cai")}
        for name in now:
            folder = folders[sources.get(name, name)]
            assert now.read(name) == (folder / "adapter_model.safetensors").read_bytes()


def test_a_header_has_a_bound(pack, folders, monkeypatch):
    length = struct.unpack("<Q", pack.path.read_bytes()[:8])[0]
    monkeypatch.setattr(pack_module, "MAX_HEADER", length)
    pack.update()
    monkeypatch.setattr(pack_module, "MAX_HEADER", length - 8)
    with pytest.raises(PeftValueError, match=f"and a file's header has {length - 8:,} at most"):
        pack.update()


def test_an_adapter_that_changes_while_it_is_packed(folder, folders, monkeypatch):
    read = pack_module.read_folder

    def changed(path, *rest):
        save_file({"a": torch.ones(3)}, path / WEIGHTS)
        return read(path, *rest)

    monkeypatch.setattr(pack_module, "read_folder", changed)
    with pytest.raises(CheckpointError, match="'lora' changed while it was packed"):
        AdapterPack.write(folder / "x.adapters.safetensors", {"lora": folders["lora"]})
    assert not (folder / "x.adapters.safetensors").exists()


def test_a_member_is_unpacked_alone_in_the_folder_weights_last(pack, tmp_path, monkeypatch):
    fcntl, seen = pytest.importorskip("fcntl"), []

    def replacing(path, write, replace=pack_module.replace_file):
        handle = os.open(path.parent, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(handle)
        seen.append(path.name)
        replace(path, write)
        seen.append(set(os.listdir(path.parent)))

    monkeypatch.setattr(pack_module, "replace_file", replacing)
    pack.unpack("ada", tmp_path / "new" / "er")
    assert seen == [CONFIG, {CONFIG}, WEIGHTS, {CONFIG, WEIGHTS}]
