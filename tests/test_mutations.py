# SPDX-License-Identifier: Apache-2.0
"""The faults that mutation testing plants: each changes what its text says, and names stay."""

import ast

from torture.mutations import mutants, mutated

SOURCE = '''
LIMIT = 3

def first(a, b=1, *, c=True):
    """Docstring."""
    if a < b and not c:
        raise ValueError(f"{a + 1} is too small")
    with lock:
        a += 1
    try:
        write(a)
    except (OSError, ValueError):
        return None
    return [x for x in a if x]

class Second:
    def method(self) -> "int":
        assert self
        return super().method() + len("two words")
'''
EXPECTED = {
    ("first", "constant", "1", "2"),
    ("first", "constant", "True", "False"),
    ("first", "and/or", "a < b and (not c)", "a < b or not c"),
    ("first", "comparison", "a < b", "a <= b"),
    ("first", "negation", "not c", "c"),
    ("first", "removed raise", "raise ValueError(f'{a + 1} is too small')", ""),
    ("first", "wrong exception", "raise ValueError(f'{a + 1} is too small')", "raise RuntimeError"),
    ("first", "removed context", "with lock: a += 1", "a += 1"),
    ("first", "removed assignment", "a += 1", ""),
    ("first", "arithmetic", "a += 1", "a -= 1"),
    ("first", "removed call", "write(a)", ""),
    ("first", "removed handler", "except (OSError, ValueError)", "except (ValueError,)"),
    ("first", "removed handler", "except (OSError, ValueError)", "except (OSError,)"),
    ("first", "returned None", "return [x for x in a if x]", "return None"),
    ("first", "condition", "x", "not x"),
    ("Second.method", "returned None", "return super().method() + len('two words')", "return None"),
    (
        "Second.method",
        "arithmetic",
        "super().method() + len('two words')",
        "super().method() - len('two words')",
    ),
}


def test_every_fault_is_planted_as_it_is_named():
    found = list(mutants("x.py", SOURCE))
    assert {(m.function, m.kind, m.before, m.after) for m in found} == EXPECTED
    assert len(found) == len(EXPECTED) + 1  # `1` is a default and is added
    plain = ast.unparse(ast.parse(SOURCE))
    texts = set()
    for mutant in found:
        tree, function = mutated(SOURCE, mutant.number)
        compile(tree, "x.py", "exec")
        texts.add(ast.unparse(tree))
        is_default = (mutant.before, mutant.line) in (("1", 4), ("True", 4))
        assert (function is not None) == is_default
    assert plain not in texts and len(texts) == len(found)


def test_a_name_is_that_of_the_function_wherever_it_stands():
    names = {m.name for m in mutants("x.py", SOURCE)}
    moved = {m.name for m in mutants("x.py", "\n\n\n" + SOURCE.replace("LIMIT = 3", "LIMIT = 4"))}
    assert moved == names and len(names) == len(EXPECTED) + 1
    changed = {m.name for m in mutants("x.py", SOURCE.replace("x for x", "y for y"))}
    assert len(changed & names) == 2  # those of the method
