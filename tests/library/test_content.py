# SPDX-License-Identifier: Apache-2.0
"""Adapters in memory: what is read of their files, and how much is kept."""

import errno
import hashlib
import pickle

import pytest
import torch
from safetensors.torch import save_file

from peft import LoraConfig
from peft.base.errors import CheckpointError, CheckpointNotFoundError
from peft.library import content as module
from peft.library.content import ContentCache, LoadedAdapter, opened_folder, read_folder

WEIGHTS, CONFIG, LEGACY = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
STATE = {"a": torch.arange(6.0), "b": torch.ones(2, 2)}


@pytest.fixture
def adapter(tmp_path):
    LoraConfig(r=3).save_pretrained(tmp_path / "a")
    save_file(STATE, tmp_path / "a" / WEIGHTS)
    torch.save(STATE, tmp_path / "a" / LEGACY)
    return tmp_path / "a"


@pytest.mark.parametrize("name", [WEIGHTS, LEGACY])
def test_a_folders_files_and_the_digest_of_its_weights(adapter, name):
    content, digest = read_folder(adapter, name, ("here", {"subfolder": "x"}))
    assert digest == hashlib.sha256((adapter / name).read_bytes()).hexdigest()
    config, tensors, shared = content.adapter()
    assert config.r == 3 and config.source == ("here", {"subfolder": "x"}) and not shared
    assert tensors.keys() == STATE.keys()
    assert all(torch.equal(tensors[key], STATE[key]) for key in STATE)
    assert 40 + len(content.config_text) <= content.nbytes < 40 + len(content.config_text) + 200
    config.r = 4
    assert content.config().r == 3


def test_what_can_not_be_read_is_named(adapter, monkeypatch):
    def reading():
        with opened_folder(adapter, WEIGHTS) as (text, _, _):
            return text

    raw = (adapter / CONFIG).read_bytes()
    (adapter / CONFIG).write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=f"'{adapter / CONFIG}' is not text"):
        reading()
    (adapter / CONFIG).unlink()
    with pytest.raises(CheckpointNotFoundError, match=f"Can't find '{adapter / CONFIG}'"):
        reading()
    (adapter / CONFIG).write_bytes(raw)
    assert reading().encode() == raw
    with pytest.raises(CheckpointNotFoundError, match="Can't find .*nothing.safetensors"):
        read_folder(adapter, "nothing.safetensors", ("", {}))
    with pytest.raises(CheckpointNotFoundError, match="Can't find .*nothing.bin"):
        read_folder(adapter, "nothing.bin", ("", {}))
    for error, kind, message in (
        (OSError(errno.EIO, "broken"), CheckpointError, f"'{adapter}' can't be read: .*broken"),
        (CheckpointNotFoundError("mine"), CheckpointNotFoundError, "^mine$"),
    ):

        def failing(path, error=error):
            raise error

        monkeypatch.setattr(module, "_opened_weights", failing)
        with pytest.raises(kind, match=message):
            reading()


def test_a_file_that_is_cut_while_it_is_read(adapter, monkeypatch):
    def cutting(file, size, path, read=module.read_layout):
        layout = read(file, size, path)
        path.write_bytes(path.read_bytes()[:-1])
        return layout

    save_file({"a": torch.ones(10_000)}, adapter / WEIGHTS)  # more than a read ahead takes
    monkeypatch.setattr(module, "read_layout", cutting)
    with pytest.raises(CheckpointError, match=f"'{adapter / WEIGHTS}' was cut while it was read"):
        read_folder(adapter, WEIGHTS, ("", {}))


def test_an_adapter_prints_what_it_is():
    tensors, bank = {"a": torch.ones(30, 50)}, torch.ones(1)
    assert repr(LoadedAdapter(LoraConfig(), tensors, {})) == (
        "LoadedAdapter(LORA, 1 tensors, 1,500 parameters)"
    )
    assert repr(LoadedAdapter(LoraConfig(), tensors, {"x": bank})).endswith(", 1 shared)")


class Some:
    """A content of so many bytes over shared tensors."""

    def __init__(self, nbytes, **shared):
        self.nbytes, self.shared = nbytes, shared


def test_what_is_kept_is_the_latest_within_the_bound():
    cache = ContentCache(10)
    a, b, c = Some(4), Some(6), Some(4)
    assert cache.put("a", 1, a) is a and cache.put("b", 1, b) is b
    assert cache.nbytes == 10 and cache.get("a", 1) is a and cache.get("b", 1) is b
    assert cache.get("a", 2) is None and cache.get("x", 1) is None
    assert cache.get("a", 1) is a  # now `b` is the oldest
    cache.put("c", 1, c)
    assert cache.get("b", 1) is None and cache.nbytes == 8
    cache.put("c", 2, Some(5))  # another version takes its place
    assert cache.nbytes == 9 and cache.get("c", 1) is None and cache.get("c", 2)
    large = Some(11)
    assert cache.put("d", 1, large) is large and cache.get("d", 1) is None and cache.nbytes == 9
    cache.drop("a")
    cache.drop("a")
    assert cache.nbytes == 5
    cache.put("e", 1, Some(10))
    assert cache.nbytes == 10 and cache.get("c", 2) is None


def test_what_adapters_share_is_counted_once_and_leaves_with_the_last():
    cache, bank, equal = ContentCache(100), torch.zeros(4), torch.zeros(4)
    cache.put("a", 1, Some(1, x=bank))
    assert cache.nbytes == 17 and cache.shared() == {"x": bank}
    assert cache.put("b", 1, Some(2, x=equal)).shared["x"] is bank
    cache.put("c", 1, Some(4, x=equal, y=equal))
    assert cache.nbytes == 1 + 2 + 4 + 16 + 16
    cache.drop("a")
    cache.drop("c")
    assert cache.nbytes == 18 and cache.shared().keys() == {"x"}
    cache.put("b", 2, Some(3, x=equal))
    assert cache.nbytes == 19
    cache.drop("b")
    assert cache.nbytes == 0 and cache.shared() == {}
    alone = Some(90, x=bank)  # too large with its bank
    assert cache.put("d", 1, alone) is alone and cache.nbytes == 0
    cache.put("e", 1, Some(84, x=bank))
    assert cache.nbytes == 100


def test_a_copy_of_a_memory_begins_empty():
    cache = ContentCache(10)
    cache.put("a", 1, Some(4))
    other = pickle.loads(pickle.dumps(cache))
    assert other.max_bytes == 10 and other.nbytes == 0 and other.get("a", 1) is None
    other.put("b", 1, Some(4))
    assert other.nbytes == 4 and cache.nbytes == 4
