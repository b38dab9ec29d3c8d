# SPDX-License-Identifier: Apache-2.0
"""The table of what there is of Hugging Face PEFT: as the code is now, as that package is, and
true.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import peft

DOCS = Path(__file__).parents[1] / "docs"
PEER = Path(os.environ.get("PEFT_PEER", DOCS.parent / ".peer")).resolve()
# Options of LoRA's features that ask for nothing by themselves.
MEANINGLESS_ALONE = {
    "megatron_core",
    "qalora_group_size",
    "corda_config",
    "eva_config",
    "loftq_config",
    "lora_ga_config",
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compatibility", DOCS / "compatibility.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(heading):
    """The cells of a table of the page, a dictionary for each row."""
    section = (DOCS / "compatibility.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [
        [cell.strip(" `") for cell in line.strip("| ").split(" | ")]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    return [dict(zip(lines[0], [*line, *[""] * len(lines[0])], strict=False)) for line in lines[2:]]


def test_the_page_is_up_to_date(script):
    assert script.page() == (DOCS / "compatibility.md").read_text(), "run `make docs`"


def test_methods_are_what_the_page_says():
    methods = {row["method"]: row for row in rows("Methods")}
    assert set(methods) == set(peft.PeftType.__members__)
    for name, row in methods.items():
        config_cls = getattr(peft, row["config"])
        if row["here"] in ("provided", "added"):
            assert peft.get_peft_config({"peft_type": name}) == config_cls()
        else:
            assert row["here"] == "placeholder"
            for call in (config_cls, lambda name=name: peft.get_peft_config({"peft_type": name})):
                with pytest.raises(ValueError, match="is not provided by this package"):
                    call()


def test_options_are_what_the_page_says():
    options = rows("Options")
    for row in options:
        for method in ("POLY", "VBLORA", "LOKR", "LOHA", "LORA"):
            config = peft.get_peft_config({"peft_type": method})
            is_field = row[method] in ("provided", "placeholder", "added")
            assert hasattr(config, row["option"]) or not is_field, (method, row["option"])
            is_written = (
                row[method] in ("provided", "placeholder") and row["option"] not in config.unsaved
            )
            if row["option"] != "kronecker_layout":  # the model decides
                assert (row["option"] in config.to_dict()) == is_written, (method, row["option"])
        if row["LORA"] == "placeholder" and row["option"] not in MEANINGLESS_ALONE:
            with pytest.raises(peft.PeftError, match=f"`{row['option']}`"):
                peft.LoraConfig(**{row["option"]: [[0, 1]]})
    assert sum(row["LORA"] == "placeholder" for row in options) > 5


@pytest.mark.processes
def test_the_list_is_what_the_other_package_has():
    code = (
        "import json, runpy; print(json.dumps(runpy.run_path('docs/compatibility.py')['record']()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(PEER), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=DOCS.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads(
        (DOCS / "compatibility.json").read_text()
    )
