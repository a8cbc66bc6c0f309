"""The workflows of GitHub: valid, with pinned actions and no permission that they do not need."""

import json
import re
import tomllib
from importlib import resources
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
EACH_WORKFLOW = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
MAY_WRITE = {
    ("release", "attest"): {"attestations", "id-token"},
    ("release", "pypi"): {"id-token"},
    ("release", "github"): {"contents"},
}
"""Workflow and job -> what it may write."""


def validator(name):
    schema = resources.files("check_jsonschema.builtin_schemas.vendor").joinpath(f"{name}.json").read_text()
    return jsonschema.Draft7Validator(json.loads(schema))


def read(path):
    """A workflow; YAML 1.1 reads the key `on` as True."""
    content = yaml.safe_load(path.read_text())
    return {"on" if key is True else key: value for key, value in content.items()}


def test_there_is_a_workflow_for_tests_docs_and_releases():
    assert [path.stem for path in WORKFLOWS] == ["docs", "release", "test"]


@EACH_WORKFLOW
def test_a_workflow_is_valid(path):
    content = read(path)
    validator("github-workflows").validate(content)
    with pytest.raises(jsonschema.ValidationError):
        validator("github-workflows").validate({**content, "jobs": {"a": {"runs-on": "b", "step": []}}})


def test_dependabot_is_configured():
    content = yaml.safe_load((ROOT / ".github" / "dependabot.yml").read_text())
    validator("dependabot").validate(content)
    assert [update["package-ecosystem"] for update in content["updates"]] == ["github-actions"]


@EACH_WORKFLOW
def test_actions_are_pinned_by_commit_with_their_version(path):
    lines = [line.strip() for line in path.read_text().splitlines() if re.search(r"\buses:", line)]
    assert lines
    for line in lines:
        assert re.fullmatch(r"(- )?uses: [\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


def test_an_action_has_one_commit_everywhere():
    pins = {found for path in WORKFLOWS for found in re.findall(r"uses: (\S+)@(\S+)", path.read_text())}
    assert len(pins) == len({action for action, _ in pins})


@EACH_WORKFLOW
def test_a_job_may_do_only_what_it_needs_and_ends(path):
    content = read(path)
    assert content["permissions"] == {}
    assert content["concurrency"]["group"]
    assert not re.search(r"\bsecrets\.", path.read_text())
    for name, job in content["jobs"].items():
        writes = {scope for scope, access in job["permissions"].items() if access == "write"}
        assert writes == MAY_WRITE.get((path.stem, name), set()), name
        assert job["timeout-minutes"] <= 120
        assert job["runs-on"] == "ubuntu-24.04"  # never "latest", which changes by itself
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


@EACH_WORKFLOW
def test_scripts_insert_no_expression(path):
    """The text of an expression would become part of the script; a variable of the environment does not."""
    for job in read(path)["jobs"].values():
        assert all("${{" not in step.get("run", "") for step in job["steps"])


def test_tests_run_on_every_python_that_the_package_names():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (job,) = read(ROOT / ".github" / "workflows" / "test.yml")["jobs"].values()
    tested = job["strategy"]["matrix"]["python"]
    assert tested == ["3.11", "3.12", "3.13"]
    prefix = "Programming Language :: Python :: 3."
    named = [
        line.removeprefix("Programming Language :: Python :: ") for line in project["classifiers"] if prefix in line
    ]
    assert set(named) <= set(tested)
    assert project["requires-python"] == f">={tested[0]}"
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]


def test_a_release_is_attested_before_it_is_published_and_only_packages_are():
    jobs = read(ROOT / ".github" / "workflows" / "release.yml")["jobs"]
    order = ["build", "attest", "pypi", "github"]
    assert list(jobs) == order
    assert [jobs[name].get("needs") for name in order] == [None, "build", "attest", "pypi"]
    assert "make dist" in [step.get("run") for step in jobs["build"]["steps"]]
    publish = jobs["pypi"]["steps"][-1]
    assert publish["uses"].startswith("pypa/gh-action-pypi-publish@")
    assert publish["with"] == {"packages-dir": "packages/"}  # neither a password nor attestations: false
    assert jobs["pypi"]["environment"]["name"] == "pypi"
