"""docs/reference/models-and-tasks.md: its commands parse, and it has the models, pipelines and recipes of the code."""

import inspect
import re
import shlex

import pytest

from clvr_jax.cli import parse
from clvr_jax.convert.architectures import ARCHITECTURES
from clvr_jax.merging.planning import plan_merge
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.registry import FLUX2_CLASS, MODELS, PIPELINES, SHIPPED
from clvr_jax.pipelines.sdxl import SDXLPipeline
from tests.docs.pages import ROOT

PAGE = (ROOT / "docs" / "reference" / "models-and-tasks.md").read_text()
COMMANDS = {
    "Sample": {"sample"},
    "Edit": {"sample"},
    "Closed loop": {"generate"},
    "Verify": {"verify"},
    "Pretraining": {"train"},
    "SFT": {"train"},
    "LoRA": {"train"},
    "RL": {"train"},
    "Distill": {"train"},
    "Merge": {"merge"},
    "Convert": {"convert"},
    "Serve": {"serve"},
    "Plan": {"plan"},
    "Synthesize data": {"synth"},
}
"""Task -> the command that does it."""


def rows(table):
    return [
        [cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines() if "---" not in line
    ]


def tables(text):
    return re.findall(r"(?m)(?:^\|.*\n?)+", text)


HEAD, *SECTIONS = re.split(r"(?m)^## (.*)\n", PAGE)
SECTIONS = dict(zip(SECTIONS[::2], SECTIONS[1::2], strict=True))
FOUND = {
    name: {task: re.findall(r"`(clvr [^`]+)`", cell) for task, cell in rows(tables(text)[0])[1:]}
    for name, text in SECTIONS.items()
}
"""Model -> task -> commands."""
EVERY_COMMAND = [
    (model, task, line) for model, tasks in FOUND.items() for task, lines in tasks.items() for line in lines
]


def grid():
    """Task -> model -> cell of the first table."""
    models, *found = rows(tables(HEAD)[0])  # the corner is empty
    return {task: dict(zip(models, cells, strict=True)) for task, *cells in found}


def test_a_cell_has_a_command_or_a_reason():
    assert list(grid()) == list(COMMANDS)
    for task, cells in grid().items():
        assert list(cells) == list(SECTIONS)
        for model, cell in cells.items():
            has_command = bool(FOUND[model].get(task))
            assert (cell == "✓") is has_command, (model, task)
            assert has_command or 2 <= len(cell.split()) <= 5, (model, task)


@pytest.mark.parametrize(("model", "task", "line"), EVERY_COMMAND)
def test_a_command_parses_and_does_what_its_row_says(model, task, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)[1:]
    assert words[0] in COMMANDS[task]
    parse(words)
    assert ("--image" in words) is (task == "Edit")


def test_every_recipe_has_a_command():
    recipes = {path.stem for path in (ROOT / "configs").glob("*.py") if "\nCONFIG = " in path.read_text()}
    named = {line.split()[2] for _, task, line in EVERY_COMMAND if COMMANDS[task] & {"train", "plan", "synth"}}
    assert named == recipes


def test_every_class_of_models_and_pipelines_and_every_shipped_name_is_there():
    for names in ({architecture.torch_class for architecture in ARCHITECTURES}, PIPELINES, MODELS):
        assert [name for name in names if f"`{name}`" not in PAGE] == []


def test_only_a_pipeline_that_takes_images_edits_and_is_in_the_loop():
    takes = {name: "images" in inspect.signature(kind.__call__).parameters for name, kind in
             (("FLUX.2", Flux2Pipeline), ("Stable Diffusion", SDXLPipeline))}  # fmt: skip
    assert takes == {"FLUX.2": True, "Stable Diffusion": False}
    for model, text in SECTIONS.items():
        if "Pipeline`" in text:
            assert all(
                (task in FOUND[model]) is (f"`{FLUX2_CLASS}`" in text) for task in ("Edit", "Closed loop", "Serve")
            )


@pytest.mark.parametrize("part", ["", "controller"])
def test_pipelines_and_controllers_can_be_merged(part):
    source = SHIPPED / "shapes-tiny" / part
    assert plan_merge(source, source, source).base.directory == source / ("" if part else "transformer")
