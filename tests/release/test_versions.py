"""The version and its date are the same wherever they are stated, and the citation is valid."""

import json
import re
import tomllib
from importlib import resources
from importlib.metadata import version
from pathlib import Path

import jsonschema
import pytest
import yaml

from clvr_jax.cli import main

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RELEASES = re.findall(r"(?m)^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})$", (ROOT / "CHANGELOG.md").read_text())


@pytest.fixture
def citation():
    return yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_the_newest_release_in_the_changelog_is_the_version(citation):
    assert RELEASES[0] == (PROJECT["version"], str(citation["date-released"]))
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]


def test_releases_are_in_order_below_what_is_unreleased():
    headings = re.findall(r"(?m)^## (.*)$", (ROOT / "CHANGELOG.md").read_text())
    assert headings == ["[Unreleased]", *(f"[{name}] - {day}" for name, day in RELEASES)]
    assert sorted(RELEASES, key=lambda release: [int(part) for part in release[0].split(".")], reverse=True) == RELEASES


def test_the_citation_is_valid(citation):
    content = json.loads(json.dumps(citation, default=str))
    schema = resources.files("check_jsonschema.builtin_schemas.vendor").joinpath("citation-file-format.json")
    validate = jsonschema.Draft7Validator(json.loads(schema.read_text())).validate
    validate(content)
    with pytest.raises(jsonschema.ValidationError):
        validate({**content, "licence": "Apache-2.0"})


def test_the_command_prints_the_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"clvr-jax {version('clvr-jax')}\n"
