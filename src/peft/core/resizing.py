# SPDX-License-Identifier: Apache-2.0
"""Resizing of a language model's vocabulary, which adapters of its embeddings do not follow.

transformers' `resize_token_embeddings` would raise when it has resized the embeddings and meets an
adapted head. It is a method of the base model, so its calls are wrapped there.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..base.calls.wrapped_methods import MethodCall, is_wrapped, unwrap_methods, wrap_method
from ..base.containers import walk
from ..base.errors import PeftNotSupportedError
from .auxiliary import AuxiliaryTrainingWrapper
from .layer import BaseTunerLayer

_RESIZE = "resize_token_embeddings"


def guard(model: nn.Module) -> None:
    """Make a model, and those inside it, refuse to resize embeddings or heads that adapters train.

    Raises in a call of `resize_token_embeddings`:
        PeftNotSupportedError: The size would change; nothing is changed.
    """
    for _, module in walk(model):
        is_language_model = hasattr(type(module), _RESIZE) and not is_wrapped(module, _RESIZE)
        if is_language_model and next(_adapted_ends(module), None) is not None:
            wrap_method(module, _RESIZE, (), _resize)


def release(model: nn.Module) -> None:
    """Undo `guard`."""
    unwrap_methods(model, _resize)


def _resize(call: MethodCall) -> object:
    """Resize a model's vocabulary, unless an adapter would not follow."""
    arguments = call.arguments()
    new, multiple = arguments.get("new_num_tokens"), arguments.get("pad_to_multiple_of")
    for module in _adapted_ends(call.module):
        rows = module.weight.shape[0]
        wanted = new if isinstance(new, int) else rows
        wanted += -wanted % multiple if isinstance(multiple, int) and multiple > 0 else 0
        if wanted != rows:
            path = next((path for path, own in walk(call.module) if own is module), "")
            raise PeftNotSupportedError(
                f"`{_RESIZE}` would change `{path}` from {rows} to {wanted} rows, and adapters of "
                "it would not follow. Resize the base model before it gets adapters of its "
                "embeddings or head; `unload` or `merge_and_unload` removes these."
            )
    return call.run()


def _adapted_ends(model: nn.Module) -> Iterator[BaseTunerLayer | AuxiliaryTrainingWrapper]:
    """Yield the model's input embeddings and output head, those that adapters train."""
    for end in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, end)()
        except (AttributeError, NotImplementedError):
            continue  # a model that has none, or does not say which
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            yield module
