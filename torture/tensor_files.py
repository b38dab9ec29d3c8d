# SPDX-License-Identifier: Apache-2.0
"""Damage safetensors files: their header as text, or their tensors so that the file stays valid."""

from __future__ import annotations

import json
import math
import random
import struct
from typing import Any

from .values import RAW, VALUES

BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2,
    "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "C64": 8, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
_DTYPES = (*BYTES, "F4", "F6_E2M3", "x", "", "f32")
_SIZES = (0, 1, 2, 3, 8, 100, -1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 1.0)
# Ends of keys, of all methods and of what is trained beside them.
_ENDS = (
    "lora_A.weight", "lora_B.weight", "lora_A.default.weight", "lora_embedding_A", "lora_B.bias",
    "lora_magnitude_vector", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_t1", "lokr_w1", "lokr_w2",
    "lokr_w1_a", "lokr_w2_b", "lokr_t2", "alpha", "scalar", "dora_scale", "poly_lora_A", "diff",
    "poly_lora_B", "poly_router.weight", "vblora_logits_A", "vblora_logits_A_topk_indices",
    "vblora_logits_B_topk_weights", "vblora_vector_bank", "weight", "bias", "base_layer.weight",
    "modules_to_save.weight", "token_adapter.trainable_tokens_delta", "routed_experts.down",
    "routed_experts.up", "routed_experts.ranks", "routed_experts.numbers", "lora_down.weight", "",
)  # fmt: skip
_STEMS = (
    "base_model.model.0", "base_model.model.2", "base_model.model.1", "base_model.model.", "0", "",
    "base_model.model.0.base_layer", "base_model.model.model.0", "lora_unet_0", "lycoris_0",
    "lora_te1_0", "diffusion_model.0", "transformer.2", "base_model", "..", "a" * 2000, "\x00",
    "0.0", "a." * 3000 + "b", "a..b",
)  # fmt: skip
_METADATA = (
    *("adapter_config_sha256", "sha256", "replaces", "format", "kinds", "peft_adapter_pack"),
    *("lora_adapter_metadata", "ss_network_module", "software", "ot_revision", ""),
)
_TEXTS = (
    *("", "pt", "tf", "1", "2", "a" * 64, "0" * 64 + " " + "f" * 64, "../../../etc/passwd", "[]"),
    *("null", "{}", '{"r": 2}', '{"transformer.r": 2, "transformer.lora_alpha": []}', "[" * 5000),
    *('[{"config": "{}", "header": "{}", "members": []}]', "\x00", "9" * 5000),
)


def parsed(content: bytes) -> tuple[dict[str, Any], bytes] | None:
    """Return the header and the data of a file, None if it has no header."""
    try:
        (size,) = struct.unpack("<Q", content[:8])
        tree = json.loads(content[8 : 8 + size])
    except (ValueError, struct.error, RecursionError, OverflowError):
        return None
    return (tree, content[8 + size :]) if isinstance(tree, dict) else None


def joined(tree: object, data: bytes) -> bytes:
    """Return a file of a header and data."""
    text = json.dumps(tree).encode(errors="surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def header(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Change one entry of a header, or its length, or put odd text into it."""
    split = parsed(content)
    if split is None or not split[0]:
        return content, "unchanged"
    tree, data = split
    key = chance.choice(sorted(tree))
    entry, kind = tree[key], chance.randrange(10)
    if kind == 0:
        del tree[key]
        said = f"without {key}"
    elif kind == 1:
        fresh = _key(key, chance)
        tree[fresh] = tree.pop(key)
        said = f"{key} is called {fresh[:40]!r}"
    elif kind == 2:
        tree[key] = chance.choice(VALUES)
        said = f"{key} is {str(tree[key])[:40]}"
    elif kind == 3:
        metadata = tree.setdefault("__metadata__", {})
        if not isinstance(metadata, dict):
            metadata = tree["__metadata__"] = {}
        name = chance.choice(_METADATA)
        metadata[name] = chance.choice((*_TEXTS, None, 1, []))
        said = f"metadata {name} is {str(metadata[name])[:40]}"
    elif kind == 4:
        wrong = chance.choice(
            (0, 1, 7, len(content), 2**31, 2**63 - 1, 2**63, 2**64 - 1, 10**8, 10**8 + 1)
        )
        text = json.dumps(tree).encode()
        length = wrong if chance.randrange(2) else len(text) + chance.choice((-1, 1, 8))
        return struct.pack("<Q", max(0, length)) + text + data, f"a header of {length} bytes"
    elif kind == 5:
        return _odd_text(tree, key, data, chance)
    elif isinstance(entry, dict) and entry:
        field = chance.choice(sorted(entry))
        entry[field] = _entry(field, entry[field], chance)
        said = f"{field} of {key} is {str(entry[field])[:60]}"
    else:
        said = "unchanged"
    return joined(tree, data), said


def _entry(field: str, old: Any, chance: random.Random) -> object:
    """Return another dtype, shape or place of a tensor."""
    if chance.randrange(4) == 0:
        return chance.choice(VALUES)
    if field == "dtype":
        return chance.choice(_DTYPES)
    if not isinstance(old, list) or not all(isinstance(size, int) for size in old):
        return [0, 0]
    if field == "data_offsets":
        begin, end = (*old, 0, 0)[:2]
        return chance.choice(
            [
                *([0, 0], [end, begin], [begin, begin], [end, end], [begin + 4, end + 4], [begin]),
                *([begin - 4, end], [0, 2**63], [2**63, 2**63], [-4, end], [begin, end, end]),
            ]
        )
    size = chance.choice(_SIZES)
    return chance.choice(
        [
            *([math.prod(old)], old[::-1], [1, *old], [*old, 1], [], old * 3, [1] * 70 + old),
            *([size, *old], [*old[:-1], size], [size, size], [0, size], [2**32, 2**32, *old]),
        ]
    )


def _odd_text(
    tree: dict[str, Any], key: str, data: bytes, chance: random.Random
) -> tuple[bytes, str]:
    """Put text into a header that no writer of JSON writes: a key twice, values of other kinds."""
    raw = chance.choice(RAW)
    text = json.dumps(tree).encode(errors="surrogatepass")
    kind = chance.randrange(3)
    if kind == 0:
        twice = json.dumps({key: tree[key]}).encode(errors="surrogatepass")[1:-1]
        text = b"{" + twice + b", " + text[1:]
        said = f"{key} twice"
    elif kind == 1:
        text = b"{" + json.dumps(key).encode() + b": " + raw + b", " + text[1:]
        said = f"{key} twice, once {raw[:20]!r}"
    else:
        text += raw
        said = f"{raw[:20]!r} after the header"
    return struct.pack("<Q", len(text)) + text + data, said


def _key(key: str, chance: random.Random) -> str:
    """Return another key: another module, another end, or one that is none."""
    stem, _, end = key.rpartition(".")
    return chance.choice(
        [
            f"{chance.choice(_STEMS)}.{end}",
            f"{stem}.{chance.choice(_ENDS)}",
            f"{chance.choice(_STEMS)}.{chance.choice(_ENDS)}",
            chance.choice(("", ".", "weight", "a" * 1000, "../w", "é", "CON", "a\0b", key + ".x")),
            key[1:],
            key[:-1],
        ]
    )


def tensors(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Change tensors, and write a file that is valid again."""
    split = parsed(content)
    try:
        assert split is not None
        tree, data = split
        metadata = tree.pop("__metadata__", None)
        found = {key: _tensor(entry, data) for key, entry in tree.items()}
    except (AssertionError, KeyError, TypeError, ValueError, AttributeError):
        return content, "unchanged"
    said = _change_tensors(found, chance)
    at, entries, parts = 0, {}, []
    for key, (dtype, shape, values) in found.items():
        entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(values)]}
        at += len(values)
        parts.append(values)
    start = {} if metadata is None else {"__metadata__": metadata}
    return joined({**start, **entries}, b"".join(parts)), said


Tensor = tuple[str, list[int], bytes]


def _tensor(entry: dict[str, Any], data: bytes) -> Tensor:
    begin, end = entry["data_offsets"]
    dtype, shape = entry["dtype"], [*entry["shape"]]
    if dtype not in BYTES or not all(type(size) is int and 0 <= size < 2**32 for size in shape):
        raise ValueError
    return dtype, shape, data[begin:end]


def _change_tensors(found: dict[str, Tensor], chance: random.Random) -> str:
    """Change one tensor, or add tensors; return words that say how."""
    if not found or chance.randrange(16) == 0:
        number = chance.choice((1, 10, 300))
        shape = chance.choice(([0], [0, 2**40], [2**62, 0], [0] * 60))
        found |= {_key("0.weight", chance) + str(i): ("F32", shape, b"") for i in range(number)}
        return f"{number} empty tensors of shape {shape[:4]}"
    key = chance.choice(sorted(found))
    dtype, shape, values = found[key]
    kind = chance.randrange(8)
    if kind == 0:
        del found[key]
        return f"without {key}"
    if kind == 1:
        fresh = _key(key, chance)
        found[fresh] = found.pop(key)
        return f"{key} is called {fresh[:40]!r}"
    if kind == 2:
        fresh = _key(key, chance)
        found[fresh] = found[key]
        return f"{key} also as {fresh[:40]!r}"
    if kind == 3:
        dtype = chance.choice([*BYTES])
        found[key] = dtype, shape, _filled(dtype, shape, values)
        return f"{key} is {dtype}"
    if kind == 4:
        pattern = chance.choice(
            (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff", b"\xff" * 4, bytes(4))
        )
        found[key] = dtype, shape, (pattern * (1 + len(values) // 4))[: len(values)]
        return f"{key} holds {pattern.hex()}"
    if kind == 5:
        shape = chance.choice((shape[::-1], [math.prod(shape)], [1, *shape], [*shape, 1]))
        found[key] = dtype, shape, values
        return f"{key} has the shape {shape}"
    # Another size on one axis, or on the same axis of all tensors that have it.
    axis = chance.randrange(len(shape)) if shape else 0
    old = shape[axis] if shape else 1
    new = chance.choice((0, 1, 2, 3, old + 1, old * 2, max(0, old - 1), 64, 1024))
    for name in list(found) if kind == 7 else [key]:
        dtype, shape, values = found[name]
        if axis < len(shape) and shape[axis] == old:
            shape = [*shape[:axis], new, *shape[axis + 1 :]]
            found[name] = dtype, shape, _filled(dtype, shape, values)
    return f"{'all' if kind == 7 else key}: axis {axis} has {new}, not {old}"


def _filled(dtype: str, shape: list[int], values: bytes) -> bytes:
    """Repeat values to the bytes of a tensor, of a large one to a part of them."""
    size = min(math.prod(shape) * BYTES[dtype], 2**20)
    return (values * (1 + size // max(1, len(values))))[:size]
