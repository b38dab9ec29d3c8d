# SPDX-License-Identifier: Apache-2.0
"""The documentation site builds without a warning, and its reference has every public name."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import peft

ROOT = Path(__file__).parents[1]


@pytest.mark.processes
def test_the_site_builds_with_warnings_as_errors(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    reference = (tmp_path / "reference" / "poly.html").read_text()
    assert "Rank of each skill." in reference  # an argument of PolyConfig, from its docstring
    page = (tmp_path / "shared-banks.html").read_text()
    assert 'href="examples/bytes_study/index.html"' in page  # a page outside docs/


def test_every_public_name_has_a_place_in_the_reference():
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    named = set(re.findall(r"^::: peft\.(\w+)$", pages, re.MULTILINE))
    tables = {name for name in peft.__all__ if name.isupper()}  # and enumerations of words
    auto = {name for name in peft.__all__ if re.fullmatch(r"(AutoPeftModel|PeftModel)For\w+", name)}
    assert set(peft.__all__) - named - tables - auto == {"PeftType", "TaskType", "__version__"}
