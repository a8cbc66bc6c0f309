"""What commands leave behind: runs that resume, pages and images, and nothing where they are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clvr_jax.cli import main
from clvr_jax.worlds.shapes.prompts import evaluation_prompts, write_prompts
from tests.commands.command_line import PROMPT, complaint
from tests.reasoning.loop.test_verified_loop import ScriptedVerifier
from tests.reasoning.scripted import CountingDrawer, ScriptedController, again, generate, stop

pytestmark = pytest.mark.usefixtures("own_directories")


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
    monkeypatch.setattr(
        memory_check, "check_memory", lambda model, loading, *parts: loading
    )  # the model has no weights
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
    # Two images in a batch are another program than one: the last bits may differ.
    assert np.abs(np.subtract(*(np.asarray(image, np.int16) for image in drawn))).max() <= 1

    unguided = [*evaluate[:-2], "unguided", "--guidance", "1", "--against", "scores"]
    assert main(unguided) == 0  # without --json: two tables
    assert "p: McNemar" in capsys.readouterr().out
    assert main([*unguided, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["comparison"]["overall"]["prompts"] == 2

    assert main([*evaluate, "--guidance", "1"]) == 1  # other settings never mix with images that are there
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
