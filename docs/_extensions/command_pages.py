"""Writes a page for each command of `clvr` and for each recipe, from the parsers that print --help."""

import argparse
import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from generated import write_pages
from sphinx.application import Sphinx

import clvr_jax.configs
from clvr_jax.arguments import argument_parser
from clvr_jax.cli import leaf_commands
from clvr_jax.commands.recipes.recipe_command import RecipeCommand, command_on_recipe
from clvr_jax.commands.recipes.synthesis import Synth
from clvr_jax.commands.recipes.training import Train


def command_pages() -> Iterator[tuple[str, str]]:
    """Yields name and Markdown of the page of each command."""
    for words, kind in leaf_commands():
        parts = [f"# `{words}`", _paragraphs(kind.__doc__), f"```console\n{kind.EXAMPLE}\n```"]
        if issubclass(kind, RecipeCommand):
            parts.append("The fields of the recipe are options, too: [recipes](../recipes/index.md) lists them.")
        yield words.replace("clvr ", "", 1).replace(" ", "-"), "\n\n".join([*parts, *_options(argument_parser(kind))])


def recipe_pages() -> Iterator[tuple[str, str]]:
    """Yields name and Markdown of the page of each recipe."""
    for path in sorted(Path(clvr_jax.configs.__path__[0]).glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if "\nCONFIG = " not in source:
            continue
        command = Synth if "\ndef worker_context(" in source else Train
        on_recipe, _, example = command_on_recipe(command, path.stem)
        of_command = {action.dest for action in argument_parser(command)._actions}
        yield (
            path.stem,
            "\n\n".join(
                [
                    f"# `{path.stem}`",
                    _docstring(ast.get_docstring(ast.parse(source)) or ""),
                    f"```console\n{example}\n```",
                    *_options(argument_parser(on_recipe), of_command),
                ]
            ),
        )


def _options(parser: argparse.ArgumentParser, without: set[str] | None = None) -> Iterator[str]:
    """Yields the options of a parser, by group, as definition lists."""
    for group in parser._action_groups:
        actions = [
            action for action in group._group_actions if action.dest != "help" and action.dest not in (without or ())
        ]
        if not actions:
            continue
        yield f"## {(group.title or 'options').capitalize()}"
        if group.description:
            yield _text(group.description)
        for action in actions:
            metavar = action.metavar if isinstance(action.metavar, str) else ""
            name = " ".join([*(action.option_strings[-1:] or [action.dest]), *([metavar] if metavar else [])])
            yield f"`{metavar or action.dest if not action.option_strings else name}`\n: {_text(action.help or '')}"


def _text(text: str) -> str:
    """Returns the text of an option in one line, with nothing in it that Markdown would interpret."""
    text = re.sub(r" *\((?:default: (?:None|False|)|required)\)$", "", " ".join(text.split()))
    text = re.sub(r"\(default: (.*)\)$", r"Default: \1.", text)
    return re.sub(r"([\\*_<\[\]`$])", r"\\\1", text)


def _paragraphs(text: str | None) -> str:
    return inspect.cleandoc(text or "").replace("<", "\\<")


def _docstring(text: str) -> str:
    """Returns the docstring of a recipe with its commands as blocks of code; dollars are no mathematics."""
    text = re.sub(
        r"(?m)^(?:clvr .*\n?)+", lambda lines: "\n" + re.sub(r"(?m)^", "    ", lines[0].rstrip()) + "\n\n", text
    )
    return re.sub(r"(?m)^(?! {4})(.*)$", lambda line: re.sub(r"([$<*])", r"\\\1", line[0]), text)


def _write(app: Sphinx) -> None:
    reference = Path(app.srcdir) / "reference" / "generated"
    write_pages(
        reference / "commands",
        ".md",
        "# Command line\n\nEvery command prints this text with `--help`, and takes `--json` and `--debug`.",
        dict(command_pages()),
    )
    write_pages(
        reference / "recipes",
        ".md",
        "# Recipes\n\nA recipe is a Python file with the values of a run. "
        "`clvr train NAME` runs it, and each of its fields is an option.",
        dict(recipe_pages()),
    )


def setup(app: Sphinx) -> dict[str, object]:
    """Writes the pages before they are read."""
    app.connect("builder-inited", _write)
    return {"parallel_read_safe": True}
