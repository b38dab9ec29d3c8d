# SPDX-License-Identifier: Apache-2.0
"""Starts of LoRA from data, against the papers' formulas in float64; the model and its files around
them.
"""

import copy
import json

import pytest
import torch
from helpers.models import llama
from helpers.states import assert_unchanged, snapshot
from torch import nn

import peft
from peft import EvaConfig, LoftQConfig, LoraConfig, LoraGAConfig, PeftModel, get_peft_model
from peft.tuners.lora import CordaConfig, preprocess_corda, preprocess_loraga
from peft.tuners.lora.starts.eva import PrincipalDirections, shared_ranks
from peft.tuners.lora.starts.loftq import loftq, quantized

CLOSE = {"atol": 1e-4, "rtol": 1e-3}


def fresh():
    """Two layers, the second a `Conv1D`, between which an activation lies."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), Conv1D(14, 10)).eval()


def data(rows=40, columns=12):
    torch.manual_seed(4)
    return torch.randn(rows, columns) * 0.8 ** torch.arange(columns)


def config_for(how, **fields):
    settings = {
        "corda": {"corda_config": CordaConfig()},
        "lora_ga": {"lora_ga_config": LoraGAConfig()},
        "loftq": {"loftq_config": LoftQConfig(loftq_iter=2)},
    }[how]
    return LoraConfig(
        **{
            "r": 3,
            "lora_alpha": 5,
            "target_modules": ["0", "2"],
            "fan_in_fan_out": True,
            "init_lora_weights": how,
            **settings,
            **fields,
        }
    )


def collect(base, config, x):
    """What the start needs."""
    if config.init_lora_weights == "corda":
        preprocess_corda(base, config, run_model=lambda: base(x))
    if config.init_lora_weights == "lora_ga":
        preprocess_loraga(base, config, lambda: base(x).square().mean().backward())


def started(how, x=None, **fields):
    base, config = fresh(), config_for(how, **fields)
    collect(base, config, data() if x is None else x)
    return get_peft_model(base, config).eval()


def shaken(model):
    """The same values again, whatever the start."""
    with torch.no_grad():
        for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.add_(
                torch.linspace(-0.3, 0.2, parameter.numel()).view_as(parameter) * (i + 1)
            )


def product(layer, name="default"):
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    return (layer.scaling[name] * B @ A).detach().double()


def weight_of(layer):
    weight = getattr(layer, "base_layer", layer).weight.detach().double()
    return weight.T if type(getattr(layer, "base_layer", layer)).__name__ == "Conv1D" else weight


def stages(base, x):
    """Each adapted layer's input."""
    return {"0": x, "2": base[1](base[0](x)).detach()}


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_is_the_papers_decomposition(method):
    """`W = U·S·(Vᵀ·C⁻¹)` with `SVD(W·C)`, of which the adapter gets the first or the last terms."""
    base, x = fresh(), data()
    inputs = stages(base, x)
    config = config_for(
        "corda", corda_config=CordaConfig(corda_method=method), rank_pattern={"2": 2}
    )
    collect(base, config, x)
    model = get_peft_model(base, config)
    for path, r in (("0", 3), ("2", 2)):
        layer = model.base_model.model.get_submodule(path)
        rows = inputs[path].double() / inputs[path].max().abs()
        C = sum(torch.outer(row, row) for row in rows)
        C += torch.eye(len(C)) * C.diagonal().mean() * 0.01
        W = weight_of(layer)
        U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
        terms = [S[i] * torch.outer(U[:, i], Vh[i] @ torch.linalg.inv(C)) for i in range(len(S))]
        torch.testing.assert_close(sum(terms), W)
        chosen = terms[:r] if method == "ipm" else terms[-r:]
        torch.testing.assert_close(product(layer), sum(chosen), **CLOSE)


@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_lora_ga_starts_from_the_gradients_singular_vectors(direction, scale):
    base, x = fresh(), data()
    config = config_for("lora_ga", lora_ga_config=LoraGAConfig(direction, scale, stable_gamma=9))
    batches = x.chunk(4)

    def step():
        for batch in batches:
            base(batch).square().mean().backward()

    preprocess_loraga(base, config, step)
    model = get_peft_model(base, config)
    slow = fresh().double()
    sum(slow(batch.double()).square().mean() for batch in batches).div(4).backward()
    for path in ("0", "2"):
        layer = model.base_model.model.get_submodule(path)
        G = slow.get_submodule(path).weight.grad
        G = G.T if path == "2" else G
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        of_A, of_B = {
            "ArBr": ([1, 3, 5], [0, 2, 4]),
            "A2rBr": ([3, 4, 5], [0, 1, 2]),
            "ArB2r": ([0, 1, 2], [3, 4, 5]),
        }[direction]
        A, B, s = Vh[of_A], U[:, of_B] * S[of_B], 5 / 3
        if scale == "stable":
            B = B * len(G) ** 0.25 / 3
        elif scale == "weight_svd":
            B = B * torch.linalg.svdvals(weight_of(layer))[0] / S[of_B[0]]
        elif scale == "gd_scale":
            A, B = A / s, B / s
        for found, expected in ((layer.lora_A, A), (layer.lora_B, B)):  # up to signs
            found = found["default"].weight.detach().double()
            torch.testing.assert_close(found.abs(), expected.abs(), **CLOSE)


def test_lora_ga_leaves_the_model_as_it_was():
    base, x = fresh(), data()
    base[0].weight.requires_grad_(False)
    base[2].weight.grad = gradient = torch.ones_like(base[2].weight)
    base[1].train()
    before = snapshot(base)
    with pytest.raises(ZeroDivisionError):
        preprocess_loraga(base, config_for("lora_ga"), lambda: 1 / 0)
    preprocess_loraga(base, config_for("lora_ga"), lambda: base(x).sum().backward())
    assert_unchanged(before, base)
    assert base[2].weight.grad is gradient and base[0].weight.grad is None
    assert not base[0].weight._backward_hooks and not base[0]._backward_hooks


def slow_nf4(W):
    """Each block of 64 values by its largest magnitude, each value by the nearest of 16."""
    from peft.tuners.lora.starts.loftq import _NORMAL_FLOATS

    flat, result = W.double().flatten(), []
    for begin in range(0, len(flat), 64):
        block = flat[begin : begin + 64]
        largest = block.abs().max()
        for value in block / largest:
            result.append(largest * min(_NORMAL_FLOATS, key=lambda code: abs(value - code)))
    return torch.stack(result).view_as(W)


def test_loftq_is_the_papers_algorithm():
    """`Q = q(W - A·B)`, `A·B = SVD_r(W - Q)` in turns, which come closer to `W` than one."""
    torch.manual_seed(0)
    W, r = torch.randn(30, 50), 4
    AB, errors = torch.zeros_like(W).double(), []
    for turns in range(1, 4):
        Q = slow_nf4(W - AB)
        U, S, Vh = torch.linalg.svd(W.double() - Q)
        AB = U[:, :r] * S[:r] @ Vh[:r]
        found, (A, B) = loftq(W, r, 0.7, 4, turns)
        torch.testing.assert_close(found.dense().double(), Q, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close((0.7 * B @ A).double(), AB, **CLOSE)
        errors.append(torch.dist(W, Q + AB))
    assert errors[2] < errors[0] < torch.dist(W, slow_nf4(W))
    for bits in (4, 8):
        once = quantized(W, bits).dense()
        torch.testing.assert_close(quantized(once, bits).dense(), once, atol=1e-6, rtol=1e-6)


def test_a_model_after_loftq_has_the_quantized_weights(tmp_path):
    """Merged or without adapters; a file needs the factors alone, since readers quantize again."""
    base, x = fresh(), data()
    expected = base(x)
    model = get_peft_model(base, config_for("loftq"))
    assert torch.dist(model(x), expected) < torch.dist(model.get_base_model()(x), expected) + 1
    with model.disable_adapter():
        lost = torch.dist(model(x), expected)
    assert 0 < torch.dist(model(x), expected) < lost
    shaken(model)
    trained = model(x)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["loftq_config"] == {
        "loftq_bits": 4,
        "loftq_iter": 2,
    }
    again = PeftModel.from_pretrained(fresh(), tmp_path)
    torch.testing.assert_close(again(x), trained, **CLOSE)
    again.load_adapter(tmp_path, "second")
    again.set_adapter("second")
    torch.testing.assert_close(again(x), trained, **CLOSE)
    plain = again.unload()
    Q = fresh()
    for path in ("0", "2"):
        W, (A, B) = (
            weight_of(Q.get_submodule(path)).float(),
            loftq(weight_of(Q.get_submodule(path)).float(), 3, 5 / 3, 4, 1)[1],
        )
        dense = slow_nf4(W - 5 / 3 * B @ A).float()
        torch.testing.assert_close(
            weight_of(plain.get_submodule(path)).float(), dense, atol=1e-5, rtol=1e-5
        )
    with pytest.raises(NotImplementedError, match="path_initial_model_for_weight_conversion"):
        model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=tmp_path)
    with pytest.raises(ValueError, match="`loftq_bits`=3 must be one of 4, 8"):
        LoftQConfig(loftq_bits=3)


@pytest.mark.parametrize("how", ["corda", "lora_ga"])
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True, "rank_pattern": {"2": 2}}, {"use_dora": True}]
)
def test_a_start_from_data_is_in_the_adapters_file(how, options, tmp_path):
    """The file is a plain adapter of twice the rank; here it is one of its own rank again."""
    x = data()
    expected = fresh()(x)
    model = started(how, **options)
    torch.testing.assert_close(model(x), expected, **CLOSE)
    shaken(model)
    trained = model(x)
    assert torch.dist(trained, expected) > 0.1
    assert not any("start" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (content["init_lora_weights"], content["r"]) == (True, 6)
    (tmp_path / "other").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "other" / name).write_bytes((tmp_path / name).read_bytes())
    content.pop("start")  # as a reader that does not know it
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(content))
    for folder, r in ((tmp_path, 3), (tmp_path / "other", 6)):
        again = PeftModel.from_pretrained(fresh(), folder)
        assert again.peft_config["default"].r == r
        torch.testing.assert_close(again(x), trained, **CLOSE)
    again = PeftModel.from_pretrained(fresh(), tmp_path, is_trainable=True)
    assert again.peft_config["default"].init_lora_weights == how
    again.copy_adapter("default", "again")
    again.set_adapter("again")
    torch.testing.assert_close(again(x), trained, **CLOSE)
    again.merge_adapter()
    torch.testing.assert_close(again(x), trained, **CLOSE)
    assert torch.equal(again.unload()(x), expected)


@pytest.mark.parametrize("how", ["corda", "lora_ga"])
def test_a_checkpoint_brings_its_start_with_it(how, tmp_path):
    """Also where the adapter has started from other data, as after a restart of the training."""
    model = started(how)
    shaken(model)
    model.save_pretrained(tmp_path)
    other = started(how, x=data().flip(0, 1) * 1.5)
    other.load_adapter(tmp_path, "default")
    torch.testing.assert_close(other(data()), model(data()), **CLOSE)
    if how == "corda":
        plain = tmp_path / "plain"
        model.save_pretrained(plain, path_initial_model_for_weight_conversion=tmp_path)
        again = PeftModel.from_pretrained(fresh(), plain)
        torch.testing.assert_close(again(data()), model(data()), **CLOSE)


def test_transformers_loads_the_file_as_a_plain_adapter(tmp_path):
    torch.manual_seed(0)
    base, ids = llama(), torch.tensor([[3, 1, 4, 1, 5]])
    config = config_for("corda", target_modules=["q_proj"], fan_in_fan_out=False)
    other = copy.deepcopy(base)
    preprocess_corda(base, config, run_model=lambda: base(ids))
    model = get_peft_model(base, config).eval()
    shaken(model)
    model.save_pretrained(tmp_path)
    other.load_adapter(tmp_path)
    torch.testing.assert_close(other(ids).logits, model(ids).logits, **CLOSE)
    model.peft_config["default"].init_lora_weights = True  # as scripts for Hugging Face PEFT do
    with pytest.warns(UserWarning, match="it starts from a part of the base weight"):
        model.save_pretrained(tmp_path)


def test_files_of_what_was_collected(tmp_path):
    """They spare running the model, and are refused for other layers or ranks."""
    x = data()
    files = {"cache_file": tmp_path / "new" / "cache.pt", "covariance_file": tmp_path / "cov.pt"}
    config = config_for("corda", corda_config=CordaConfig(**files))
    base = fresh()
    preprocess_corda(base, config, run_model=lambda: base(x))
    first = get_peft_model(base, config)
    for name, file in files.items():
        base, one = fresh(), config_for("corda", corda_config=CordaConfig(**{name: file}))
        preprocess_corda(base, one)
        second = get_peft_model(base, one)
        for path in ("0", "2"):
            layers = [m.base_model.model.get_submodule(path) for m in (first, second)]
            torch.testing.assert_close(product(layers[0]), product(layers[1]))
            assert not hasattr(layers[1].base_layer, "eigens")
    base = nn.Sequential(nn.Sequential(nn.Linear(12, 10)))
    other = {"target_modules": ["0.0"], "fan_in_fan_out": False}
    for name, file in files.items():
        with pytest.raises(RuntimeError, match="it was made for another model"):
            preprocess_corda(
                base, config_for("corda", corda_config=CordaConfig(**{name: file}), **other)
            )
    with pytest.raises(RuntimeError, match="no components of rank 4 of `0`"):
        preprocess_corda(
            fresh(),
            config_for("corda", r=4, corda_config=CordaConfig(cache_file=files["cache_file"])),
        )
    base, config = fresh(), config_for("lora_ga")
    preprocess_loraga(base, config, lambda: base(x).sum().backward(), tmp_path / "gradients.pt")
    again = fresh()
    preprocess_loraga(again, config, lambda: 1 / 0, tmp_path / "gradients.pt")
    torch.testing.assert_close(again[0]._peft_loraga_grad, base[0]._peft_loraga_grad)


def test_data_that_is_missing_or_damaged():
    x = data()
    for how, function in (("corda", "preprocess_corda"), ("lora_ga", "preprocess_loraga")):
        base = fresh()
        before = snapshot(base)
        with pytest.raises(ValueError, match=rf"not collected for `0`, `2`; call `{function}"):
            get_peft_model(base, config_for(how))
        assert_unchanged(before, base)
    base = fresh()
    before = snapshot(base)
    config = config_for("corda")
    with pytest.raises(ValueError, match="Pass `run_model`"):
        preprocess_corda(base, config)
    with pytest.raises(ValueError, match="`run_model` did not call 0, 2"):
        preprocess_corda(base, config, run_model=lambda: None)
    with pytest.raises(ValueError, match="`0`: its input has values that are NaN"):
        preprocess_corda(base, config, run_model=lambda: base(x * float("nan")))
    with pytest.raises(ValueError, match="CorDA needs a config with `init_lora_weights='corda'`"):
        preprocess_corda(base, LoraConfig(target_modules=["0"]), run_model=lambda: base(x))
    with pytest.raises(ValueError, match="`train_step` computed no gradient"):
        preprocess_loraga(base, config_for("lora_ga"), lambda: None)
    with pytest.raises(ValueError, match="`preprocess_loraga` got|If you want to use LoRA-GA"):
        preprocess_loraga(base, LoraConfig(target_modules=["0"]), lambda: None)
    assert_unchanged(before, base)
    assert not hasattr(base[0], "eigens") and not base[0]._forward_pre_hooks
    with pytest.raises(ValueError, match=r"2 · `r`=12 is more than the 10 singular values"):
        get_peft_model(base, config_for("lora_ga", r=6))
    quantizing = config_for("loftq")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "2"], fan_in_fan_out=True))
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into that of `0`, `2`; call `unmerge_adapter`"):
        model.add_adapter("second", quantizing)


# --- EVA ---


def eva_model(data, **fields):
    """A model of three layers, two of which have the same input."""

    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.last = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(8, 5)

        def forward(self, x):
            return self.last(self.left(x) * self.right(x))

    torch.manual_seed(3)
    config = LoraConfig(
        **{
            "r": 3,
            "lora_alpha": 6,
            "target_modules": ["left", "right", "last"],
            "init_lora_weights": "eva",
            "eva_config": EvaConfig(rho=2, tau=0.999),
            **fields,
        }
    )
    return get_peft_model(Twins(), config)


def plainly(model, batches, **options):
    """Options for data that are tensors."""
    peft.initialize_lora_eva_weights(
        model,
        batches,
        forward_fn=lambda model, batch: model(batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        **options,
    )


def spread(count=5, rows=200):
    torch.manual_seed(7)
    mixing = torch.linalg.qr(torch.randn(16, 16))[0]
    return [torch.randn(rows, 16) * 0.5 ** torch.arange(16) @ mixing + 1 for _ in range(count)]


def test_directions_are_the_principal_ones_of_all_rows():
    batches = spread()
    found = PrincipalDirections(8)
    for batch in batches:
        found.add(batch)
    rows = torch.cat(batches).double()
    _, S, Vh = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    torch.testing.assert_close(found.directions[:4].abs(), Vh[:4].abs(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.singular_values[:4], S[:4], atol=1e-3, rtol=1e-3)
    shares = S.square() / S.square().sum()
    torch.testing.assert_close(found.variance_shares[:4], shares[:4], atol=1e-3, rtol=1e-3)


def test_ranks_go_where_the_variance_is():
    """As by hand: the largest shares of all layers get one each, and a leader is never behind."""
    shares = {"a": torch.tensor([0.5, 0.3, 0.01]), "b": torch.tensor([0.4, 0.2, 0.1])}
    leaders = {"a": "a", "b": "b", "c": "a"}
    assert shared_ranks(shares, leaders, 6) == {"a": 2, "b": 2, "c": 2}
    assert shared_ranks(shares, leaders, 3) == {"a": 1, "b": 1, "c": 1}
    assert shared_ranks(
        {"a": torch.tensor([0.9]), "b": torch.tensor([0.1])}, {"a": "a", "b": "b"}, 1
    ) == {
        "a": 1,
        "b": 0,
    }


def test_eva_starts_without_effect_from_the_inputs(tmp_path):
    batches = spread()
    model = eva_model(batches)
    before = model(batches[0])
    model.train()
    plainly(model, batches)
    assert model.training and not model.base_model.model.left._forward_pre_hooks
    torch.testing.assert_close(model(batches[0]), before)
    layers = {
        path: model.base_model.model.get_submodule(path) for path in ("left", "right", "last")
    }
    ranks = {path: layer.r["default"] for path, layer in layers.items()}
    assert sum(ranks.values()) == 9 and ranks["left"] == ranks["right"]
    rows = torch.cat(batches).double()
    Vh = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)[2]
    A = layers["left"].lora_A["default"].weight
    torch.testing.assert_close(A.double().abs(), Vh[: len(A)].abs(), atol=2e-2, rtol=2e-2)
    assert torch.equal(A[: ranks["right"]], layers["right"].lora_A["default"].weight)
    for path, layer in layers.items():
        assert layer.scaling["default"] == 2.0  # alpha follows the rank
        assert layer.lora_A["default"].weight.requires_grad
        assert layer.lora_B["default"].weight.shape[1] == ranks[path]
    config = model.peft_config["default"]
    assert {**dict.fromkeys(ranks, 3), **config.rank_pattern} == ranks
    shaken(model)
    trained = model.eval()(batches[0])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(eva_model(batches).unload(), tmp_path)
    torch.testing.assert_close(again(batches[0]), trained)
    assert again.peft_config["default"].eva_config == config.eva_config


def test_a_layer_without_a_rank_loses_the_adapter(tmp_path):
    batches = spread()
    model = eva_model(batches)
    found = {"left": torch.eye(16)[:4], "right": torch.empty(0, 16), "last": torch.eye(8)[:5]}
    model.add_adapter("other", LoraConfig(r=2, target_modules=["last"]))
    with pytest.raises(ValueError, match="`left`: directions of shape .* do not fit its 16 inputs"):
        plainly(model, None, eva_state_dict={**found, "left": torch.eye(3)})
    plainly(model, None, eva_state_dict=found)
    base = model.base_model.model
    assert type(base.right) is nn.Linear and list(base.last.scaling) == ["default", "other"]
    assert [base.left.r["default"], base.last.r["default"]] == [4, 5]
    shaken(model)
    trained = model(batches[0])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(eva_model(batches).unload(), tmp_path)
    torch.testing.assert_close(again(batches[0]), trained)
    assert type(again.base_model.model.right) is nn.Linear
    model.delete_adapter("default")
    assert type(base.left).__name__ == "Linear"


def test_eva_of_a_language_model():
    """Padding and tokens without labels do not count; a plain model gives the same directions."""
    torch.manual_seed(0)
    base = llama().eval()
    ids = torch.randint(2, 40, (4, 3, 12))
    batches = [
        {"input_ids": one, "attention_mask": torch.ones_like(one), "labels": one.clone()}
        for one in ids
    ]
    for batch in batches:
        batch["attention_mask"][0, 8:] = 0
        batch["labels"][1, :4] = -100
    config = LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1),
    )
    plain = peft.get_eva_state_dict(base, batches, config)
    changed = copy.deepcopy(batches)
    for batch in changed:
        batch["input_ids"][0, 8:] = 7
    model = get_peft_model(base, config, low_cpu_mem_usage=True)
    found = peft.get_eva_state_dict(model, changed)
    assert [name.removeprefix("base_model.model.") for name in found] == list(plain)
    for name, rows in plain.items():
        torch.testing.assert_close(found[f"base_model.model.{name}"], rows, **CLOSE)
    peft.initialize_lora_eva_weights(model, eva_state_dict=plain)
    assert not any(parameter.is_meta for parameter in model.parameters())
    torch.testing.assert_close(model(ids[0]).logits, model.unload()(ids[0]).logits)


def test_what_eva_can_not_do():
    batches = spread()
    model = eva_model(batches)
    before = snapshot(model)
    with pytest.raises(ValueError, match="`dataloader`"):
        peft.initialize_lora_eva_weights(model)
    with pytest.raises(ValueError, match="The dataloader is empty"):
        plainly(model, [])
    with pytest.raises(
        ValueError, match="every batch has fewer rows than the 6 directions .* most 4"
    ):
        plainly(model, [torch.ones(4, 16)])
    with pytest.raises(TypeError, match="`prepare_model_inputs_fn` of your own"):
        peft.initialize_lora_eva_weights(model, batches)
    with pytest.raises(ValueError, match="`prepare_layer_inputs_fn` names nothing"):
        peft.get_eva_state_dict(model, batches, prepare_layer_inputs_fn={"nothing": None})
    with pytest.raises(ValueError, match="`peft_config` is required"):
        peft.get_eva_state_dict(model.base_model.model.last.base_layer, batches)
    assert_unchanged(before, model)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="is not for EVA"):
        plainly(eva_model(batches, init_lora_weights=True, eva_config=None), batches)
    with pytest.raises(ValueError, match="`rho` must be >= 1.0"):
        EvaConfig(rho=-1)
