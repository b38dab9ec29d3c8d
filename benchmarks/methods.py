# SPDX-License-Identifier: Apache-2.0
"""The methods that are measured, one row each: its config, and how LyCORIS is asked for the same.

`adapt` puts one of them into a model, with whichever library is first on the process's path.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import nn

from .work import TARGETS, Shape, Stack

Options = Callable[[Shape], dict[str, Any]]
FULL = 100_000
"""A rank so large that every library trains the matrices themselves."""


class Method(NamedTuple):
    """A method and its settings.

    Attributes:
        config: Name of its config in the PEFT interface.
        options: Fields of the config for work of a shape.
        lycoris: Arguments for LyCORIS; None if LyCORIS lacks the method.
    """

    config: str
    options: Options
    lycoris: Options | None = None


def _lokr(factor: int, full: bool) -> Method:
    def options(shape: Shape) -> dict[str, Any]:
        rank = FULL if full else shape.rank
        return {"r": rank, "alpha": rank, "decompose_factor": factor}

    def lycoris(shape: Shape) -> dict[str, Any]:
        size = {"linear_dim": shape.rank, "linear_alpha": shape.rank}
        return {"algo": "lokr", "factor": factor, "full_matrix": full, **size}

    return Method("LoKrConfig", options, lycoris)


def _poly(splits: int) -> Method:
    def options(shape: Shape) -> dict[str, Any]:
        return {"r": shape.rank, "n_tasks": shape.tasks, "n_skills": 4, "n_splits": splits}

    return Method("PolyConfig", options)


def _lora(shape: Shape) -> dict[str, Any]:
    return {"r": shape.rank, "lora_alpha": shape.rank}


def _vblora(shape: Shape) -> dict[str, Any]:
    length = math.gcd(shape.width, shape.inner, 256)
    return {"r": 4, "num_vectors": shape.bank, "vector_length": length, "topk": 2}


METHODS = {
    "lora": Method("LoraConfig", _lora),
    "lokr": _lokr(-1, full=False),
    "lokr-full": _lokr(-1, full=True),
    "lokr-full-4": _lokr(4, full=True),
    "lokr-full-8": _lokr(8, full=True),
    "lokr-full-16": _lokr(16, full=True),
    "vblora": Method("VBLoRAConfig", _vblora),
    "poly": _poly(1),
    "mhr": _poly(4),
    "arrow": Method("LoraConfig", _lora),
}


def libraries_with(method: str) -> tuple[str, ...]:
    """Return the libraries that have a method."""
    return ("ours", "peft", *(["lycoris"] if METHODS[method].lycoris else []))


@dataclass
class Adapted:
    """A model with an adapter.

    Attributes:
        run: What is called in place of the model.
        trained: The adapter's parameters.
        tasks: Number of tasks, of which each sample of a batch names one; 0 for none.
    """

    run: nn.Module
    trained: list[nn.Parameter]
    tasks: int = 0

    def arguments(self, batch: int, device: str) -> dict[str, Any]:
        """Return the further arguments for a batch of a size."""
        return {"task_ids": torch.arange(batch, device=device) % self.tasks} if self.tasks else {}


def adapt(model: nn.Module, library: str, name: str, shape: Shape) -> Adapted:
    """Put an adapter into a frozen model. It is in float32, whatever the model is in."""
    method = METHODS[name]
    if library == "lycoris":
        assert method.lycoris is not None
        return _lycoris(model, method.lycoris(shape))
    others = {id(p) for p in model.parameters()}
    tasks = shape.tasks if method.config == "PolyConfig" else 0
    if name == "arrow":
        run = _arrow(model, method, shape)
    else:
        run = _inject(model, library, method, shape)
    return Adapted(
        run, [p for p in run.parameters() if p.requires_grad and id(p) not in others], tasks
    )


def _inject(model: nn.Module, library: str, method: Method, shape: Shape) -> nn.Module:
    import peft

    plain = isinstance(model, Stack)
    options = method.options(shape) | ({} if plain else {"task_type": "CAUSAL_LM"})
    config = getattr(peft, method.config)(**options, target_modules=list(TARGETS))
    kept = [p for p in model.parameters() if p.requires_grad]
    run = peft.get_peft_model(model, config)
    for parameter in kept:
        parameter.requires_grad_(True)
    if plain and library == "peft":  # it takes `task_ids` there, or for a task type that it knows
        return run.base_model
    return run


def _lycoris(model: nn.Module, options: dict[str, Any]) -> Adapted:
    """Adapt a model in bypass mode, which replaces the layers' forwards and applies the factors
    instead of their product.
    """
    from lycoris import LycorisNetwork, create_lycoris

    names = [f".*{name}" for name in TARGETS]
    LycorisNetwork.apply_preset({"target_name": names, "target_module": []})
    network = create_lycoris(model, 1.0, bypass_mode=True, warn_on_unmatched=False, **options)
    network.apply_to()
    network.to(next(model.parameters()).device).train()
    model._network = (network,)
    return Adapted(model, [p for p in network.parameters() if p.requires_grad])


def _arrow(model: nn.Module, method: Method, shape: Shape) -> nn.Module:
    """Route over random LoRA adapters, written by the library itself."""
    from safetensors.torch import save_file

    import peft

    config = peft.LoraConfig(**method.options(shape), target_modules=list(TARGETS))
    kept = [p for p in model.parameters() if p.requires_grad]
    plain = peft.get_peft_model(model, config)
    state = peft.get_peft_model_state_dict(plain)
    model = plain.unload()
    with TemporaryDirectory() as folder:
        places = [Path(folder) / str(i) for i in range(shape.experts)]
        for i, place in enumerate(places):
            config.save_pretrained(place)
            random = torch.Generator().manual_seed(i)
            drawn = {key: torch.randn(t.shape, generator=random) * 0.02 for key, t in state.items()}
            save_file(drawn, place / "adapter_model.safetensors")
        options = peft.ArrowConfig(top_k=min(shape.top_k, shape.experts), rng_seed=0)
        adapted = peft.create_arrow_model(model, [str(place) for place in places], options)
    for parameter in kept:
        parameter.requires_grad_(True)
    return adapted
