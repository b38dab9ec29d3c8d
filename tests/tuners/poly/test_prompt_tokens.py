# SPDX-License-Identifier: Apache-2.0
"""Routing by input: whatever way a call tells which tokens are real and which are the answer, the
same tokens decide.
"""

import pytest
import torch
from helpers.models import llama
from torch import nn
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from peft import PolyConfig, get_peft_model

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
QV = ["q_proj", "v_proj"]
GREEDY = {"max_new_tokens": 5, "do_sample": False}


def mope(base, targets=QV, **fields):
    """A model in which what decides is seen."""
    options = {
        "r": 2,
        "n_skills": 3,
        "n_tasks": 1,
        "poly_type": "mope",
        "init_weights": False,
        **fields,
    }
    model = get_peft_model(base.eval(), PolyConfig(target_modules=targets, **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "poly_router" in name:
                parameter.mul_(3000)
            elif "poly_" in name:
                parameter.mul_(3)
    return model


def ids(batch=3, length=6):
    return torch.randint(3, 48, (batch, length))


def padded(length=6):
    """Texts of three lengths, padded on the left, and their mask."""
    mask = torch.ones(3, length, dtype=torch.long)
    mask[1, :2] = mask[2, :3] = 0
    return ids(3, length) * mask, mask


def of_pairs(mask, dtype):
    """The mask of every pair of tokens, causal, as a model makes it of a mask of tokens."""
    causal = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril()
    allowed = (causal & mask.bool()[:, None, :])[:, None]
    if dtype == torch.bool:
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


@torch.no_grad()
def test_arguments_by_position():
    model = mope(llama())
    text, mask = padded()
    labels = text.clone()
    labels[:, :4] = -100
    by_name = model(input_ids=text, attention_mask=mask, labels=labels).logits
    torch.testing.assert_close(model(text, mask, labels=labels).logits, by_name)
    torch.testing.assert_close(model(text, mask, None, None, None, labels).logits, by_name)
    torch.testing.assert_close(
        model.get_base_model()(text, mask, None, None, None, labels).logits, by_name
    )
    assert not torch.allclose(model(text, mask).logits, by_name)
    assert not torch.allclose(model(text, labels=labels).logits, by_name)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@torch.no_grad()
def test_masks_of_pairs(dtype):
    model = mope(llama())
    text, mask = padded()
    expected = model(text, mask).logits
    found = model(text, of_pairs(mask, dtype), (mask.cumsum(1) - 1).clamp(min=0)).logits
    expected, found = expected[mask.bool()], found[mask.bool()]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_masks_that_tell_nothing_are_refused():
    model = mope(llama())
    with pytest.raises(
        TypeError, match="str does not tell which tokens are real; pass them as `routing_mask`"
    ):
        model(ids(), attention_mask="all")
    with pytest.raises(NotImplementedError, match="3 texts are packed into 1 row"):
        model(ids(1), cu_seq_lens_q=torch.tensor([0, 1, 3, 6]))
    mope(llama(), routing_level="token")(ids(1))


@torch.no_grad()
def test_the_prompt_decides_however_generation_goes():
    """Guesses of what follows, of the same model or of another, beams, caches of fixed length: as
    written step by step.
    """
    model, text = mope(llama()), ids(1)
    expected = model.generate(input_ids=text, **GREEDY)
    whole = model(expected, routing_mask=torch.arange(expected.shape[1])[None] < 6).logits
    assert torch.equal(whole[:, 5:-1].argmax(-1), expected[:, 6:])
    ways = [
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": model.get_base_model()},
        {"assistant_model": llama(), "attention_mask": torch.ones_like(text)},
        {"assistant_model": llama(), "routing_mask": torch.ones_like(text)},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ]
    for way in ways:
        assert torch.equal(model.generate(input_ids=text, **GREEDY, **way), expected), way
    assert torch.equal(
        model.get_base_model().generate(text, prompt_lookup_num_tokens=3, **GREEDY), expected
    )


@torch.no_grad()
def test_padded_prompts_with_a_cache_of_fixed_length():
    model = mope(llama())
    text, mask = padded()
    expected = model.generate(input_ids=text, attention_mask=mask, **GREEDY)
    for more in ({"attention_mask": mask}, {}):  # without a mask, padding is told by its token
        assert torch.equal(
            model.generate(input_ids=text, cache_implementation="static", **more, **GREEDY),
            expected,
        )
    beams = {"num_beams": 2, "num_return_sequences": 2}
    written = model.generate(input_ids=text, attention_mask=mask, **beams, **GREEDY)
    alone = model.generate(input_ids=text[1:2, 2:], **beams, **GREEDY)
    assert torch.equal(written[2:4, 6:], alone[:, 4:])


@torch.no_grad()
def test_a_mask_of_ones_own_holds_while_generating():
    model, text = mope(llama()), ids()
    named = torch.tensor([1, 1, 1, 0, 0, 0]).expand(3, -1)
    written = model.generate(input_ids=text, routing_mask=named, **GREEDY)
    whole = model(written, routing_mask=torch.arange(written.shape[1]).expand(3, -1) < 3).logits
    assert torch.equal(whole[:, 5:-1].argmax(-1), written[:, 6:])
    assert not torch.equal(written, model.generate(input_ids=text, **GREEDY))


def test_a_prompt_in_pieces_is_refused():
    model, text = mope(llama()), ids()
    for call in (model.generate, model.get_base_model().generate):
        with pytest.raises(NotImplementedError, match="`prefill_chunk_size` cuts up"):
            call(text, prefill_chunk_size=2, **GREEDY)
    written = model.generate(input_ids=text, **GREEDY)
    assert torch.equal(model.generate(input_ids=text, **GREEDY), written)
    token = mope(llama(), routing_level="token")
    assert torch.equal(
        token.generate(input_ids=text, prefill_chunk_size=2, **GREEDY),
        token.generate(input_ids=text, **GREEDY),
    )


@torch.no_grad()
def test_text_with_images():
    """A mask is for the tokens of the text and not for the patches, and the answer is hidden from
    those alone.
    """
    vision = CLIPVisionConfig(**SMALL, image_size=8, patch_size=4)
    text = LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=48, pad_token_id=0)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=47,
        vision_feature_select_strategy="default",
    )
    model = mope(LlavaForConditionalGeneration(config), ["q_proj", "v_proj"])
    tokens = torch.cat([torch.full((2, 4), 47), torch.randint(3, 40, (2, 5))], 1)
    images, mask = torch.randn(2, 3, 8, 8), torch.ones_like(tokens)
    mask[1, 8] = 0
    labels = torch.where(torch.arange(9) < 6, -100, tokens)
    call = {"pixel_values": images, "attention_mask": mask, "labels": labels}
    first = model(input_ids=tokens, **call).logits
    later = tokens.clone()
    later[:, 7:] = 5
    assert torch.equal(
        model(input_ids=later, **call).logits[:, :7], first[:, :7]
    )  # nothing of the answer decides
    for i, end in ((0, 9), (1, 8)):
        alone = {
            name: value[i : i + 1, : None if name == "pixel_values" else end]
            for name, value in call.items()
        }
        torch.testing.assert_close(
            model(input_ids=tokens[i : i + 1, :end], **alone).logits[0],
            first[i, :end],
            atol=1e-5,
            rtol=1e-4,
        )


@torch.no_grad()
def test_padded_sounds():
    """Their mask is for samples, and the layers see frames."""
    options = {
        "conv_dim": (8, 8),
        "conv_stride": (4, 2),
        "conv_kernel": (4, 2),
        "num_conv_pos_embeddings": 4,
    }
    config = Wav2Vec2Config(
        **SMALL, **options, num_feat_extract_layers=2, num_conv_pos_embedding_groups=2, feat_extract_norm="layer",
        do_stable_layer_norm=True, mask_time_prob=0.0,
    )  # fmt: skip
    model = mope(Wav2Vec2Model(config))
    sounds, mask = torch.randn(2, 160), torch.ones(2, 160, dtype=torch.long)
    mask[1, 96:] = 0
    together = model(input_values=sounds * mask, attention_mask=mask).last_hidden_state
    alone = model(input_values=sounds[1:, :96]).last_hidden_state
    frames = alone.shape[1]
    torch.testing.assert_close(together[1:, :frames], alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(
        model(input_values=sounds * mask).last_hidden_state[1:, :frames], alone, atol=1e-4
    )


@torch.no_grad()
def test_padded_choices():
    base = BertForMultipleChoice(BertConfig(**SMALL, vocab_size=48, max_position_embeddings=32))
    model = mope(base, ["value", "dense"])
    tokens, mask = torch.randint(3, 48, (2, 3, 6)), torch.ones(2, 3, 6, dtype=torch.long)
    mask[1, 2, 3:] = 0
    together = model(input_ids=tokens, attention_mask=mask).logits
    alone = model(input_ids=tokens[1:, 2:, :3]).logits
    torch.testing.assert_close(together[1, 2], alone[0, 0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_adapters_by_sample_with_beams():
    model = mope(llama())
    model.add_adapter(
        "b",
        PolyConfig(
            r=2, n_skills=3, n_tasks=1, poly_type="mope", init_weights=False, target_modules=QV
        ),
    )
    text, mask = padded()
    names, options = ["b", "default", "b"], {"num_beams": 3, **GREEDY}
    together = model.generate(input_ids=text, attention_mask=mask, adapter_names=names, **options)
    for i, name in enumerate(names):
        model.set_adapter(name)
        start = int(6 - mask[i].sum())
        alone = model.generate(input_ids=text[i : i + 1, start:], **options)
        assert torch.equal(together[i, 6:], alone[0, 6 - start :])


class Flat(nn.Module):
    """A model that flattens its tokens."""

    def __init__(self):
        super().__init__()
        self.embed, self.linear = nn.Embedding(48, 8), nn.Linear(8, 8)

    def forward(self, input_ids, attention_mask=None):
        return self.linear(self.embed(input_ids).flatten(0, 1)).view(*input_ids.shape, 8)


@torch.no_grad()
def test_flattened_tokens_decide_together():
    model = mope(Flat(), ["linear"])
    text, mask = ids(2, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    layer = next(iter(model.base_model.tuner_layers()))
    for given in (None, mask):
        found = model(text, given)
        x = model.get_base_model().embed(text)
        for i in range(2):
            own = x[i] if given is None else x[i, : int(mask[i].sum())]
            logits = (layer.poly_router["default"].weight @ own.mean(0)).view(1, 3).sigmoid()
            weights = logits / logits.sum()
            A = (weights[0, :, None, None] * layer.poly_lora_A["default"][0]).sum(0)
            B = (weights[0, :, None, None] * layer.poly_lora_B["default"][0]).sum(0)
            torch.testing.assert_close(
                found[i], layer.base_layer(x[i]) + x[i] @ A @ B / 2, atol=1e-4, rtol=1e-4
            )
