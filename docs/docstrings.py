"""Docstrings as the code has them, to Markdown: "name: what it is" becomes an item of a list."""

import re
from typing import Any

import griffe

ITEM = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*): (\S.*)")


class Items(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(docstring: str) -> str:
    """Items begin where a line begins "name: " or "name, name: ", and take the lines below that are indented."""
    lines: list[str] = []
    inside = False
    for line in docstring.splitlines():
        item = ITEM.fullmatch(line)
        if item or (inside and line and not line.startswith(" ")):
            lines += [] if item and inside else [""]
            inside = bool(item)
        lines.append(f"- `{item[1]}`: {item[2]}" if item else ("  " if inside and line else "") + line)
    return "\n".join(lines)
