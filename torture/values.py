# SPDX-License-Identifier: Apache-2.0
"""Values that files should not have."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import peft
from peft.utils.peft_types import PeftType

# Regular expressions that take a matcher exponential or cubic time, are no expressions, are valid
# alone and not inside another, or take the memory of their compiler.
PATTERNS = (
    "(a+)+$", r"(.*)*!", r"(\w+\.?)+!", r"([a-z0-9.]*)*x", ".*" * 12 + "!", "(.|.)*!",
    "(?:(?:.+)+)+!", r"(.+)\1+!", "(?i)0", "(?x) 0 #", "(?s:.)(?P<a>.)(?P=a)", "a{99999999999}",
    "a{2,1}", "(" * 200 + ")" * 200, "(" * 20_000, "[[a]", "(?P<1>a)", "(?(1)a|b)", "(?<=a+)b",
    "[^", "*", "\\", "|", "()", "0|2", ".", "^0", "^0$", "^0(\\..*)?", "0)(?:", "\\Z", "(?!)",
    "(?=0)0", "[0-2]", "x{1000}{1000}{1000}",
)  # fmt: skip

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 4, 7, 16, 100, 1000, 4096, 7000, 10**6, 10**9),
    *(0.5, -0.0, 1.0, 2.5, 1e-45, 1e308, -1e308, math.nan, math.inf, -math.inf),
    *(2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 2**100, -(2**63), 10**400),
    *(
        "",
        " ",
        "0",
        "1",
        "default",
        "none",
        "all",
        "all-linear",
        "x" * 300,
        "0.weight",
        "base_layer",
    ),
    *("../x", "../../etc", "/etc/passwd", "/dev/zero", "..", ".", "/", "CON", "a\0b", "\x00", "~"),
    *("é", "\ud800", "\u202e", "a\nb", "a/b", "user/name", "https://localhost/x", "file:///etc"),
    *(
        [],
        [[]],
        [0],
        [1, "2"],
        ["0"],
        ["0", "2"],
        ["2", "0"],
        [0, 1],
        [None],
        ["x"] * 100,
        [[0, 1]],
    ),
    *({}, {"0": 1}, {"": None}, {"a": {"b": []}}, {"0": 2**40}, {"0": "a"}, {"default": 1}),
    *({"0": 1.5, "2": 3}, {"2": 1}, {"(a+)+$": 2}, {"source": "."}, {"e": "."}, {"0.weight": 2}),
    *(str(kind.value) for kind in PeftType if kind.value[0] in "LPRVX"),
    *("SEQ_CLS", "CAUSAL_LM", "auto", "int8", "uint16", "bfloat16", "float16", "float32", "linear"),
    *("pissa", "pissa_niter_4", "eva", "olora", "corda", "gaussian", "orthogonal", "loftq"),
    *("lora_only", "mope", "token", "sample", "task", "fixed", "learned", "arrow", "phatgoose"),
)

# Text of JSON that no writer of JSON writes, and some that one does.
RAW = (
    *(b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"1E400", b"0.1e-999", b"-0", b"01"),
    *(b"9" * 4000, b"9" * 5000, b"-" + b"9" * 100_000, b"1." + b"0" * 5000, b"9" * 400 + b".5"),
    *(b"[" * 10, b"[" * 2000, b"[" * 100_000, b"[" * 3000 + b"]" * 3000, b'{"a":' * 5000 + b"1"),
    *(b'{"a":' * 500 + b"1" + b"}" * 500, b"[" * 900 + b"]" * 900, b'"' + b"a" * 100_000 + b'"'),
    *(b'"\\ud800"', b'"\\udfff\\ud800"', b'"\\u0000"', b'"\xed\xa0\x80"', b'"\xff"', b'"\n"'),
    *(b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\x00", b"/* */", b"//", b",", b"}", b"]", b"\n"),
    *(b"", b"null", b"true", b"tru", b'"', b"'a'", b"{}", b"[]", b"{,}", b"[1,]", b'{"a":1,}'),
    *(b'{"a":1,"a":2}', b'"a" "b"', b"0x10", b"1_000", b"+1", b".5", b"5."),
)  # fmt: skip

FIELDS = sorted(
    {
        item.name
        for name in ("LoraConfig", "LoHaConfig", "LoKrConfig", "PolyConfig", "VBLoRAConfig")
        for item in fields(getattr(peft, name))
    }
    | {"experts", "routing", "top_k", "temperature", "save_experts", "general_experts"}
    | {"runtime_config", "megatron_core", "megatron_config", "layer_replication", "loftq_config"}
)
