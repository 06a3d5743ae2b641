"""Strings of a stranger in Markdown, YAML and BibTeX: they stay text, whatever they are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from softcache.errors import printable

_RUN = re.compile("`+")


def line(text: str, most: int = 4096) -> str:
    """Up to ``most`` printable characters in one line, without space around them."""
    seen = printable(text[: most + 1]).strip()
    return seen if len(seen) <= most else seen[: most - 1] + "…"


def code(text: str, most: int = 4096) -> str:
    """A code span, in which Markdown reads nothing."""
    seen = line(text, most)
    if not seen:
        return "(empty)"
    fence = "`" * (_longest(seen) + 1)
    room = " " * (seen[0] == "`" or seen[-1] == "`")
    return f"{fence}{room}{seen}{room}{fence}"


def block(language: str, lines: Sequence[str]) -> str:
    """A fenced block of code."""
    seen = [printable(one) for one in lines]
    fence = "`" * max(3, *(_longest(one) + 1 for one in seen))
    return "\n".join([f"{fence}{language}", *seen, fence])


def _longest(text: str) -> int:
    return max((len(run) for run in _RUN.findall(text)), default=0)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Of cells that are Markdown of ours: a ``|`` in them is escaped, which helps only where no backslash stands before."""
    lines = [
        " | ".join(cell.replace("|", r"\|") for cell in cells) for cells in (head, ["---"] * len(head), *rows)
    ]
    return "\n".join(f"| {one} |" for one in lines)


def bullets(lines: Iterable[str]) -> str:
    """A list of what is Markdown of ours."""
    return "\n".join(f"- {one}" for one in lines)


def folded(title: str, text: str) -> str:
    """What is shown when somebody asks for it; both are Markdown of ours."""
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"


def header(values: Mapping[str, Any]) -> str:
    """YAML between two lines of ``---``. Strings are made single lines: nothing in them ends it."""
    seen = {
        key: [line(v) for v in value] if isinstance(value, list) else line(value)
        for key, value in values.items()
    }
    return f"---\n{yaml.safe_dump(seen, sort_keys=False, allow_unicode=True, width=1 << 16)}---"


def bibtex(text: str) -> str:
    """A value between braces: what has a meaning there is left out."""
    return re.sub(r"[^\w .,:;()+/-]|_", " ", line(text))
