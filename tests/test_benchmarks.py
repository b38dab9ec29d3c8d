# SPDX-License-Identifier: Apache-2.0
"""The benchmark runs and reports; how fast anything is, is not for a test to say."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_short_form(tmp_path):
    options = "--width 128 --layers 1 --tokens 4 --batch 2 --decode-batch 2 --rounds 1 --repeat 3 --threads 1 --library ours"
    options += f" --method mhr --mode train decode --output {tmp_path}"
    command = [sys.executable, "-m", "benchmarks", *options.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "results.json").read_text())
    assert [row["mode"] for row in content["rows"]] == ["train", "decode"]
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in content["rows"])
    assert "| mhr | train | 128 | ours |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "ratios.png").stat().st_size > 1000
