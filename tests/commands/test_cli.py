"""The command line: what it refuses and how, and what its commands leave behind."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from clvr_jax.cli import COMMANDS, main, parse
from clvr_jax.worlds.shapes.prompts import evaluation_prompts, write_prompts
from tests.commands.command_line import PROMPT, complaint
from tests.reasoning.scripted import CountingDrawer, ScriptedController, again, generate, stop
from tests.reasoning.test_verified_loop import ScriptedVerifier

pytestmark = pytest.mark.usefixtures("own_directories")
LINE = str(Path(__file__).parents[1] / "training" / "line_recipe.py")
RECIPE = '''
"""Learns a vector. Second sentence."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from clvr_jax.sharding import MeshConfig
from clvr_jax.training.trainer import Task, TrainConfig

ONE_DEVICE = MeshConfig(devices=1)


@dataclasses.dataclass(frozen=True)
class Config:
    """target: what to learn."""

    train: TrainConfig = TrainConfig(steps=4, learning_rate=0.1, log_every=1, mesh=ONE_DEVICE)
    target: float = 3.0


CONFIG = Config()


def task(config):
    def loss(params, frozen, batch, key):
        return jnp.mean((params["x"] - batch) ** 2), {}

    def export(ema, folder):
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "x.npy", np.asarray(ema["x"]))

    batches = lambda step: np.full(3, config.target, np.float32)
    return Task("vector", {"x": jnp.zeros(3)}, {}, loss, batches, export)
'''


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "vector.py"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def model(tmp_path) -> Path:
    """A folder that looks like a model of the shapes world, without weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline"}')
    (folder / "clvr.json").write_text('{"flux2": {"world": "shapes"}}')
    return folder


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


def test_a_check_of_the_out_folder_leaves_nothing_behind(tmp_path):
    from clvr_jax.output_paths import check_directory

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


def test_train_runs_refuses_to_overwrite_and_resumes(recipe, tmp_path, capsys):
    assert main(["train", str(recipe), "--json", "--target", "5", "--train.learning-rate", "0.5"]) == 0
    result = json.loads(capsys.readouterr().out)
    out = tmp_path / "runs" / "vector"
    assert result == {"recipe": "vector", "out": "runs/vector", "export": "runs/vector/export", "steps": 4}
    first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(25)  # (0 - target) squared: the override arrived
    exported = (out / "export" / "x.npy").read_bytes()

    assert main(["train", str(recipe)]) == 2
    assert "--resume" in complaint(capsys)
    assert (out / "export" / "x.npy").read_bytes() == exported

    assert main(["--json", "train", str(recipe), "--resume", "--train.steps", "6"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 6
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_the_help_of_a_recipe_lists_its_options(recipe, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", str(recipe), "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "Learns a vector." in shown
    for option in ("CONFIG", "--target", "--train.steps", "--resume"):
        assert option in shown


def test_generate_tells_the_steps_and_ends_with_the_page(model, monkeypatch, tmp_path, capsys):
    from clvr_jax.commands.generation import memory_check
    from clvr_jax.pipelines.closed_loop import ClosedLoopPipeline

    script = ["no action token here", generate("Plan: it. Draw it."), again(1), stop(), again(2)]

    class Scripted(ClosedLoopPipeline):
        def run(self, prompts, seeds, budget, *, nfe, verification, on_event):
            from clvr_jax.reasoning import run

            controller = ScriptedController({PROMPT: script})
            looks = {"verifier": ScriptedVerifier(images)} if verification == "separate" else {}
            return run(
                prompts, controller, CountingDrawer(), budget, seeds, on_event, verification=verification, **looks
            )

    images = []
    monkeypatch.setattr(ClosedLoopPipeline, "from_pretrained", lambda name, **options: Scripted(None, None))
    monkeypatch.setattr(memory_check, "check_memory", lambda *parts: None)  # the model has no weights
    (model / "controller").mkdir()
    (model / "controller" / "config.json").write_text('{"model_type": "qwen3_vl"}')
    command = ["generate", PROMPT + " and a dragon", "--model", str(model), "--verification", "controller"]
    assert main([*command[:1], PROMPT, *command[2:], "--out", "first"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "first/index.html\n"
    assert (tmp_path / "first" / "index.html").is_file()
    told = ["cannot be parsed", "Plan: it.", "step 0", "Unmet: item 0.", "step 1", "Unmet: nothing.", "accepted"]
    places = [captured.err.index(words) for words in told]
    assert places == sorted(places)
    assert "never saw" not in captured.err

    assert main([*command[:1], PROMPT, *command[2:], "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["outcome"], result["drawings"], result["nfe"], result["unmet"]) == ("accepted", 2, 8, [])
    assert Path(result["page"]).is_file()
    assert Path(result["image"]).name == "step_01.png"

    limits = ["--candidates", "2", "--stop-when", "verified", "--max-nfe", "12"]
    script[2:] = [again(2), again(0)]  # of two candidates; the second needs no more, whatever it says
    assert main([*command[:1], PROMPT, *command[2:], *limits, "--out", "second", "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["outcome"], result["drawings"], result["nfe"], result["unmet"]) == ("accepted", 2, 8, [])
    assert "step 1 is the best of 2 candidates" in captured.err

    script[:] = [generate("Plan: it. Draw it."), again(1)]
    images[:] = [(1, 1, 0.25), (1, 1, 0.75)]
    assert main(["generate", PROMPT, "--model", str(model), "--out", "third", "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["outcome"], result["unmet"]) == ("accepted", [])
    assert [each["probability"] for each in result["verification"]["requirements"]] == [1, 1, 0.75]
    told = ["unmet 0.25  three  (seen)", "Mend it.", "met 0.75  three  (seen)", "accepted"]
    places = [captured.err.index(words) for words in told]
    assert places == sorted(places)


def test_unseen_words_are_a_warning_for_shapes_models_only(model, capsys):
    from clvr_jax.commands.generation.prompts import check_request

    assert check_request("a red dragon, a RED Circle and a wyvern", str(model)) == ["dragon", "wyvern"]
    assert "dragon, wyvern" in capsys.readouterr().err
    (model / "clvr.json").unlink()
    assert check_request("a red dragon", str(model)) == []
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_sample_and_one_shot_eval_draw_the_same_picture_from_the_same_seed(drawing_model, tmp_path, capsys):
    entries = evaluation_prompts("eval")[:2]
    write_prompts("two.jsonl", entries)
    evaluate = ["eval", "shapes", "--model", str(drawing_model), "--prompts", "two.jsonl", "--out", "scores", "--json"]
    assert main(evaluate) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["summary"]["overall"]["over_pictures"]["pictures"] == 2
    assert (results["settings"]["steps"], results["settings"]["guidance"]) == (2, 4.0)
    assert json.loads((tmp_path / "scores" / "results.json").read_text())["summary"] == results["summary"]
    record = json.loads((tmp_path / "scores" / "00001" / "records" / "0000.json").read_text())

    sample = ["sample", entries[1]["prompt"], "--model", str(drawing_model), "--seed", str(record["seed"])]
    assert main([*sample, "--out", "one.png"]) == 0
    assert capsys.readouterr().out == "one.png\n"
    drawn = [Image.open(tmp_path / name) for name in ("one.png", "scores/00001/samples/0000.png")]
    # Two pictures a batch is another program than one: the last bits may differ.
    assert np.abs(np.subtract(*(np.asarray(image, np.int16) for image in drawn))).max() <= 1

    unguided = [*evaluate[:-2], "unguided", "--guidance", "1", "--against", "scores"]
    assert main(unguided) == 0  # without --json: two tables
    assert "p: McNemar" in capsys.readouterr().out
    assert main([*unguided, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["comparison"]["overall"]["prompts"] == 2

    assert main([*evaluate, "--guidance", "1"]) == 1  # other settings never mix with pictures that are there
    assert "guidance" in complaint(capsys)


@pytest.mark.slow
def test_a_model_whose_size_does_not_divide_fails_in_one_line(drawing_model, tmp_path, capsys):
    import shutil

    shutil.copytree(drawing_model, "odd")
    settings = json.loads(Path("odd/clvr.json").read_text())
    settings["flux2"]["sample_size"] = 65
    Path("odd/clvr.json").write_text(json.dumps(settings))
    assert main(["sample", PROMPT, "--model", "odd"]) == 2
    assert "multiples of 16" in complaint(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_closed_loop_of_a_folder_without_a_controller_needs_the_oracle(drawing_model, tmp_path, capsys):
    evaluate = ["eval", "shapes", "--model", str(drawing_model), "--out", "o", "--limit", "1", "--mode", "closed-loop"]
    assert main(evaluate) == 1
    assert "controller/" in complaint(capsys)
    assert not (tmp_path / "o").exists()
    assert main(["generate", PROMPT, "--model", str(drawing_model)]) == 1
    assert "controller/" in complaint(capsys)
    assert main([*evaluate, "--controller", "oracle", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"]["cost"]["outcomes"] == {"step limit": 1}


@pytest.mark.slow
def test_damaged_weights_fail_in_one_line(drawing_model, capsys):
    import shutil

    shutil.copytree(drawing_model, "torn")
    weights = Path("torn/vae/diffusion_pytorch_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["sample", PROMPT, "--model", "torn"]) == 1
    assert "not a complete safetensors file" in complaint(capsys)


def test_an_unwritable_cache_is_no_error(tmp_path, monkeypatch):
    from clvr_jax.compilation import enable_compilation_cache

    monkeypatch.setattr(jax.config, "update", lambda name, value: None)  # the cache of the tests stays
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert enable_compilation_cache() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert enable_compilation_cache() == tmp_path / "other" / "clvr-jax" / "xla"
