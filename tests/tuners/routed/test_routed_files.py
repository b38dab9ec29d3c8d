# SPDX-License-Identifier: Apache-2.0
"""A routed model's folder: gates and names, or everything; changed and missing adapters."""

import json
import shutil

import pytest
import torch
from helpers.routed import NAMES, saved_adapters
from safetensors.torch import load_file
from torch import nn

import peft
from peft.base.errors import CheckpointError, CheckpointNotFoundError, PeftNotSupportedError
from peft.utils.hotswap import hotswap_adapter

TARGETS = ["0", "2"]


def mlp(width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, 8)).eval()


@pytest.fixture
def places(tmp_path):
    return saved_adapters(mlp(), tmp_path / "library", TARGETS)[0]


@pytest.fixture
def x():
    torch.manual_seed(3)
    return torch.randn(2, 3, 8)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("routing", ["arrow", "input", "fixed"])
def test_a_saved_model_computes_the_same(places, x, tmp_path, routing, whole):
    options = {"general_experts": {"g": places["LORA"]}, "save_experts": whole}
    if routing != "fixed":
        options["top_k"] = 2
    model = peft.get_routed_model(mlp(), places, routing=routing, **options).eval()
    with torch.no_grad():
        for layer in model.base_model.tuner_layers():
            layer.routed_weights["default"].values.uniform_(-1, 1)
    model.save_pretrained(tmp_path / "routed")
    keys = load_file(tmp_path / "routed" / "adapter_model.safetensors").keys()
    assert any("routed_experts" in key for key in keys) == whole
    if whole:
        shutil.rmtree(tmp_path / "library")
    again = peft.PeftModel.from_pretrained(mlp(), tmp_path / "routed")
    assert again.named_experts() == NAMES
    torch.testing.assert_close(again(x), model(x))
    again.save_pretrained(tmp_path / "second")  # a loaded model is saved in the same way
    torch.testing.assert_close(
        peft.PeftModel.from_pretrained(mlp(), tmp_path / "second")(x), model(x)
    )


def test_values_are_loaded_into_an_adapter(places, x, tmp_path):
    model = peft.get_routed_model(mlp(), places, routing="input").eval()
    with torch.no_grad():
        model.get_base_model()[0].routed_gate["default"].normal_()
    right = model(x)
    model.save_pretrained(tmp_path / "routed")
    with torch.no_grad():
        model.get_base_model()[0].routed_gate["default"].zero_()
    model.load_adapter(tmp_path / "routed", "default")
    torch.testing.assert_close(model(x), right)


def test_a_changed_adapter_is_refused_by_name(places, tmp_path):
    peft.get_routed_model(mlp(), places, routing="task").save_pretrained(tmp_path / "routed")
    other = peft.LoraConfig(r=5, target_modules=TARGETS, init_lora_weights=False)
    peft.get_peft_model(mlp(), other).save_pretrained(places["LORA"])
    base = mlp()
    with pytest.raises(CheckpointError, match="Expert 'LORA'.*has changed"):
        peft.PeftModel.from_pretrained(base, tmp_path / "routed")
    assert type(base[0]) is nn.Linear and base[0].weight.requires_grad
    config = peft.PeftConfig.from_pretrained(tmp_path / "routed")
    del config.experts["LORA"]["digest"]
    with pytest.raises(CheckpointError, match="'LORA' has rank 5.*had 2"):
        peft.PeftModel.from_pretrained(mlp(), tmp_path / "routed", config=config)


def test_a_missing_adapter_is_refused_by_name_and_a_moved_one_found(places, x, tmp_path):
    model = peft.get_routed_model(mlp(), places, routing="arrow").eval()
    model.save_pretrained(tmp_path / "library" / "routed")
    shutil.move(tmp_path / "library", tmp_path / "elsewhere")
    again = peft.PeftModel.from_pretrained(mlp(), tmp_path / "elsewhere" / "routed")
    torch.testing.assert_close(again(x), model(x))
    shutil.rmtree(tmp_path / "elsewhere" / "VBLORA")
    with pytest.raises(CheckpointNotFoundError, match="Expert 'VBLORA'"):
        peft.PeftModel.from_pretrained(mlp(), tmp_path / "elsewhere" / "routed")


def test_experts_that_moved_together_with_the_model_are_found(places, x, tmp_path):
    experts = {name: places[name] for name in ("LORA", "LOKR")}
    model = peft.get_routed_model(mlp(), experts, routing="arrow").eval()
    right, old = model(x), tmp_path / "library"
    model.save_pretrained(tmp_path / "mine" / "routed")  # beside the library's own folder
    shutil.copytree(old, tmp_path / "new" / "library")
    shutil.move(tmp_path / "mine", tmp_path / "new" / "mine")

    def loaded():
        return peft.PeftModel.from_pretrained(mlp(), tmp_path / "new" / "mine" / "routed")(x)

    other = peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
    peft.get_peft_model(mlp(), other).save_pretrained(places["LORA"])
    torch.testing.assert_close(loaded(), right)  # not the one that has changed at the old place
    shutil.rmtree(old)
    torch.testing.assert_close(loaded(), right)
    shutil.rmtree(tmp_path / "new" / "library" / "LORA")
    with pytest.raises(CheckpointNotFoundError, match="Expert 'LORA'.*new/library/LORA"):
        loaded()


def test_a_config_that_is_written_again_is_no_change(places, x, tmp_path):
    model = peft.get_routed_model(mlp(), places, routing="arrow").eval()
    model.save_pretrained(tmp_path / "routed")
    file = tmp_path / "library" / "LORA" / "adapter_config.json"
    fields = json.loads(file.read_text())
    again = dict(sorted(fields.items(), reverse=True)) | {"inference_mode": False}
    file.write_text(json.dumps(again, indent=7))
    again = peft.PeftModel.from_pretrained(mlp(), tmp_path / "routed")
    torch.testing.assert_close(again(x), model(x))
    file.write_text(json.dumps({**fields, "lora_alpha": 99}))
    with pytest.raises(CheckpointError, match="Expert 'LORA'.*has changed"):
        peft.PeftModel.from_pretrained(mlp(), tmp_path / "routed")


def test_a_wrong_base_model(places, tmp_path):
    peft.get_routed_model(mlp(), places).save_pretrained(tmp_path / "routed")
    for make in (lambda: mlp(4), lambda: nn.Sequential(nn.Tanh())):
        base = make()
        with pytest.raises(ValueError, match="Expert 'LOHA'"):
            peft.PeftModel.from_pretrained(base, tmp_path / "routed")
        with pytest.raises(ValueError, match="Expert 'LOHA'"):
            peft.get_routed_model(base, places)
        assert not hasattr(base, "peft_config")


def test_experts_in_memory_are_saved_with_the_model(places, x, tmp_path):
    lokr = peft.get_peft_model(
        mlp(), peft.LoKrConfig(r=2, target_modules=TARGETS, init_weights=False)
    )
    pair = lokr.peft_config["default"], peft.get_peft_model_state_dict(lokr)
    model = peft.get_routed_model(mlp(), {"own": pair, "LORA": places["LORA"]}, routing="task")
    torch.testing.assert_close(model.eval()(x, task_ids="own"), lokr.eval()(x))
    model.save_pretrained(tmp_path / "routed")
    again = peft.PeftModel.from_pretrained(mlp(), tmp_path / "routed")
    torch.testing.assert_close(again(x, task_ids="own"), lokr(x))
    # A copy takes the experts from the model.
    model.copy_adapter("default", "twin")
    model.set_adapter("twin")
    torch.testing.assert_close(model(x, task_ids="own"), lokr(x))


def test_what_cannot_be_an_expert(places, tmp_path):
    headed = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
    peft.get_peft_model(mlp(), headed).save_pretrained(tmp_path / "headed")
    with pytest.raises(PeftNotSupportedError, match="Expert 'headed'.*also trains `2`"):
        peft.get_routed_model(mlp(), {"headed": tmp_path / "headed"})
    model = peft.get_routed_model(mlp(), {"headed": tmp_path / "headed"}, deltas_only=True)
    assert model.named_experts() == ["headed"]
    with pytest.raises(ValueError, match="`task`='b' is none of the adapter's tasks"):
        peft.get_routed_model(mlp(), {"p": {"source": places["POLY"], "task": "b"}})
    with pytest.raises(ValueError, match="No expert adapts `2`"):
        peft.get_routed_model(
            mlp(), {"a": tmp_path / "headed"}, deltas_only=True, target_modules=["0", "2"]
        )
    for wrong in ([], None):
        with pytest.raises(TypeError, match="`experts` must be a dictionary"):
            peft.get_routed_model(mlp(), wrong)
    with pytest.raises(TypeError, match="Expert 'a' must be a folder"):
        peft.get_routed_model(mlp(), {"a": 3})
    with pytest.raises(ValueError, match="`top_k`=2 chooses experts by the input"):
        peft.get_routed_model(mlp(), places, routing="fixed", top_k=2)
    with pytest.raises(ValueError, match="`experts` is empty"):
        peft.get_peft_model(mlp(), peft.RoutedConfig())


def test_a_config_alone_makes_a_routed_model(places, x, tmp_path):
    config = peft.RoutedConfig(experts=places, routing="arrow", top_k=2)
    model = peft.get_peft_model(mlp(), config).eval()
    same = peft.get_routed_model(mlp(), places, routing="arrow", top_k=2).eval()
    torch.testing.assert_close(model(x), same(x))
    model.save_pretrained(tmp_path / "routed")
    written = json.loads((tmp_path / "routed" / "adapter_config.json").read_text())
    assert list(written["experts"]) == NAMES
    assert {"source", "digest", "rank"} <= written["experts"]["LORA"].keys()


def test_create_arrow_model_as_the_interface_has_it(places, x):
    options = peft.ArrowConfig(top_k=2, router_temperature=0.5)
    model = peft.create_arrow_model(mlp(), [places["LORA"], places["LOKR"]], options)
    same = peft.get_routed_model(
        mlp(), {n: places[n] for n in ("LORA", "LOKR")}, top_k=2, temperature=0.5
    )
    torch.testing.assert_close(model(x), same.eval()(x))
    assert model.active_adapter == "arrow_router"
    assert options.task_adapter_names == ["task_0", "task_1"] and options.gks_adapter_names == []
    for wrong in ({"top_k": 0}, {"router_temperature": 0.0}):
        with pytest.raises(ValueError, match="ArrowConfig"):
            peft.ArrowConfig(**wrong)
    with pytest.raises(ValueError, match="at least one adapter path"):
        peft.create_arrow_model(mlp(), [], options)
    with pytest.raises(ValueError, match="general LoRA paths"):
        peft.create_arrow_model(mlp(), [places["LORA"]], peft.ArrowConfig(use_gks=True))
    with pytest.raises(ValueError, match="general adapters that adapt the module with rank"):
        peft.create_arrow_model(
            mlp(), [places["LORA"]], peft.ArrowConfig(use_gks=True), [places["LOKR"]]
        )


def test_experts_are_swapped_with_their_gates(places, x, tmp_path):
    """A hot swap, which writes into the layers, brings the other adapter's experts too."""
    one, other = ({n: places[n] for n in names} for names in (("LORA", "LOHA"), ("VBLORA", "LOKR")))
    second = peft.get_routed_model(mlp(), dict(zip(one, other.values(), strict=True)), top_k=1)
    second.save_pretrained(tmp_path / "second")
    model = peft.get_routed_model(mlp(), one, top_k=1).eval()
    with pytest.raises(ValueError, match="`experts`=.*load it under a new name"):
        model.load_adapter(tmp_path / "second", "default")
    hotswap_adapter(model, tmp_path / "second", "default")
    torch.testing.assert_close(model(x), second.eval()(x))


def test_a_swap_brings_experts_of_the_same_ranks(x, tmp_path):
    """Nothing but the factors tells these two adapters apart."""
    folders = []
    for seed in range(4):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
        folders.append(tmp_path / str(seed))
        peft.get_peft_model(mlp(), config).save_pretrained(folders[-1])
    one, other = ({"a": folders[i], "b": folders[i + 1]} for i in (0, 2))
    every = {"routing": "arrow"}, {"routing": "fixed", "weights_granularity": "model"}
    for options in every:
        second = peft.get_routed_model(mlp(), other, **options).eval()
        second.save_pretrained(tmp_path / options["routing"])
        model = peft.get_routed_model(mlp(), one, **options).eval()
        hotswap_adapter(model, tmp_path / options["routing"], "default")
        torch.testing.assert_close(model(x), second(x))
        assert model.peft_config["default"].experts == second.peft_config["default"].experts


def test_prototypes_that_are_missing_are_so_after_loading(places, x, tmp_path):
    two = {name: places[name] for name in ("LORA", "LOKR")}
    model = peft.get_routed_model(mlp(), two, routing="activation").eval()
    model.save_pretrained(tmp_path / "none")
    model.collect_prototypes({"LORA": x})
    model.save_pretrained(tmp_path / "one")
    for name, missing in (("none", "'LORA', 'LOKR'"), ("one", "'LOKR'")):
        again = peft.PeftModel.from_pretrained(mlp(), tmp_path / name)
        with pytest.raises(ValueError, match=rf"Experts \[{missing}\] have no prototypes"):
            again(x)
        again.collect_prototypes(dict.fromkeys(two, x))
        assert again(x).isfinite().all()
    model.collect_prototypes({"LOKR": 2 * x + 1})
    model.save_pretrained(tmp_path / "all")
    again.load_adapter(tmp_path / "all", "default")
    torch.testing.assert_close(again(x), model(x))


def test_names_that_clash_with_tasks_are_refused(places):
    task = "POLY.task_1"
    for experts in (
        {"POLY": places["POLY"], task: places["LORA"]},
        {task: places["LORA"], "POLY": places["POLY"]},
    ):
        base = mlp()
        with pytest.raises(ValueError, match=f"Two experts are called '{task}'"):
            peft.get_routed_model(base, experts)
        assert type(base[0]) is nn.Linear
    model = peft.get_routed_model(mlp(), {task: places["LORA"]}, routing="fixed").eval()
    with pytest.raises(ValueError, match=f"Two experts are called '{task}'"):
        model.add_experts({"POLY": places["POLY"]})
    assert model.named_experts() == [task]
    model.add_experts({"other": places["POLY"]})
    assert model.named_experts() == [task, *(f"other.task_{i}" for i in range(3))]


def test_experts_are_never_on_the_meta_device(places):
    config = peft.RoutedConfig(experts=places, top_k=2)
    model = peft.get_peft_model(mlp(), config, low_cpu_mem_usage=True)
    factors = model.get_base_model()[0].factors("default")
    assert factors.down.device.type == "cpu"
    assert {"LOHA", "POLY.task_2"} <= set(peft.plan(mlp(), config) and model.named_experts())
