"""Griffe extension: translates Keras' docstrings into the style that griffe parses.

They differ from Google's style in three ways: `Call arguments:` is a separate section,
the code after `Example:` is not indented, and `Letters:`, the legend of the shapes, is
a paragraph.
"""

from __future__ import annotations

import re
from typing import Any

import griffe
from typing_extensions import override

_EXAMPLE = re.compile(r"^Example:\n\n(?=>>> )", re.MULTILINE)
_LEGEND = re.compile(r"^(Letters|Sources?):(?= \S)", re.MULTILINE)


def translate(text: str) -> str:
    """Returns a docstring, its lines cleaned of indentation, as griffe reads it."""
    text = text.replace("\nCall arguments:\n", "\nOther Args: Call arguments:\n")
    text = _LEGEND.sub(r"**\1:**", text)
    parts = _EXAMPLE.split(text, maxsplit=1)
    if len(parts) == 1:
        return text
    before, code = parts
    indented = "\n".join(f"    {line}".rstrip() for line in code.split("\n"))
    return f"{before}Examples:\n{indented}"


class KerasDocstrings(griffe.Extension):
    """Translates every docstring of the package once it is loaded."""

    @override
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = translate(obj.docstring.value)
