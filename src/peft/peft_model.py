# SPDX-License-Identifier: Apache-2.0
"""`PeftModel`: a base model with adapters that can be trained, saved, loaded, switched, merged and
removed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from .base.constants import QA_HEAD_NAMES, SEQ_CLS_HEAD_NAMES
from .base.errors import PeftTypeError, PeftValueError
from .base.registry import TaskType
from .base.suggestions import did_you_mean
from .base.validation import check_adapter, check_flags
from .checkpoint.checks import LoadResult
from .checkpoint.files import write_adapter
from .checkpoint.hub import load_peft_weights, only_hub_options, pass_over
from .checkpoint.keys import adapter_tensors, in_view
from .checkpoint.model_card import update_model_card
from .checkpoint.paths import as_folder
from .checkpoint.reading import get_peft_model_state_dict
from .checkpoint.writing import import_state, set_peft_model_state_dict
from .config import PeftConfig
from .core.base_peft_model import BasePeftModel
from .core.injection import Construction
from .core.loading import (
    Filler,
    check_arguments,
    check_same_function,
    fitting,
    own_place,
    read_config,
    refuse_offload,
    renamings,
    understood,
)
from .core.renamed_targets import present_names
from .integrations.distributed import gathered_tensor, is_distributed, state_tensors
from .status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status


class PeftModel(BasePeftModel):
    """A base model with one or more adapters of one method.

    Args:
        model: The base model; adapters are put into it in place.
        peft_config: The first adapter's config.
        adapter_name: The first adapter's name.
        autocast_adapter_dtype: Keep adapters in float32 where the base has 16 bits.
        low_cpu_mem_usage: Make the adapter on the meta device, to be filled from a checkpoint.
        initialize: False leaves the adapter's memory as it is, for `fill` to write.
        fill: Called with the finished adapter before it is put in; fills its tensors, or raises.

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

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write adapters to a folder: "default" into it, each other into a sub-folder of its name.

        A reader sees each adapter as it was before or as it is now, whole, whatever moment the
        process is killed.

        Args:
            save_directory: The folder, made if missing.
            safe_serialization: False writes the legacy pickle format.
            selected_adapters: Which adapters, by default all.
            save_embedding_layers: True writes the token embeddings too; "auto" if an adapter
                targets one.
            is_main_process: False writes nothing. Where tensors are DTensors (FSDP2), every process
                has to call, to gather them.
            path_initial_model_for_weight_conversion: Anything but None writes adapters that start
                from the base weight (LoRA's "pissa" and "olora") as plain ones of twice the rank, for the weight as it is. The adapter itself knows what it
                started with, and nothing is read from the path.
            state_dict: Take the tensors from this state dict of the model (a gathered one, say).
            **kwargs: Options for saving whole models (`save_function`, `max_shard_size`, …), which
                have no effect.

        Raises:
            CheckpointError: `state_dict` has no tensors of an adapter.
            PeftRuntimeError: FSDP1 or ZeRO-3 hold the parameters elsewhere, and `state_dict` is not
                given.
            PeftTypeError: A switch is neither True nor False.
            PeftValueError: The path is a file, or an adapter is unknown.
        """
        check_flags(safe_serialization=safe_serialization, is_main_process=is_main_process)
        folder = as_folder(save_directory)
        pass_over(kwargs, "save_pretrained")
        if isinstance(selected_adapters, str):
            raise PeftTypeError(
                f"`selected_adapters`={selected_adapters!r} must be a list of names: "
                f"[{selected_adapters!r}]."
            )
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        for name in names:
            check_adapter(name)
        if unknown := [name for name in names if name not in self.peft_config]:
            raise PeftValueError(
                "You passed an invalid `selected_adapters` arguments, current supported adapter "
                "names are "
                f"{list(self.peft_config)} - got "
                f"{names}.{did_you_mean(str(unknown[0]), self.peft_config)}"
            )
        if not self.peft_config:
            raise PeftValueError(
                "The model has no adapters to save: they were deleted, or taken out by `unload` or "
                "`merge_and_unload`. Save the "
                "model that those return."
            )
        if path_initial_model_for_weight_conversion is not None:
            converted = {
                name: self.base_model.method_of(self.peft_config[name]).without_start(self, name)
                for name in names
            }
        else:
            converted = {}
        tensors = self.parameters() if state_dict is None else state_dict.values()
        if not is_main_process and not any(is_distributed(tensor) for tensor in tensors):
            return
        options: Any = {"save_embedding_layers": save_embedding_layers}
        states = {
            name: converted[name][1]
            if converted
            else get_peft_model_state_dict(self, state_dict, name, **options)
            for name in names
        }
        states = {
            name: {key: gathered_tensor(tensor) for key, tensor in state.items()}
            for name, state in states.items()
        }
        if not is_main_process:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for name, state in states.items():
            config = (
                converted[name][0]
                if converted
                else self.base_model.method_of(self.peft_config[name]).config_to_save(name)
            )
            config, state = self.base_model.method_of(config).form_to_save(name, config, state)
            write_adapter(
                folder if name == "default" else folder / name,
                state,
                self._config_text(config),
                safe_serialization,
            )
        self.create_or_update_model_card(folder)

    def _config_text(self, config: PeftConfig) -> str:
        """An adapter's config as it is written: frozen, and with what says which base model it is
        for.
        """
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
            update_model_card(Path(output_dir), config, self.get_base_model())

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The state of each layer with adapters, as `get_layer_status` gives it."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The state of the adapters, summed up, as `get_model_status` gives it."""
        return get_model_status(self)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_description: str | None = None,
        **save_options: Any,
    ) -> Any:
        """Save the adapters to a repository on the Hub, made if missing.

        Args:
            repo_id: "user/name".
            commit_message: By default "Upload adapter".
            private: Whether a new repository is private.
            token: Access token, by default the one stored by huggingface_hub.
            revision: Branch to write to.
            create_pr: Open a pull request in place of writing.
            commit_description: Further text for it.
            **save_options: As for `save_pretrained`.

        Returns:
            What huggingface_hub says of the commit.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, **save_options)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            message = commit_message or "Upload adapter"
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )

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
        ignore_mismatched_sizes: bool = False,
        strict: bool = True,
        **kwargs: Any,
    ) -> PeftModel:
        """Put a saved adapter into a base model.

        Names, shapes and kinds of all tensors are checked first; on any error the model is left
        exactly as it was.

        Args:
            model: The base model.
            model_id: A local folder, or an id on the Hub.
            adapter_name: Name for the adapter.
            is_trainable: False freezes it and puts the model into eval mode.
            config: Use this config in place of the saved one.
            autocast_adapter_dtype: Keep it in float32 where the base has 16 bits.
            ephemeral_gpu_offload: Refused.
            low_cpu_mem_usage: Accepted; loading never initialises parameters that the checkpoint
                fills.
            key_mapping: Renaming of module paths in the checkpoint's keys: regular expression →
                replacement. By default what the base model declares for checkpoints of its own earlier versions. Modules that the model does not have then
                are looked for under the names that transformers' rules give them, in keys and in the config.
            ignore_mismatched_sizes: Leave tensors that have another shape in the checkpoint (a head
                with other classes, say) as they start, with a warning.
            strict: False loads the keys that fit and names the rest in a warning: what of the file
                has no place in the adapter is left out, what the file lacks stays as it starts. Keys may then have the adapter's name in them. Another
                shape is an error still, and so is a file of which nothing fits.
            **kwargs: Options for the Hub: `subfolder`, `revision`, `token`, `cache_dir`, …

        Raises:
            CheckpointNotFoundError: There is no such adapter.
            CheckpointError: A file is damaged or does not fit.
            PeftTypeError: The model is no module, the place no path, or a switch neither True nor
                False.
            PeftValueError: The config does not fit the model.
        """
        refuse_offload(ephemeral_gpu_offload)
        flags = {
            "is_trainable": is_trainable,
            "autocast_adapter_dtype": autocast_adapter_dtype,
            "strict": strict,
        }
        check_flags(**flags, ignore_mismatched_sizes=ignore_mismatched_sizes)
        check_arguments(model, model_id)
        hub = only_hub_options(kwargs, "from_pretrained")
        config = read_config(model_id, config, hub)
        key_mapping = key_mapping or renamings(model)
        config, state = present_names(
            model, config, load_peft_weights(model_id, key_mapping=key_mapping, **hub)
        )
        if cls is PeftModel and config.task_type is not None:
            cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[TaskType(config.task_type)]
        fill = Filler(
            model, config, adapter_name, state, str(model_id), ignore_mismatched_sizes, strict
        )
        before, config.inference_mode = config.inference_mode, not is_trainable
        try:
            options: Any = {"initialize": ignore_mismatched_sizes or not strict, "fill": fill}
            peft_model = cls(model, config, adapter_name, autocast_adapter_dtype, **options)
        except BaseException:
            config.inference_mode = before
            raise
        peft_model.base_model.method_of(config).note_loaded(model, adapter_name)
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
        ignore_mismatched_sizes: bool = False,
        strict: bool = True,
        **kwargs: Any,
    ) -> LoadResult:
        """Load a saved adapter under a new name, or load new values into an adapter of this model.

        Args:
            model_id: A local folder, or an id on the Hub.
            adapter_name: The name; if the model has such an adapter, its values are replaced (by
                those in the sub-folder of its name, if `save_pretrained` made one).
            is_trainable: Whether a new adapter is trainable.
            torch_device: Where to read the file to.
            autocast_adapter_dtype, ephemeral_gpu_offload, low_cpu_mem_usage, key_mapping,
            ignore_mismatched_sizes, strict,
                **kwargs: As for `from_pretrained`.

        Returns:
            Names of the adapter's parameters that were not loaded, and keys of the file that have
            no place in it. A checkpoint that does not fit is an error, so there are none but what
            `ignore_mismatched_sizes` and `strict=False` let pass.

        Raises:
            As for `from_pretrained`; model and adapters are left exactly as they were.
        """
        refuse_offload(ephemeral_gpu_offload)
        flags = {
            "is_trainable": is_trainable,
            "autocast_adapter_dtype": autocast_adapter_dtype,
            "strict": strict,
        }
        check_flags(**flags, ignore_mismatched_sizes=ignore_mismatched_sizes)
        check_adapter(adapter_name)
        hub = only_hub_options(kwargs, "load_adapter")
        known = self.peft_config.get(adapter_name)
        hub = hub if known is None else own_place(model_id, adapter_name, hub)
        config = known or read_config(model_id, None, hub)
        key_mapping = key_mapping or renamings(self.get_base_model())
        state = load_peft_weights(model_id, device=torch_device, key_mapping=key_mapping, **hub)
        base = self.get_base_model()
        if known is None:
            config, state = present_names(base, config, state)
            config.inference_mode = not is_trainable
            fill = Filler(
                base, config, adapter_name, state, str(model_id), ignore_mismatched_sizes, strict
            )
            construction = Construction(
                autocast_adapter_dtype, initialize=ignore_mismatched_sizes or not strict
            )
            self._add(adapter_name, config, construction, fill)
            if is_trainable:
                self.base_model.set_requires_grad(adapter_name, True)
            self.base_model.method_of(config).note_loaded(self, adapter_name)
            return fill.result
        saved, state = present_names(base, read_config(model_id, None, hub), state)
        if saved.peft_type != known.peft_type:
            raise PeftValueError(
                f"Cannot combine adapters with different peft types. Found {known.peft_type} and "
                f"{saved.peft_type}: the model "
                f"has an adapter {adapter_name!r} already; load this one under another name."
            )
        check_same_function(self.base_model.method_of(known).config_to_save(adapter_name), saved)
        named = state_tensors(self, in_view(config, adapter_name))
        if not strict:
            state = understood(
                state, adapter_tensors(named.items(), config, adapter_name), config, adapter_name
            )
        incoming = import_state(state, config)
        expected = adapter_tensors(named.items(), config, adapter_name, incoming)
        left = fitting(
            expected, incoming, str(model_id), ignore_mismatched_sizes, strict
        ).unexpected_keys
        state = {key: tensor for key, tensor in state.items() if key not in left}
        return LoadResult(
            set_peft_model_state_dict(
                self, state, adapter_name, ignore_mismatched_sizes
            ).missing_keys,
            left,
        )


class PeftModelForSequenceClassification(PeftModel):
    """A `PeftModel` that classifies sequences; its head is trained beside the adapter."""

    _head_names = SEQ_CLS_HEAD_NAMES


class PeftModelForTokenClassification(PeftModel):
    """A `PeftModel` that classifies tokens; its head is trained beside the adapter."""

    _head_names = SEQ_CLS_HEAD_NAMES


class PeftModelForQuestionAnswering(PeftModel):
    """A `PeftModel` that finds answers in a text; its head is trained beside the adapter."""

    _head_names = QA_HEAD_NAMES


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
