# SPDX-License-Identifier: Apache-2.0
"""accelerate with every method: prepared models, mixed precision, states, offloading, dispatch, and
its launcher.
"""

import copy
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.methods import METHODS
from helpers.models import llama, mlp
from helpers.states import assert_rounded

import peft
from peft import PeftModel, get_peft_model

accelerate = pytest.importorskip("accelerate")
pytest.importorskip("transformers")
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model, infer_auto_device_map  # noqa: E402
from accelerate.hooks import remove_hook_from_submodules  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from accelerate.utils import is_peft_model, set_seed  # noqa: E402

pytestmark = pytest.mark.clients
LLAMA = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(params=sorted(METHODS))
def method(request):
    return METHODS[request.param]


@pytest.fixture(params=["PeftModel", "model of its own class"])
def model(method, request):
    config = method.config(target_modules=LLAMA, task_type="CAUSAL_LM")
    return (
        get_peft_model(llama(), config)
        if request.param == "PeftModel"
        else peft.inject_adapter_in_model(config, llama())
    )


def batches(method, number=4):
    generator = torch.Generator().manual_seed(1)
    for i in range(number):
        ids = torch.randint(3, 48, (2, 5), generator=generator)
        tasks = (
            {"task_ids": torch.tensor([i % 3, (i + 1) % 3])} if "task_ids" in method.call else {}
        )
        yield {"input_ids": ids, "labels": ids, **tasks}


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_close(first, second, **tolerance):
    assert first
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, **tolerance)


def train(model, data, accelerator=None, lr=1e-2, steps_each=1):
    """A loop as accelerate's documentation has it; without an accelerator, as torch's has it."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    if accelerator is not None:
        model, optimiser = accelerator.prepare(model, optimiser)
    for number, batch in enumerate(data):
        if accelerator is None:
            (model(**batch).loss / steps_each).backward()
            if (number + 1) % steps_each == 0:
                optimiser.step()
                optimiser.zero_grad()
            continue
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimiser.step()
            optimiser.zero_grad()
    return model, optimiser


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_prepared_model_trains_as_it_does_by_itself(method, model, accumulation):
    by_hand = copy.deepcopy(model)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    prepared, _ = train(model, batches(method), accelerator)
    train(by_hand, batches(method), steps_each=accumulation)
    assert is_peft_model(prepared) == isinstance(model, peft.PeftModel)
    assert accelerator.unwrap_model(prepared) is model
    assert_close(weights(by_hand), weights(model), rtol=0, atol=0)


def test_mixed_precision(method, model):
    """The forward runs in bfloat16 and hands out float32; an unwrapped model computes as before."""
    model.eval()
    batch = next(batches(method))
    before = model(**batch).logits
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch).logits.float()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(model)
    logits = prepared(**batch).logits
    assert logits.dtype == torch.float32
    assert torch.equal(logits, expected)
    assert not torch.equal(logits, before)
    plain = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert plain is model
    assert torch.equal(plain(**batch).logits, before)
    core = plain.get_base_model() if is_peft_model(plain) else plain
    assert method.call.keys() <= inspect.signature(core.forward).parameters.keys()
    again = copy.deepcopy(plain)
    assert torch.equal(again(**batch).logits, before)


def test_a_saved_state_goes_on_as_if_never_stopped(method, model, tmp_path):
    data = list(batches(method, 6))
    second = copy.deepcopy(model)
    accelerator = Accelerator(cpu=True)
    set_seed(5)
    model.train()
    prepared, optimiser = train(model, data[:3], accelerator)
    accelerator.save_state(str(tmp_path / "state"))

    def go_on(model, optimiser):
        for batch in data[3:]:
            model(**batch).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        return weights(model)

    expected = go_on(prepared, optimiser)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    other = Accelerator(cpu=True)
    with torch.no_grad():
        [p.normal_() for p in second.parameters() if p.requires_grad]
    second.train()
    prepared, optimiser = train(second, [], other)
    other.load_state(str(tmp_path / "state"))
    assert_close(expected, go_on(prepared, optimiser), rtol=0, atol=0)


def test_a_saved_model_has_every_tensor_once(method, model, tmp_path):
    from safetensors.torch import load_file

    accelerator = Accelerator(cpu=True)
    accelerator.save_model(accelerator.prepare(model), str(tmp_path))
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


OFFLOADING = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device="cpu"),
    "disk": lambda model, folder: disk_offload(model, str(folder), execution_device="cpu"),
    "dispatched": lambda model, folder: dispatch_model(
        model, devices(model), main_device="cpu", offload_dir=str(folder), force_hooks=True
    ),
}


def devices(model):
    """What accelerate itself chooses where the CPU has room for half of the model."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return infer_auto_device_map(
        model,
        max_memory={"cpu": size // 2, "disk": size},
        no_split_module_classes=["LlamaDecoderLayer"],
    )


@pytest.mark.parametrize("kind", OFFLOADING)
@torch.no_grad()
def test_weights_come_back_for_each_call(method, model, kind, tmp_path):
    model.eval()
    batch = next(batches(method))
    expected = model(**batch).logits
    tokens = {
        "input_ids": batch["input_ids"],
        "max_new_tokens": 3,
        "do_sample": False,
        **method.call,
    }
    written = model.generate(**tokens)
    OFFLOADING[kind](model, tmp_path)
    away = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    adapter = {name for name, _ in model.named_parameters() if ".default" in name}
    assert away >= (
        {name for name in adapter if ".layers.1." in name} if kind == "dispatched" else adapter
    )
    assert_rounded(model(**batch).logits, expected)  # layers with hooks are called one by one
    assert torch.equal(model.generate(**tokens), written)
    remove_hook_from_submodules(model)
    if kind == "cpu":
        assert_rounded(model(**batch).logits, expected)


def shuffled(method, seed):
    """A `PeftModel` on the one base model, its adapter's values by the seed."""
    torch.manual_seed(0)
    model = get_peft_model(
        llama(), method.config(target_modules=LLAMA, task_type="CAUSAL_LM")
    ).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default" in name:
                parameter.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("kind", OFFLOADING)
@torch.no_grad()
def test_adapters_of_an_offloaded_model_are_saved_loaded_and_added(method, kind, tmp_path):
    ids = next(batches(method))["input_ids"]
    model, other = shuffled(method, 1), shuffled(method, 2)
    first, second = (m(ids, **method.call).logits for m in (model, other))
    other.save_pretrained(tmp_path / "other")
    expected = peft.get_peft_model_state_dict(model)
    OFFLOADING[kind](model, tmp_path / "weights")
    saved = peft.get_peft_model_state_dict(model)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    model.load_adapter(str(tmp_path / "other"), "added")
    torch.testing.assert_close(model(ids, **method.call).logits, first)
    model.set_adapter("added")
    torch.testing.assert_close(model(ids, **method.call).logits, second)
    model.load_adapter(str(tmp_path / "other"), "default")
    model.set_adapter("default")
    torch.testing.assert_close(model(ids, **method.call).logits, second)
    model.delete_adapter("added")
    torch.testing.assert_close(model(ids, **method.call).logits, second)


@pytest.mark.parametrize("kind", OFFLOADING)
@torch.no_grad()
def test_an_offloaded_model_is_merged(method, kind, tmp_path):
    ids = next(batches(method))["input_ids"]
    model = shuffled(method, 1)
    with model.disable_adapter():
        base = model(ids).logits
    adapted = model(ids, **method.call).logits
    OFFLOADING[kind](model, tmp_path)
    model.merge_adapter(safe_merge=True, **method.merge)
    torch.testing.assert_close(model(ids, **method.call).logits, adapted, atol=1e-4, rtol=1e-3)
    model.unmerge_adapter()
    assert_rounded(model(ids, **method.call).logits, adapted)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, base)
    plain = model.merge_and_unload(**method.merge)
    torch.testing.assert_close(plain(ids).logits, adapted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", OFFLOADING)
def test_an_offloaded_base_gets_an_adapter_and_trains_it(method, kind, tmp_path):
    losses = []
    for offloaded in (False, True):
        base = llama_with_seed()
        if offloaded:
            OFFLOADING[kind](base, tmp_path)
        torch.manual_seed(1)
        model = get_peft_model(
            base, method.config(target_modules=LLAMA, task_type="CAUSAL_LM")
        ).eval()
        assert not any(p.is_meta for name, p in model.named_parameters() if ".default" in name)
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses.append([])
        for batch in batches(method):
            loss = model(**batch).loss
            losses[-1].append(loss.item())
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    assert_rounded(
        *(torch.tensor(curve) for curve in losses), terms=256 * len(losses[0])
    )  # a step carries on what came before


def llama_with_seed():
    torch.manual_seed(0)
    return llama()


SCRIPT = """
import json, sys
import torch
from accelerate import Accelerator
sys.path[:0] = json.loads(sys.argv[1])
from helpers.methods import METHODS
from helpers.models import mlp
import peft

torch.manual_seed(0)
method = METHODS[sys.argv[2]]
model = peft.get_peft_model(mlp(), method.config(target_modules=["0", "2"]))
accelerator = Accelerator(cpu=True)
data = torch.utils.data.DataLoader(torch.arange(32.0).view(4, 8) / 8, batch_size=2)
optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
model, optimiser, data = accelerator.prepare(model.eval(), optimiser, data)
for x in data:
    accelerator.backward(model(x, **method.call).square().mean())
    optimiser.step()
    optimiser.zero_grad()
accelerator.unwrap_model(model).save_pretrained(sys.argv[3], is_main_process=accelerator.is_main_process)
"""


@pytest.mark.processes
def test_the_launcher(tmp_path):
    """One method is enough: what a launched script is given of accelerate is the same for all."""
    name = "LOKR"
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        str(tmp_path / "train.py"),
    ]
    folder = tmp_path / "adapter"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, json.dumps([str(Path(__file__).parents[1])]), name, str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    torch.manual_seed(0)
    model = get_peft_model(mlp(), METHODS[name].config(target_modules=["0", "2"])).eval()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in (torch.arange(32.0).view(4, 8) / 8).split(2):
        model(x).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    loaded = peft.load_peft_weights(folder)
    assert_close(dict(peft.get_peft_model_state_dict(model)), loaded)


def test_saving_as_the_guides_do(method, tmp_path):
    """`save_pretrained` takes what it takes on a model of transformers."""
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(
        get_peft_model(llama(), method.config(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    )
    unwrapped = accelerator.unwrap_model(model)
    unwrapped.save_pretrained(
        tmp_path,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
        max_shard_size="2GB",
    )
    with pytest.warns(
        UserWarning, match="save_pretrained got unexpected keyword arguments: nonsense"
    ):
        unwrapped.peft_config["default"].save_pretrained(
            tmp_path / "config", push_to_hub=False, nonsense=1
        )
    loaded = PeftModel.from_pretrained(
        llama(), tmp_path, torch_dtype=torch.float16, device_map={"": "cpu"}
    )
    assert loaded.peft_config["default"].r == unwrapped.peft_config["default"].r
    assert (tmp_path / "config" / "adapter_config.json").exists()


def test_pushing_as_the_guides_do(method, monkeypatch):
    calls = []

    class Hub:
        def __init__(self, token=None):
            calls.append(token)

        def create_repo(self, repo_id, **options):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, folder_path, **options):
            calls.append(sorted(path.name for path in Path(folder_path).iterdir()))
            calls.append(options["commit_description"])

        def upload_file(self, path_or_fileobj, path_in_repo, **options):
            calls.append(
                (json.loads(path_or_fileobj)["r"], path_in_repo, options["commit_message"])
            )

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    model = get_peft_model(llama(), method.config(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.push_to_hub(
        "a/b",
        use_temp_dir=True,
        token="t",
        max_shard_size="5GB",
        safe_serialization=True,
        commit_description="why",
    )
    model.peft_config["default"].push_to_hub("a/b", token="t", commit_message="config")
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert calls == [
        "t",
        files,
        "why",
        "t",
        (model.peft_config["default"].r, "adapter_config.json", "config"),
    ]
