# SPDX-License-Identifier: Apache-2.0
"""Progress bars: where they appear, and that they change nothing."""

import io
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.models import mlp

import peft
from peft.base import progress
from peft.base.progress import remark, track


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """Bars appear without delay, and no switch is set."""
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    monkeypatch.delenv("PEFT_PROGRESS", raising=False)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    for name, switch, value in (  # other tests switch these off for the whole process
        ("huggingface_hub.utils", "are_progress_bars_disabled", False),
        ("transformers.utils.logging", "is_progress_bar_enabled", True),
    ):
        if name in sys.modules:
            monkeypatch.setattr(sys.modules[name], switch, lambda value=value: value)
    before = peft.show_progress(None)
    yield
    peft.show_progress(before)


@pytest.fixture
def watched(monkeypatch):
    """Return a function that starts a test on a terminal, since pytest sets streams for each phase."""

    def begin(screen):
        monkeypatch.setattr(sys, "stderr", screen)
        return screen

    return begin


def test_a_bar_shows_on_a_terminal_and_only_the_outer_of_two(watched):
    terminal = watched(Terminal())
    seen = []
    outer = track(range(3), "Outer", unit="step")
    for i in outer:
        remark(outer, f"at {i}")
        assert outer.bar.postfix == f"at {i}"
        seen += [(i, j) for j in track(range(2), "Inner")]
    assert seen == [(i, j) for i in range(3) for j in range(2)]
    text = terminal.getvalue()
    assert "Outer" in text and "0/3" in text and "Inner" not in text
    assert list(track("ab", "Next")) == ["a", "b"]  # the thread is free for another bar
    assert "Next" in terminal.getvalue()


def test_an_error_in_a_loop_frees_its_thread(watched):
    terminal = watched(Terminal())
    bar = iter(track(range(3), "Broken"))
    next(bar)
    bar.close()
    assert list(track(range(2), "After")) == [0, 1]
    assert "After" in terminal.getvalue()


def switched_off(how, monkeypatch):
    if how == "function":
        peft.show_progress(False)
    elif how == "environment":
        monkeypatch.setenv("PEFT_PROGRESS", "0")
    elif how == "hub's variable":
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    elif how == "hub's function":
        off = SimpleNamespace(are_progress_bars_disabled=lambda: True)
        monkeypatch.setitem(sys.modules, "huggingface_hub.utils", off)
    elif how == "transformers' function":
        off = SimpleNamespace(is_progress_bar_enabled=lambda: False)
        monkeypatch.setitem(sys.modules, "transformers.utils.logging", off)
    elif how == "second process":
        monkeypatch.setenv("RANK", "1")
    elif how == "no terminal":
        monkeypatch.setattr(sys, "stderr", io.StringIO())
    else:
        monkeypatch.setattr(sys, "stderr", None)


@pytest.mark.parametrize(
    "how",
    [
        "function",
        "environment",
        "hub's variable",
        "hub's function",
        "transformers' function",
        "second process",
        "no terminal",
        "no stderr",
    ],
)
def test_without_a_bar_the_items_are_themselves(how, watched, monkeypatch):
    watched(Terminal())
    switched_off(how, monkeypatch)
    items = [1, 2]
    assert track(items, "Hidden") is items
    is_switched_off = how in ("function", "environment")
    assert (track(items, "Hidden", wanted=True) is items) is is_switched_off


def test_the_switch_shows_bars_in_logs_and_refuses_other_values(watched):
    log = watched(io.StringIO())
    assert peft.show_progress(True) is None
    list(track(range(4), "Logged"))
    assert "Logged" in log.getvalue() and peft.show_progress() is True
    with pytest.raises(peft.PeftError, match="`enabled`='off' must be True, False or None"):
        peft.show_progress("off")
    assert peft.show_progress() is None


def test_long_work_shows_its_bars(watched, tmp_path):
    terminal = watched(Terminal())
    config = peft.PolyConfig(r=2, n_tasks=2, target_modules=["0", "2"])
    model = peft.get_peft_model(mlp(), config)
    x = torch.randn(3, 8)
    model.fit_task(1, lambda: model(x, task_ids=torch.ones(3, dtype=int)).square().mean(), steps=2)
    model.add_adapter("other", peft.PolyConfig(r=2, n_tasks=2, target_modules=["0", "2"]))
    peft.convert_to_lora(model, task_id=1, adapter_name="default")
    peft.convert_to_poly(model, ["default", "other"], task_id=0)
    model.save_pretrained(tmp_path)
    model.merge_adapter(["default"], task_id=1)
    model.unmerge_adapter()
    model.merge_and_unload(task_id=0)
    for words in (
        "Making the adapter",
        "Fitting task 1",
        "Converting to LoRA",
        "Converting to Poly",
        "Saving",
        "Merging",
        "Unmerging",
        "Unloading",
    ):
        assert words in terminal.getvalue(), words


def test_a_bar_that_was_asked_for_shows_anywhere(watched):
    log = watched(io.StringIO())
    model = peft.get_peft_model(mlp(), peft.LoraConfig(r=2, target_modules=["0"]))
    model.merge_and_unload(progressbar=True)
    assert "Unloading and merging model" in log.getvalue()
