# SPDX-License-Identifier: Apache-2.0
"""What a config accepts can be saved, and values that ask for nothing are accepted, as other
writers put them into files.
"""

import contextlib
import dataclasses
import enum
import itertools
import json
import random
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PeftError,
    PolyConfig,
    RoutedConfig,
    VBLoRAConfig,
    get_peft_model,
)
from peft.base.field_help import add_field_help

TARGETED = {
    "exclude_modules": [None, [], ""],
    "modules_to_save": [None, []],
    "inference_mode": [None],
    "auto_mapping": [None, {}],
}
LAYERED = {**TARGETED, "layers_to_transform": [None, []], "layers_pattern": [None, [], ""]}
LYCORIS = {
    **LAYERED,
    **{key: [None, {}] for key in ("rank_pattern", "alpha_pattern")},
    **{
        key: [None]
        for key in ("rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights")
    },
}
NEUTRAL = {
    LoraConfig: {
        **LAYERED,
        **{
            key: [None, {}]
            for key in (
                "rank_pattern",
                "alpha_pattern",
                "loftq_config",
                "runtime_config",
                "megatron_config",
            )
        },
        **{
            key: [None, {}]
            for key in (
                "eva_config",
                "corda_config",
                "lora_ga_config",
                "velora_config",
                "monteclora_config",
            )
        },
        **{key: [None, {}, False] for key in ("use_bdlora", "arrow_config", "kasa_config")},
        **{
            key: [None, []]
            for key in ("target_parameters", "layer_replication", "alora_invocation_tokens")
        },
        **{
            key: [None]
            for key in (
                "fan_in_fan_out",
                "use_rslora",
                "use_dora",
                "lora_bias",
                "use_qalora",
                "init_lora_weights",
            )
        },
        "trainable_token_indices": [None, [], {}],
        "ensure_weight_tying": [None, True],  # nothing is tied in the model below
        "megatron_core": [None, "elsewhere"],
        "qalora_group_size": [None, 8],
        "lora_dropout": [None],
    },
    LoHaConfig: LYCORIS,
    LoKrConfig: {**LYCORIS, "decompose_both": [None], "rank_dropout_scale": [None]},
    VBLoRAConfig: {
        **LAYERED,
        **{key: [None] for key in ("save_only_topk_weights", "fan_in_fan_out", "vblora_dropout")},
    },
    PolyConfig: {**TARGETED, "init_weights": [None]},
}


@pytest.mark.parametrize("config_cls", NEUTRAL, ids=lambda cls: cls.__name__)
def test_values_that_ask_for_nothing(config_cls, tmp_path):
    """The adapter of a file that says nothing with a value is that of a file that does not mention
    the field.
    """
    sizes = (
        {"num_vectors": 8, "vector_length": 4, "r": 2} if config_cls is VBLoRAConfig else {"r": 2}
    )
    written = {
        **config_cls(target_modules=["0", "2"], **sizes).to_dict(),
        "target_modules": ["0", "2"],
    }
    file = tmp_path / "adapter_config.json"

    def shapes(content):
        file.write_text(json.dumps({**content, "peft_type": config_cls().peft_type.value}))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            config = PeftConfig.from_pretrained(tmp_path)
            model = get_peft_model(
                nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), config
            )
        model.save_pretrained(tmp_path / "again")
        return [(name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()]

    for name, values in NEUTRAL[config_cls].items():
        for value in values:
            missing = {key: v for key, v in written.items() if key != name}
            assert shapes({**missing, name: value}) == shapes(missing), (name, value)


def test_layer_indices_that_name_none_limit_nothing():
    base = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    base.forward = lambda x: x
    for fields in ({"layers_pattern": "layers"}, {}):
        for config_cls in (LoraConfig, LoKrConfig):
            config = config_cls(target_modules=["0", "1"], layers_to_transform=[], **fields)
            assert get_peft_model(base, config).targeted_module_names == ["layers.0", "layers.1"]
    assert (
        LoraConfig(target_modules=".*0", layers_to_transform=[], layers_pattern=[]).target_modules
        == ".*0"
    )


def test_settings_of_a_start_that_is_not_used():
    with pytest.warns(
        UserWarning,
        match="`eva_config` is ignored, since `init_lora_weights` is True and not 'eva'",
    ):
        assert LoraConfig(eva_config={"rho": 2.0}).eva_config is None
    with pytest.warns(UserWarning, match="`loftq_config` is ignored"):
        assert LoraConfig(loftq_config={"loftq_bits": 4}).loftq_config == {}


def test_tied_weights_are_not_adapted_apart():
    model = nn.ModuleDict({"table": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
    model.forward = lambda ids: model["head"](model["table"](ids))
    model["head"].weight = model["table"].weight
    config = LoraConfig(target_modules=["head"], modules_to_save=[], ensure_weight_tying=False)
    with pytest.warns(UserWarning, match="`head` shares a weight with `table`"):
        get_peft_model(model, config)


def test_fields_of_newer_writers():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoraConfig.from_peft_type(
            peft_type="LORA", use_this=False, with_that=None, those=[], rate=0.0
        )
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['use_this'\]"):
        LoraConfig.from_peft_type(peft_type="LORA", use_this=True, with_that=None)


class Bias(enum.Enum):
    NONE = "none"


class Rank(enum.IntEnum):
    TWO = 2


ODD = [
    (LoraConfig, {"base_model_name_or_path": Path("a") / "b"}, {"base_model_name_or_path": "a/b"}),
    (LoraConfig, {"r": np.int64(2), "lora_alpha": np.float32(4)}, {"r": 2, "lora_alpha": 4.0}),
    (LoraConfig, {"r": torch.tensor(2), "bias": Bias.NONE}, {"r": 2, "bias": "none"}),
    (
        LoraConfig,
        {"layers_to_transform": range(2), "layers_pattern": "0"},
        {"layers_to_transform": [0, 1], "layers_pattern": "0"},
    ),
    (LoraConfig, {"use_rslora": np.bool_(True)}, {"use_rslora": True}),
    (
        LoraConfig,
        {"trainable_token_indices": np.array([1, 2])},
        {"trainable_token_indices": [1, 2]},
    ),
    (LoraConfig, {"rank_pattern": {"0": np.int32(3)}}, {"rank_pattern": {"0": 3}}),
    (LoraConfig, {"target_modules": {"0": 1}.keys()}, {"target_modules": ["0"]}),
    (LoraConfig, {"modules_to_save": frozenset({"head"})}, {"modules_to_save": ["head"]}),
    (
        LoKrConfig,
        {"r": Rank.TWO, "factor_pattern": {"0": (2, 4)}},
        {"r": 2, "factor_pattern": {"0": [2, 4]}},
    ),
    (
        VBLoRAConfig,
        {"topk_weights_dtype": torch.float16, "bank": Path("x")},
        {"topk_weights_dtype": "float16", "bank": "x"},
    ),
    (
        PolyConfig,
        {"task_names": np.array(["a", "b"]), "n_tasks": 2},
        {"task_names": ["a", "b"], "n_tasks": 2},
    ),
    (
        LoraConfig,
        {"auto_mapping": {"where": Path("m"), "kind": torch.bfloat16}},
        {"auto_mapping": {"where": "m", "kind": "bfloat16"}},
    ),
]


@pytest.mark.parametrize(("config_cls", "given", "plain"), ODD, ids=lambda value: str(value)[:40])
def test_what_is_accepted_can_be_saved(config_cls, given, plain, tmp_path):
    config_cls(**given).save_pretrained(tmp_path / "given")
    config_cls(**plain).save_pretrained(tmp_path / "plain")
    texts = [(tmp_path / name / "adapter_config.json").read_text() for name in ("given", "plain")]
    assert json.loads(texts[0]) == json.loads(texts[1])
    assert PeftConfig.from_pretrained(tmp_path / "given") == config_cls(**plain)


def test_a_path_set_later_is_saved(tmp_path):
    base = nn.Sequential(nn.Linear(4, 4))
    base.name_or_path = Path("where") / "ever"
    model = get_peft_model(base, LoKrConfig(target_modules=["0"]))
    model.peft_config["default"].revision = Path("main")  # as clients set fields of a live config
    model.save_pretrained(tmp_path)
    read = PeftConfig.from_pretrained(tmp_path)
    assert (read.base_model_name_or_path, read.revision) == ("where/ever", "main")


@pytest.mark.parametrize(
    ("config_cls", "fields", "name"),
    [
        (LoraConfig, {"base_model_name_or_path": nn.Linear(2, 2)}, "base_model_name_or_path"),
        (LoKrConfig, {"auto_mapping": {"a": object()}}, "auto_mapping"),
        (PolyConfig, {"revision": 3}, "revision"),
        (VBLoRAConfig, {"modules_to_save": [b"head"]}, "modules_to_save"),
    ],
)
def test_what_can_not_be_saved_is_refused_at_once(config_cls, fields, name):
    with pytest.raises(ValueError, match=f"{config_cls.__name__}: `{name}`"):
        config_cls(**fields)


ODD = ("x", "1", ["2"], [], {}, {"x": 1}, {"x": "input"}, -1, 0, 3, 1.5, True, None, float("nan"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config_cls", [*NEUTRAL, RoutedConfig], ids=lambda cls: cls.__name__)
def test_two_odd_values_are_refused_as_one_is(config_cls):
    """A check of two fields together must not be the first that sees an odd value."""
    names = [item.name for item in dataclasses.fields(config_cls) if item.init]
    chance = random.Random(0)
    for pair in itertools.combinations(names, 2):
        for _ in range(2):
            fields = {name: chance.choice(ODD) for name in pair}
            with contextlib.suppress(PeftError):
                config_cls(**fields)


@pytest.mark.parametrize("config_cls", NEUTRAL, ids=lambda cls: cls.__name__)
def test_fields_have_their_documentation_as_help(config_cls):
    """Command lines show the entry that a field has in a docstring's `Args`."""
    docstrings = " ".join(" ".join(cls.__doc__.split()) for cls in config_cls.__mro__[:-1])
    for item in dataclasses.fields(config_cls):
        text = item.metadata["help"]
        assert text, item.name
        assert re.search(rf"\b{item.name}(, \w+)*: {re.escape(text)}", docstrings), item.name


def test_help_that_a_field_states_is_kept():
    """A class can say something else than its docstring; other metadata stay."""

    @dataclasses.dataclass
    class Described:
        """A config.

        Args:
            kept: Not this.
            share (float): Half of
                the rows.
        """

        kept: int = dataclasses.field(default=1, metadata={"help": "This."})
        share: float = dataclasses.field(default=0.5, metadata={"unit": "rows"})
        bare: int = 0

    add_field_help(Described)
    kept, share, bare = dataclasses.fields(Described)
    assert kept.metadata == {"help": "This."}
    assert share.metadata == {"help": "Half of the rows.", "unit": "rows"}
    assert not bare.metadata
