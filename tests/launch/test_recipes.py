"""The launch recipes and their guide say what the programs that they call understand; no cloud is asked."""

import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from clvr_jax.cli import COMMANDS, parse
from clvr_jax.commands.recipes.launch import Launch
from clvr_jax.commands.recipes.training import Train
from clvr_jax.errors import UsageError

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "how-to" / "training-on-tpu-pods.md"
SCRIPTS = [ROOT / "launch" / name for name in ("gcloud_tpu.sh", "slurm.sh", "xpk.sh")]
SKYPILOT = ROOT / "launch" / "skypilot.yaml"
RECIPE = "configs/shapes_vae.py"
WHO = {"--coordinator", "--processes", "--process", "--devices"}


@pytest.fixture
def record(tmp_path, monkeypatch):
    """Makes programs that write their arguments down; what it returns gives the calls so far."""
    folder = tmp_path / "bin"
    folder.mkdir()
    log = tmp_path / "calls"

    def make(*names, then=""):
        for name in names:
            path = folder / name
            path.write_text(f'#!/bin/bash\nprintf "%s\\x1f" {name} "$@" >> {log}; printf "\\x1e" >> {log}\n{then}\n')
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        return lambda: [call.split("\x1f")[:-1] for call in log.read_text().split("\x1e")[:-1]]

    return make


def run(script, *arguments, cwd=ROOT, **environment):
    return subprocess.run(
        ["bash", str(script), *arguments], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )


def trained(command):
    """What `clvr train` makes of a command line with launch/train.py in it; fails if it does not understand it."""
    words = command if isinstance(command, list) else shlex.split(command)
    rest = words[words.index("launch/train.py") + 1 :]
    while rest[0] in WHO:
        rest = rest[2:]
    return parse(["train", *(str(ROOT / word) if word.startswith("configs/") else word for word in rest)])


def value_of(words, option):
    return words[words.index(option) + 1]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_parses_and_says_in_one_line_how_it_is_used(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)
    done = run(script, ZONE="zone", PROJECT="project", BUCKET="bucket")
    assert done.returncode == 2
    assert re.fullmatch(r"usage: .*\n", done.stderr)
    assert not done.stdout


@pytest.mark.parametrize("name", ["gcloud_tpu.sh", "xpk.sh"])
@pytest.mark.parametrize("arguments", [["no-such-action"], ["train"], ["up"]])
def test_an_action_that_there_is_not_or_that_lacks_its_recipe_is_a_usage_error(name, arguments):
    done = run(ROOT / "launch" / name, *arguments, ZONE="zone", PROJECT="project", BUCKET="bucket")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_xpk_hands_on_a_command_that_the_trainer_understands(record):
    calls = record("xpk")
    environment = {
        "PROJECT": "project",
        "BUCKET": "bucket",
        "NUM_SLICES": "2",
        "EXPORTS": "HF_TOKEN",
        "HF_TOKEN": "a b",
    }
    done = run(ROOT / "launch" / "xpk.sh", "train", RECIPE, "--train.steps", "7", **environment)
    assert done.returncode == 0, done.stderr
    (call,) = calls()
    assert call[1:3] == ["workload", "create"]
    assert value_of(call, "--env") == "HF_TOKEN=a b"
    train = trained(value_of(call, "--command"))
    assert isinstance(train, Train)
    assert (str(train.out), train.resume) == ("gs://bucket/clvr-run", True)
    mesh = train.config_with_overrides.train.mesh
    assert (mesh.data, mesh.slices, train.config_with_overrides.train.steps) == (2, 2, 7)


def test_options_given_to_xpk_win_over_those_it_adds(record):
    calls = record("xpk")
    options = ["--train.mesh.data", "4"]
    run(ROOT / "launch" / "xpk.sh", "train", RECIPE, *options, PROJECT="project", BUCKET="bucket", NUM_SLICES="2")
    assert trained(value_of(calls()[0], "--command")).config_with_overrides.train.mesh.data == 4


def test_a_preempted_slice_is_given_back_and_asked_for_again_and_all_its_workers_start(record, tmp_path):
    states = tmp_path / "states"
    states.write_text("SUSPENDED\n\nACTIVE\n")
    answer = f'[[ "$*" == *describe* ]] && head -n 1 {states} && sed -i 1d {states}; true'
    calls = record("gcloud", then=answer)
    record("git")
    environment = {"ZONE": "zone", "PROJECT": "project", "BUCKET": "bucket", "EXPORTS": "HF_TOKEN", "HF_TOKEN": "a b"}
    done = run(ROOT / "launch" / "gcloud_tpu.sh", "up", RECIPE, "--train.log-every", "3", **environment)
    assert done.returncode == 0, done.stderr
    done = [call[3:] for call in calls() if call[0] == "gcloud"]
    assert [call[:2] for call in done if call[1] != "describe"] == [
        ["queued-resources", "delete"],
        ["queued-resources", "create"],
        ["tpu-vm", "scp"],
        ["tpu-vm", "ssh"],
        ["tpu-vm", "ssh"],
    ]
    assert "--spot" in next(call for call in done if call[1] == "create")
    assert all("--worker=all" in call for call in done[-3:])
    for call in done[-2:]:
        subprocess.run(["bash", "-n", "-c", value_of(call, "--command")], check=True)
    start = shlex.split(value_of(done[-1], "--command"))
    assert "HF_TOKEN=a b" in start
    train = trained(start)
    assert (str(train.out), train.resume) == ("gs://bucket/clvr-run", True)
    assert train.config_with_overrides.train.log_every == 3


def test_under_slurm_a_process_takes_all_gpus_of_its_node(record):
    calls = record("srun", then='echo "devices $JAX_LOCAL_DEVICE_IDS"')
    script = ROOT / "launch" / "slurm.sh"
    done = run(script, RECIPE, "--out", "/shared/run", SLURM_GPUS_ON_NODE="4")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "devices 0,1,2,3\n"
    train = trained(calls()[0])
    assert (train.out, train.resume) == (Path("/shared/run"), True)
    assert "#SBATCH --ntasks-per-node=1\n" in script.read_text()


@pytest.mark.parametrize("has_gpus", [True, False])
def test_skypilot_says_who_is_who_on_gpu_nodes_and_leaves_it_to_tpus(record, tmp_path, has_gpus):
    task = yaml.safe_load(SKYPILOT.read_text())
    assert task["resources"]["accelerators"].startswith("tpu-")
    assert task["file_mounts"]["/bucket"] == {"source": "gs://${BUCKET}", "mode": "MOUNT"}
    assert task["envs"]["BUCKET"] is None  # it must be given
    calls = record("python", *(["nvidia-smi"] if has_gpus else []))
    (tmp_path / ".venv").symlink_to(tmp_path)
    environment = {**task["envs"], "BUCKET": "bucket", "CONFIG": RECIPE, "ARGS": "--train.steps 7"}
    environment |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    subprocess.run(["bash", "-n", "-c", task["setup"]], check=True)
    done = subprocess.run(["bash", "-c", task["run"]], cwd=tmp_path, env={**os.environ, **environment}, text=True)
    assert done.returncode == 0
    (call,) = calls()
    who = ["--coordinator", "10.0.0.1:8476", "--processes", "2", "--process", "1"]
    assert call[2:8] == who if has_gpus else not WHO & set(call)
    train = trained(call)
    assert (str(train.out), train.resume) == ("gs://bucket/clvr-run", True)
    assert train.config_with_overrides.train.steps == 7


def test_the_image_installs_extras_that_there_are_and_starts_the_trainer():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert "ARG JAX_EXTRA=tpu" in lines
    assert {"tpu", "gpu"} <= extras.keys()
    assert 'ENTRYPOINT ["clvr", "launch"]' in lines
    assert any(line.startswith("USER ") and "root" not in line for line in lines)
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not {"launch", "configs", "convert", "clvr_jax", "pyproject.toml", "README.md", "LICENSE"} & set(ignored)


def code_lines(path):
    """Lines of the indented code blocks of a page, and the code in its tables and text."""
    text = path.read_text()
    return re.findall(r"(?m)^    (\S.*?)(?: +#.*)?$", text), re.findall(r"`([^`\n]+)`", text)


def test_commands_in_the_guide_are_understood():
    seen = 0
    for words in map(shlex.split, code_lines(GUIDE)[0]):
        words = [str(ROOT / word) if word.startswith(("configs/", "tests/")) else word for word in words]
        while "=" in words[0]:
            words = words[1:]
        if "launch/local_cluster.py" in words:
            words = ["launch/train.py", *words[words.index("launch/local_cluster.py") + 1 :]]
        elif words[:2] == ["launch/xpk.sh", "train"]:
            words = ["launch/train.py", *words[2:]]
        if "launch/train.py" in words:
            trained(words)
        elif words[0] == "clvr" and words[1] in COMMANDS:
            parse(words[1:])
        else:
            assert words[0] in ("gcloud", "python", "export") or words[:2] == ["clvr", "plan"]
            continue
        seen += 1
    assert seen >= 9


def test_options_named_in_the_guide_exist(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        parse(["train", str(ROOT / "configs" / "flux2_sft.py"), "--help"])
    known = set(re.findall(r"--[a-z0-9.-]+", capsys.readouterr().out)) | WHO
    # Of sbatch, docker, xpk, sky and tensorboard; of `clvr plan`; and of `configs/pprl_flux2.py`.
    others = {"--requeue", "--build-arg", "--output-manifest-file", "--env", "--logdir"}
    plan = {"--search", "--dollars-per-chip-hour", "--planned"}
    named = {option for code in code_lines(GUIDE)[1] for option in re.findall(r"--[a-z0-9.-]+", code)}
    assert "--train.checkpoint.save-interval-minutes" in named
    assert named - known == others | plan | {"--train.mesh"}  # the last: all of its options


def test_paths_named_in_the_guide_and_the_recipes_exist():
    pattern = r"(?<![\w/.-])(?:launch|configs|tests|docs|clvr_jax)/[\w/.-]+\.(?:py|sh|yaml|md)"
    for path in (GUIDE, SKYPILOT, ROOT / "Dockerfile", *SCRIPTS):
        named = set(re.findall(pattern, path.read_text()))
        assert named, path
        assert not {name for name in named if not (ROOT / name).exists()}
    for target in re.findall(r"\]\(([^)#:]+)\)", GUIDE.read_text()):
        assert (GUIDE.parent / target).exists()


def test_messages_in_the_guide_are_those_of_the_code():
    sources = [*ROOT.glob("clvr_jax/**/*.py"), *ROOT.glob("launch/*.py"), *ROOT.glob("configs/*.py")]
    code = "\n".join(path.read_text() for path in sources)
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # neighboring literals are one
    rows = GUIDE.read_text().partition("## When something goes wrong")[2]
    messages = re.findall(r"(?m)^\| `([^`]+)` +\|", rows)
    assert len(messages) >= 15
    of_others = ("ImportError: ", "RESOURCE_EXHAUSTED")
    for message in messages:
        if not message.startswith(of_others):
            parts = [part.strip(" ()") for part in message.split("...")]
            assert all(part in code for part in parts), message


def test_launch_keeps_its_three_options_and_hands_all_others_to_its_command():
    arguments = ["--coordinator=host0:1", RECIPE, "--processes", "2", "--json", "--process", "1", "--train.steps", "3"]
    command = parse(["launch", *arguments])
    assert isinstance(command, Launch)
    assert (command.coordinator, command.processes, command.process) == ("host0:1", 2, 1)
    assert command.arguments == (RECIPE, "--json", "--train.steps", "3")


@pytest.mark.parametrize("process", ["one", None])
def test_launch_refuses_a_process_that_is_no_number(process):
    with pytest.raises(UsageError, match="--process"):
        parse(["launch", RECIPE, "--process", *([process] if process else [])])
