# SPDX-License-Identifier: Apache-2.0
"""Extension of the documentation site: bring docstrings into the form that its parser knows.

`Example:` becomes the section of examples, so that doctests become code. Names of several fields
that share a description are joined into one line.
"""

import re

import griffe

NAMES_GO_ON = re.compile(r"^(    (?:\w+, ?)+)\n    (?=\w)", re.MULTILINE)


class HouseStyle(griffe.Extension):
    """Rewrite docstrings before they are parsed."""

    def on_instance(self, *, obj, **kwargs):
        """Rewrite the docstring of one object."""
        if obj.docstring:
            text = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
            while (joined := NAMES_GO_ON.sub(r"\1 ", text)) != text:
                text = joined
            obj.docstring.value = text
