# SPDX-License-Identifier: Apache-2.0
"""The header of a safetensors file is read as the format says; anything else is refused."""

import io
import json
import struct

import pytest
import torch
from safetensors.torch import save, save_file

from peft.base.suggestions import listed
from peft.checkpoint import digests, headers, layout
from peft.utils.error import CheckpointError


def file_of(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def read(content):
    file = io.BytesIO(content)
    found = layout.read_layout(file, len(content), "x.safetensors")
    return found, bytearray(file.read())


def test_tensors_are_those_that_were_written():
    given = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.tensor([True, False, True]),
        "c": torch.arange(4, dtype=torch.int16),
        "none": torch.empty(0, 4),
        "number": torch.tensor(2.5, dtype=torch.float64),
        "half": torch.ones(3, dtype=torch.bfloat16),
    }
    found, data = read(save(given, {"format": "pt"}))
    tensors = found.tensors(data)
    assert found.metadata == {"format": "pt"} and tensors.keys() == given.keys()
    for key, tensor in given.items():
        torch.testing.assert_close(tensors[key], tensor, rtol=0, atol=0)
    content = found.prefix + bytes(data)
    assert content == save(given, {"format": "pt"}) and found.file_size == len(content)
    tensors["a"][0, 0] = 7  # they are views
    assert found.tensors(data)["a"][0, 0] == 7


def test_numbers_at_odd_positions():
    data = b"\x05" + struct.pack("<2f", 1.5, -2.0) + struct.pack("<h", 7)
    header = {
        "byte": entry("U8", (1,), (0, 1)),
        "odd": entry("F32", (2,), (1, 9)),
        "last": entry("I16", (), (9, 11)),
    }
    found, rest = read(file_of(header, data))
    tensors = found.tensors(rest)
    assert tensors["byte"].tolist() == [5]
    assert tensors["odd"].tolist() == [1.5, -2.0]
    assert tensors["last"].tolist() == 7
    assert read(file_of({}))[0].tensors(bytearray()) == {}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "header is not valid JSON"),
        (b"\xff{}", "header is not valid JSON"),
        (b"[" * 100_000, "header is not valid JSON"),
        ([1], "header is not a JSON object"),
        ({"__metadata__": [1]}, "metadata is not text by name"),
        ({"__metadata__": {"a": 1, "b": "c"}}, "metadata is not text by name"),
        ({"a": [1]}, "the entry of `a` is not that of a tensor"),
        ({"a": {"dtype": "F32"}}, "the entry of `a` is not that of a tensor"),
        ({"a": entry() | {"shape": 2}}, "the entry of `a` is not that of a tensor"),
        ({"a": entry(offsets=(0, 4, 8))}, "the entry of `a` is not that of a tensor"),
        ({"a": entry(["F32"])}, "the entry of `a` is not that of a tensor"),
        ({"a": entry("F31")}, "`a` has the unknown dtype 'F31'"),
        ({"a": entry(shape=(2.0,))}, "numbers that are no sizes"),
        ({"a": entry(shape=(True, 2))}, "numbers that are no sizes"),
        ({"a": entry(shape=(-1, -2))}, "numbers that are no sizes"),
        ({"a": entry(offsets=(0.0, 8))}, "numbers that are no sizes"),
        ({"a": entry(shape=(3,))}, "`a` takes 8 bytes, which do not fit its shape"),
        ({"a": entry(offsets=(8, 0))}, "takes -8 bytes"),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, "a gap or an overlap before `b`"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, "a gap or an overlap before `b`"),
        ({"a": entry(offsets=(4, 12))}, "a gap or an overlap before `a`"),
    ],
)
def test_headers_that_are_none(header, message):
    with pytest.raises(CheckpointError, match=f"'x.safetensors' is not .*: .*{message}"):
        read(file_of(header, bytes(20)))


def test_tensors_may_be_listed_in_any_order_and_be_empty():
    header = {
        "b": entry(offsets=(8, 16)),
        "none": entry(shape=(0,), offsets=(8, 8)),
        "a": entry(),
        "first": entry(shape=(0,), offsets=(0, 0)),
    }
    found, data = read(file_of(header, struct.pack("<4f", 1, 2, 3, 4)))
    tensors = found.tensors(data)
    assert tensors["a"].tolist() == [1, 2] and tensors["b"].tolist() == [3, 4]
    assert found.nbytes == 16
    assert tensors["none"].shape == tensors["first"].shape == (0,)
    assert tensors["none"].dtype == torch.float32


def test_a_file_that_is_cut_or_too_long(monkeypatch):
    whole = file_of({"a": entry()}, bytes(8))
    for content, message in (
        (b"", "it has 0 bytes, less than the length of a header takes"),
        (whole[:7], "it has 7 bytes, less than the length"),
        (whole[:20], "its header would take .* of 20; the file is damaged or cut"),
        (whole[:-1], f"it has {len(whole) - 1} bytes, and its header says {len(whole)}"),
        (whole + b"x", f"it has {len(whole) + 1} bytes, and its header says {len(whole)}"),
        (struct.pack("<Q", 2**63), "its header would take 9,223,372,036,854,775,808 bytes of 8"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read(content)
    empty = file_of({})
    assert read(empty)[0].nbytes == 0
    monkeypatch.setattr(layout, "MAX_HEADER", len(whole) - 16)
    assert read(whole)[0].nbytes == 8
    monkeypatch.setattr(layout, "MAX_HEADER", len(whole) - 17)
    with pytest.raises(CheckpointError, match="its header would take"):
        read(whole)


# --- digests -----------------------------------------------------------------------------------


def saved(folder, config, metadata=None, value=1.0):
    folder.mkdir()
    save_file({"a": torch.tensor([value, 2.0])}, folder / "adapter_model.safetensors", metadata)
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "adapter_config.json").write_text(text)
    return digests.adapter_digest(folder)


def test_an_adapters_digest_is_that_of_tensors_and_fields(tmp_path):
    plain = saved(tmp_path / "a", {"r": 1, "alpha": 2})
    assert saved(tmp_path / "b", '{"alpha":2,  "r":1}', {"format": "pt"}) == plain
    assert saved(tmp_path / "c", {"r": 1, "alpha": 2, "inference_mode": True}) == plain
    assert saved(tmp_path / "d", {"r": 1, "alpha": 2, "peft_version": "9"}) == plain
    assert saved(tmp_path / "e", {"r": 2, "alpha": 2}) != plain
    assert saved(tmp_path / "f", {"r": 1, "alpha": 2}, value=3.0) != plain
    legacy = tmp_path / "g"
    legacy.mkdir()
    (legacy / "adapter_config.json").write_text('{"r": 1}')
    torch.save({"a": torch.ones(1)}, legacy / "adapter_model.bin")
    one = digests.adapter_digest(legacy)
    (legacy / "adapter_config.json").write_text('{"r": 2}')
    assert one != digests.adapter_digest(legacy) and len(one) == 64


def test_other_tensors_of_the_same_bytes_have_another_digest(tmp_path):
    found = set()
    for name, tensors in (
        ("a", {"a": torch.ones(2, 3)}),
        ("b", {"b": torch.ones(2, 3)}),
        ("c", {"a": torch.ones(3, 2)}),
    ):
        saved(tmp_path / name, {})
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
        found.add(digests.adapter_digest(tmp_path / name))
    assert len(found) == 3


@pytest.mark.parametrize(
    "weights", [b"", b"\xff" * 8, file_of(b"{"), file_of([1]), file_of(b"[" * 100_000)]
)
def test_damaged_weights_have_no_digest(tmp_path, weights):
    saved(tmp_path / "a", {})
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match="is not a readable safetensors file"):
        digests.adapter_digest(tmp_path / "a")


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_damaged_config_has_no_digest(tmp_path, text):
    saved(tmp_path / "a", {})
    (tmp_path / "a" / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match="not valid JSON|must hold a JSON object"):
        digests.adapter_digest(tmp_path / "a")


def test_a_message_names_eight_keys_at_most():
    assert listed("abcdefgh") == "a, b, c, d, e, f, g, h"
    assert listed("abcdefghi") == "a, b, c, d, e, f, g, h and 1 more"
    assert listed("abcdefghij") == "a, b, c, d, e, f, g, h and 2 more"


def test_a_dtype_that_this_package_does_not_know_is_named(tmp_path):
    content = file_of({"a": entry("F8_E8M0", (2, 4), (0, 8))}, bytes(8))
    (tmp_path / "a.safetensors").write_bytes(content)
    header = headers.read_header(tmp_path / "a.safetensors")
    assert header.tensors == {"a": ((2, 4), "F8_E8M0", 0)}
    with pytest.raises(CheckpointError, match="`a` has the unknown dtype 'F8_E8M0'"):
        read(content)
