# SPDX-License-Identifier: Apache-2.0
"""Adapters of a library in memory and on a model."""

import copy
import hashlib
import json
import random
import threading

import pytest
import torch
from helpers.methods import METHODS
from helpers.models import TARGETS, mlp
from helpers.states import assert_unchanged, snapshot
from helpers.users import USERS, save_user
from safetensors.torch import load_file

from peft import (
    AdapterLibrary,
    AdapterPack,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    adapter_sizes,
    get_peft_model,
)
from peft.base.errors import CheckpointError, CheckpointNotFoundError, PeftError, PeftValueError
from peft.library import reading

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NAMES = [*(f"methods/{name.lower()}" for name in METHODS), *(f"users/{user}" for user in USERS)]


@pytest.fixture
def library(folder):
    return AdapterLibrary(folder)


@pytest.fixture
def reads(monkeypatch):
    """Names of the folders that are read."""
    paths, read = [], reading.read_folder

    def noted(folder, *rest):
        paths.append(folder.name)
        return read(folder, *rest)

    monkeypatch.setattr(reading, "read_folder", noted)
    return paths


@pytest.mark.parametrize("name", NAMES)
def test_what_is_loaded_is_in_the_files(library, name):
    config, tensors, shared = library.load(name)
    expected = load_file(library.folder / name / WEIGHTS)
    assert tensors.keys() == expected.keys()
    for key, tensor in tensors.items():
        assert tensor.dtype == expected[key].dtype and torch.equal(tensor, expected[key])
    saved = PeftConfig.from_pretrained(library.folder / name)
    assert type(config) is type(saved) and config.to_dict() == saved.to_dict()
    if name.startswith("users"):
        (bank,) = shared.values()
        assert torch.equal(
            bank, load_file(library.folder / "bank/vector_bank.safetensors")["vector_bank"]
        )
    else:
        assert not shared
    config.r = 77  # the caller's own
    assert library.load(name).config.r == saved.r


def test_memory_is_bounded_and_the_least_recently_used_leave(folder, reads):
    """Each read says that the adapter had left, or never was there."""
    one = AdapterLibrary(folder)
    first = one.load("users/ada")
    alone = one.loaded_bytes
    (bank,) = first.shared.values()
    data = sum(tensor.nbytes for tensor in first.tensors.values())
    assert data + bank.nbytes < alone < data + bank.nbytes + 2500  # and the text of the config
    second = one.load("users/ben")
    assert next(iter(second.shared.values())) is bank  # held once, counted once
    assert one.loaded_bytes - alone == alone - bank.nbytes
    reads.clear()
    library = AdapterLibrary(folder, max_bytes=one.loaded_bytes)  # for two
    for user, is_read in (
        ("ada", True), ("ben", True), ("ada", False), ("cai", True),
        ("ada", False), ("ben", True), ("cai", True),
    ):  # fmt: skip
        library.load(f"users/{user}")
        assert reads == [user] * is_read
        assert 0 < library.loaded_bytes <= one.loaded_bytes
        reads.clear()
    library = AdapterLibrary(folder, max_bytes=10)  # for none
    assert library.load("users/ada").tensors and library.loaded_bytes == 0


def test_a_bank_leaves_with_the_last_adapter_over_it(folder):
    library = AdapterLibrary(folder)
    library.load("users/ada")
    alone = library.loaded_bytes
    library.load("methods/lora")
    only_lora = library.loaded_bytes - alone
    library.remove("users/ada")
    assert library.loaded_bytes == only_lora


def test_threads_load_within_the_bound(folder):
    expected = {name: load_file(folder / name / WEIGHTS) for name in NAMES}
    library = AdapterLibrary(folder)
    for name in NAMES:
        library.load(name)
    library = AdapterLibrary(folder, max_bytes=library.loaded_bytes // 3)
    errors = []

    def work(seed):
        draw = random.Random(seed)
        try:
            for _ in range(40):
                name = draw.choice(NAMES)
                tensors = library.load(name).tensors
                assert all(
                    torch.equal(tensors[key], value) for key, value in expected[name].items()
                )
                assert library.loaded_bytes <= library._cache.max_bytes
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for entry in library:
        library.remove(entry.name)
    assert library.loaded_bytes == 0


def test_changed_and_missing_files_are_errors(library, folder):
    save_user(folder / "users" / "ada", "bank", folder)
    with pytest.raises(CheckpointError, match="'users/ada' has other weights than when.*refresh"):
        library.load("users/ada")
    library.refresh()
    expected = load_file(folder / "users" / "ada" / WEIGHTS)
    tensors = library.load("users/ada").tensors
    assert all(torch.equal(tensors[key], value) for key, value in expected.items())
    (folder / "users" / "ben" / WEIGHTS).unlink()
    with pytest.raises(CheckpointNotFoundError, match=f"Can't find .*users/ben/{WEIGHTS}"):
        library.load("users/ben")
    (folder / "bank" / "vector_bank.safetensors").unlink()
    with pytest.raises(CheckpointNotFoundError, match="bank"):
        AdapterLibrary(folder, refresh=False).load("users/cai")


def test_a_changed_config_is_an_error(folder):
    """Its weights are the same; the outputs would not be."""
    packed = folder / "packed.adapters.safetensors"
    AdapterPack.write(packed, {"x": folder / "methods" / "lora"})
    library = AdapterLibrary(folder)
    library.load("methods/lora")  # in memory as it was indexed
    path = folder / "methods" / "lora" / CONFIG
    content = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(content.items())), indent=7) + "\n")  # the same
    assert library.check().ok and AdapterLibrary(folder, refresh=False).load("methods/lora")
    path.write_text(json.dumps({**content, "lora_alpha": 777}))
    message = "'methods/lora' has other settings in its config than when.*refresh"
    with pytest.raises(CheckpointError, match=message):
        AdapterLibrary(folder, refresh=False).load("methods/lora")
    with pytest.raises(CheckpointError, match=message):
        library.route(mlp(), "methods/lora")
    assert [problem[:2] for problem in library.check().problems] == [("methods/lora", "changed")]
    assert library.refresh().changed == ["methods/lora"] and library.check().ok
    assert library.load("methods/lora").config.lora_alpha == 777
    texts = [json.dumps(said, sort_keys=True) for said in ({**content, "lora_alpha": 777}, content)]
    names = ("methods/lora", "packed/x")
    for name, text in zip(names, texts, strict=True):
        assert library[name].config_sha256 == hashlib.sha256(text.encode()).hexdigest()
    expected = [library[name] for name in names]
    lines = map(json.loads, library.index_file.read_text().splitlines())
    old = [{k: v for k, v in line.items() if k != "config_sha256"} for line in lines]
    library.index_file.write_text("".join(json.dumps(line) + "\n" for line in old))
    assert AdapterLibrary(folder, refresh=False).load("methods/lora")  # of an older version
    assert [AdapterLibrary(folder)[name] for name in names] == expected


@pytest.mark.parametrize("name", METHODS)
def test_adapters_on_a_model_are_those_of_their_folders(library, name):
    method, x = METHODS[name], torch.randn(3, 8)
    base = mlp()
    same = PeftModel.from_pretrained(copy.deepcopy(base), library.folder / "methods" / name.lower())
    model = library.add_to(base, f"methods/{name.lower()}")
    assert isinstance(model, PeftModel) and model.active_adapters == [f"methods/{name.lower()}"]
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    torch.testing.assert_close(model(x, **method.call), same(x, **method.call))
    state = {
        key.replace("methods/" + name.lower(), "default"): tensor
        for key, tensor in model.state_dict().items()
    }
    assert state.keys() == same.state_dict().keys()
    assert library.add_to(model, {f"methods/{name.lower()}": "again"}) is model
    model.set_adapter("again")
    torch.testing.assert_close(model(x, **method.call), same(x, **method.call))
    sizes = adapter_sizes(model)
    own = sum(
        tensor.nbytes for key, tensor in same.state_dict().items() if "default" in key.split(".")
    )
    assert sizes == {f"methods/{name.lower()}": own, "again": own}


@pytest.mark.parametrize("is_peft", [True, False])
def test_all_are_put_on_a_model_or_none(library, folder, is_peft):
    base = mlp()
    model = base
    if is_peft:
        model = PeftModel.from_pretrained(base, folder / "users" / "dora", "mine")
    base.train()
    save_user(folder / "bad" / "other", "bank", folder)
    config = folder / "bad" / "other" / CONFIG
    config.write_text(config.read_text().replace('"r": 2', '"r": 4'))  # shapes that do not fit
    library.refresh()
    before, names = snapshot(model), [f"users/{user}" for user in USERS]
    problems = {}
    problems["does not fit"] = [*names, "bad/other"]
    problems["no adapter 'users/nobody'"] = [*names, "users/nobody"]
    problems["gives one name to several"] = {"users/ada": "x", "users/ben": "x"}
    problems["without dots"] = {"users/ada": "x", "users/ben": "x.y"}
    problems["does not fit the model"] = ["methods/lora", *names, "bad/other"]
    if is_peft:
        del problems["does not fit the model"]
        problems["different peft types"] = [*names, "methods/lora"]
        problems["already exists"] = {"users/ada": "new", "users/ben": "mine"}
    for message, chosen in problems.items():
        with pytest.raises(PeftError, match=message):
            library.add_to(model, chosen)
        assert_unchanged(before, model)
        if is_peft:
            assert list(model.peft_config) == ["mine"] and model.active_adapters == ["mine"]
        else:
            assert type(model) is torch.nn.Sequential
    done = library.add_to(model, names)
    assert set(names) <= set(done.peft_config)
    assert not isinstance(done, PeftMixedModel)


def test_adapters_of_several_methods_make_a_mixed_model(library):
    x, base = torch.randn(1, 8), mlp()
    names = ["methods/lora", "users/ada", "methods/loha", "methods/lokr"]
    expected = []
    for name in names:
        alone = PeftModel.from_pretrained(copy.deepcopy(base), library.folder / name)
        expected.append(alone(x))
    model = library.add_to(base, names)
    assert isinstance(model, PeftMixedModel) and model.active_adapters == names[:1]
    assert not any(p.requires_grad for p in model.parameters())
    y = model(x.expand(4, -1), adapter_names=names)
    torch.testing.assert_close(y, torch.cat(expected))


def test_a_routed_batch_over_many_adapters(library):
    x = torch.randn(5, 8)
    model = library.add_to(mlp(), [f"users/{user}" for user in USERS])
    batch = ["users/cai", "users/ada", "__base__", "users/dora", "users/cai"]
    mixed = model(x, adapter_names=batch)
    for i, name in enumerate(batch):
        if name == "__base__":
            with model.disable_adapter():
                expected = model(x[i : i + 1])
        else:
            model.set_adapter(name)
            expected = model(x[i : i + 1])
        torch.testing.assert_close(mixed[i : i + 1], expected)


def test_sizes_count_whole_modules_and_token_rows():
    from peft import LoraConfig

    model = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["0"], modules_to_save=["4"]))
    model.add_adapter("b", LoraConfig(r=1, target_modules=TARGETS))
    whole = sum(p.nbytes for p in mlp()[4].parameters())
    assert adapter_sizes(model) == {"default": 4 * 2 * (8 + 16) + whole, "b": 4 * (24 + 32)}
    assert adapter_sizes(model, ["b"]) == {"b": 4 * (24 + 32)}
    with pytest.raises(TypeError, match="Sizes are those of adapters on a model"):
        adapter_sizes(3)
    assert adapter_sizes(model, "b") == adapter_sizes(model, ["b"])
    for names in (5, [["b"]]):
        with pytest.raises(TypeError, match="must be a name or a list|named by one string"):
            adapter_sizes(model, names)


def test_a_copied_library_begins_with_an_empty_memory(library):
    library.load("users/ada")
    again = copy.deepcopy(library)
    assert again.loaded_bytes == 0 and again.names == library.names
    assert again.load("users/ada").tensors.keys() == library.load("users/ada").tensors.keys()


def test_paths_of_the_bank_are_seen_from_the_library(made, tmp_path, monkeypatch, folder):
    """A library can be moved as a whole, whatever the working directory."""
    moved = folder.rename(tmp_path / "elsewhere")
    monkeypatch.chdir("/")
    library = AdapterLibrary(moved)
    assert library.load("users/ada").shared
    monkeypatch.chdir(moved.parent)
    assert AdapterLibrary("elsewhere").load("users/ada").shared
    with pytest.raises(PeftValueError, match="no adapter"):
        library.load("bank")


def test_a_library_becomes_a_model_that_routes(library, folder):
    """Against each adapter alone: folders, a task of several, and a member of a pack."""
    packed = folder / "packed.adapters.safetensors"
    AdapterPack.write(packed, {"x": folder / "methods" / "loha"})
    library.refresh()
    names = ["methods/lora", "methods/lokr", "methods/poly", "users/ada", "packed/x"]
    base, x = mlp(), torch.randn(5, 8)
    expected = []
    for i, name in enumerate(names):
        alone = library.add_to(copy.deepcopy(base), name)
        call = {"task_ids": 2} if name == "methods/poly" else {}
        expected.append(alone(x[i : i + 1], **call))
    model = library.route(base, names, routing="task")
    experts = [name + ".task_2" * (name == "methods/poly") for name in names]
    torch.testing.assert_close(model(x, task_ids=experts), torch.cat(expected))


def test_routing_over_all_needs_one_base_model(library, folder):
    base = mlp()
    with pytest.raises(PeftValueError, match="for several base models: 'base/"):
        library.route(base)
    save_user(folder / "users" / "ada", "bank", folder)
    before = snapshot(base)
    with pytest.raises(CheckpointError, match="'users/ada' has other weights"):
        library.route(base, library.filter(where=lambda entry: entry.name == "users/ada"))
    assert_unchanged(before, base)
