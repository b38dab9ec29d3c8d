# SPDX-License-Identifier: Apache-2.0
"""Names and numbers in a config that mean nothing in the model: said one by one, with what was
probably meant; not said of files.
"""

import copy
import re
import warnings

import pytest
import torch
from helpers.methods import METHODS
from helpers.models import TARGETS, llama, mlp
from torch import nn

import peft
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model, plan
from peft.tuners.tuners_utils import BaseTunerLayer

NAMES = ("q_proj", "k_proj", "v_proj", "out_proj")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({name: nn.Linear(8, 8) for name in NAMES})


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(10, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 8)


def said(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [
        str(warning.message)
        for warning in caught
        if issubclass(warning.category, (peft.PeftWarning, RuntimeWarning))
    ]


# What a config says beside one good target, and the one message it earns.
SLIPS = {
    "list": ({"target_modules": ["q_proj", "vproj"]}, "`target_modules` names 'vproj' (did you mean 'v_proj'?)"),
    "what is left": ({"target_modules": ["q_proj", "vproj"]}, "it adapts 'q_proj' only"),
    "path": ({"target_modules": ["q_proj", "atn.v_proj"]}, "'atn.v_proj' (did you mean 'attn.v_proj'?)"),
    "case": ({"target_modules": ["q_proj", "V_Proj"]}, "'V_Proj' (did you mean 'v_proj'?)"),
    "nothing like it": ({"target_modules": ["q_proj", "fused"]}, "names 'fused': the model has no such module"),
    "expression": ({"target_modules": r".*\.(q_proj|vproj)"}, "'vproj' (did you mean 'v_proj'?)"),
    "expression with dots": ({"target_modules": r".*(?:attn\.q_proj|atn\.v_proj)$"}, "'atn.v_proj' (did you mean 'attn.v_proj'?)"),
    "excluded": ({"target_modules": "all-linear", "exclude_modules": ["head", "outproj"]}, "'outproj' (did you mean 'out_proj'?)"),
    "none excluded": ({"target_modules": ["q_proj"], "exclude_modules": ["heads"]}, "'heads' (did you mean 'head'?)"),
    "trained whole": ({"target_modules": ["q_proj"], "modules_to_save": ["haed"]}, "`modules_to_save` names 'haed' (did you mean 'head'?)"),
    "not there": ({"target_modules": ["q_proj"], "modules_to_save": ["nope"]}, "'nope': the model has no such module. Its outermost modules are 'embed_tokens', 'layers', 'head'."),
}  # fmt: skip
LAYERED = {
    "layer": ({"layers_to_transform": [1, 2], "layers_pattern": "layers"}, "`layers_to_transform` names [2]; the model has targeted modules in layers 0 to 1"),
    "one layer": ({"layers_to_transform": [1, 5, 6], "layers_pattern": ["layers"]}, "names [5, 6]"),
    "list of layers": ({"layers_to_transform": 0, "layers_pattern": ["layers", "h"]}, "`layers_pattern` names 'h'"),
    "rank": ({"rank_pattern": {"qproj": 1}}, "`rank_pattern` has keys that did not match any targeted module and are ignored: 'qproj' (did you"),
    "alpha": ({"alpha_pattern": {"layers.0.q_proj": 1}}, "'layers.0.q_proj' (did you mean 'layers.0.attn.q_proj'?)"),
}  # fmt: skip


@pytest.mark.parametrize("slip", [*SLIPS, *LAYERED])
def test_a_slip_beside_what_is_right_is_named(slip):
    fields, message = SLIPS.get(slip) or LAYERED[slip]
    for method in ("LORA", "POLY") if slip in SLIPS else ("LORA", "LOKR"):
        config = METHODS[method].config(**{"target_modules": ["q_proj"], **fields})
        for call in (plan, get_peft_model):
            _, messages = said(lambda call=call, config=config: call(Tower(), config))
            assert len(messages) == 1, messages
            assert message in messages[0]


def test_what_is_right_earns_no_word(method):
    rights = [
        {
            "target_modules": ["q_proj", "attn.v_proj", "head"],
            "exclude_modules": ["layers.1.attn.v_proj"],
        },
        {
            "target_modules": r".*\.(q_proj|v_proj|query|self_attention)",
            "modules_to_save": ["head"],
        },
        {"target_modules": "all-linear", "trainable_token_indices": [3]},
        {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"},
    ]
    for fields in rights:
        assert said(lambda fields=fields: get_peft_model(Tower(), method.config(**fields)))[1] == []


def test_defaults_name_what_a_model_may_lack(method, tmp_path, monkeypatch):
    base_cls = type("Vit", (Tower,), {"config": {"model_type": "vit"}})
    config = method.config()
    model, messages = said(lambda: get_peft_model(base_cls(), config))
    assert messages == []
    assert model.peft_config["default"].target_modules == {"q_proj", "v_proj"}
    model.save_pretrained(tmp_path)
    assert said(lambda: PeftModel.from_pretrained(base_cls(), tmp_path))[1] == []
    assert said(lambda: get_peft_model(base_cls(), config))[1] == []


def test_files_earn_no_word(method, tmp_path):
    """Another writer's file may target what only other models have; its tensors say that all of it
    has been found.
    """
    config = method.config(
        target_modules=[*TARGETS, "added_proj"],
        modules_to_save=["4", "other_head"],
        exclude_modules=["text"],
    )
    model, messages = said(lambda: get_peft_model(mlp(), config))
    assert len(messages) == 3
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        state = get_peft_model_state_dict(model)

    def load_another():
        model = PeftModel.from_pretrained(mlp(), tmp_path, is_trainable=True)
        model.load_adapter(tmp_path, "b")

    def as_transformers_loads():
        config = peft.PeftConfig.from_pretrained(tmp_path)
        inject_adapter_in_model(config, mlp(), "a")

    def as_diffusers_loads():
        inject_adapter_in_model(config, mlp(), "a", low_cpu_mem_usage=True, state_dict=state)

    for load in (load_another, as_transformers_loads):
        assert said(load)[1] == []
    assert not any("names" in message for message in said(as_diffusers_loads)[1])


UNFIT = {
    "near": (["qproj"], ["Did you mean 'q_proj'?", "'q_proj' (2x), 'k_proj' (2x), 'v_proj' (2x)", "'lm_head'"]),
    "none near": (["query", "value"], ["'q_proj' (2x), 'k_proj' (2x), 'v_proj' (2x), 'o_proj' (2x), 'gate_proj' (2x)"]),
    "string": ("q_proj,v_proj", ["regular expression for the whole path", "pass a list: ['q_proj', 'v_proj']"]),
    "expression": (r"model\.(qproj|vproj)", ["Did you mean 'q_proj', 'v_proj'?"]),
    "expression in a list": ([".*q_proj"], ["Entries of a list are plain names", "Did you mean 'q_proj'?"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNFIT)
def test_targets_that_mean_nothing_get_names_that_fit(kind, method):
    targets, sentences = UNFIT[kind]
    with pytest.raises(
        peft.NoMatchingPeftModuleError, match="not found in the base model"
    ) as caught:
        get_peft_model(llama(), method.config(target_modules=targets))
    for sentence in sentences:
        assert sentence in str(caught.value)
    model = llama()
    named = set(re.findall(r"'([\w.]+)' \(\d+x\)", str(caught.value)))
    for name in named:  # each of the names can be taken
        get_peft_model(model, method.config(target_modules=[name])).unload()
    assert all(
        f"'{name}' ({sum(path.endswith(name) for path, _ in model.named_modules())}x)"
        in str(caught.value)
        for name in named
    )


@pytest.mark.parametrize("name", ["out_pro", "q_proj", "in_proj"])
def test_the_parts_of_a_packed_attention_are_not_suggested(name, method):
    """`out_proj` lies inside, and only the whole module can be adapted."""
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "ff": nn.Linear(8, 8)})
    with pytest.raises(peft.NoMatchingPeftModuleError) as caught:
        get_peft_model(base, method.config(target_modules=[name]))
    assert str(caught.value).endswith("Modules that can be adapted are called 'attention', 'ff'.")
    assert "Did you mean" not in str(caught.value)
    _, messages = said(
        lambda: get_peft_model(base, method.config(target_modules=["attention", name]))
    )
    assert len(messages) == 1 and "did you mean" not in messages[0]


def test_other_reasons_why_nothing_is_adapted(method):
    with pytest.raises(
        peft.NoMatchingPeftModuleError, match=r"No modules were targeted .* Did you mean 'q_proj'\?"
    ):
        get_peft_model(
            llama(), method.config(target_modules=["qproj"], modules_to_save=["lm_head"])
        )
    if hasattr(method.config(), "layers_to_transform"):
        with pytest.raises(
            peft.NoMatchingPeftModuleError, match="The model has some in layers 0 to 1"
        ):
            get_peft_model(
                llama(),
                method.config(
                    target_modules=["q_proj"], layers_to_transform=[7], layers_pattern="layers"
                ),
            )


def test_a_second_adapter_is_told_the_same(method):
    model = get_peft_model(mlp(), method.config(target_modules=TARGETS))
    with pytest.warns(peft.PeftWarning, match="names 'fc'"):
        model.add_adapter("b", method.config(target_modules=["0", "fc"]))
    with pytest.raises(peft.NoMatchingPeftModuleError, match="are called '0', '2', '4'"):
        model.add_adapter("c", method.config(target_modules=["fc"]))
    assert [path for path, m in model.named_modules() if isinstance(m, BaseTunerLayer)] == [
        f"base_model.model.{t}" for t in TARGETS
    ]


def test_a_whole_module_is_named_by_the_end_of_any_path():
    """As in the interface: the head of DistilBERT is `pre_classifier` and `classifier`, both of which
    start at random.
    """
    base = torch.nn.Sequential()
    for name in ("lin", "pre_classifier", "classifier"):
        base.add_module(name, torch.nn.Linear(4, 4))
    for options in ({"task_type": "SEQ_CLS"}, {"modules_to_save": ["fier"]}):
        config = peft.LoraConfig(target_modules=["lin"], **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the names are found
            model = peft.get_peft_model(copy.deepcopy(base), config)
        state, root = peft.get_peft_model_state_dict(model), "base_model.model."
        assert {f"{root}pre_classifier.weight", f"{root}classifier.weight"} < state.keys()
