# SPDX-License-Identifier: Apache-2.0
"""What a user sees at a prompt: a short `repr` with sizes, and a table when a result is printed."""

import torch
from helpers.models import TARGETS, llama, mlp

import peft
from peft.base.tables import in_bytes


def adapted(config, model=None, name="default"):
    torch.manual_seed(0)
    return peft.get_peft_model(model or mlp(), config, name).eval()


def test_a_model_and_its_layers_print_as_tables():
    model = adapted(peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), llama(), "one")
    model.add_adapter("two", peft.LoraConfig(r=4, target_modules=["q_proj"]))
    model.merge_adapter(["two"])
    status = model.get_model_status()
    first, *rows = str(status).splitlines()
    assert first.startswith("LoraModel on LlamaForCausalLM: 4 layers with adapters, 256 of ")
    assert [row.split()[:3] for row in rows[1:]] == [
        ["one", "LORA", "active"],
        ["two", "LORA", "merged"],
    ]
    layers = model.get_layer_status()
    assert isinstance(layers, list) and layers[0].module_type == "lora.Linear"
    table = str(layers).splitlines()
    assert table[1].split()[:4] == [
        "model.model.layers.*.self_attn.q_proj",
        "(2x)",
        "lora.Linear",
        "one,",
    ]
    assert len(table) == 3
    model.disable_adapter_layers()
    assert "disabled" in str(model.get_model_status()) and "(disabled)" in str(
        model.get_layer_status()
    )


def test_results_print_as_tables_and_show_as_sizes():
    model = adapted(
        peft.PolyConfig(r=2, n_tasks=3, n_skills=2, target_modules=TARGETS, init_weights=False)
    )
    x = torch.randn(4, 8)
    fit = model.fit_task(1, lambda: model(x, task_ids=1).square().mean(), steps=20)
    assert repr(fit).startswith(f"TaskFit(task=1, 20 steps, loss {fit.losses[0]:.4g} to ")
    lines = str(fit).splitlines()
    assert lines[1].split() == ["0", f"{fit.losses[0]:.4g}"] and len(lines) == 11
    lora = peft.convert_to_lora(model, 1, task_id=1)
    assert repr(lora) == (
        f"<LoraConversion: LORA r=1, 4 tensors, 56 parameters, error {lora.error:.3g}; print it for "
        "a table>"
    )
    assert str(lora).splitlines()[2].split() == ["0", f"{lora.errors['0']:.3g}"]
    loras = adapted(peft.LoraConfig(r=2, target_modules=TARGETS), name="sum")
    poly = peft.convert_to_poly(loras, ["sum"])
    assert "POLY r=2, 6 tensors" in repr(poly) and str(poly).splitlines()[2].split() == ["sum", "0"]


def test_files_and_libraries_show_no_tensors(tmp_path):
    model = adapted(peft.LoKrConfig(r=2, target_modules=TARGETS))
    model.save_pretrained(tmp_path / "style")
    report = peft.inspect_lokr_file(tmp_path / "style", mlp())
    assert (
        "2 modules, from Hugging Face PEFT), 2 placed" in repr(report) and len(repr(report)) < 300
    )
    library = peft.AdapterLibrary(tmp_path)
    size = in_bytes(library["style"].bytes)
    assert str(library["style"]) == f"style: LOKR of rank 2, {size}, in style"
    number = sum(tensor.numel() for tensor in library.load("style").tensors.values())
    assert repr(library.load("style")) == f"LoadedAdapter(LOKR, 4 tensors, {number} parameters)"
