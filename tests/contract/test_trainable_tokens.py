# SPDX-License-Identifier: Apache-2.0
"""`trainable_token_indices`: single rows of an embedding are trained beside an adapter, as if the
weight itself had been changed there.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.models import llama
from helpers.states import assert_unchanged, snapshot
from torch import nn

import peft
from peft import PeftModel, get_peft_model
from peft.utils import TrainableTokensWrapper

TOKENS = [7, 3]


def tied_llama():
    from transformers import LlamaForCausalLM

    config = llama().config
    config.tie_word_embeddings = True
    return LlamaForCausalLM(config).eval()


class Scaled(nn.Embedding):
    """An embedding with a forward of its own, as some models have."""

    def forward(self, x):
        return super().forward(x) * 3


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = Scaled(48, 16)
        self.q_proj = nn.Linear(16, 16)
        self.head = nn.Linear(16, 48)

    def forward(self, input_ids):
        return self.head(self.q_proj(self.words(input_ids)))


def logits(model, ids, **arguments):
    output = model(input_ids=ids, **arguments)
    return output if isinstance(output, torch.Tensor) else output.logits


CASES = {
    "untied": (llama, TOKENS, ["model.embed_tokens"]),
    "tied": (tied_llama, TOKENS, ["model.embed_tokens"]),
    "both": (llama, {"embed_tokens": TOKENS, "lm_head": [1, 7]}, ["model.embed_tokens", "lm_head"]),
    "own": (Own, {"words": TOKENS, "head": [1, 7]}, ["words", "head"]),
}


@pytest.fixture(params=sorted(CASES))
def case(request, method):
    """(adapted model with rows drawn anew, the base model changed in place as it should act,
    method).
    """
    build, tokens, paths = CASES[request.param]
    base = build().eval()
    reference = copy.deepcopy(base)
    model = get_peft_model(
        base, method.config(target_modules=["q_proj"], trainable_token_indices=tokens)
    ).eval()
    with torch.no_grad():
        for path in paths:
            rows = (
                base.get_submodule(path).token_adapter.trainable_tokens_delta["default"].normal_()
            )
            indices = tokens[path.split(".")[-1]] if isinstance(tokens, dict) else tokens
            reference.get_submodule(path).weight[indices] = rows
    reference = get_peft_model(reference, method.config(target_modules=["q_proj"])).eval()
    state = peft.get_peft_model_state_dict(model)
    assert len(
        [key for key in state if key.endswith("token_adapter.trainable_tokens_delta")]
    ) == len(paths)
    peft.set_peft_model_state_dict(
        reference, {k: v for k, v in state.items() if "token_adapter" not in k}
    )
    return model, reference, method


def some_ids():
    ids = torch.randint(0, 48, (4, 9))
    ids[:2, :3] = torch.tensor([3, 7, 3])
    return ids


def test_it_acts_as_if_the_weight_had_changed(case, tmp_path):
    model, reference, method = case
    ids = some_ids()
    expected = logits(reference, ids, **method.call)
    torch.testing.assert_close(logits(model, ids, **method.call), expected)
    embedding = next(m for n, m in model.named_modules() if n.endswith(("embed_tokens", "words")))
    torch.testing.assert_close(
        embedding.weight[TOKENS], embedding.token_adapter.trainable_tokens_delta["default"]
    )
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path).eval()
    torch.testing.assert_close(logits(again, ids, **method.call), expected)
    plain = model.merge_and_unload(**method.merge)
    assert not any("token_adapter" in name for name, _ in plain.named_parameters())
    torch.testing.assert_close(logits(plain, ids), expected, rtol=1e-4, atol=1e-5)


def test_only_the_rows_are_trained_and_get_the_weights_gradient(case):
    model, reference, method = case
    ids = some_ids()
    logits(model, ids, **method.call).square().sum().backward()
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_("embed" in name or "words" in name or "head" in name)
    logits(reference, ids, **method.call).square().sum().backward()
    gradients = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    checked = 0
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            path = name.partition(".token_adapter")[0]
            indices = model.get_submodule(path).token_adapter.token_indices["default"]
            torch.testing.assert_close(
                parameter.grad, gradients[f"{path}.weight"][indices], rtol=1e-4, atol=1e-5
            )
            checked += 1
        elif ".token_adapter." in name:
            assert parameter.grad is None
    assert checked


def test_switching_it_off(case):
    model, reference, method = case
    ids = some_ids()
    untouched = copy.deepcopy(model).unload()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, ids), logits(untouched, ids))
        assert not any(
            p.requires_grad for n, p in model.named_parameters() if "trainable_tokens_delta" in n
        )
    expected = logits(reference, ids, **method.call)
    torch.testing.assert_close(logits(model, ids, **method.call), expected)


@pytest.mark.parametrize("build", [llama, tied_llama])
def test_two_adapters_with_tokens_of_their_own(method, build):
    model = get_peft_model(
        build(), method.config(target_modules=["q_proj"], trainable_token_indices=[3]), "a"
    ).eval()
    model.add_adapter("b", method.config(target_modules=["q_proj"], trainable_token_indices=[7, 4]))
    model.add_adapter("c", method.config(target_modules=["q_proj"]))
    ids = some_ids()
    expected = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.normal_()
    for name in "abc":
        model.set_adapter(name)
        trained = {
            n.rpartition(".")[2]
            for n, p in model.named_parameters()
            if p.requires_grad and "trainable_tokens_delta" in n
        }
        assert trained == {name} - {"c"}
        expected[name] = logits(model, ids, **method.call)
    names = ["b", "a", "c", "a"]
    together = logits(model, ids, adapter_names=names, **method.call)
    for i, name in enumerate(names):
        torch.testing.assert_close(together[i], expected[name][i])
    model.set_adapter(["a", "b"])  # they train different rows
    for wrapper in (m for m in model.modules() if isinstance(m, TrainableTokensWrapper)):
        rows = wrapper._owner[0]
        weight = wrapper.original_module.weight.detach().clone()
        torch.testing.assert_close(rows.trainable_tokens_original["b"], weight[[7, 4]])
        for name, indices in (("a", [3]), ("b", [7, 4])):
            weight[indices] = rows.trainable_tokens_delta[name]
        is_head = isinstance(wrapper.original_module, torch.nn.Linear)
        x = torch.randn(2, 16) if is_head else ids
        found, run = wrapper(x), (F.linear if is_head else F.embedding)
        torch.testing.assert_close(found, run(x, weight))
        torch.testing.assert_close(wrapper.weight, weight)
    expected["a, b"] = logits(model, ids, **method.call)
    model.add_adapter("d", method.config(target_modules=["q_proj"], trainable_token_indices=[3]))
    with pytest.raises(
        ValueError, match="Only one adapter can be set at a time for TrainableTokensWrapper"
    ):
        model.set_adapter(["a", "d"])
    torch.testing.assert_close(logits(model, ids, **method.call), expected["a, b"])
    merged = copy.deepcopy(model).merge_and_unload(**method.merge)
    torch.testing.assert_close(logits(merged, ids), expected["a, b"], rtol=1e-4, atol=1e-4)
    model.delete_adapter("b")
    model.set_adapter("a")
    torch.testing.assert_close(logits(model, ids, **method.call), expected["a"])


def test_what_does_not_fit_is_refused_before_anything_changes(method):
    base = llama()
    before = snapshot(base)
    cases = [
        ({"trainable_token_indices": [48]}, r"has \[48\]; the tokens go from 0 to 47"),
        (
            {"trainable_token_indices": {"nowhere": [1]}},
            "names 'nowhere': the model has no such module",
        ),
        (
            {"trainable_token_indices": {"norm": [1]}},
            "LlamaRMSNorm is not an nn.Embedding or nn.Linear",
        ),
        (
            {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
            "already marked to be trained fully",
        ),
        ({"trainable_token_indices": [1, 1]}, "names a token twice"),
        ({"trainable_token_indices": [-1]}, "must be a list of token ids"),
        ({"trainable_token_indices": {"embed_tokens": "x"}}, "must be a list of token ids"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            get_peft_model(base, method.config(target_modules=["q_proj"], **options))
        assert_unchanged(before, base)
