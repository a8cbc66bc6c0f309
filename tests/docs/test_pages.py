"""README and docs: links lead somewhere, commands parse, programs name what exists, and those that can run do."""

import ast
import importlib
import re
from importlib.util import find_spec

import pytest
from PIL import Image

from clvr_jax.cli import main, parse
from tests.docs.pages import GENERATED, PAGES, ROOT, anchors, cells, clvr_commands, links, programs, shell_lines

README = ROOT / "README.md"
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
AWAY = ("black-forest-labs/", "Qwen/", "checkpoints/", "openai", "diffusers", "style.safetensors")
"""What a program names that cannot run here: published weights, files of the reader, a server, PyTorch's models."""


def runs_here(program: str) -> bool:
    return not any(word in line.partition("#")[0] for line in program.splitlines() for word in AWAY)


@EACH_PAGE
def test_links_lead_to_files_and_headings_that_exist(page):
    for target in links(page.read_text()):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        if GENERATED in found.parents:
            continue
        assert found.exists(), target
        assert not anchor or anchor in anchors(found.read_text()), target


@EACH_PAGE
def test_commands_parse(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for arguments in clvr_commands(page.read_text()):
        if arguments[-1] == "--help":
            arguments = arguments[:-1]
        parse(arguments)


@EACH_PAGE
def test_programs_name_what_exists(page):
    for program in programs(page.read_text()) + cells(page.read_text()):
        for node in ast.walk(ast.parse(program)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("clvr_jax"):
                module = importlib.import_module(node.module)
                absent = [name.name for name in node.names if not hasattr(module, name.name)]
                assert all(find_spec(f"{node.module}.{name}") for name in absent), ast.unparse(node)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "clvr":
                assert hasattr(importlib.import_module("clvr_jax"), node.attr), node.attr


@EACH_PAGE
def test_files_that_a_page_names_exist(page):
    named = re.findall(
        r"`((?:clvr_jax|configs|convert|launch|scripts|tests|benchmarks|docs)/[\w/.-]+)`", page.read_text()
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("name", ["conditioning", "dswm", "loop", "sharding", "small-world"])
def test_an_explanation_has_one_idea(name):
    assert len((ROOT / "docs" / "explanation" / f"{name}.md").read_text().split()) <= 700


def test_tutorials_are_notebooks_without_outputs():
    tutorials = [page for page in PAGES if page.parent.name == "tutorials" and page.stem != "index"]
    assert len(tutorials) >= 6
    assert all(page.read_text().startswith("---\njupytext:\n") and cells(page.read_text()) for page in tutorials)
    assert not list((ROOT / "docs").rglob("*.ipynb"))


def test_the_readme_is_short():
    assert len(README.read_text().split()) <= 800


def test_the_readme_names_every_command():
    from clvr_jax.cli import COMMANDS

    assert [name for name in COMMANDS if f"`clvr {name}`" not in README.read_text()] == []


@pytest.mark.slow
def test_programs_run(tmp_path, monkeypatch):
    """Those of one page run in order, with the same names, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    ran = 0
    for page in PAGES:
        names = {"image": Image.new("RGB", (64, 64), (250, 250, 250))}
        for program in filter(runs_here, programs(page.read_text())):
            exec(compile(program, page.name, "exec"), names)
            ran += 1
    assert ran >= 3
    assert (tmp_path / "out/circles/trajectory.json").exists()
    assert (tmp_path / "out/flux/transformer").is_dir()


@pytest.mark.slow
def test_commands_of_the_readme_run(tmp_path, monkeypatch):
    """Those of the model in the package; the last accepts the image that the one before it has made."""
    monkeypatch.chdir(tmp_path)
    commands = [words for words in clvr_commands(README.read_text()) if "--model" not in words]
    assert [words[0] for words in commands] == ["generate", "sample", "verify"]
    assert [main(words) for words in commands] == [0, 0, 0]
    assert (tmp_path / "out/mine/index.html").exists()
    assert (tmp_path / "triangle.png").exists()


def test_make_targets_of_the_readme_exist():
    targets = (ROOT / "Makefile").read_text()
    named = [line.split()[1] for line in shell_lines(README.read_text()) if line.startswith("make ")]
    assert named
    assert all(f"\n{name}: " in targets for name in named)
