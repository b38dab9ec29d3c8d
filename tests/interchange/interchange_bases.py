# SPDX-License-Identifier: Apache-2.0
"""Small base models for the interchange tests, the same in every process that makes them from the
same description.
"""

import sys
from pathlib import Path

import torch
from torch import nn

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
BATCH, LENGTH = 3, 5


class Mlp(nn.Module):
    """`inner -> middle -> 8 -> 4` with names that targets and patterns can tell apart."""

    def __init__(self, inner, middle):
        super().__init__()
        self.first = nn.Linear(inner, middle)
        self.block = nn.ModuleDict(
            {"second": nn.Linear(middle, 8, bias=False), "norm": nn.LayerNorm(8)}
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.head(self.block["norm"](self.block["second"](x)))


class Convolutions(nn.Module):
    """Two convolutions, pooled for a linear head."""

    def __init__(self, dimensions, kernel, stride, dilation, groups):
        super().__init__()
        convolution = getattr(nn, f"Conv{dimensions}d")
        self.conv0 = convolution(8, 12, kernel, padding=1, stride=stride)
        self.conv1 = convolution(12, 8, kernel, padding=2, dilation=dilation, groups=groups)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.conv1(torch.tanh(self.conv0(x))).flatten(2).mean(-1))


class Embedder(nn.Module):
    """An embedding under a linear layer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.lin = nn.Linear(8, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.lin(self.table(x))))


class Attention(nn.Module):
    """torch's multi-head attention under a linear layer."""

    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.mha(x, x, x)[0])


def _llama(head):
    import transformers

    config = transformers.LlamaConfig(
        **SIZES, num_key_value_heads=2, pad_token_id=0, num_labels=3, tie_word_embeddings=False
    )
    return getattr(transformers, f"Llama{head}")(config)


def _gpt2(head):
    import transformers

    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=3, n_head=4, pad_token_id=0, num_labels=3, n_positions=16
    )
    return getattr(transformers, f"GPT2{head}")(config)


def _bert(head):
    import transformers

    return getattr(transformers, f"Bert{head}")(
        transformers.BertConfig(**SIZES, num_labels=3, max_position_embeddings=16)
    )


def _t5(head):
    import transformers

    sizes = {
        "vocab_size": 40,
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 4,
    }
    config = transformers.T5Config(
        **sizes, pad_token_id=0, decoder_start_token_id=0, tie_word_embeddings=False
    )
    return getattr(transformers, f"T5{head}")(config)


def _experts(kind):
    sys.path.append(str(Path(__file__).parents[1]))
    from helpers.experts import mixture

    return mixture(kind)


MAKERS = {
    "experts": _experts,
    "mlp": Mlp,
    "conv": Convolutions,
    "embedder": Embedder,
    "attention": Attention,
    "llama": _llama,
    "gpt2": _gpt2,
    "bert": _bert,
    "t5": _t5,
}


def make_base(spec, seed):
    """The model that `spec`, a list of a kind and its arguments, describes."""
    torch.manual_seed(seed)
    model = MAKERS[spec[0]](*spec[1:])
    with torch.no_grad():  # the usual small start of transformers makes every output alike
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def make_inputs(spec, seed):
    """Keyword or positional inputs for a model of `spec`."""
    random = torch.Generator().manual_seed(seed + 1)
    if spec[0] == "mlp":
        return [torch.randn(BATCH, LENGTH, spec[1], generator=random)], {}
    if spec[0] == "conv":
        return [torch.randn(BATCH, 8, *[7] * spec[1], generator=random)], {}
    if spec[0] == "attention":
        return [torch.randn(BATCH, LENGTH, 8, generator=random)], {}
    if spec[0] == "embedder":
        return [torch.randint(0, 20, (BATCH, LENGTH), generator=random)], {}
    tokens = torch.randint(2, 40, (BATCH, LENGTH), generator=random)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if spec[0] == "t5":
        inputs["decoder_input_ids"] = tokens[:, :3] - 1
    return [], inputs
