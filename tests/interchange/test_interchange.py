# SPDX-License-Identifier: Apache-2.0
"""Adapters written by this package are read by Hugging Face PEFT, and the other way round, to the
same outputs and gradients.

`PEFT_INTERCHANGE_SEED` makes other random adapters.
"""

import json
import os

import pytest
import torch
from interchange_cases import make_cases
from packaging.version import parse
from safetensors.torch import load_file

import peft

pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("interchange")]

PEER_VERSION = "0.21.2"
VERSIONS = {"ours": peft.__version__, "theirs": PEER_VERSION}
CASES = {case["id"]: case for case in make_cases(int(os.environ.get("PEFT_INTERCHANGE_SEED", "0")))}
EXACT, ROUNDED, SPARSE, CONVERTED = 1e-9, 1e-6, 1e-5, 1e-4


@pytest.fixture(scope="session")
def results(packages, tmp_path_factory):
    """What each package measured, by what it did, who it is, and case; and the folders that each
    wrote to.
    """
    root = tmp_path_factory.mktemp("interchange")
    found = {"folders": {name: root / name for name in packages}}
    for verb, source in (
        ("write", {"ours": "ours", "theirs": "theirs"}),
        ("read", {"ours": "theirs", "theirs": "ours"}),
    ):
        for name, package in packages.items():
            package.order(verb, list(CASES.values()), str(found["folders"][source[name]]))
        for name, package in packages.items():
            result = package.answer(verb)
            # The end after `+` may be that of an earlier installation.
            assert parse(result["version"]).public == parse(VERSIONS[name]).public
            found[verb, name] = result["cases"]
    return found


def outcome(results, verb, package, case):
    """One result; that there is one is part of the test."""
    result = results[verb, package][case]
    assert "error" not in result, f"{package}, asked to {verb} {CASES[case]}:\n{result['error']}"
    return result


def is_wrong_there(case, key):
    """Whether a gradient is one that the peer gets wrong: of LoHa's `w1_a` and `w2_a` in Tucker's
    form, for which it takes the other side's `t` and `w_b` in place of their own; of the `out_proj`
    of an attention, whose delta it adds twice, but differentiates once.
    """
    if "out_proj.lora_" in key:
        return True
    tucker = any(config.get("use_effective_conv2d") for config in CASES[case]["adapters"].values())
    return tucker and key.endswith(("hada_w1_a", "hada_w2_a"))


def assert_same(found, expected, case):
    """Two measurements agree, in every tensor there is."""
    # Weights of chosen vectors are float32 and go through a logarithm and back.
    sparse = any(
        config.get("save_only_topk_weights") for config in CASES[case]["adapters"].values()
    )
    # LoHa's scale is a number of single precision there.
    exact = ROUNDED if CASES[case]["config_class"] == "LoHaConfig" else EXACT
    assert found.keys() == expected.keys()
    for name, theirs in expected.items():
        if name == "warnings":
            continue
        if isinstance(theirs, dict):
            assert found[name].keys() == theirs.keys()
            own = [
                key
                for key in theirs
                if not (name.startswith("gradients") and is_wrong_there(case, key))
            ]
            pairs = [(f"{name}: {key}", found[name][key], theirs[key]) for key in own]
        else:
            pairs = [(name, found[name], theirs)]
        limit = CONVERTED if name == "output as LoRA" else SPARSE if sparse else exact
        for label, ours, tensor in pairs:
            assert ours.shape == tensor.shape, f"{label} of {CASES[case]}"
            if tensor.numel():
                ours, tensor = ours.double(), tensor.double()
                difference, size = (ours - tensor).abs().max(), tensor.abs().max()
                assert difference <= limit * (1 + size), (
                    f"{label} differs by {difference:.2g} of {size:.2g}: {CASES[case]}"
                )


@pytest.mark.parametrize("case", CASES)
def test_both_write_the_same_files(results, case):
    outcome(results, "write", "ours", case), outcome(results, "write", "theirs", case)
    for adapter in CASES[case]["adapters"]:
        fields, tensors = {}, {}
        for package, folder in results["folders"].items():
            folder = folder / case / ("" if adapter == "default" else adapter)
            fields[package] = json.loads((folder / "adapter_config.json").read_text())
            if CASES[case]["file"] == "safetensors":
                tensors[package] = load_file(folder / "adapter_model.safetensors")
            else:
                tensors[package] = torch.load(folder / "adapter_model.bin", weights_only=True)
        for name in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
            for package in VERSIONS:
                value = fields[package].get(name)
                fields[package][name] = sorted(value) if isinstance(value, list) else value
        assert fields["ours"].pop("peft_version") == peft.__version__
        assert fields["theirs"].pop("peft_version") == PEER_VERSION
        if (
            CASES[case]["adapters"][adapter]["target_modules"] == "all-linear"
        ):  # the names are written out, at different lengths
            assert fields["ours"].pop("target_modules")
            assert fields["theirs"].pop("target_modules")
        assert fields["ours"] == fields["theirs"]
        # With all biases, the peer repeats those of modules that are trained whole, and adds the
        # frozen ones.
        repeated = {
            key
            for key in tensors["theirs"]
            if key.endswith((".modules_to_save.bias", ".original_module.bias"))
        }
        assert tensors["ours"].keys() == tensors["theirs"].keys() - repeated
        for key, tensor in tensors["ours"].items():
            assert tensor.dtype == tensors["theirs"][key].dtype
            torch.testing.assert_close(
                tensor,
                tensors["theirs"][key],
                rtol=0,
                atol=1e-6 if key.endswith("_topk_weights") else 0,
            )


@pytest.mark.parametrize("case", CASES)
def test_both_compute_the_same(results, case):
    assert_same(
        outcome(results, "write", "ours", case), outcome(results, "write", "theirs", case), case
    )


@pytest.mark.parametrize(("reader", "writer"), [("ours", "theirs"), ("theirs", "ours")])
@pytest.mark.parametrize("case", CASES)
def test_one_reads_what_the_other_wrote(results, case, reader, writer):
    read, written = outcome(results, "read", reader, case), outcome(results, "write", writer, case)
    assert_same(read, written, case)
    # A config may earn a remark, about a pattern that fits nothing for example; that another
    # package wrote it may not.
    remarks = {
        text for text in read["warnings"] if "loaded from a compact file" not in text
    }  # as of its own
    assert remarks <= set(outcome(results, "write", reader, case)["warnings"])
