# SPDX-License-Identifier: Apache-2.0
"""What mistakes are answered with: what is wrong, and what was probably meant or what to do."""

import copy
import pickle
import re

import pytest
import torch
from helpers.methods import METHODS
from helpers.models import TARGETS, mlp
from helpers.states import assert_unchanged, snapshot
from torch import nn

import peft
from peft import (
    LoKrConfig,
    LoraConfig,
    PeftModel,
    PolyConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    plan,
    save_lokr_file,
    set_peft_model_state_dict,
)
from peft.base import missing_attribute
from peft.tuners.lora import CordaConfig, preprocess_corda
from peft.tuners.poly import (
    RoutingWatch,
    TaskCollator,
    TaskSampler,
    metrics_by_task,
    recorded_routing,
    routing_loss,
)
from peft.tuners.vblora import VectorBank
from peft.utils.hotswap import hotswap_adapter


class WithProperty(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    @property
    def broken(self):
        return self.linear.no_such_thing


def test_a_missing_attribute_is_missing_from_the_peft_model(model, monkeypatch):
    with pytest.raises(
        AttributeError,
        match=r"^'PeftModel' object has no attribute 'set_adpter', .* Did you mean 'set_adapter'\?",
    ) as caught:
        model.set_adpter("default")
    assert f"nor has its {type(model.base_model).__name__}, nor has its Sequential" in str(
        caught.value
    )
    assert isinstance(caught.value, peft.PeftError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(
        AttributeError, match=r"^'\w+' object has no attribute 'ad_adapter'.*'add_adapter'"
    ):
        _ = model.base_model.ad_adapter

    def not_now(*args):
        raise AssertionError("a message was made that nobody reads")

    monkeypatch.setattr(missing_attribute, "did_you_mean", not_now)
    assert not hasattr(model, "set_adpter") and getattr(model, "set_adpter", 3) == 3


def test_a_missing_attribute_may_be_another_methods():
    lokr, poly = (
        get_peft_model(mlp(), METHODS[name].config(target_modules=TARGETS))
        for name in ("LOKR", "POLY")
    )
    with pytest.raises(
        AttributeError, match="no attribute 'add_tasks'.*It is for adapters of POLY"
    ):
        lokr.add_tasks(1)
    for model in (lokr, poly):
        with pytest.raises(
            AttributeError, match=r"no attribute 'ad_tasks'.*Did you mean 'add_tasks'\?"
        ):
            model.ad_tasks(1)


def test_an_error_inside_a_property_is_not_taken_for_a_missing_one():
    model = get_peft_model(WithProperty(), LoraConfig(target_modules=["linear"]))
    with pytest.raises(AttributeError, match="'WithProperty' object"):
        _ = model.broken


class Pipeline:
    def __init__(self):
        self.unet, self.vae = mlp(), mlp()


NOT_A_MODEL = {
    "a name": ("gpt2", "got <class 'str'>. Load the model first"),
    "a class": (nn.Linear, "object of the class Linear first"),
    "a pipeline": (Pipeline(), "Pass one of the networks in it: `.unet`, `.vae`."),
}
NOT_A_CONFIG = {
    "the model": (nn.Linear(2, 2), "The model is the first argument"),
    "a class": (LoKrConfig, "Make an object of the class: `LoKrConfig(...)`"),
    "a dictionary": ({"r": 2}, "`peft.get_peft_config` makes one"),
    "a path": ("folder", "`PeftModel.from_pretrained` loads the whole adapter"),
}


@pytest.mark.parametrize("kind", NOT_A_MODEL)
def test_what_is_no_model(kind, tmp_path):
    thing, sentence = NOT_A_MODEL[kind]
    config = LoraConfig(target_modules=["0"])
    get_peft_model(mlp(), config).save_pretrained(tmp_path)
    for call in (
        lambda: get_peft_model(thing, config),
        lambda: get_peft_model(thing, config, mixed=True),
        lambda: plan(thing, config),
        lambda: inject_adapter_in_model(config, thing),
        lambda: PeftModel.from_pretrained(thing, tmp_path),
    ):
        with pytest.raises(peft.PeftError, match=re.escape(sentence)) as caught:
            call()
        assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize("kind", NOT_A_CONFIG)
def test_what_is_no_config(kind):
    thing, sentence = NOT_A_CONFIG[kind]
    model = get_peft_model(mlp(), LoraConfig(target_modules=["0"]))
    for call in (
        lambda: get_peft_model(mlp(), thing),
        lambda: plan(mlp(), thing),
        lambda: inject_adapter_in_model(thing, mlp()),
        lambda: model.add_adapter("b", thing),
        lambda: model.base_model.add_adapter("b", thing),
    ):
        with pytest.raises(TypeError, match=re.escape(sentence)):
            call()


NOT_A_PATH = {
    "nothing": (
        None,
        "a folder's path, or the name of a repository on the Hub, got None. Pass that of the "
        "folder which",
    ),
    "a number": (3, "got 3."),
    "bytes": (b"folder", "got b'folder'."),
    "a list": (["folder"], "got an object of type list."),
    "a config": (
        LoraConfig(),
        "got an object of type LoraConfig. A config is passed as `config=…`",
    ),
    "a model": (nn.Linear(2, 2), "got an object of type Linear. The model is another argument"),
    "an empty string": ("", "The path '' is empty; name the folder, or pass '.'"),
}


@pytest.mark.parametrize("kind", NOT_A_PATH)
def test_what_is_no_path(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    thing, sentence = NOT_A_PATH[kind]
    base, model = mlp(), get_peft_model(mlp(), LoraConfig(target_modules=TARGETS))
    before = snapshot(model)
    config = model.peft_config["default"]
    for call in (
        lambda: PeftModel.from_pretrained(base, thing),
        lambda: PeftModel.from_pretrained(base, thing, config=config),
        lambda: model.load_adapter(thing, "b"),
        lambda: model.load_adapter(thing, "default"),
        lambda: peft.PeftConfig.from_pretrained(thing),
        lambda: peft.AutoPeftModelForCausalLM.from_pretrained(thing, config=config),
        lambda: peft.load_peft_weights(thing),
        lambda: hotswap_adapter(model, thing, "default"),
    ):
        with pytest.raises(peft.PeftError, match=re.escape(sentence)) as caught:
            call()
        assert isinstance(caught.value, TypeError if thing != "" else ValueError)
    for call in (lambda: model.save_pretrained(thing), lambda: config.save_pretrained(thing)):
        with pytest.raises(
            peft.PeftError, match="Expected a folder's path, got " if thing != "" else "is empty"
        ):
            call()
    assert_unchanged(before, model)
    assert not list(tmp_path.iterdir())


def test_names_and_configs_the_wrong_way_round(model, method):
    with pytest.raises(TypeError, match=r"name comes first: `add_adapter\(name, config\)`"):
        model.add_adapter(method.config(target_modules=TARGETS), "b")


def test_another_method_on_the_same_model_needs_a_mixed_model(model, method, tmp_path):
    other = METHODS["LOKR" if method.config_cls is LoraConfig else "LORA"]
    get_peft_model(mlp(), other.config(target_modules=TARGETS)).save_pretrained(tmp_path)
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"different peft types.*`get_peft_model\(model, config, mixed=True\)`"
    ):
        model.add_adapter("b", other.config(target_modules=TARGETS))
    assert_unchanged(before, model)
    with pytest.raises(ValueError, match=r"`PeftMixedModel.from_pretrained`"):
        model.load_adapter(tmp_path, "b")
    with pytest.raises(
        ValueError, match="has an adapter 'default' already; load this one under another name"
    ):
        model.load_adapter(tmp_path, "default")
    assert_unchanged(before, model)


def test_fields_that_a_config_lacks():
    with pytest.raises(
        TypeError,
        match=r"LoraConfig.__init__\(\) got an unexpected keyword argument 'rank'. The rank is `r`",
    ):
        LoraConfig(rank=8)
    with pytest.raises(TypeError, match="'lora_alpha'. Did you mean 'alpha'"):
        LoKrConfig(lora_alpha=8)
    with pytest.raises(
        peft.PeftError,
        match=r"arguments 'tasks', 'quux'. Did you mean 'n_tasks'\? There are r, target_modules,",
    ):
        PolyConfig(tasks=3, quux=1)

    class Own(LoraConfig):
        def __init__(self, size, **fields):
            super().__init__(r=size, **fields)

    assert Own(size=3, lora_alpha=2).r == 3
    for config in (LoraConfig(r=3), PolyConfig(r=3, n_tasks=4)):
        assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_adapters_that_are_not_there(model):
    for name in ("style", "tasks"):
        model.add_adapter(name, copy.deepcopy(model.peft_config["default"]))
    x = torch.randn(2, 8)
    for call in (
        lambda: model.set_adapter("stile"),
        lambda: model.delete_adapter("stile"),
        lambda: model.merge_adapter(["stile"]),
        lambda: model.add_weighted_adapter(["stile"], [1.0], "c"),
        lambda: model(x, adapter_names=["style", "stile"]),
        lambda: peft.get_peft_model_state_dict(model, adapter_name="stile"),
    ):
        with pytest.raises(
            ValueError,
            match=r"stile.* this model has default, style, tasks\. Did you mean 'style'\?",
        ):
            call()
    for name in (None, 3):
        with pytest.raises(TypeError, match="named by a string or a list of strings"):
            model.set_adapter(name)
    with pytest.raises(
        TypeError,
        match=r"\['style', 'tasks'\] must be one adapter's name; delete several one by one",
    ):
        model.delete_adapter(["style", "tasks"])


def test_what_is_not_provided_says_whose_package_this_is():
    way_back = "not Hugging Face's. To go back to theirs, which has the same name: `pip uninstall peft`, then `pip install peft`"
    for call in (
        peft.IA3Config,
        peft.TrainableTokensConfig,
        lambda: peft.get_peft_config({"peft_type": "IA3"}),
        lambda: LoraConfig(use_qalora=True),
    ):
        with pytest.raises(ValueError, match=re.escape(way_back)):
            call()
    for call in (
        peft.TrainableTokensConfig,
        lambda: peft.get_peft_config({"peft_type": "TRAINABLE_TOKENS"}),
    ):
        with pytest.raises(ValueError, match="`trainable_token_indices` in its config"):
            call()
    with pytest.raises(
        ValueError, match=r"`peft_type`='LOKRR' .* names no method.* Did you mean 'LOKR'\?"
    ):
        peft.get_peft_config({"peft_type": "LOKRR"})
    with pytest.raises(ValueError, match="name one of LOHA, LOKR"):
        peft.get_peft_config({"r": 3})
    with pytest.raises(
        AttributeError,
        match=r"module 'peft' has no attribute 'PolyConfg'. Did you mean 'PolyConfig'\?",
    ):
        _ = peft.PolyConfg


def test_calls_with_the_wrong_things(model, tmp_path):
    model.save_pretrained(tmp_path)
    base, before = mlp(), snapshot(model)
    calls = {
        "`weights`=1.0 must be a list": lambda: model.add_weighted_adapter(["default"], 1.0, "c"),
        "must be a list of names: ['default']": lambda: model.save_pretrained(
            tmp_path, selected_adapters="default"
        ),
        "got ['defualt']. Did you mean 'default'?": lambda: model.save_pretrained(
            tmp_path, selected_adapters=["defualt"]
        ),
        "The model comes first, then the adapter's folder": lambda: PeftModel.from_pretrained(
            tmp_path, base
        ),
        "`from_pretrained(model, folder)`": lambda: peft.PeftMixedModel.from_pretrained(
            str(tmp_path), base
        ),
        "Load the model first": lambda: hotswap_adapter(str(tmp_path), model, "default"),
        "must be a dictionary of tensors, got <class 'str'>": lambda: (
            peft.set_peft_model_state_dict(model, "file")
        ),
    }
    for sentence, call in calls.items():
        with pytest.raises(peft.PeftError, match=re.escape(sentence)):
            call()
    assert_unchanged(before, model)


def test_a_combination_that_a_method_lacks(model, method):
    kinds = {
        "LOHA": "LoHaModel has no combinations. Combine them as LoRA",
        "LORA": "Did you mean 'linear'?",
        "LOKR": "has 'svd'",
    }
    sentence = kinds.get(str(model.peft_type.value), "has 'cat'")
    with pytest.raises(ValueError, match=re.escape(sentence)):
        model.add_weighted_adapter(["default"], [1.0], "c", combination_type="liner")


def test_nothing_is_saved_of_a_model_without_adapters(model, tmp_path):
    model.unload()
    with pytest.raises(
        ValueError, match="no adapters to save: they were deleted, or removed by `unload`"
    ):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_targets_have_to_be_named_for_a_model_of_no_known_kind(method):
    with pytest.raises(
        ValueError,
        match="none are known for model type None. Modules that can be adapted are called '0', '2', '4'",
    ):
        get_peft_model(mlp(), method.config())


def test_what_a_base_model_lacks(model):
    with pytest.raises(
        AttributeError, match=r"^'Sequential' object has no attribute 'generate'\.$"
    ):
        model.generate(torch.zeros(1, 8))
    base = mlp().half()
    base.is_loaded_in_8bit = True
    before = snapshot(base)
    with pytest.raises(
        TypeError,
        match="Sequential has no .*`gradient_checkpointing_enable`; pass `use_gradient_checkpointing=False`",
    ):
        peft.prepare_model_for_kbit_training(base)
    assert_unchanged(before, base)
    with pytest.raises(TypeError, match="must be an nn.Module"):
        peft.prepare_model_for_kbit_training("gpt2")


def test_choices_that_are_misspelt():
    with pytest.raises(
        ValueError,
        match=r"`init_lora_weights`='gausian' must be one of .* Did you mean 'gaussian'\?",
    ):
        LoraConfig(init_lora_weights="gausian")
    mixed = get_peft_model(mlp(), LoraConfig(target_modules=["0"]), mixed=True)
    with pytest.raises(TypeError, match="`peft.get_peft_config` makes one"):
        mixed.add_adapter("b", {"r": 2})


def from_lycoris(model, settings=None):
    return peft.lokr_config_from_lycoris(model, {} if settings is None else settings)


def preset(**entries):
    return {"algo": "lokr", "apply_preset": entries}


def mistakes(file):
    base = nn.Sequential(nn.Linear(8, 8))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
    key, layer = next(iter(get_peft_model_state_dict(model))), model.base_model.model[0]
    digest = "a" * 64
    corda = LoraConfig(target_modules=["0"], init_lora_weights="corda", corda_config=CordaConfig())
    collate = TaskCollator(list, PolyConfig())
    poly = get_peft_model(mlp(), PolyConfig(target_modules=["0"]))
    lokr = get_peft_model(mlp(), LoKrConfig(target_modules=["0"]))
    return [
        (lambda: layer.set_scale("default", "a"), TypeError, "`scale`='a' must be a number"),
        (
            lambda: layer.set_scale("default", float("nan")),
            ValueError,
            "`scale`=nan must be finite",
        ),
        (
            lambda: set_peft_model_state_dict(model, {key: "x"}),
            TypeError,
            "must be a tensor, not 'x'",
        ),
        (lambda: model.save_pretrained("x", selected_adapters=[]), ValueError, "names no adapter"),
        (
            lambda: PolyConfig(n_skills=2, eval_top_k=3),
            ValueError,
            "`n_skills` is 2. None keeps all",
        ),
        (lambda: TaskCollator(None, PolyConfig()), TypeError, "`collator`=None must be a function"),
        (lambda: TaskCollator(list, LoraConfig()), TypeError, "a PolyConfig, not LoraConfig"),
        (lambda: TaskCollator(list, PolyConfig(), copies=0), ValueError, "`copies`=0"),
        (lambda: collate([]), ValueError, "The batch has no samples"),
        (lambda: collate({"x": 1}), TypeError, "must be a list of dictionaries"),
        (lambda: collate(["x"]), TypeError, "must be a list of dictionaries"),
        (lambda: collate([{"task_ids": 0}]), TypeError, "`collator` made a list"),
        (lambda: routing_loss(poly, entropy="a"), ValueError, "`entropy`='a' must be a finite"),
        (lambda: routing_loss(poly, balance=[1]), ValueError, r"`balance`=\[1\] must be a finite"),
        (lambda: routing_loss(poly, record=[]), TypeError, "`record` must be that of"),
        (lambda: recorded_routing(3).__enter__(), TypeError, "must be an nn.Module"),
        (lambda: RoutingWatch(dead_below="a"), ValueError, "`dead_below`='a' must be a finite"),
        (lambda: RoutingWatch(flat_below=None), ValueError, "`flat_below`=None must be a finite"),
        (lambda: TaskSampler(["a"], num_samples=2.5), ValueError, "`num_samples`=2.5 must be"),
        (lambda: TaskSampler(["a"], seed="a"), TypeError, "`seed`='a' must be an integer"),
        (lambda: metrics_by_task(dict, names=3), TypeError, "`names`=3 must be a list"),
        (lambda: preprocess_corda(mlp(), 3), TypeError, "must be a LoraConfig"),
        (lambda: preprocess_corda(mlp(), corda, 3), TypeError, "`run_model`=3 must be a function"),
        (lambda: preprocess_corda(mlp(), corda, dict, 3), TypeError, "must be an nn.Module"),
        (lambda: CordaConfig(cache_file=3), ValueError, "`cache_file`=3 must be a string or None"),
        (lambda: peft.preprocess_loraga(mlp(), 3, dict), TypeError, "must be a LoraConfig"),
        (lambda: peft.preprocess_loraga(mlp(), corda, 3), TypeError, "`train_step`=3 must be a"),
        (lambda: peft.get_eva_state_dict(mlp(), 3, corda), TypeError, "`dataloader` must give"),
        (lambda: peft.get_eva_state_dict(mlp(), [], corda, 3), TypeError, "`forward_fn`=3 must"),
        (lambda: from_lycoris(3), TypeError, "must be an nn.Module"),
        (lambda: from_lycoris(mlp(), 3), TypeError, "`settings`=3 must be a dictionary"),
        (lambda: from_lycoris(mlp(), {"linear_dim": "a"}), ValueError, "`linear_dim`='a' must be"),
        (lambda: from_lycoris(mlp(), preset(target_name="0")), TypeError, "must be a list of str"),
        (lambda: from_lycoris(mlp(), preset(name_algo_map=["0"])), TypeError, "name → settings"),
        (lambda: lokr.clip_weight_norms("a"), ValueError, "`largest`='a' must be a positive"),
        (lambda: save_lokr_file(lokr, file, ["kohya"]), ValueError, "must be one of 'kohya'"),
        (lambda: VectorBank(torch.ones(2, 2), 3), TypeError, "must be a list of digests"),
        (lambda: save_lokr_file(lokr, file, component=3), TypeError, "`component`=3 must be a str"),
        (lambda: save_lokr_file(lokr, file, metadata={"a": 1}), TypeError, "dictionary of strings"),
        (lambda: VectorBank(torch.ones(2, 2), ["xyz"]), TypeError, "must be a list of digests"),
        (lambda: VectorBank(torch.ones(2, 2), [digest, 1]), TypeError, "must be a list of digests"),
    ]


def test_arguments_that_were_taken_or_failed_with_a_bare_error(tmp_path):
    for call, error, message in mistakes(tmp_path / "file.safetensors"):
        with pytest.raises(error, match=message) as caught:
            call()
        assert isinstance(caught.value, peft.PeftError)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "load",
    [
        lambda model, folder: model.load_adapter(folder, "b", torch_device="cpuu"),
        lambda model, folder: hotswap_adapter(model, folder, "default", torch_device="cpuu"),
    ],
)
def test_a_device_that_does_not_exist(load, tmp_path):
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'cpuu' is not a device"):
        load(model, tmp_path)


def test_a_folder_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="can't be a folder: '.*file' is a file"):
        LoraConfig().save_pretrained(tmp_path / "file" / "sub")
