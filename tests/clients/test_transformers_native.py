# SPDX-License-Identifier: Apache-2.0
"""transformers' own adapter methods (`model.add_adapter`, `model.load_adapter`, …) with every
method, against `PeftModel`.
"""

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from helpers.methods import METHODS
from helpers.models import gpt2, llama, t5
from safetensors.torch import load_file

import peft
from peft import (
    LoraConfig,
    PeftModel,
    PolyConfig,
    VBLoRAConfig,
    get_peft_model,
    get_peft_model_state_dict,
)

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore:.*will be removed in v6")]
LLAMA = ["q_proj", "v_proj", "down_proj"]
IDS = torch.arange(3, 15).view(2, 6)


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(params=sorted(METHODS))
def method(request):
    return METHODS[request.param]


def bert():
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=48,
        num_labels=4,
    )
    return BertForSequenceClassification(config).eval()


def shuffle(model, words=(".default", ".b")):
    """Random values for all that adapters add, so that each tensor counts."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(f"{word}." in f"{name}." for word in words):
                parameter.normal_()


def close(logits, expected):
    torch.testing.assert_close(logits, expected)


def apart(logits, expected):
    assert (logits - expected).abs().max() > 1e-3


def config(method, **more):
    return method.config(**{"target_modules": LLAMA, "task_type": "CAUSAL_LM", **more})


@pytest.fixture
def base(tmp_path):
    """The base model on disk, as adapters name it."""
    llama().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def plain(base):
    return AutoModelForCausalLM.from_pretrained(base).eval()


@pytest.fixture
def saved(method, base, tmp_path):
    """A `PeftModel`, and the folder it was saved to."""
    model = get_peft_model(plain(base), config(method)).eval()
    shuffle(model)
    model.save_pretrained(tmp_path / "adapter")
    return model, str(tmp_path / "adapter")


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("training", [False, True])
def test_an_adapter_is_added_and_trained(method, base, training):
    model, peft_model = (
        plain(base).train(training),
        get_peft_model(plain(base).train(training), config(method)),
    )
    before = plain(base)(IDS).logits
    model.add_adapter(config(method))
    assert model.training == training
    assert model.active_adapters() == ["default"]
    assert {
        f"base_model.model.{name}".replace(".model.vblora_vec", ".vblora_vec")
        for name in trainable(model)
    } == trainable(peft_model)
    peft.set_peft_model_state_dict(model, get_peft_model_state_dict(peft_model))
    model.eval()
    close(model(IDS, **method.call).logits, peft_model.eval()(IDS, **method.call).logits)
    apart(model(IDS, **method.call).logits, before)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        losses.append(model(IDS, labels=IDS, **method.call).loss)
        losses[-1].backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[2] < losses[0]
    assert all(
        torch.equal(frozen[name], p) for name, p in model.named_parameters() if name in frozen
    )


def test_a_saved_adapter_is_loaded(method, saved, base, tmp_path):
    peft_model, folder = saved
    expected = peft_model(IDS, **method.call).logits
    model = plain(base)
    info = model.load_adapter(folder)
    assert not info.missing_keys and not info.unexpected_keys and not info.mismatched_keys
    close(model(IDS, **method.call).logits, expected)
    assert not trainable(model) and not model.training
    assert {name: tuple(t.shape) for name, t in model.get_adapter_state_dict().items()} == {
        name.removeprefix("base_model.").removeprefix("model."): tuple(t.shape)
        for name, t in get_peft_model_state_dict(peft_model).items()
    }
    written = model.generate(IDS, max_new_tokens=4, num_beams=2, do_sample=False, **method.call)
    again = peft_model.generate(
        input_ids=IDS, max_new_tokens=4, num_beams=2, do_sample=False, **method.call
    )
    assert torch.equal(written, again)


def test_a_model_is_made_of_an_adapters_folder(method, saved, base):
    peft_model, folder = saved
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert (
        json.loads(Path(folder, "adapter_config.json").read_text())["base_model_name_or_path"]
        == base
    )
    assert type(model).__name__ == "LlamaForCausalLM"
    close(model(IDS, **method.call).logits, peft_model(IDS, **method.call).logits)
    assert not trainable(model) & {
        name for name, _ in model.named_parameters() if ".default" in name
    }


def test_what_is_saved_is_loaded_by_either(method, saved, base, tmp_path):
    peft_model, folder = saved
    expected = peft_model(IDS, **method.call).logits
    model = plain(base)
    model.load_adapter(folder, "mine")
    model.save_pretrained(tmp_path / "again")
    files = {path.name for path in (tmp_path / "again").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert not any(name.startswith("model") for name in files)
    first, second = (
        load_file(f"{path}/adapter_model.safetensors") for path in (folder, tmp_path / "again")
    )
    # transformers puts the prefix of modules before all names, that of a bank among them.
    second = {
        name.replace("base_model.model.vblora_vector_bank", "base_model.vblora_vector_bank"): t
        for name, t in second.items()
    }
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    close(
        PeftModel.from_pretrained(plain(base), tmp_path / "again")(IDS, **method.call).logits,
        expected,
    )
    native = plain(base)
    native.load_adapter(str(tmp_path / "again"))
    close(native(IDS, **method.call).logits, expected)


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_tensors_in_memory_are_loaded(method, saved, base, prefix):
    peft_model, folder = saved
    state = {
        name.replace("base_model.vblora", "base_model.model.vblora").replace(
            "base_model.model.", prefix, 1
        ): tensor
        for name, tensor in load_file(f"{folder}/adapter_model.safetensors").items()
    }
    model = plain(base)
    info = model.load_adapter(
        peft_config=peft.PeftConfig.from_pretrained(folder),
        adapter_state_dict=state,
        adapter_name="mine",
        is_trainable=True,
    )
    assert not info.missing_keys and not info.unexpected_keys
    close(model(IDS, **method.call).logits, peft_model(IDS, **method.call).logits)
    assert trainable(model) == {name for name, _ in model.named_parameters() if ".mine" in name}


def test_without_memory_and_in_other_precision(method, saved, base):
    peft_model, folder = saved
    model = plain(base)
    model.load_adapter(folder, low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in model.parameters())
    close(model(IDS, **method.call).logits, peft_model(IDS, **method.call).logits)
    half = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
    half.load_adapter(folder)
    logits = half(IDS, **method.call).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(
        logits.float(), peft_model(IDS, **method.call).logits, atol=0.1, rtol=0.1
    )


def test_several_adapters(method, saved, base):
    peft_model, folder = saved
    model = plain(base)
    without = model(IDS).logits
    model.load_adapter(folder)
    first = model(IDS, **method.call).logits
    model.add_adapter(config(method, target_modules=["q_proj"]), "b")
    shuffle(model, [".b"])
    assert model.active_adapters() == ["b"]
    assert trainable(model) == {
        name for name, _ in model.named_parameters() if name.endswith(".b") or ".b." in name
    }
    peft_model.add_adapter("b", config(method, target_modules=["q_proj"]))
    state = get_peft_model_state_dict(model, adapter_name="b")
    result = peft.set_peft_model_state_dict(
        peft_model, {f"base_model.model.{name}": t for name, t in state.items()}, "b"
    )
    assert not result.missing_keys
    for active in ("default", "b", ["default", "b"]):
        model.set_adapter(active)
        peft_model.set_adapter(active)
        assert model.active_adapters() == ([active] if isinstance(active, str) else active)
        close(model(IDS, **method.call).logits, peft_model(IDS, **method.call).logits)
    active = trainable(model)
    model.disable_adapters()
    close(model(IDS).logits, without)
    assert not trainable(model)
    model.enable_adapters()
    close(model(IDS, **method.call).logits, peft_model(IDS, **method.call).logits)
    assert trainable(model) == active
    model.delete_adapter("b")
    close(model(IDS, **method.call).logits, first)
    assert not any(".b." in f"{name}." for name in model.state_dict())
    model.delete_adapter("default")
    assert not hasattr(model, "peft_config")
    close(model(IDS).logits, without)
    assert not any(".default" in name for name in model.state_dict())
    model.add_adapter(config(method), "new")
    shuffle(model, [".new"])
    apart(model(IDS, **method.call).logits, without)


def test_a_head_is_trained_whole_and_saved(method, tmp_path):
    base = bert()
    base.save_pretrained(tmp_path / "base")
    names = ["query", "value"]
    model = copy.deepcopy(base)
    fields = method.config(target_modules=names, modules_to_save=["classifier"])
    model.add_adapter(fields)
    shuffle(model)
    assert {
        "classifier.modules_to_save.default.weight",
        "classifier.modules_to_save.default.bias",
    } <= trainable(model)
    logits = model(IDS, **method.call).logits
    apart(logits, base(IDS).logits)
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.classifier.weight" in saved
    loaded = copy.deepcopy(base)
    info = loaded.load_adapter(str(tmp_path / "adapter"), "other")
    assert not info.unexpected_keys and not [
        key for key in info.missing_keys if "modules_to_save" in key
    ]
    close(loaded(IDS, **method.call).logits, logits)
    close(
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")(
            IDS, **method.call
        ).logits,
        logits,
    )
    content = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    content["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(content))
    auto = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "adapter")).eval()
    close(auto(IDS, **method.call).logits, logits)
    model.disable_adapters()
    close(model(IDS).logits, base(IDS).logits)


def test_a_checkpoint_of_the_whole_model_finds_its_adapter(method, saved, base, tmp_path):
    """A folder that holds a base model and an adapter for it."""
    peft_model, folder = saved
    shutil.copytree(base, tmp_path / "both")
    shutil.copytree(folder, tmp_path / "both", dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "both")).eval()
    close(model(IDS, **method.call).logits, peft_model(IDS, **method.call).logits)


@pytest.mark.parametrize("kind", ["name", "modules", "missing", "shape"])
def test_what_does_not_fit(method, saved, base, kind, tmp_path):
    _, folder = saved
    model = plain(base)
    if kind == "name":
        model.load_adapter(folder)
        with pytest.raises(ValueError, match="already exists"):
            model.load_adapter(folder)
        with pytest.raises(ValueError, match="already exists"):
            model.add_adapter(config(method))
    elif kind == "modules":
        with pytest.raises(ValueError, match="(?s)q_proj.*not found"):
            bert().load_adapter(folder)
    else:
        state = load_file(f"{folder}/adapter_model.safetensors")
        key = next(name for name in state if "q_proj" in name)
        if kind == "missing":
            tensor = state.pop(key)
            info = model.load_adapter(
                peft_config=peft.PeftConfig.from_pretrained(folder), adapter_state_dict=state
            )
            assert [name.replace(".default", "") for name in info.missing_keys] == [
                key.removeprefix("base_model.model.")
            ]
        else:
            tensor = state[key]
            state[key] = torch.zeros(3, *tensor.shape)
            with pytest.raises(RuntimeError):
                model.load_adapter(
                    peft_config=peft.PeftConfig.from_pretrained(folder), adapter_state_dict=state
                )


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(method, base, reentrant):
    gradients = []
    for on in (False, True):
        torch.manual_seed(1)
        model = plain(base)
        model.add_adapter(config(method))
        model.train()
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(2)
        model(IDS, labels=IDS, **method.call).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_a_copy_and_a_pickle_are_models_of_their_own(method, saved, base):
    _, folder = saved
    model = plain(base)
    model.load_adapter(folder)
    expected = model(IDS, **method.call).logits
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        shuffle(model)
        close(copied(IDS, **method.call).logits, expected)
        assert copied.active_adapters() == ["default"]
        copied.delete_adapter("default")
        apart(copied(IDS).logits, expected)


def test_hotswapping(base, tmp_path):
    """transformers allows it for LoRA alone."""
    for name in ("one", "two"):
        model = get_peft_model(
            plain(base), LoraConfig(r=2, target_modules=LLAMA, task_type="CAUSAL_LM")
        ).eval()
        shuffle(model)
        model.save_pretrained(tmp_path / name)
    expected = model(IDS).logits
    native = plain(base)
    native.load_adapter(str(tmp_path / "one"))
    apart(native(IDS).logits, expected)
    native.load_adapter(str(tmp_path / "two"), adapter_name="default", hotswap=True)
    close(native(IDS).logits, expected)
    assert list(native.peft_config) == ["default"]


# VB-LoRA's bank and short files


@pytest.mark.parametrize("vectors", [12, 300])
def test_topk_files(base, tmp_path, vectors):
    fields = {
        "r": 2,
        "num_vectors": vectors,
        "vector_length": 4,
        "topk": 2,
        "save_only_topk_weights": True,
    }
    model = get_peft_model(
        plain(base), VBLoRAConfig(target_modules=LLAMA, task_type="CAUSAL_LM", **fields)
    ).eval()
    shuffle(model)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    assert all(
        "topk" in name or "bank" in name
        for name in load_file(tmp_path / "adapter_model.safetensors")
    )
    native = plain(base)
    info = native.load_adapter(str(tmp_path))
    assert not info.missing_keys and not info.unexpected_keys
    torch.testing.assert_close(native(IDS).logits, expected)
    native.train()
    with pytest.raises(RuntimeError, match="save_only_topk_weights"):
        native(IDS)
    with pytest.raises(
        RuntimeError, match="conversion of the weights"
    ):  # the report above it says that it can't be trained
        plain(base).load_adapter(str(tmp_path), is_trainable=True)
    native.eval().save_pretrained(tmp_path / "again")
    torch.testing.assert_close(
        PeftModel.from_pretrained(plain(base), tmp_path / "again")(IDS).logits, expected
    )


def test_each_adapter_has_its_own_bank(base):
    model = plain(base)
    for name in ("default", "b"):
        model.add_adapter(METHODS["VBLORA"].config(target_modules=LLAMA), name)
    shuffle(model)
    assert [name for name in model.state_dict() if "bank" in name] == [
        "vblora_vector_bank.default",
        "vblora_vector_bank.b",
    ]
    model.set_adapter("default")
    assert not model.vblora_vector_bank["b"].requires_grad
    logits = model(IDS).logits
    with torch.no_grad():
        model.vblora_vector_bank["b"].zero_()
    close(model(IDS).logits, logits)
    model.set_adapter("b")
    assert model.vblora_vector_bank["b"].requires_grad
    torch.testing.assert_close(model(IDS).logits, plain(base)(IDS).logits)


# Poly: tasks in forward and generate


FORMS = {
    "tensor": torch.tensor([2, 0]),
    "list": [2, 0],
    "names": ["c", "a"],
    "one": 2,
    "one name": "c",
}


def poly(model, **more):
    fields = {
        "r": 2,
        "n_tasks": 3,
        "n_skills": 2,
        "init_weights": False,
        "task_names": ["a", "b", "c"],
    }
    config = PolyConfig(**{**fields, **more})
    wrapped = get_peft_model(copy.deepcopy(model), copy.deepcopy(config)).eval()
    shuffle(wrapped)
    model.add_adapter(config)
    peft.set_peft_model_state_dict(model, get_peft_model_state_dict(wrapped))
    return model.eval(), wrapped


MODELS = {
    "llama": (llama, LLAMA),
    "gpt2": (gpt2, ["c_attn", "c_proj"]),
    "t5": (t5, ["q", "v", "wo"]),
}


BEAMS = [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("form", "options"),
    [*((form, {}) for form in FORMS), *(("list", options) for options in BEAMS)],
    ids=str,
)
@torch.no_grad()
def test_a_native_model_generates_by_task(kind, form, options):
    made, targets = MODELS[kind]
    model, wrapped = poly(made(), target_modules=targets)
    options = {"max_new_tokens": 4, "do_sample": False, **options}
    written = model.generate(IDS, task_ids=FORMS[form], **options)
    assert torch.equal(written, wrapped.generate(input_ids=IDS, task_ids=FORMS[form], **options))
    tasks = [2, 0] if form in ("tensor", "list", "names") else [2, 2]
    rows = len(written) // 2
    for i, task in enumerate(tasks):
        alone = model.generate(IDS[i : i + 1], task_ids=task, **options)
        assert torch.equal(written[i * rows : (i + 1) * rows, : alone.shape[1]], alone)
    assert not torch.equal(written, model.generate(IDS, task_ids=1, **options))
    with pytest.raises(ValueError, match="task_ids should not be None"):
        model.generate(IDS, **options)
    with pytest.raises(ValueError, match="Only 3 tasks"):
        model.generate(IDS, task_ids=[0, 3], **options)
    assert torch.equal(model.generate(IDS, task_ids=FORMS[form], **options), written)


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_a_native_model_that_routes_by_input_decides_by_the_prompt(kind):
    made, targets = MODELS[kind]
    model, wrapped = poly(
        made(), target_modules=targets, poly_type="mope", n_tasks=1, task_names=None
    )
    options = {"max_new_tokens": 5, "do_sample": False}
    written = model.generate(IDS, **options)
    assert torch.equal(written, wrapped.generate(input_ids=IDS, **options))
    mask = torch.ones_like(IDS)
    mask[:, 3:] = 0
    named = model.generate(IDS, routing_mask=mask, **options)
    assert torch.equal(named, wrapped.generate(input_ids=IDS, routing_mask=mask, **options))


@torch.no_grad()
def test_forward_called_past_all_hooks():
    """As sentence-transformers calls it; also after a call that failed, whose tasks must not
    linger.
    """
    model, wrapped = poly(llama(), target_modules=LLAMA)
    for ids in ([2, 0], "b", torch.tensor([0, 1])):
        close(model.forward(IDS, task_ids=ids).logits, wrapped(IDS, task_ids=ids).logits)
        close(
            wrapped.get_base_model().forward(IDS, task_ids=ids).logits,
            wrapped(IDS, task_ids=ids).logits,
        )
        for call in (model, model.forward):
            with pytest.raises((IndexError, RuntimeError)):
                call(IDS + 1000, task_ids=ids)
            written = model.generate(IDS, task_ids=ids, max_new_tokens=2, do_sample=False)
            assert torch.equal(
                written,
                wrapped.generate(input_ids=IDS, task_ids=ids, max_new_tokens=2, do_sample=False),
            )
            with pytest.raises((IndexError, RuntimeError)):
                call(IDS + 1000, task_ids=ids)
            with pytest.raises(ValueError, match="task_ids should not be None"):
                model.forward(IDS)
            with pytest.raises(ValueError, match="task_ids should not be None"):
                model(IDS)


@pytest.mark.compile
def test_a_native_model_that_takes_tasks_compiles_whole():
    model, wrapped = poly(llama(), target_modules=LLAMA)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        tasks = torch.tensor([2, 0])
        close(compiled(IDS, task_ids=tasks).logits, wrapped(IDS, task_ids=tasks).logits)


def test_typos_in_the_arguments_of_generate_are_still_found():
    model, _ = poly(llama(), target_modules=LLAMA)
    with pytest.raises(ValueError, match=r"not used by the model: \['tasks_ids'\]"):
        model.generate(IDS, tasks_ids=[0, 1], task_ids=[0, 1], max_new_tokens=2)


def test_a_deleted_adapter_leaves_generate_as_it_was():
    base = llama()
    expected = copy.deepcopy(base).generate(IDS, max_new_tokens=3, do_sample=False)
    model, _ = poly(base, target_modules=LLAMA)
    assert not torch.equal(
        model.generate(IDS, task_ids=1, max_new_tokens=3, do_sample=False), expected
    )
    model.delete_adapter("default")
    assert torch.equal(model.generate(IDS, max_new_tokens=3, do_sample=False), expected)
