# SPDX-License-Identifier: Apache-2.0
"""The exceptions this package raises: each is a `PeftError` and the builtin that callers expect."""

from __future__ import annotations


class PeftError(Exception):
    """Base of every error raised on purpose by this package."""


class PeftWarning(UserWarning):
    """Base of the warnings of this package that a program may want to filter."""


class PeftValueError(PeftError, ValueError):
    """A value is outside what a config, method or argument allows."""


class NoMatchingPeftModuleError(PeftValueError):
    """No module of the model is one that the config targets."""


class PeftTypeError(PeftError, TypeError):
    """An argument has a type that cannot be used."""


class PeftRuntimeError(PeftError, RuntimeError):
    """An operation is not possible in the present state."""


class PeftNotSupportedError(PeftError, NotImplementedError, ValueError):
    """An argument or operation that this method cannot honour."""


class UnsupportedModuleError(PeftError, TypeError, ValueError):
    """A targeted module is of a kind the method cannot adapt."""


class CheckpointError(PeftError, RuntimeError, ValueError):
    """A checkpoint is damaged, or does not fit the model or the config."""


class CheckpointNotFoundError(PeftError, FileNotFoundError, ValueError):
    """There is no checkpoint at the place given."""
