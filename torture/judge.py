# SPDX-License-Identifier: Apache-2.0
"""Watch a call: what it opens, runs and imports, how long it takes, how much memory.

Opened files and started programs are told by Python's audit events; those that safetensors opens
below Python, by the functions of this package that call it.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import huggingface_hub.file_download

from peft.checkpoint import files

# A call may take so many seconds of the processor, and of the clock if it waits for something.
SECONDS, PATIENCE = 5.0, 300.0
# Memory that a call may take: so many bytes for each byte of its files, and a constant.
FACTOR, CONSTANT = 100, 32 * 2**20

_STARTS = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork")
_NETWORK = ("socket.", "urllib.", "ftplib.", "http.", "smtplib.", "webbrowser.")
_CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.link", "os.symlink",
            "os.truncate", "os.utime", "os.chown", "shutil.")  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# Libraries' own code and data, which lazy imports read.
_LIBRARIES = tuple(
    {
        os.path.join(os.path.realpath(path), "")
        for path in (*sysconfig.get_paths().values(), sys.base_prefix, sys.prefix, *sys.path)
        if path
    }
)
# What is asked on the Hub, is asked with the user's token.
_HUB = os.path.join(os.path.realpath(os.path.expanduser("~/.cache/huggingface")), "")
_READABLE = ("/proc/self/", "/sys/", _HUB, *_LIBRARIES)
# A bank of vectors may lie beside its adapters, and experts in folders that a config names; what is
# read there has a digest in the config.
_SHARED = ("vector_bank.safetensors",)
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


class Overtime(BaseException):
    """A call takes too long; no handler of errors catches this."""


class Watch:
    """What a call did that a reader of foreign files must not do; the first thing of each call."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.finding: str | None = None
        self._others: tuple[str, ...] = _SHARED
        self._is_on = False
        sys.addaudithook(self._hear)

    @contextmanager
    def over(self, folder: Path | None, names_others: bool = False) -> Iterator[None]:
        """Context that watches; files may be opened below the folder alone, and files of adapters
        that are elsewhere if the config `names_others`.
        """
        self._others = (*_SHARED, *_ADAPTERS) if names_others else _SHARED
        self.folder = None if folder is None else os.path.join(os.path.realpath(folder), "")
        real: Any = files.safe_open

        def safe_open(filename: object, *args: object, **options: object) -> object:
            self.opened(filename, False)
            return real(filename, *args, **options)

        files.safe_open = safe_open  # type: ignore[assignment]
        self.finding, self._is_on = None, True
        try:
            yield
        finally:
            self._is_on = False
            files.safe_open = real

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._is_on or event.startswith("object."):
            return
        if event == "open":
            path, _, flags = arguments
            self.opened(path, bool((flags or 0) & _WRITING))
        elif event in ("exec", "compile"):
            code = arguments[0] if event == "exec" else None
            name = code.co_filename if isinstance(code, CodeType) else str(arguments[-1])
            if not name.startswith(("<frozen", *_LIBRARIES)) and not _is_importing():
                self._note(f"it runs code of {name[:80]}")
        elif event.startswith(_STARTS):
            self._note(f"it starts a program: {event}")
        elif event.startswith(_NETWORK):
            self._note(f"it asks the network: {event}")
        elif event.startswith(_CHANGES):
            is_relative = isinstance(arguments[-1], int) and arguments[-1] >= 0
            for path in () if is_relative else arguments[: 2 if "rename" in event else 1]:
                self.opened(path, True)

    def opened(self, path: object, is_written: bool) -> None:
        """Note a path that was opened, unless it may be."""
        if not self._is_on or isinstance(path, int):
            return
        text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else str(path)
        real = os.path.join(os.path.realpath(os.path.dirname(text)), os.path.basename(text))
        if not is_written and real.startswith(_READABLE):
            return
        if is_written and _is_importing():  # caches of libraries
            return
        if self.folder is not None and os.path.join(real, "").startswith(self.folder):
            return
        if not is_written and os.path.basename(text) in self._others:
            return
        self._note(f"it {'writes' if is_written else 'opens'} {text[:120]!r}, out of the folder")

    def _note(self, finding: str) -> None:
        if self.finding is None:
            self.finding = finding


def _is_importing() -> bool:
    """Return whether a module of a library is being imported, which may make code of text."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextmanager
def time_limit() -> Iterator[None]:
    """Context that raises `Overtime` when it takes too long."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Overtime

    before = [(which, signal.signal(which, stop)) for which in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for which, handler in before:
            signal.signal(which, handler)


def peak() -> int:
    """Return the most memory that the process has had since `forget_peak`, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak() -> None:
    """Let the peak be what the process has now."""
    Path("/proc/self/clear_refs").write_text("5")


def takes_too_much(work: Callable[[], object], size: int) -> str | None:
    """Call a function again, and return what is wrong with the memory that it takes."""
    forget_peak()
    before = peak()
    work()
    taken, most = peak() - before, FACTOR * size + CONSTANT
    forget_peak()
    if taken <= most:
        return None
    return f"{taken:,} bytes of memory for {size:,} bytes of files"


assert huggingface_hub.file_download  # imported before anything is watched
