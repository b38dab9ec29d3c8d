# SPDX-License-Identifier: Apache-2.0
"""Vector banks in files of their own, shared by any number of adapters.

The config of an adapter identifies its bank by the SHA-256 digest of the vectors. A grown bank
begins with the vectors of the bank it grew from, so the digest of its first vectors is that bank's
digest: adapters of the smaller bank run on it unchanged.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...base.calls.running import changing
from ...base.containers import modules_of
from ...base.errors import CheckpointError, CheckpointNotFoundError, PeftTypeError, PeftValueError
from ...base.suggestions import listed
from ...base.tensors import ordinary_tensors
from ...base.validation import at_least, number
from ...checkpoint.files import read_metadata, read_weights, write_tensors
from ...checkpoint.hub import find_file, local_folder, only_hub_options
from ...checkpoint.paths import as_folder
from ...core.adapter_choice import adapter_of
from ...integrations.distributed import check_whole, take_back, write_value
from .config import VBLoRAConfig
from .layer import VBLoRALayer

BANK_NAME = "vector_bank.safetensors"
_TENSOR = "vector_bank"
_REPLACES = "replaces"


class VectorBank:
    """A bank of vectors that adapters share.

    Args:
        vectors: `[num_vectors, vector_length]`, of any floating dtype, finite; copied to the CPU.
        replaces: Digests of other banks whose adapters may run on this one, for example because
            this one is an older bank trained further. Such an adapter then gives other outputs.

    Raises:
        PeftTypeError: `vectors` is not such a tensor, or `replaces` is not a list of digests.
        PeftValueError: `vectors` is empty, on the meta device, or has NaN or infinite values.

    Example:
        >>> bank = VectorBank(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> grown = bank.grow(3)
        >>> grown.num_vectors, grown.serves(bank.sha256(), 2), bank.serves(grown.sha256(), 5)
        (5, True, False)
    """

    def __init__(self, vectors: Tensor, replaces: Sequence[str] = ()) -> None:
        if not isinstance(vectors, Tensor) or vectors.dim() != 2 or not vectors.is_floating_point():
            given = type(vectors).__name__
            if isinstance(vectors, Tensor):
                given = f"{vectors.dtype} {list(vectors.shape)}"
            raise PeftTypeError(
                "`vectors` must be a floating-point tensor `[num_vectors, vector_length]`, not "
                f"{given}."
            )
        is_list = isinstance(replaces, Iterable) and not isinstance(replaces, str)
        if not is_list or not all(
            isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) for value in replaces
        ):
            raise PeftTypeError(
                f"`replaces`={replaces!r} must be a list of digests, as `sha256` returns them."
            )
        if vectors.is_meta:
            raise PeftValueError(
                "`vectors` are on the meta device and have no values yet; load them first."
            )
        with ordinary_tensors():
            self.vectors = vectors.detach().to("cpu", copy=True).contiguous()
        _check_values(self.vectors)
        self.replaces = tuple(replaces)

    def __repr__(self) -> str:
        dtype = str(self.vectors.dtype).removeprefix("torch.")
        sizes = f"num_vectors={self.num_vectors}, vector_length={self.vector_length}"
        return f"VectorBank({sizes}, dtype={dtype})"

    @property
    def num_vectors(self) -> int:
        """Number of vectors."""
        return self.vectors.shape[0]

    @property
    def vector_length(self) -> int:
        """Length of each vector."""
        return self.vectors.shape[1]

    def sha256(self, num_vectors: int | None = None) -> str:
        """Return the digest of the first `num_vectors` vectors, by default of all."""
        return digest(self.vectors if num_vectors is None else self.vectors[:num_vectors])

    def serves(self, sha256: str, num_vectors: int) -> bool:
        """Return whether adapters of a bank with this digest and size run on this bank: it begins
        with the same vectors or replaces that bank.
        """
        if num_vectors > self.num_vectors:
            return False
        return sha256 in self.replaces or self.sha256(num_vectors) == sha256

    @classmethod
    def of(cls, model: nn.Module, adapter_name: str | None = None) -> VectorBank:
        """Return the bank of an adapter of a model.

        Args:
            model: A `PeftModel`, or a model that adapters were injected into.
            adapter_name: The adapter; by default the one called "default", else the only one that
                is active.

        Raises:
            PeftValueError: There is no such adapter with a bank, the choice is ambiguous, or its
                vectors are NaN or infinite.
        """
        name, layer = _layer_with_bank(model, adapter_name)
        check_whole([layer.bank(name)])
        return cls(layer.bank(name))

    def put_into(self, model: nn.Module, adapter_name: str | None = None) -> None:
        """Copy this bank's vectors into an adapter with a bank of its own, to train them further.

        Args:
            model, adapter_name: As for `of`.

        Raises:
            PeftValueError: No such adapter, an ambiguous choice, or the adapter's bank is shared,
                of another size or of a dtype that can't hold the vectors' values.
        """
        name, layer = _layer_with_bank(model, adapter_name)
        if name not in layer.vblora_vector_bank:
            raise PeftValueError(
                f"Adapter {name} runs over a shared bank, which is frozen; make one with a bank of "
                f"its own: `VBLoRAConfig` without `bank`, with `num_vectors={self.num_vectors}` "
                f"and `vector_length={self.vector_length}`."
            )
        bank = layer.vblora_vector_bank[name]
        check_whole([bank], written=True)
        if bank.shape != self.vectors.shape:
            raise PeftValueError(
                f"This bank has the size {list(self.vectors.shape)}, that of adapter {name} "
                f"{list(bank.shape)}; make the adapter with `num_vectors={self.num_vectors}` and "
                f"`vector_length={self.vector_length}`, those of this bank."
            )
        if (largest := float(self.vectors.abs().max())) > torch.finfo(bank.dtype).max:
            raise PeftValueError(
                f"This bank has values up to {largest:.4g}, which {bank.dtype}, the dtype of "
                f"adapter {name}, can't hold; keep the adapter in float32 "
                "(`autocast_adapter_dtype=True`)."
            )
        with changing(model, [name]):
            write_value(bank, self.vectors)

    def grow(
        self, n: int, bound: float = 0.02, generator: torch.Generator | None = None
    ) -> VectorBank:
        """Return a bank with `n` more vectors, drawn from `U(-bound, bound)`. Adapters of this bank
        run on it unchanged.

        Raises:
            PeftValueError: `n` is not an integer of at least 1, or `bound` not a positive number.
        """
        for problem in (*at_least("n", n), *number("bound", bound, positive=True)):
            raise PeftValueError(problem)
        more = nn.init.uniform_(
            torch.empty(n, self.vector_length), -bound, bound, generator=generator
        )
        return VectorBank(torch.cat([self.vectors, more.to(self.vectors.dtype)]), self.replaces)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write the bank to a folder, made if missing. A concurrent reader sees the old file or the
        new one, never a part of it.

        Raises:
            PeftValueError: The path is a file.
        """
        folder = as_folder(save_directory)
        metadata = {"sha256": self.sha256()}
        if self.replaces:
            metadata[_REPLACES] = " ".join(self.replaces)
        write_tensors(folder / BANK_NAME, {_TENSOR: self.vectors}, metadata)

    @classmethod
    def from_pretrained(cls, model_id: str | os.PathLike, **hub_options: object) -> VectorBank:
        """Read a bank from its file.

        Args:
            model_id: A local folder, or an id on the Hub.
            **hub_options: `subfolder`, `revision`, `token`, `cache_dir`, …

        Raises:
            CheckpointNotFoundError: There is no such file.
            CheckpointError: The file is damaged, or its vectors do not have the digest in it.
        """
        path = find_file(model_id, (BANK_NAME,), only_hub_options(hub_options, "from_pretrained"))
        state, metadata = read_weights(path), read_metadata(path)
        if set(state) != {_TENSOR}:
            raise CheckpointError(
                f"'{path}' does not hold a vector bank; it has "
                f"{', '.join(sorted(state)) or 'nothing'}."
            )
        try:
            bank = cls(state[_TENSOR], metadata.get(_REPLACES, "").split())
        except (PeftTypeError, PeftValueError) as error:
            raise CheckpointError(f"'{path}': {error}") from None
        if metadata.get("sha256") not in (None, bank.sha256()):
            raise CheckpointError(
                f"The vectors in '{path}' are not those it was written with; read it from its "
                "source again."
            )
        return bank


def _layer_with_bank(model: nn.Module, adapter_name: str | None) -> tuple[str, VBLoRALayer]:
    """Return the name of the adapter that is meant, and a layer that has it."""
    take_back(model)
    name = adapter_of(model, adapter_name, VBLoRALayer, " with a vector bank")
    layers = modules_of(model, VBLoRALayer)
    return name, next(layer for _, layer in layers if name in layer.scaling)


def _check_values(vectors: Tensor) -> None:
    """Raise PeftValueError for an empty bank, and for NaN or infinite values."""
    if not vectors.numel():
        raise PeftValueError(
            f"`vectors` of shape {list(vectors.shape)} hold no vectors; a bank has at least one, "
            "of at least one number."
        )
    if type(vectors) is not Tensor:  # the values of a DTensor are on several devices
        return
    broken = ~(vectors.float() if vectors.dtype.itemsize == 1 else vectors).isfinite().all(dim=1)
    if rows := broken.nonzero().flatten().tolist():
        raise PeftValueError(
            f"`vectors` have values that are NaN or infinite (rows {listed(map(str, rows))}), and "
            "so would all adapters that select them; the training went wrong, take the bank of an "
            "earlier step."
        )


class FoundBank(NamedTuple):
    """Shared bank for an adapter: its digest, its vectors, and whether the model has it already."""

    key: str
    vectors: Tensor
    is_resident: bool


def find_bank(config: VBLoRAConfig, resident: Mapping[str, Tensor]) -> FoundBank:
    """Find a config's shared bank: among the model's by digest, else at the config's location."""
    wanted, n = config.bank_sha256, config.num_vectors
    if wanted is not None:
        for key, vectors in resident.items():
            if key == wanted or (
                len(vectors) > n
                and vectors.shape[1] == config.vector_length
                and digest(vectors[:n]) == wanted
            ):
                return FoundBank(key, vectors, True)
    if config.bank is None:
        raise CheckpointNotFoundError(
            f"The adapter needs the shared vector bank {wanted}, which this model does not have; "
            "say in its config where it is: "
            "`config=VBLoRAConfig.from_pretrained(adapter, bank=folder)`."
        )
    bank = _read_bank(config, config.bank)
    key = bank.sha256()
    return FoundBank(key, resident.get(key, bank.vectors), key in resident)


def _read_bank(config: VBLoRAConfig, location: str) -> VectorBank:
    """Read the first bank that the adapter runs on from the locations that `location` can mean."""
    wanted, n = config.bank_sha256, config.num_vectors
    other = None
    try:
        for path in _locations(config, location):
            bank = VectorBank.from_pretrained(path)
            if wanted is None or (
                bank.serves(wanted, n) and bank.vector_length == config.vector_length
            ):
                return bank
            other = other or bank
    except CheckpointNotFoundError as error:
        raise CheckpointNotFoundError(
            f"The adapter's shared vector bank was not found at `bank`={location!r}, neither from "
            f"the adapter's folder nor from the working directory: {error} If it moved, pass "
            "`config=VBLoRAConfig.from_pretrained(adapter, bank=folder)`."
        ) from None
    assert other is not None
    raise CheckpointError(
        f"The bank at {location!r} ({other.num_vectors} vectors of {other.vector_length}, "
        f"{other.sha256()}) is neither the one that the adapter was trained over ({n} vectors of "
        f"{config.vector_length}, {wanted}) nor one that grew from it. Pass the path of that one: "
        "`config=VBLoRAConfig.from_pretrained(adapter, bank=folder)`. If this one is meant, "
        "because its vectors were trained further, write it with the other's digest: "
        "`VectorBank(vectors, replaces=[digest])`."
    )


def _locations(config: VBLoRAConfig, location: str) -> Iterator[str | Path]:
    """Yield the folders with a bank that `location` can mean: seen from the adapter's folder or
    repository, from the working directory, from the folders above; else `location`, as a Hub id.
    """
    folders, is_nowhere = [Path()], True
    if config.source is not None:
        source, hub = config.source
        adapter = local_folder(source, hub.get("subfolder"))
        if adapter is not None:
            folders = [adapter, Path(), *adapter.resolve().parents]
        elif (path := _in_repository(source, hub, location)) is not None:
            is_nowhere = False
            yield path
    for folder in folders:
        if (folder / location / BANK_NAME).is_file():
            is_nowhere = False
            yield folder / location
    if is_nowhere:
        yield location


def _in_repository(
    source: str | os.PathLike, hub: Mapping[str, object], location: str
) -> Path | None:
    """Download the bank at a path relative to an adapter's on the Hub; None if there is none."""
    inside = posixpath.normpath(posixpath.join(str(hub.get("subfolder") or ""), location))
    if inside.startswith(("..", "/")):
        return None
    subfolder = None if inside == "." else inside
    try:
        return find_file(source, (BANK_NAME,), {**hub, "subfolder": subfolder}).parent
    except CheckpointNotFoundError:
        return None


def digest(vectors: Tensor) -> str:
    """Return the SHA-256 digest of vectors `[n, vector_length]`: of their length and their values
    in float32 (float64 for float64), row by row.

    Example:
        >>> zeros = torch.zeros(2, 3)
        >>> digest(zeros) == digest(zeros.bfloat16()) != digest(zeros.view(3, 2))
        True
    """
    dtype = torch.float64 if vectors.dtype == torch.float64 else torch.float32
    values = vectors.detach().cpu().to(dtype).contiguous()
    result = hashlib.sha256(f"{vectors.shape[1]}:".encode())
    result.update(ctypes.string_at(values.data_ptr(), values.numel() * values.itemsize))
    return result.hexdigest()
