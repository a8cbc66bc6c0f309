"""The options of `clvr generate` and `clvr sample` that say which models run, where, and on what."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from clvr_jax.cli import main, parse
from clvr_jax.commands.generation.generate import Generate
from clvr_jax.commands.generation.model_options import parse_lora, parse_quantize
from clvr_jax.errors import UsageError
from clvr_jax.pipelines.closed_loop import ClosedLoopPipeline
from clvr_jax.providers import ocr
from clvr_jax.reasoning import Trajectory
from clvr_jax.reasoning.verification.text_in_images import TextVerifier
from tests.commands.command_line import PROMPT, complaint
from tests.helpers.models import save_qwen3_vl_that_says
from tests.providers.server import Reply, failure
from tests.reasoning.scripted import CountingDrawer, ScriptedController, generate, stop

pytestmark = pytest.mark.usefixtures("own_directories")
ROOT = Path(__file__).parents[2]
REPLY = "Draw it.<|image_gen|><|im_end|>"


@pytest.fixture(scope="module")
def controller(small_qwen3_vl, tmp_path_factory):
    """A Qwen3-VL that always says REPLY."""
    return save_qwen3_vl_that_says(REPLY, small_qwen3_vl, tmp_path_factory.mktemp("controller") / "qwen3-vl")


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return pixels


@pytest.mark.slow
def test_a_generator_and_a_qwen3_vl_run_the_loop_together_on_two_devices(
    drawing_model,
    controller,
    photo,
    tmp_path,
    capsys,
):
    options = ["--dtype", "bfloat16", "--size", "64x96", "--image", "photo.png"]
    options += ["--verification", "none", "--stop-when", "drawn"]
    mesh = ["--mesh.tensor", "2", "--mesh.devices", "2"]
    models = ["--model", str(drawing_model), "--controller", str(controller), "--controller-tokens", "8"]
    assert main(["generate", PROMPT, *models, *options, *mesh, "--out", "made", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["drawings"], data["nfe"], data["image"]) == (1, 4, "made/step_00.png")
    trajectory = Trajectory.load(tmp_path / "made")
    assert trajectory.steps[0].reasoning == "Draw it."
    assert trajectory.image.shape == (64, 96, 3)
    np.testing.assert_array_equal(trajectory.given_images[0], photo)

    pipe = ClosedLoopPipeline.from_pretrained(str(drawing_model), "bfloat16", controller=str(controller))
    weights = nnx.state(pipe.flux.transformer)["x_embedder"]["kernel"].get_value()
    assert weights.dtype == jnp.bfloat16
    assert pipe.flux.layout is None


@pytest.mark.slow
def test_an_endpoint_controls_the_loop(drawing_model, server, tmp_path, capsys):
    def said(text):
        return Reply({"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": {}})

    refused = failure(400, "Unknown parameter: 'seed'.")
    server.script = [refused, said(generate("Plan: a circle. Draw it.")), said(stop())]
    endpoint = ["--controller-url", f"{server.url}/v1", "--controller-model", "tiny"]
    endpoint += ["--controller-key-variable", "LOOPBACK_KEY", "--verification", "controller"]
    assert main(["generate", PROMPT, "--model", str(drawing_model), *endpoint, "--size", "32", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["outcome"], Image.open(data["image"]).size) == ("accepted", (32, 32))
    assert data["adapted"] == ["seed left out; replies may differ from run to run"]
    first = server.seen[0].json["messages"]
    assert first[0]["role"] == "system"
    assert "do not judge them" not in first[0]["content"]
    assert first[1]["content"] == PROMPT


@pytest.mark.slow
def test_two_processes_run_the_loop_together_and_ask_the_endpoint_once(drawing_model, server, tmp_path):
    def said(text):
        return Reply({"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": {}})

    command = ["generate", PROMPT, "--model", str(drawing_model), "--size", "32", "--verification", "controller"]
    command += ["--controller-url", f"{server.url}/v1", "--controller-model", "tiny", "--max-seconds", "1000"]
    command += ["--controller-key-variable", "LOOPBACK_KEY"]
    cluster = [sys.executable, str(ROOT / "launch" / "local_cluster.py"), "--processes", "2", "--devices", "1"]
    server.script = [said(generate("Plan: a circle. Draw it.")), said(stop())] * 2
    done = subprocess.run(
        [*cluster, *command, "--out", "both", "--json"],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert len(server.seen) == 2
    assert json.loads(done.stdout.splitlines()[-1])["image"] == "both/step_00.png"
    assert main([*command, "--out", "one"]) == 0
    both, one = (Trajectory.load(tmp_path / name) for name in ("both", "one"))
    assert [step.reasoning for step in both.steps] == [step.reasoning for step in one.steps]
    np.testing.assert_allclose(both.image.astype(int), one.image.astype(int), atol=1)


@pytest.mark.slow
def test_sample_writes_an_image_for_each_prompt_and_seed(drawing_model, tmp_path, capsys):
    Path("prompts.txt").write_text(f"{PROMPT}\n\na green square\n")
    sample = ["--model", str(drawing_model), "--steps", "1", "--size", "32"]
    several = ["--prompts", "prompts.txt", "--num-images", "2", "--seed", "5", "--out", "images", "--json"]
    assert main(["sample", *several, *sample]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [(each["prompt"], each["seed"]) for each in results] == [
        (PROMPT, 5),
        (PROMPT, 6),
        ("a green square", 5),
        ("a green square", 6),
    ]
    assert sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "images").iterdir()) == [
        each["image"] for each in results
    ]
    assert main(["sample", PROMPT, *sample, "--seed", "6", "--out", "one.png"]) == 0
    assert Path("one.png").read_bytes() == Path(results[1]["image"]).read_bytes()
    assert Path("one.png").read_bytes() != Path(results[0]["image"]).read_bytes()


def test_generate_writes_a_directory_for_each_prompt_and_seed(drawing_model, monkeypatch, capsys):
    class Scripted(ClosedLoopPipeline):
        def run(self, prompts, seeds, budget, **options):
            from clvr_jax.reasoning import run

            replies = ["no action"] * 3 if seeds == [1] and prompts == ["b"] else [generate(), stop()]
            return run(prompts, ScriptedController({prompts[0]: replies}), CountingDrawer(), budget, seeds)

    monkeypatch.setattr(ClosedLoopPipeline, "from_pretrained", lambda name, **options: Scripted(None, None))
    Path("prompts.txt").write_text("a\nb\n")
    several = ["--prompts", "prompts.txt", "--num-images", "2", "--out", "o", "--json"]
    model = ["--model", str(drawing_model), "--controller", "shapes-tiny"]
    assert main(["generate", *several, *model]) == 0
    captured = capsys.readouterr()
    results = json.loads(captured.out)["results"]
    assert [each["outcome"] for each in results] == ["accepted", "accepted", "accepted", "unparseable"]
    assert all(Path(each["page"]).is_file() for each in results)
    assert len({each["out"] for each in results}) == 4
    assert results[3]["image"] is None
    assert "no image was generated" in captured.err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--size", "50x61"], 2, "multiples of 16 pixels; the nearest size is 48 x 64"),
        (["--size", "large"], 2, "HEIGHTxWIDTH"),
        (["--image", "absent.png"], 1, "absent.png: no such image"),
        (["--image", "text.png"], 1, "text.png: not a readable image"),
        (["--lora", "a:much"], 2, "'much' is not a weight"),
        (["--lora", "absent.safetensors"], 1, "absent.safetensors: no such"),
        (["--ignore-text-encoder"], 2, "has no effect without --lora"),
        (["--mesh.tensor", "3"], 2, "devices, but there are 8"),
        (
            ["--mesh.tensor", "4"],
            2,
            "does not divide the 2 heads of transformer; choose axes whose product is one of 1",
        ),
        (["--prompts", "text.png"], 2, "exclude each other"),
        (["--num-images", "10001"], 2, "at most 10000"),
        (["--num-images", "0"], 2, "--num-images"),
        (["more words"], 2, "one text in quotes"),
        (["--controller", "other"], 1, "a llama, not a qwen3_vl"),
        (["--controller-url", "http://localhost/v1"], 2, "--controller-model NAME must be given together"),
        (["--controller-model", "tiny"], 2, "--controller-url URL"),
        (["--controller", "c", "--controller-url", "u", "--controller-model", "m"], 2, "two controllers"),
        (["--controller-tokens", "0"], 2, "--controller-tokens"),
        (["--prefix-cache", "nan"], 2, "--prefix-cache nan: give a finite number of GiB"),
        (
            ["--prefix-cache", "1", "--controller-url", "http://localhost/v1", "--controller-model", "tiny"],
            2,
            "--prefix-cache has no effect with --controller-url and no --verifier",
        ),
    ],
)
def test_bad_options_fail_in_one_line_before_weights_are_read(arguments, code, said, drawing_model, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    given = ["--controller", "shapes-tiny"] if "--controller" not in " ".join(arguments) else []
    assert main(["generate", PROMPT, *arguments, "--model", str(drawing_model), *given]) == code
    assert said in complaint(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b"\n \n", "contains no prompts"),
        (b"\xff", "not UTF-8"),
        (b"a\n" + b"x" * 100_001, ":2: "),
    ],
)
def test_files_of_prompts_are_checked_before_weights_are_read(content, said, drawing_model, capsys):
    if content is not None:
        Path("prompts.txt").write_bytes(content)
    assert main(["sample", "--prompts", "prompts.txt", "--model", str(drawing_model)]) == 1
    assert said in complaint(capsys)


def test_models_that_take_no_images_refuse_them_by_name(tmp_path, photo, capsys):
    (tmp_path / "sdxl").mkdir()
    (tmp_path / "sdxl" / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    assert main(["sample", PROMPT, "--model", "sdxl", "--image", "photo.png"]) == 2
    assert "--image: sdxl is a StableDiffusionXLPipeline, which takes no images" in complaint(capsys)
    assert main(["generate", PROMPT, "--model", "sdxl", "--controller", "shapes-tiny"]) == 2
    assert "a StableDiffusionXLPipeline, which does not run in the closed loop" in complaint(capsys)


def test_several_images_need_a_directory(capsys):
    assert main(["sample", PROMPT, "--num-images", "2", "--out", "a.png"]) == 2
    assert "2 images need a directory" in complaint(capsys)


def test_a_lora_may_have_a_weight_and_a_colon_in_its_name(tmp_path):
    assert parse_lora("a.safetensors") == ("a.safetensors", 1.0)
    assert parse_lora("org/name:0.8") == ("org/name", 0.8)
    assert parse_lora("a:-1.5") == ("a", -1.5)
    (tmp_path / "a:2").write_text("")
    assert parse_lora("a:2") == ("a:2", 1.0)


def test_models_to_quantize_are_all_or_those_that_are_named(capsys):
    assert parse_quantize(()) is None
    assert parse_quantize(("int8",)) == parse_quantize(("transformer:int8", "int8")) == "int8"
    assert parse_quantize(("controller:int8", "text_encoder:int8")) == {"controller": "int8", "text_encoder": "int8"}
    for word in ("int4", "vae:int8", "transformer"):
        assert main(["sample", PROMPT, "--quantize", word]) == 2
        error = complaint(capsys)
        assert "give int8, or one of transformer:int8, text_encoder:int8, controller:int8" in error


def test_read_text_puts_a_reader_before_the_verifier(monkeypatch):
    verifier = SimpleNamespace(name="model, ask")
    monkeypatch.setattr(ocr, "RapidTextReader", lambda: SimpleNamespace(name="reader"))
    monkeypatch.setattr(ClosedLoopPipeline, "from_pretrained", lambda *_, **__: SimpleNamespace(verifier=verifier))
    read, asked = (parse(["generate", 'a sign "OPEN"', *more]) for more in (["--read-text"], []))
    assert isinstance(read, Generate)
    assert isinstance(read._load([]).verifier, TextVerifier)
    assert read._load([]).verifier.name == "model, ask, text by reader"
    assert asked._load([]).verifier is verifier
    with pytest.raises(UsageError, match="--read-text is not used with --verification none"):
        parse(["generate", "x", "--read-text", "--verification", "none"])
