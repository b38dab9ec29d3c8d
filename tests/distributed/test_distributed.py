# SPDX-License-Identifier: Apache-2.0
"""Two processes against one: the same losses and adapters, whole and sharded checkpoints, and
resuming.
"""

import sys
from pathlib import Path

import pytest
import torch
from helpers.methods import METHODS

import peft

sys.path.insert(0, str(Path(__file__).parent))
import jobs
from pool import Pool

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("distributed")]
ENGINES = {
    "ddp": ("ddp", {}),
    "fsdp2": ("fsdp2", {}),
    "fsdp2 root": ("fsdp2", {"per_layer": False}),
    "fsdp1 layers": ("fsdp1", {"policy": "layers"}),
    "fsdp1 policy": ("fsdp1", {"policy": "peft"}),
    "fsdp1 root": ("fsdp1", {}),
}


@pytest.fixture(scope="session")
def pool():
    pool = Pool()
    yield pool
    pool.stop()


@pytest.fixture(params=sorted(METHODS))
def name(request):
    return request.param


@pytest.fixture(scope="session")
def references():
    """The training in one process, once for each method."""
    known = {}

    def reference(name):
        if name not in known:
            known[name] = jobs.reference(name)
        return known[name]

    return reference


def close(left, right):
    assert left.keys() == right.keys()
    for key, tensor in right.items():
        torch.testing.assert_close(
            left[key], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_as_one(pool, references, name, engine):
    """Also where the base is asked between steps, as trainers do for a reference: adapters are off
    and frozen meanwhile, and train on as if nothing had been.
    """
    job, options = ENGINES[engine]
    losses, adapter, _ = references(name)
    for found, state, gradients in pool.run(
        job, name, ask_base=engine not in ("fsdp1 policy", "fsdp1 root"), **options
    ):
        assert found == pytest.approx(losses, rel=1e-4)
        close(state, adapter)
        assert gradients or engine.startswith("fsdp1")
        assert not any(
            "base_layer" in parameter or "embed_tokens" in parameter for parameter in gradients
        )


def test_containers_as_units_of_their_own(pool, references, name):
    losses, adapter, _ = references(name)
    for found, state in pool.run("holders", name):
        assert found == pytest.approx(losses, rel=1e-4)
        close(state, adapter)


def test_each_trainable_number_is_averaged_once(pool, name):
    """The bank that all layers share too."""
    for averaged, trainable in pool.run("traffic", name):
        assert averaged == trainable


def test_what_accelerate_prepares(pool, references, name):
    losses, adapter, _ = references(name)
    for kind, found, state in pool.run("prepared", name):
        assert kind == "DistributedDataParallel"
        assert found == pytest.approx(losses, rel=1e-4)
        close(state, adapter)


def test_an_adapter_loaded_after_sharding(pool, references, name):
    for result, losses in pool.run("meta", name):
        assert not result.missing_keys
        assert losses == pytest.approx(references(name)[0], rel=1e-4)


def test_generating_with_a_sharded_model(pool, name):
    for expected, written in pool.run("generation", name):
        assert torch.equal(expected, written)


@pytest.mark.parametrize("engine", ["ddp", "fsdp1", "fsdp2"])
def test_adapters_in_a_model_of_its_own_class(pool, name, engine):
    for result, state, loaded in pool.run("native", name, engine):
        assert not result.missing_keys
        assert state
        close(loaded, state)


@pytest.mark.parametrize("engine", ["fsdp1", "fsdp2"])
def test_a_checkpoint_that_does_not_fit(pool, name, engine):
    for messages, before, after in pool.run("misfit", name, engine):
        assert "size mismatch" in messages[0]
        assert len(messages) == (4 if engine == "fsdp1" else 1)
        close(after, before)


@pytest.mark.parametrize(
    ("engine", "options"), [("fsdp2", {}), ("fsdp1", {"policy": "layers"}), ("fsdp1", {})]
)
def test_an_adapter_goes_from_one_sharded_model_to_another(pool, name, engine, options):
    for before, state, after, result, (expected, logits) in pool.run(
        "roundtrip", engine, name, **options
    ):
        assert state
        assert not result.missing_keys
        assert not result.unexpected_keys
        assert any(not torch.equal(before[key], state[key]) for key in state)
        close(after, state)
        torch.testing.assert_close(logits, expected)


def test_sharded_checkpoints_resume(pool, name, tmp_path):
    for kind in (True, False):
        for expected, resumed, _ in pool.run("dcp", name, str(tmp_path / str(kind)), kind):
            assert resumed == pytest.approx(expected, rel=1e-5)
    for result, expected, loaded in pool.run("dcp_adapter", name, str(tmp_path / "adapter")):
        assert not result.missing_keys
        close(loaded, expected)


def test_a_gathered_state_is_an_ordinary_checkpoint(pool, name, tmp_path):
    expected = dict(jobs.get_peft_model_state_dict(jobs.adapted(name)))
    for _, state in pool.run("gathered", name, str(tmp_path)):
        close(state, expected)
    from safetensors.torch import load_file

    close(load_file(tmp_path / "adapter_model.safetensors"), expected)


def test_all_processes_save_into_one_folder(pool, name, tmp_path):
    pool.run("save_from_all", name, str(tmp_path))
    from safetensors.torch import load_file

    close(
        load_file(tmp_path / "adapter_model.safetensors"),
        dict(jobs.get_peft_model_state_dict(jobs.adapted(name))),
    )
    assert not [
        path
        for path in tmp_path.iterdir()
        if "adapter" in path.name and path.suffix not in (".json", ".safetensors")
    ]


def test_saving_a_sharded_model(pool, name, tmp_path):
    for state in pool.run("save_sharded", name, str(tmp_path)):
        close(state, dict(jobs.get_peft_model_state_dict(jobs.adapted(name))))


def test_processes_gather_the_same_adapters_or_none(pool, tmp_path):
    """Collectives pair up by their order, so files would have parts of several adapters."""
    for messages in pool.run("save_others", str(tmp_path)):
        assert len(messages) == 2
        assert all("has other adapters" in message for message in messages)
    from safetensors.torch import load_file

    plain = jobs.with_adapters("pq")
    for name in "pq":
        found = load_file(tmp_path / name / "adapter_model.safetensors")
        close(found, dict(jobs.get_peft_model_state_dict(plain, adapter_name=name)))


@pytest.mark.parametrize(("engine", "options"), [("fsdp2", {}), ("fsdp1", {"policy": "layers"})])
def test_merging_a_sharded_model(pool, name, engine, options):
    for outputs in pool.run("merging", name, engine, **options):
        if engine == "fsdp1":
            assert "summon_full_params" in outputs.pop(1)
        before, merged, after, off, again = outputs
        torch.testing.assert_close(merged, before, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(after, before)
        torch.testing.assert_close(again, before)
        assert not torch.allclose(off, before, atol=1e-4)


SLICES, GATHER = "FullyShardedDataParallel", "deepspeed.zero.GatheredParameters"


@pytest.mark.parametrize(
    ("engine", "method", "change", "options", "refusal"),
    [
        # Right after a forward the parameters are full copies, which FSDP2 then drops.
        ("fsdp2", "LOKR", "clip", {}, ""),
        ("fsdp2", "LOKR", "clip", {"called": False}, ""),
        ("fsdp2", "LOKR", "merge", {}, ""),
        ("fsdp2", "LOKR", "switch", {}, ""),
        ("fsdp2", "LOKR", "delete", {"called": False}, ""),
        ("fsdp2", "POLY", "skills", {}, ""),
        ("fsdp2", "VBLORA", "bank", {}, ""),
        ("fsdp1", "LOKR", "clip", {}, SLICES),
        ("fsdp1", "LOKR", "clip", {"gather": True}, ""),
        ("fsdp1", "LOKR", "convert", {}, SLICES),
        ("fsdp1", "LOKR", "delta", {}, SLICES),
        ("fsdp1", "LOKR", "delta", {"gather": True}, ""),
        ("fsdp2", "LOKR", "delta", {}, ""),
        ("fsdp1", "LOKR", "convert", {"gather": True}, "is a slice"),
        ("fsdp1", "LORA", "combine", {"gather": True}, "is a slice"),
        ("fsdp2", "LORA", "combine", {}, ""),
        ("fsdp1", "LOKR", "swap", {}, SLICES),
        ("fsdp1", "LOKR", "delete", {}, ""),
        ("fsdp1", "LOKR", "save", {}, SLICES),
        ("fsdp1", "LOKR", "save_gathered", {}, ""),
        ("fsdp1", "POLY", "skills", {}, SLICES),
        ("fsdp1", "VBLORA", "bank", {}, SLICES),
        # An optimizer's step would write its own copies over full parameters.
        ("zero3", "VBLORA", "load", {}, GATHER),
        ("zero3", "VBLORA", "load", {"gather": True}, ""),
        # DeepSpeed's optimizer keeps what is frozen later, and its momentum goes on.
        ("zero3", "LOKR", "switch", {"momentum": 0.0}, ""),
        ("zero3", "LOKR", "mix", {}, ""),
        ("zero3", "LOKR", "delete", {}, ""),
        ("zero3", "LOKR", "add", {}, "`deepspeed.initialize`"),
        ("zero3", "LORA", "combine", {"gather": True}, "`deepspeed.initialize`"),
        ("zero3", "LOKR", "clip", {}, GATHER),
        ("zero3", "LOKR", "clip", {"gather": True}, ""),
        ("zero3", "LOKR", "convert", {"called": False}, GATHER),
        ("zero3", "LOKR", "convert", {"gather": True}, ""),
        ("zero3", "LOKR", "delta", {"called": False}, GATHER),
        ("zero3", "LOKR", "swap", {}, GATHER),
        ("zero3", "LOKR", "swap", {"gather": True}, ""),
        ("zero3", "POLY", "skills", {}, GATHER),
        ("zero3", "POLY", "skills", {"gather": True}, ""),
        ("zero3", "POLY", "tasks", {}, "an engine has sharded"),
        ("zero3", "VBLORA", "bank", {}, GATHER),
        ("zero3", "VBLORA", "bank", {"gather": True}, ""),
    ],
)
def test_a_change_of_a_sharded_model_is_kept_or_refused(
    pool, tmp_path, engine, method, change, options, refusal
):
    """Of all processes alike, with nothing changed where it is refused."""
    for error, sharded, whole in pool.run(
        "change", "changed", engine, method, change, str(tmp_path), **options
    ):
        assert refusal in error and bool(refusal) == bool(error)
        assert len(sharded) == len(whole)
        for found, expected in zip(sharded, whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_zero3_loads_in_16_bits_needs_a_refresh_of_its_optimizer(pool, tmp_path):
    for with_refresh, without in pool.run("change", "loaded_in_half", str(tmp_path)):
        assert with_refresh[0] > 0.3 > 0.01 > max(with_refresh[1:])
        assert without[1] < 0.01 < 0.3 < without[2]


@pytest.mark.parametrize("engine", ["fsdp2", "fsdp1", "zero3"])
def test_the_status_of_a_sharded_model_is_that_of_a_whole_one(pool, engine):
    for sharded, whole, messages in pool.run("change", "status_of", engine):
        assert sharded == whole
        assert len(messages) == (engine == "fsdp1")
        assert all("those of this process's slices" in message for message in messages)


def test_an_adapter_starts_from_data_before_the_model_is_sharded(pool):
    for message, is_unchanged in pool.run("change", "started_late"):
        assert message.startswith("`0`: an engine has sharded adapter default; start it by EVA")
        assert is_unchanged


@pytest.mark.parametrize("engine", ["fsdp2", "fsdp1"])
def test_a_fleet_over_a_sharded_base(pool, tmp_path, engine):
    for sharded, whole in pool.run("change", "fleet", engine, str(tmp_path)):
        assert sharded[1] == whole[1]
        for found, expected in zip(sharded[0], whole[0], strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("version", "kind"),
    [(1, "SHARDED_STATE_DICT"), (1, "FULL_STATE_DICT"), (2, "SHARDED_STATE_DICT")],
)
def test_accelerate_saves_and_resumes(pool, name, tmp_path, version, kind):
    for _, losses, resumed in pool.run("accelerate_fsdp", name, str(tmp_path), version, kind):
        assert resumed == pytest.approx(losses[2:], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "stage"), [*((name, 3) for name in sorted(METHODS)), ("POLY", 2), ("VBLORA", 2)]
)
def test_deepspeed(pool, references, name, tmp_path, stage):
    losses, adapter, _ = references(name)
    for found, state, refused, resumed in pool.run("zero", name, stage, str(tmp_path)):
        assert found[: jobs.STEPS] == pytest.approx(losses, rel=1e-4)
        close(state, adapter)
        assert resumed == pytest.approx(found[jobs.STEPS :], rel=1e-4)
        assert len(refused) == (4 if stage == 3 else 0)


def test_a_base_that_zero3_distributes_as_it_is_made(pool, name):
    losses = jobs.reference(name, modules_to_save=["lm_head"])[0]
    for found, state, merged, plain in pool.run("zero_init", name):
        assert found == pytest.approx(losses, rel=1e-4)
        assert any("lm_head" in key for key in state)
        assert not torch.allclose(merged, plain)


def test_trainer_in_two_processes(pool, name, tmp_path):
    for first, second, state, resumed in pool.run("trainer", name, str(tmp_path)):
        assert second[-2:] == pytest.approx(first[-2:], rel=1e-4)
        close(resumed, state)


def test_roles_are_known_under_every_engine(pool, name):
    for found, message in pool.run("roles", name):
        assert found["one"] == found["ddp"] == found["fsdp2"] == found["fsdp1"]
        assert "use_orig_params=True" in message


def test_trainer_shards(pool, name, tmp_path):
    """By the Trainer's own settings, with FSDP2. (Of FSDP1 on a CPU, torch crashes in the whole
    state dict that it asks for.)
    """
    wrapped = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    config = {
        "version": 2,
        "sync_module_states": False,
        "cpu_ram_efficient_loading": False,
        **wrapped,
    }
    for first, second, state, resumed in pool.run("trainer", name, str(tmp_path), config):
        assert second[-2:] == pytest.approx(first[-2:], rel=1e-3)
        close(resumed, state)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "fsdp1 layers"])
def test_training_over_a_shared_bank(pool, tmp_path, engine):
    bank = peft.VectorBank(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)))
    bank.save_pretrained(tmp_path)
    fields = {"bank": str(tmp_path)}
    losses, adapter, _ = jobs.reference("VBLORA", **fields)
    job, options = ENGINES[engine]
    for found, state, gradients in pool.run(job, "VBLORA", fields=fields, **options):
        assert found == pytest.approx(losses, rel=1e-4)
        close(state, adapter)
        assert not any("bank" in parameter for parameter in gradients)


def test_rows_of_tasks_train_by_themselves_in_a_sharded_model(pool):
    for start, plain, sharded in pool.run("rows_of_tasks"):
        close(sharded, plain)
        tables = [key for key in start if "router" in key or "task_skills" in key]
        assert len(tables) == 3 * len([key for key in start if "poly_lora_A" in key])
        for key in tables:
            assert torch.equal(sharded[key][[0, 2]], start[key][[0, 2]]) and not torch.equal(
                sharded[key][1], start[key][1]
            )


def test_experts_in_stacks_are_sharded(pool):
    plain = jobs.experts(sharded=False)
    assert len(plain) == 1 + 2 * 3
    for found in pool.run("experts", True):
        close(found, plain)


def test_inputs_of_all_processes_count_together(pool):
    whole = jobs.principal_directions([20, 12])
    for found in pool.run("principal_directions", [20, 12]):
        torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-3)
