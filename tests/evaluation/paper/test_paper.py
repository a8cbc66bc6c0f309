"""The whole command on one prompt: models, merges, results, times, changes, page."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from clvr_jax.checkpoint_io.tensors import stored_tensors
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.evaluation.paper.models import recover_distilled
from clvr_jax.evaluation.paper.stages import Stages
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.registry import resolve
from clvr_jax.scripts import paper

ROWS = ("base-one-shot", "sft-loop", "merged-loop")


@pytest.fixture
def models(tmp_path):
    """The base in two steps, as the fine-tuned model one whose loops end early, and as the distilled one the base,
    larger by a hundredth."""
    directories = {name: str(tmp_path / name) for name in ("base", "sft", "distilled")}
    pipe = Flux2Pipeline.from_pretrained("shapes-tiny")
    pipe.save_pretrained(directories["sft"])
    pipe = Flux2Pipeline.from_pretrained("shapes-tiny-base")
    pipe.settings = dataclasses.replace(pipe.settings, num_inference_steps=2)
    pipe.save_pretrained(directories["base"])
    nnx.update(pipe.transformer, jax.tree.map(lambda leaf: 1.01 * leaf, nnx.state(pipe.transformer)))
    pipe.settings = dataclasses.replace(pipe.settings, is_distilled=True, num_inference_steps=4, guidance_scale=1.0)
    pipe.save_pretrained(directories["distilled"])
    return directories


@pytest.mark.slow
def test_a_small_run_writes_the_page_and_a_second_one_draws_nothing(models, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(paper, "ROWS", {name: paper.ROWS[name] for name in ROWS})
    monkeypatch.setattr(paper, "SPLITS", ("complex",))
    options = {"out": tmp_path / "out", "page": tmp_path / "docs" / "results.md", **models}
    paper.main(**options, limit=1, timed=1, seeds=(0,))
    text = options["page"].read_text()
    assert "| SFT, loop |" in text
    assert "| merged (DSWM), loop |" in text
    assert "distillation 1.00%" in text
    folders = {path.name.rsplit("-", 1)[0]: path for path in options["out"].iterdir() if path.is_dir()}
    merged, aligned, base = (
        stored_tensors(folders[f"model-{name}"] / "transformer") for name in ("merged", "sft", "base")
    )
    for key, stored in merged.items():
        np.testing.assert_allclose(stored.open(), aligned[key].open() + 0.01 * base[key].open(), atol=1e-5)
    settings = json.loads((folders["model-merged"] / "clvr.json").read_text())["flux2"]
    assert (settings["num_inference_steps"], settings["guidance_scale"]) == (4, 1.0)
    results = json.loads((folders["merged-loop-complex-0"] / "results.json").read_text())
    for entry in results["pictures"]:
        assert entry["nfe"] == 4 * entry["steps"]
    assert (folders["model-merged"] / "controller" / "model.safetensors").exists()
    drawn = {path: path.stat().st_mtime_ns for path in options["out"].rglob("*.png")}
    monkeypatch.setattr(paper.Row, "system", None)  # nothing can be drawn any more
    paper.main(**options, limit=1, timed=1, seeds=(0,))
    assert options["page"].read_text() == text
    assert {path: path.stat().st_mtime_ns for path in options["out"].rglob("*.png")} == drawn


@pytest.mark.slow
def test_the_recovered_distilled_model_merges_into_the_shipped_one(tmp_path):
    recovered = stored_tensors(recover_distilled(Stages(tmp_path)) / "transformer")
    shipped = resolve("shapes-tiny")[0]
    merged, sft, base = (stored_tensors(shipped / f"transformer{name}") for name in ("", "_sft", "_base"))
    for key, stored in merged.items():
        again = base[key].open().astype(np.float32) + (recovered[key].open() - base[key].open())
        again += sft[key].open().astype(np.float32) - base[key].open()
        np.testing.assert_allclose(again, stored.open(), atol=1e-6)


def test_what_is_missing_is_told_before_anything_is_drawn(tmp_path):
    with pytest.raises(ClvrError, match="no such model"):
        paper.main(tmp_path / "out", tmp_path / "results.md", distilled="nothing")
    with pytest.raises(UsageError, match="different seeds"):
        paper.main(tmp_path / "out", tmp_path / "results.md", seeds=(0, 0))
    with pytest.raises(UsageError, match="give the model with --pprl"):
        paper.main(tmp_path / "out", tmp_path / "results.md", aligned="pprl")
    with pytest.raises(UsageError, match="--limit"):
        paper.main(tmp_path / "out", tmp_path / "results.md", limit=0)
