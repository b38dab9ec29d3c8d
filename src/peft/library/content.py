# SPDX-License-Identifier: Apache-2.0
"""The content of adapters in memory, within a bound; the least recently used leave first."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from io import BufferedReader, BytesIO
from pathlib import Path
from threading import RLock
from typing import NamedTuple

from safetensors.torch import save
from torch import Tensor

from ..base.constants import CONFIG_NAME
from ..base.errors import CheckpointError, CheckpointNotFoundError, PeftError
from ..base.registry import PEFT_TYPE_TO_TUNER_MAPPING, PeftType, lookup
from ..checkpoint.files import read_config_text, read_weights, writable
from ..checkpoint.hub import HubOptions, of_one_save
from ..checkpoint.layout import TensorLayout, read_layout
from ..checkpoint.paths import check_regular
from ..config import PeftConfig
from .configs import config_from
from .entry import Place


class LoadedAdapter(NamedTuple):
    """An adapter's config and tensors, on the CPU.

    The tensors belong to the library, which gives them to others too: read them and do not write to
    them. The config is a copy.

    Args:
        config: Its config.
        tensors: Its tensors, by the keys of its file.
        shared: Tensors of other files that it uses too (a VB-LoRA bank), by digest. Adapters that
            share them have them in memory once.
    """

    config: PeftConfig
    tensors: dict[str, Tensor]
    shared: Mapping[str, Tensor]

    def __repr__(self) -> str:
        method = PeftType(self.config.peft_type).value
        number = sum(tensor.numel() for tensor in self.tensors.values())
        banks = f", {len(self.shared)} shared" if self.shared else ""
        return f"LoadedAdapter({method}, {len(self.tensors)} tensors, {number:,} parameters{banks})"


@dataclass
class Content:
    """An adapter as it is stored: the text of its config, and its weights as one run of bytes.

    Args:
        config_text: The text.
        layout: The tensors in `data`; adapters of one kind have the same object.
        data: The bytes.
        source: Folder or Hub id with options, where files that the config names are looked up.
        shared: Tensors of other files that the adapter uses too, by digest.
    """

    config_text: str
    layout: TensorLayout
    data: bytearray = field(repr=False)
    source: tuple[str, HubOptions]
    shared: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def nbytes(self) -> int:
        """Size in memory, without shared tensors."""
        return sys.getsizeof(self.data) + len(self.config_text)

    def config(self) -> PeftConfig:
        """Return a new config."""
        config = deepcopy(_config_in(self.config_text))
        config.source = self.source
        return config

    def adapter(self) -> LoadedAdapter:
        """Return config and tensors."""
        return LoadedAdapter(self.config(), self.layout.tensors(self.data), self.shared)

    def with_shared(self, present: Mapping[str, Tensor]) -> Content:
        """Return the content with the shared tensors that its config names, read if need be."""
        config = self.config()
        tuner = lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type)
        self.shared = tuner.shared_tensors(config, present)
        return self


@lru_cache(maxsize=256)
def _config_in(text: str) -> PeftConfig:
    return config_from(text, CONFIG_NAME)


@contextmanager
def opened_folder(
    folder: Path, weights: str
) -> Iterator[tuple[str, TensorLayout, BufferedReader | BytesIO]]:
    """Context with the text of an adapter's config, its layout, and the file at its data.

    Raises:
        CheckpointNotFoundError: A file is missing.
        CheckpointError: One is damaged.
    """
    path = folder / weights
    try:
        text, opened = of_one_save(
            folder, None, lambda: (read_config_text(folder / CONFIG_NAME), _opened_weights(path))
        )
        with opened as file:
            yield text, read_layout(file, file.seek(0, os.SEEK_END) + file.seek(0), path), file
    except FileNotFoundError as error:
        if isinstance(error, PeftError):
            raise
        raise CheckpointNotFoundError(f"Can't find '{error.filename}'.") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"'{folder / CONFIG_NAME}' is not text: {error}") from None
    except OSError as error:
        if isinstance(error, PeftError):
            raise
        raise CheckpointError(f"'{folder}' can't be read: {error}") from error


def _opened_weights(path: Path) -> BufferedReader | BytesIO:
    """Return a weights file opened; one in the legacy format as safetensors would have it."""
    if path.suffix == ".safetensors":
        check_regular(path)
        return open(path, "rb")
    return BytesIO(save(writable(read_weights(path))))


def read_folder(folder: Path, weights: str, source: tuple[str, HubOptions]) -> tuple[Content, str]:
    """Read an adapter's files; also return the digest of its weights.

    Raises:
        As `opened_folder`.
    """
    with opened_folder(folder, weights) as (text, layout, file):
        data = bytearray(layout.nbytes)
        if file.readinto(data) != layout.nbytes:
            raise CheckpointError(f"'{folder / weights}' was cut while it was read; read it again.")
        if weights.endswith(".safetensors"):
            sha256 = file_digest(layout, data)
        else:
            sha256 = hashlib.sha256((folder / weights).read_bytes()).hexdigest()
        return Content(text, layout, data, source), sha256


def file_digest(layout: TensorLayout, data: bytes | bytearray) -> str:
    """Return the SHA-256 digest of a safetensors file of a header and data."""
    result = hashlib.sha256(layout.prefix)
    result.update(data)
    return result.hexdigest()


class _Cached(NamedTuple):
    content: Content
    version: object


class ContentCache:
    """Contents of adapters by place, up to a number of bytes.

    What several adapters share is counted once, and leaves with the last of them.

    Args:
        max_bytes: The bound. An adapter that is larger by itself is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._nbytes = 0
        self._contents: OrderedDict[Place, _Cached] = OrderedDict()
        self._shared: dict[str, tuple[Tensor, int]] = {}
        self._lock = RLock()

    @property
    def nbytes(self) -> int:
        """Memory that the contents take."""
        with self._lock:
            return self._nbytes

    def __getstate__(self) -> dict[str, object]:
        """A copy begins empty."""
        return {"max_bytes": self.max_bytes}

    def __setstate__(self, state: Mapping[str, int]) -> None:
        vars(self).update(vars(ContentCache(state["max_bytes"])))

    def get(self, place: Place, version: object) -> Content | None:
        """Return an adapter's content if it is here in that version; it is then the latest."""
        with self._lock:
            cached = self._contents.get(place)
            if cached is None or cached.version != version:
                return None
            self._contents.move_to_end(place)
            return cached.content

    def shared(self) -> dict[str, Tensor]:
        """Return the shared tensors that are here, by digest."""
        with self._lock:
            return {key: tensor for key, (tensor, _) in self._shared.items()}

    def put(self, place: Place, version: object, content: Content) -> Content:
        """Keep an adapter's content; the oldest leave until all are within the bound.

        Returns:
            The content, with tensors that are here already in place of equal shared ones.
        """
        with self._lock:
            self.drop(place)
            content.shared = {
                key: self._shared[key][0] if key in self._shared else tensor
                for key, tensor in content.shared.items()
            }
            alone = content.nbytes + sum(t.nbytes for t in content.shared.values())
            if alone > self.max_bytes:
                return content
            self._contents[place] = _Cached(content, version)
            self._nbytes += content.nbytes
            for key, tensor in content.shared.items():
                _, users = self._shared.get(key, (tensor, 0))
                self._nbytes += 0 if users else tensor.nbytes
                self._shared[key] = tensor, users + 1
            while self._nbytes > self.max_bytes:
                self.drop(next(iter(self._contents)))
            return content

    def drop(self, place: Place) -> None:
        """Forget an adapter's content, if it is here."""
        with self._lock:
            cached = self._contents.pop(place, None)
            if cached is None:
                return
            self._nbytes -= cached.content.nbytes
            for key in cached.content.shared:
                tensor, users = self._shared.pop(key)
                self._nbytes -= 0 if users > 1 else tensor.nbytes
                if users > 1:
                    self._shared[key] = tensor, users - 1
