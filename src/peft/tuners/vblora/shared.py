# SPDX-License-Identifier: Apache-2.0
"""A vector bank by itself: in a file of its own, known by its content, used by any number of adapters.

An adapter that uses one says which by the digest of the vectors it was trained over. A bank that grew begins with those of the bank
it grew from, so that its first vectors have that bank's digest: adapters of the smaller one run on it as before.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...config import as_folder
from ...utils.adapter_files import read_metadata, read_weights, write_tensors
from ...utils.error import CheckpointError, CheckpointNotFoundError, PeftTypeError, PeftValueError
from ...utils.hub import find_file, local_folder, only_hub_options
from ...utils.tensors import ordinary_tensors
from ...utils.walk import walk

BANK_NAME = "vector_bank.safetensors"
_TENSOR = "vector_bank"
_REPLACES = "replaces"


class VectorBank:
    """A bank of vectors that adapters share.

    Args:
        vectors: `[num_vectors, vector_length]`, of any floating dtype; a copy is kept, on the CPU.
        replaces: Digests of banks whose adapters may be used with this one though its vectors differ from theirs (it was trained
            further, say). Their outputs change with the vectors; who writes the bank vouches for it.

    Raises:
        PeftTypeError: `vectors` is no such tensor.

    Example:
        >>> bank = VectorBank(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> grown = bank.grow(3)
        >>> grown.num_vectors, grown.serves(bank.sha256(), 2), bank.serves(grown.sha256(), 5)
        (5, True, False)
    """

    def __init__(self, vectors: Tensor, replaces: Sequence[str] = ()) -> None:
        if not isinstance(vectors, Tensor) or vectors.dim() != 2 or not vectors.is_floating_point():
            raise PeftTypeError("`vectors` must be a floating-point tensor `[num_vectors, vector_length]`.")
        with ordinary_tensors():
            self.vectors = vectors.detach().to("cpu", copy=True).contiguous()
        self.replaces = tuple(replaces)

    def __repr__(self) -> str:
        dtype = str(self.vectors.dtype).removeprefix("torch.")
        return f"VectorBank(num_vectors={self.num_vectors}, vector_length={self.vector_length}, dtype={dtype})"

    @property
    def num_vectors(self) -> int:
        """How many vectors there are."""
        return self.vectors.shape[0]

    @property
    def vector_length(self) -> int:
        """Their length."""
        return self.vectors.shape[1]

    def sha256(self, num_vectors: int | None = None) -> str:
        """The digest of the first `num_vectors` vectors, by default of all."""
        return digest(self.vectors if num_vectors is None else self.vectors[:num_vectors])

    def serves(self, sha256: str, num_vectors: int) -> bool:
        """Whether an adapter over a bank of this digest and size runs on this one, which begins with it or replaces it."""
        if sha256 in self.replaces:
            return num_vectors <= self.num_vectors
        return num_vectors <= self.num_vectors and self.sha256(num_vectors) == sha256

    @classmethod
    def of(cls, model: Any, adapter_name: str = "default") -> VectorBank:
        """The bank of an adapter of a model.

        Raises:
            PeftValueError: There is no such adapter, or it has no bank.
        """
        from .layer import VBLoRALayer

        for _, module in walk(model):
            if isinstance(module, VBLoRALayer) and adapter_name in module.scaling:
                return cls(module.bank(adapter_name))
        raise PeftValueError(f"The model has no adapter {adapter_name!r} with a vector bank.")

    def put_into(self, model: Any, adapter_name: str = "default") -> None:
        """Make this bank's vectors those of an adapter that has a bank of its own, to train them further.

        Raises:
            PeftValueError: There is no such adapter, or its bank has another size.
        """
        containers: list[Any] = [m.vblora_vector_bank for _, m in walk(model) if "vblora_vector_bank" in m._modules]
        own = next((container[adapter_name] for container in containers if adapter_name in container), None)
        if own is None:
            raise PeftValueError(f"The model has no adapter {adapter_name!r} with a vector bank of its own.")
        if own.shape != self.vectors.shape:
            sizes = f"This bank has the size {list(self.vectors.shape)}, that of adapter {adapter_name} {list(own.shape)}"
            raise PeftValueError(f"{sizes}; make the adapter with `num_vectors` and `vector_length` of this bank.")
        with torch.no_grad():
            own.copy_(self.vectors)

    def grow(self, n: int, bound: float = 0.02, generator: torch.Generator | None = None) -> VectorBank:
        """A bank with `n` more vectors, uniform between minus and plus `bound`. Adapters of this one run on it unchanged.

        Raises:
            PeftValueError: `n` is below 1.
        """
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise PeftValueError(f"`n`={n!r} must be an integer of at least 1.")
        more = nn.init.uniform_(torch.empty(n, self.vector_length), -bound, bound, generator=generator)
        return VectorBank(torch.cat([self.vectors, more.to(self.vectors.dtype)]), self.replaces)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write the bank to a folder, made if missing; a reader sees the old one or the new one.

        Raises:
            PeftValueError: The path is a file.
        """
        folder = as_folder(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {"sha256": self.sha256(), **({_REPLACES: " ".join(self.replaces)} if self.replaces else {})}
        write_tensors(folder / BANK_NAME, {_TENSOR: self.vectors}, metadata)

    @classmethod
    def from_pretrained(cls, model_id: str | os.PathLike, **hub_options: Any) -> VectorBank:
        """Read a bank.

        Args:
            model_id: A local folder, or an id on the Hub.
            **hub_options: `subfolder`, `revision`, `token`, `cache_dir`, …

        Raises:
            CheckpointNotFoundError: There is none.
            CheckpointError: The file is damaged, or its vectors are not those it was written with.
        """
        path = find_file(model_id, (BANK_NAME,), only_hub_options(hub_options, "from_pretrained"))
        state, metadata = read_weights(path), read_metadata(path)
        if set(state) != {_TENSOR}:
            raise CheckpointError(f"'{path}' does not hold a vector bank; it has {', '.join(sorted(state)) or 'nothing'}.")
        bank = cls(state[_TENSOR], metadata.get(_REPLACES, "").split())
        if metadata.get("sha256") not in (None, bank.sha256()):
            raise CheckpointError(f"The vectors in '{path}' are not those it was written with; read it from its source again.")
        return bank


class FoundBank(NamedTuple):
    """A shared bank for an adapter.

    Args:
        key: Its own digest.
        vectors: `[num_vectors, vector_length]`.
        is_resident: Whether the model has it already.
    """

    key: str
    vectors: Tensor
    is_resident: bool


def find_bank(config: Any, resident: Mapping[str, Tensor]) -> FoundBank:
    """The shared bank that a config asks for: one that the model has already, or the one in the place that it names.

    Args:
        config: The adapter's config.
        resident: The model's shared banks by digest.

    Raises:
        CheckpointNotFoundError: It is nowhere.
        CheckpointError: It is another one than the adapter was trained over.
    """
    wanted, n = config.bank_sha256, config.num_vectors
    if wanted is not None:
        for key, vectors in resident.items():
            if key == wanted or (len(vectors) > n and vectors.shape[1] == config.vector_length and digest(vectors[:n]) == wanted):
                return FoundBank(key, vectors, True)
    if config.bank is None:
        raise CheckpointNotFoundError(
            f"The adapter needs the shared vector bank {wanted}, which this model does not have; say in its config where it is: "
            "`config=VBLoRAConfig.from_pretrained(adapter, bank=folder)`."
        )
    bank = _read_bank(config)
    key = bank.sha256()
    return FoundBank(key, resident[key], True) if key in resident else FoundBank(key, bank.vectors, False)


def _read_bank(config: Any) -> VectorBank:
    """The bank at the place that a config names: seen from the adapter's folder, the working directory, a folder above the
    adapter's, or on the Hub. Of several the first that the adapter runs on counts.

    Raises:
        CheckpointNotFoundError: There is none.
        CheckpointError: There is none that the adapter was trained over.
    """
    wanted, n = config.bank_sha256, config.num_vectors
    other = None
    try:
        for read in _places(config):
            bank = read()
            if wanted is None or (bank.serves(wanted, n) and bank.vector_length == config.vector_length):
                return bank
            other = other or bank
    except CheckpointNotFoundError as error:
        raise CheckpointNotFoundError(
            f"The adapter's shared vector bank is not to be found at `bank`={config.bank!r}, neither from the adapter's folder nor "
            f"from the working directory: {error} If it moved, pass `config=VBLoRAConfig.from_pretrained(adapter, bank=folder)`."
        ) from None
    assert other is not None
    raise CheckpointError(
        f"The bank at {config.bank!r} ({other.num_vectors} vectors of {other.vector_length}, {other.sha256()}) is neither the one "
        f"that the adapter was trained over ({n} vectors of {config.vector_length}, {wanted}) nor one that grew from it."
    )


def _places(config: Any) -> Iterator[Callable[[], VectorBank]]:
    """How to read the banks that there are where `config.bank` can mean, in the order in which they count; where there is none,
    how to read it from the Hub.
    """
    folders, is_nowhere = [Path()], True
    if config.place is not None:
        source, hub = config.place
        adapter = local_folder(source, hub.get("subfolder"))
        if adapter is not None:
            folders = [adapter, Path(), *adapter.resolve().parents]
        elif (path := _in_repository(source, hub, config.bank)) is not None:
            is_nowhere = False
            yield partial(VectorBank.from_pretrained, path)
    for folder in folders:
        if (folder / config.bank / BANK_NAME).is_file():
            is_nowhere = False
            yield partial(VectorBank.from_pretrained, folder / config.bank)
    if is_nowhere:
        yield partial(VectorBank.from_pretrained, config.bank)


def _in_repository(source: str | os.PathLike, hub: Mapping[str, Any], bank: str) -> Path | None:
    """The folder, downloaded, to which a bank's path leads from that of an adapter on the Hub; None if there is no bank in it."""
    inside = posixpath.normpath(posixpath.join(hub.get("subfolder") or "", bank))
    if inside.startswith(("..", "/")):
        return None
    try:
        return find_file(source, (BANK_NAME,), {**hub, "subfolder": None if inside == "." else inside}).parent
    except CheckpointNotFoundError:
        return None


def digest(vectors: Tensor) -> str:
    """SHA-256 of vectors `[n, vector_length]`: of their length, and their values in float32 (float64 if they are), row by row.

    Example:
        >>> digest(torch.zeros(2, 3)) == digest(torch.zeros(2, 3, dtype=torch.bfloat16)) != digest(torch.zeros(3, 2))
        True
    """
    values = vectors.detach().cpu().to(torch.promote_types(vectors.dtype, torch.float32)).contiguous()
    result = hashlib.sha256(f"{vectors.shape[1]}:".encode())
    result.update(ctypes.string_at(values.data_ptr(), values.numel() * values.itemsize))
    return result.hexdigest()
