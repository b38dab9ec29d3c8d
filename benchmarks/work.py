# SPDX-License-Identifier: Apache-2.0
"""The work that is measured: a Llama-shaped model, frozen or adapted, that takes a training step,
reads a prompt or writes a token.

Runs in a worker's process, against whichever library is first on its path; it knows only the
interface they share.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

NEW_TOKENS = 16
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Shape:
    """The size of the work.

    Args:
        width: Hidden size of the model.
        layers: Number of its layers.
        batch, tokens: Size of a training step and of a prompt.
        decode_batch: Number of sequences that get one more token.
        rank: Rank of the adapters.
        tasks, bank: Tasks of a Poly adapter; vectors of a VB-LoRA bank.
        experts, top_k: Adapters that Arrow routes over, and how many serve a token.
    """

    width: int = 1024
    layers: int = 2
    batch: int = 4
    tokens: int = 128
    decode_batch: int = 32
    rank: int = 8
    tasks: int = 10
    bank: int = 256
    experts: int = 16
    top_k: int = 2
    dtype: str = "float32"
    device: str = "cpu"


def base_model(shape: Shape) -> nn.Module:
    """Return a frozen model whose embedding is trained, so that backward reaches every layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=int(shape.width * 2.75) // 64 * 64,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // 64,
        num_key_value_heads=shape.width // 64,
        vocab_size=512,
        max_position_embeddings=max(256, shape.tokens + 8),
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    with torch.device(shape.device):
        model = LlamaForCausalLM(config).to(getattr(torch, shape.dtype))
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    return model


def twin(model: nn.Module) -> nn.Module:
    """Return a copy that shares the weights."""
    return copy.deepcopy(model, {id(p): p for p in (*model.parameters(), *model.buffers())})


def vector_length(width: int) -> int:
    """Return a length that divides the sizes of all projections."""
    return 256 if width % 1024 == 0 and int(width * 2.75) // 64 * 64 % 256 == 0 else 64


def adapt(
    model: nn.Module, method: str, shape: Shape
) -> tuple[Callable[..., Any], Callable[[int], dict[str, Any]]]:
    """Put an adapter into a model.

    Returns:
        What runs the adapted model, and the further arguments it takes for a batch of a size.
    """
    if method == "lycoris-lokr":
        return _lycoris(model, shape), lambda batch: {}
    if method == "arrow":
        return _arrow(model, shape), lambda batch: {}
    import peft

    common = {"target_modules": PROJECTIONS, "task_type": "CAUSAL_LM"}
    configs = {
        "lora": lambda: peft.LoraConfig(r=shape.rank, lora_alpha=shape.rank, **common),
        "lokr": lambda: peft.LoKrConfig(r=shape.rank, alpha=shape.rank, **common),
        "lokr-full": lambda: peft.LoKrConfig(r=100_000, alpha=100_000, **common),
        "vblora": lambda: peft.VBLoRAConfig(
            r=4, num_vectors=shape.bank, vector_length=vector_length(shape.width), topk=2, **common
        ),
        "poly": lambda: peft.PolyConfig(
            r=shape.rank, n_tasks=shape.tasks, n_skills=4, n_splits=1, **common
        ),
        "mhr": lambda: peft.PolyConfig(
            r=shape.rank, n_tasks=shape.tasks, n_skills=4, n_splits=4, **common
        ),
    }
    adapted = peft.get_peft_model(model, configs[method]())
    model.get_input_embeddings().requires_grad_(True)
    if method in ("poly", "mhr"):
        return adapted, lambda batch: {
            "task_ids": torch.arange(batch, device=shape.device) % shape.tasks
        }
    return adapted, lambda batch: {}


def _arrow(model: nn.Module, shape: Shape) -> Callable[..., Any]:
    """Route over random LoRA adapters, written by the library itself."""
    from safetensors.torch import save_file

    import peft

    config = peft.LoraConfig(r=shape.rank, lora_alpha=shape.rank, target_modules=PROJECTIONS)
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
    model.get_input_embeddings().requires_grad_(True)
    return adapted


def _lycoris(model: nn.Module, shape: Shape) -> Callable[..., Any]:
    """Adapt a model with LyCORIS in bypass mode, which replaces the layers' forwards and applies
    the factors instead of their product.
    """
    from lycoris import LycorisNetwork, create_lycoris

    LycorisNetwork.apply_preset(
        {"target_name": [f".*{name}" for name in PROJECTIONS], "target_module": []}
    )
    network = create_lycoris(
        model,
        1.0,
        linear_dim=shape.rank,
        linear_alpha=shape.rank,
        algo="lokr",
        factor=-1,
        bypass_mode=True,
    )
    network.apply_to()
    network.to(shape.device, getattr(torch, shape.dtype)).train()
    model._network = (network,)
    return model


class Work:
    """A step of one kind, on the frozen model or on the adapted one.

    Args:
        kind: "train", "prefill", "decode" (a call of the model for one token) or "generate"
            (`NEW_TOKENS` of them in one call).
        shape: Its size.
        run: What runs the model.
        arguments: Further arguments for a batch of a size.
    """

    def __init__(
        self,
        kind: str,
        shape: Shape,
        model: nn.Module,
        run: Callable[..., Any],
        arguments: Callable[[int], Any],
    ) -> None:
        self.kind, self.model, self.run = kind, model, run
        generator = torch.Generator().manual_seed(1)
        batch, tokens = (
            (shape.decode_batch, 1)
            if kind in ("decode", "generate")
            else (shape.batch, shape.tokens)
        )
        self.ids = torch.randint(0, 512, (batch, tokens), generator=generator).to(shape.device)
        self.arguments = arguments(batch)
        for module in (run, model):
            if isinstance(module, nn.Module):
                module.train(kind == "train")
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if isinstance(run, nn.Module) and run is not model:
            self.parameters = [p for p in run.parameters() if p.requires_grad]

    def __call__(self) -> None:
        """Do the step once."""
        if self.kind == "generate":
            self.run.generate(  # type: ignore[attr-defined]
                input_ids=self.ids, attention_mask=torch.ones_like(self.ids),
                max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=None,
                **self.arguments,
            )  # fmt: skip
            return
        with contextlib.nullcontext() if self.kind == "train" else torch.no_grad():
            logits = self.run(input_ids=self.ids, use_cache=False, **self.arguments).logits
            if self.kind == "train":
                logits.float().square().mean().backward()
                for parameter in self.parameters:
                    parameter.grad = None
        if self.ids.is_cuda:
            torch.cuda.synchronize()
