# SPDX-License-Identifier: Apache-2.0
"""What is said of a LoKr file, what its tensors may be, and what a loaded or written one is beside
its numbers.
"""

import json
import re

import pytest
import torch
from helpers.states import assert_unchanged, snapshot
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from peft import (
    LoKrConfig,
    get_peft_model,
    inspect_lokr_file,
    load_lokr_file,
    lokr_config_from_lycoris,
    save_lokr_file,
)
from peft.tuners.lokr.files import read_lokr_adapter
from peft.tuners.lokr.files.reading import writer_of

pytestmark = pytest.mark.quick


def linear(out=32, columns=32):
    return nn.Sequential(nn.Linear(columns, out))


def factors(name, rank=None, out=32, columns=32, **more):
    """Tensors of one module; by default both sides are full."""
    tensors = {"lokr_w1": torch.randn(4, 4)}
    if rank is None:
        tensors["lokr_w2"] = torch.randn(out // 4, columns // 4)
    else:
        tensors |= {
            "lokr_w2_a": torch.randn(out // 4, rank),
            "lokr_w2_b": torch.randn(rank, columns // 4),
        }
    return {f"{name}.{end}": tensor for end, tensor in {**tensors, **more}.items()}


def own(path, **fields):
    config = LoKrConfig(**{"target_modules": ["0"], "init_weights": False, **fields})
    model = get_peft_model(linear(), config).eval()
    return model, path / "lokr.safetensors"


@pytest.mark.parametrize("number", [1, 5, 7])
def test_five_unknown_keys_are_named(number):
    unknown = {f"x{i}.weight": torch.ones(1) for i in range(number)}
    report = inspect_lokr_file({**factors("0"), **unknown})
    names = ", ".join(f"'x{i}.weight'" for i in range(min(number, 5)))
    more = " and 2 more" if number == 7 else ""
    assert report.problems == [f"Keys of no LoKr module: {names}{more}."]
    assert repr(report).endswith("no model; print it for a table>")
    assert repr(inspect_lokr_file(factors("0"), linear())).endswith(
        "1 placed; print it for a table>"
    )


@pytest.mark.parametrize("number", [3, 4])
def test_three_keys_of_another_file_are_named(number):
    keys = [f"lora_unet_{i}.lora_down.weight" for i in range(number - 1)] + ["some.weight"]
    more = ", …" if number == 4 else ""
    named = f"its keys are {', '.join(map(repr, keys[:3]))}{more}. It is a LoRA file"
    with pytest.raises(ValueError, match=re.escape(f"'tensors' holds no LoKr modules; {named}")):
        inspect_lokr_file({key: torch.ones(2, 2) for key in keys})


def test_a_report_says_what_a_file_has():
    tensors = {
        **factors("lycoris_a", 2, dora_scale=torch.ones(32, 1)),
        **factors("lycoris_b", 1),
        **factors("lycoris_c", 2),
        **factors("lycoris_d"),
        **factors("unet.e"),
        **factors("f", 3),
    }
    report = inspect_lokr_file(tensors)
    assert str(report).splitlines()[1:] == [
        "  lycoris: 4 modules; ranks 1, 2; 1 of full factors; weight decomposition",
        "  unet: 1 modules; 1 of full factors",
        "  (no prefix): 1 modules; ranks 3",
    ]
    assert not report.fits
    for nothing in (report, inspect_lokr_file(factors("lycoris_9"), linear())):
        with pytest.raises(ValueError, match="nothing of it is placed in a model"):
            _ = nothing.config


@pytest.mark.parametrize("norms", [(32, 1), (1, 32), None])
def test_a_report_says_where_norms_and_rows_are(norms):
    more = {} if norms is None else {"dora_scale": torch.ones(norms)}
    text = str(
        inspect_lokr_file(factors("lycoris_0", 2, alpha=torch.tensor(3.0), **more), linear())
    )
    kind = {(32, 1): ", norms of rows", (1, 32): ", norms of columns", None: ""}[norms]
    assert text.splitlines()[-1] == f"  0 <- 0: 4x4 (x) 8x2·2x8, rank 2{kind}, scale 1.5"


WRITERS = [
    ({"ss_network_module": "x", "software": "ai-toolkit"}, ["transformer"], "sd-scripts with x"),
    ({"software": '{"name": "ai-toolkit"}'}, ["transformer"], "ai-toolkit"),
    ({"ot_branch": "main", "title": "x"}, ["transformer"], "OneTrainer"),
    ({"lora_adapter_metadata": "{}"}, ["lycoris"], "diffusers"),
    ({"title": "x"}, ["lycoris", "x"], "LyCORIS (or SimpleTuner, ai-toolkit)"),
    ({}, ["lora_transformer"], "OneTrainer"),
    ({}, ["x"], None),
]


@pytest.mark.parametrize(("header", "components", "writer"), WRITERS)
def test_the_writer_of_a_file(header, components, writer):
    """Its header counts more than its keys."""
    assert writer_of(header, components) == writer
    if writer is None:
        assert inspect_lokr_file(factors("0")).file.writer == "an unknown program"


TENSORS = {
    "alpha of two": ("alpha", torch.ones(2)),
    "complex alpha": ("alpha", torch.ones(1, dtype=torch.complex64)),
    "norms of no axis": ("dora_scale", torch.tensor(1.0)),
    "vector": ("lokr_w1_a", torch.ones(4)),
}


@pytest.mark.parametrize("case", TENSORS)
def test_a_tensor_that_has_not_the_form_of_its_name(case):
    name, tensor = TENSORS[case]
    report = inspect_lokr_file({**factors("lycoris_0"), f"lycoris_0.{name}": tensor}, linear())
    assert report.problems == [f"Keys of no LoKr module: 'lycoris_0.{name}'."]


def test_tensors_of_the_least_form():
    more = {"alpha": torch.tensor([6.0]), "dora_scale": torch.ones(32)}
    model = linear()
    assert load_lokr_file(model, factors("lycoris_0", 2, **more)).fits
    assert model[0].scaling["default"] == 3


def test_keys_are_names():
    with pytest.raises(TypeError, match="`file` must hold tensors by key; 5 has Tensor"):
        inspect_lokr_file({**factors("0"), 5: torch.ones(1)})


@pytest.mark.parametrize("is_trainable", [None, True, False])
def test_a_loaded_adapter_is_frozen_unless_it_is_to_be_trained(is_trainable):
    """It is not drawn at random first."""
    model, tensors, state = linear(), factors("lycoris_0"), torch.get_rng_state()
    options = {} if is_trainable is None else {"is_trainable": is_trainable}
    load_lokr_file(model, tensors, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert model[0].lokr_w1["default"].requires_grad == bool(is_trainable)
    assert model.peft_config["default"].inference_mode != bool(is_trainable)
    assert not hasattr(model, "_hf_peft_config_loaded")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"adapter_name": 5}, TypeError, "is named by one string"),
        ({"is_trainable": "yes"}, TypeError, "`is_trainable`='yes'"),
        ({"ignore_unplaced": "no"}, TypeError, "`ignore_unplaced`='no'"),
    ],
)
def test_arguments_are_checked_before_anything_is_read(options, error, message):
    model, tensors = linear(), {**factors("lycoris_0"), "x": torch.ones(1)}
    before = snapshot(model)
    with pytest.raises(error, match=message):
        load_lokr_file(model, tensors, **options)
    assert_unchanged(before, model)


def test_a_model_is_needed_to_load():
    with pytest.raises(TypeError, match="`inspect_lokr_file` needs none"):
        load_lokr_file(None, factors("lycoris_0"))


def test_the_component_that_fits_best_is_shown():
    tensors = {**factors("lora_te1_0"), **factors("lora_te1_9"), **factors("lora_te2_9")}
    report = inspect_lokr_file(tensors, linear())
    text = "Modules that fit: 'lora_te1' (1 of 2), 'lora_te2' (0 of 1)."
    assert report.problems == [
        f"Several components could be meant; pass `component`. {text}",
        "The model has no layer that '9' names.",
    ]


def test_a_config_counts_for_the_file_that_it_was_saved_with(tmp_path):
    """By its name, or in its header, where pipelines put a component before each field."""
    source, _ = own(tmp_path, r=16, alpha=8)
    source.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "other.safetensors")
    fields = {f"transformer.{name}": value for name, value in (("r", 16), ("alpha", 4))}
    header = {"lora_adapter_metadata": json.dumps(fields)}
    save_file(tensors, tmp_path / "header.safetensors", header)
    for name, scale in (("adapter_model", 0.5), ("other", 1.0), ("header", 0.25)):
        model = linear()
        load_lokr_file(model, tmp_path / f"{name}.safetensors")
        assert model[0].scaling["default"] == scale, name


def test_a_file_as_config_and_tensors():
    tensors = {**factors("unet.mid_block.a", 2), **factors("unet.b", 2), **factors("vae.c", 2)}
    model = nn.ModuleDict({"b": nn.Linear(32, 32), "mid_block": nn.ModuleDict({"a": linear()[0]})})
    for config, state in (
        read_lokr_adapter({k: t for k, t in tensors.items() if "unet" in k}),
        read_lokr_adapter({k: t for k, t in tensors.items() if "unet" in k}, model),
    ):
        assert set(config.target_modules) == {"b", "mid_block.a"} or config.target_modules == {
            "a",
            "b",
        }
        assert {key.removeprefix("base_model.model.") for key in state} == {
            key.removeprefix("unet.") for key in tensors if "unet" in key
        }
        for key, tensor in state.items():
            assert torch.equal(tensor, tensors["unet." + key.removeprefix("base_model.model.")])
    two = {**factors("lora_te1_0"), **factors("lora_te2_0"), **factors("lora_te2_1")}
    with pytest.raises(ValueError, match="pass `component`, one of 'lora_te1', 'lora_te2'"):
        read_lokr_adapter(two)
    config, state = read_lokr_adapter(two, component="lora_te2")
    assert set(config.target_modules) == {"0", "1"} and len(state) == 4
    with pytest.raises(ValueError, match="has `_` for dots in names of modules .'a_b'"):
        read_lokr_adapter(factors("lycoris_a_b"))


@pytest.mark.parametrize("layout", ["kohya", "lycoris"])
def test_the_header_of_a_written_file(layout, tmp_path):
    model, path = own(tmp_path)
    save_lokr_file(model, path, layout, metadata={"title": "x"})
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert header.pop("format") == "pt"
    kohya = {"ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "lokr"}'}
    assert header == {"title": "x", **(kohya if layout == "kohya" else {})}


@pytest.mark.parametrize("layout", ["lycoris", "diffusers"])
@pytest.mark.parametrize(
    "fields",
    [{"r": 2, "alpha": 5, "use_rslora": True}, {"r": 2, "alpha": 4}, {"r": 16, "alpha": 32}],
    ids=["square root", "two", "full"],
)
def test_a_written_scale_is_the_readers(layout, fields, tmp_path):
    """Alpha over the rank, or in `W1` where the reader has no alpha, or the factors are full."""
    model, path = own(tmp_path, **fields)
    save_lokr_file(model, path, layout)
    again = linear()
    load_lokr_file(again, path)
    tensors = {key.rpartition(".")[2]: tensor for key, tensor in load_file(path).items()}
    w2 = tensors["lokr_w2"] if "lokr_w2" in tensors else tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]
    scale = 1.0
    if layout == "lycoris" and fields["r"] == 2:
        scale = float(tensors["alpha"]) / 2
    expected = model.base_model.model[0].get_delta_weight("default")
    torch.testing.assert_close(scale * torch.kron(tensors["lokr_w1"], w2), expected)
    torch.testing.assert_close(again[0].get_delta_weight("default"), expected)


def test_a_file_without_a_prefix(tmp_path):
    model, path = own(tmp_path)
    keys = save_lokr_file(model, path, component="")
    assert keys == ["0.alpha", "0.lokr_w1", "0.lokr_w2"]
    assert load_lokr_file(linear(), path).fits


@pytest.mark.parametrize("by_rows", [True, False])
def test_norms_are_written_in_the_form_of_the_weight(by_rows, tmp_path):
    base = nn.Sequential(nn.Linear(8, 16), nn.Conv2d(8, 16, 3))
    config = LoKrConfig(r=2, target_modules=["0", "1"], weight_decompose=True, wd_on_output=by_rows)
    save_lokr_file(get_peft_model(base, config), tmp_path / "lokr.safetensors")
    tensors = load_file(tmp_path / "lokr.safetensors")
    shapes = [tuple(tensors[f"lycoris_{i}.dora_scale"].shape) for i in (0, 1)]
    assert shapes == ([(16, 1), (16, 1, 1, 1)] if by_rows else [(1, 8), (1, 8, 1, 1)])


def test_an_alpha_that_nobody_reads_may_leave_half_precision(tmp_path):
    """It means "no scale" there too."""
    model = linear()
    load_lokr_file(model, factors("lycoris_0", alpha=torch.tensor(1e10)))
    save_lokr_file(model, tmp_path / "lokr.safetensors", dtype=torch.float16)
    again = linear()
    load_lokr_file(again, tmp_path / "lokr.safetensors")
    expected = model[0].get_delta_weight("default")
    torch.testing.assert_close(again[0].get_delta_weight("default"), expected, atol=0.01, rtol=0.01)


def test_tokens_beside_the_layers_are_not_written(tmp_path):
    base = nn.ModuleDict({"embed": nn.Embedding(8, 4), "0": nn.Linear(8, 8)})
    config = LoKrConfig(target_modules=["0"], trainable_token_indices={"embed": [1]})
    with pytest.raises(NotImplementedError, match="has `trainable_token_indices`"):
        save_lokr_file(get_peft_model(base, config), tmp_path / "lokr.safetensors")
    assert not any(tmp_path.iterdir())


def targets(model, **settings):
    return sorted(lokr_config_from_lycoris(model, settings).target_modules)


def test_names_in_a_preset():
    """A name means itself, whatever signs are in it; any of several leaves a module out."""
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("a+b", "aab", "c")})
    assert targets(model, apply_preset={"target_name": ["a+b"], "use_fnmatch": True}) == ["a+b"]
    assert targets(model, apply_preset={"target_name": ["a+b"]}) == ["a+b", "aab"]
    preset = {"target_module": ["Linear"], "exclude_name": ["c", "aab"]}
    assert targets(model, algo="kron", apply_preset=preset) == ["a+b"]


def test_a_kernel_counts_by_its_first_size():
    model = nn.Sequential(nn.Conv2d(8, 8, (1, 3)), nn.Conv2d(8, 8, (3, 1)), nn.Conv2d(8, 8, (2, 1)))
    config = lokr_config_from_lycoris(model, {"linear_dim": 1, "conv_dim": 2})
    adapted = get_peft_model(model, config).base_model.model
    assert [adapted[i].r["default"] for i in range(3)] == [1, 2, 2]
