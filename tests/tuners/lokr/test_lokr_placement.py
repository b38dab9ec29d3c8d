# SPDX-License-Identifier: Apache-2.0
"""Which layers a LoKr file's modules are, and which config they make: names, fused layers, norms,
ranks and scales that are almost right.
"""

import pytest
import torch
from helpers.states import assert_unchanged, snapshot
from torch import nn

from peft import LoKrConfig, get_peft_model, inspect_lokr_file, load_lokr_file
from peft.tuners.lokr.files.file_module import FileModule
from peft.tuners.lokr.files.fused_layers import Piece, join, split
from peft.tuners.lokr.files.keys import split_stem
from peft.tuners.lokr.files.original_names import original_names

pytestmark = pytest.mark.quick


def module(**factors):
    return FileModule("q", "", False, factors)


def two_sides(name, out=8, columns=8, a=2, b=2, **more):
    tensors = {"lokr_w1": torch.randn(a, b), "lokr_w2": torch.randn(out // a, columns // b), **more}
    return {f"{name}.{end}": tensor for end, tensor in tensors.items()}


def low_rank(name, r=1, out=8, columns=8, **more):
    tensors = {
        "lokr_w1": torch.randn(2, 2),
        "lokr_w2_a": torch.randn(out // 2, r),
        "lokr_w2_b": torch.randn(r, columns // 2),
        **more,
    }
    return {f"{name}.{end}": tensor for end, tensor in tensors.items()}


def nest(layers):
    """Modules by dotted path."""
    model = nn.Module()
    for path, layer in layers.items():
        parent, names = model, path.split(".")
        for name in names[:-1]:
            if name not in parent._modules:
                parent.add_module(name, nn.Module())
            parent = parent._modules[name]
        parent.add_module(names[-1], layer)
    return model


def refused(model, tensors, message):
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_lokr_file(model, tensors)
    assert_unchanged(before, model)


def test_words_and_scales_of_a_module():
    both = module(
        w1_a=torch.ones(4, 2),
        w1_b=torch.ones(2, 3),
        t2=torch.ones(2, 2, 3, 3),
        w2_a=torch.ones(2, 8),
        w2_b=torch.ones(2, 5),
    )
    assert both.describe() == "4x2·2x3 (x) 2x8·2x2x3x3·2x5"
    assert both.rows((3, 3)) == 32
    for alpha, scale in ((None, 1.0), (5.0, 2.5), (0.0, 0.0), (9.9e8, 4.95e8), (1e9, 1.0)):
        both.alpha = alpha
        assert both.scale == scale
    left = module(w1_a=torch.ones(4, 3), w1_b=torch.ones(3, 4), w2=torch.ones(2, 2))
    left.alpha = 6.0
    assert (left.rank, left.scale, left.left, left.right) == (3, 2.0, "w1_a", ("w2", 0))


def test_a_prefix_with_dots_is_part_of_the_path():
    assert split_stem("lycoris_a.b") == ("", "lycoris_a.b", False)
    assert split_stem("lycoris_a_b") == ("lycoris", "a_b", True)


# Pieces of a fused layer


def test_pieces_that_are_no_kronecker_product():
    w1, w2 = torch.randn(6, 2), torch.randn(4, 2)
    sizes = [8, 8, 8]
    whole = module(w1=w1, w2=w2)
    whole.alpha = 2.0

    def pieces():
        return split(whole, sizes, ())

    assert torch.equal(join(pieces(), sizes, ()).factors["w1"], w1)
    assert [piece.row_offset for piece in pieces()] == [None] * 3
    low = module(w1=w1, w2_a=torch.randn(4, 1), w2_b=torch.randn(1, 2))
    other = split(low, sizes, ())
    other[2].module.alpha = 3.0  # another scale
    assert join(other, sizes, ()) is None
    other = pieces()
    other[1].module.factors = {**other[1].module.factors, "t2": w2}
    assert join(other, sizes, ()) is None
    for number, rows in ((0, w1[:1]), (2, w1[:3])):  # too few, too many
        other = pieces()
        other[number].module.factors["w1"] = rows
        assert join(other, sizes, ()) is None
    for number, offset in ((0, 4), (1, 1)):  # before the first row, across blocks
        other = pieces()
        other[number].row_offset = offset
        assert join(other, sizes, ()) is None
    assert join(pieces(), [8, 8, 7], ()) is None
    same = [Piece(module(w1=w1, w2=torch.randn(4, 2))) for _ in range(2)]
    assert join(same, [24, 24], ()) is None
    row = [Piece(module(w1=w1[:1], w2=torch.randn(4, 2))) for _ in range(2)]
    joined = join(row, [4, 4], ())
    assert torch.equal(joined.factors["w2"], torch.cat([p.module.factors["w2"] for p in row]))
    row[1].row_offset = 1
    assert join(row, [4, 4], ()) is None


def test_rows_that_two_pieces_share_have_to_be_the_same():
    w1 = torch.randn(4, 2)
    whole = module(w1=w1, w2=torch.randn(4, 2))
    parts = split(whole, [6, 10], ())
    assert [part.row_offset for part in parts] == [0, 2]
    assert torch.equal(join(parts, [6, 10], ()).factors["w1"], w1)
    parts[1].module.factors["w1"][0] += 1
    assert join(parts, [6, 10], ()) is None


def attention(**layers):
    return nest({f"attn.{name}": layer for name, layer in layers.items()})


def test_fused_layers_that_differ():
    linear = nn.Linear
    model = attention(to_q=linear(8, 8), to_k=linear(8, 8), to_v=linear(6, 8))
    tensors = two_sides("diffusion_model.attn.qkv", 24)
    refused(model, tensors, "layers `attn.to_q`, `attn.to_k`, `attn.to_v` differ in their inputs")


@pytest.mark.parametrize("a", [2, 3])
def test_fused_layers_in_groups(a):
    """Rows of a larger product would be those of other groups."""
    convs = {f"to_{name}": nn.Conv1d(8, 8, 1, groups=2) for name in "qkv"}
    model = attention(**convs)
    tensors = two_sides("diffusion_model.attn.qkv", 24, 4, a)
    if a == 2:
        refused(model, tensors, "a layer in groups can't take its rows of a larger product")
    else:
        assert load_lokr_file(model, tensors).fits


def test_a_part_of_a_fused_layer_is_missing():
    model = attention(qkv=nn.Linear(8, 24))
    tensors = {**two_sides("transformer.attn.to_q"), **two_sides("transformer.attn.to_k")}
    refused(model, tensors, "'attn.to_q', 'attn.to_k' are one layer in the model, `attn.qkv`")


def test_a_report_says_which_rows_a_layer_takes():
    model = attention(**{f"to_{name}": nn.Linear(8, 8) for name in "qkv"})
    report = inspect_lokr_file(two_sides("diffusion_model.attn.qkv", 24), model)
    ends = [line.partition(": ")[2] for line in str(report).splitlines()[2:]]
    assert ends == [
        "1x2 (x) 12x4, rows from 0 on, scale 1",
        "2x2 (x) 12x4, rows from 8 on, scale 1",
        "1x2 (x) 12x4, rows from 4 on, scale 1",
    ]


# Names


@pytest.mark.parametrize(
    "name", ["transformer.attn.to_out", "transformer.attn.out", "lycoris_attn_out"]
)
def test_the_first_of_a_list_has_the_lists_name(name):
    model = attention(**{"to_out.0": nn.Linear(8, 8), "to_out.1": nn.Linear(8, 8)})
    report = inspect_lokr_file(two_sides(name), model)
    assert [placed.path for placed in report.placement.placed] == ["attn.to_out.0"]


@pytest.mark.parametrize("tower", ["vision_model.", ""])
def test_towers_of_clip(tower):
    model = nest({f"{tower}encoder.layers.0.fc1": nn.Linear(8, 8)})
    for name in ("vision_model.encoder.layers.0.fc1", "encoder.layers.0.fc1"):
        assert inspect_lokr_file(two_sides(f"text_encoder.{name}"), model).fits


def test_a_name_of_two_fused_layers():
    layers = {f"{p}.to_{n}": nn.Linear(8, 8) for p in ("a.b", "a_b") for n in "qkv"}
    meant = ", ".join("+".join(f"`{p}.to_{n}`" for n in "qkv") for p in ("a.b", "a_b"))
    refused(nest(layers), two_sides("lycoris_a_b_qkv", 24), f"can mean {meant}".replace("+", r"\+"))


@pytest.mark.parametrize("attends", [True, False])
def test_an_upsampler_comes_last_in_its_block(attends):
    paths = {"up_blocks.0.resnets.0.conv1", "up_blocks.0.upsamplers.0.conv"}
    paths |= {"up_blocks.0.attentions.0.proj_in"} if attends else set()
    upsampler = f"output_blocks.0.{2 if attends else 1}.conv"
    assert original_names(paths)[upsampler] == ("up_blocks.0.upsamplers.0.conv",)
    assert original_names(paths)["output_blocks.0.0.in_layers.2"] == (
        "up_blocks.0.resnets.0.conv1",
    )


# Tensors and numbers


def test_a_scalar_beside_no_first_factor():
    tensors = {"lycoris_0.lokr_w2": torch.ones(4, 4), "lycoris_0.scalar": torch.tensor(2.0)}
    refused(nn.Sequential(nn.Linear(8, 8)), tensors, "tensors w2 are not those of one adapter")


def test_a_core_beside_a_linear_layers_factors():
    more = {"lokr_w2_a": torch.ones(1, 4), "lokr_t2": torch.ones(1, 1, 1, 1)}
    assert not inspect_lokr_file(low_rank("lycoris_0", **more), nn.Sequential(nn.Linear(8, 8))).fits


@pytest.mark.parametrize("shape", [(8, 8), (2, 4), (8, 2), (1, 1)])
def test_norms_are_one_for_each_row_or_column(shape):
    tensors = two_sides("lycoris_0", dora_scale=torch.ones(shape))
    refused(nn.Sequential(nn.Linear(8, 8)), tensors, "dora_scale is of shape")


def test_the_config_of_several_layers():
    """Ranks of full factors are alpha, where it can be one."""
    layers = [nn.Linear(8, 8) for _ in range(6)] + [nn.Conv2d(8, 8, 3)]
    core = {
        "lokr_w2_a": torch.randn(1, 4),
        "lokr_w2_b": torch.randn(1, 4),
        "lokr_t2": torch.randn(1, 1, 3, 3),
    }
    both = {"lokr_w1_a": torch.randn(2, 1), "lokr_w1_b": torch.randn(1, 2)}
    tensors = {
        **two_sides("lycoris_0"),
        **two_sides("lycoris_1", alpha=torch.tensor(3.0)),
        **two_sides("lycoris_2", alpha=torch.tensor(0.5)),
        **low_rank("lycoris_3", alpha=torch.tensor(2.0)),
        **low_rank("lycoris_4", 2, alpha=torch.tensor(2.5)),
        **low_rank("lycoris_5", **both),
        **low_rank("lycoris_6", **core),
    }
    del tensors["lycoris_5.lokr_w1"]
    model = nn.Sequential(*layers)
    config = load_lokr_file(model, tensors).config
    assert [model[i].r["default"] for i in range(7)] == [1, 3, 1, 1, 2, 1, 1]
    assert [model[i].alpha["default"] for i in range(7)] == [1, 3, 1, 2, 2.5, 1, 1]
    assert type(config.alpha) is int and type(config.alpha_pattern["3"]) is int
    assert [model[i].scaling["default"] for i in range(7)] == [1, 1, 1, 2, 1.25, 1, 1]
    assert config.decompose_both and config.use_effective_conv2d and not config.full_matrix
    assert not config.weight_decompose


@pytest.mark.parametrize("fields", [{"full_matrix": True}, {"use_rslora": True}, {}])
def test_a_saved_config_alone_gives_the_scale(fields, tmp_path):
    """`alpha / r`, `alpha / √r`, or 1 where no rank is used."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 32))
    config = LoKrConfig(r=2, alpha=6, target_modules=["0"], init_weights=False, **fields)
    model, x = get_peft_model(base, config), torch.randn(3, 32)
    expected = model(x)
    model.save_pretrained(tmp_path)
    plain = model.unload()
    load_lokr_file(plain, tmp_path)
    torch.testing.assert_close(plain(x), expected)
    scale = {"full_matrix": 1.0, "use_rslora": 6 / 2**0.5}.get(next(iter(fields), ""), 3.0)
    assert plain[0].scaling["default"] == pytest.approx(scale)
