# SPDX-License-Identifier: Apache-2.0
"""Adapters written by Hugging Face PEFT 0.21.2, with the outputs they had there."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peft
from peft import PeftModel, get_peft_model, get_peft_model_state_dict

pytestmark = pytest.mark.quick
FOLDER = Path(__file__).parent
CASES = sorted(path.parent.name for path in FOLDER.glob("*/case.json"))
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def base_model(folder):
    spec = json.loads((folder / "case.json").read_text())["base"]
    if spec["kind"] == "sequential":
        layers = []
        for name, *arguments in spec["layers"]:
            options = arguments.pop() if arguments and isinstance(arguments[-1], dict) else {}
            layers.append(getattr(nn, name)(*arguments, **options))
        model = nn.Sequential(*layers)
    else:
        import transformers

        fields = dict(spec["config"])
        config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
        model = getattr(transformers, spec["cls"])(config)
    model.load_state_dict(load_file(folder / "base.safetensors"), strict=False)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.eval()


@pytest.fixture(params=CASES)
def case(request):
    folder = FOLDER / request.param
    spec = json.loads((folder / "case.json").read_text())
    tensors = load_file(folder / "io.safetensors")
    inputs = {key[3:]: tensor for key, tensor in tensors.items() if key.startswith("in.")}

    def run(model, rows=slice(None), **options):
        some = {key: tensor[rows] for key, tensor in inputs.items()}
        with torch.no_grad():
            output = (
                model(*some.values(), **options)
                if spec["base"]["kind"] == "sequential"
                else model(**some, **options)
            )
        return output if isinstance(output, torch.Tensor) else output.logits

    spec.update(folder=folder, run=run, out=tensors["out"], out_disabled=tensors["out_disabled"])
    spec["call"] = {key: torch.tensor(value) for key, value in spec["forward"].items()}
    return spec


def test_there_are_ten_cases():
    assert len(CASES) == 10


def test_loads_to_the_writers_outputs(case):
    model = PeftModel.from_pretrained(base_model(case["folder"]), case["folder"] / "adapter")
    torch.testing.assert_close(case["run"](model, **case["call"]), case["out"], **CLOSE)
    with model.disable_adapter():
        torch.testing.assert_close(
            case["run"](model, **case["call"]), case["out_disabled"], **CLOSE
        )


def test_merges_to_the_writers_outputs_and_back(case):
    base = base_model(case["folder"])
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = PeftModel.from_pretrained(base, case["folder"] / "adapter")
    tasks = case["call"].get("task_ids")
    if tasks is None:
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(case["run"](model), case["out"], **CLOSE)
        model.unmerge_adapter()
    else:
        for task in tasks.unique().tolist():
            model.merge_adapter(task_id=task)
            torch.testing.assert_close(
                case["run"](model, tasks == task), case["out"][tasks == task], **CLOSE
            )
            model.unmerge_adapter()
    after = model.unload().state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_writes_what_it_read(case, tmp_path):
    model = PeftModel.from_pretrained(base_model(case["folder"]), case["folder"] / "adapter")
    model.save_pretrained(tmp_path)
    theirs = load_file(case["folder"] / "adapter" / "adapter_model.safetensors")
    ours = load_file(tmp_path / "adapter_model.safetensors")
    assert {k: (t.shape, t.dtype) for k, t in ours.items()} == {
        k: (t.shape, t.dtype) for k, t in theirs.items()
    }
    for key, tensor in theirs.items():
        # Top-k weights go through a logarithm and back; all else is kept to the bit.
        tolerance = 1e-7 if key.endswith("_topk_weights") else 0
        torch.testing.assert_close(ours[key], tensor, atol=tolerance, rtol=0)
    fields = json.loads((case["folder"] / "adapter" / "adapter_config.json").read_text())
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written.keys() == fields.keys()
    for names in ("target_modules", "modules_to_save"):
        assert set(written.pop(names) or ()) == set(fields.pop(names) or ())
    assert written.pop("peft_version") == peft.__version__
    assert fields.pop("peft_version") == "0.21.2"
    assert written == fields


def test_a_fresh_adapter_has_the_same_tensors(case):
    config = getattr(peft, case["method"])(**case["config"])
    state = get_peft_model_state_dict(get_peft_model(base_model(case["folder"]), config))
    theirs = load_file(case["folder"] / "adapter" / "adapter_model.safetensors")
    assert {k: (t.shape, t.dtype) for k, t in state.items()} == {
        k: (t.shape, t.dtype) for k, t in theirs.items()
    }
