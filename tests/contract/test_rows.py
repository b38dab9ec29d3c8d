# SPDX-License-Identifier: Apache-2.0
"""Whose the rows are that a layer sees: every sample of a mixed call gives what it gives alone, or
the call is refused by the layer's name.
"""

import pytest
import torch
from helpers.methods import METHODS
from torch import nn
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    FSMTConfig,
    FSMTForConditionalGeneration,
    LEDConfig,
    LEDModel,
    LongformerConfig,
    LongformerModel,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    SwinConfig,
    SwinModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    TimesformerConfig,
    TimesformerModel,
    XLNetConfig,
    XLNetModel,
)

import peft

BATCH, LENGTH = 3, 4
WORDS = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
SEQ2SEQ = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "decoder_start_token_id": 2,
    "dropout": 0.0,
}


@pytest.fixture(params=["LOKR", "VBLORA", "POLY"])
def method(request):
    """One method whose samples differ by adapter, one with a road of its own for that, one whose
    samples differ by task.
    """
    return METHODS[request.param]


def words(batch=BATCH, length=LENGTH):
    return torch.randint(3, 48, (batch, length))


def xlnet():
    return XLNetModel(
        XLNetConfig(vocab_size=48, d_model=16, n_layer=1, n_head=2, d_inner=24, dropout=0.0)
    )


def longformer():
    config = LongformerConfig(
        **SMALL, vocab_size=48, attention_window=4, max_position_embeddings=32, pad_token_id=0
    )
    return LongformerModel(config, add_pooling_layer=False)


def led():
    return LEDModel(
        LEDConfig(**SEQ2SEQ, **WORDS, attention_window=4, max_encoder_position_embeddings=32)
    )


def fsmt():
    config = FSMTConfig(
        **SEQ2SEQ,
        langs=["a", "b"],
        src_vocab_size=48,
        tgt_vocab_size=48,
        max_position_embeddings=32,
    )
    return FSMTForConditionalGeneration(config)


class Torch(nn.Module):
    """torch's own encoder and decoder as they are by default, in a model whose inputs have the
    batch first.
    """

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(48, 16)
        options = {"dim_feedforward": 24, "dropout": 0.0}
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, **options), 1, enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, **options), 1)

    def forward(self, input_ids):
        x = self.embed(input_ids).transpose(0, 1)
        return self.decoder(x, self.encoder(x)).transpose(0, 1)


class Turned(nn.Module):
    """A model of one's own that turns its sequence and says so nowhere."""

    def __init__(self):
        super().__init__()
        self.embed, self.linear = nn.Embedding(48, 16), nn.Linear(16, 16)

    def forward(self, input_ids):
        return self.linear(self.embed(input_ids).transpose(0, 1)).transpose(0, 1)


class Declared(Turned):
    """The same, which says so."""

    batch_first = property(lambda self: False)

    def __init__(self):
        super().__init__()
        self.body = nn.Module()
        self.body.batch_first, self.body.linear = False, self.linear
        del self.linear

    def forward(self, input_ids):
        return self.body.linear(self.embed(input_ids).transpose(0, 1)).transpose(0, 1)


SEQUENCE_FIRST = {
    "xlnet": (xlnet, ["layer_1", "layer_2"], LENGTH, {}),
    "longformer": (
        longformer,
        ["query", "key", "value", "query_global"],
        LENGTH,
        {"global_attention_mask": [1, 0, 0, 1]},
    ),
    "led": (led, ["query", "key", "value_global", "output", "v_proj"], LENGTH, {}),
    "fsmt": (fsmt, ["q_proj", "k_proj", "fc1"], LENGTH, {}),
    "torch": (Torch, ["linear1", "linear2"], LENGTH, {}),
    "turned": (Turned, ["linear"], LENGTH + 2, {}),
    "declared": (Declared, ["linear"], LENGTH, {}),
}
MODELS = {
    "nllb": NllbMoeForConditionalGeneration,
    "switch": SwitchTransformersForConditionalGeneration,
}


def swin():
    config = SwinConfig(
        image_size=8,
        patch_size=1,
        window_size=2,
        embed_dim=8,
        depths=[2, 1],
        num_heads=[2, 2],
        num_channels=3,
    )
    return SwinModel(config)


def timesformer():
    options = {"image_size": 4, "patch_size": 2, "num_frames": 2}
    return TimesformerModel(
        TimesformerConfig(**SMALL, **options, attention_type="divided_space_time")
    )


def multiple_choice():
    return BertForMultipleChoice(BertConfig(**SMALL, vocab_size=48, max_position_embeddings=32))


def adapted(base, method, targets, **more):
    torch.manual_seed(1)
    model = peft.get_peft_model(
        base.eval().double(), method.config(target_modules=list(targets), **more), "a"
    )
    if not method.call:
        model.add_adapter("b", method.config(target_modules=list(targets), **more))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "module_logits" in name:
                parameter.normal_(0, 3)  # so that tasks differ
    return model.eval()


def mixed(method, kinds):
    """What tells a call that its samples are of these kinds, 0 or 1."""
    return (
        {"task_ids": list(kinds)}
        if method.call
        else {"adapter_names": ["ab"[kind] for kind in kinds]}
    )


def output(result):
    result = result if isinstance(result, torch.Tensor) else result.get("logits", result[0])
    return result


def check(model, method, inputs, kinds):
    """A mixed call against each sample alone, which has no other sample to be mixed up with."""
    together = output(model(**inputs, **mixed(method, kinds)))
    for i, kind in enumerate(kinds):
        alone = output(
            model(
                **{name: value[i : i + 1] for name, value in inputs.items()},
                **mixed(method, [kind]),
            )
        )
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-6, rtol=1e-5)
    other = output(model(**inputs, **mixed(method, [1 - kind for kind in kinds])))
    assert not torch.allclose(together, other, atol=1e-5)


@pytest.mark.parametrize("name", SEQUENCE_FIRST)
@pytest.mark.parametrize("batch", [2, 4], ids=lambda batch: f"batch{batch}")
@torch.no_grad()
def test_sequence_first(method, name, batch):
    """Also where there are as many samples as tokens, or twice as many tokens."""
    build, targets, length, masks = SEQUENCE_FIRST[name]
    model = adapted(build(), method, targets)
    inputs = {"input_ids": words(batch, length)}
    if name in ("led", "fsmt"):
        inputs["decoder_input_ids"] = words(batch, length)
    inputs |= {mask: torch.tensor(values).repeat(batch, 1) for mask, values in masks.items()}
    check(model, method, inputs, [i % 2 for i in range(batch)])


@pytest.mark.parametrize("root", [nn.TransformerEncoderLayer, nn.Transformer])
@torch.no_grad()
def test_a_model_that_is_sequence_first_itself(method, root):
    model = adapted(root(16, 2, dim_feedforward=24, dropout=0.0), method, ["linear1", "linear2"])
    x = torch.randn(4, 3, 16).double()
    both = (x, torch.randn(2, 3, 16).double()) if root is nn.Transformer else (x,)
    together = model(*both, **mixed(method, [0, 1, 1]))
    for i, kind in enumerate([0, 1, 1]):
        alone = model(*(part[:, i : i + 1] for part in both), **mixed(method, [kind]))
        torch.testing.assert_close(together[:, i : i + 1], alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "targets", "inputs"),
    [
        (
            swin,
            ["q_proj", "v_proj", "fc1", "reduction"],
            {"pixel_values": torch.randn(4, 3, 8, 8).double()},
        ),
        (
            timesformer,
            ["qkv", "temporal_dense"],
            {"pixel_values": torch.randn(4, 2, 3, 4, 4).double()},
        ),
        (multiple_choice, ["value", "dense"], {"input_ids": torch.randint(3, 48, (4, 2, 5))}),
    ],
    ids=["windows", "frames", "choices"],
)
@torch.no_grad()
def test_several_rows_a_sample(method, build, targets, inputs):
    check(adapted(build(), method, targets), method, inputs, [0, 1, 1, 0])


# Mixtures of experts


def nllb():
    options = {
        "num_experts": 3,
        "expert_capacity": 64,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "router_ignore_padding_tokens": False,
    }
    return NllbMoeForConditionalGeneration(
        NllbMoeConfig(**SEQ2SEQ, **WORDS, **options, max_position_embeddings=32)
    )


def switch():
    options = {
        "num_experts": 3,
        "expert_capacity": 64,
        "num_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
    }
    sizes = {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_heads": 2,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.0,
    }
    return SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(**sizes, **options, **WORDS)
    )


@pytest.mark.parametrize(
    ("build", "targets"), [(nllb, ["fc1", "fc2", "q_proj"]), (switch, ["wi", "wo", "q"])]
)
@pytest.mark.parametrize("batch", [3])
@torch.no_grad()
def test_experts_get_each_tokens_own(method, build, targets, batch):
    model = adapted(build(), method, targets)
    for _ in range(3):
        inputs = {"input_ids": words(batch, 4), "decoder_input_ids": words(batch, 3)}
        check(model, method, inputs, [i % 2 for i in range(batch)])
    options = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2, "use_cache": build is nllb}
    kinds = [i % 2 for i in range(batch)]
    written = model.generate(input_ids=inputs["input_ids"], **mixed(method, kinds), **options)
    for i, kind in enumerate(kinds):
        alone = model.generate(
            input_ids=inputs["input_ids"][i : i + 1], **mixed(method, [kind]), **options
        )
        assert torch.equal(written[i : i + 1, : alone.shape[1]], alone)


class Experts(nn.Module):
    """A mixture of one's own, which says to nobody which tokens it hands to whom."""

    def __init__(self):
        super().__init__()
        self.embed, self.experts = (
            nn.Embedding(48, 16),
            nn.ModuleList([nn.Linear(16, 16) for _ in range(2)]),
        )
        self.shared, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, input_ids):
        x = self.embed(input_ids).flatten(0, 1)
        out = self.shared(x)
        chosen = input_ids.flatten() % 2
        for i, expert in enumerate(self.experts):
            own = (chosen == i).nonzero().flatten()
            if len(own):
                out = out.index_add(0, own, expert(x[own]))
        return self.head(out.view(*input_ids.shape, 16).mean(1))


def test_experts_of_unknown_tokens_are_refused(method):
    """By name, whether or not the number of their tokens could be shared out; what can be told goes
    on.
    """
    model = adapted(Experts(), method, ["experts.0", "experts.1"])
    even = torch.tensor(
        [[4, 6, 3], [3, 5, 3]]
    )  # as many tokens for one expert as there are samples, of one of them
    for ids in (even, even[:, :2], torch.tensor([[4, 6, 3], [3, 5, 4]])):
        with pytest.raises(
            ValueError,
            match=r"^experts\.[01] sees an input of shape \[\d, 16\] in a call of 2 samples.*expert",
        ):
            model(input_ids=ids, **mixed(method, [0, 1]))
        for kind in (0, 1):  # all samples alike are right whoever has which token
            same = model(input_ids=ids, **mixed(method, [kind, kind]))
            alone = [model(input_ids=row[None], **mixed(method, [kind])) for row in ids]
            torch.testing.assert_close(same, torch.cat(alone))
    model = adapted(Experts(), method, ["shared", "head"])
    check(model, method, {"input_ids": words(2, 3)}, [0, 1])
    model = adapted(
        Experts(), method, ["experts.0", "experts.1"]
    )  # all tokens to one expert is every token, in order
    check(model, method, {"input_ids": torch.full((2, 3), 4)}, [0, 1])


class Images(nn.Module):
    """Text with any number of images."""

    def __init__(self):
        super().__init__()
        self.embed, self.tower, self.head = (
            nn.Embedding(48, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 16),
        )

    def forward(self, input_ids, pixel_values):
        return self.head(self.embed(input_ids)) + self.tower(pixel_values).sum()


def test_what_nothing_tells_of_is_refused(method):
    """And the next call that is plain goes on."""
    model, x = adapted(Images(), method, ["tower", "head"]), torch.randn(4, 16).double()
    for images in (1, 3, 4, 6, 10):  # the last as many as tokens
        with pytest.raises(
            ValueError,
            match=rf"^tower sees an input of shape \[{images}, 16\] in a call of 2 samples",
        ):
            model(
                input_ids=words(2, 5),
                pixel_values=torch.randn(images, 16).double(),
                **mixed(method, [0, 1]),
            )
        model(
            input_ids=words(2, 5), pixel_values=torch.randn(2, 16).double(), **mixed(method, [0, 1])
        )
        model(
            input_ids=words(1, 5),
            pixel_values=torch.randn(images, 16).double(),
            **mixed(method, [1]),
        )
        model(
            input_ids=words(2, 5),
            pixel_values=torch.randn(images, 16).double(),
            **mixed(method, [1, 1]),
        )
    with pytest.raises(ValueError, match="texts packed into one row are one sample"):
        model(input_ids=words(1, 5), pixel_values=x, **mixed(method, [0, 1]))


class Flattened(nn.Module):
    """Attention with a mask for each head, as torch's, after a layer that sees all tokens in a row."""

    def __init__(self):
        super().__init__()
        self.embed, self.linear = nn.Embedding(48, 16), nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, input_ids, attn_mask):
        x = self.linear(self.embed(input_ids).flatten(0, 1)).unflatten(0, input_ids.shape)
        return self.attention(x, x, x, attn_mask=attn_mask)[0]


def test_as_many_tokens_as_masks_are_tokens(method):
    model, ids = adapted(Flattened(), method, ["linear"]), words(3, 2)
    mask = torch.randn(6, 2, 2).double()  # of 3 samples and 2 heads; tokens are 6 too
    together = model(input_ids=ids, attn_mask=mask, **mixed(method, [0, 1, 0]))
    for i, kind in enumerate((0, 1, 0)):
        own = {"input_ids": ids[i : i + 1], "attn_mask": mask[2 * i : 2 * i + 2]}
        torch.testing.assert_close(together[i : i + 1], model(**own, **mixed(method, [kind])))


def test_a_model_that_calls_itself_on_parts(method):
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return torch.cat([self(part) for part in x.split(2)]) if len(x) > 2 else self.linear(x)

    model, x = adapted(Parts(), method, ["linear"]), torch.randn(4, 8).double()
    with pytest.raises(ValueError, match="^linear sees an input"):
        model(x, **mixed(method, [0, 1, 1, 0]))
    same = model(x, **mixed(method, [1] * 4))
    torch.testing.assert_close(
        same, model(torch.cat([x[2:], x[:2]]), **mixed(method, [1] * 4)).roll(2, 0)
    )
    torch.testing.assert_close(
        model(x[:2], **mixed(method, [0, 1]))[1:], model(x[1:2], **mixed(method, [1]))
    )


class Guided(nn.Module):
    """A model whose `generate` doubles the batch to guide it, as those of music and images do."""

    def __init__(self):
        super().__init__()
        self.embed, self.linear = nn.Embedding(48, 16), nn.Linear(16, 16)

    def forward(self, input_ids):
        return self.linear(self.embed(input_ids))

    def generate(self, input_ids, num_return_sequences=1, guidance_scale=None):
        ids = input_ids.repeat_interleave(num_return_sequences, 0)
        with_guide, without = self(torch.cat([ids, torch.zeros_like(ids)])).chunk(2)
        return with_guide * guidance_scale - without


@pytest.mark.parametrize("sequences", [1, 2])
@torch.no_grad()
def test_guidance(method, sequences):
    model = adapted(Guided(), method, ["linear"])
    ids, options = words(), {"guidance_scale": 3.0, "num_return_sequences": sequences}
    together = model.generate(input_ids=ids, **mixed(method, [0, 1, 1]), **options)
    for i, kind in enumerate([0, 1, 1]):
        alone = model.generate(input_ids=ids[i : i + 1], **mixed(method, [kind]), **options)
        torch.testing.assert_close(together[i * sequences : (i + 1) * sequences], alone)


def test_training_draws_once_for_a_sample():
    """Poly draws weights for each sample; the tokens of a sample that an expert is handed share
    them, and gradients reach them.
    """
    method = METHODS["POLY"]
    model = adapted(switch(), method, ["wi", "wo"]).train()
    drawn = []
    for layer in model.base_model.tuner_layers():
        layer.poly_router["a"].register_forward_hook(lambda *args: drawn.append(args[2].shape[0]))
    ids = words(3, 4)
    model(input_ids=ids, labels=ids, task_ids=[0, 1, 2]).loss.backward()
    assert set(drawn) == {3}
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_heads_and_tokens_follow_a_turned_sequence():
    """A head of an adapter's own, and rows of the embedding that it trains, where the sequence
    comes first.
    """
    method = METHODS["LOKR"]
    more = {"modules_to_save": ["layer_2"], "trainable_token_indices": {"word_embedding": [5, 6]}}
    model = adapted(xlnet(), method, ["layer_1"], **more)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 4)
        model.set_adapter("b")
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 4)
        check(model, method, {"input_ids": torch.randint(3, 8, (4, 4))}, [0, 1, 1, 0])


@pytest.mark.parametrize("level", ["sample", "token"])
@torch.no_grad()
def test_routing_by_input_sees_its_own_sample(level):
    """Where the sequence comes first, and where tokens are flattened, with padding and without."""
    options = {"poly_type": "mope", "n_tasks": 1, "n_skills": 3, "routing_level": level}
    for build, targets in ((xlnet, ["layer_1"]), (Torch, ["linear1"]), (Experts, ["shared"])):
        model = adapted(build(), METHODS["POLY"], targets, **options)
        for name, parameter in model.named_parameters():
            if "poly_router" in name:
                parameter.mul_(1000)
        for batch in (2, 4):
            ids = words(batch, 4)
            together = output(model(input_ids=ids))
            for i in range(batch):
                torch.testing.assert_close(
                    together[i : i + 1],
                    output(model(input_ids=ids[i : i + 1])),
                    atol=1e-6,
                    rtol=1e-5,
                )
