"""The command line: its help, what it refuses, and how."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from clvr_jax.cli import COMMANDS, main, parse
from tests.commands.command_line import PROMPT, RECIPE, complaint

pytestmark = pytest.mark.usefixtures("own_directories")
LINE = str(Path(__file__).parents[1] / "training" / "line_recipe.py")
ALL_HELP = """if True:
    import contextlib, io, json, sys, time
    from clvr_jax.cli import main
    found, since = {}, 0.0
    for command in json.loads(sys.argv[1]):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            main([*command.split(), "--help"])
        seconds = time.process_time()
        found[command] = (out.getvalue(), seconds - since)
        since = seconds
    print(json.dumps([found, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def test_help_is_quick_and_has_an_example():
    commands = ["", *COMMANDS]
    done = subprocess.run(
        [sys.executable, "-c", ALL_HELP, json.dumps(commands)], capture_output=True, text=True, check=True
    )
    found, modules = json.loads(done.stdout)
    assert list(found) == commands
    for command, (printed, seconds) in found.items():
        assert f"Example:\n    clvr {command}" in printed
        assert seconds < 2, command  # CPU time, the start of Python included in the first: a busy machine is no failure
    assert not {"jax", "flax", "torch", "transformers"} & set(modules)


@pytest.mark.parametrize("name", COMMANDS["eval"].COMMANDS)
def test_examples_of_evaluations_are_understood(name):
    kind = COMMANDS["eval"].COMMANDS[name]
    assert kind.EXAMPLE.startswith(f"clvr eval {name} ")
    assert type(parse(shlex.split(kind.EXAMPLE)[1:])) is kind


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], ", ".join(COMMANDS)),
        (["paint"], "paint"),
        (["generate"], "PROMPT"),
        (["generate", PROMPT, "--sede", "3"], "--sede"),
        (["generate", PROMPT, "--seed", "many"], "'many'"),
        (["generate", PROMPT, "--seed", "-1"], "--seed"),
        (["generate", PROMPT, "--max-steps", "0"], "--max-steps"),
        (["generate", PROMPT, "--nfe", "0"], "--nfe"),
        (["sample", PROMPT, "--guidance", "nan"], "--guidance"),
        (["sample", PROMPT, "--steps", "0"], "--steps"),
        (["sample", PROMPT, "--out", "picture.jpg"], "PNG"),
        (["sample", "a \udcff circle"], "UTF-8"),
        (["train"], "CONFIG"),
        (["plan"], "CONFIG"),
        (["plan", LINE], "--topology"),
        (["plan", LINE, "--topology", "v7:4x4"], "v5e:AxB"),
        (["eval", "painting", "--model", "m", "--out", "o"], "painting"),
        (["eval", "shapes", "--model", "m"], "--out"),
        (["eval", "shapes", "--model", "m", "--out", "o", "--split", "train"], "'train'"),
        (["eval", "shapes", "--model", "m", "--out", "o", "--limit", "0"], "--limit"),
        (["eval", "shapes", "--model", "m", "--out", "o", "--mode", "closed-loop", "--steps", "4"], "one-shot"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(arguments, said, capsys):
    assert main(arguments) == 2
    assert said in complaint(capsys)


@pytest.mark.parametrize("command", [["generate", PROMPT], ["sample", PROMPT], ["eval", "shapes", "--out", "o"]])
def test_unknown_models_and_folders_without_an_index_fail_in_one_line(command, tmp_path, capsys):
    assert main([*command, "--model", "shapes-huge"]) == 1
    line = complaint(capsys)
    assert "shapes-huge" in line
    assert "shapes-tiny" in line  # what there is
    (tmp_path / "empty").mkdir()
    assert main([*command, "--model", "empty"]) == 1
    assert "model_index.json" in complaint(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("command", ["generate", "sample"])
@pytest.mark.parametrize(("prompt", "said"), [("", "empty"), (" \n ", "empty"), ("circle " * 14_286, "100,002")])
def test_prompts_that_are_empty_or_endless_fail_in_one_line(command, prompt, said, model, capsys):
    assert main([command, prompt, "--model", str(model)]) == 1
    assert said in complaint(capsys)


def test_out_is_checked_before_the_model_is_loaded(model, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    eval_shapes = ["eval", "shapes", "--model", str(model)]
    for command, out in [
        (["generate", PROMPT, "--model", str(model)], "file/out"),
        (["generate", PROMPT, "--model", str(model)], "/proc/out"),
        (["generate", PROMPT, "--model", str(model)], "x" * 300),
        (["generate", PROMPT, "--model", str(model)], "a\0b"),
        (["sample", PROMPT, "--model", str(model)], "file/out.png"),
        (eval_shapes, "file"),
    ]:
        # The folder has no weights: had the model been loaded, that would be the complaint.
        assert main([*command, "--out", out]) == 1
        assert "cannot be written" in complaint(capsys)
    (tmp_path / "folder.png").mkdir()
    assert main(["sample", PROMPT, "--model", str(model), "--out", "folder.png"]) == 1
    assert "is a directory" in complaint(capsys)


@pytest.mark.parametrize("command", [["generate", "a red star"], ["eval", "shapes"]])
def test_nothing_is_written_into_the_directory_of_a_model(command, model, capsys):
    before = sorted(Path(model).rglob("*"))
    assert main([*command, "--model", str(model), "--out", str(model)]) == 2
    assert capsys.readouterr().err == f"clvr: {model}: holds a model (model_index.json); choose another --out\n"
    assert sorted(Path(model).rglob("*")) == before


def test_a_check_of_the_out_folder_leaves_nothing_behind(tmp_path):
    from clvr_jax.files.output_paths import check_directory

    check_directory(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        ("", "no prompts"),
        ('{"tag": "single_object"', "prompts.jsonl:1: not JSON"),
        ('{"tag": "single_object", "prompt": "a dog", "include": [{"class": "dog", "count": 1}]}', "dog"),
        ("\udcff", "cannot be read"),
    ],
)
def test_malformed_prompt_files_fail_in_one_line(content, said, model, tmp_path, capsys):
    if content is not None:
        (tmp_path / "prompts.jsonl").write_bytes(content.encode(errors="surrogateescape"))
    assert main(["eval", "shapes", "--model", str(model), "--out", "o", "--prompts", "prompts.jsonl"]) == 1
    assert said in complaint(capsys)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such recipe"),
        ("def task(config): ...", "no CONFIG"),
        ("CONFIG = 3", "no task"),
        (RECIPE.replace("CONFIG = Config()", "CONFIG = 3"), "TrainConfig"),
        (RECIPE.replace("def task", "task = 3\ndef other"), "function"),
        ("import no_such_thing", "ModuleNotFoundError"),
        ("def (", "SyntaxError"),
        (RECIPE.replace("steps=4", "steps=0"), "steps must be at least 1"),
    ],
)
def test_files_that_are_no_recipes_fail_in_one_line(content, said, recipe, capsys):
    recipe.unlink() if content is None else recipe.write_text(content)
    assert main(["train", str(recipe)]) == 1
    line = complaint(capsys)
    assert said in line
    assert "vector.py" in line


def test_the_help_of_a_recipe_lists_its_options(recipe, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", str(recipe), "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "Learns a vector." in shown
    for option in ("CONFIG", "--target", "--train.steps", "--resume"):
        assert option in shown


def test_debug_shows_the_traceback_wherever_it_stands(capsys):
    for arguments in (["--debug", "train", "missing.py"], ["train", "missing.py", "--debug"]):
        assert main(arguments) == 1
        assert "Traceback" in capsys.readouterr().err


def test_an_unexpected_error_is_one_line_too(monkeypatch, capsys):
    def fail(prompt, model):
        raise ValueError("first\nsecond")

    monkeypatch.setattr("clvr_jax.commands.generation.prompts.check_request", fail)
    assert main(["sample", PROMPT]) == 1
    assert complaint(capsys) == "clvr: ValueError: first second; --debug prints the traceback"


@pytest.mark.parametrize(
    "command",
    [
        ["train", "NAME", "--out", "out"],
        ["synth", "NAME", "--out", "out"],
        ["sample", PROMPT, "--model", "NAME", "--out", "out.png"],
        ["convert", "NAME", "out", "--to", "jax"],
        ["merge", "--base", "NAME", "--distill", "NAME", "--align", "NAME", "--out", "out"],
        ["verify", PROMPT, "NAME"],
        ["eval", "compare", "a=NAME", "b=NAME", "--out", "out"],
    ],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_name_that_no_file_can_have_is_one_line(name, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([word.replace("NAME", name) for word in command]) in (1, 2)
    said = complaint(capsys)
    assert "--debug prints the traceback" not in said
    assert len(said) < 600
    assert not list(tmp_path.iterdir())


def test_interrupting_exits_with_130(monkeypatch, capsys):
    def interrupt(prompt, model):
        raise KeyboardInterrupt

    monkeypatch.setattr("clvr_jax.commands.generation.prompts.check_request", interrupt)
    assert main(["generate", PROMPT]) == 130
    assert complaint(capsys) == "clvr: interrupted"


def test_unseen_words_are_a_warning_for_shapes_models_only(model, capsys):
    from clvr_jax.commands.generation.prompts import check_request

    assert check_request("a red dragon, a RED Circle and a wyvern", str(model)) == ["dragon", "wyvern"]
    assert "dragon, wyvern" in capsys.readouterr().err
    (model / "clvr.json").unlink()
    assert check_request("a red dragon", str(model)) == []
    assert capsys.readouterr().err == ""


def test_an_unwritable_cache_is_no_error(tmp_path, monkeypatch):
    from clvr_jax.compilation import enable_compilation_cache

    monkeypatch.setattr(jax.config, "update", lambda name, value: None)  # the cache of the tests stays
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert enable_compilation_cache() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert enable_compilation_cache() == tmp_path / "other" / "clvr-jax" / "xla"
