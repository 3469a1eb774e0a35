"""What the tests read in the pages: blocks of code with their place, links and headings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from helpers import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A block of code: its language, its text, and the line of the page on which the text begins."""

    language: str
    text: str
    line: int


def blocks_in(text: str) -> list[Block]:
    """The blocks of a page in order."""
    return [Block(*found.groups(), text.count("\n", 0, found.start()) + 2) for found in FENCE.finditer(text)]


def runs_with_outputs(blocks: list[Block]) -> list[tuple[Block, str | None]]:
    """The Python blocks, each with what it has to print: a `text` block that follows it, else None."""
    followers = [*blocks[1:], None]
    return [
        (block, after.text if after and after.language == "text" else None)
        for block, after in zip(blocks, followers)
        if block.language == "python"
    ]


def links_in(text: str) -> list[str]:
    """The targets of all links and pictures of a page that stay in the repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", FENCE.sub("", text)))
    return [target for target in targets if not target.startswith(("http:", "https:"))]


def anchors_in(text: str) -> set[str]:
    """The anchors of a page's headings, as code hosts and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path, text: str) -> list[str]:
    """The links of a page whose file or anchor does not exist."""
    broken = []
    for link in links_in(text):
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        if not target.exists() or (anchor and anchor not in anchors_in(text if not file else target.read_text())):
            broken.append(link)
    return broken
