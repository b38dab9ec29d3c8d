# SPDX-License-Identifier: Apache-2.0
"""The house rules: imports point down the floors, methods do not know each other, files and functions are short."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import peft

ROOT = Path(peft.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
METHODS = sorted(path.parent.name for path in ROOT.glob("tuners/*/__init__.py"))

# From the ground up; an import leads to the same floor or one below.
FLOORS = (
    ("_version", "import_utils", "base"),
    ("ops", "integrations"),
    ("checkpoint",),
    ("config",),
    ("core",),
    ("peft_model", "status"),
    (
        "tuners.tuners_utils",
        "tuners.lycoris_utils",
        "tuners.mixed",
        "tuners.param_wrapper",
        *(f"tuners.{m}" for m in METHODS),
    ),
    ("tuners",),
    (
        "mixed_model",
        "mapping",
        "planning",
        "inspection",
        "standalone",
        "optimizers",
        "clustering",
    ),
    (
        "auto",
        "base_models",
        "functional",
        "helpers",
        "library",
        "mapping_func",
        "timing",
        "utils",
    ),
    ("",),
    ("cli", "__main__"),
)


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imported(path):
    """Modules of the package that a file imports anywhere: at the top, in functions, for type checkers."""
    package = (
        module_name(path).split(".")
        if path.name == "__init__.py"
        else module_name(path).split(".")[:-1]
    )
    package, found = [part for part in package if part], set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = package[: len(package) - node.level + 1]
            source = ".".join([*start, *((node.module or "").split(".") if node.module else [])])
            for alias in node.names:
                full = f"{source}.{alias.name}".lstrip(".")
                found.add(full if full in MODULES else source)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            assert not any(name.split(".")[0] == "peft" for name in names), (
                f"{path}: import relatively"
            )
    return found - {module_name(path)}


GRAPH = {name: imported(path) for name, path in MODULES.items()}


def floor(module):
    """The floor of a module: that of the longest prefix that has one."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        for height, names in enumerate(FLOORS):
            if prefix in names:
                return height
    raise AssertionError(module)


def method_of(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "tuners" and parts[1] in METHODS else None


def test_imports_lead_to_modules_that_exist_and_point_down():
    for module, targets in GRAPH.items():
        assert targets <= MODULES.keys(), module
        assert not [t for t in targets if floor(t) > floor(module)], module


def test_no_ring_of_imports_at_any_depth():
    remaining = {name: set(targets) for name, targets in GRAPH.items()}
    while leaves := {name for name, targets in remaining.items() if not targets & remaining.keys()}:
        for name in leaves:
            del remaining[name]
    assert remaining == {}


def test_methods_do_not_import_each_other():
    for module, targets in GRAPH.items():
        if own := method_of(module):
            assert {method_of(target) for target in targets} <= {own, None}, module


def words_of(path):
    """Names and short strings in a file's code, docstrings left out."""
    tree = ast.parse(path.read_text())
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield "" if id(node) in docs or len(node.value) >= 40 else node.value


def test_a_method_is_named_by_its_own_folder_alone():
    """A name in the core would be a second place to touch for a new method."""
    # The public list, the interface's vocabulary, and what other programs write into files.
    apart = {"", "tuners", "base.registry"}
    apart |= {"base.placeholders", "base.placeholder_names", "base.other_places"}
    # Of the interface: what every method has, the default prefix of hot swapping, and a name of
    # `peft.utils`.
    common = {"supports_lora_conversion", "lora_", "replace_lora_weights_loftq"}
    for module, path in MODULES.items():
        # The command line offers conversions by the names of methods.
        if module in apart or path.parent.name == "files" or module.startswith("cli."):
            continue
        own = method_of(module)
        words = {w for w in words_of(path) if not (own and w.lstrip(".").startswith(f"{own}_"))}
        for method in set(METHODS) - {own}:
            pattern = re.compile(rf"(?:^|.*[^a-z]){method}(?:[^a-z]|config|model|layer|$)")
            assert not [w for w in words - common if pattern.match(w.lower())], (module, method)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_and_functions_are_short_and_licensed(path):
    text = path.read_text()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            documented = docstring.count("\n") + 1 if docstring else 0
            assert node.end_lineno - node.lineno + 1 - documented <= 60, node.name


def at_the_top(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_heavy_libraries_and_kernels_are_imported_where_they_are_used(path):
    heavy = {"transformers", "huggingface_hub", "accelerate", "bitsandbytes", "triton"}
    kernels = {file.stem for file in FILES if file.stem.endswith("_triton")}
    if path.stem in kernels:
        heavy.remove("triton")
    for name in at_the_top(path):
        assert name.split(".")[0] not in heavy
        assert not kernels & set(name.split(".")) or path.stem in kernels


FRESH = """
import sys, tempfile, torch, peft
heavy = (
    "transformers", "huggingface_hub", "accelerate", "bitsandbytes", "triton", "httpx", "requests",
    "click", "peft.cli",
)
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
    """Importing loads no heavy library and all of the documented modules; plain torch models need neither
    transformers nor accelerate, on a CPU no Triton, and local files nothing of the Hub.
    """
    command = [sys.executable, "-W", "error::UserWarning", "-c", FRESH]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout == "peft.helpers peft.functional peft.import_utils\nfine\n", result.stderr


def test_every_public_name_is_there():
    assert len(set(peft.__all__)) == len(peft.__all__)
    for name in peft.__all__:
        assert getattr(peft, name) is not None
