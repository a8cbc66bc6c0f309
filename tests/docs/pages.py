"""What a Markdown page says: links, anchors, lines of shell code, Python programs."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
GENERATED = ROOT / "docs" / "reference" / "generated"
"""Pages that `make docs` writes and whose links it checks; they may not be there."""
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(path for path in sorted((ROOT / "docs").rglob("*.md")) if GENERATED not in path.parents),
]
FENCE = re.compile(r"^(`{3,})([^\n]*)\n(.*?)^\1 *$", re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """The text without fenced and indented code."""
    return re.sub(r"(?m)(?<=\n\n)(?: {4}.*\n)+", "", FENCE.sub("", text))


def links(text: str) -> list[str]:
    """The targets of links and images."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`(?!\])", "", prose(text)))


def anchors(text: str) -> set[str]:
    """The anchors of headings, as GitHub and MyST make them."""
    headings = re.findall(r"(?m)^#+ +(.+?)\s*$", prose(text))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def shell_lines(text: str) -> list[str]:
    """The commands of indented blocks and of fences marked `console` or `sh`; continued lines are joined."""
    fenced = [code for _, kind, code in FENCE.findall(text) if kind in ("console", "sh")]
    indented = re.findall(r"(?m)(?<=\n\n)(?: {4}.*\n?)+", FENCE.sub("", text))
    code = "\n".join([*fenced, *indented]).replace("\\\n", " ")
    return [line.strip() for line in code.splitlines() if line.strip()]


def clvr_commands(text: str) -> Iterator[list[str]]:
    """The arguments of every whole `clvr` command: one with `...` or a placeholder is left out."""
    for line in shell_lines(text):
        if re.match(r"clvr \w", line) and not re.search(r"\.\.\.|<\w+>|\[|\$", line):
            yield shlex.split(line, comments=True)[1:]


def programs(text: str) -> list[str]:
    """The blocks of Python code, without the cells of notebooks."""
    return [code for _, kind, code in FENCE.findall(text) if kind == "python"]


def cells(text: str) -> list[str]:
    """The cells of a notebook, without their options."""
    found = [code for _, kind, code in FENCE.findall(text) if kind == "{code-cell}"]
    return [re.sub(r"\A(?::\w+:.*\n)+", "", code) for code in found]
