# SPDX-License-Identifier: Apache-2.0
"""CorDA: run a model on data, and decompose its weights by the covariance of their inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ...base.errors import CheckpointError, PeftError, PeftValueError
from ...base.modules import check_model
from ...base.progress import track
from ...base.suggestions import listed
from ...base.validation import check_functions
from ...core.base_layer import geometry
from ...core.measuring import watched_inputs
from ...core.weights import dense_weight
from .config import LoraConfig
from .start_data import check_config, linear_targets, read_cache, write_cache
from .starts.configs import CordaConfig
from .starts.corda import CordaEigens, corda, covariance
from .starts.first import EIGENS

__all__ = ["CordaEigens", "preprocess_corda"]

_PARTS = ("S_WC", "U_WC", "V_WC")


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], object] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Compute the components of a model's weights that a CorDA adapter starts from.

    Each targeted linear layer gets an attribute `eigens`, which `get_peft_model` uses up. Call it
    before `get_peft_model`, with the same config. `run_model` runs the model on some hundred
    samples of data: of the task for `corda_method="ipm"`, of what is to be remembered for "kpm". A
    covariance `[in, in]` is kept for each layer meanwhile. The model runs in evaluation mode
    without gradients, and is as it was afterwards.

    Args:
        model: The base model.
        lora_config: With `init_lora_weights="corda"`. Its `corda_config` can name files: an
            existing `cache_file` or `covariance_file` is read, another one is written.
        run_model: Runs the model; not needed if one of the files exists.
        hooked_model: A model with modules of the same names to run in place of `model`.

    Raises:
        PeftTypeError: An argument is of another type.
        PeftValueError: The config is not for CorDA or targets no module, a layer saw no input or
            one with values that are not finite, or `run_model` is missing; nothing is changed.
        CheckpointError: A file can't be read, or lacks a layer, or is for another rank.

    Example:
        >>> from peft import get_peft_model
        >>> from peft.tuners.lora import CordaConfig
        >>> base, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(32, 8)
        >>> before = base(x)
        >>> config = LoraConfig(
        ...     r=2, target_modules=["0"], init_lora_weights="corda", corda_config=CordaConfig()
        ... )
        >>> preprocess_corda(base, config, run_model=lambda: base(x))
        >>> model = get_peft_model(base, config)
        >>> torch.allclose(model(x), before, atol=1e-4)
        True

    Source: arXiv:2406.05223, section 3
    """
    check_config(lora_config)
    if hooked_model is not None:
        check_model(hooked_model)
    if run_model is not None:
        check_functions(run_model=run_model)
    options = lora_config.corda_config
    if lora_config.init_lora_weights != "corda" or options is None:
        raise PeftValueError(
            "CorDA needs a config with `init_lora_weights='corda'`, found "
            f"{lora_config.init_lora_weights!r}."
        )
    layers = linear_targets(model, lora_config)
    ranks = {path: lora_config.rank_at(path) for path in layers}
    counts: dict[str, int] = {}
    covariances: dict[str, Tensor] = {}
    if (state := read_cache(options.cache_file)) is not None:
        eigens = _cached(state, ranks, str(options.cache_file))
    else:
        counts, covariances = _covariances(
            layers, options, run_model, model if hooked_model is None else hooked_model
        )
        eigens = _decomposed(layers, covariances, ranks, options)
        if options.cache_file is not None:
            write_cache(options.cache_file, _flat(eigens))
    for path, layer in layers.items():
        setattr(layer, EIGENS, eigens[path])
        if not options.prune_temporary_fields and path in covariances:
            vars(layer).update(covariance_matrix=covariances[path], sample_count=counts[path])


def _covariances(
    layers: Mapping[str, nn.Module],
    options: CordaConfig,
    run_model: Callable[[], object] | None,
    model: nn.Module,
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Return how often each layer was called, and the mean covariance of its inputs."""
    state = read_cache(options.covariance_file)
    if state is not None:
        if missing := [path for path in layers if path not in state]:
            raise CheckpointError(
                f"'{options.covariance_file}' has no covariance of {listed(missing)}; it "
                "was made for another model or other targets."
            )
        return dict.fromkeys(layers, 1), {path: state[path] for path in layers}
    if run_model is None:
        raise PeftValueError(
            "Pass `run_model`, a function that runs the model on data, unless a file of the "
            "`corda_config` exists."
        )
    modules = dict(model.named_modules())
    if missing := [path for path in layers if path not in modules]:
        raise PeftValueError(f"`hooked_model` has no modules {listed(missing)}.")
    counts: dict[str, int] = {}
    sums: dict[str, Tensor] = {}

    def note(path: str, args: tuple[object, ...]) -> None:
        rows = args[0]
        assert isinstance(rows, Tensor)
        rows = rows.flatten(0, -2)
        product = covariance(rows if options.use_float16_for_covariance else rows.float())
        if not torch.isfinite(product).all():
            raise PeftValueError(
                f"`{path}`: its input has values that are NaN or infinite, or whose squares are; "
                "check the data."
            )
        counts[path] = counts.get(path, 0) + 1
        sums[path] = sums[path].add_(product) if path in sums else product

    with watched_inputs(model, {path: modules[path] for path in layers}, note):
        run_model()
    if missing := [path for path in layers if path not in sums]:
        raise PeftValueError(
            f"`run_model` did not call {listed(missing)}; leave them out of the targets."
        )
    means = {path: total / counts[path] for path, total in sums.items()}
    if options.covariance_file is not None:
        write_cache(options.covariance_file, means)
    return counts, means


def _decomposed(
    layers: Mapping[str, nn.Module],
    covariances: Mapping[str, Tensor],
    ranks: Mapping[str, int],
    options: CordaConfig,
) -> dict[str, CordaEigens]:
    """Return the components of each layer's weight."""
    eigens = {}
    for path in track(list(layers), "CorDA", wanted=options.verbose):
        size = geometry(layers[path])
        assert size is not None
        W = size.as_stored(dense_weight(layers[path]))  # `[out, in]` of either layout
        try:
            eigens[path] = corda(
                W, covariances[path].to(W.device), ranks[path], options.corda_method
            )
        except PeftError as error:
            raise PeftValueError(f"`{path}`: {error}") from None
    return eigens


def _cached(
    state: Mapping[str, Tensor], ranks: Mapping[str, int], file: str | os.PathLike[str]
) -> dict[str, CordaEigens]:
    """Return components from a file; raise if it lacks some or has others."""
    eigens = {}
    for path, r in ranks.items():
        parts = [state.get(f"{path}.eigens.{part}") for part in _PARTS]
        tensors = [part for part in parts if part is not None]
        if len(tensors) < len(_PARTS) or len(tensors[0]) != r:
            raise CheckpointError(
                f"'{Path(file)}' has no components of rank {r} of `{path}`; it was made for "
                "another model or config."
            )
        eigens[path] = CordaEigens(*tensors)
    return eigens


def _flat(components: Mapping[str, CordaEigens]) -> dict[str, Tensor]:
    """Return the components by the names of a file."""
    return {
        f"{path}.eigens.{part}": getattr(eigens, part)
        for path, eigens in components.items()
        for part in _PARTS
    }
