# SPDX-License-Identifier: Apache-2.0
"""Pickles that a weights file in the legacy format should not be."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from functools import lru_cache
from typing import Any

import torch

# The folder that a pickle makes if it is executed, in the working directory.
EVIL = "torture_executed"
_KEY = "base_model.model.0.lora_A.weight"


class _Evil:
    """An object whose unpickling makes a folder."""

    def __init__(self, work: Any, *arguments: object) -> None:
        self.work, self.arguments = work, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.work, self.arguments


def _saved(content: object, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def _deflated(content: bytes) -> bytes:
    """Return an archive with its parts compressed."""
    result = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(result, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return result.getvalue()


@lru_cache(maxsize=1)
def forged() -> dict[str, bytes]:
    """Return the pickles by what they are of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some kinds of tensors are old
        states = _states()
        result = {name: _saved(state) for name, state in states.items()}
        result |= {
            f"{name}, before archives": _saved(state, _use_new_zipfile_serialization=False)
            for name, state in states.items()
            if "sparse" not in name and "quantized" not in name
        }
        result["64 MiB of zeros, compressed"] = _deflated(_saved({_KEY: torch.zeros(2**24)}))
    result["a bare call of mkdir"] = pickle.dumps(_Evil(os.mkdir, EVIL))
    result["an archive of tar"] = _tar()
    result["nothing at all"] = b""
    return result


def _states() -> dict[str, object]:
    evil = _Evil(os.mkdir, EVIL)
    matrix = torch.zeros(2, 8)
    return {
        "a call of mkdir": evil,
        "a call of mkdir beside tensors": {_KEY: matrix, "x": evil},
        "a call of eval": {_KEY: _Evil(eval, f"__import__('os').mkdir({EVIL!r})")},
        "a call of exec": {_KEY: _Evil(exec, f"import os; os.mkdir({EVIL!r})")},
        "a list": [1],
        "numbers as keys": {1: matrix},
        "a list in place of a tensor": {"x": [1]},
        "nested dictionaries": {"x": {"y": matrix}},
        "nothing": {},
        "None": None,
        "a tensor": matrix,
        "an ordered dictionary": OrderedDict({_KEY: matrix}),
        "a tensor on no device": {_KEY: torch.empty(2, 2**40, device="meta")},
        "a small tensor on no device": {_KEY: torch.empty(2, 8, device="meta")},
        "a value that is many": {_KEY: torch.zeros(1).expand(2**20, 2**20)},
        "a value that is some": {_KEY: torch.zeros(1).expand(2, 8)},
        "a sparse tensor": {_KEY: torch.zeros(2, 8).to_sparse()},
        "a sparse tensor of a great size": {
            _KEY: torch.sparse_coo_tensor(torch.zeros(2, 0).long(), torch.zeros(0), (2**30, 2**30))
        },
        "a quantized tensor": {_KEY: torch.quantize_per_tensor(matrix, 0.1, 0, torch.qint8)},
        "complex numbers": {_KEY: matrix.to(torch.complex64)},
        "a parameter": {_KEY: torch.nn.Parameter(matrix)},
        "overlapping rows": {_KEY: torch.zeros(9).as_strided((2, 8), (1, 1))},
        "bytes": {_KEY: matrix.to(torch.uint8)},
        "an empty tensor of a great size": {_KEY: torch.zeros(0, 2**40)},
        "many names of one tensor": {f"{_KEY}{i}": matrix for i in range(500)},
    }


def _tar() -> bytes:
    """Return an archive as torch wrote it long ago, with a path out of its folder."""
    result = io.BytesIO()
    with tarfile.open(fileobj=result, mode="w") as archive:
        for name in ("storages", "tensors", "pickle", f"../{EVIL}"):
            content = pickle.dumps(1)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return result.getvalue()
