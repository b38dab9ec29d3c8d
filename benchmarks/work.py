# SPDX-License-Identifier: Apache-2.0
"""The work that is measured: a model, frozen or adapted, that takes a training step, reads a prompt
or writes a token; eager, compiled, or as a captured CUDA graph.

Runs in a worker's process and knows only the interface that the libraries share.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NEW_TOKENS = 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """The size of the work.

    Args:
        model: "llama", or "stack": only linear layers, as many as the Llama has projections, all
            of `width × width`.
        width: Hidden size of the model.
        layers: Number of its decoder layers.
        batch, tokens: Size of a training step and of a prompt.
        decode_batch: Number of sequences that get one more token.
        rank: Rank of the adapters.
        tasks, bank: Tasks of a Poly adapter; vectors of a VB-LoRA bank.
        experts, top_k: Adapters that Arrow routes over, and how many serve a token.
        compiled: Compile the frozen and the adapted model by `torch.compile`.
        graph: Capture the step in a CUDA graph and replay it.
    """

    model: str = "llama"
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
    compiled: bool = False
    graph: bool = False

    @property
    def inner(self) -> int:
        """The Llama's intermediate size."""
        return int(self.width * 2.75) // 64 * 64

    def rows(self, kind: str) -> tuple[int, int]:
        """Return the number of samples and of tokens of each."""
        if kind in ("decode", "generate"):
            return self.decode_batch, 1
        return self.batch, self.tokens


class Stack(nn.Module):
    """Linear layers, one after the other, with the names of projections."""

    def __init__(self, width: int, layers: int, names: Sequence[str] = TARGETS) -> None:
        super().__init__()
        linears = ({name: nn.Linear(width, width) for name in names} for _ in range(layers))
        self.layers = nn.ModuleList(nn.ModuleDict(one) for one in linears)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return what the last layer makes of `[…, width]`."""
        for layer in self.layers:
            for linear in layer.values():  # type: ignore[operator]
                hidden = linear(hidden)
        return hidden


def base_model(shape: Shape) -> nn.Module:
    """Return a frozen model. A Llama's embedding is trained, so that backward reaches every
    layer; a stack's input gets a gradient.
    """
    torch.manual_seed(0)
    with torch.device(shape.device):
        model = _llama(shape) if shape.model == "llama" else Stack(shape.width, shape.layers)
    model.to(getattr(torch, shape.dtype)).requires_grad_(False)
    if shape.model == "llama":
        model.get_input_embeddings().requires_grad_(True)
    return model


def _llama(shape: Shape) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // 64,
        num_key_value_heads=shape.width // 64,
        vocab_size=512,
        max_position_embeddings=max(256, shape.tokens + 8),
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def twin(model: nn.Module) -> nn.Module:
    """Return a copy that shares the weights."""
    return copy.deepcopy(model, {id(p): p for p in (*model.parameters(), *model.buffers())})


class Work:
    """A step of one kind, on the frozen model or on the adapted one.

    Args:
        kind: "train", "prefill", "decode" (a call of the model for one token) or "generate"
            (`NEW_TOKENS` of them in one call).
        shape: Its size.
        run: What runs the model.
        arguments: Further arguments for its batch.
        trained: Parameters that get gradients beside those of `run`.
    """

    def __init__(
        self,
        kind: str,
        shape: Shape,
        run: nn.Module,
        arguments: dict[str, Any],
        trained: list[nn.Parameter],
    ) -> None:
        self.kind, self.arguments = kind, arguments
        self.on_gpu = torch.device(shape.device).type == "cuda"
        run.train(kind == "train")
        size, generator = shape.rows(kind), torch.Generator().manual_seed(1)
        if shape.model == "llama":
            self.input = torch.randint(0, 512, size, generator=generator).to(shape.device)
            named: dict[str, Any] = {"input_ids": self.input, "use_cache": False}
        else:
            drawn = torch.randn(*size, shape.width, generator=generator)
            self.input = drawn.to(shape.device, getattr(torch, shape.dtype))
            self.input.requires_grad_(kind == "train")
            named = {"hidden": self.input}
        self.named = named | arguments
        self.leaves = [self.input, *(p for p in run.parameters() if p.requires_grad), *trained]
        self.model = run
        self.run: Callable[..., Any] = torch.compile(run) if shape.compiled else run
        self.launch = self.step
        if shape.graph:
            self.launch = self._capture()

    def __call__(self) -> None:
        """Do the step once and wait for it."""
        self.launch()
        if self.on_gpu:
            torch.cuda.synchronize()

    def step(self) -> None:
        """Do the step; a GPU may still be at it."""
        if self.kind == "generate":
            self.model.generate(  # type: ignore[operator]
                input_ids=self.input, attention_mask=torch.ones_like(self.input),
                max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=None,
                **self.arguments,
            )  # fmt: skip
            return
        with torch.set_grad_enabled(self.kind == "train"):
            output = self.run(**self.named)
            output = getattr(output, "logits", output)
            if self.kind == "train":
                output.float().square().mean().backward()
                for leaf in self.leaves:
                    leaf.grad = None

    def _capture(self) -> Callable[[], None]:
        """Return the replay of the step as a CUDA graph.

        The steps before the capture compile kernels and let libraries allocate, on a stream of
        their own, as a capture asks for.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.step()
        return graph.replay

    def seconds(self) -> float:
        """Return the time of a step on the wall."""
        start = time.perf_counter()
        self()
        return time.perf_counter() - start

    def device_seconds(self) -> float:
        """Return the time of a step on the GPU alone: the host launches it while the GPU is still
        asleep, so the GPU does not wait for the host.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(100_000_000)  # cycles, some 60 ms
        start.record()
        self.launch()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def peak(self) -> int:
        """Return the peak memory that a step adds, in bytes; not of a captured one, which holds
        its memory.
        """
        self.step()
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(profile_memory=True) as profile:
            self.step()
        held = peak = 0
        events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        for event in sorted(events, key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        return peak
