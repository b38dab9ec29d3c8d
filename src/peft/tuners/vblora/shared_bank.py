# SPDX-License-Identifier: Apache-2.0
"""A vector bank by itself: in a file of its own, known by its content, used by any number of
adapters.

An adapter that uses one says which by the digest of the vectors it was trained over. A bank that
grew begins with those of the bank it grew from, so that its first vectors have that bank's digest:
adapters of the smaller one run on it as before.
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

from ...base.containers import walk
from ...base.errors import CheckpointError, CheckpointNotFoundError, PeftTypeError, PeftValueError
from ...base.tensors import ordinary_tensors
from ...base.validation import at_least, number
from ...checkpoint.files import read_metadata, read_weights, write_tensors
from ...checkpoint.hub import find_file, local_folder, only_hub_options
from ...config import as_folder
from ...core.adapter_choice import adapter_of

BANK_NAME = "vector_bank.safetensors"
_TENSOR = "vector_bank"
_REPLACES = "replaces"


class VectorBank:
    """A bank of vectors that adapters share.

    Args:
        vectors: `[num_vectors, vector_length]`, of any floating dtype, finite; a copy is kept, on
            the CPU.
        replaces: Digests of banks whose adapters may be used with this one though its vectors
            differ from theirs (it was trained further, say). Their outputs change with the vectors;
            who writes the bank vouches for it.

    Raises:
        PeftTypeError: `vectors` is no such tensor, or `replaces` no list of digests.
        PeftValueError: There are no vectors, they have no values, or values that are NaN or
            infinite.

    Example:
        >>> bank = VectorBank(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> grown = bank.grow(3)
        >>> grown.num_vectors, grown.serves(bank.sha256(), 2), bank.serves(grown.sha256(), 5)
        (5, True, False)
    """

    def __init__(self, vectors: Tensor, replaces: Sequence[str] = ()) -> None:
        if not isinstance(vectors, Tensor) or vectors.dim() != 2 or not vectors.is_floating_point():
            given = (
                f"{vectors.dtype} {list(vectors.shape)}"
                if isinstance(vectors, Tensor)
                else type(vectors).__name__
            )
            raise PeftTypeError(
                "`vectors` must be a floating-point tensor `[num_vectors, vector_length]`, not "
                f"{given}."
            )
        if isinstance(replaces, str) or not all(isinstance(digest, str) for digest in replaces):
            raise PeftTypeError(
                f"`replaces`={replaces!r} must be a list of digests, as `sha256` gives them."
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
        """Whether an adapter over a bank of this digest and size runs on this one, which begins
        with it or replaces it.
        """
        if sha256 in self.replaces:
            return num_vectors <= self.num_vectors
        return num_vectors <= self.num_vectors and self.sha256(num_vectors) == sha256

    @classmethod
    def of(cls, model: Any, adapter_name: str | None = None) -> VectorBank:
        """The bank of an adapter of a model, by default the one called "default", else the only one
        that is active.

        Raises:
            PeftValueError: There is no such adapter with a bank, several could be meant, or its
                vectors are NaN or infinite.
        """
        from .layer import VBLoRALayer

        name = adapter_of(model, adapter_name, VBLoRALayer, " with a vector bank")
        layers = (module for _, module in walk(model) if isinstance(module, VBLoRALayer))
        return cls(next(layer.bank(name) for layer in layers if name in layer.scaling))

    def put_into(self, model: Any, adapter_name: str | None = None) -> None:
        """Make this bank's vectors those of an adapter that has a bank of its own, to train them
        further.

        Args:
            model: A `PeftModel`, or a model that adapters were injected into.
            adapter_name: The adapter; by default the one called "default", else the only one that
                is active.

        Raises:
            PeftValueError: There is no such adapter, several could be meant, or its bank is shared,
                of another size or of a dtype that has no room for a vector's values.
        """
        from .layer import VBLoRALayer

        name = adapter_of(model, adapter_name, VBLoRALayer, " with a vector bank")
        containers: list[Any] = [
            m.vblora_vector_bank for _, m in walk(model) if "vblora_vector_bank" in m._modules
        ]
        own = next((container[name] for container in containers if name in container), None)
        if own is None:
            raise PeftValueError(
                f"Adapter {name} runs over a shared bank, which is frozen; make one with a bank of "
                "its own: `VBLoRAConfig` without "
                f"`bank`, with `num_vectors={self.num_vectors}` and "
                f"`vector_length={self.vector_length}`."
            )
        if own.shape != self.vectors.shape:
            sizes = f"This bank has the size {list(self.vectors.shape)}, that of adapter {name} {list(own.shape)}"
            remedy = f"`num_vectors={self.num_vectors}` and `vector_length={self.vector_length}`"
            raise PeftValueError(f"{sizes}; make the adapter with {remedy}, those of this bank.")
        if (largest := float(self.vectors.abs().max())) > torch.finfo(own.dtype).max:
            raise PeftValueError(
                f"This bank has values up to {largest:.4g}, which {own.dtype}, the dtype of "
                f"adapter {name}, has no room for; keep "
                "the adapter in float32 (`autocast_adapter_dtype=True`)."
            )
        with torch.no_grad():
            own.copy_(self.vectors)

    def grow(
        self, n: int, bound: float = 0.02, generator: torch.Generator | None = None
    ) -> VectorBank:
        """A bank with `n` more vectors, uniform between minus and plus `bound`. Adapters of this
        one run on it unchanged.

        Raises:
            PeftValueError: `n` is no integer of at least 1, or `bound` no positive number.
        """
        for problem in (*at_least("n", n), *number("bound", bound, positive=True)):
            raise PeftValueError(problem)
        more = nn.init.uniform_(
            torch.empty(n, self.vector_length), -bound, bound, generator=generator
        )
        return VectorBank(torch.cat([self.vectors, more.to(self.vectors.dtype)]), self.replaces)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write the bank to a folder, made if missing; a reader sees the old one or the new one.

        Raises:
            PeftValueError: The path is a file.
        """
        folder = as_folder(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {
            "sha256": self.sha256(),
            **({_REPLACES: " ".join(self.replaces)} if self.replaces else {}),
        }
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


def _check_values(vectors: Tensor) -> None:
    """Insist on a bank that adapters can be made of."""
    if not vectors.numel():
        raise PeftValueError(
            f"`vectors` of shape {list(vectors.shape)} are none; a bank has at least one, of at "
            "least one number."
        )
    if type(vectors) is not Tensor:  # a DTensor's values are elsewhere
        return
    broken = ~(vectors.float() if vectors.dtype.itemsize == 1 else vectors).isfinite().all(dim=1)
    if found := broken.nonzero().flatten().tolist():
        numbers = ", ".join(map(str, found[:8])) + (
            f" and {len(found) - 8} more" if len(found) > 8 else ""
        )
        raise PeftValueError(
            f"`vectors` have values that are NaN or infinite (rows {numbers}), and so would all "
            "adapters that pick them; the "
            "training went wrong, take the bank of an earlier step."
        )


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
    """The shared bank that a config asks for: one that the model has already, or the one in the
    place that it names.

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
    bank = _read_bank(config)
    key = bank.sha256()
    return (
        FoundBank(key, resident[key], True)
        if key in resident
        else FoundBank(key, bank.vectors, False)
    )


def _read_bank(config: Any) -> VectorBank:
    """The bank at the place that a config names: seen from the adapter's folder, the working
    directory, a folder above the adapter's, or on the Hub. Of several the first that the adapter
    runs on counts.

    Raises:
        CheckpointNotFoundError: There is none.
        CheckpointError: There is none that the adapter was trained over.
    """
    wanted, n = config.bank_sha256, config.num_vectors
    other = None
    try:
        for read in _places(config):
            bank = read()
            if wanted is None or (
                bank.serves(wanted, n) and bank.vector_length == config.vector_length
            ):
                return bank
            other = other or bank
    except CheckpointNotFoundError as error:
        raise CheckpointNotFoundError(
            f"The adapter's shared vector bank is not to be found at `bank`={config.bank!r}, "
            "neither from the adapter's folder nor "
            f"from the working directory: {error} If it moved, pass "
            "`config=VBLoRAConfig.from_pretrained(adapter, bank=folder)`."
        ) from None
    assert other is not None
    raise CheckpointError(
        f"The bank at {config.bank!r} ({other.num_vectors} vectors of {other.vector_length}, "
        f"{other.sha256()}) is neither the one "
        f"that the adapter was trained over ({n} vectors of {config.vector_length}, {wanted}) nor "
        "one that grew from it. Say where "
        "that one is: `config=VBLoRAConfig.from_pretrained(adapter, bank=folder)`. If this one is "
        "meant all the same, since its "
        "vectors were trained further, write it with the other's digest: `VectorBank(vectors, "
        "replaces=[digest])`."
    )


def _places(config: Any) -> Iterator[Callable[[], VectorBank]]:
    """How to read the banks that there are where `config.bank` can mean, in the order in which they
    count; where there is none, how to read it from the Hub.
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
    """The folder, downloaded, to which a bank's path leads from that of an adapter on the Hub; None
    if there is no bank in it.
    """
    inside = posixpath.normpath(posixpath.join(hub.get("subfolder") or "", bank))
    if inside.startswith(("..", "/")):
        return None
    try:
        return find_file(
            source, (BANK_NAME,), {**hub, "subfolder": None if inside == "." else inside}
        ).parent
    except CheckpointNotFoundError:
        return None


def digest(vectors: Tensor) -> str:
    """SHA-256 of vectors `[n, vector_length]`: of their length, and their values in float32
    (float64 if they are), row by row.

    Example:
        >>> digest(torch.zeros(2, 3)) == digest(torch.zeros(2, 3, dtype=torch.bfloat16)) != digest(torch.zeros(3, 2))
        True
    """
    values = (
        vectors.detach().cpu().to(torch.promote_types(vectors.dtype, torch.float32)).contiguous()
    )
    result = hashlib.sha256(f"{vectors.shape[1]}:".encode())
    result.update(ctypes.string_at(values.data_ptr(), values.numel() * values.itemsize))
    return result.hexdigest()
