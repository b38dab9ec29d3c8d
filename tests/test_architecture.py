# SPDX-License-Identifier: Apache-2.0
"""The house rules: who may import whom and how large a file may grow."""

import ast
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import peft
from peft.base import registry as peft_types
from peft.config import TargetedConfig
from peft.core.base_layer import is_linear
from peft.tuners.tuners_utils import AdapterParameterDict, BaseTuner, BaseTunerLayer

ROOT = Path(peft.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
METHODS = sorted(
    path.name for path in (ROOT / "tuners").iterdir() if (path / "__init__.py").exists()
)


def module_name(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """Modules of this package that a file imports when it is imported itself."""
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            source = f"{base}.{node.module}" if node.module else base
            found |= {
                f"{source}.{alias.name}" if f"{source}.{alias.name}" in MODULES else source
                for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peft"):
            found.add(node.module)
    return found - {name}


MODULES = {module_name(path) for path in FILES}
GRAPH = {module_name(path): imports(path) & MODULES for path in FILES}


def layer_of(name):
    """How high a module stands; imports point down."""
    if name.startswith(("peft.utils", "peft._version")):
        return 0
    if name == "peft.config":
        return 1
    if name.startswith("peft.tuners"):
        return 4 if name == "peft.tuners" else 3 if name.split(".")[2] in METHODS else 2
    return 6 if name == "peft" else 5


def test_imports_point_down():
    wrong = [
        f"{a} -> {b}" for a, targets in GRAPH.items() for b in targets if layer_of(b) > layer_of(a)
    ]
    assert not wrong


def test_there_is_no_cycle():
    state = {}

    def visit(name, trail):
        if state.get(name) == "open":
            raise AssertionError(" -> ".join([*trail, name]))
        if name not in state:
            state[name] = "open"
            for target in sorted(GRAPH[name]):
                visit(target, [*trail, name])
            state[name] = "done"

    for name in GRAPH:
        visit(name, [])
    assert set(state) == MODULES


def test_the_core_names_no_tuner_and_tuners_do_not_know_each_other():
    for name, targets in GRAPH.items():
        own = name.split(".")[2] if layer_of(name) == 3 else None
        named = {target.split(".")[2] for target in targets if layer_of(target) == 3}
        if name != "peft.tuners":
            assert named <= {own}, name


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_are_short_and_licensed(path):
    text = path.read_text()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            size = (
                node.end_lineno - node.lineno + 1 - (docstring.count("\n") + 1 if docstring else 0)
            )
            assert size <= 60, node.name


def test_a_method_is_a_config_a_layer_a_tuner_and_a_registration(tmp_path, monkeypatch):
    """The example of docs/adding-a-tuner.md, run as it stands there."""
    for mapping in ("CONFIG", "TUNER", "PREFIX"):
        registry = getattr(peft_types, f"PEFT_TYPE_TO_{mapping}_MAPPING")
        for key in list(registry):
            monkeypatch.setitem(registry, key, registry[key])
    blocks = (ROOT.parents[1] / "docs" / "adding-a-tuner.md").read_text().split("```python\n")[1:]
    code = "\n".join(block.split("```")[0] for block in blocks[:4])
    for relative, absolute in [
        ("from ...", "from peft."),
        ("from .._", "from peft.tuners._"),
        ("from .", "# from ."),
    ]:
        code = code.replace(relative, absolute)
    namespace = {"__name__": "rankone"}
    sys.modules["rankone"] = type(sys)("rankone")
    try:
        exec(compile(code, "adding-a-tuner.md", "exec"), namespace)
        config_cls = namespace["RankOneConfig"]
        assert issubclass(config_cls, TargetedConfig)
        assert issubclass(namespace["RankOneModel"], BaseTuner)
        assert issubclass(namespace["Linear"], BaseTunerLayer)
        model = peft.get_peft_model(
            nn.Sequential(nn.Linear(4, 6)), config_cls(target_modules=["0"])
        )
        layer = model.base_model.model[0]
        assert isinstance(layer.rankone_a, AdapterParameterDict)
        assert is_linear(layer)
        with torch.no_grad():
            layer.rankone_b["default"].normal_()
        x = torch.randn(5, 4)
        a, b = layer.rankone_a["default"], layer.rankone_b["default"]
        expected = layer.base_layer(x) + torch.outer(x @ a, b)
        torch.testing.assert_close(model(x), expected)
        model.save_pretrained(tmp_path)
        base = model.merge_and_unload()
        torch.testing.assert_close(base(x), expected)
        again = peft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 6)), tmp_path)
        assert torch.equal(again.base_model.model[0].rankone_b["default"], b)
    finally:
        del sys.modules["rankone"]
        for mapping in ("CONFIG", "TUNER", "PREFIX"):
            registry = getattr(peft_types, f"PEFT_TYPE_TO_{mapping}_MAPPING")
            for key in [key for key in registry if key == "RANKONE"]:
                del registry[key]
        forget_type("RANKONE")


def forget_type(name):
    """Take a member that a registration added off `PeftType`, for the tests that come after."""
    kinds = peft.PeftType
    kinds._member_names_.remove(name)
    del kinds._member_map_[name], kinds._value2member_map_[name]
    type.__delattr__(kinds, name)
