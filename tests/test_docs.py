# SPDX-License-Identifier: Apache-2.0
"""Every page of the documentation runs as it stands, from top to bottom. What a page takes for
granted, such as a model of the reader's, is in comments `<!--python … -->` in it. A block of text
right after a block of Python shows what that prints, with `…` for what is left out.
"""

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"
# Written as files of a package; tests/test_adding_a_method.py runs it as one.
ELSEWHERE = {"adding-a-tuner.md"}
PAGES = sorted(
    path
    for path in DOCS.rglob("*.md")
    if path.name not in ELSEWHERE and re.search(r"^(?:```|<!--)python$", path.read_text(), re.M)
)
BLOCK = re.compile(
    r"^(?:```|<!--)python\n(?P<code>.*?)^(?:```|-->)\n(?:\n```text\n(?P<printed>.*?)^```$)?",
    re.DOTALL | re.MULTILINE,
)


def lines_of(text):
    """Return the lines with one blank for many and `N` for numbers, which differ by machine."""
    lines = (re.sub(r"-?\d[\d,.]*(e[-+]?\d+)?", "N", line) for line in text.splitlines())
    return [" ".join(line.split()) for line in lines if line.strip()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_a_page_runs_and_prints_as_it_says(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"__name__": page.stem}
    text = page.read_text()
    for block in BLOCK.finditer(text):
        line = text[: block.start()].count("\n") + 1
        capsys.readouterr()
        exec(compile("\n" * line + block["code"], str(page), "exec"), namespace)
        if block["printed"]:
            printed = iter(lines_of(capsys.readouterr().out))
            for shown in lines_of(block["printed"]):
                pattern = ".*".join(map(re.escape, shown.split("…")))
                assert shown == "…" or any(re.fullmatch(pattern, line) for line in printed), shown


def test_there_are_pages():
    assert {"index.md", "many-tasks.md", "poly-tasks.md"} <= {path.name for path in PAGES}
