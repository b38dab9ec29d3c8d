# SPDX-License-Identifier: Apache-2.0
"""A fleet's model has what was asked for, holds its bounds, and computes what one adapter alone does."""

import copy
import random
import shutil
import threading
import warnings

import pytest
import torch
from helpers.calls import calls_of
from helpers.methods import METHODS
from helpers.models import mlp
from helpers.states import assert_unchanged, snapshot
from helpers.users import USERS, save_user

from peft import AdapterFleet, AdapterLibrary, PeftMixedModel, PeftModel, adapter_sizes
from peft.base.errors import CheckpointError, PeftRuntimeError, PeftTypeError, PeftValueError
from peft.library import fleet as fleet_module

NAMES = [f"users/{user}" for user in USERS]
ADA, BEN, CAI, DORA = NAMES


@pytest.fixture
def library(folder):
    return AdapterLibrary(folder)


@pytest.fixture
def outputs(library):
    """A base model's weights, an input, and each adapter's output on it, from fresh models."""
    base, x = mlp(), torch.randn(1, 8)
    state = base.state_dict()
    found = {"__base__": base(x).detach()}
    for name in NAMES:
        fresh = mlp()
        fresh.load_state_dict(state)
        found[name] = PeftModel.from_pretrained(fresh, library.folder / name)(x).detach()
    base.load_state_dict(state)
    return base, x, found


def assert_serves(fleet, x, expected, names):
    with fleet.using(names) as there:
        if not isinstance(fleet.model, PeftModel):
            assert set(names) <= {"__base__"}
            return
        y = fleet.model(x.expand(len(names), -1), adapter_names=there)
    for row, name in zip(y, names, strict=True):
        torch.testing.assert_close(row[None], expected[name])


def test_a_fleet_serves_any_users_within_its_bound(library, outputs):
    base, x, expected = outputs
    fleet, draw = AdapterFleet(base, library, max_adapters=2), random.Random(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(30):
            some = draw.sample([*NAMES, "__base__"], 2)
            assert_serves(fleet, x, expected, [*some, draw.choice(some)])
            assert len(getattr(fleet.model, "peft_config", ())) <= 2
    status = fleet.status()
    assert status.loads - status.evictions == len(status.sizes) == 2
    assert status.sizes == adapter_sizes(fleet.model) and "2 adapters" in str(status)


def test_the_least_recently_used_leave(library, outputs):
    fleet = AdapterFleet(outputs[0], library, max_adapters=3)
    fleet.ensure([ADA, BEN, CAI])
    fleet.ensure(ADA)
    assert fleet.ensure([DORA]) == [DORA]
    assert list(fleet.status().sizes) == [CAI, ADA, DORA] and BEN not in fleet
    fleet.activate(CAI)
    assert fleet.model.active_adapters == [CAI]
    fleet.ensure(ADA)
    fleet.ensure([BEN, DORA])  # active ones leave last
    assert set(fleet.status().sizes) == {CAI, BEN, DORA}
    fleet.ensure([ADA, BEN, DORA])
    assert CAI not in fleet and fleet.model.active_adapters == []
    assert not any(p.requires_grad for p in fleet.model.parameters())


def test_no_adapter_answers_for_another(library, outputs, folder):
    """A call that names none is the base model's, unless `activate` asked for an adapter."""
    base, x, expected = outputs
    fleet = AdapterFleet(base, library, max_adapters=2)

    def assert_active(name):
        assert fleet.model.active_adapters == [name] * (name != "__base__")
        torch.testing.assert_close(fleet.model(x), expected[name])
        assert_serves(fleet, x, expected, [*list(fleet.status().sizes)[:2], "__base__"])

    fleet.ensure([BEN, ADA])
    assert_active("__base__")
    fleet.activate(ADA)
    assert_active(ADA)
    fleet.ensure([BEN, CAI])  # ADA leaves
    assert_active("__base__")
    fleet.activate(CAI)
    fleet.evict(CAI)
    assert_active("__base__")
    fleet.evict()
    fleet.ensure(DORA)  # on a model that had none left
    assert_active("__base__")
    fleet.activate(DORA)
    shutil.copytree(folder / BEN, folder / DORA, dirs_exist_ok=True)  # trained again
    library.refresh()
    fleet.ensure(DORA)
    expected[DORA] = expected[BEN]
    assert_active(DORA)
    assert not any(p.requires_grad for p in fleet.model.parameters())


def test_a_fleet_serves_adapters_of_all_methods(library, outputs, folder):
    base, x, expected = outputs
    state = copy.deepcopy(base.state_dict())
    fleet = AdapterFleet(base, library, max_adapters=2)
    for name, method in METHODS.items():
        path = f"methods/{name.lower()}"
        fresh = mlp()
        fresh.load_state_dict(state)
        alone = PeftModel.from_pretrained(fresh, folder / path)
        fleet.activate(path)
        torch.testing.assert_close(fleet.model(x, **method.call), alone(x, **method.call))
        if not method.call:
            expected[path] = alone(x)
            assert_serves(fleet, x, expected, [path, ADA, "__base__"])
        assert len(fleet.model.peft_config) <= 2
    one = AdapterFleet(mlp(), AdapterLibrary(folder / "users"))
    one.ensure("ada")
    assert not isinstance(one.model, PeftMixedModel)  # of one method


def test_an_error_lets_none_leave(library, outputs, folder):
    base, x, expected = outputs
    save_user(folder / "wide", "bank", folder)
    config = folder / "wide" / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 2', '"r": 4'))  # shapes that do not fit
    library.refresh()
    fleet = AdapterFleet(PeftModel.from_pretrained(base, folder / CAI, "own"), library)
    fleet.max_adapters = 2
    fleet.ensure([ADA, BEN])
    before, status = snapshot(fleet.model), fleet.status()
    for name, message in {"methods/lora": "different peft types", "wide": "does not fit"}.items():
        with pytest.raises((PeftValueError, CheckpointError), match=message):
            fleet.ensure(name)
        assert_unchanged(before, fleet.model)
        assert fleet.status() == status
    fleet.max_bytes = 2 * status.sizes[ADA]
    library.refresh()
    assert_serves(fleet, x, expected, [ADA, BEN])


def test_a_bound_of_bytes(library, outputs):
    base, x, expected = outputs
    size = adapter_sizes(library.add_to(mlp(), ADA))[ADA]
    fleet = AdapterFleet(base, library, max_bytes=2 * size + size // 2)
    for names in ([ADA, BEN], [CAI], [DORA, ADA], [ADA, "__base__"]):
        assert_serves(fleet, x, expected, names)
        assert sum(adapter_sizes(fleet.model).values()) <= fleet.max_bytes
    before = fleet.status().sizes
    with pytest.raises(PeftValueError, match="3 adapters at once take .* more than `max_bytes`"):
        fleet.ensure([ADA, BEN, CAI])
    assert fleet.status().sizes.keys() == before.keys() == {DORA, ADA}
    with pytest.raises(PeftValueError, match="more than `max_bytes`=1;"):
        AdapterFleet(mlp(), library, max_bytes=1).ensure(ADA)


def test_adapters_in_use_stay(library, outputs):
    base, x, expected = outputs
    fleet = AdapterFleet(base, library, max_adapters=2)
    with fleet.using([ADA, BEN]):
        with pytest.raises(PeftRuntimeError, match="no room .* beside the 2 in use"):
            fleet.ensure(CAI)
        with pytest.raises(PeftRuntimeError, match="'users/ada' is in use"):
            fleet.evict(ADA)
        with fleet.using(ADA):
            assert fleet.status().in_use == (BEN, ADA)
        assert set(fleet.model.peft_config) == {ADA, BEN}
    assert_serves(fleet, x, expected, [CAI, DORA])
    with pytest.raises(ZeroDivisionError), fleet.using(CAI):
        _ = 1 / 0
    assert fleet.status().in_use == () and fleet.evict() == [DORA, CAI]
    assert not fleet.model.peft_config
    assert_serves(fleet, x, expected, [ADA])


def test_what_is_on_the_model_already_stays(library, outputs, folder):
    base, x, expected = outputs
    model = PeftModel.from_pretrained(base, folder / BEN, BEN)
    fleet = AdapterFleet(model, library, max_adapters=1)
    for name in (ADA, CAI, BEN, DORA):
        assert_serves(fleet, x, expected, [name])
    status = fleet.status()
    assert list(status.sizes) == [DORA] and list(status.others) == [BEN]
    assert model.active_adapters == [BEN] and "not the fleet's" in str(status)
    model.delete_adapter(DORA)  # by someone else
    assert_serves(fleet, x, expected, [DORA])


def test_retrained_users_are_read_again(library, outputs, folder):
    base, x, expected = outputs
    fleet = AdapterFleet(base, library)
    assert_serves(fleet, x, expected, [ADA])
    save_user(folder / ADA, "bank", folder)
    assert_serves(fleet, x, expected, [ADA])  # the library does not know
    library.refresh()
    with fleet.using(ADA), pytest.raises(AssertionError):
        assert_serves(fleet, x, expected, [ADA])
    fresh = mlp()
    state = {k.removeprefix("base_model.model."): v for k, v in base.state_dict().items()}
    fresh.load_state_dict({k.replace("base_layer.", ""): v for k, v in state.items()}, strict=False)
    expected[ADA] = PeftModel.from_pretrained(fresh, folder / ADA)(x).detach()
    assert_serves(fleet, x, expected, [ADA])


def test_errors_leave_the_model(library, outputs, folder):
    base, x, expected = outputs
    fleet = AdapterFleet(base, library, max_adapters=2)
    fleet.ensure([ADA])
    (folder / CAI / "adapter_model.safetensors").write_bytes(b"")
    for message, names in {
        "no adapter 'nobody'": [BEN, "nobody"],
        "3 adapters at once": [ADA, BEN, DORA],
        "not a readable safetensors file": [BEN, CAI],
    }.items():
        with pytest.raises((PeftValueError, CheckpointError), match=message):
            fleet.ensure(names)
        assert set(fleet.model.peft_config) == {ADA}
        assert_serves(fleet, x, expected, [ADA])
    with pytest.raises(PeftTypeError, match="must be an AdapterLibrary"):
        AdapterFleet(base, folder)
    with pytest.raises(PeftValueError, match="`max_adapters`=0"):
        AdapterFleet(base, library, max_adapters=0)
    for names in (BEN, [ADA, BEN], library[BEN]):
        with pytest.raises(PeftValueError, match="'users/ben' is not among the 1"):
            fleet.evict(names)
    for call, wrong in ((fleet.evict, 5), (fleet.evict, [[ADA]]), (fleet.activate, [ADA, BEN])):
        with pytest.raises(PeftTypeError, match="must be a name|named by (one|a) string"):
            call(wrong)
    with pytest.raises(PeftValueError, match="no adapter '__base__'"):
        AdapterFleet(mlp(), library).activate("__base__")
    assert ADA in fleet


def test_entries_stand_for_their_names(library):
    ada = library[ADA]
    fleet = AdapterFleet(mlp(), library)
    assert ada in library and ada not in fleet
    assert fleet.ensure([ada, "__base__", ada]) == [ADA, "__base__", ADA]
    assert ada in fleet and {ada: 1}[library[ADA]] == 1
    assert adapter_sizes(fleet.model, ada) == adapter_sizes(fleet.model, ADA)
    fleet.activate(ada)
    assert fleet.model.active_adapters == [ADA]
    assert fleet.evict(ada) == [ADA] and ada not in fleet


def test_a_change_costs_the_same_beside_many_others(folder, library):
    """Counted in calls of functions, which does not depend on how busy the machine is."""
    for i in range(40):
        shutil.copytree(folder / ADA, folder / "more" / f"u{i}")
    library.refresh()
    costs = []
    for number in (3, 40):
        fleet = AdapterFleet(mlp(), library, max_adapters=number)
        fleet.ensure([f"more/u{i}" for i in range(number)])
        costs.append(calls_of(lambda fleet=fleet: fleet.ensure(BEN)))
    assert costs[1] < costs[0] + 10 * 40


def test_more_threads_than_the_model_has_room_for_wait(library, outputs):
    base, x, expected = outputs
    fleet, served, errors = AdapterFleet(base, library, max_adapters=1), [], []

    def work(name):
        try:
            with fleet.using([name], timeout=None) as there:
                y = fleet.model(x, adapter_names=there)
                torch.testing.assert_close(y, expected[name])
                served.append(name)
        except BaseException as error:
            errors.append(error)

    with fleet.using(ADA):
        with pytest.raises(PeftRuntimeError, match="no room .* beside the 1 in use"):
            fleet.using(BEN, timeout=1e-3).__enter__()
        threads = [threading.Thread(target=work, args=(name,)) for name in (BEN, CAI, DORA)]
        for thread in threads:
            thread.start()
        torch.testing.assert_close(fleet.model(x, adapter_names=[ADA]), expected[ADA])
        assert not served
    for thread in threads:
        thread.join()
    assert not errors and sorted(served) == [BEN, CAI, DORA]
    assert fleet.status().in_use == () and len(fleet.status().sizes) == 1
    with pytest.raises(PeftValueError, match="`timeout`='soon' must be a finite number"):
        fleet.using(ADA, timeout="soon").__enter__()
    with pytest.raises(PeftTypeError, match="`names`=None must be a name or a list of names"):
        fleet.using(None).__enter__()
    assert fleet.ensure([library[ADA], "__base__"]) == [ADA, "__base__"]
    with fleet.using(library[ADA]) as names:
        assert names == [ADA] and fleet.status().in_use == (ADA,)


def test_threads_ask_for_different_users(library, outputs):
    base, x, expected = outputs
    fleet, errors = AdapterFleet(base, library, max_adapters=3), []
    fleet.ensure(ADA)

    def work(seed):
        draw = random.Random(seed)
        try:
            for _ in range(25):
                assert_serves(fleet, x, expected, [draw.choice(NAMES), "__base__"])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(fleet.model.peft_config) <= 3


# Edges


def test_what_a_fleet_counts(library, outputs):
    fleet = AdapterFleet(outputs[0], library, max_adapters=2)
    assert fleet.status() == fleet_module.FleetStatus({}, (), {}, 0, 0)
    assert repr(fleet) == f"AdapterFleet(0 of {len(library)} adapters on the model)"
    assert fleet.ensure(iter([ADA, "__base__", BEN, ADA])) == [ADA, "__base__", BEN, ADA]
    fleet.ensure(CAI)  # ADA leaves
    assert ADA not in fleet and CAI in fleet and "nobody" not in fleet
    status = fleet.status()
    assert (list(status.sizes), status.loads, status.evictions) == ([BEN, CAI], 3, 1)
    assert repr(fleet) == f"AdapterFleet(2 of {len(library)} adapters on the model)"
    assert fleet.evict([CAI, CAI]) == [CAI] and fleet.evict(BEN) == [BEN] and fleet.evict() == []
    assert (fleet.status().loads, fleet.status().evictions) == (3, 1)
    library.rename(ADA, "best")
    assert fleet.ensure([ADA, "best"]) == ["best", "best"]  # by its folder too
    fleet.model.delete_adapter("best")  # by someone else
    assert fleet.status().sizes == {} and fleet.evict() == []


def test_bounds_that_are_just_enough(library, outputs):
    size = adapter_sizes(library.add_to(mlp(), ADA))[ADA]
    fleet = AdapterFleet(outputs[0], library, max_bytes=2 * size, max_adapters=3)
    fleet.ensure([ADA, BEN])
    assert list(fleet.status().sizes) == [ADA, BEN]
    fleet.ensure(CAI)
    assert list(fleet.status().sizes) == [BEN, CAI]
    fleet.max_bytes = 100 * size
    fleet.ensure(DORA)
    fleet.ensure(ADA)  # by the number one has to leave, by the bytes none
    assert list(fleet.status().sizes) == [CAI, DORA, ADA]
    fleet.max_bytes = size
    fleet.ensure(BEN)
    assert list(fleet.status().sizes) == [BEN]


def test_a_newer_version_takes_the_place_of_the_older(library, outputs, folder):
    fleet = AdapterFleet(outputs[0], library, max_adapters=2)
    fleet.ensure([ADA, BEN])
    save_user(folder / ADA, "bank", folder)
    library.refresh()
    with (
        fleet.using(BEN),
        fleet.using("__base__"),
        pytest.raises(PeftRuntimeError, match="'users/ben' is in use"),
    ):
        fleet.evict()
    assert set(fleet.status().sizes) == {ADA, BEN}
    old = fleet._held[ADA].version
    fleet._uses[ADA] += 1  # a call is using the older
    with pytest.raises(PeftRuntimeError, match="'users/ada' is in use by a call, and its files ch"):
        fleet.ensure([ADA])
    fleet._uses[ADA] -= 1
    assert fleet._held[ADA].version == old != library[ADA].version
    fleet.ensure([ADA])
    status = fleet.status()
    assert list(status.sizes) == [BEN, ADA] and (status.loads, status.evictions) == (3, 0)


def test_what_the_fleet_did_not_load_does_not_count(library, outputs, folder):
    fleet = AdapterFleet(PeftModel.from_pretrained(outputs[0], folder / BEN, BEN), library)
    fleet.max_adapters = 1
    assert fleet.ensure([BEN, ADA, BEN]) == [BEN, ADA, BEN]
    with pytest.raises(PeftValueError, match="2 adapters at once are more than `max_adapters`=1"):
        fleet.ensure([BEN, ADA, CAI])
    assert adapter_sizes(fleet.model, [BEN, "nobody"]) == {
        BEN: adapter_sizes(fleet.model)[BEN],
        "nobody": 0,
    }


def test_precision_and_arguments_of_a_fleet(library):
    for options, dtype in (
        ({}, torch.float32),
        ({"autocast_adapter_dtype": False}, torch.bfloat16),
    ):
        fleet = AdapterFleet(mlp().bfloat16(), library, **options)
        fleet.ensure("methods/lora")
        assert fleet.model.base_model.model[0].lora_A["methods/lora"].weight.dtype == dtype
    for options, error, message in (
        ({"autocast_adapter_dtype": 2}, PeftTypeError, "must be True or False"),
        ({"max_bytes": 0}, PeftValueError, "`max_bytes`=0 must be"),
        ({"max_adapters": 1.5}, PeftValueError, "`max_adapters`=1.5 must be"),
    ):
        with pytest.raises(error, match=message):
            AdapterFleet(mlp(), library, **options)


def test_nobody_waits_unasked(library, outputs, monkeypatch):
    fleet = AdapterFleet(outputs[0], library, max_adapters=1)
    monkeypatch.setattr(fleet._lock, "wait", None)
    with fleet.using(ADA):
        for wait in ({}, {"timeout": 0}):
            with pytest.raises(PeftRuntimeError, match="beside the 1 in use .users/ada."):
                fleet.using(BEN, **wait).__enter__()


def test_a_call_waits_as_long_as_it_is_told(library, outputs, monkeypatch):
    """By a clock that stands still, so that the other call ends in time."""
    fleet, waits = AdapterFleet(outputs[0], library, max_adapters=1), []
    monkeypatch.setattr(fleet_module, "monotonic", lambda: 7.0)
    wait, held = fleet._lock.wait, fleet.using(ADA)

    def ended(timeout):
        waits.append(timeout)
        held.__exit__(None, None, None)

    monkeypatch.setattr(fleet._lock, "wait", ended)
    held.__enter__()
    with fleet.using(BEN, timeout=0.5):
        assert BEN in fleet and ADA not in fleet
    assert waits == [0.5] and wait is not None


def test_others_wait_while_adapters_are_exchanged(library, outputs, monkeypatch):
    """Whatever they ask of the fleet, they find it before or after, and not in between."""
    fleet, done, threads = AdapterFleet(outputs[0], library), [], []
    fleet.ensure(ADA)

    def used():
        with fleet.using(ADA):
            pass

    asks = (
        fleet.status, lambda: fleet.ensure(ADA), used, lambda: fleet.activate(ADA),
        lambda: fleet.evict(BEN),
    )  # fmt: skip

    def run(ask):
        ask()
        done.append(ask)

    def exchanged(*arguments):
        for ask in asks:
            threads.append(threading.Thread(target=run, args=(ask,), daemon=True))
            threads[-1].start()
            threads[-1].join(0.02)
        assert done == []
        return put_on(*arguments)

    put_on = fleet_module.put_on
    monkeypatch.setattr(fleet_module, "put_on", exchanged)
    fleet.ensure(BEN)
    for thread in threads:
        thread.join(60)
    assert len(done) == len(asks)
