# SPDX-License-Identifier: Apache-2.0
"""LyCORIS's settings as configs: the same modules, ranks and factors as the real library makes of
them.
"""

import pytest
from image_models import MODELS, unet
from lycoris_worker import CASES, PRESET, TARGETS
from safetensors.torch import load_file
from test_lokr_files import written  # noqa: F401
from torch import nn

from peft import LoKrConfig, get_peft_model, lokr_config_from_lycoris

pytest.importorskip("diffusers")


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("kohya")])
def test_settings_make_the_adapter_that_lycoris_makes(written, case):  # noqa: F811
    kind, options = CASES[case]
    preset = (
        PRESET
        if case.endswith("preset")
        else {"target_module": TARGETS[kind], "target_name": TARGETS[f"{kind} names"]}
    )
    model = MODELS[kind][0]()
    config = lokr_config_from_lycoris(model, {"algo": "lokr", **options, "apply_preset": preset})
    adapted = get_peft_model(model, config)
    theirs = load_file(written[0] / f"{case}.safetensors")
    ours = {}
    for path, layer in adapted.base_model.named_tuner_layers():
        stem = f"lycoris_{path.replace('.', '_')}"
        for name, factor in layer.factors("default")._asdict().items():
            if factor is not None:
                ours[f"{stem}.lokr_{name}"] = tuple(factor.shape)
        rank = (
            layer.factors("default").w2_b
            if layer.factors("default").w2_b is not None
            else layer.factors("default").w1_b
        )
        if rank is not None:
            assert layer.base_scaling("default") == pytest.approx(
                float(theirs[f"{stem}.alpha"]) / rank.shape[0]
            )
        else:
            assert layer.base_scaling("default") == (
                pytest.approx(layer.r["default"] ** 0.5) if "rs_lora" in options else 1
            )
    assert ours == {key: tuple(t.shape) for key, t in theirs.items() if "lokr_" in key}


def test_without_a_preset_all_layers_are_adapted():
    config = lokr_config_from_lycoris(unet(), {"linear_dim": 2, "conv_dim": 1})
    model = get_peft_model(unet(), config)
    layers = {path for path, m in unet().named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert {path for path, _ in model.base_model.named_tuner_layers()} == layers
    config = lokr_config_from_lycoris(
        unet(), {"apply_preset": {"target_module": ["ResnetBlock2D"], "enable_conv": False}}
    )
    model = get_peft_model(unet(), config)
    ends = {path.rpartition(".")[2] for path, _ in model.base_model.named_tuner_layers()}
    assert ends == {"time_emb_proj", "conv_shortcut"}


def test_what_is_asked_for_beside_is_refused():
    for settings, error, message in [
        ({"algo": "loha"}, ValueError, "ask for 'loha'; this is for LoKr alone"),
        ({"linear_dimension": 4}, TypeError, "no setting 'linear_dimension'"),
        ({"preset": "attn-mlp"}, TypeError, "must be a dictionary"),
        ({"apply_preset": {"target": ["Linear"]}}, TypeError, "no setting 'target'"),
        (
            {"apply_preset": {"target_name": ["nothing"]}},
            ValueError,
            "mean no linear or convolutional layer",
        ),
    ]:
        with pytest.raises(error, match=message):
            lokr_config_from_lycoris(unet(), settings)
    assert isinstance(lokr_config_from_lycoris(nn.Sequential(nn.Linear(4, 4)), {}), LoKrConfig)
