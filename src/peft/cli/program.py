# SPDX-License-Identifier: Apache-2.0
"""The program `peft`: its commands, its exit codes, and its messages."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from .. import __version__
from ..base.errors import PeftError
from .bench import bench
from .compare import compare
from .convert import convert
from .extract import extract
from .inspect import inspect
from .library import library
from .merge import merge
from .plan import plan

# Exit codes: 0 fine, 2 wrong usage (click's own).
_FAILED, _INTERRUPTED = 1, 130


class Program(click.Group):
    """The commands, and what happens to their errors.

    Without `--debug` an error is one line on the standard error.
    """

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: object,
    ) -> Any:
        """Run a command line, and exit with its code; without `standalone_mode` as click does."""

        def run(arguments: Sequence[str]) -> object:
            return super(Program, self).main(
                arguments, prog_name or "peft", complete_var, standalone_mode=False, **extra
            )

        arguments = sys.argv[1:] if args is None else [*args]
        if not standalone_mode:
            return run(arguments)
        return sys.exit(_code_of(run, arguments))


def _code_of(run: Callable[[Sequence[str]], object], arguments: Sequence[str]) -> int:
    """Run a command line, print its error if there is one, and return the exit code."""
    try:
        with _short_warnings():
            code = run(arguments)
            sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _say("Stopped; nothing is left half written.")
        return _INTERRUPTED
    except BrokenPipeError:  # `peft … | head`
        _abandon_output()
        return 0
    except Exception as error:
        if "--debug" in arguments:
            raise
        _say(f"Error: {_message(error)}")
        try:
            sys.stdout.flush()
        except OSError:  # Python would try again at its end, and exit with another code
            _abandon_output()
        return _FAILED


def _abandon_output() -> None:
    """Let what is left of the output go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _message(error: Exception) -> str:
    """Return an error as one line."""
    if isinstance(error, PeftError):
        text = str(error)
    elif isinstance(error, OSError):
        name = f"'{error.filename}': " if error.filename else ""
        text = f"{name}{error.strerror or error}"
    elif isinstance(error, ImportError):
        text = f"{error}. Install it to use this command."
    else:
        text = f"{type(error).__name__}: {error} (`--debug` shows where)"
    return " ".join(text.split())


def _say(text: str) -> None:
    """Write a line to the standard error, as far as there is one."""
    try:
        click.echo(text, err=True)
    except OSError:
        pass


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Context in which a warning is one line without the place in the code."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        _say(f"Warning: {' '.join(str(message).split())}")

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield


@click.group(
    "peft",
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 fine, 1 failed, 2 wrong usage, 130 interrupted.",
)
@click.version_option(
    __version__,
    prog_name="peft",
    message="%(prog)s %(version)s, an independent implementation of the PEFT interface",
)
def program() -> None:
    """Look at adapters of large models, plan, convert, merge and compare them.

    An adapter is a folder or an id on the Hub. With local paths nothing is asked of the network.
    """


for _command in (inspect, plan, convert, extract, merge, compare, bench, library):
    program.add_command(_command)


def main() -> NoReturn:
    """Run the program with the arguments of the process, and exit."""
    program.main(prog_name="peft")
    raise AssertionError  # `main` exits
