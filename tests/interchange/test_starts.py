# SPDX-License-Identifier: Apache-2.0
"""Starts of LoRA from data are those of Hugging Face PEFT, and each reads the other's files."""

import pytest
import torch
from interchange_starts import BASES, SHARED

pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("interchange")]

CLOSE = {"atol": 2e-4, "rtol": 2e-3}


@pytest.fixture(scope="module")
def results(packages, tmp_path_factory):
    """What each package made, and what it read of the other."""
    root = tmp_path_factory.mktemp("starts")
    for name, package in packages.items():
        package.order("start", str(root / name))
    found = {name: package.answer("start") for name, package in packages.items()}
    packages["ours"].order("read_starts", str(root / "theirs"), "converted")
    packages["theirs"].order("read_starts", str(root / "ours"), "plain")
    return found, {name: package.answer("read_starts") for name, package in packages.items()}


@pytest.mark.parametrize("name", BASES)
def test_a_start_is_that_of_the_peer(results, name):
    ours, theirs = dict(results[0]["ours"][name]), dict(results[0]["theirs"][name])
    if name == "lora_ga":  # its `A` and `B` are of other singular values, and defined but for signs
        del ours["trained"], theirs["trained"]
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("name", BASES)
def test_each_reads_the_others_file(results, name):
    made, read = results
    torch.testing.assert_close(read["theirs"][name], made["ours"][name]["trained"], **CLOSE)
    torch.testing.assert_close(read["ours"][name], made["theirs"][name]["trained"], **CLOSE)


def test_a_file_of_covariances_is_read(results):
    made, read = results
    for name in ("ours", "theirs"):
        expected = made[name]["corda ipm"]["factors"]
        torch.testing.assert_close(read[name]["from covariance"], expected, **CLOSE)


@pytest.mark.parametrize("name", SHARED)
def test_layers_that_share_weights(results, name):
    made, read = results
    for outputs in (made["theirs"], read["ours"], read["theirs"]):
        torch.testing.assert_close(outputs[name], made["ours"][name], **CLOSE)
