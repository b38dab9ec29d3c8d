# SPDX-License-Identifier: Apache-2.0
"""Arguments of a model's calls that are for its adapters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping

from torch import nn

from ..base.calls.adapter_batch import AdapterBatch, adapter_batch
from ..base.calls.arguments import bind_arguments, positional_names
from ..base.calls.rows import call_rows, generation_rows
from ..base.errors import PeftTypeError
from ..base.registry import PEFT_TYPE_TO_TUNER_MAPPING


class CallArguments:
    """The arguments of a model's calls, as far as adapters read them.

    Args:
        model: The base model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._positional = positional_names(model.forward)
        every = {
            name
            for tuner in PEFT_TYPE_TO_TUNER_MAPPING.values()
            for name in getattr(tuner, "adapter_call_arguments", ())
        }
        self._of_methods = sorted(every.difference(inspect.signature(model.forward).parameters))

    def refuse_foreign(
        self, arguments: Mapping[str, object], own: Collection[str], owner: str
    ) -> None:
        """Raise `PeftTypeError` if a call has an argument of another method (`task_ids`).

        A model that takes any keyword would ignore it. `own` names the arguments of the model's
        methods, `owner` the tuner's class for the message.
        """
        for name in self._of_methods:
            if arguments.get(name) is not None and name not in own:
                raise PeftTypeError(
                    f"`{name}` is for another method than {owner}, and the model has no such "
                    "argument; leave it out."
                )

    def take_adapters(
        self,
        model: nn.Module,
        adapters: Mapping[str, object],
        own: tuple[str, ...],
        args: tuple[object, ...],
        arguments: dict[str, object],
        generate: Callable[..., object] | None = None,
    ) -> AdapterBatch | None:
        """Pop and check `adapter_names`, an adapter for each sample; return None without them.

        `own` names the arguments of the model's methods; `generate` is the method of such a call.

        Raises:
            PeftValueError: They do not fit the inputs or the model.
        """
        names = arguments.pop("adapter_names", None)
        if names is None:
            return None
        if generate is None:
            bound = bind_arguments(self._positional, args, arguments)
            return adapter_batch(names, adapters, call_rows(model, bound, own))
        bound = bind_arguments(positional_names(generate), args, arguments)
        return adapter_batch(names, adapters, generation_rows(model, bound, own))
