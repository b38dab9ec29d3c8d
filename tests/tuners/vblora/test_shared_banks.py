# SPDX-License-Identifier: Apache-2.0
"""One bank for many adapters: known by its content, in a file of its own, served per sample."""

import copy
import hashlib
import pickle
import shutil
import struct

import pytest
import torch
from helpers.models import llama, mlp
from safetensors.torch import load_file, save_file

from peft import (
    LoKrConfig,
    PeftConfig,
    PeftModel,
    VBLoRAConfig,
    VectorBank,
    bank_usage,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.optimizers import parameter_groups
from peft.utils.hotswap import hotswap_adapter

TARGETS = ["0", "2"]


def config(**fields):
    return VBLoRAConfig(**{"r": 3, "target_modules": TARGETS, "init_logits_std": 1.0, **fields})


def base():
    torch.manual_seed(1)
    return mlp()


@pytest.fixture
def bank(tmp_path):
    bank = VectorBank(torch.randn(10, 4))
    bank.save_pretrained(tmp_path / "bank")
    return bank


def new_user(folder, bank_folder, seed=0, **fields):
    """Train an adapter's logits for a step over a bank, save it, and give an input with its output."""
    torch.manual_seed(100 + seed)
    model = get_peft_model(
        base(), config(bank=str(bank_folder), save_only_topk_weights=True, **fields)
    )
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(torch.randn(4, 8)).square().sum().backward()
    optimiser.step()
    x = torch.randn(2, 8)
    with torch.no_grad():
        y = model.eval()(x)
    model.save_pretrained(folder)
    return x, y


def bank_parameters(model):
    return [name for name, _ in model.named_parameters() if "bank" in name]


# --- the bank by itself
# -----------------------------------------------------------------------------------------------------
#
#


def test_a_bank_comes_back_from_its_file(tmp_path, bank):
    again = VectorBank.from_pretrained(tmp_path / "bank")
    assert torch.equal(again.vectors, bank.vectors)
    assert again.sha256() == bank.sha256()
    half = VectorBank(bank.vectors.half())
    half.save_pretrained(tmp_path / "half")
    assert VectorBank.from_pretrained(tmp_path / "half").vectors.dtype == torch.float16
    assert half.sha256() != bank.sha256()
    half.vectors.mul_(2)  # its digest is that of what it holds now
    half.save_pretrained(tmp_path / "half")
    assert (
        VectorBank.from_pretrained(tmp_path / "half").sha256()
        == VectorBank(half.vectors).sha256()
        != bank.sha256()
    )


def test_the_digest_is_that_of_length_and_values():
    vectors = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    by_hand = hashlib.sha256(b"2:" + struct.pack("<4f", 1.0, -2.0, 0.5, 3.0)).hexdigest()
    assert VectorBank(vectors).sha256() == VectorBank(vectors.bfloat16()).sha256() == by_hand


def test_damaged_and_foreign_files(tmp_path, bank):
    path = tmp_path / "bank" / "vector_bank.safetensors"
    state = load_file(path)
    save_file({"vector_bank": state["vector_bank"] + 1}, path, metadata={"sha256": bank.sha256()})
    with pytest.raises(RuntimeError, match="are not those it was written with"):
        VectorBank.from_pretrained(tmp_path / "bank")
    save_file({"other": state["vector_bank"]}, path)
    with pytest.raises(RuntimeError, match="does not hold a vector bank; it has other"):
        VectorBank.from_pretrained(tmp_path / "bank")
    with pytest.raises(FileNotFoundError, match="vector_bank.safetensors"):
        VectorBank.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="num_vectors, vector_length"):
        VectorBank(torch.zeros(3))
    with pytest.raises(ValueError, match="`n`=0 must be"):
        bank.grow(0)


def test_a_bank_is_taken_out_of_an_adapter_and_put_into_one():
    model = get_peft_model(base(), config(num_vectors=10, vector_length=4))
    bank = VectorBank.of(model)
    assert torch.equal(bank.vectors, model.vblora_vector_bank["default"])
    other = get_peft_model(base(), config(num_vectors=10, vector_length=4))
    bank.put_into(other)
    assert torch.equal(other.vblora_vector_bank["default"], bank.vectors)
    with pytest.raises(
        ValueError,
        match=r"size \[12, 4\], that of adapter default \[10, 4\]; make the adapter with `num_vectors=12` and `vector_length=4`",
    ):
        bank.grow(2).put_into(other)
    for use in (lambda: VectorBank.of(model, "b"), lambda: bank.put_into(model, "b")):
        with pytest.raises(
            ValueError, match="no adapter 'b' with a vector bank; there are default"
        ):
            use()


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (torch.randn(0, 4), r"`vectors` of shape \[0, 4\] hold no vectors"),
        (torch.randn(4, 0), r"`vectors` of shape \[4, 0\] hold no vectors"),
        (
            torch.zeros(4, 2).index_fill(0, torch.tensor([1, 3]), torch.nan),
            r"NaN or infinite \(rows 1, 3\).* an earlier step",
        ),
        (
            torch.full((12, 2), -torch.inf, dtype=torch.float16),
            "rows 0, 1, 2, 3, 4, 5, 6, 7 and 4 more",
        ),
        (torch.randn(4, 2, device="meta"), "on the meta device"),
        (torch.ones(4, 2, dtype=torch.int64), r"not torch.int64 \[4, 2\]"),
        ([[1.0]], "not list"),
    ],
)
def test_a_bank_has_values(vectors, message, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        VectorBank(vectors)
    if isinstance(vectors, torch.Tensor) and not vectors.is_meta:
        save_file({"vector_bank": vectors}, tmp_path / "vector_bank.safetensors")
        with pytest.raises(RuntimeError, match=f"vector_bank.safetensors': .*{message}"):
            VectorBank.from_pretrained(tmp_path)


def test_what_else_a_bank_refuses(bank, tmp_path):
    with pytest.raises(TypeError, match="`replaces`='ab' must be a list of digests"):
        VectorBank(bank.vectors, replaces="ab")
    with pytest.raises(ValueError, match="`bound`=nan must be a positive finite number"):
        bank.grow(1, bound=float("nan"))
    half = get_peft_model(
        base().half(), config(num_vectors=10, vector_length=4), autocast_adapter_dtype=False
    )
    before = half.vblora_vector_bank["default"].clone()
    with pytest.raises(
        ValueError, match=r"values up to 7e\+04, which torch.float16, the dtype of adapter default"
    ):
        VectorBank(torch.full((10, 4), 7e4)).put_into(half)
    assert torch.equal(half.vblora_vector_bank["default"], before)
    VectorBank(torch.full((10, 4), 7e4)).save_pretrained(tmp_path / "large")
    with pytest.warns(
        UserWarning, match=r"The shared bank has values that are infinite in the dtype .*\(7e\+04\)"
    ):
        get_peft_model(
            base().half(), config(bank=str(tmp_path / "large")), autocast_adapter_dtype=False
        )
    half.vblora_vector_bank["default"].data[2] = torch.nan
    with pytest.raises(ValueError, match="rows 2"):
        VectorBank.of(half)


def test_the_only_adapter_is_meant(tmp_path, bank):
    sizes = {"num_vectors": 10, "vector_length": 4}
    model = get_peft_model(base(), config(**sizes), "a")
    model.add_adapter("b", config(**sizes))
    uses = (
        VectorBank.of,
        bank.put_into,
        bank_usage,
        lambda model: model.get_nb_savable_parameters(),
    )
    for active in ("a", "b"):
        model.set_adapter(active)
        assert torch.equal(VectorBank.of(model).vectors, model.vblora_vector_bank[active])
        assert torch.equal(bank_usage(model).counts(), bank_usage(model, active).counts())
        assert model.get_nb_savable_parameters() == model.get_nb_savable_parameters(active)
    bank.put_into(model)
    assert torch.equal(model.vblora_vector_bank["b"], bank.vectors)
    assert not torch.equal(model.vblora_vector_bank["a"], bank.vectors)
    model.base_model.set_adapter(["a", "b"])
    for use in uses:
        with pytest.raises(
            ValueError,
            match="no adapter 'default'.*, and several could be meant; pass `adapter_name`.* a, b",
        ):
            use(model)
    model.add_adapter("default", config(**sizes))
    assert torch.equal(VectorBank.of(model).vectors, model.vblora_vector_bank["default"])
    bank.save_pretrained(tmp_path)
    shared = get_peft_model(base(), config(bank=str(tmp_path)), "only")
    with pytest.raises(
        ValueError,
        match="Adapter only runs over a shared bank, which is frozen; .*`num_vectors=10` and",
    ):
        bank.put_into(shared)


# --- adapters over it
# -------------------------------------------------------------------------------------------------------
#
#


def test_only_logits_are_trained_over_a_frozen_bank(tmp_path, bank):
    model = get_peft_model(base(), config(bank=str(tmp_path / "bank")))
    fields = model.peft_config["default"]
    assert (fields.num_vectors, fields.vector_length, fields.bank_sha256) == (10, 4, bank.sha256())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 4 and all("vblora_logits" in name for name in trained)
    assert bank_parameters(model) == [f"base_model.vblora_shared_banks.{bank.sha256()}"]
    before = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.AdamW(parameter_groups(model))
    assert [group["name"] for group in optimiser.param_groups] == ["logits"]
    model(torch.randn(4, 8)).square().sum().backward()
    optimiser.step()
    changed = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == set(trained)
    for call in (
        lambda: model.set_adapter("default"),
        lambda: model.set_requires_grad("default", True),
        model.enable_adapter_layers,
    ):
        call()
        assert not model.get_parameter(bank_parameters(model)[0]).requires_grad


def test_the_delta_is_that_of_an_adapter_with_the_same_bank_of_its_own(tmp_path, bank):
    shared = get_peft_model(base(), config(bank=str(tmp_path / "bank")))
    own = get_peft_model(base(), config(num_vectors=10, vector_length=4))
    bank.put_into(own)
    own.load_state_dict(
        {k: v for k, v in shared.state_dict().items() if "bank" not in k}, strict=False
    )
    x = torch.randn(3, 8)
    assert torch.equal(shared(x), own(x))
    assert torch.equal(shared.merge_and_unload()(x), own.merge_and_unload()(x))


@pytest.mark.parametrize("compact", [True, False])
def test_a_user_is_loaded_over_the_bank(tmp_path, bank, compact):
    model = get_peft_model(
        base(), config(bank=str(tmp_path / "bank"), save_only_topk_weights=compact)
    ).eval()
    x = torch.randn(3, 8)
    expected = model(x)
    model.save_pretrained(tmp_path / "user")
    state = load_file(tmp_path / "user" / "adapter_model.safetensors")
    assert state["base_model.vblora_vector_bank"].shape == (0, 4)
    loaded = PeftModel.from_pretrained(base(), tmp_path / "user")
    torch.testing.assert_close(loaded(x), expected, rtol=1e-5, atol=1e-5)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    rewritten = load_file(again / "adapter_model.safetensors")
    assert rewritten.keys() == state.keys()
    assert all(torch.equal(rewritten[key], tensor) for key, tensor in state.items())
    assert (
        PeftConfig.from_pretrained(again).to_dict()
        == PeftConfig.from_pretrained(tmp_path / "user").to_dict()
    )


def test_many_users_share_one_bank(tmp_path, bank):
    users = [new_user(tmp_path / f"user{i}", tmp_path / "bank", i) for i in range(4)]
    model = PeftModel.from_pretrained(base(), tmp_path / "user0", "user0")
    for i in range(1, 4):
        model.load_adapter(tmp_path / f"user{i}", f"user{i}")
    assert len(bank_parameters(model)) == 1
    for i, (x, y) in enumerate(users):
        model.set_adapter(f"user{i}")
        torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    for i in (0, 2, 1):
        model.delete_adapter(f"user{i}")
        assert len(bank_parameters(model)) == 1
    model.set_adapter("user3")
    torch.testing.assert_close(model(users[3][0]), users[3][1], rtol=1e-5, atol=1e-5)
    model.delete_adapter("user3")
    assert bank_parameters(model) == []


def test_users_are_served_in_one_batch(tmp_path, bank):
    users = [new_user(tmp_path / f"user{i}", tmp_path / "bank", i) for i in range(3)]
    model = PeftModel.from_pretrained(base(), tmp_path / "user0", "user0")
    for i in (1, 2):
        model.load_adapter(tmp_path / f"user{i}", f"user{i}")
    model.load_adapter(tmp_path / "user2", "scaled")
    for layer in model.base_model.tuner_layers():
        layer.set_scale("scaled", 2.0)
    torch.manual_seed(7)
    model.add_adapter("own", config(num_vectors=10, vector_length=4))
    model.eval()
    x = torch.randn(9, 8)
    for names in (
        ["user0", "user1", "user2"] * 3,
        ["user2", "__base__", "user0", "own", "user1", "user1", "scaled", "user0", "own"],
        ["user1"] * 9,
        ["__base__"] * 8 + ["user2"],
    ):
        found = model(x, adapter_names=names)
        for row, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    expected = model(x[row : row + 1])
            else:
                model.set_adapter(name)
                expected = model(x[row : row + 1])
            torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-5, atol=1e-5)
    assert len(users) == 3


def test_a_batch_of_users_generates_with_beams(tmp_path):
    VectorBank(torch.randn(10, 4)).save_pretrained(tmp_path / "bank")
    fields = {
        "target_modules": ["q_proj", "up_proj"],
        "task_type": "CAUSAL_LM",
        "save_only_topk_weights": True,
    }
    torch.manual_seed(3)
    plain = llama()
    for i in range(2):
        model = get_peft_model(copy.deepcopy(plain), config(bank=str(tmp_path / "bank"), **fields))
        model.save_pretrained(tmp_path / f"user{i}")
    model = PeftModel.from_pretrained(plain, tmp_path / "user0", "user0")
    model.load_adapter(tmp_path / "user1", "user1")
    ids = torch.randint(3, 48, (3, 5))
    options = {"num_beams": 2, "max_new_tokens": 3, "do_sample": False}
    found = model.generate(input_ids=ids, adapter_names=["user1", "user0", "user1"], **options)
    for row, name in enumerate(["user1", "user0", "user1"]):
        model.set_adapter(name)
        assert torch.equal(
            model.generate(input_ids=ids[row : row + 1], **options), found[row : row + 1]
        )


def test_the_batch_is_composed_at_once(tmp_path, bank, monkeypatch):
    """However many users a batch has, a layer composes twice: all of `A`, all of `B`."""
    from peft.tuners.vblora import layer as module

    for i in range(3):
        new_user(tmp_path / f"user{i}", tmp_path / "bank", i)
    model = PeftModel.from_pretrained(base(), tmp_path / "user0", "user0")
    for i in (1, 2):
        model.load_adapter(tmp_path / f"user{i}", f"user{i}")
    calls, real = [], module.compose_tiles
    monkeypatch.setattr(
        module, "compose_tiles", lambda *args: calls.append(args[0].shape) or real(*args)
    )
    model(torch.randn(6, 8), adapter_names=["user0", "user1", "user2"] * 2)
    assert calls == [(3, 3, 2, 2), (3, 4, 3, 2), (3, 3, 4, 2), (3, 4, 3, 2)]


def test_a_bank_that_is_wrong_or_missing(tmp_path, bank):
    new_user(tmp_path / "user", tmp_path / "bank")
    model = base()
    before = copy.deepcopy(model.state_dict())
    (tmp_path / "bank").rename(tmp_path / "moved")
    with pytest.raises(
        FileNotFoundError,
        match=r"shared vector bank was not found at `bank`='.*bank'.*If it moved, pass",
    ):
        PeftModel.from_pretrained(model, tmp_path / "user")
    moved = VBLoRAConfig.from_pretrained(tmp_path / "user", bank=str(tmp_path / "moved"))
    PeftModel.from_pretrained(base(), tmp_path / "user", config=moved)
    VectorBank(torch.randn(10, 4)).save_pretrained(tmp_path / "bank")
    with pytest.raises(
        RuntimeError,
        match=f"neither the one that the adapter was trained over .*{bank.sha256()}.*nor one that grew.*bank=folder.*replaces=",
    ):
        PeftModel.from_pretrained(model, tmp_path / "user")
    nowhere = VBLoRAConfig.from_pretrained(tmp_path / "user", bank=None)
    with pytest.raises(
        FileNotFoundError,
        match=f"needs the shared vector bank {bank.sha256()}, which this model does not have",
    ):
        PeftModel.from_pretrained(model, tmp_path / "user", config=nowhere)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="`topk`=11 must not be larger than `num_vectors`=10"):
        get_peft_model(model, config(bank=str(tmp_path / "moved"), topk=11))
    own = VBLoRAConfig(
        r=3, num_vectors=10, vector_length=4, target_modules=TARGETS, save_only_topk_weights=True
    )
    with pytest.raises(RuntimeError, match="has no bank, but the config names none.*bank=folder"):
        PeftModel.from_pretrained(model, tmp_path / "user", config=own)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_bank_the_model_has_needs_no_file(tmp_path, bank):
    x, y = new_user(tmp_path / "user", tmp_path / "bank")
    model = PeftModel.from_pretrained(base(), tmp_path / "user", "first")
    (tmp_path / "bank").rename(tmp_path / "moved")
    model.load_adapter(tmp_path / "user", "second")
    model.set_adapter("second")
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)


def test_a_banks_path_starts_at_the_adapters_folder(tmp_path, bank, monkeypatch):
    """Wherever the program runs; a bank of the same name that is another one does not stand in the
    way.
    """
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    project.mkdir()
    shutil.move(tmp_path / "bank", project / "shared" / "bank")
    VectorBank(torch.randn(10, 4)).save_pretrained(elsewhere / "bank")
    elsewhere.joinpath("users").mkdir()
    monkeypatch.chdir(project)
    x, y = new_user(
        "users/ada", "shared/bank"
    )  # from the project's folder, which is above the adapter's
    monkeypatch.chdir(elsewhere)

    def loads(**fields):
        saved = VBLoRAConfig.from_pretrained(project / "users" / "ada", **fields)
        torch.testing.assert_close(
            PeftModel.from_pretrained(base(), project / "users" / "ada", config=saved)(x), y
        )

    loads()
    loads(bank="../../shared/bank")
    (project / "shared" / "bank").rename(project / "users" / "ada" / "bank")
    loads(bank="bank")  # not the one in the working directory
    loads(bank="./bank")
    model = PeftModel.from_pretrained(
        base(),
        project / "users" / "ada",
        config=VBLoRAConfig.from_pretrained(project / "users" / "ada", bank="bank"),
    )
    hotswap_adapter(model, project / "users" / "ada", "default")
    (project / "users" / "ada" / "bank").rename(elsewhere / "users" / "bank")
    monkeypatch.chdir(elsewhere / "users")
    loads(bank="bank")  # the one in the working directory, as before
    monkeypatch.chdir(elsewhere)
    with pytest.raises(RuntimeError, match="neither the one that the adapter was trained over"):
        loads(bank="bank")
    with pytest.raises(
        FileNotFoundError,
        match=r"neither from the adapter's folder nor .*no folder 'users/bnk' \(did you mean 'users/bank'\?\)",
    ):
        loads(bank="users/bnk")


def test_a_bank_in_the_adapters_repository(tmp_path, bank, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    x, y = new_user(tmp_path / "ada", tmp_path / "bank")
    monkeypatch.chdir(tmp_path / "ada")
    asked = []

    def download(repo, name, subfolder=None, **options):
        asked.append((repo, name, subfolder, options))
        path = tmp_path.joinpath(subfolder or "", name)
        if repo != "someone/users" or not path.is_file():
            raise EntryNotFoundError(name)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    saved = VBLoRAConfig.from_pretrained(
        "someone/users", subfolder="ada", token="secret", bank="../bank"
    )
    assert b"secret" not in pickle.dumps(saved)
    torch.testing.assert_close(
        PeftModel.from_pretrained(base(), "someone/users", config=saved, subfolder="ada")(x), y
    )
    assert ("someone/users", "vector_bank.safetensors", "bank", {"token": "secret"}) in asked


# --- growing and replacing
# --------------------------------------------------------------------------------------------------


def test_users_of_a_bank_run_on_one_that_grew(tmp_path, bank):
    x, y = new_user(tmp_path / "old", tmp_path / "bank")
    small = str(tmp_path / "small")
    bank.save_pretrained(small)
    grown = bank.grow(300, bound=1.0)  # from here on indices take two bytes
    grown.save_pretrained(tmp_path / "bank")
    x_new, y_new = new_user(tmp_path / "new", tmp_path / "bank", 5)
    before = PeftModel.from_pretrained(
        base(), tmp_path / "old", config=VBLoRAConfig.from_pretrained(tmp_path / "old", bank=small)
    )(x)
    model = PeftModel.from_pretrained(base(), tmp_path / "new", "new")
    model.load_adapter(tmp_path / "old", "old")
    model.set_adapter("old")
    assert torch.equal(model(x), before)
    assert bank_parameters(model) == [f"base_model.vblora_shared_banks.{grown.sha256()}"]
    for name, (inputs, expected) in {"old": (x, y), "new": (x_new, y_new)}.items():
        model.set_adapter(name)
        torch.testing.assert_close(model(inputs), expected, rtol=1e-5, atol=1e-5)
    both = model(torch.cat([x[:1], x_new[:1]]), adapter_names=["old", "new"])
    torch.testing.assert_close(both, torch.cat([y[:1], y_new[:1]]), rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "again", selected_adapters=["old"])
    kept = PeftConfig.from_pretrained(tmp_path / "again" / "old")
    assert (kept.num_vectors, kept.bank_sha256) == (10, bank.sha256())
    # The other way round a larger bank is needed than the one that is there.
    VectorBank(bank.vectors).save_pretrained(tmp_path / "bank")
    with pytest.raises(RuntimeError, match="nor one that grew from it"):
        PeftModel.from_pretrained(base(), tmp_path / "new")


def test_a_bank_may_replace_another(tmp_path, bank):
    x, y = new_user(tmp_path / "user", tmp_path / "bank")
    trained = VectorBank(bank.vectors + 0.1, replaces=[bank.sha256()])
    trained.save_pretrained(tmp_path / "bank")
    assert VectorBank.from_pretrained(tmp_path / "bank").replaces == (bank.sha256(),)
    model = PeftModel.from_pretrained(base(), tmp_path / "user")
    assert bank_parameters(model) == [f"base_model.vblora_shared_banks.{trained.sha256()}"]
    assert not torch.allclose(model(x), y)


# --- where else adapters go
# -------------------------------------------------------------------------------------------------


def test_an_injected_model_and_a_mixed_one(tmp_path, bank):
    model = llama()
    inject_adapter_in_model(config(bank=str(tmp_path / "bank"), target_modules=["q_proj"]), model)
    assert bank_parameters(model) == [f"vblora_shared_banks.{bank.sha256()}"]
    mixed = get_peft_model(base(), LoKrConfig(r=2, target_modules=TARGETS), "a", mixed=True)
    mixed.add_adapter("b", config(bank=str(tmp_path / "bank")))
    mixed.set_adapter(["a", "b"])
    mixed(torch.randn(2, 8)).sum().backward()
    assert bank_parameters(mixed) == [f"base_model.vblora_shared_banks.{bank.sha256()}"]
    assert bank_parameters(mixed.unload()) == []


def test_transformers_loads_it_into_its_own_model(tmp_path, bank):
    torch.manual_seed(3)
    plain = llama()
    fields = {
        "target_modules": ["q_proj", "up_proj"],
        "task_type": "CAUSAL_LM",
        "save_only_topk_weights": True,
    }
    model = get_peft_model(
        copy.deepcopy(plain), config(bank=str(tmp_path / "bank"), **fields)
    ).eval()
    model.save_pretrained(tmp_path / "user")
    plain.load_adapter(str(tmp_path / "user"))
    ids = torch.randint(3, 48, (2, 5))
    torch.testing.assert_close(
        plain(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5
    )


def test_copies_and_precision(tmp_path, bank):
    new_user(tmp_path / "user", tmp_path / "bank")
    model = PeftModel.from_pretrained(base(), tmp_path / "user")
    x = torch.randn(3, 8)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    torch.testing.assert_close(
        copy.deepcopy(model).double()(x.double()).float(), expected, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        copy.deepcopy(model).bfloat16()(x.bfloat16()).float(), expected, rtol=0.1, atol=0.5
    )
    state = copy.deepcopy(model.state_dict())
    other = PeftModel.from_pretrained(base(), tmp_path / "user")
    other.load_state_dict(state)
    assert torch.equal(other(x), expected)


def test_hotswapping_stays_on_the_bank(tmp_path, bank):
    users = [new_user(tmp_path / f"user{i}", tmp_path / "bank", i) for i in range(2)]
    model = PeftModel.from_pretrained(base(), tmp_path / "user0")
    hotswap_adapter(model, tmp_path / "user1", "default")
    torch.testing.assert_close(model(users[1][0]), users[1][1], rtol=1e-5, atol=1e-5)
    VectorBank(torch.randn(10, 4)).save_pretrained(tmp_path / "bank")
    new_user(tmp_path / "foreign", tmp_path / "bank")
    for load in (
        lambda: hotswap_adapter(model, tmp_path / "foreign", "default"),
        lambda: model.load_adapter(tmp_path / "foreign", "default"),
    ):
        with pytest.raises(ValueError, match=f"{bank.sha256()}.*under a new name"):
            load()
    torch.testing.assert_close(model(users[1][0]), users[1][1], rtol=1e-5, atol=1e-5)


def test_combining_and_converting(tmp_path, bank):
    for i in range(2):
        new_user(tmp_path / f"user{i}", tmp_path / "bank", i)
    model = PeftModel.from_pretrained(base(), tmp_path / "user0", "user0")
    model.load_adapter(tmp_path / "user1", "user1")
    model.add_weighted_adapter(["user0", "user1"], [0.5, -2.0], "both", "cat")
    layer = model.base_model.model[0]
    expected = 0.5 * layer.get_delta_weight("user0") - 2 * layer.get_delta_weight("user1")
    torch.testing.assert_close(layer.get_delta_weight("both"), expected, rtol=1e-5, atol=1e-5)
    assert list(model.vblora_vector_bank) == ["both"]


@pytest.mark.compile
def test_compiled(tmp_path, bank):
    for i in range(2):
        new_user(tmp_path / f"user{i}", tmp_path / "bank", i)
    model = PeftModel.from_pretrained(base(), tmp_path / "user0", "user0")
    model.load_adapter(tmp_path / "user1", "user1")
    x = torch.randn(4, 8)
    names = ["user1", "user0", "user0", "__base__"]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(compiled(x, adapter_names=names), model(x, adapter_names=names))
