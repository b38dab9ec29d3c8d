# SPDX-License-Identifier: Apache-2.0
"""`LoKrModel`: a model with LoKr adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import ClassVar

from torch import nn

from ...base.calls.running import changing
from ...base.errors import PeftValueError
from ...base.plain_values import plain
from ...base.validation import number
from ...checkpoint.format import CheckpointFormat, ModuleShape, Shapes
from ...core.base_layer import geometry
from ...core.combining import Combination, Combined
from ...core.method_info import Role
from ...core.model_methods import forwarded, methods_of
from ...core.parameter_targets import ParameterTarget
from ...integrations.distributed import check_whole, take_back
from ..lycoris_utils import LycorisTuner
from . import combining
from .config import LoKrConfig, layer_options
from .layer import Conv1d, Conv2d, Conv3d, Linear, LoKrLayer
from .param_wrapper import ParamWrapper
from .shapes import FACTOR_NAMES, sides


class LoKrFormat(CheckpointFormat[LoKrConfig]):
    """LoKr's tensors in a checkpoint, which are those in a model."""

    def module_shape(self, shapes: Shapes) -> ModuleShape | None:
        """Return the size of the product of the factors, and the rank of a low-rank one.

        `W2` as `[c, r]`, `[r, d · taps]` is the same for a convolution and a linear layer, and is
        taken for the latter.
        """
        by_name = {
            name: shape
            for key, shape in shapes.items()
            if (name := key.removeprefix("lokr_")) in FACTOR_NAMES
        }
        kernel = by_name.get("w2", by_name.get("t2", ()))[2:]
        try:
            (a, b), (c, d) = sides(by_name)
        except (KeyError, IndexError):  # not the tensors of one adapter
            return None
        low = by_name.get("w2_b") or by_name.get("w1_b")
        return ModuleShape(a * c, b * d, low[0] if low else None, kernel)


class LoKrModel(LycorisTuner[LoKrConfig]):
    """Tuner of LoKr: `W + (alpha / r) · (W1 ⊗ W2)` in every adapted layer.

    Example:
        >>> import torch
        >>> base = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3))
        >>> model = LoKrModel(base, LoKrConfig(target_modules=["0"]))
        >>> model.model[0].lokr_w1["default"].shape
        torch.Size([2, 2])

    Source: arXiv:2309.14859, section 3.2
    """

    prefix: ClassVar[str] = "lokr_"
    tuner_layer_cls = LoKrLayer
    layer_classes = (Linear, Conv1d, Conv2d, Conv3d)
    parameter_layer_cls = ParamWrapper
    checkpoint_format = LoKrFormat()
    parameter_roles: ClassVar[Mapping[str, Role]] = {
        "A": Role(("lokr_w1_b", "lokr_w2_b")),
        "B": Role(("lokr_w1_a", "lokr_w2_a")),
        "full": Role(("lokr_w1", "lokr_w2", "lokr_t2")),
        "magnitude": Role(("lokr_magnitude", "lokr_scalar"), decays=False),
    }
    combination_types: ClassVar[tuple[str, ...]] = ("svd",)

    def tuner_layer_options(
        self, config: LoKrConfig, path: str, build: object
    ) -> dict[str, object]:
        """Return the options of the layer at `path`."""
        size = geometry(self.model.get_submodule(path))
        return layer_options(config, path, size)._asdict()

    def target_problems(self, config: LoKrConfig, path: str, module: nn.Module) -> Iterator[str]:
        """Yield a sentence for each option of the config that does not fit the module's size."""
        size = geometry(module)
        assert size is not None
        options = layer_options(config, path, size)
        yield from options.problems(size)

    def parameter_options(  # noqa: D102
        self, config: LoKrConfig, target: ParameterTarget, build: object
    ) -> dict[str, object]:
        return layer_options(config, target.key, target.size)._asdict()

    def parameter_problems(self, config: LoKrConfig, target: ParameterTarget) -> Iterator[str]:
        """Yield options that do not fit the parameter's size, or need a layer."""
        options = layer_options(config, target.key, target.size)
        yield from options.problems(target.size)
        if config.weight_decompose or options.row_offset is not None:
            name = "weight_decompose" if config.weight_decompose else "row_offsets"
            yield f"`{name}` is for modules; leave the default."

    @classmethod
    def decomposes(cls, config: LoKrConfig) -> bool:  # noqa: D102
        return config.weight_decompose

    def clip_weight_norms(
        self, largest: float, adapter_name: str | None = None
    ) -> dict[str, float]:
        """Scale down the factors of every layer whose delta has a Frobenius norm,
        `|scale| · ‖W1‖ · ‖W2‖`, above `largest`. Call it after an optimizer's step; LyCORIS has it
        as `scale_weight_norms`.

        Args:
            largest: Largest norm to keep, above zero.
            adapter_name: The adapter; by default all active ones.

        Returns:
            The norm of each delta afterwards, by module path; the largest if there are several.

        Raises:
            PeftRuntimeError: ZeRO-3 or FSDP1 hold the factors elsewhere; nothing is changed.
            PeftValueError: `largest` is not above zero, or there is no such adapter; nothing is
                changed.
        """
        for problem in number("largest", plain(largest), positive=True):
            raise PeftValueError(problem)
        norms: dict[str, float] = {}
        with changing(self):
            names = self.active_adapters if adapter_name is None else self.check_names(adapter_name)
            with changing(self, names):
                take_back(self)
                chosen = [
                    (path, layer, name)
                    for path, layer in self.named_tuner_layers()
                    for name in names
                    if isinstance(layer, LoKrLayer) and name in layer.scaling
                ]
                for _, layer, name in chosen:
                    check_whole(layer.adapter_tensors(name), written=True)
                for path, layer, name in chosen:
                    norm = layer.clip_norm(name, largest)[0]
                    norms[path] = max(norm, norms.get(path, 0.0))
        return norms

    def combine(self, request: Combination, layers: Mapping[str, LoKrLayer]) -> Combined:
        """Return the Kronecker products nearest to the weighted sum of adapters."""
        return combining.combine(self.peft_config, layers, request)

    def config_to_save(self, adapter_name: str) -> LoKrConfig:
        """Return the config without `kronecker_layout` if no layer depends on it, so that other
        readers of the file do not warn of an unknown field.
        """
        config = self.peft_config[adapter_name]
        depends = any(
            adapter_name in layer.lokr_w2 and layer.lokr_w2[adapter_name].dim() == 3
            for layer in self.tuner_layers()
            if isinstance(layer, LoKrLayer)
        )
        return config if depends else replace(config, kronecker_layout="flat")


@methods_of(LoKrModel)
class LoKrMethods:
    """Methods that a model with LoKr adapters has in addition to those of every `PeftModel`."""

    clip_weight_norms = forwarded(LoKrModel.clip_weight_norms)
