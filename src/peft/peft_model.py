# SPDX-License-Identifier: Apache-2.0
"""`PeftModel`: a base model with adapters that can be trained, saved, loaded, switched, merged and removed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .config import PeftConfig, as_folder
from .tuners._build import Build, Construction
from .tuners._layer import BaseTunerLayer
from .tuners._tuner import BaseTuner
from .utils.adapter_files import write_adapter
from .utils.constants import QA_HEAD_NAMES, SEQ_CLS_HEAD_NAMES
from .utils.error import PeftNotSupportedError, PeftTypeError, PeftValueError
from .utils.hub import only_hub_options, split_hub_options
from .utils.model_card import update_model_card
from .utils.peft_types import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, TaskType, lookup
from .utils.save_and_load import (
    MODEL_ROOT,
    ROOT,
    LoadResult,
    adapter_tensors,
    check_complete,
    check_state,
    get_peft_model_state_dict,
    import_state,
    is_embedding,
    load_peft_weights,
    set_peft_model_state_dict,
    write_state,
)


class PeftModel(nn.Module):
    """A base model with one or more adapters of one method.

    Args:
        model: The base model; adapters are put into it in place.
        peft_config: The first adapter's config.
        adapter_name: The first adapter's name.
        autocast_adapter_dtype: Keep adapters in float32 where the base has 16 bits.
        low_cpu_mem_usage: Make the adapter on the meta device, to be filled from a checkpoint.
        initialise: False leaves the adapter's memory as it is, for `check` to fill.
        check: Called with the finished adapter before it is put in; may fill its tensors, or raise.

    Raises:
        PeftValueError: The config is invalid or does not fit the model, which is left as it was.

    Attributes:
        base_model: The tuner, which holds the base model as `model`.
        peft_type: The method.

    Example:
        >>> import torch
        >>> from peft import LoKrConfig, get_peft_model
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 16)), LoKrConfig(r=2, target_modules=["0"]))
        >>> model.print_trainable_parameters()
        trainable params: 32 || all params: 304 || trainable%: 10.5263
    """

    # Heads that a task trains beside the adapter because they start at random.
    head_names: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        initialise: bool = True,
        check: Callable[[Build], None] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(model, PeftModel):
            raise PeftValueError("The model is a PeftModel already; use its `add_adapter` or `load_adapter`.")
        if not isinstance(peft_config, PeftConfig):
            raise PeftTypeError(f"The config must be a PeftConfig, got {type(peft_config)}.")
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            warnings.warn(
                "You are trying to modify a model with PEFT for a second time. If you want to reload the model with a different "
                "config, make sure to call `.unload()` before.",
                stacklevel=3,
            )
        tuner_cls = lookup(PEFT_TYPE_TO_TUNER_MAPPING, peft_config.peft_type)
        with self._with_heads(peft_config, model):
            self.base_model: BaseTuner = tuner_cls(
                model,
                peft_config,
                adapter_name,
                low_cpu_mem_usage=low_cpu_mem_usage,
                autocast_adapter_dtype=autocast_adapter_dtype,
                initialise=initialise,
                check=check,
            )
        self.peft_type = peft_config.peft_type
        self.train(model.training)
        if any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules()):
            self._let_checkpoints_see_gradients()

    @contextmanager
    def _with_heads(self, config: PeftConfig, model: nn.Module) -> Iterator[None]:
        """Add the task's heads to the config's `modules_to_save`; take them back if the adapter can't be made."""
        before: Any = getattr(config, "modules_to_save", None)
        if self.head_names:
            config.modules_to_save = list(dict.fromkeys([*(before or []), *self.head_names]))  # type: ignore[attr-defined]
        try:
            yield
        except BaseException:
            config.modules_to_save = before  # type: ignore[attr-defined]
            raise

    # --- the model ----------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward with the active adapters. What the method needs (`task_ids`) is passed by keyword."""
        self._refuse_adapter_names(kwargs)
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate` with the active adapters. What the method needs (`task_ids`) is passed by keyword."""
        self._refuse_adapter_names(kwargs)
        generate = self.base_model.generate
        with self.base_model.call_context(args, kwargs):
            return generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's inputs for one step, with what the method needs (`task_ids`) carried along."""
        own = {name: kwargs.pop(name) for name in self.base_model.call_arguments if name in kwargs}
        return {**self.base_model.prepare_inputs_for_generation(*args, **kwargs), **own}

    def _refuse_adapter_names(self, arguments: dict[str, Any]) -> None:
        """Raise rather than ignore a choice of adapter per sample."""
        if arguments.get("adapter_names") is not None:
            raise PeftNotSupportedError(
                f"`adapter_names` (an adapter for each sample) is not supported for {self.peft_type}; use `set_adapter`."
            )
        arguments.pop("adapter_names", None)

    def __getattr__(self, name: str) -> Any:
        """What this class lacks is read from the tuner, and what that lacks from the base model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def get_base_model(self) -> nn.Module:
        """The base model, adapters in it."""
        return self.base_model.model

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's method of that name; also lets gradients pass the frozen input, which checkpoints need to see."""
        result = self.get_base_model().gradient_checkpointing_enable(*args, **kwargs)  # type: ignore[operator]
        self._let_checkpoints_see_gradients()
        return result

    def _let_checkpoints_see_gradients(self) -> None:
        enable = getattr(self.get_base_model(), "enable_input_require_grads", None)
        if enable is not None:
            enable()

    # --- adapters -----------------------------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Each adapter's config, by name."""
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
        """The active adapter's config."""
        return self.peft_config[self.active_adapters[0]]

    @property
    def prefix(self) -> str:
        """How names of adapter parameters start."""
        return lookup(PEFT_TYPE_TO_PREFIX_MAPPING, self.peft_type)

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that adapters train whole."""
        names = {name for config in self.peft_config.values() for name in getattr(config, "modules_to_save", None) or ()}
        return names or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The base model's dtype, if it has one."""
        return getattr(self.get_base_model(), "dtype", None)

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether any adapter takes part in the forward."""
        return bool(self.active_adapters) and not self.base_model.disabled

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter of the same method; it waits, frozen, until `set_adapter`.

        Args:
            adapter_name: A new name, without dots.
            peft_config: Its config.
            low_cpu_mem_usage: Make it on the meta device, to be filled from a checkpoint.
            autocast_adapter_dtype: Keep it in float32 where the base has 16 bits.

        Raises:
            PeftValueError: The name is taken, or the config is of another method or does not fit; nothing is changed.
        """
        device = torch.device("meta") if low_cpu_mem_usage else None
        self._add(adapter_name, peft_config, Construction(autocast_adapter_dtype, device))

    def _add(self, name: str, config: PeftConfig, construction: Construction, check: Callable[[Build], None] | None = None) -> None:
        if config.peft_type != self.peft_type:
            raise PeftValueError(
                f"Cannot combine adapters with different peft types. Found {self.peft_type} and {config.peft_type}."
            )
        with self._with_heads(config, self.get_base_model()):
            self.base_model.add_adapter(name, config, construction, check=check)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several that add up, the active one and (unless `inference_mode`) the trainable one.

        Raises:
            PeftValueError: An unknown name; nothing is changed.
        """
        self.base_model.set_adapter(adapter_name, inference_mode)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A context in which the model computes what it did without adapters, and none of them is trainable."""
        if self.base_model.disabled:
            yield
            return
        self.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            self.base_model.enable_adapter_layers()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was the active one, the first of the others by name becomes active.

        Raises:
            PeftValueError: There is no such adapter.
        """
        self.base_model.delete_adapter(adapter_name)

    # --- parameters ---------------------------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable parameters, all parameters)."""
        trainable = total = 0
        for parameter in self.parameters():
            count = parameter.numel() or getattr(parameter, "ds_numel", 0)  # ZeRO-3 empties parameters
            if type(parameter).__name__ == "Params4bit":
                count = count * 2 * getattr(parameter, "quant_storage", torch.uint8).itemsize  # two weights a byte
            total += count
            trainable += count if parameter.requires_grad else 0
        return trainable, total

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trainable."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    # --- files --------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write adapters to a folder: "default" into it, each other into a sub-folder of its name.

        A reader sees each adapter as it was before or as it is now, whole, whatever moment the process is killed.

        Args:
            save_directory: The folder, made if missing.
            safe_serialization: False writes the legacy pickle format.
            selected_adapters: Which adapters, by default all.
            save_embedding_layers: True writes the token embeddings too; "auto" if an adapter targets one.
            is_main_process: False writes nothing.
            path_initial_model_for_weight_conversion: Refused; it concerns methods this package does not provide.
            state_dict: Take the tensors from this state dict of the model (a gathered one, say).

        Raises:
            PeftValueError: The path is a file, or an adapter is unknown.
        """
        folder = as_folder(save_directory)
        if path_initial_model_for_weight_conversion is not None:
            raise PeftNotSupportedError(f"`path_initial_model_for_weight_conversion` is not supported for {self.peft_type}.")
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        if any(name not in self.peft_config for name in names):
            raise PeftValueError(
                "You passed an invalid `selected_adapters` arguments, current supported adapter names are "
                f"{list(self.peft_config)} - got {names}."
            )
        if not is_main_process:
            return
        for name in names:
            state = get_peft_model_state_dict(self, state_dict, name, save_embedding_layers=save_embedding_layers)
            write_adapter(folder if name == "default" else folder / name, state, self._config_text(name), safe_serialization)
        self.create_or_update_model_card(folder)

    def _config_text(self, adapter_name: str) -> str:
        """The adapter's config as it is written: frozen, and with what says which base model it is for."""
        config = self.base_model.saved_config(adapter_name)
        inference_mode, config.inference_mode = config.inference_mode, True
        try:
            return config.to_json(None if config.task_type is not None else self._auto_mapping())
        finally:
            config.inference_mode = inference_mode

    def _auto_mapping(self) -> dict[str, str]:
        base = self.get_base_model()
        return {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}

    def create_or_update_model_card(self, output_dir: str | os.PathLike) -> None:
        """Write README.md, or bring its metadata up to date."""
        if self.peft_config:
            config = next(iter(self.peft_config.values()))
            update_model_card(Path(output_dir), config, hasattr(self.get_base_model(), "config"))

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Put a saved adapter into a base model.

        Names, shapes and kinds of all tensors are checked first; on any error the model is left exactly as it was.

        Args:
            model: The base model.
            model_id: A local folder, or an id on the Hub.
            adapter_name: Name for the adapter.
            is_trainable: False freezes it and puts the model into eval mode.
            config: Use this config in place of the saved one.
            autocast_adapter_dtype: Keep it in float32 where the base has 16 bits.
            ephemeral_gpu_offload: Refused.
            low_cpu_mem_usage: Accepted; loading never initialises parameters that the checkpoint fills.
            key_mapping: Renaming of the checkpoint's keys: regular expression → replacement.
            **kwargs: Options for the Hub: `subfolder`, `revision`, `token`, `cache_dir`, …

        Raises:
            CheckpointNotFoundError: There is no such adapter.
            CheckpointError: A file is damaged or does not fit.
            PeftValueError: The config does not fit the model.
        """
        _refuse_offload(ephemeral_gpu_offload)
        config = _read_config(model_id, config, kwargs)
        state = load_peft_weights(model_id, key_mapping=key_mapping, **split_hub_options(kwargs)[0])
        config.inference_mode = not is_trainable
        if cls is PeftModel and config.task_type is not None:
            cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[TaskType(config.task_type)]
        check = _filler(model, config, adapter_name, state, str(model_id))
        peft_model = cls(model, config, adapter_name, autocast_adapter_dtype, initialise=False, check=check)
        peft_model.base_model.loaded(model, adapter_name)
        return peft_model if is_trainable else peft_model.eval()

    def load_adapter(
        self,
        model_id: str | os.PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | torch.device | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> LoadResult:
        """Load a saved adapter under a new name, or load new values into an adapter of this model.

        Args:
            model_id: A local folder, or an id on the Hub.
            adapter_name: The name; if the model has such an adapter, its values are replaced.
            is_trainable: Whether a new adapter is trainable.
            torch_device: Where to read the file to.
            autocast_adapter_dtype, ephemeral_gpu_offload, low_cpu_mem_usage, key_mapping, **kwargs: As for `from_pretrained`.

        Returns:
            Missing and unexpected keys, both empty: a checkpoint that does not fit is an error.

        Raises:
            As for `from_pretrained`; model and adapters are left exactly as they were.
        """
        _refuse_offload(ephemeral_gpu_offload)
        hub = only_hub_options(kwargs, "load_adapter")
        known = self.peft_config.get(adapter_name)
        config = known or _read_config(model_id, None, hub)
        state = load_peft_weights(model_id, device=torch_device, key_mapping=key_mapping, **hub)
        if known is None:
            config.inference_mode = not is_trainable
            check = _filler(self.get_base_model(), config, adapter_name, state, str(model_id))
            self._add(adapter_name, config, Construction(autocast_adapter_dtype, initialise=False), check)
            self.base_model.loaded(self, adapter_name)
            if is_trainable:
                self.base_model.set_requires_grad(adapter_name, True)
            return LoadResult([], [])
        saved = _read_config(model_id, None, hub)
        if saved.peft_type != known.peft_type:
            raise PeftValueError(
                f"Cannot combine adapters with different peft types. Found {self.peft_type} and {saved.peft_type}."
            )
        expected = adapter_tensors(self.state_dict().items(), config, adapter_name)
        check_complete(check_state(expected, import_state(state, config)), str(model_id))
        return set_peft_model_state_dict(self, state, adapter_name)


def _refuse_offload(ephemeral_gpu_offload: bool) -> None:
    if ephemeral_gpu_offload:
        raise PeftNotSupportedError("`ephemeral_gpu_offload` is not supported; it concerns weight-decomposed LoRA.")


def _read_config(model_id: str | os.PathLike, config: PeftConfig | None, kwargs: dict[str, Any]) -> PeftConfig:
    if config is None:
        return PeftConfig.from_pretrained(model_id, **kwargs)
    if not isinstance(config, PeftConfig):
        raise PeftValueError(f"The input config must be a PeftConfig, got {type(config)}")
    return config


def _filler(
    model: nn.Module, config: PeftConfig, adapter_name: str, state: Mapping[str, Tensor], source: str
) -> Callable[[Build], None]:
    """A function that checks a checkpoint against a finished adapter and fills it, before the adapter is put in."""

    def fill(build: Build) -> None:
        named = {}
        for name, tensor in build.named_tensors():
            named[(ROOT if name.partition(".")[0] in build.shared else MODEL_ROOT) + name] = tensor
        paths = set(build.layers)
        for name, tensor in model.named_parameters():  # for trained biases and saved embeddings
            path, _, end = name.rpartition(".")
            named[f"{MODEL_ROOT}{path}.base_layer.{end}" if path in paths else MODEL_ROOT + name] = tensor
        expected = adapter_tensors(named.items(), config, adapter_name, any(is_embedding(key) for key in state))
        incoming = import_state(state, config)
        check_complete(check_state(expected, incoming), source)
        write_state(None, expected, incoming)

    return fill


class PeftModelForSequenceClassification(PeftModel):
    """A `PeftModel` that classifies sequences; its head is trained beside the adapter."""

    head_names = SEQ_CLS_HEAD_NAMES


class PeftModelForTokenClassification(PeftModel):
    """A `PeftModel` that classifies tokens; its head is trained beside the adapter."""

    head_names = SEQ_CLS_HEAD_NAMES


class PeftModelForQuestionAnswering(PeftModel):
    """A `PeftModel` that finds answers in a text; its head is trained beside the adapter."""

    head_names = QA_HEAD_NAMES


class PeftModelForCausalLM(PeftModel):
    """A `PeftModel` that generates text from left to right."""


class PeftModelForSeq2SeqLM(PeftModel):
    """A `PeftModel` that generates text from text."""


class PeftModelForFeatureExtraction(PeftModel):
    """A `PeftModel` that computes features."""


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[TaskType, type[PeftModel]] = {
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}
