# SPDX-License-Identifier: Apache-2.0
"""Storage formats and shared banks: sizes, refusals, and which bank an adapter finds."""

import copy
import re

import pytest
import torch
from helpers.models import mlp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from peft import PeftModel, VBLoRAConfig, VectorBank, get_peft_model
from peft.tuners.vblora.packed import PackedTensors
from peft.tuners.vblora.shared_bank import find_bank
from peft.tuners.vblora.storage import StorageFormat, VBLoRAFormat, format_of
from peft.utils.error import CheckpointError, CheckpointNotFoundError, PeftTypeError, PeftValueError

WEIGHTS, INDICES = "adapter_model.safetensors", "base_model.model.0.vblora_logits_A_topk_indices"
A, B, BANK = "vblora_logits_A", "vblora_logits_B", "vblora_vector_bank"


def config(**fields):
    sizes = {"num_vectors": 10, "vector_length": 4} if "bank" not in fields else {}
    return VBLoRAConfig(
        **{"r": 3, "target_modules": ["0", "2"], "init_logits_std": 1.0, **sizes, **fields}
    )


def base():
    torch.manual_seed(1)
    return mlp()


@pytest.mark.parametrize("end", ["", "_topk_indices", "_topk_weights"])
def test_a_modules_size_is_known_from_each_form(end):
    shapes = {A + end: (2, 4, 10), B + end: (6, 2, 10), BANK: (10, 8)}
    assert VBLoRAFormat().module_shape(shapes)[:3] == (6 * 8, 4 * 8, 2)
    for name in shapes:
        assert VBLoRAFormat().module_shape({k: v for k, v in shapes.items() if k != name}) is None


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([A], StorageFormat.LOGITS),
        ([A, A + "_topk_indices"], StorageFormat.TOPK_LOGITS),
        ([A + "_topk_indices", A + "_topk_weights"], StorageFormat.TOPK_WEIGHTS),
    ],
)
def test_a_models_form_is_known_from_its_names(names, expected):
    assert format_of([BANK, *(f"model.0.{name}" for name in names)]) is expected


@pytest.mark.parametrize("at", [0, -1])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (9, None),
        (10, "points beyond the bank's 10 vectors"),
        (0, None),
        (-1, "points beyond the bank's 10 vectors"),
        (None, "must hold integers"),
        ("no weights", "has no .*_topk_weights"),
        ("other weights", "has no .*_topk_weights"),
    ],
)
def test_indices_are_those_of_vectors(tmp_path, at, value, message):
    get_peft_model(base(), config(save_only_topk_weights=True)).save_pretrained(tmp_path)
    state, name = load_file(tmp_path / WEIGHTS), INDICES.replace("indices", "weights")
    if value is None:
        state[INDICES] = state[INDICES].float()
    elif value == "no weights":
        del state[name]
    elif value == "other weights":
        state[name] = state[name][:2].contiguous()
    else:
        state[INDICES] = state[INDICES].long()
        state[INDICES].view(-1)[at] = value
    save_file(state, tmp_path / WEIGHTS)
    if message is None:
        PeftModel.from_pretrained(base(), tmp_path)
        return
    model = base()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=f"`{INDICES}` {message}.*nothing was loaded"):
        PeftModel.from_pretrained(model, tmp_path)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_full_file_is_loaded_into_trainable_compact_weights(tmp_path):
    torch.manual_seed(3)
    full = get_peft_model(base(), config(topk=2)).eval()
    full.save_pretrained(tmp_path / "full")
    get_peft_model(base(), config(topk=2, save_only_topk_weights=True)).save_pretrained(
        tmp_path / "compact"
    )
    asked = VBLoRAConfig.from_pretrained(tmp_path / "compact", train_topk_weights=True)
    model = PeftModel.from_pretrained(base(), tmp_path / "compact", is_trainable=True, config=asked)
    assert f"{A}_topk_indices" in dict(model.base_model.model[0].named_children())
    model.load_adapter(tmp_path / "full", "default")
    x = torch.randn(4, 8)
    torch.testing.assert_close(model.eval()(x), full(x), rtol=1e-5, atol=1e-5)


def test_a_file_with_a_bank_is_not_for_a_shared_one(tmp_path):
    VectorBank(torch.randn(10, 4)).save_pretrained(tmp_path / "bank")
    get_peft_model(base(), config()).save_pretrained(tmp_path / "own")
    with pytest.raises(CheckpointError, match="has a bank, but the config names a shared one"):
        PeftModel.from_pretrained(
            base(), tmp_path / "own", config=config(bank=str(tmp_path / "bank"))
        )


# --- banks -------------------------------------------------------------------------------------


def test_a_banks_file_has_its_digest_and_what_it_replaces(tmp_path):
    old, older = VectorBank(torch.ones(2, 3)), VectorBank(torch.zeros(2, 3))
    bank = VectorBank(torch.randn(4, 3), [old.sha256(), older.sha256()])
    bank.save_pretrained(tmp_path / "a")
    with safe_open(tmp_path / "a" / "vector_bank.safetensors", "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "sha256": bank.sha256(),
            "replaces": f"{old.sha256()} {older.sha256()}",
        }
        assert file.keys() == ["vector_bank"]
    again = VectorBank.from_pretrained(tmp_path / "a")
    assert again.replaces == bank.replaces and torch.equal(again.vectors, bank.vectors)
    assert again.serves(old.sha256(), 2) is True and again.serves("x", 2) is False
    assert again.serves(old.sha256(), 5) is False
    assert again.serves(bank.sha256(2), 2) is True and again.serves(bank.sha256(), 4) is True
    old.save_pretrained(tmp_path / "b")
    with safe_open(tmp_path / "b" / "vector_bank.safetensors", "pt") as file:
        assert set(file.metadata()) == {"format", "sha256"}
    save_file({"vector_bank": old.vectors}, tmp_path / "b" / "vector_bank.safetensors")
    assert VectorBank.from_pretrained(tmp_path / "b").replaces == ()  # another writer's
    for replaces in (["x"], [1], "ab", [old.sha256() + "0"]):
        with pytest.raises(PeftTypeError, match="must be a list of digests"):
            VectorBank(old.vectors, replaces)
    with pytest.warns(UserWarning, match="from_pretrained got unexpected keyword arguments: foo"):
        VectorBank.from_pretrained(tmp_path / "a", foo=1)


def test_a_bank_grows_by_small_vectors():
    bank = VectorBank(torch.ones(2, 3, dtype=torch.float64))
    grown = bank.grow(500)
    assert grown.vectors.dtype == torch.float64 and grown.num_vectors == 502
    assert 0.019 < grown.vectors[2:].abs().max() <= 0.02 and grown.vectors[2:].min() < -0.019
    assert torch.equal(grown.vectors[:2], bank.vectors)
    one, two = (bank.grow(3, 0.5, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(one.vectors, two.vectors) and one.vectors[2:].abs().max() > 0.1


@pytest.mark.parametrize(
    "dtype", [torch.float8_e5m2, torch.float8_e4m3fn, torch.float16, torch.float64]
)
def test_banks_of_all_dtypes_are_checked(dtype):
    assert VectorBank(torch.ones(3, 2).to(dtype)).num_vectors == 3
    with pytest.raises(PeftValueError, match=r"NaN or infinite \(rows 1\)"):
        VectorBank(torch.tensor([[1.0, 1.0], [1.0, torch.nan]]).to(dtype))
    nine = torch.full((9, 1), torch.nan).to(dtype)
    with pytest.raises(PeftValueError, match=r"rows 0, 1, 2, 3, 4, 5, 6, 7 and 1 more\)"):
        VectorBank(nine)
    with pytest.raises(PeftValueError, match=r"rows 0, 1, 2, 3, 4, 5, 6, 7\)"):
        VectorBank(nine[:8])


def test_an_adapter_finds_its_bank_among_the_models_or_at_its_place(tmp_path):
    bank = VectorBank(torch.randn(4, 3))
    bank.save_pretrained(tmp_path / "bank")
    asked = VBLoRAConfig(num_vectors=4, vector_length=3, bank=str(tmp_path / "bank"))
    asked.bank_sha256 = key = bank.sha256()
    grown, wide = bank.grow(2), VectorBank(torch.randn(8, 6))
    found = find_bank(asked, {})
    assert found.key == key and not found.is_resident and torch.equal(found.vectors, bank.vectors)
    own = bank.vectors.clone()
    found = find_bank(asked, {wide.sha256(): wide.vectors, key: own})
    assert found.vectors is own and found.is_resident is True
    found = find_bank(asked, {wide.sha256(): wide.vectors, grown.sha256(): grown.vectors})
    assert found == (grown.sha256(), grown.vectors, True)
    other = VectorBank(torch.randn(6, 3))
    assert find_bank(asked, {other.sha256(): other.vectors}).key == key
    asked.bank_sha256 = None  # of a new adapter: the bank at the place
    assert find_bank(asked, {key: own}) == (key, own, True)
    nowhere = VBLoRAConfig(num_vectors=4, vector_length=3)
    nowhere.bank_sha256 = key
    assert find_bank(nowhere, {key: own}).is_resident
    with pytest.raises(CheckpointNotFoundError, match=f"needs the shared vector bank {key}"):
        find_bank(nowhere, {other.sha256(): other.vectors})
    other.save_pretrained(tmp_path / "bank")
    asked.bank_sha256 = key
    with pytest.raises(
        CheckpointError,
        match=re.escape(f"(6 vectors of 3, {other.sha256()}) is neither the one")
        + f".*4 vectors of 3, {key}",
    ):
        find_bank(asked, {})


# --- tensors side by side ----------------------------------------------------------------------


def test_packed_tensors_are_told_apart_by_shape_and_dtype_and_rows_used_again():
    packed = PackedTensors()
    for number, name in enumerate("abcd"):
        packed[name] = torch.full((2,), float(number))
    packed["e"] = torch.zeros(2, dtype=torch.int8)
    packed["f"] = torch.zeros(2, 1)
    assert len(list(packed.buffers())) == 3
    row = packed.location("b").row
    del packed["b"]
    packed["g"] = torch.full((2,), 9.0)
    assert packed.location("g").row == row and packed("g").tolist() == [9, 9]
    assert [packed(n)[0].item() for n in "acd"] == [0, 2, 3]
    packed["a"] = torch.zeros(3)  # another shape takes another place
    assert packed("a").shape == (3,) and "a" in packed and "b" not in packed
    assert (
        packed.extra_repr()
        == "c: float32[2], d: float32[2], e: int8[2], f: float32[2, 1], g: float32[2], a: float32[3]"
    )
    state = nn.ModuleDict({"p": packed}).state_dict(keep_vars=True)
    assert set(state) == {f"p.{name}" for name in "acdefg"}
    for name in "hijk":
        packed[name] = torch.zeros(1)
    assert packed.extra_repr().endswith(", h: float32[1], i: float32[1], … 2 more")


def test_a_repository_without_the_bank_leaves_the_working_directory(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    asked = []

    def download(repository, name, **options):
        asked.append((repository, options.get("subfolder"), name))
        raise EntryNotFoundError("nothing")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    bank = VectorBank(torch.randn(4, 3))
    bank.save_pretrained("bank")
    asked_for = VBLoRAConfig(num_vectors=4, vector_length=3, bank="bank")
    asked_for.bank_sha256, asked_for.source = bank.sha256(), ("me/adapter", {"subfolder": "a"})
    assert find_bank(asked_for, {}).key == bank.sha256()
    assert asked == [("me/adapter", "a/bank", "vector_bank.safetensors")]
    asked_for.bank = "../../bank"  # out of the repository: it is not asked
    (tmp_path / "x" / "y").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "x" / "y")
    assert find_bank(asked_for, {}).key == bank.sha256() and len(asked) == 1


def test_a_bank_is_a_copy():
    given = torch.ones(2, 3)
    bank = VectorBank(given)
    given.zero_()
    assert bank.vectors.eq(1).all() and not bank.vectors.requires_grad
