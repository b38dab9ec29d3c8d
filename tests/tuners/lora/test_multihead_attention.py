# SPDX-License-Identifier: Apache-2.0
"""LoRA on `nn.MultiheadAttention`, as a whole.

The oracle is a plain module of the same kind whose weights are the sums `W + s·B·A`, with twice the
scale for `out_proj`, as in Hugging Face PEFT (`tests/interchange` compares with it).
"""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    PolyConfig,
    VBLoRAConfig,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.lora import MultiheadAttention, ParamWrapper

E = 8


class Block(nn.Module):
    """An attention between a query and something else, or itself."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.mha = nn.MultiheadAttention(E, 2, **options)
        self.head = nn.Linear(E, 4)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)
        self.double()

    def forward(self, *args, **kwargs):
        out, weights = self.mha(*args, **kwargs)
        return self.head(out), weights


def adapted(base=None, **options):
    torch.manual_seed(1)
    options = {"r": 2, "lora_alpha": 3, "init_lora_weights": False, **options}
    base = Block() if base is None else base
    return get_peft_model(base, LoraConfig(target_modules=["mha"], **options)).double().eval()


def summed(model, *names):
    """The plain model with the sums in its weights, as functions of the adapters' factors."""
    plain, result = copy.deepcopy(model).unload(), {}
    for path, layer in model.base_model.named_tuner_layers():
        path = path.replace(".base_layer", "")
        name = f"{path}.{layer.parameter_name}"
        weight = plain.get_parameter(name)
        for adapter in names or ("default",):
            if adapter in layer.scaling:
                A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                scale = layer.lora_alpha[adapter] / layer.r[adapter]
                weight = weight + (2 if "out_proj" in path else 1) * scale * B @ A
        result[name] = weight
    return lambda *args, **kwargs: torch.func.functional_call(plain, result, args, kwargs)


X, Y, Z = (torch.randn(3, 5, E, dtype=torch.double) for _ in range(3))
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
CAUSAL = torch.ones(5, 5).triu(1).bool()
CALLS = {
    "self": ((X, X, X), {}),
    "self without weights": ((X, X, X), {"need_weights": False}),
    "to another": ((X, Y, Y), {"average_attn_weights": False}),
    "three": ((X, Y, Z), {"need_weights": False}),
    "one sample": ((X[0], X[0], X[0]), {}),
    "padding": ((X, X, X), {"key_padding_mask": PADDING}),
    "causal": ((X, X, X), {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}),
    "numbers": ((X, Y, Y), {"attn_mask": torch.randn(5, 5).double()}),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "options",
    [{"batch_first": True}, {"batch_first": True, "bias": False, "add_zero_attn": True},
     {"batch_first": True, "add_bias_kv": True}],
)  # fmt: skip
def test_every_call_computes_with_the_sums(options, call):
    model, (args, kwargs) = adapted(Block(**options)), CALLS[call]
    plain = summed(model)
    torch.testing.assert_close(model(*args, **kwargs), plain(*args, **kwargs))
    with torch.no_grad():  # torch's fused inference path, where it supports the call
        torch.testing.assert_close(model(*args, **kwargs), plain(*args, **kwargs))
        with model.disable_adapter():
            same = model(*args, **kwargs)
        torch.testing.assert_close(same, copy.deepcopy(model).unload()(*args, **kwargs))


def test_the_sequence_can_come_first():
    model, x = adapted(Block()), torch.randn(7, 2, E, dtype=torch.double)
    torch.testing.assert_close(model(x, x, x), summed(model)(x, x, x))


def test_gradients_reach_both_projections():
    model = adapted(lora_dropout=0.5).train()
    own = [p for n, p in model.named_parameters() if p.requires_grad]
    assert len(own) == 4
    found = torch.autograd.grad(model(X, Y, Z)[0].square().sum(), own)
    expected = torch.autograd.grad(summed(model)(X, Y, Z)[0].square().sum(), own)
    torch.testing.assert_close(found, expected)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all(".lora_" in name for name in names)


def test_the_layers_of_a_transformer():
    """Its fused path reads weights past all layers; padded batches are packed for it."""

    def base(batch_first=True):
        torch.manual_seed(2)
        layer = nn.TransformerEncoderLayer(E, 2, 16, batch_first=batch_first)
        return nn.TransformerEncoder(layer, 2).double().eval()

    torch.manual_seed(3)
    config = LoraConfig(target_modules=["self_attn", "linear1"], r=2, init_lora_weights=False)
    model = get_peft_model(base(), config).double().eval()
    with torch.no_grad():
        found = model(X, src_key_padding_mask=PADDING)
        merged = copy.deepcopy(model).merge_and_unload()(X, src_key_padding_mask=PADDING)
        torch.testing.assert_close(found[~PADDING], merged[~PADDING])
        with model.disable_adapter():
            torch.testing.assert_close(model(X), base()(X))
        assert not torch.allclose(model(X), base()(X))
    unloaded = model.unload()
    assert type(unloaded.layers[0].self_attn) is nn.MultiheadAttention
    assert unloaded.state_dict().keys() == base().state_dict().keys()
    torch.testing.assert_close(unloaded(X), base()(X))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=[], target_parameters=["in_proj_weight"], r=2),
        LoKrConfig(target_modules=["self_attn"], r=2, init_weights=False),
    ],
    ids=["parameter", "LoKr"],
)
def test_transformer_layers_ask_the_module(config):
    layer = nn.TransformerEncoderLayer(E, 2, 16, batch_first=True)
    model = get_peft_model(nn.TransformerEncoder(layer, 1), config).double().eval()
    with torch.no_grad():
        found = model(X)
    torch.testing.assert_close(found, model(X))
    assert get_model_status(model).quantization_backend is None


def test_merging_and_unmerging():
    model = adapted()
    before = {name: p.clone() for name, p in model.named_parameters() if "lora_" not in name}
    expected = summed(model)(X, Y, Y)
    model.merge_adapter()
    torch.testing.assert_close(model(X, Y, Y), expected)
    model.unmerge_adapter()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    torch.testing.assert_close(model(X, Y, Y), expected)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(X, Y, Y), copy.deepcopy(model).unload()(X, Y, Y))
    plain = model.merge_and_unload()
    assert type(plain.mha) is nn.MultiheadAttention and type(plain.mha.out_proj) is not ParamWrapper
    torch.testing.assert_close(plain(X, Y, Y), expected)


def test_files_have_the_keys_of_the_interface(tmp_path):
    model = adapted(bias="lora_only")
    model.save_pretrained(tmp_path)
    shapes = {
        k: tuple(t.shape) for k, t in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    root = "base_model.model.mha"
    assert shapes == {
        f"{root}.lora_A.weight": (2, E),
        f"{root}.lora_B.weight": (3 * E, 2),
        f"{root}.base_layer.out_proj.lora_A.weight": (2, E),
        f"{root}.base_layer.out_proj.lora_B.weight": (E, 2),
        f"{root}.base_layer.out_proj.base_layer.bias": (E,),
    }
    expected = model(X, Y, Y)
    for other in (
        PeftModel.from_pretrained(Block(), tmp_path).double(),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ):
        torch.testing.assert_close(other(X, Y, Y), expected)


def test_several_adapters(tmp_path):
    model = adapted(rank_pattern={"mha": 3})
    assert {layer.r["default"] for layer in model.base_model.tuner_layers()} == {3}
    model.add_adapter("other", LoraConfig(target_modules="mha", r=4, init_lora_weights=False))
    model.double()
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(model(X, X, X), summed(model, "default", "other")(X, X, X))
    expected = model(X, X, X)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", "cat")
    model.set_adapter("both")
    torch.testing.assert_close(model(X, X, X), expected)
    model.delete_adapter("both")
    model.save_pretrained(tmp_path)
    model.set_adapter("other")
    expected = model(X, X, X)
    torch.testing.assert_close(expected, summed(model, "other")(X, X, X))
    again = PeftModel.from_pretrained(Block(), tmp_path)
    again.load_adapter(tmp_path / "other", "second")
    again.set_adapter("second")
    torch.testing.assert_close(again.double()(X, X, X), expected)
    with pytest.raises(TypeError, match="lora.MultiheadAttention does not support mixed adapter"):
        model(X, X, X, adapter_names=["default", "other", "__base__"])
    one = model(X, X, X, adapter_names=["default"] * 3)
    torch.testing.assert_close(one, summed(model, "default")(X, X, X))
    model.delete_adapter("other")
    torch.testing.assert_close(model(X, X, X), summed(model, "default")(X, X, X))


def test_beside_another_method():
    torch.manual_seed(4)
    config = LoraConfig(target_modules=["mha"], r=2, init_lora_weights=False)
    model = get_peft_model(Block(), config, "lora", mixed=True)
    model.add_adapter("lokr", LoKrConfig(target_modules=["head"], r=2, init_weights=False))
    model.set_adapter(["lora", "lokr"])
    model.double()
    expected = model(X, X, X)
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(X, X, X), expected)


@pytest.mark.compile
def test_compiled_and_exported():
    model = adapted(Block(batch_first=True))
    expected = model(X, Y, Y)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X, Y, Y), expected)
    exported = torch.export.export(model, (X, Y, Y)).module()
    torch.testing.assert_close(exported(X, Y, Y), expected)


def test_the_module_shows_what_it_has():
    base = Block()
    out_proj = base.mha.out_proj
    layer = adapted(base).base_model.model.mha
    assert isinstance(layer, MultiheadAttention) and layer.out_proj is out_proj
    for name in ("embed_dim", "kdim", "num_heads", "head_dim", "batch_first", "add_zero_attn"):
        assert getattr(layer, name) == getattr(Block().mha, name)
    assert layer._qkv_same_embed_dim and layer.in_proj_weight.shape == (24, E)
    assert layer.merge_masks(None, PADDING, X)[1] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "MultiheadAttention does not support DoRA"),
        ({"lora_bias": True, "init_lora_weights": True}, "does not work with `lora_bias`"),
        ({"init_lora_weights": "pissa"}, "does not work with `init_lora_weights`"),
    ],
)
def test_options_that_are_refused(options, message):
    base = Block()
    with pytest.raises(ValueError, match=message):
        adapted(base, **options)
    assert type(base.mha) is nn.MultiheadAttention


def test_modules_that_are_refused():
    with pytest.raises(ValueError, match="Only same embed for query/key/value is supported"):
        adapted(Block(kdim=4))
    with pytest.raises(TypeError, match="target the whole MultiheadAttention"):
        get_peft_model(Block(), LoraConfig(target_modules=["out_proj"]))
    options = {"target_modules": ["mha", "out_proj"], "target_parameters": ["mha.in_proj_weight"]}
    both = get_peft_model(Block(), LoraConfig(**options))
    assert both.targeted_module_names == ["mha"]
    assert len(list(both.base_model.tuner_layers())) == 2
    for name in ("out_proj.weight", "mha.bias_k"):
        config = LoraConfig(target_modules=[], target_parameters=[name])
        with pytest.raises(TypeError, match="name the whole module in `target_modules`"):
            get_peft_model(Block(add_bias_kv=True), config)


@pytest.mark.parametrize(
    "config",
    [
        LoKrConfig(r=2, init_weights=False),
        LoHaConfig(r=2, init_weights=False),
        VBLoRAConfig(r=2, num_vectors=6, vector_length=4, init_vector_bank_bound=1.0),
        PolyConfig(r=2, n_tasks=1, init_weights=False),
    ],
    ids=lambda config: config.peft_type,
)
def test_other_methods_adapt_it_too(config, tmp_path):
    config = copy.deepcopy(config)
    config.target_modules = {"mha"}
    torch.manual_seed(5)
    model = get_peft_model(Block(), config).double().eval()
    plain = Block()
    for path, layer in model.base_model.named_tuner_layers():
        name = f"{path.replace('.base_layer', '')}.{layer.parameter_name}"
        plain.get_parameter(name).data += layer.get_delta_weight("default")
    found = model(X, Y, Y)
    torch.testing.assert_close(found, plain(X, Y, Y))
    assert not torch.allclose(found[0], Block()(X, Y, Y)[0])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Block(), tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(loaded.double()(X, Y, Y), found)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "targets", [{"target_modules": ["mha"]}, {"target_parameters": ["mha.in_proj_weight"]}]
)
def test_inside_fully_sharded_data_parallel(targets):
    """It replaces parameters by views of a flat one, and looks for its own between calls."""
    from torch import distributed
    from torch.distributed.fsdp import FullyShardedDataParallel

    def make():
        torch.manual_seed(6)
        config = LoraConfig(**{"target_modules": [], **targets}, r=2, init_lora_weights=False)
        return get_peft_model(Block(), config, autocast_adapter_dtype=False).double()

    plain = make()
    plain(X, X, X)[0].sum().backward()
    expected = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        sharded = FullyShardedDataParallel(
            make(), use_orig_params=True, device_id=torch.device("cpu")
        )
        for _ in range(2):
            sharded.zero_grad()
            out = sharded(X, X, X)[0]
            torch.testing.assert_close(out, plain(X, X, X)[0])
            out.sum().backward()
        found = {n.removeprefix("_fsdp_wrapped_module."): p for n, p in sharded.named_parameters()}
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name].grad, gradient)
        state = get_peft_model_state_dict(sharded)
        assert all(torch.equal(t, get_peft_model_state_dict(plain)[k]) for k, t in state.items())
    finally:
        distributed.destroy_process_group()
