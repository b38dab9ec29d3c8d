# SPDX-License-Identifier: Apache-2.0
"""A method's own methods on the model: found by completion, `help()` and type checkers, without a
change to what clients check.
"""

import copy
import inspect
import io
import pickle
import pydoc
from pathlib import Path

import pytest
import torch
from helpers.methods import METHODS
from helpers.models import llama, mlp

import peft
from peft import PeftMixedModel, PeftModel, get_peft_model
from peft.base.registry import PEFT_TYPE_TO_TUNER_MAPPING
from peft.core.tuner import BaseTuner

OWN = {
    "POLY": """add_skills add_tasks average_skills begin_regime extract_tasks fit_task get_router_weights merge_adapter
        remove_tasks reorder_tasks set_router_weights train_only""",
    "VBLORA": "get_nb_savable_parameters print_savable_parameters",
    "LOKR": "clip_weight_norms",
    "LORA": "",
    "LOHA": "",
}
COMMON = """add_weighted_adapter disable_adapter_layers enable_adapter_layers merge_adapter merge_and_unload set_requires_grad unload
    unmerge_adapter"""


def small(name):
    return get_peft_model(mlp(), METHODS[name].config(target_modules=["0"]))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_models_methods_are_those_of_its_tuner(name):
    model = small(name)
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[name]
    for method in (*OWN[name].split(), *COMMON.split()):
        own, theirs = getattr(type(model), method), getattr(tuner, method)
        assert method in dir(model) and own.__doc__ == theirs.__doc__
        assert inspect.signature(own) == inspect.signature(theirs)
    text = pydoc.plain(pydoc.render_doc(model))
    assert all(f" {method}(self" in text for method in OWN[name].split())
    assert all(
        f" {method}(self" in pydoc.plain(pydoc.render_doc(PeftModel)) for method in COMMON.split()
    )


@pytest.mark.parametrize("name", sorted(METHODS))
def test_no_documented_method_of_a_tuner_is_left_out(name):
    """What a tuner's users call has examples, arguments or results in its docstring; helpers of the
    package have none.
    """
    tuner, methods = PEFT_TYPE_TO_TUNER_MAPPING[name], OWN[name].split()
    public = {
        key
        for key, value in inspect.getmembers(tuner, inspect.isfunction)
        if not key.startswith("_") and not hasattr(BaseTuner, key)
    }
    documented = {key for key in public if "Args:" in (getattr(tuner, key).__doc__ or "")}
    assert documented <= set(methods)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_classes_keep_the_names_that_clients_check(name, task_type):
    expected = peft.PeftModelForCausalLM if task_type else PeftModel
    model = get_peft_model(
        llama(), METHODS[name].config(target_modules=["q_proj"], task_type=task_type)
    )
    assert isinstance(model, expected) and type(model).__name__ == expected.__name__
    assert (type(model).__module__, type(model).__qualname__) == (
        "peft.peft_model",
        expected.__qualname__,
    )
    assert repr(model).startswith(f"{expected.__name__}(")
    assert type(model) is type(
        get_peft_model(
            llama(), METHODS[name].config(target_modules=["q_proj"], task_type=task_type)
        )
    )
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for same in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(same) is type(model)
        for key, tensor in model.state_dict().items():
            assert torch.equal(same.state_dict()[key], tensor)


class Own(PeftModel):
    """A user's subclass."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.made = True


def test_subclasses_and_engines_that_change_the_class():
    model = Own(mlp(), METHODS["POLY"].config(target_modules=["0"]))
    assert isinstance(model, Own) and type(model).__name__ == "Own" and model.made
    model.add_tasks(1)
    assert type(pickle.loads(pickle.dumps(model))) is type(model)

    class Sharded:
        pass

    swapped = type("Sharded" + type(model).__name__, (Sharded, type(model)), {})  # as FSDP2 does
    model.__class__ = swapped
    swapped.__module__, swapped.__qualname__ = __name__, swapped.__name__
    globals()[swapped.__name__] = swapped
    assert pickle.loads(pickle.dumps(swapped)) is swapped
    assert type(copy.deepcopy(model)) is swapped


def test_methods_reach_the_tuner_of_now():
    """A client that patches the tuner's method sees the model's calls, as when they were forwarded
    by name.
    """
    model, seen = small("POLY"), []
    model.base_model.add_tasks = lambda *args, **kwargs: seen.append((args, kwargs))
    model.add_tasks(2, init="uniform")
    assert seen == [((2,), {"init": "uniform"})]
    mixed = get_peft_model(mlp(), METHODS["POLY"].config(target_modules=["0"]), mixed=True)
    assert type(mixed) is PeftMixedModel and isinstance(mixed, PeftModel)


GOOD = """
from torch import nn
from peft import IA3Config, LoKrConfig, LoraConfig, PeftModel, PolyConfig, VBLoRAConfig, get_peft_model
from peft.helpers import DoraCaching
from peft.tuners import PrefixTuningConfig
from peft.tuners.lora import EvaConfig
base = nn.Sequential(nn.Linear(4, 4))
poly = get_peft_model(base, PolyConfig(n_tasks=2))
reveal_type(poly.fit_task("a", []).losses)
reveal_type(poly.get_router_weights())
reveal_type(get_peft_model(base, VBLoRAConfig()).get_nb_savable_parameters())
reveal_type(get_peft_model(base, LoKrConfig(), "b", False).clip_weight_norms(1.0))
reveal_type(get_peft_model(base, LoKrConfig(), mixed=True))
reveal_type(get_peft_model(base, LoraConfig()).merge_and_unload())
poly.merge_adapter(task_id=1)
isinstance(poly, (IA3Config, PrefixTuningConfig, EvaConfig, DoraCaching))
def train(model: PeftModel) -> None: ...
train(poly)
"""
REVEALED = [
    "list[float]",
    "dict[str, Any]",
    "tuple[int, int]",
    "dict[str, float]",
    "peft.mixed_model.PeftMixedModel",
    "Any",
]
BAD = """
from torch import nn
from peft import IA3Confg, PolyConfig, get_peft_model
from peft.tuners import Nothing
from peft.tuners.lora import EvaCnfig
from peft.helpers import DoraCache
from peft.utils.other import no_such
poly = get_peft_model(nn.Linear(4, 4), PolyConfig())
poly.begin_regime(3)
poly.fit_task("a")
"""


def test_type_checkers_see_methods_and_misspelt_imports(tmp_path, monkeypatch):
    from mypy import api

    for name, text in (("good", GOOD), ("bad", BAD)):
        (tmp_path / f"{name}.py").write_text(text.lstrip())
    monkeypatch.setenv("MYPYPATH", str(Path(peft.__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    # Torch itself, which would take half a minute, is left unread: its classes are Any.
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nignore_missing_imports = true\nfollow_imports = "
        "silent\n[mypy-torch.*]\nfollow_imports = skip\n"
    )
    report, problems, _ = api.run(
        ["--cache-dir", str(tmp_path / "cache"), "--no-error-summary", "good.py", "bad.py"]
    )
    assert not problems
    good = [line for line in report.splitlines() if line.startswith("good")]
    assert [line.split('"')[1].replace("builtins.", "") for line in good] == REVEALED, report
    bad = [
        line.split(":")[1]
        for line in report.splitlines()
        if line.startswith("bad") and ": error:" in line
    ]
    assert bad == ["2", "3", "4", "5", "6", "8", "9"], report
    assert 'has no attribute "IA3Confg"; maybe "IA3Config"?' in report
