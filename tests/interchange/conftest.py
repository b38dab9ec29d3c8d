# SPDX-License-Identifier: Apache-2.0
"""The two packages that exchange files, each in one process for all tests. Both are called `peft`,
so they can't be in the same.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import peft

PEER = Path(os.environ.get("PEFT_PEER", Path(__file__).parents[2] / ".peer")).resolve()


class Package:
    """A process with one of the packages, which does what it is told."""

    def __init__(self, path, folder):
        self.folder, self.log = folder, folder / "log"
        environment = {**os.environ, "PYTHONPATH": str(path), "TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, Path(__file__).with_name("worker.py"), path]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command,
                env=environment,
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def order(self, verb, *arguments):
        """Have something done; `answer` waits for it."""
        print(
            json.dumps([verb, *arguments, str(self.folder / verb)]),
            file=self.process.stdin,
            flush=True,
        )

    def answer(self, verb):
        """The result of the order before."""
        line = self.process.stdout.readline()
        assert line, f"The process ended:\n{self.log.read_text()[-3000:]}"
        assert json.loads(line) is None, json.loads(line)
        return torch.load(self.folder / verb)


@pytest.fixture(scope="session")
def packages(tmp_path_factory):
    """The processes by who they are. Hugging Face PEFT is in the folder that `PEFT_PEER` names,
    `.peer` by default, where `make test` installs it. Where it is missing the tests are skipped; on
    CI that is an error.
    """
    if not (PEER / "peft").is_dir():
        message = f"Hugging Face PEFT is not in {PEER}; `make test` puts it there."
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    paths = {"ours": Path(peft.__file__).resolve().parents[1], "theirs": PEER}
    started = {name: Package(path, tmp_path_factory.mktemp(name)) for name, path in paths.items()}
    yield started
    for package in started.values():
        package.process.stdin.close()
        package.process.wait(10)
