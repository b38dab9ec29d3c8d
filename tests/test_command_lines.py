# SPDX-License-Identifier: Apache-2.0
"""Command lines say what each option is for."""

import argparse
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = {
    "benchmarks.__main__": "_parser",
    "benchmarks.users": "parser",
    "examples.bytes_study.run": "parse",
    "examples.multitask_digits.run": "parse",
    "examples.multitask_study.run": "parse",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_option_is_described(program, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    made = []

    def note(parser, *args, **kwargs):
        made.append(parser)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", note)
    function = getattr(importlib.import_module(program), PROGRAMS[program])
    try:
        parser = function() if PROGRAMS[program].endswith("parser") else function([])
    except SystemExit:
        parser = made[0]
    options = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    assert len(options) > 5
    assert [action.dest for action in options if not action.help] == []
    parser.format_help()
