# SPDX-License-Identifier: Apache-2.0
"""Skills of one task each, beside the shared ones:
`Δ_t(x) = (alpha / r)·x·A_w·B_w + (alpha / r_t)·x·A_t·B_t`.
"""

import copy

import pytest
import torch
from helpers.models import llama, mlp
from torch import nn

from peft import PeftModel, PolyConfig, convert_to_lora, get_peft_model
from peft.tuners.poly.layer import Linear


def config(**fields):
    options = {
        "r": 2,
        "task_rank": 3,
        "alpha": 1.5,
        "n_tasks": 3,
        "n_skills": 2,
        "n_splits": 2,
        "init_weights": False,
    }
    return PolyConfig(**{**options, "target_modules": ["0", "2"], **fields})


def poly(**fields):
    return get_peft_model(mlp(), config(task_names=["a", "b", "c"], **fields)).eval()


def by_hand(layer, x, task):
    """One sample in float64, with loops."""
    A, B = layer.poly_lora_A["default"].double(), layer.poly_lora_B["default"].double()
    q, s, _, r = A.shape
    gates = layer.poly_router["default"].module_logits.double()[task].view(q, s).sigmoid()
    weights = gates / gates.sum(1, keepdim=True)
    left = torch.cat([sum(weights[i, j] * A[i, j] for j in range(s)) for i in range(q)], 0)
    right = torch.cat([sum(weights[i, j] * B[i, j] for j in range(s)) for i in range(q)], 1)
    own = layer.poly_task_skills["default"]
    A_t, B_t = own.A.values.double()[task], own.B.values.double()[task]
    return 1.5 / r * (x.double() @ left @ right) + 1.5 / A_t.shape[1] * (x.double() @ A_t @ B_t)


def blend_by_hand(layer, shares):
    """`[in, out]` of a blend: skills mixed by the tasks' weights times their shares, and each
    task's own skill times its share.
    """
    A, B = layer.poly_lora_A["default"].double(), layer.poly_lora_B["default"].double()
    q, s, _, r = A.shape
    gates = layer.poly_router["default"].module_logits.double().view(-1, q, s).sigmoid()
    weights = sum(
        share * gates[task] / gates[task].sum(1, keepdim=True) for task, share in shares.items()
    )
    left = torch.cat([sum(weights[i, j] * A[i, j] for j in range(s)) for i in range(q)], 0)
    right = torch.cat([sum(weights[i, j] * B[i, j] for j in range(s)) for i in range(q)], 1)
    own = layer.poly_task_skills["default"]
    own = sum(
        share * own.A.values[t].double() @ own.B.values[t].double() for t, share in shares.items()
    )
    return 1.5 / r * left @ right + 1.5 / 3 * own


@pytest.mark.parametrize("leading", [(), (5,), (2, 3)])
def test_a_layer_against_the_formula(leading):
    base = nn.Linear(8, 12)
    layer = Linear(base, "default", config()).eval()
    x, tasks = torch.randn(4, *leading, 8), [2, 0, 1, 1]
    expected = torch.stack([by_hand(layer, x[i], task) for i, task in enumerate(tasks)])
    torch.testing.assert_close(
        layer(x, task_ids=tasks) - base(x), expected.float(), atol=1e-5, rtol=1e-4
    )
    double = Linear(nn.Linear(4, 4).double(), "default", config()).eval()
    inputs = (
        torch.randn(3, 4, dtype=torch.double, requires_grad=True),
        *[p for p in double.parameters() if p.requires_grad],
    )
    assert torch.autograd.gradcheck(lambda x, *_: double(x, task_ids=[0, 2, 1]), inputs)


def test_merging_converting_and_extracting(tmp_path):
    model, x = poly(rank_pattern={"2": 4}), torch.randn(3, 8)
    out = model(x, task_ids=["c", "a", "b"])
    for i, task in enumerate("cab"):
        merged = copy.deepcopy(model).merge_and_unload(task_id=task)
        torch.testing.assert_close(merged(x)[i], out[i], atol=1e-5, rtol=1e-4)
    lora = convert_to_lora(model, task_id="c")
    assert lora.config.r == 4 + 3 and lora.error == 0
    for layer in model.base_model.tuner_layers():
        low = layer.low_rank_factors("default", task_id={2: 0.25, 0: 0.75})
        torch.testing.assert_close(
            (low.B @ low.A).T.double(),
            blend_by_hand(layer, {2: 0.25, 0: 0.75}),
            atol=1e-6,
            rtol=1e-4,
        )
    model.extract_tasks("two", ["c", "a"])
    model.extract_tasks("one", {"c": 1.0})
    model.extract_tasks("blend", {"c": 0.25, "a": 0.75})
    for layer in model.base_model.tuner_layers():
        expected = blend_by_hand(layer, {2: 0.25, 0: 0.75})
        torch.testing.assert_close(
            layer.get_delta_weight("blend").T.double(), expected, atol=1e-6, rtol=1e-4
        )
    model.set_adapter("two")
    torch.testing.assert_close(model(x, task_ids=["c", "a", "a"])[:2], out[:2])
    model.set_adapter("one")
    torch.testing.assert_close(model(x)[0], out[0], atol=1e-5, rtol=1e-4)
    assert model.peft_config["one"].r == 5 and model.peft_config["one"].task_rank == 0
    with pytest.raises(NotImplementedError, match="skill of rank 3 for each task"):
        model.add_weighted_adapter(["default", "default"], [1.0, 1.0], "x", "cat")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert torch.equal(loaded(x, task_ids=["c", "a", "b"]), out)


def test_tasks_come_and_go_with_their_skills():
    model, x = poly(), torch.randn(4, 8)
    out = model(x, task_ids=["c", "a", "b", "a"])
    model.add_tasks(["copy"], init="a")
    model.add_tasks(["fresh"])
    assert torch.equal(model(x, task_ids=["c", "copy", "b", "a"]), out)
    for layer in model.base_model.tuner_layers():
        own = layer.poly_task_skills["default"]
        assert own.A.values[4].abs().sum() > 0 and own.B.values[4].abs().sum() == 0
        assert not torch.equal(own.A.values[4], own.A.values[0])
    model.reorder_tasks(["fresh", "copy", "c", "b", "a"])
    assert torch.equal(model(x, task_ids=["c", "copy", "b", "a"]), out)
    model.remove_tasks("copy")
    assert torch.equal(model(x, task_ids=["c", "a", "b", "a"]), out)


def test_only_the_new_tasks_skills_train():
    model, x = poly(), torch.randn(4, 8)
    model.add_tasks(["new"])
    model.train_only(tasks=["new"])
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 3 and all(".rows.0" in name for name in names)
    before = {
        name: p.detach().clone()
        for name, p in model.named_parameters()
        if name.endswith(("values", "module_logits"))
    }
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5
    )
    for _ in range(2):  # at first, zero factors let nothing through to the others
        optimizer.zero_grad()
        model(x, task_ids=["new", "new", "a", "b"]).square().sum().backward()
        optimizer.step()
    for name, p in model.named_parameters():
        if name in before:
            assert torch.equal(p[:3], before[name][:3]) and not torch.equal(p[3], before[name][3])
    model.train_only(tasks="all")
    assert sum(p.requires_grad for p in model.parameters()) == 2 * 3
    model.set_adapter("default")
    assert sum(p.requires_grad for p in model.parameters()) == 2 * 5
    model.fit_task("new", lambda: model(x, task_ids="new").square().mean(), steps=2)


def test_in_a_language_model_with_mixed_batches():
    model = get_peft_model(
        llama(), config(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    ).eval()
    model.add_adapter("plain", config(task_rank=0, target_modules=["q_proj"]))
    ids = torch.randint(3, 48, (3, 5))
    out = model(
        input_ids=ids, task_ids=[2, 0, 1], adapter_names=["default", "plain", "default"]
    ).logits
    torch.testing.assert_close(out[::2], model(input_ids=ids[::2], task_ids=[2, 1]).logits)
    model.generate(input_ids=ids, task_ids=[2, 0, 1], num_beams=2, max_new_tokens=2)
    with pytest.raises(ValueError, match="routing by input knows no tasks"):
        config(poly_type="mope")
