"""Writes a directory of generated pages with its index; pages that did not change keep their time, for fast builds."""

from collections.abc import Mapping
from pathlib import Path


def write_pages(directory: Path, suffix: str, head: str, pages: Mapping[str, str]) -> None:
    """Writes the pages and an index, and removes those of an earlier build that are no more.

    Args:
      directory: created if it does not exist.
      suffix: .md or .rst.
      head: title and text of the index, in Markdown.
      pages: name -> text.
    """
    directory.mkdir(parents=True, exist_ok=True)
    names = "\n".join(pages)
    wanted = {f"{name}{suffix}": text for name, text in pages.items()}
    wanted["index.md"] = f"{head}\n\n```{{toctree}}\n:maxdepth: 1\n\n{names}\n```"
    for path in directory.iterdir():
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        path = directory / name
        if not path.exists() or path.read_text(encoding="utf-8") != text + "\n":
            path.write_text(text + "\n", encoding="utf-8")
