"""The help of every command, recipe and script: each option has a sentence, and each example that is printed parses."""

import importlib
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clvr_jax import scripts
from clvr_jax.arguments import argument_parser
from clvr_jax.cli import leaf_commands, main, parse
from clvr_jax.commands.recipes.recipe_command import RecipeCommand, command_on_recipe
from clvr_jax.commands.recipes.synthesis import Synth
from clvr_jax.commands.recipes.training import Plan, Train
from clvr_jax.errors import ClvrError
from clvr_jax.files.recipe_files import find_recipe, import_recipe

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.py") if "\nCONFIG = " in path.read_text())
SCRIPTS = [
    *(f"clvr_jax.scripts.{path.stem}" for path in sorted(Path(scripts.__path__[0]).glob("[a-z]*.py"))),
    "clvr_jax.data.shapes_proxies",
    "clvr_jax.data.trajectories.dataset",
]
# Fields of `Prices` and `SynthConfig`, whose documentation tyro cannot read yet.
WITHOUT_HELP = re.compile(r"--.*\bprices\.(input-tokens|output-tokens|picture)|--synth\.(max-turns|max-pictures)")


def commands_of(recipe: str) -> list[type[RecipeCommand]]:
    text = (CONFIGS / f"{recipe}.py").read_text()
    return [Synth] if "\ndef worker_context(" in text else [Train, Plan]


def without_sentence(parsed: Callable[..., Any]) -> list[str]:
    """Options whose help, without the default that tyro adds, does not end as a sentence does."""
    found = []
    for action in argument_parser(parsed)._actions:
        words = re.sub(r"\((default|required|optional|sets|repeatable)\b.*", "", action.help or "", flags=re.S).strip()
        if action.dest != "help" and not words.endswith("."):
            found.append(action.option_strings[-1] if action.option_strings else action.dest)
    return found


def printed_example(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The arguments of the example that --help prints."""
    with pytest.raises(SystemExit):
        parse([*arguments, "--help"])
    found = re.search(r"Example:\n +clvr (.*)", capsys.readouterr().out)
    assert found is not None
    return shlex.split(found[1])


@pytest.mark.parametrize(("prog", "kind"), leaf_commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_option_of_a_command_has_a_sentence_and_its_example_parses(prog, kind, capsys):
    assert without_sentence(kind) == []
    command = parse(printed_example(prog.split()[1:], capsys))
    assert isinstance(command, kind)


@pytest.mark.parametrize("name", RECIPES)
def test_every_option_of_a_recipe_has_a_sentence_and_its_example_parses(name, capsys):
    for kind in commands_of(name):
        on_recipe, _, _ = command_on_recipe(kind, name)
        lacking = without_sentence(on_recipe)
        assert [option for option in lacking if not WITHOUT_HELP.fullmatch(option)] == []
        command = parse(printed_example([kind.NAME, name], capsys))
        assert isinstance(command, kind)


@pytest.mark.parametrize("module", SCRIPTS)
def test_every_option_of_a_script_has_a_sentence(module):
    assert without_sentence(importlib.import_module(module).main) == []


def test_recipes_are_found_by_name_from_any_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert import_recipe(find_recipe("pprl_shapes")).CONFIG.model == "shapes-tiny-sft"
    command = parse(["train", "pprl_shapes", "--train.epochs", "3"])
    assert command.config_with_overrides.train.epochs == 3

    assert main(["train", "pprl_shaped"]) == 1
    line = capsys.readouterr().err
    assert "pprl_shaped" in line
    assert all(name in line for name in RECIPES)
    assert "paper" not in line  # a script, which cannot be trained


def test_a_file_comes_before_a_recipe_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("shapes_vae").write_text("not Python")
    assert find_recipe("shapes_vae") == Path("shapes_vae")
    with pytest.raises(ClvrError, match="no such recipe"):
        import_recipe(find_recipe("configs/absent.py"))
