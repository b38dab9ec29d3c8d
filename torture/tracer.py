# SPDX-License-Identifier: Apache-2.0
"""Run a function in a child process and stop at each of its system calls on a folder.

The child is a fork, so it has the caller's modules and models. Its main thread is traced with
ptrace (Linux on x86-64). A call can be recorded, made to fail with an error, cut short, or never
happen because the child is killed just before it.

Source: ptrace(2), `PTRACE_GET_SYSCALL_INFO`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import pickle
import platform
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

TRACEME, CONT, SYSCALL, SETOPTIONS, POKEUSER, GET_SYSCALL_INFO = 0, 7, 24, 0x4200, 6, 0x420E
TRACESYSGOOD, EXITKILL = 1, 1 << 20
ORIG_RAX, RAX, RDX = 15 * 8, 10 * 8, 12 * 8  # offsets in struct user of x86-64
AT_FDCWD = -100

# Calls on files by number: name, and what their arguments are: "p" a path, "d" a folder's
# descriptor before a path, "f" a descriptor, "." anything else.
CALLS = {
    0: ("read", "f"),
    1: ("write", "f.n"),
    2: ("open", "p"),
    3: ("close", "f"),
    4: ("stat", "p"),
    5: ("fstat", "f"),
    6: ("lstat", "p"),
    8: ("lseek", "f"),
    9: ("mmap", "....f"),
    16: ("ioctl", "f"),
    17: ("pread64", "f"),
    18: ("pwrite64", "f.n"),
    19: ("readv", "f"),
    20: ("writev", "f"),
    21: ("access", "p"),
    40: ("sendfile", "ff"),
    72: ("fcntl", "f"),
    73: ("flock", "f"),
    74: ("fsync", "f"),
    75: ("fdatasync", "f"),
    76: ("truncate", "p"),
    77: ("ftruncate", "f"),
    78: ("getdents", "f"),
    82: ("rename", "pp"),
    83: ("mkdir", "p"),
    84: ("rmdir", "p"),
    85: ("creat", "p"),
    86: ("link", "pp"),
    87: ("unlink", "p"),
    88: ("symlink", "pp"),
    89: ("readlink", "p"),
    90: ("chmod", "p"),
    91: ("fchmod", "f"),
    217: ("getdents64", "f"),
    257: ("openat", "dp"),
    258: ("mkdirat", "dp"),
    262: ("newfstatat", "dp"),
    263: ("unlinkat", "dp"),
    264: ("renameat", "dpdp"),
    268: ("fchmodat", "dp"),
    269: ("faccessat", "dp"),
    285: ("fallocate", "f"),
    316: ("renameat2", "dpdp"),
    326: ("copy_file_range", "f.f"),
    332: ("statx", "dp"),
    439: ("faccessat2", "dp"),
}
WRITES = {"write", "pwrite64"}


class Call(NamedTuple):
    """A system call on the folder: its name, paths, numbers and, where it writes, the bytes."""

    name: str
    paths: tuple[str, ...]
    arguments: tuple[int, ...]
    data: bytes = b""
    result: int = 0


class Fault(NamedTuple):
    """What happens at one call: "error" with a number, "short" (half of a write), or "kill"."""

    at: int
    kind: str
    number: int = 0

    def __str__(self) -> str:
        kind = errno.errorcode[self.number] if self.kind == "error" else self.kind
        return f"{kind} at call {self.at}"


@dataclass
class Outcome:
    """The calls of a child, and what it returned; `killed` if it did not come to an end."""

    calls: list[Call] = field(default_factory=list)
    value: object = None
    killed: bool = False
    error: str | None = None


class _Info(ctypes.Structure):
    """The head of `struct ptrace_syscall_info`, with the arguments of an entry or the result."""

    _fields_ = [
        ("op", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("ip", ctypes.c_uint64),
        ("sp", ctypes.c_uint64),
        ("number", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6),
    ]


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def is_supported() -> bool:
    """Return whether processes can be traced here."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def run(work: Callable[[], object], folder: Path, fault: Fault | None = None) -> Outcome:
    """Run `work` in a traced child and return its calls on `folder`, its value or its error.

    Args:
        work: The function. Its return value has to be picklable.
        folder: Only calls on this folder, or on paths below it, are seen.
        fault: What to do at one of these calls, once.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _work_in_child(work, writer)
    os.close(writer)
    outcome = Outcome()
    try:
        outcome.killed = _trace(child, str(folder), fault, outcome.calls)
        with os.fdopen(reader, "rb") as pipe:
            content = pipe.read()
    finally:
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
    if content:
        outcome.value, outcome.error = pickle.loads(content)
    return outcome


def _work_in_child(work: Callable[[], object], writer: int) -> None:
    """Stop for the tracer, work, and send what came of it."""
    try:
        _ptrace(TRACEME, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        try:
            content = pickle.dumps((work(), None))
        except BaseException:
            content = pickle.dumps((None, traceback.format_exc()))
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(content)
    finally:
        os._exit(0)


def _trace(child: int, folder: str, fault: Fault | None, calls: list[Call]) -> bool:
    """Follow a child to its end; return whether it was killed."""
    os.waitpid(child, 0)
    _ptrace(SETOPTIONS, child, TRACESYSGOOD | EXITKILL)
    signal_to_pass = 0
    entered: Call | None = None
    while True:
        _ptrace(SYSCALL, child, signal_to_pass)
        _, status = os.waitpid(child, 0)
        signal_to_pass = 0
        if os.WIFEXITED(status):
            return False
        if os.WIFSIGNALED(status):
            return True
        if os.WSTOPSIG(status) != signal.SIGTRAP | 0x80:
            signal_to_pass = os.WSTOPSIG(status)
            continue
        info = _info(child)
        if info.op == 1:  # entry
            entered = _call(child, info, folder)
            if entered is None:
                continue
            hit = fault is not None and fault.at == len(calls)
            if hit and fault.kind == "kill":
                calls.append(entered)
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return True
            if hit and fault.kind == "error":
                _poke(child, ORIG_RAX, -1)
            if hit and fault.kind == "short" and entered.name in WRITES:
                _poke(child, RDX, max(1, entered.arguments[2] // 2))
        elif info.op == 2 and entered is not None:  # exit
            result = ctypes.c_int64(info.number).value  # the first field of an exit
            if fault is not None and fault.kind == "error" and fault.at == len(calls):
                _poke(child, RAX, -fault.number)
                result = -fault.number
            calls.append(entered._replace(result=result))
            entered = None


def _call(child: int, info: _Info, folder: str) -> Call | None:
    """Return the call that a child is about to make, if it is on the folder."""
    found = CALLS.get(info.number)
    if found is None:
        return None
    name, kinds = found
    arguments = tuple(ctypes.c_int64(value).value for value in info.arguments)
    paths = tuple(_paths(child, kinds, arguments))
    if not any(path == folder or path.startswith(folder + "/") for path in paths):
        return None
    data = _memory(child, arguments[1], arguments[2]) if name in WRITES else b""
    return Call(name, paths, arguments, data)


def _paths(child: int, kinds: str, arguments: tuple[int, ...]) -> Iterator[str]:
    """Yield the absolute paths that a call's arguments name."""
    start = f"/proc/{child}/cwd"
    for kind, value in zip(kinds, arguments, strict=False):
        if kind == "f":
            yield _link(f"/proc/{child}/fd/{value}")
        elif kind == "d":
            is_cwd = ctypes.c_int32(value).value == AT_FDCWD
            start = f"/proc/{child}/cwd" if is_cwd else f"/proc/{child}/fd/{value}"
        elif kind == "p":
            text = _text(child, value)
            yield text if text.startswith("/") else os.path.join(_link(start), text).rstrip("/")


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _text(child: int, address: int) -> str:
    """Return a string of a child's memory."""
    content = b""
    while address and b"\0" not in content:
        piece = _memory(child, address + len(content), 256 - (address + len(content)) % 256)
        if not piece:
            break
        content += piece
    return os.fsdecode(content.partition(b"\0")[0])


def _memory(child: int, address: int, size: int) -> bytes:
    try:
        with open(f"/proc/{child}/mem", "rb", buffering=0) as memory:
            memory.seek(address)
            return memory.read(size) or b""
    except (OSError, ValueError, OverflowError):
        return b""


def _info(child: int) -> _Info:
    info = _Info()
    size = ctypes.sizeof(info)
    _ptrace(GET_SYSCALL_INFO, child, ctypes.addressof(info), address=size)
    return info


def _poke(child: int, offset: int, value: int) -> None:
    _ptrace(POKEUSER, child, ctypes.c_uint64(value & (1 << 64) - 1).value, address=offset)


def _ptrace(request: int, pid: int, data: int = 0, address: int = 0) -> None:
    ctypes.set_errno(0)
    if _libc.ptrace(request, pid, address, data) == -1 and ctypes.get_errno():
        raise OSError(ctypes.get_errno(), f"ptrace({request}): {os.strerror(ctypes.get_errno())}")
