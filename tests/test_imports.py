# SPDX-License-Identifier: Apache-2.0
"""Imports at any depth, also those inside functions: none points up, no tuner is named by the core,
and each module stands alone.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import peft

ROOT = Path(peft.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
TUNERS = sorted(path.parent.name for path in ROOT.glob("tuners/*/__init__.py"))


def module_name(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in FILES}


def guarded(tree):
    """Nodes under `if TYPE_CHECKING`, which are never run."""
    tests = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    return {id(inner) for node in tests for child in node.body for inner in ast.walk(child)}


def imported(path):
    """All modules of this package that a file imports anywhere."""
    tree, name = ast.parse(path.read_text()), module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    skipped, found = guarded(tree), set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
                if node.level
                else ""
            )
            source = ".".join(part for part in (base, node.module) if part)
            found |= {
                f"{source}.{a.name}" if f"{source}.{a.name}" in MODULES else source
                for a in node.names
            }
    return {m for m in found if m == "peft" or m.startswith("peft.")} - {name}


GRAPH = {module_name(path): imported(path) for path in FILES}


def height(name):
    parts = name.split(".")
    if parts[:2] == ["peft", "utils"] or parts[1:] == ["_version"]:
        return 0
    if parts[1:] == ["config"]:
        return 1
    if parts[:2] == ["peft", "tuners"]:
        return 4 if len(parts) == 2 else 3 if parts[2] in TUNERS else 2
    return 6 if name == "peft" else 5


def test_no_import_points_up_even_inside_functions():
    wrong = {
        f"{a} -> {b}" for a, targets in GRAPH.items() for b in targets if height(b) > height(a)
    }
    assert wrong == set()


def test_everything_imported_exists():
    assert {target for targets in GRAPH.values() for target in targets} <= MODULES


def test_the_whole_graph_has_no_cycle():
    remaining = {name: set(targets) for name, targets in GRAPH.items()}
    while leaves := {name for name, targets in remaining.items() if not targets & remaining.keys()}:
        for name in leaves:
            del remaining[name]
    assert remaining == {}


def test_tuners_are_named_by_their_own_folder_alone():
    """Neither imported nor spelt out: a name in the core would be a second place to touch for a new
    method.
    """
    assert len(TUNERS) >= 3
    for path in FILES:
        name = module_name(path)
        own = name.split(".")[2] if height(name) == 3 else None
        if (
            name in ("peft", "peft.tuners")
            or path.name in ("peft_types.py", "markers.py", "placeholder_names.py")
            or path.parent.name == "files"
        ):
            # The public list, the interface's vocabulary, and what other programs write into files.
            continue
        tree = ast.parse(path.read_text())
        words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        words |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        strings = {
            n.value
            for n in ast.walk(tree)
            if isinstance(n, ast.Constant) and isinstance(n.value, str)
        }
        doc = {
            ast.get_docstring(n, clean=False)
            for n in ast.walk(tree)
            if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))
        }
        words |= {string for string in strings - doc if len(string) < 40}
        words -= {
            "supports_lora_conversion",
            "lora_",
        }  # of the interface: what every method has, and hotswap's default prefix
        words = {
            word for word in words if not (own and word.lstrip(".").startswith(f"{own}_"))
        }  # `poly_lora_A` is Poly's own
        for tuner in set(TUNERS) - {own}:
            found = sorted(
                word
                for word in words
                if re.match(rf"(?:^|.*[^a-z]){tuner}(?:[^a-z]|config|model|layer|$)", word.lower())
            )
            assert not found, f"{name} names {tuner}: {found}"


@pytest.mark.parametrize(
    "library", ["transformers", "huggingface_hub", "accelerate", "bitsandbytes", "triton"]
)
def test_no_heavy_library_is_imported_at_the_top(library):
    for path in FILES:
        if library == "triton" and path.name in ("kernels.py", "mixing_kernels.py"):
            continue  # is imported itself where kernels can run, see below
        for node in ast.parse(path.read_text()).body:
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [getattr(node, "module", None) or ""]
            )
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert not any(name.split(".")[0] == library for name in names), path


def test_kernels_are_imported_inside_functions():
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                names = {(node.module or "").rpartition(".")[2], *[a.name for a in node.names]}
                assert not names & {"kernels", "mixing_kernels"}, path


FRESH = """
import sys, tempfile, torch, peft
heavy = ("transformers", "huggingface_hub", "accelerate", "bitsandbytes", "triton", "httpx", "requests")
assert not [name for name in heavy if name in sys.modules]
print(peft.helpers.__name__, peft.functional.__name__, peft.import_utils.__name__)
for name in heavy:
    sys.modules[name] = None
for config in (
    peft.LoKrConfig(r=2, target_modules=["0"]),
    peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=4, target_modules=["0"]),
    peft.PolyConfig(r=2, target_modules=["0"]),
):
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), config).eval()
    x = torch.ones(1, 8)
    y = model(x)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model.load_adapter(folder, "again")
        assert torch.equal(peft.PeftModel.from_pretrained(model.unload(), folder)(x), y)
print("fine")
"""


@pytest.mark.processes
def test_a_fresh_process_imports_little_and_needs_no_more():
    """Importing loads no heavy library and all of the documented modules; plain torch models need
    neither transformers nor accelerate, on a CPU no Triton, and local files nothing of the Hub.
    """
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", FRESH],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "peft.helpers peft.functional peft.import_utils\nfine\n", result.stderr


def test_every_public_name_is_there():
    assert len(set(peft.__all__)) == len(peft.__all__)
    for name in peft.__all__:
        assert getattr(peft, name) is not None
