# SPDX-License-Identifier: Apache-2.0
"""Every page of the documentation runs as it stands, from top to bottom. What a page takes for
granted, such as a model of the reader's, is in comments `<!--python … -->` in it.
"""

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"
# Written as files of a package; tests/test_architecture.py runs it as one.
ELSEWHERE = {"adding-a-tuner.md"}
PAGES = sorted(path for path in DOCS.glob("*.md") if path.name not in ELSEWHERE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"__name__": page.stem}
    blocks = list(
        re.finditer(
            r"^(?:```|<!--)python\n(.*?)^(?:```|-->)$", page.read_text(), re.DOTALL | re.MULTILINE
        )
    )
    assert blocks
    for block in blocks:
        line = page.read_text()[: block.start()].count("\n") + 1
        exec(compile("\n" * line + block.group(1), str(page), "exec"), namespace)
