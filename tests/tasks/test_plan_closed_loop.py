"""The programs of a closed loop, planned together: their names, memory, seconds and numbers of calls."""

import dataclasses
import json

import jax
import pytest

from clvr_jax.cli import main
from clvr_jax.configs import closed_loop
from clvr_jax.convert.architectures import QWEN3_VL
from clvr_jax.cost_model.hardware import GIB
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.atomic_io import read_json
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.registry import SHIPPED
from clvr_jax.sharding import MeshConfig
from clvr_jax.tasks.flux2 import models
from clvr_jax.tasks.qwen3_vl import PRESETS
from clvr_jax.training.plan import plan, search
from clvr_jax.training.recipes import load_recipe

RECIPE = closed_loop.__file__


@pytest.fixture
def small(monkeypatch):
    """The sizes of the shipped models under the names of the published ones."""
    pipe = Flux2Pipeline.from_pretrained("shapes-tiny")
    controller = QWEN3_VL.config_from_dict(read_json(SHIPPED / "shapes-tiny" / "controller" / "config.json"))
    monkeypatch.setitem(models.KLEIN, "klein-4b", (pipe.transformer.config, pipe.text_encoder.config))
    monkeypatch.setitem(PRESETS, "qwen3-vl-8b", controller)
    monkeypatch.setattr(models, "AutoencoderKLFlux2Config", lambda: pipe.vae.config)
    monkeypatch.setattr(models, "Flux2Settings", lambda: dataclasses.replace(pipe.settings, text_buckets=(64, 96)))
    return dataclasses.replace(
        closed_loop.CONFIG, size=64, prompt_tokens=16, reply_tokens=16, verification_tokens=8, dtype="float32"
    )


@pytest.mark.slow
def test_the_models_are_in_memory_together_and_the_seconds_of_all_calls_add_up(small):
    mesh = MeshConfig(fsdp=1, tensor=2, devices=2)
    report = plan(load_recipe(RECIPE), dataclasses.replace(small, mesh=mesh), "cpu:2")
    stages = {stage.report.name: stage for stage in report.stages}
    assert list(stages) == [
        "encode text of 64 tokens", "encode one reference", "denoise with 0 references", "denoise with 1 references",
        "denoise with 2 references", "decode image", "controller prefill with 0 images",
        "controller prefill with 1 images", "controller prefill with 2 images", "controller decode step",
        "verifier prefill with 1 image", "verifier decode step",
    ]  # fmt: skip
    calls = [3, 3, 1, 1, 1, 3, 1, 1, 1, 3 * 16, 3, 3 * 8]
    assert [stage.calls for stage in report.stages] == calls
    assert set(report.weights) == {"transformer", "text_encoder", "vae", "controller"}
    largest = max(stage.working for stage in report.stages)
    assert report.memory.total == sum(report.weights.values()) + sum(s.code for s in report.stages) + largest
    assert report.memory.total > max(stage.report.memory.total for stage in report.stages)
    assert all(stage.working > 0 for stage in report.stages)
    seconds = [stage.report.roofline.overlapped for stage in report.stages]
    assert report.overlapped == pytest.approx(sum(n * own for n, own in zip(calls, seconds, strict=True)))
    assert report.overlapped < report.serial
    # Images are encoded and decoded by every device; all other products are divided.
    image, denoised = (stages[name].report for name in ("decode image", "denoise with 0 references"))
    assert image.flops_per_chip == image.flops
    assert denoised.flops_per_chip == denoised.flops / 2
    assert denoised.flops < stages["denoise with 2 references"].report.flops
    # The cache is sharded along its heads, as the weights are.
    step = stages["controller decode step"].report
    assert step.memory.output < step.memory.arguments / 10


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["image", "loop"])
def test_cached_references_are_planned(small, mode):
    mesh = MeshConfig(fsdp=1, tensor=2, devices=2)
    config = dataclasses.replace(small, mesh=mesh, reference_cache=mode, stages="cache|denoise with 2")
    report = plan(load_recipe(RECIPE), config, "cpu:2")
    stages = {stage.report.name: stage for stage in report.stages}
    names = (
        ["cache 1 references", "cache 2 references"] if mode == "image" else ["cache reference 1", "cache reference 2"]
    )
    assert list(stages) == [*names, "denoise with 2 references"]
    transformer, _ = models.KLEIN["klein-4b"]
    image = (64 // models.AutoencoderKLFlux2Config().token_pixels) ** 2
    blocks = transformer.num_layers + transformer.num_single_layers
    reference = 2 * blocks * transformer.inner_dim * image * 4  # bytes on all chips
    denoised = stages["denoise with 2 references"]
    assert report.kept == (2 * reference // 2 if mode == "loop" else 0)
    assert report.memory.total == sum(report.weights.values()) + report.kept + sum(
        stage.code for stage in report.stages
    ) + max(stage.working for stage in report.stages)
    output = stages[names[1]].report.memory.output
    assert output == pytest.approx((1 if mode == "loop" else 2) * reference // 2, abs=64)  # and pointers
    first, second = (stages[name].report.flops for name in names)
    assert first < second < 1.2 * first if mode == "loop" else 1.9 * first < second < 2.4 * first
    text, steps = 64, config.steps
    assert denoised.token_passes == steps * (text + image) + (1 if mode == "loop" else 2) * image
    assert report.token_passes == denoised.token_passes
    assert report.to_json()["token_passes"] == report.token_passes


@pytest.mark.slow
def test_quantized_caches_are_planned_in_their_own_bytes(small):
    mesh = MeshConfig(fsdp=1, tensor=2, devices=2)
    config = dataclasses.replace(small, mesh=mesh, reference_cache="loop", reference_cache_dtype="int8")
    report = plan(load_recipe(RECIPE), dataclasses.replace(config, stages="cache reference 2|denoise with 2"), "cpu:2")
    transformer, _ = models.KLEIN["klein-4b"]
    image = (64 // models.AutoencoderKLFlux2Config().token_pixels) ** 2
    blocks = transformer.num_layers + transformer.num_single_layers
    of_a_head = transformer.attention_head_dim + 4
    reference = 2 * blocks * image * transformer.num_attention_heads * of_a_head  # bytes on all chips
    assert report.kept == 2 * reference // 2
    cached, denoised = (stage.report for stage in report.stages)
    assert cached.memory.output == pytest.approx(reference // 2, abs=128)  # and pointers
    assert denoised.memory.arguments > report.kept
    with pytest.raises(UsageError, match="--reference-cache-dtype int8 needs --reference-cache image or loop"):
        closed_loop.program(dataclasses.replace(small, reference_cache_dtype="int8"))


@pytest.mark.slow
def test_some_stages_are_planned_alone_and_written_as_json(small, tmp_path, capsys):
    out = tmp_path / "plan.json"
    options = ["--stages", "decode step", "--size", "64", "--prompt-tokens", "16", "--reply-tokens", "16"]
    options += ["--quantize", "int8"]
    assert main(["plan", RECIPE, "--topology", "cpu:1", *options, "--out", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert [stage["name"] for stage in printed["stages"]] == ["controller decode step", "verifier decode step"]
    assert printed["memory"]["fits"]
    with pytest.raises(UsageError, match="matches no stage; the stages are encode text"):
        closed_loop.program(dataclasses.replace(small, stages="sleep"))
    with pytest.raises(UsageError, match="no regular expression"):
        closed_loop.program(dataclasses.replace(small, stages="("))
    with pytest.raises(UsageError, match="multiple of 32"):
        closed_loop.program(dataclasses.replace(small, size=72))
    with pytest.raises(ClvrError, match="--search takes one program"):
        list(search(load_recipe(RECIPE), dataclasses.replace(small, stages="verifier decode"), "cpu:1"))


def test_the_weights_of_the_published_models_are_counted():
    """Without compiling: bfloat16 weights of klein 4B, 27 layers of its text encoder, the VAE, and Qwen3-VL 8B."""
    programs = closed_loop.program(closed_loop.CONFIG)
    weights = {name: tree for program in programs for name, tree in program.weights.items()}
    sizes = {
        name: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) / GIB
        for name, tree in weights.items()
    }
    assert sizes["transformer"] == pytest.approx(7.22, abs=0.02)
    assert sizes["controller"] == pytest.approx(16.33, abs=0.05)
    assert 5.5 < sizes["text_encoder"] < 6.5
    quantized = closed_loop.program(dataclasses.replace(closed_loop.CONFIG, quantize="int8"))
    for name, tree in {name: tree for program in quantized for name, tree in program.weights.items()}.items():
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) / GIB
        assert size == pytest.approx(sizes[name], rel=0.01) if name == "vae" else size < 0.51 * sizes[name]
    names = [program.name for program in programs]
    assert "encode text of 1024 tokens" in names
    assert "denoise with 2 references" in names
