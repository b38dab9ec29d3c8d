# SPDX-License-Identifier: Apache-2.0
"""Tasks with label sets of their own in one head, and Poly adapters made of adapters with trained
heads.
"""

import json
import math

import numpy
import pytest
import torch
from helpers.methods import METHODS
from torch import nn

from peft import (
    LoKrConfig,
    LoraConfig,
    PeftError,
    PeftModel,
    PolyConfig,
    convert_to_poly,
    get_peft_model,
    save_as_poly,
)
from peft.tuners.poly import TaskLabels

SIZES = {"mood": ["bad", "good"], "topic": 3, "entails": ["no", "maybe", "yes"]}


def bert(num_labels):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 48,
    }
    torch.manual_seed(1)
    return BertForSequenceClassification(BertConfig(num_labels=num_labels, **sizes)).eval()


def llama(num_labels):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 48,
    }
    torch.manual_seed(1)
    return LlamaForSequenceClassification(
        LlamaConfig(num_labels=num_labels, pad_token_id=0, **sizes)
    ).eval()


TARGETS = {bert: ["query", "value"], llama: ["q_proj", "v_proj"]}


# --- labels
# -------------------------------------------------------------------------------------------------------------
#
#


def test_labels_are_counted_through():
    labels = TaskLabels(SIZES)
    numbers = [
        labels.encode(task, i)
        for task, n in (("mood", 2), ("topic", 3), ("entails", 3))
        for i in range(n)
    ]
    assert numbers == list(range(8)) and labels.total == 8
    assert [
        labels.encode(*pair) for pair in ((0, "good"), (2, "maybe"), ("topic", "2"), ("mood", -100))
    ] == [1, 6, 4, -100]
    assert labels.span("topic") == labels.span(1) == slice(2, 5)
    assert labels.task_of(torch.tensor([0, 1, 2, 4, 5, 7])).tolist() == [0, 0, 1, 1, 2, 2]
    assert (
        labels.id2label[1] == "mood: good"
        and labels.id2label[6] == "entails: maybe"
        and len(labels.id2label) == 8
    )
    assert repr(labels) == "TaskLabels({'mood': 2, 'topic': 3, 'entails': 3})"


def test_the_best_label_of_a_task_by_a_loop():
    labels = TaskLabels(SIZES)
    logits = torch.randn(12, 8)
    tasks = ["mood", "topic", "entails"] * 4
    best = labels.decode(logits, tasks)
    for row, task, found in zip(logits.tolist(), tasks, best.tolist(), strict=True):
        own = row[labels.span(task)]
        assert found == own.index(max(own))
    masked = labels.masked(logits.numpy(), torch.tensor([0, 1, 2] * 4))
    assert [int(row.isfinite().sum()) for row in masked] == [2, 3, 3] * 4 and torch.equal(
        masked[masked.isfinite()], logits[masked.isfinite()]
    )
    words = torch.randn(2, 5, 8)
    for sample, task in enumerate(("topic", "entails")):
        expected = words[sample, :, labels.span(task)].argmax(-1)
        assert torch.equal(labels.decode(words, ["topic", "entails"])[sample], expected)
    assert torch.equal(labels.decode(logits, "mood"), logits[:, :2].argmax(-1))


@pytest.mark.parametrize("count", [None, 7])
def test_the_loss_by_a_loop(count):
    labels = TaskLabels(SIZES)
    logits = torch.randn(3, 4, 8, dtype=torch.double, requires_grad=True)
    numbers = torch.tensor([[0, 1, 7, -100], [2, 4, 3, 5], [-100, -100, 6, 0]])
    total, seen = 0.0, 0
    for row, number in zip(
        logits.detach().flatten(0, 1).tolist(), numbers.flatten().tolist(), strict=True
    ):
        if number != -100:
            span = next(
                labels.span(task)
                for task in labels.tasks
                if labels.span(task).start <= number < labels.span(task).stop
            )
            total += math.log(sum(math.exp(value) for value in row[span])) - row[number]
            seen += 1
    loss = labels.loss({"logits": logits}, numbers, num_items_in_batch=count)
    assert math.isclose(float(loss.detach()), total / (count or seen), rel_tol=1e-5)
    loss.backward()
    assert logits.grad.isfinite().all()
    others = labels.task_of(numbers).unsqueeze(-1) != labels.task_of(torch.arange(8))
    assert not logits.grad[others].any() and not logits.grad[numbers == -100].any()
    torch.testing.assert_close(labels.loss((logits,), numbers), labels.loss(logits, numbers))


X, INF = torch.zeros(2, 8), math.inf  # logits of two samples
OWN = [[-INF, -INF, *[0.0] * 6], [0.0] * 8]  # of which the first has none for its "mood"


def of(*entries, **options):
    return torch.tensor(entries, **options)


BAD = [
    (lambda t: TaskLabels([2, 3]), TypeError, "must be a dictionary"),
    (lambda t: TaskLabels({}), ValueError, "names no tasks"),
    (lambda t: TaskLabels({"a": 0}), ValueError, "give at least one"),
    (lambda t: TaskLabels({"a": ["x", "x"]}), ValueError, "each with a new name"),
    (lambda t: TaskLabels({"a": 2.5}), TypeError, "give their number or their names"),
    (lambda t: TaskLabels({"a": True}), TypeError, "give their number or their names"),
    (
        lambda t: TaskLabels({3: 2}),
        TypeError,
        "must have names .*, not 3; numbers are their places",
    ),
    (lambda t: TaskLabels({("a",): 2}), TypeError, "must have names"),
    (
        lambda t: t.encode("tone", 0),
        ValueError,
        "Unknown task 'tone'; the tasks are mood, topic, entails",
    ),
    (lambda t: t.encode(True, 0), ValueError, "Unknown task True"),
    (lambda t: t.encode("mood", 2), ValueError, "has no label 2; its labels are bad, good"),
    (lambda t: t.encode("mood", "fine"), ValueError, "has no label 'fine'"),
    (lambda t: t.encode("mood", of(1, 0)), ValueError, "has no label tensor"),
    (lambda t: t.encode("mood", -100.0), ValueError, "has no label -100.0"),
    (lambda t: t.span(["mood"]), ValueError, r"Unknown task \['mood'\]"),
    (
        lambda t: t.task_of(of(0, -1)),
        ValueError,
        "`labels` has -1; labels of the head are 0 to 7, or -100",
    ),
    (lambda t: t.task_of(of(0, 8)), ValueError, "`labels` has 8"),
    (lambda t: t.task_of(of(0.0)), TypeError, "tensor of integers, .* not torch.float32"),
    (lambda t: t.task_of([0, 1]), TypeError, "tensor of integers, .* not list"),
    (lambda t: t.decode(X, [3, 0]), ValueError, r"Unknown task 3; .* \(or 0 to 2\)"),
    (lambda t: t.decode(X, [-1, 0]), ValueError, "Unknown task -1"),
    (lambda t: t.decode(X, t.task_of(of(0, -100))), ValueError, "Unknown task -100"),
    (lambda t: t.decode(X, ["mod", 0]), ValueError, "Unknown task 'mod'"),
    (lambda t: t.decode(X, [0.5, 1]), ValueError, "Unknown task 0.5"),
    (lambda t: t.decode(X, of(0.5, 1.0)), ValueError, "Unknown task 0.5"),
    (lambda t: t.decode(X, [True, False]), ValueError, "Unknown task True"),
    (lambda t: t.decode(X, [None, 0]), ValueError, "Unknown task None"),
    (lambda t: t.decode(X, None), ValueError, "Unknown task None"),
    (
        lambda t: t.decode(X, ["mood"] * 3),
        ValueError,
        "names 3 tasks; expected one for each of 2 samples",
    ),
    (lambda t: t.decode(X, []), ValueError, "names 0 tasks"),
    (lambda t: t.decode(X[:1], [0, 1]), ValueError, "names 2 tasks"),
    (
        lambda t: t.decode(X[:, :7], [0, 0]),
        ValueError,
        "for 7 labels, the tasks have 8 .*num_labels=8",
    ),
    (
        lambda t: t.decode(X[0], "mood"),
        ValueError,
        r"shape \[8\]; expected \[batch, ..., 8\]. `logits\[None\]`",
    ),
    (lambda t: t.decode(of(1.0)[0], "mood"), ValueError, r"shape \[\]"),
    (lambda t: t.decode({"logits": X}, [0, 0]), TypeError, "Logits must be a tensor, .* not dict"),
    (lambda t: t.decode(X.cfloat(), [0, 0]), TypeError, "must be real numbers"),
    (
        lambda t: t.decode(OWN, ["mood", 0]),
        ValueError,
        r"`logits\[0\]` has NaN for labels of task 'mood', or -inf for all",
    ),
    (
        lambda t: t.decode([OWN[1], [math.nan, *[0.0] * 7]], "mood"),
        ValueError,
        r"`logits\[1\]` has NaN",
    ),
    (
        lambda t: t.decode([[OWN[1]] * 2, OWN[::-1]], [1, 0]),
        ValueError,
        r"`logits\[1, 1\]` .* 'mood'",
    ),
    (lambda t: t.loss(X, of(-1, 0)), ValueError, "`labels` has -1"),
    (lambda t: t.loss(X, of(0, 8)), ValueError, "`labels` has 8; .*`encode`"),
    (lambda t: t.loss(X, of(0.0, 1.0)), TypeError, "tensor of integers"),
    (lambda t: t.loss(X, of(True, False)), TypeError, "tensor of integers"),
    (lambda t: t.loss(X, [0, 1]), TypeError, "tensor of integers"),
    (lambda t: t.loss(X[:, :1], of(0, 1)), ValueError, "for 1 labels, the tasks have 8"),
    (
        lambda t: t.loss(X, of([0], [1])),
        ValueError,
        r"shape \[2, 1\], the logits \[2, 8\]; expected .* \[2\]",
    ),
    (lambda t: t.loss(X[0], of(1)[0]), ValueError, r"shape \[8\]"),
    (lambda t: t.loss(None, of(0, 1)), TypeError, "`outputs` .NoneType. has no logits"),
    (lambda t: t.loss({"loss": X}, of(0, 1)), TypeError, "`outputs` .dict. has no logits"),
    (
        lambda t: t.narrow(nn.Linear(4, 8), 0),
        ValueError,
        "Found no layer with 8 outputs .* as `module`",
    ),
    (lambda t: t.narrow(None, 0), TypeError, "must be a model, not NoneType"),
    (lambda t: t.narrow(nn.Sequential(nn.Linear(4, 8)), 0, "1"), ValueError, "no module `1`"),
    (
        lambda t: t.narrow(nn.Sequential(nn.Linear(4, 8)), 0, 0),
        TypeError,
        "`module`=0 must be the path",
    ),
    (
        lambda t: t.narrow(nn.Sequential(nn.Linear(4, 7)), 0, "0"),
        ValueError,
        "`0` .Linear. is not a linear layer with 8 outputs",
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "message"), BAD, ids=[message[:20] for _, _, message in BAD]
)
def test_what_is_refused_of_labels(call, error, message):
    with pytest.raises(error, match=message) as refusal:
        call(TaskLabels(SIZES))
    assert isinstance(refusal.value, PeftError)


def test_every_form_of_labels_tasks_and_logits_that_means_the_same():
    labels = TaskLabels({"mood": of(2)[0], "topic": numpy.int64(3), "entails": SIZES["entails"]})
    logits, numbers = torch.randn(2, 8), of(0, 3)
    assert labels.total == 8 and labels.task_of(of(7, -100)).tolist() == [2, -100]
    assert labels.encode(of(1)[0], numpy.int64(2)) == labels.encode("topic", "2") == 4
    expected = [int(logits[0, :2].argmax()), int(logits[1, 2:5].argmax())]
    tasks = (
        [0, "topic"],
        ("mood", of(1)[0]),
        range(2),
        of(0, 1),
        of([0], [1]),
        numpy.array([0, 1]),
        numpy.array(["mood", "topic"]),
    )
    assert all(labels.decode(logits, each).tolist() == expected for each in tasks)
    assert labels.decode(logits.tolist(), tasks[0]).tolist() == expected
    assert labels.decode([[1, 2, 9, 9, 9, 9, 9, 9]], "mood").tolist() == [1]  # whole numbers
    assert labels.decode([[-INF, 2.0, *[math.nan] * 6]], "mood").tolist() == [
        1
    ]  # only the task's own count
    own = [
        float(torch.logsumexp(logits[0, :2], 0) - logits[0, 0]),
        float(torch.logsumexp(logits[1, 2:5], 0) - logits[1, 3]),
    ]
    for dtype in (torch.uint8, torch.int32, torch.int64):
        assert float(labels.loss(logits, numbers.to(dtype))) == pytest.approx(
            sum(own) / 2, rel=1e-5
        )
    assert float(labels.loss(logits, of(0, -100))) == pytest.approx(own[0], rel=1e-5)
    assert labels.loss(
        logits.to("meta"), numbers.to("meta")
    ).is_meta  # elsewhere than on a CPU no value is looked at
    assert (
        float(labels.loss(logits, of(-100, -100)))
        == 0
        == float(labels.loss(logits[:0], numbers[:0]))
    )


def test_the_head_of_one_task_is_cut_from_a_model_without_adapters():
    labels = TaskLabels({"mood": 2, "topic": 2})
    model = get_peft_model(
        bert(4), PolyConfig(r=2, n_tasks=2, target_modules=TARGETS[bert], task_type="SEQ_CLS")
    )
    for wrapped in (model, model.get_base_model()):
        with pytest.raises(
            ValueError,
            match=r"has adapters .in `.*query`.; call `merge_and_unload.task_id='topic'.` first",
        ):
            labels.narrow(wrapped, 1)
    assert model.base_model.model.classifier.out_features == 4
    assert labels.narrow(model.merge_and_unload(task_id=1), 1).classifier.out_features == 2


@pytest.mark.parametrize("base", [bert, llama])
def test_training_saving_and_one_task_alone(base, tmp_path):
    """In transformers' Trainer; a task alone is a plain model that transformers saves and loads."""
    from transformers import Trainer, TrainingArguments

    labels = TaskLabels(SIZES)
    config = PolyConfig(
        r=2, n_tasks=3, task_names=labels.tasks, target_modules=TARGETS[base], task_type="SEQ_CLS"
    )
    model = get_peft_model(base(labels.total), config)
    ids = torch.randint(3, 48, (12, 6))
    data = [
        {"input_ids": ids[i], "labels": labels.encode(i % 3, i % 2), "task_ids": i % 3}
        for i in range(12)
    ]
    options = {
        "max_steps": 2,
        "per_device_train_batch_size": 6,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = TrainingArguments(str(tmp_path), learning_rate=0.1, **options)
    trainer = Trainer(
        model, arguments, train_dataset=data, eval_dataset=data, compute_loss_func=labels.loss
    )
    tasks = [i % 3 for i in range(12)]
    numbers = torch.tensor([row["labels"] for row in data])

    def by_hand():
        with torch.no_grad():
            logits = model.eval()(input_ids=ids, task_ids=tasks).logits.double()
        own = [row[labels.span(task)] for row, task in zip(logits, tasks, strict=True)]
        each = [-part.log_softmax(-1)[i % 2] for i, part in enumerate(own)]
        return float(sum(each) / 12)

    first = trainer.evaluate()["eval_loss"]
    assert first == pytest.approx(by_hand(), rel=1e-4)
    trainer.train()
    assert (
        trainer.evaluate()["eval_loss"] == pytest.approx(by_hand(), rel=1e-4) and by_hand() < first
    )
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(base(labels.total), tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = loaded(input_ids=ids, task_ids="topic").logits
        torch.testing.assert_close(logits, model.eval()(input_ids=ids, task_ids="topic").logits)
        alone = labels.narrow(loaded.merge_and_unload(task_id="topic"), "topic")
        torch.testing.assert_close(
            alone(input_ids=ids).logits, logits[:, 2:5], atol=1e-5, rtol=1e-4
        )
        alone.save_pretrained(tmp_path / "plain")
        again = type(alone).from_pretrained(tmp_path / "plain").eval()
        torch.testing.assert_close(
            again(input_ids=ids).logits, logits[:, 2:5], atol=1e-5, rtol=1e-4
        )
    assert again.config.num_labels == 3 and again.config.id2label == {0: "0", 1: "1", 2: "2"}
    assert int(numbers.max()) == 6


# --- adapters with trained heads
# ------------------------------------------------------------------------------------------


def classifiers(base, **names):
    """A model with adapters of several methods, each with a head of its own."""
    model = None
    for name, config in names.items():
        if model is None:
            model = get_peft_model(
                base(2), config, name, mixed=len({type(c) for c in names.values()}) > 1
            )
        else:
            model.add_adapter(name, config)
    head = next(
        module for path, module in model.named_modules() if path.endswith(("classifier", "score"))
    )
    with torch.no_grad():
        for name in names:
            for parameter in head.modules_to_save[name].parameters():
                parameter.normal_()
    return model.eval(), head


def configs(base, *kinds):
    fields = {"target_modules": TARGETS[base], "task_type": "SEQ_CLS"}
    own = {"modules_to_save": ["classifier" if base is bert else "score"]}
    both = {
        "lora": lambda: LoraConfig(init_lora_weights=False, **fields, **own),
        "lokr": lambda: LoKrConfig(r=2, init_weights=False, decompose_both=True, **fields, **own),
    }
    return [both[kind]() for kind in kinds]


@pytest.mark.parametrize("base", [bert, llama])
@pytest.mark.parametrize("kinds", [("lora", "lora"), ("lora", "lokr")])
def test_stacked_heads_give_each_task_what_its_adapter_gave(base, kinds, tmp_path):
    a, b = configs(base, *kinds)
    model, _ = classifiers(base, a=a, b=b)
    ids, expected = torch.randint(3, 48, (3, 6)), {}
    for name in "ab":
        model.set_adapter(name)
        expected[name] = model(input_ids=ids).logits.detach()
    labels = save_as_poly(tmp_path, model, {"a": "films", "b": "books"}, heads="stack").labels
    assert (labels.tasks, labels.total) == (["films", "books"], 4)
    assert (
        json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]
        == model.peft_config["a"].modules_to_save
    )
    small = base(2)
    with pytest.raises(
        RuntimeError,
        match="head in it has 4 labels: load the base model with `num_labels=4`.*labels.total",
    ):
        PeftModel.from_pretrained(small, tmp_path)
    assert all("lora" not in name and "poly" not in name for name, _ in small.named_modules())
    loaded = PeftModel.from_pretrained(base(4), tmp_path).eval()
    with torch.no_grad():
        for task, name in (("films", "a"), ("books", "b")):
            logits = loaded(input_ids=ids, task_ids=task).logits[:, labels.span(task)]
            torch.testing.assert_close(logits, expected[name], atol=1e-5, rtol=1e-4)
    trainable = PeftModel.from_pretrained(base(4), tmp_path, is_trainable=True)
    assert any(p.requires_grad and "modules_to_save" in n for n, p in trainable.named_parameters())


def test_other_fates_of_heads(tmp_path):
    model, head = classifiers(bert, **dict(zip("ab", configs(bert, "lora", "lora"), strict=True)))
    copies, key = head.modules_to_save, "base_model.model.classifier."
    mean = convert_to_poly(model, ["a", "b"], heads="mean")
    of_b = convert_to_poly(model, ["a", "b"], heads="b")
    alone = convert_to_poly(model, ["a"])
    for part in ("weight", "bias"):
        a, b = getattr(copies["a"], part), getattr(copies["b"], part)
        torch.testing.assert_close(mean.state_dict[key + part], (a + b) / 2)
        assert torch.equal(of_b.state_dict[key + part], b) and torch.equal(
            alone.state_dict[key + part], a
        )
    assert mean.labels is of_b.labels is None and "classifier" in mean.config.modules_to_save
    ids = torch.randint(3, 48, (3, 6))
    save_as_poly(tmp_path, model, ["a", "b"], heads="b")
    model.set_adapter("b")
    loaded = PeftModel.from_pretrained(bert(2), tmp_path).eval()
    torch.testing.assert_close(
        loaded(input_ids=ids, task_ids="b").logits,
        model(input_ids=ids).logits,
        atol=1e-5,
        rtol=1e-4,
    )


def test_heads_that_can_not_be_combined_are_named(tmp_path):
    model, _ = classifiers(bert, **dict(zip("ab", configs(bert, "lora", "lora"), strict=True)))
    choices = r"'mean' or 'stack' .*`TaskLabels`\) or the name of the adapter whose copy is taken \('a', 'b'\)"
    with pytest.raises(
        ValueError, match=rf"Adapters a, b each train a copy of `classifier.weight`. .*{choices}"
    ):
        save_as_poly(tmp_path / "out", model, ["a", "b"])
    with pytest.raises(ValueError, match=rf"`heads`='c' must be {choices}"):
        save_as_poly(tmp_path / "out", model, ["a", "b"], heads="c")
    base = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)))
    deep = get_peft_model(base, LoraConfig(target_modules="0", modules_to_save=["1"]), "a")
    deep.add_adapter("b", LoraConfig(target_modules="0", modules_to_save=["1"]))
    with pytest.raises(
        ValueError, match="needs one linear head in each adapter; they train .*'1.0.weight'"
    ):
        save_as_poly(tmp_path / "out", deep, ["a", "b"], heads="stack")
    with torch.no_grad():  # equal copies need no choice
        next(deep.base_model.model[1].modules_to_save["b"].parameters()).add_(1.0)
    with pytest.raises(
        ValueError, match="`heads`: 'mean' or the name"
    ):  # the impossible is not offered
        save_as_poly(tmp_path / "out", deep, ["a", "b"])
    deep.add_adapter("c", LoraConfig(target_modules="0"))
    with pytest.raises(
        ValueError,
        match="Adapters a, b each train a copy of `1.0.weight`, but c .`heads`='c'. does not",
    ):
        save_as_poly(tmp_path / "out", deep, ["a", "b", "c"], heads="c")
    with pytest.raises(
        ValueError, match="`heads`='stack' stacks heads .*; of c none has one. Leave `heads` out"
    ):
        save_as_poly(tmp_path / "out", deep, ["c"], heads="stack")
    assert not (tmp_path / "out").exists()


def test_an_adapter_called_as_a_fate_is_meant_by_its_name():
    model, head = classifiers(
        bert, **dict(zip(("mean", "stack"), configs(bert, "lora", "lora"), strict=True))
    )
    for name in ("mean", "stack"):
        state = convert_to_poly(model, ["mean", "stack"], heads=name).state_dict
        assert torch.equal(
            state["base_model.model.classifier.weight"], head.modules_to_save[name].weight
        )
    with pytest.raises(
        ValueError,
        match=r"`heads`: the name of the adapter whose copy is taken \('mean', 'stack'\)",
    ):
        convert_to_poly(model, ["mean", "stack"])
    model.add_adapter("other", model.peft_config["mean"])
    for given, other in (
        ("mean", "stack"),
        ("stack", "mean"),
    ):  # which of them are combined decides
        if given == "mean":
            state = convert_to_poly(model, [other, "other"], heads=given).state_dict
            copies = head.modules_to_save
            expected = (copies[other].weight + copies["other"].weight) / 2
            torch.testing.assert_close(state["base_model.model.classifier.weight"], expected)
        else:
            assert convert_to_poly(model, [other, "other"], heads=given).labels.total == 4


def test_rows_of_embeddings_are_combined_if_they_are_the_same():
    config = METHODS["LORA"].config
    model = get_peft_model(
        llama(2), config(target_modules=["q_proj"], trainable_token_indices=[3, 5]), "a"
    )
    model.add_adapter("b", config(target_modules=["q_proj"], trainable_token_indices=[3, 5]))
    rows = model.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta
    for parameter in rows.parameters():
        parameter.data.normal_()
    converted = convert_to_poly(model, ["a", "b"], heads="mean")
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    torch.testing.assert_close(converted.state_dict[key], (rows["a"] + rows["b"]) / 2)
    assert converted.config.trainable_token_indices == [3, 5]
    model.add_adapter("c", config(target_modules=["q_proj"], trainable_token_indices=[4]))
    with pytest.raises(ValueError, match="Adapters a, c train different rows"):
        convert_to_poly(model, ["a", "c"], heads="mean")
