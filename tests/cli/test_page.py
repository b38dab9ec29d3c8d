# SPDX-License-Identifier: Apache-2.0
"""The commands of the page about the command line run, in order, and print as it says."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from peft.cli import program

PAGE = Path(__file__).parents[2] / "docs" / "command-line.md"


def lines_of(text):
    """Lines with one blank for many and `N` for numbers, which differ by machine and version."""
    lines = (re.sub(r"-?\d[\d,.]*(e[-+]?\d+)?", "N", line) for line in text.splitlines())
    return [" ".join(line.split()) for line in lines if line.strip()]


@pytest.mark.filterwarnings("ignore")
def test_the_page_runs_and_prints_as_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text = PAGE.read_text()
    setup = re.search(r"^<!--python\n(.*?)^-->$", text, re.DOTALL | re.MULTILINE).group(1)
    exec(compile(setup, str(PAGE), "exec"), {})
    blocks = re.findall(r"^```console\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    commands = [part for block in blocks for part in block.split("$ ")[1:]]
    assert {command.split()[1] for command in commands} == {*program.commands, "--help"}
    for command in commands:
        line, _, shown = command.partition("\n")
        result = CliRunner().invoke(program, shlex.split(line)[1:])
        assert result.exit_code == shown.startswith("Error"), (line, result.output)
        printed = iter(lines_of(result.output))
        for wanted in lines_of(shown):
            pattern = ".*".join(map(re.escape, wanted.split("…")))
            found = any(re.fullmatch(pattern, line) for line in printed)
            assert wanted == "…" or found, (line, wanted, result.output)
