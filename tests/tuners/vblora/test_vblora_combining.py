# SPDX-License-Identifier: Apache-2.0
"""VB-LoRA adapters in one, against sums of dense products in float64."""

import pytest
import torch
from helpers.vector_bank import compose
from torch import nn

from peft import PeftModel, VBLoRAConfig, get_peft_model
from peft.tuners.vblora.combining import embed_logits, join_banks


def config(**fields):
    fields = {
        "r": 2,
        "num_vectors": 10,
        "vector_length": 4,
        "topk": 2,
        "target_modules": ["0"],
        **fields,
    }
    return VBLoRAConfig(**{"init_vector_bank_bound": 1.0, "init_logits_std": 1.0, **fields})


@pytest.fixture
def model():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4)).double()
    return get_peft_model(base, config(), "a").eval()


def check_sum(model, weights, name="new", path="0", tolerance=1e-12):
    layer = model.base_model.model.get_submodule(path)
    expected = sum(
        w * layer.get_delta_weight(n).detach() for n, w in weights.items() if n in layer.scaling
    )
    found = layer.get_delta_weight(name).detach()
    assert float((found - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("topk", [1, 2, 3, 7])
@pytest.mark.parametrize("wanted", [0, 1, 5])
def test_embedded_logits_select_the_same_vectors(topk, wanted):
    torch.manual_seed(0)
    logits, bank = (
        torch.randn(3, 5, 7, dtype=torch.float64) * 20,
        torch.randn(7, 4, dtype=torch.float64),
    )
    larger = torch.randn(16, 4, dtype=torch.float64) * 100
    larger[6:13] = bank
    found = compose(embed_logits(logits, topk, 6, 16, topk + wanted), larger, topk + wanted)
    torch.testing.assert_close(found, compose(logits, bank, topk), rtol=1e-12, atol=1e-12)


def test_adapters_that_train_on_from_a_compact_file(model, tmp_path):
    model.peft_config["a"].save_only_topk_weights = True
    model.save_pretrained(tmp_path)
    path = tmp_path / "a"
    config = VBLoRAConfig.from_pretrained(path, train_topk_weights=True)
    base = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4)).double()
    loaded = PeftModel.from_pretrained(base, path, "a", is_trainable=True, config=config)
    loaded.load_adapter(path, "b")
    loaded.add_weighted_adapter(["a", "b"], [0.5, 2.0], "new", "cat")
    check_sum(loaded, {"a": 0.5, "b": 2.0}, tolerance=1e-6)


def test_the_joined_bank_has_a_copy_for_each_sign():
    banks = [torch.ones(2, 3), 2 * torch.ones(4, 3)]
    joined = join_banks(banks, [4.0, -9.0], with_zero=True)
    assert (joined.a_starts, joined.b_starts, joined.zero) == ([0, 2], [0, 6], 10)
    assert joined.vectors[:, 0].tolist() == [2.0] * 2 + [6.0] * 4 + [-6.0] * 4 + [0.0]
    assert len(join_banks(banks, [1.0, 1.0], with_zero=False).vectors) == 6


@pytest.mark.parametrize("weights", [[0.5, 2.0], [0.5, -2.0], [-1.0, -1.0], [0.0, 1.0]])
@pytest.mark.parametrize("topk", [1, 2, 4])
def test_ranks_banks_and_topk_may_differ(model, weights, topk):
    model.add_adapter("b", config(r=3, num_vectors=6, topk=topk, target_modules=["0", "1"]))
    model.add_weighted_adapter(["a", "b"], weights, "new", "cat")
    check_sum(model, dict(zip("ab", weights, strict=True)))
    check_sum(model, {"b": weights[1]}, path="1")
    new = model.peft_config["new"]
    assert (new.r, new.topk) == (5, max(topk, 2))
    assert (
        new.num_vectors == sum(n * (1 + (w < 0)) for n, w in zip((10, 6), weights, strict=True)) + 1
    )


def test_adapters_that_have_only_their_topk(model, tmp_path):
    """Their other logits are minus infinity; the sum infers and is refused in training, as they
    are.
    """
    x = torch.randn(3, 8, dtype=torch.float64)
    model.add_adapter("b", config(r=3, topk=3))
    model.peft_config["a"].save_only_topk_weights = True
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    model.load_adapter(tmp_path / "a", "c")
    assert "c" in model.base_model.model[0].vblora_logits_A_topk_indices
    model.add_weighted_adapter(["c", "b"], [0.5, -0.5], "new", "cat")
    check_sum(model, {"c": 0.5, "b": -0.5})
    check_sum(model, {"a": 0.5, "b": -0.5}, tolerance=1e-6)
    model.set_adapter("new")
    model(x)
    with pytest.raises(RuntimeError, match="Found infinity values in VB-LoRA logits"):
        model.train()(x)


def test_a_sum_is_saved_by_its_topk(model, tmp_path):
    model.add_adapter("b", config(r=1, topk=4))
    model.add_weighted_adapter(["a", "b"], [1.0, -1.0], "new", "cat")
    model.peft_config["new"].save_only_topk_weights = True
    expected = model.base_model.model[0].get_delta_weight("new").detach()
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path / "new")
    torch.testing.assert_close(
        loaded.base_model.model[0].get_delta_weight("default"), expected, rtol=1e-5, atol=1e-6
    )


def test_training_a_sum_moves_its_own_bank(model):
    model.add_weighted_adapter(["a"], [-1.0], "new", "cat")
    model.set_adapter("new")
    before = model.vblora_vector_bank["a"].clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model.train()(torch.randn(3, 8, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    assert torch.equal(model.vblora_vector_bank["a"], before)
    assert model.vblora_vector_bank["new"].grad.abs().sum() > 0


def test_what_does_not_fit_together(model):
    model.add_adapter("b", config(vector_length=2))
    with pytest.raises(
        ValueError, match=r"only if they have the same `vector_length`: a has 4, b has 2"
    ):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", "cat")
    model.add_adapter("c", config(target_modules=["0", "1"]))
    model.base_model.model[1].set_scale("c", 2.0)
    with pytest.raises(ValueError, match="Adapter c is scaled differently in different layers"):
        model.add_weighted_adapter(["a", "c"], [1.0, 1.0], "new", "cat")
    assert sorted(model.peft_config) == ["a", "b", "c"]
