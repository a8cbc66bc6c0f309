import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from clvr_jax.convert.lora.files import Factors
from clvr_jax.convert.lora.writing import write_factors
from clvr_jax.convert.single_file.flux2 import bfl_key
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.merging.methods import Settings
from clvr_jax.merging.planning import plan_merge
from clvr_jax.merging.provenance import write_provenance
from clvr_jax.merging.streaming import merge
from clvr_jax.pipelines.registry import SHIPPED
from tests.merging.small_models import (
    CONFIG,
    FILE,
    KEY,
    edit,
    random_tensors,
    tensors_of,
    three_models,
    tuned,
    write_model,
)

GUIDANCE = "time_guidance_embed.guidance_embedder.linear_1.weight"


def names(root):
    return sorted(path.name for path in root.iterdir())


def refused(paths, message, error=ClvrError, **options):
    """What is wrong is one line, told by plan or merge, and nothing is left behind."""
    out = paths[0].parent / "out"
    before = names(out.parent)
    with pytest.raises(error, match=message) as caught:
        merge(plan_merge(*paths, **options), out)
    assert "\n" not in str(caught.value)
    assert names(out.parent) == before


def guided(folder):
    shape = (32, 32)
    edit(
        folder,
        lambda tensors: tensors.update(
            {
                GUIDANCE: np.zeros(shape, np.float32),
                GUIDANCE.replace("linear_1", "linear_2"): np.zeros(shape, np.float32),
            }
        ),
        {"guidance_embeds": True},
    )


def shorten(folder):
    path = folder / f"{FILE}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def set_one(value):
    return lambda folder: edit(folder, lambda tensors: tensors[KEY].__setitem__((3, 4), value))


def of_another_base(folder):
    write_model(folder, random_tensors(77))


def other_depth(folder):

    write_model(folder, random_tensors(0, dataclasses.replace(CONFIG, num_single_layers=3)), num_single_layers=3)


@pytest.mark.parametrize("role", ["distill", "align"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (guided, r"2 only in {role}: time_guidance_embed\.guidance_embedder\.linear_1"),
        (other_depth, r"\d only in {role}: single_transformer_blocks\.2"),
        (lambda f: edit(f, lambda t: t.pop(KEY)), f"1 missing: {KEY}"),
        (lambda f: edit(f, lambda t: t.update(more=np.ones(2))), "1 unexpected: more"),
        (lambda f: edit(f, lambda t: t.update({KEY: t[KEY][:5]})), rf"{KEY} \(expected \(32, .*\), found \(5, "),
        (lambda f: edit(f, lambda t: None, {"rope_theta": 10_000}), r"rope_theta \(base 2000, {role} 10000\)"),
        (set_one(np.nan), rf"{{role}}: {KEY} contains NaN or infinity"),
        (set_one(np.inf), rf"{{role}}: {KEY} contains NaN or infinity"),
        (of_another_base, r"{role}: .* is 1\.\d+ of the base's norm .*--force"),
        (shorten, "not a complete safetensors file"),
        (lambda f: (f / f"{FILE}.safetensors").unlink(), f"neither {FILE}.safetensors"),
        (lambda f: edit(f, lambda t: t.update({KEY: t[KEY].astype(np.float64)})), "contains float64"),
        (shutil.rmtree, "no such"),
    ],
)
def test_an_input_that_does_not_fit_is_one_clear_error(tmp_path, role, spoil, message):
    paths = three_models(tmp_path)
    spoil(tmp_path / role)
    refused(paths, message.format(role=role))


def test_a_base_that_is_not_finite_and_a_result_too_large_for_float16(tmp_path):
    paths = three_models(tmp_path)
    set_one(np.nan)(paths[0])
    refused(paths, f"base and distill: {KEY}|base: {KEY}")
    shutil.rmtree(paths[0])
    weights = random_tensors(0)
    weights[KEY][3, 4] = 60_000
    paths[0] = write_model(tmp_path / "base", weights, "float16")
    for path in paths[1:]:
        write_model(path, weights | {KEY: weights[KEY] * 1.08})
    refused(paths, f"{KEY}: the result does not fit float16")


def test_force_merges_what_only_seems_wrong(tmp_path):
    paths = three_models(tmp_path)
    of_another_base(paths[1])
    edit(paths[2], lambda tensors: None, {"rope_theta": 10_000})
    sums = merge(plan_merge(*paths, force=True), tmp_path / "out")
    assert sums[KEY].relative["distill"] > 1


@pytest.mark.parametrize(("role", "record"), [("distill", "merge.json"), ("align", "recipe.json")])
def test_an_input_whose_record_names_another_base_is_refused(tmp_path, role, record):
    """A merged model is a tuned one of its base, and says so."""
    paths = three_models(tmp_path / "first")
    plan = plan_merge(*paths)
    made = tmp_path / "made"
    merge(plan, made, finish=lambda folder, sums: write_provenance(plan, folder, "made", "clvr merge ...", sums))
    (made / "merge.json").rename(made / record)  # earlier versions wrote recipe.json
    inputs = [paths[0], made, paths[2]] if role == "distill" else [paths[0], paths[1], made]
    merge(plan_merge(*inputs), tmp_path / "of the same base")
    near = tuned(tensors_of(paths[0]), 9, 1e-4)
    inputs[0] = write_model(tmp_path / "another" / "base", near)
    refused(inputs, f"{role}: {record} in .* names another base.*--force")
    content = json.loads((made / record).read_text())
    content["inputs"]["base"] |= {"files": {"a": 3, "b": None, "c": []}, "source": ["x"] * 10_000}
    (made / record).write_text(json.dumps(content))
    refused(inputs, f"{role}: {record} in .* names another base.*--force")
    merge(plan_merge(*inputs, force=True), tmp_path / "forced")


def test_single_files_and_other_layouts_are_not_mixed_in(tmp_path):
    paths = three_models(tmp_path)
    tensors = {bfl_key(key): values for key, values in tensors_of(paths[1]).items()}
    save_file(tensors, tmp_path / "flux.safetensors")
    for place in range(3):
        inputs = [*paths]
        inputs[place] = tmp_path / "flux.safetensors"
        refused(inputs, "single file, and formats are not mixed; convert it with `clvr convert")
    refused(
        [paths[0], SHIPPED / "shapes-tiny" / "vae", paths[2]], "is a AutoencoderKLFlux2, the base a Flux2Transformer"
    )


def test_a_lora_of_another_model_is_refused(tmp_path):
    paths = three_models(tmp_path)
    random = np.random.default_rng(0).normal(size=(2, 48)).astype(np.float32)
    for module in ("transformer_blocks.0.attn.to_q", "transformer_blocks.7.attn.to_q"):
        write_factors(tmp_path / "lora", {module: Factors(random, random.T.copy(), 1.0)}, "transformer")
        refused([*paths[:2], tmp_path / "lora"], "not a LoRA of this transformer")
        refused([paths[0], tmp_path / "lora", paths[2]], "has no config.json")
    (tmp_path / "empty").mkdir()
    refused([*paths[:2], tmp_path / "empty"], "nor exactly one safetensors file")
    lora = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    lora.write_bytes(lora.read_bytes()[:-8])
    refused([*paths[:2], tmp_path / "lora"], "not a complete safetensors file")


def test_a_lora_with_nan_is_refused(tmp_path):
    paths = three_models(tmp_path)
    down, up = np.full((2, 32), np.nan, np.float32), np.ones((32, 2), np.float32)
    write_factors(tmp_path / "lora", {"transformer_blocks.0.attn.to_q": Factors(down, up, 1.0)}, "transformer")
    refused([*paths[:2], tmp_path / "lora"], r"align: transformer_blocks\.0\.attn\.to_q\.weight contains NaN")


def test_an_occupied_place_and_a_full_disk(tmp_path, monkeypatch):
    paths = three_models(tmp_path)
    with pytest.raises(UsageError, match="exists already"):
        merge(plan_merge(*paths), tmp_path / "base")
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        refused(paths, "are free")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clvr_jax.convert.streaming.conversion.write_tensor", full)
    refused(paths, "cannot be written .No space left on device")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "slerp"}, "none of dswm, linear, ties, dare"),
        ({"distill_weight": float("nan")}, "must be a number"),
        ({"align_weight": {"attn": float("inf")}}, "must be a number"),
        ({"density": 0.5}, "keeps all entries of the deltas"),
        ({"method": "ties", "density": 0.0}, "above 0"),
        ({"method": "dare", "density": 1.5}, "at most 1"),
        ({"method": "ties", "align_weight": -1.0}, "cannot be negative"),
    ],
)
def test_settings_that_make_no_sense_are_usage_errors(settings, message):
    with pytest.raises(UsageError, match=message):
        Settings(**settings)
