# SPDX-License-Identifier: Apache-2.0
"""Loading an adapter together with its base model."""

import json
import sys
from functools import partial

import pytest
import torch
from helpers.models import llama
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoKrConfig,
    PeftModelForCausalLM,
    get_peft_model,
)
from peft.auto import get_default_import_allowlist


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_an_adapter_and_its_base(method, task_type, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = type(llama()).from_pretrained(tmp_path / "base")
    model = get_peft_model(
        base, method.config(target_modules=["q_proj"], task_type=task_type)
    ).eval()
    ids = torch.randint(3, 48, (2, 5))
    expected = model(input_ids=ids, **method.call).logits
    model.save_pretrained(tmp_path / "adapter")
    named = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert isinstance(named, PeftModelForCausalLM)
    torch.testing.assert_close(named(input_ids=ids, **method.call).logits, expected)
    right = AutoPeftModel if task_type is None else AutoPeftModelForCausalLM
    loaded = right.from_pretrained(tmp_path / "adapter")
    assert type(loaded) is type(model)
    torch.testing.assert_close(loaded(input_ids=ids, **method.call).logits, expected)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({**load_file(file), "rotary_emb.inv_freq": torch.zeros(2)}, file)
    with pytest.warns(UserWarning, match="without a place in the adapter: rotary_emb.inv_freq"):
        loaded = right.from_pretrained(tmp_path / "adapter", strict=False)
    torch.testing.assert_close(loaded(input_ids=ids, **method.call).logits, expected)
    if task_type is not None:
        with pytest.raises(ValueError, match="task type"):
            AutoPeftModel.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("auto_class", [AutoPeftModel, AutoPeftModelForCausalLM])
def test_a_config_imports_only_what_is_allowed(auto_class, tmp_path, monkeypatch):
    """A config can come from anyone, and importing a module runs it."""
    llama().save_pretrained(tmp_path / "base")
    base = type(llama()).from_pretrained(tmp_path / "base")
    get_peft_model(base, LoKrConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    (tmp_path / "trap.py").write_text("from transformers import LlamaForCausalLM as Model\n")
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())

    def load(library, name, **options):
        mapping = {"parent_library": library, "base_model_class": name}
        file.write_text(json.dumps({**content, "auto_mapping": mapping}))
        return auto_class.from_pretrained(tmp_path, **options)

    for library in ("trap", "transformers_trap", "os"):
        with pytest.raises(ValueError, match=f"'{library}' which is not in the import allowlist"):
            load(library, "Model")
    assert "trap" not in sys.modules
    with pytest.raises(ValueError, match="not in the import allowlist: trap"):
        load("transformers", "LlamaForCausalLM", import_allowlist=["trap"])
    with pytest.raises(TypeError, match="`import_allowlist`='trap' must be a list"):
        load("trap", "Model", import_allowlist="trap")
    with pytest.raises(ValueError, match="no such class of models"):
        load("transformers.utils", "logging")
    allowed = [*get_default_import_allowlist(), "trap"]
    loaded = load("trap", "Model", import_allowlist=allowed)
    assert type(loaded.get_base_model()) is type(base)
    del sys.modules["trap"]


def test_a_config_that_names_no_base(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not name its base model"):
        AutoPeftModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["lm_head", "embed_tokens"]}])
@pytest.mark.parametrize("tokens", [50, 64, 40])
def test_a_vocabulary_of_another_size(method, fields, tokens, tmp_path):
    """Tokens were added to the base, padded to a multiple, or taken away; the file's own rows say
    how many there are.
    """
    llama().save_pretrained(tmp_path / "base")
    base = type(llama()).from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(tokens)
    with torch.no_grad():
        base.get_input_embeddings().weight.normal_()
    config = method.config(target_modules=["q_proj"], task_type="CAUSAL_LM", **fields)
    model = get_peft_model(base, config).eval()
    model.save_pretrained(
        tmp_path / "adapter"
    )  # with its embedding and head, since the vocabulary is another
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[3, tokens - 1]])
    assert loaded.get_input_embeddings().weight.shape[0] == tokens
    torch.testing.assert_close(
        loaded(input_ids=ids, **method.call).logits, model(input_ids=ids, **method.call).logits
    )


def test_a_head_with_other_labels(tmp_path):
    """The message says how many labels the file's head has; or the head is left as the base model
    starts it.
    """
    base = llama()
    base.config.pad_token_id = 0
    base.save_pretrained(tmp_path / "base")
    base = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    options = {"r": 2, "init_weights": False, "target_modules": ["q_proj"], "task_type": "SEQ_CLS"}
    model = get_peft_model(base, LoKrConfig(**options)).eval()
    model.save_pretrained(tmp_path / "adapter")
    load = partial(AutoPeftModelForSequenceClassification.from_pretrained, tmp_path / "adapter")
    with pytest.raises(
        RuntimeError, match="head in it has 3 labels: load the base model with `num_labels=3`"
    ):
        load(num_labels=5)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        loaded = load(num_labels=5, ignore_mismatched_sizes=True)
    ids = torch.randint(3, 48, (2, 5))
    assert loaded(input_ids=ids).logits.shape == (2, 5)
    bodies = [each.get_base_model().model(input_ids=ids)[0] for each in (loaded, model)]
    torch.testing.assert_close(*bodies)
    torch.testing.assert_close(
        load(num_labels=3)(input_ids=ids).logits, model(input_ids=ids).logits
    )
