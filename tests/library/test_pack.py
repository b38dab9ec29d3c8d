# SPDX-License-Identifier: Apache-2.0
"""A pack gives back the files that it was made of, to the bit, one at a time."""

import copy
import json
import os
import shutil

import pytest
import torch
from helpers.models import mlp
from helpers.users import USERS, save_user
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft import AdapterLibrary, AdapterPack, PeftModel
from peft.base.errors import CheckpointError, CheckpointNotFoundError, PeftValueError

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
