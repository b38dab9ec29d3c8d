# SPDX-License-Identifier: Apache-2.0
"""Writes or reads the adapters of the interchange tests with whichever `peft` the process finds,
and measures what they do.

    python worker.py PACKAGE_FOLDER

Orders come as lines of JSON, [verb, argument, …], and each is answered by one: null when it is
done, or what went wrong. Whatever else is printed goes to the log.
"""

import hashlib
import importlib.metadata
import json
import sys
import traceback
import warnings
from functools import partial
from pathlib import Path

import torch
from interchange_bases import make_base, make_inputs
from interchange_starts import read_starts, start

import peft


def values(key, shape, seed):
    """Values for a tensor that depend on its key alone, so that both packages give an adapter the
    same ones.
    """
    digest = hashlib.sha256(f"{key} {seed}".encode()).digest()
    tensor = (
        torch.randn(
            shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        )
        * 0.3
    )
    return tensor.abs() + 0.5 if "magnitude_vector" in key else tensor


def plain_name(name, adapter):
    """A parameter's name as both packages have it: the place of the adapter's name and of a shared
    bank left out.
    """
    name = name.replace(f".{adapter}.", ".").removesuffix(f".{adapter}")
    return "vblora_vector_bank" if name.endswith("vblora_vector_bank") else name


def own_tensors(model, adapter):
    """What a file of the adapter holds. The peer repeats the biases of modules that are trained
    whole, and adds the frozen ones.
    """
    state = peft.get_peft_model_state_dict(model, adapter_name=adapter)
    return {
        key: t
        for key, t in state.items()
        if not key.endswith((".modules_to_save.bias", ".original_module.bias"))
    }


def call(model, case):
    """The model's output."""
    args, kwargs = make_inputs(case["base"], case["seed"])
    args = [arg.double() if arg.is_floating_point() else arg for arg in args]
    if case["task_ids"] is not None:
        kwargs["task_ids"] = torch.tensor(case["task_ids"])
    result = model(*args, **kwargs)
    return (
        result if isinstance(result, torch.Tensor) else result[0]
    )  # transformers' outputs have what is of interest first


def fill(model, adapter, case):
    """Give an adapter its values."""
    config = model.peft_config[adapter]
    sparse = getattr(config, "save_only_topk_weights", False)
    if sparse:
        config.save_only_topk_weights = False
    with torch.no_grad():
        for key, tensor in own_tensors(model, adapter).items():
            tensor.copy_(values(key, tensor.shape, case["seed"]))
    if sparse:
        config.save_only_topk_weights = True


def make_config(case, adapter):
    """The config; new LoKr adapters of this project are asked for the peer's order of a Conv1d's
    elements.
    """
    config_class = getattr(peft, case["config_class"])
    same_order = (
        {"kronecker_layout": "flat"}
        if "kronecker_layout" in config_class.__dataclass_fields__
        else {}
    )
    return config_class(**case["adapters"][adapter], **same_order)


def write(case, folder):
    """Make a case's adapters and save them."""
    first, *others = case["adapters"]
    model = peft.get_peft_model(
        make_base(case["base"], case["seed"]), make_config(case, first), first
    ).eval()
    for name in others:
        model.add_adapter(name, make_config(case, name))
    for name in case["adapters"]:
        fill(model, name, case)
    model.save_pretrained(folder, safe_serialization=case["file"] == "safetensors")
    if case["lora_rank"] is not None:
        peft.save_as_lora(folder / "as_lora", model, case["lora_rank"], adapter_name=first)
    return model.eval()


def read(case, folder):
    """Load a case's adapters into a fresh base model."""
    first, *others = case["adapters"]
    base = make_base(case["base"], case["seed"])
    if case["reader"] == "from_pretrained":
        model = peft.PeftModel.from_pretrained(base, folder, first, is_trainable=True)
        for name in others:
            model.load_adapter(folder / name, name, is_trainable=True)
        return model.eval()
    model = None
    for name in case["adapters"]:
        path = folder if name == first else folder / name
        config = peft.PeftConfig.from_pretrained(path)
        config.inference_mode = False
        if model is None:
            model = peft.get_peft_model(base, config, name)
        else:
            model.add_adapter(name, config)
        result = peft.set_peft_model_state_dict(model, peft.load_peft_weights(path), name)
        assert not result.unexpected_keys, result.unexpected_keys
    return model.eval()


def measure(model, case):
    """Everything about a model with adapters that the two packages should agree on, in float64 to
    tell faults from rounding.
    """
    result = {}
    model.double()
    for name in case["adapters"]:
        model.set_adapter(name)
        result[f"state {name}"] = {
            key: tensor.clone() for key, tensor in own_tensors(model, name).items()
        }
        result[f"output {name}"] = call(model, case).detach()
        result[f"gradients {name}"] = gradients(model, name, case)
        with model.disable_adapter():
            result[f"disabled {name}"] = call(model, case).detach()
    if len(case["adapters"]) > 1:
        model.base_model.set_adapter(list(case["adapters"]))
        result["output of both"] = call(model, case).detach()
    is_activated = any(c.get("alora_invocation_tokens") for c in case["adapters"].values())
    if case["task_ids"] is None and not is_activated:
        model.merge_adapter()
        result["merged"] = call(model, case).detach()
        model.unmerge_adapter()
        result["unmerged"] = call(model, case).detach()
        result["merged and unloaded"] = call(model.merge_and_unload(safe_merge=True), case).detach()
    return result


def measure_conversion(case, folder):
    """What the LoRA adapter does that the writer made of the first adapter. Its factors are defined
    but for signs.
    """
    model = peft.PeftModel.from_pretrained(
        make_base(case["base"], case["seed"]), folder / "as_lora"
    )
    shapes = {
        key: torch.tensor(tensor.shape)
        for key, tensor in peft.get_peft_model_state_dict(model).items()
    }
    return {"shapes as LoRA": shapes, "output as LoRA": call(model.eval().double(), case).detach()}


def gradients(model, adapter, case):
    """Gradients of a training step without its random parts, by plain name. Indices and weights of
    vectors can't be trained.
    """
    if any(config.get("save_only_topk_weights") for config in case["adapters"].values()):
        return {}
    output = call(model, case)
    (output * values("loss", output.shape, case["seed"])).sum().backward()
    result = {
        plain_name(n, adapter): p.grad.clone()
        for n, p in model.named_parameters()
        if p.requires_grad and p.grad is not None
    }
    model.zero_grad()
    return result


def run(verb, case, folder):
    """One case's result; an error is a result too."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = {"write": write, "read": read}[verb](case, folder)
        except Exception:
            return {"error": traceback.format_exc(limit=-3)}
        seen = [
            str(w.message)
            for w in caught
            if not issubclass(w.category, (DeprecationWarning, FutureWarning))
        ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            converted = measure_conversion(case, folder) if case["lora_rank"] is not None else {}
            return {"warnings": seen, **measure(model, case), **converted}
        except Exception:
            return {"error": traceback.format_exc(limit=-3)}


def work(verb, cases, folder, result):
    """Write or read all cases; `result`, a file, gets a dictionary of tensors and plain data."""
    results = {case["id"]: run(verb, case, Path(folder) / case["id"]) for case in cases}
    torch.save({"version": importlib.metadata.version("peft"), "cases": results}, result)


def look(folders, result):
    """Read adapters of two linear layers; `result`, a file, gets what is said of each folder."""
    found = {}
    for folder in folders:
        base = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                peft.PeftModel.from_pretrained(base, folder)
            found[folder] = "read"
        except Exception as error:
            found[folder] = str(error)
    torch.save(found, result)


def write_experts(folder, seed, number):
    """Save LoRA adapters with values of the same seed in both packages, whose first singular value
    stands out, as the peer finds its vector by a few steps of power iteration.
    """
    for i in range(number):
        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"])
        model = peft.get_peft_model(make_base(["llama", "ForCausalLM"], seed), config)
        state = peft.get_peft_model_state_dict(model)
        for key, tensor in state.items():
            drawn = values(f"{key} expert {i}", tensor.shape, seed)
            size = torch.tensor([4.0, 0.5, 0.25])[:, None] if "lora_A" in key else 1.0
            state[key] = drawn * size
        peft.set_peft_model_state_dict(model, state)
        model.save_pretrained(Path(folder) / str(i))


def arrow(folder, seed, result):
    """Route over the experts in a folder by Arrow; `result`, a file, gets the outputs by `top_k` and
    number of general adapters.
    """
    if not Path(folder).exists():
        write_experts(folder, seed, 6)
    found, places = {}, [str(Path(folder) / str(i)) for i in range(6)]
    for top_k, general in ((1, 0), (2, 0), (4, 0), (2, 1), (3, 2)):
        config = peft.ArrowConfig(
            top_k=top_k, router_temperature=0.7, use_gks=bool(general), rng_seed=0
        )
        model = peft.create_arrow_model(
            make_base(["llama", "ForCausalLM"], seed),
            places[:4],
            config,
            places[4 : 4 + general] or None,
        ).eval()
        args, kwargs = make_inputs(["llama", "ForCausalLM"], seed)
        found[f"{top_k} {general}"] = model.double()(*args, **kwargs)[0].detach()
    torch.save(found, result)


def main():
    answers, sys.stdout = sys.stdout, sys.stderr
    assert Path(peft.__file__).is_relative_to(sys.argv[1]), (
        f"`peft` came from {peft.__file__}, not from {sys.argv[1]}"
    )
    torch.set_num_threads(1)
    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        try:
            known = {"look": look, "arrow": arrow, "start": start, "read_starts": read_starts}
            known.get(verb, partial(work, verb))(*arguments)
            answer = None
        except Exception:
            answer = traceback.format_exc()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
