"""Reads the pages (README and its neighbours, docs/, the model card): their links, anchors and fenced blocks."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
CARD = ROOT / "turbojax" / "shapes" / "model" / "README.md"
MEASUREMENTS = ROOT / "benchmarks" / "README.md"
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").rglob("*.md")),
    CARD,
]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```\n", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A fenced block, from its first line on; `language` is the word behind the fence, "" where there is none."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, fence.start()) + 2, fence[2], re.sub(f"^{fence[1]}", "", fence[3], flags=re.M))
        for fence in FENCE.finditer(text)
    ]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("\n", page.read_text(encoding="utf-8"))


def links(page: Path) -> list[str]:
    """The targets of a page's links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def code(page: Path) -> list[str]:
    """What a page's sentences have between backticks, a space for a line's end."""
    return [" ".join(words.split()) for words in re.findall(r"`([^`]+)`", prose(page))]


def anchors(page: Path) -> set[str]:
    """The names of a page's headings in links, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def indented(page: Path) -> list[str]:
    """The first lines of blocks that are marked by indentation alone, which nothing tells the language of."""
    return re.findall(r"(?<=\n\n) {4}(?![ *-]).*", prose(page))
