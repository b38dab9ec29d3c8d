# SPDX-License-Identifier: Apache-2.0
"""`PeftModel`: a base model with adapters that can be trained, saved, loaded, switched, merged and
removed.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from .base.calls.adapter_batch import ADAPTER_BATCHES
from .base.calls.running import changing
from .base.calls.stack import run_in
from .base.constants import QA_HEAD_NAMES, SEQ_CLS_HEAD_NAMES
from .base.errors import PeftTypeError, PeftValueError, calling_library, warn
from .base.missing_attribute import PeftAttributeError
from .base.modules import check_model
from .base.placeholders import placeholders
from .base.registry import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, TaskType, lookup
from .base.validation import check_flags
from .config import PeftConfig, check_config
from .core import loading, saving, switching
from .core.adapted_model import AdaptedModel
from .core.filling import copy_fill
from .core.injection import Construction, Fill
from .core.layer import BaseTunerLayer
from .core.model_methods import around, forwarded
from .integrations.checkpointing import require_input_gradients
from .status import (
    TunerLayerStatus,
    TunerModelStatus,
    count_parameters,
    get_layer_status,
    get_model_status,
)

if not TYPE_CHECKING:  # names of the interface that are elsewhere here, or not provided
    __getattr__ = placeholders(__name__)


class PeftModel(nn.Module):
    """A base model with one or more adapters of one method.

    Args:
        model: The base model; adapters are put into it in place.
        peft_config: The first adapter's config.
        adapter_name: The first adapter's name.
        autocast_adapter_dtype: Keep adapters in float32 where the base has 16 bits.
        low_cpu_mem_usage: Make the adapter on the meta device, to be filled from a checkpoint.
        initialize: False leaves the adapter's tensors uninitialized, for `fill` to write.
        fill: Called with the finished adapter before it is put in; fills its tensors, or raises.

    Raises:
        PeftValueError: The config is invalid or does not fit the model, which is left as it was.

    Attributes:
        base_model: The tuner, which holds the base model as `model`.
        peft_type: The method.

    Example:
        >>> import torch
        >>> from peft import LoKrConfig, get_peft_model
        >>> base = torch.nn.Sequential(torch.nn.Linear(16, 16))
        >>> model = get_peft_model(base, LoKrConfig(r=2, target_modules=["0"]))
        >>> model.print_trainable_parameters()
        trainable params: 32 || all params: 304 || trainable%: 10.5263
    """

    # Heads that are trained beside the adapter because they start at random.
    _head_names: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        initialize: bool = True,
        fill: Fill | None = None,
    ) -> None:
        super().__init__()
        check_model(model)
        if isinstance(model, PeftModel):
            raise PeftValueError(
                "The model is a PeftModel already; use its `add_adapter` or `load_adapter`."
            )
        check_config(peft_config)
        check_flags(
            autocast_adapter_dtype=autocast_adapter_dtype, low_cpu_mem_usage=low_cpu_mem_usage
        )
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            warn(
                "You are trying to modify a model with PEFT for a second time. If you want to "
                "reload the model with a different config, make sure to call `.unload()` before."
            )
        tuner_cls = self._tuner_class(peft_config)
        self.base_model: AdaptedModel = tuner_cls(
            model,
            self._with_heads(peft_config),
            adapter_name,
            low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
            initialize=initialize,
            fill=fill,
        )
        self.peft_type = peft_config.peft_type
        self.training = model.training
        self.__class__ = self._around(tuner_cls)
        if any(
            getattr(module, "gradient_checkpointing", False) is True for module in model.modules()
        ):
            self.prepare_model_for_gradient_checkpointing()

    @classmethod
    def _around(cls, tuner_cls: type[AdaptedModel]) -> type:
        """Return this class with the methods of a tuner's `model_methods`, under the same name."""
        return around(cls, tuner_cls)  # type: ignore[arg-type]

    @classmethod
    def class_for(cls, task_type: str | TaskType | None) -> type[PeftModel]:
        """Return the class of models for a task type; a subclass of `PeftModel` is its own."""
        if cls is not PeftModel or task_type is None:
            return cls
        return MODEL_TYPE_TO_PEFT_MODEL_MAPPING[TaskType(task_type)]

    def _tuner_class(self, config: PeftConfig) -> type[AdaptedModel]:
        """Return the class of the tuner, `base_model`."""
        return lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type)

    def _check_method(self, config: PeftConfig) -> None:
        """Raise unless the model takes adapters of a config's method."""
        check_config(config)
        if config.peft_type != self.peft_type:
            raise PeftValueError(
                f"Cannot combine adapters with different peft types. Found {self.peft_type} and "
                f"{config.peft_type}. A model that takes both is made by `get_peft_model(model, "
                "config, mixed=True)`, or loaded by `PeftMixedModel.from_pretrained`."
            )

    def _with_heads(self, config: Any) -> Any:
        """Return a config with the task's heads among its `modules_to_save`."""
        if self._head_names:
            config = config.for_adapter()
            names = [*(config.modules_to_save or []), *self._head_names]
            config.modules_to_save = list(dict.fromkeys(names))
        return config

    def forward(self, *args: object, **kwargs: object) -> Any:
        """Run the base model with the active adapters.

        Arguments of the method (`task_ids`) are passed by keyword, and so is `adapter_names`: an
        adapter for each sample in place of the active ones, `"__base__"` for none.
        """
        return self.base_model(*args, **kwargs)

    def generate(self, *args: object, **kwargs: object) -> Any:
        """Call the base model's `generate`; it takes the keyword arguments of `forward` too."""
        self.base_model.refuse_foreign_arguments(kwargs)
        base = self.get_base_model()
        if not hasattr(base, "generate"):
            raise PeftAttributeError((base,), "generate")
        generate = self.base_model.generate
        cached = self.base_model.inference_cache.during_call(runs_often=True)
        with self.base_model.running_calls.during(kwargs.get("adapter_names")), cached:
            batch = self.base_model.chosen_adapters(args, kwargs, generate)
            if batch is not None:
                return run_in(partial(batch.generating, base), lambda: generate(*args, **kwargs))
            return run_in(partial(ADAPTER_BATCHES.during, None), lambda: generate(*args, **kwargs))

    def prepare_inputs_for_generation(self, *args: object, **kwargs: object) -> dict[str, object]:
        """Return the base model's inputs for one step, and the method's arguments (`task_ids`)."""
        names = self.base_model.adapter_call_arguments
        for_adapters = {name: kwargs.pop(name) for name in names if name in kwargs}
        return {**self.base_model.prepare_inputs_for_generation(*args, **kwargs), **for_adapters}

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the tuner, or of the base model, that this class lacks."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
        try:
            return getattr(self.base_model, name)
        except PeftAttributeError as error:
            error.owners = (self, *error.owners)
            raise

    def get_base_model(self) -> nn.Module:
        """Return the base model, with the adapters in it."""
        return self.base_model.model

    def gradient_checkpointing_enable(self, *args: object, **kwargs: object) -> None:
        """Call the base model's method of that name, and make its input require gradients."""
        self.base_model.gradient_checkpointing_enable(*args, **kwargs)
        self.prepare_model_for_gradient_checkpointing()

    def activation_checkpointing_enable(self, *args: object, **kwargs: object) -> None:
        """Call the base model's method of that name, as `gradient_checkpointing_enable` does."""
        self.base_model.activation_checkpointing_enable(*args, **kwargs)
        self.prepare_model_for_gradient_checkpointing()

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module | None = None) -> None:
        """Make the input of the base model, or of `model`, require gradients, which checkpointed
        layers need.
        """
        require_input_gradients(self.get_base_model() if model is None else model)

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The adapters' configs by name."""
        return self.base_model.peft_config

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or the names of several."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return self.base_model.active_adapters

    @property
    def active_peft_config(self) -> PeftConfig:
        """The config of the active adapter, of several the first; an error if none is active."""
        if not self.active_adapters:
            raise PeftValueError("No adapter is active; `peft_config` has the configs by name.")
        return self.peft_config[self.active_adapters[0]]

    @property
    def prefix(self) -> str:
        """Start of the names of adapter parameters."""
        return lookup(PEFT_TYPE_TO_PREFIX_MAPPING, self.peft_type)

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that adapters train in full."""
        names = {
            name
            for config in self.peft_config.values()
            for name in getattr(config, "modules_to_save", None) or ()
        }
        return names or None

    @property
    def special_peft_forward_args(self) -> set[str]:
        """Keyword arguments of `forward` that are for the adapters and not for the base model."""
        return {"adapter_names", *self.base_model.adapter_call_arguments}

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The base model's dtype, if it has one."""
        return getattr(self.get_base_model(), "dtype", None)

    @property
    def has_active_enabled_adapter(self) -> bool:
        """True if any adapter is active and the adapters are not disabled."""
        return bool(self.active_adapters) and not self.base_model.adapters_disabled

    def supports_lora_conversion(self, adapter_name: str | None = None) -> bool:
        """Return whether `convert_to_lora` accepts an adapter, by default the one it chooses."""
        return self.base_model.supports_lora_conversion(adapter_name)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter of the same method; it is frozen and inactive until `set_adapter`.

        TRL's trainers call this with the config of the trained adapter, for a reference model, and
        then copy values by names that most methods do not have. They get a copy instead, as
        `copy_adapter` makes it.

        Args:
            adapter_name: A new name, without dots.
            peft_config: Its config.
            low_cpu_mem_usage: Make it on the meta device, to be filled from a checkpoint.
            autocast_adapter_dtype: Keep it in float32 where the base has 16 bits.

        Raises:
            PeftValueError: The name is taken, or the config is of another method or does not fit;
                nothing is changed.
        """
        if isinstance(adapter_name, PeftConfig):
            raise PeftTypeError("The adapter's name comes first: `add_adapter(name, config)`.")
        adapters = self.peft_config.items()
        source = next((name for name, config in adapters if config is peft_config), None)
        if source is not None and calling_library() == "trl":
            self.copy_adapter(source, adapter_name, reference=True)
            return
        check_flags(
            autocast_adapter_dtype=autocast_adapter_dtype, low_cpu_mem_usage=low_cpu_mem_usage
        )
        device = torch.device("meta") if low_cpu_mem_usage else None
        construction = Construction(autocast_adapter_dtype, device)
        self._check_method(peft_config)
        self.base_model.add_adapter(adapter_name, self._with_heads(peft_config), construction)

    def copy_adapter(self, adapter_name: str, new_name: str, reference: bool = False) -> None:
        """Add a copy of an adapter, values included; it is frozen and inactive until `set_adapter`.

        Args:
            adapter_name: The adapter to copy, which stays as it is.
            new_name: A new name, without dots.
            reference: Turn off randomness in training (dropout, sampled gates), so that the
                copy computes the same in training and evaluation mode, as a reference for
                preference tuning.

        Raises:
            PeftTypeError: A name is not a string, or `reference` neither True nor False.
            PeftValueError: There is no such adapter, or the new name is taken; nothing is changed.

        Example:
            >>> from peft import LoKrConfig, get_peft_model
            >>> base = torch.nn.Sequential(torch.nn.Linear(4, 4))
            >>> config = LoKrConfig(r=2, target_modules=["0"], init_weights=False)
            >>> model = get_peft_model(base, config)
            >>> model.copy_adapter("default", "ref", reference=True)
            >>> layer = model.base_model.model[0]
            >>> torch.equal(layer.lokr_w1["ref"], layer.lokr_w1["default"])
            True
        """
        check_flags(reference=reference)
        if not isinstance(adapter_name, str):
            raise PeftTypeError(
                f"`adapter_name`={adapter_name!r} must be one adapter's name; copy several one by "
                "one."
            )
        with changing(self):
            self.base_model.check_names(adapter_name)
            config = self.peft_config[adapter_name]
            fill = copy_fill(self, config, adapter_name)
            construction = Construction(initialize=False, like=adapter_name)
            self.add_filled_adapter(new_name, config.for_copy(reference), fill, construction)
            self.base_model.method_of(config).note_loaded(self, new_name)

    def add_filled_adapter(
        self, name: str, config: PeftConfig, fill: Fill, construction: Construction | None = None
    ) -> None:
        """Add an adapter whose tensors a function writes before it is put in.

        Args:
            name: A new name.
            config: The adapter's config.
            fill: Writes the tensors, or raises.
            construction: Options for making the parameters, by default without initial values.

        Raises:
            PeftValueError: As for `add_adapter`; nothing is changed.
        """
        self._check_method(config)
        construction = construction or Construction(initialize=False)
        self.base_model.add_adapter(name, self._with_heads(config), construction, fill=fill)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several that add up, the active one and (unless `inference_mode`)
        the trainable one.

        Raises:
            PeftValueError: No name or an unknown one; nothing is changed.
        """
        self.base_model.set_adapter(adapter_name, inference_mode)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Return a context in which the model runs without adapters, and all of them are frozen.

        Contexts of several threads may overlap: the adapters are off until the last one ends.
        """
        return switching.without_adapters(self.base_model)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was the active one, the first of the others by name becomes
        active.

        Raises:
            PeftValueError: There is no such adapter.
        """
        self.base_model.delete_adapter(adapter_name)

    merge_adapter = forwarded(AdaptedModel.merge_adapter)
    unmerge_adapter = forwarded(AdaptedModel.unmerge_adapter)
    merge_and_unload = forwarded(AdaptedModel.merge_and_unload)
    unload = forwarded(AdaptedModel.unload)
    add_weighted_adapter = forwarded(AdaptedModel.add_weighted_adapter)
    set_requires_grad = forwarded(AdaptedModel.set_requires_grad)
    enable_adapter_layers = forwarded(AdaptedModel.enable_adapter_layers)
    disable_adapter_layers = forwarded(AdaptedModel.disable_adapter_layers)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the numbers of trainable and of all parameters."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trainable."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}"
        )

    from_pretrained = classmethod(loading.from_pretrained)
    load_adapter = loading.load_adapter
    save_pretrained = saving.save_pretrained
    push_to_hub = saving.push_to_hub

    def create_or_update_model_card(self, output_dir: str | os.PathLike) -> None:
        """Write README.md, or update its metadata."""
        saving.write_model_card(Path(output_dir), self.base_model)

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """Return the state of each layer with adapters, as `peft.get_layer_status` does."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """Return the state of the adapters, summed up, as `peft.get_model_status` does."""
        return get_model_status(self)


class PeftModelForSequenceClassification(PeftModel):
    """A `PeftModel` that classifies sequences; its head is trained beside the adapter."""

    _head_names = SEQ_CLS_HEAD_NAMES


class PeftModelForTokenClassification(PeftModel):
    """A `PeftModel` that classifies tokens; its head is trained beside the adapter."""

    _head_names = SEQ_CLS_HEAD_NAMES


class PeftModelForQuestionAnswering(PeftModel):
    """A `PeftModel` that extracts answers from a text; its head is trained beside the adapter."""

    _head_names = QA_HEAD_NAMES


class PeftModelForCausalLM(PeftModel):
    """A `PeftModel` of a causal language model."""


class PeftModelForSeq2SeqLM(PeftModel):
    """A `PeftModel` of an encoder-decoder language model."""


class PeftModelForFeatureExtraction(PeftModel):
    """A `PeftModel` that returns hidden states."""


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[TaskType, type[PeftModel]] = {
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}
