import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import clvr_jax as clvr
from clvr_jax.checkpoint_io.tensors import stored_tensors
from clvr_jax.convert.streaming.conversion import convert
from clvr_jax.convert.streaming.planning import plan as plan_conversion
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.merging import streaming
from clvr_jax.merging.methods import Settings
from clvr_jax.merging.norms import by_layer, total
from clvr_jax.merging.planning import plan_merge
from clvr_jax.merging.provenance import write_provenance
from clvr_jax.merging.streaming import merge
from tests.merging.small_models import KEY, bits, random_tensors, sha256, tensors_of, three_models, tuned, write_model
from tests.merging.test_deltas import ulps


class Killed(BaseException):
    pass


def merged(paths, out, settings=None, **options):
    merge(plan_merge(*paths, settings or Settings(), **options), out)
    return tensors_of(out)


def small_blocks(monkeypatch):
    monkeypatch.setattr(streaming, "_BLOCKS", (64, 256))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 1.3)])
def test_a_merge_is_the_float64_result_to_one_ulp_and_that_of_trees_bit_for_bit(tmp_path, monkeypatch, dtype, weights):
    paths = three_models(tmp_path, (dtype,) * 3, shards=(3, 2, 1))
    found = merged(paths, tmp_path / "out", Settings(distill_weight=weights[0], align_weight=weights[1]))
    base, distill, align = (tensors_of(path) for path in paths)
    trees = [jax.tree.map(jnp.asarray, tensors) for tensors in (base, distill, align)]
    as_tree = clvr.dswm(*trees, *weights)
    assert found.keys() == base.keys()
    for key, ours in found.items():
        b, d, a = (tensors[key].astype(np.float64) for tensors in (base, distill, align))
        exact = b + weights[0] * (d - b) + weights[1] * (a - b)
        assert ours.dtype == base[key].dtype
        if dtype == "float32":
            # Each of four roundings shows where the changes are as large as what they are added to.
            terms = np.abs(b) + np.abs(d - b) + np.abs(a - b)
            assert ulps(ours, exact, terms) <= 2, key
            small = 8 * np.maximum(np.abs(d - b), np.abs(a - b)) < np.abs(b)
            ours_small, exact, b = ours[small], exact[small], b[small]
            assert ulps(ours_small, exact, b) <= 1, key
        else:
            assert ulps(ours, exact, b) <= 1, key
        assert ours.tobytes() == np.asarray(as_tree[key]).tobytes(), key
    small_blocks(monkeypatch)
    merged(paths, tmp_path / "again", Settings(distill_weight=weights[0], align_weight=weights[1]))
    assert bits(tmp_path / "again") == bits(tmp_path / "out")


def test_dtypes_may_differ_and_the_result_is_in_that_of_the_base(tmp_path):
    paths = three_models(tmp_path, ("bfloat16", "float32", "float16"))
    plan = plan_merge(*paths)
    assert [note[:29] for note in plan.notes] == ["distill is in float32, the ba", "align is in float16, the base"]
    merge(plan, tmp_path / "out")
    base, distill, align = (
        {key: values.astype(np.float32) for key, values in tensors_of(path).items()} for path in paths
    )
    for key, ours in tensors_of(tmp_path / "out").items():
        assert ours.dtype.name == "bfloat16"
        exact = distill[key].astype(np.float64) + align[key] - base[key]
        assert ulps(ours, exact, base[key]) <= 1


def test_weights_by_pattern_hold_for_the_keys_they_are_found_in(tmp_path):
    paths = three_models(tmp_path)
    settings = Settings(distill_weight={r"^single_.*\.1\.": 0.5, "": 0.0}, align_weight={"": 0.0})
    found, (base, distill, _) = merged(paths, tmp_path / "out", settings), map(tensors_of, paths)
    assert np.allclose(found[KEY], (base[KEY] + distill[KEY]) / 2, atol=1e-6)
    others = [key for key in found if not key.startswith("single_transformer_blocks.1.")]
    assert all(np.array_equal(found[key], base[key]) for key in others)
    with pytest.raises(ClvrError, match="matched first by 'atn'"):
        plan_merge(*paths, Settings(align_weight={"atn": 0.5}))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dswm", "ties", "dare"])
def test_a_merge_that_was_killed_goes_on_and_ends_the_same(tmp_path, method):
    paths, settings = three_models(tmp_path, shards=(2, 1, 3)), Settings(method)
    whole = merge(plan_merge(*paths, settings), tmp_path / "whole")
    seen = []

    def kill(key):
        seen.append(key)
        if len(seen) == 20:
            raise Killed

    out = tmp_path / "out"
    with pytest.raises(Killed):
        merge(plan_merge(*paths, settings), out, on_tensor=kill)
    assert not out.exists()
    with pytest.raises(UsageError, match="--resume"):
        merge(plan_merge(*paths, settings), out)
    with pytest.raises(ClvrError, match="another merge"):
        merge(plan_merge(*paths, Settings(method, align_weight=0.5)), out, resume=True)
    plan, again = plan_merge(*paths, settings), []
    written, real = [], streaming._merged
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            streaming,
            "_merged",
            lambda plan, tensor_slice, *rest: written.append(tensor_slice) or real(plan, tensor_slice, *rest),
        )
        sums = merge(plan, out, resume=True, on_tensor=again.append)
    assert len(again) == len(whole)
    assert len(written) == len(whole) - 20
    assert sums == whole
    assert bits(out) == bits(tmp_path / "whole")
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in (tmp_path / "whole").iterdir())
    for side, path in zip(plan.inputs, paths, strict=True):
        assert side.digests.finish() == sha256(path)


@pytest.mark.parametrize("reach", [64, 2**26])
def test_the_digests_are_those_of_the_files_in_whatever_order_they_are_read(tmp_path, monkeypatch, reach):
    monkeypatch.setattr("clvr_jax.merging.digests._GAP", reach)
    paths = three_models(tmp_path, shards=(3, 1, 2))
    backwards = dict(reversed(tensors_of(paths[2]).items()))
    write_model(paths[2], backwards)
    plan = plan_merge(*paths)
    merge(plan, tmp_path / "out")
    for side, path in zip(plan.inputs, paths, strict=True):
        expected = {name: digest for name, digest in sha256(path).items() if name in side.digests.finish()}
        assert side.digests.finish() == expected


def test_orbax_folders_merge_to_the_same_numbers(tmp_path):
    paths = three_models(tmp_path)
    merge(plan_merge(*paths), tmp_path / "torch")
    for path in paths:
        convert(plan_conversion(path, "jax"), tmp_path / "jax" / path.name)
    inputs = [tmp_path / "jax" / path.name for path in paths]
    sums = merge(plan_merge(*inputs), tmp_path / "merged")
    convert(plan_conversion(tmp_path / "merged", "torch"), tmp_path / "back")
    assert bits(tmp_path / "back") == bits(tmp_path / "torch")
    assert total(sums.values()).relative["distill"] > 0.01
    digests = plan_merge(*inputs).base.digests.finish()
    assert list(digests) == ["params/"]
    shutil.rmtree(inputs[0])
    convert(plan_conversion(paths[0], "jax"), inputs[0])  # the same weights at another time
    assert plan_merge(*inputs).base.digests.finish() == digests
    with pytest.raises(ClvrError, match=r"formats are not mixed: `clvr convert .*distill DIRECTORY --to jax`"):
        plan_merge(inputs[0], paths[1], inputs[2])


def test_linear_is_the_weighted_average_of_the_two_models(tmp_path):
    paths = three_models(tmp_path)
    found = merged(paths, tmp_path / "out", Settings("linear", 1.0, 3.0))
    _, distill, align = map(tensors_of, paths)
    assert all(np.allclose(found[key], 0.25 * distill[key] + 0.75 * align[key], atol=1e-6) for key in found)
    with pytest.raises(UsageError, match="both weights are 0"):
        plan_merge(*paths, Settings("linear", 0.0, 0.0))


def test_ties_is_what_its_paper_says(tmp_path, monkeypatch):
    paths, density = three_models(tmp_path), 0.3
    small_blocks(monkeypatch)
    found = merged(paths, tmp_path / "out", Settings("ties", 1.0, 2.0, density))
    base, distill, align = map(tensors_of, paths)
    for key, ours in found.items():
        trimmed = []
        for side in (distill, align):
            change = side[key] - base[key]
            order = np.argsort(np.abs(change), axis=None)[: change.size - max(1, round(density * change.size))]
            change.reshape(-1)[order] = 0
            trimmed.append(change)
        elected = np.sign(trimmed[0] + 2 * trimmed[1])
        agree = [(np.sign(change) == elected) & (elected != 0) for change in trimmed]
        share = agree[0] + 2.0 * agree[1]
        mean = (trimmed[0] * agree[0] + 2 * trimmed[1] * agree[1]) / np.where(share, share, 1)
        assert np.allclose(ours, base[key] + mean, atol=1e-6), key
    assert {float(x) for x in np.unique(share)} == {0.0, 1.0, 2.0, 3.0}  # every case occurs


@pytest.mark.slow
def test_dare_drops_at_random_and_keeps_the_mean(tmp_path):
    base = {key: np.zeros_like(values) for key, values in random_tensors(0).items()}
    ones = {key: np.ones_like(values) for key, values in base.items()}
    paths = [
        write_model(tmp_path / "base", base),
        write_model(tmp_path / "distill", ones),
        write_model(tmp_path / "align", base),
    ]
    values = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        found = merged(paths, tmp_path / name, Settings("dare", density=0.25, seed=seed))
        values[name] = np.concatenate([found[key].reshape(-1) for key in sorted(found)])
    assert set(np.unique(values["a"])) == {0.0, 4.0}
    assert values["a"].mean() == pytest.approx(1.0, abs=0.02)
    assert np.array_equal(values["a"], values["b"])
    assert 0.1 < np.mean(values["a"] == values["c"]) < 0.7
    same_shape = merged(paths, tmp_path / "d", Settings("dare", density=0.25))
    keys = [f"single_transformer_blocks.{i}.attn.to_out.weight" for i in (0, 1)]
    assert not np.array_equal(same_shape[keys[0]], same_shape[keys[1]])


def test_norms_and_cosines_are_those_of_numpy(tmp_path, monkeypatch):
    paths = three_models(tmp_path, ("bfloat16", "bfloat16", "float32"))
    small_blocks(monkeypatch)
    sums = merge(plan_merge(*paths), tmp_path / "out")
    base, distill, align = ({k: v.astype(np.float64) for k, v in tensors_of(path).items()} for path in paths)
    for name, own in by_layer(sums).items():
        keys = [key for key in base if key == name or key.startswith(name + ".")]
        b, d, a = (np.concatenate([s[key].reshape(-1) for key in keys]) for s in (base, distill, align))
        length = np.linalg.norm(b)
        assert own.relative["distill"] == pytest.approx(np.linalg.norm(d - b) / length, rel=1e-5)
        assert own.relative["align"] == pytest.approx(np.linalg.norm(a - b) / length, rel=1e-5)
        cosine = (d - b) @ (a - b) / np.linalg.norm(d - b) / np.linalg.norm(a - b)
        assert own.cosine == pytest.approx(cosine, abs=1e-5)
    names = list(by_layer(sums))
    assert "single_transformer_blocks.1" in names
    assert "time_guidance_embed.timestep_embedder.linear_1" in names
    assert names.index("transformer_blocks.0") < names.index("transformer_blocks.1")


def pipeline(folder, tensors, steps=None, distilled=False, sampling=None):
    """A pipeline folder around a transformer: what else is in it need not be real."""
    write_model(folder / "transformer", tensors)
    for name in ("scheduler", "vae", "tokenizer"):
        (folder / name).mkdir()
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": folder.name}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler | (steps or {})))
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(f"vae of {folder.name}".encode())
    (folder / "tokenizer" / "tokenizer.json").write_text(f'"{folder.name}"')
    index = {"_class_name": "Flux2KleinPipeline", "is_distilled": distilled}
    (folder / "model_index.json").write_text(json.dumps(index))
    if sampling:
        (folder / "clvr.json").write_text(json.dumps({"flux2": sampling}))
    (folder / "README.md").write_text(f"---\nlicense: mit-of-{folder.name}\n---\n# {folder.name}\n")
    return folder


def files(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("with_clvr", [True, False])
@pytest.mark.parametrize("is_distilled_so", [True, False])
def test_references_are_attended_to_as_in_the_aligned_model(tmp_path, with_clvr, is_distilled_so):
    weights = random_tensors(0)
    sampling = {"num_inference_steps": 4} if with_clvr else None
    slow = {"num_inference_steps": 28} if with_clvr else None
    cached = {"reference_cache": "loop"}
    base = pipeline(tmp_path / "base", weights, sampling=slow)
    few = {**(sampling or {}), **cached} if is_distilled_so else sampling
    distill = pipeline(tmp_path / "distill", tuned(weights, 1), distilled=True, sampling=few)
    align = pipeline(tmp_path / "align", tuned(weights, 2), sampling=cached)
    for directory in (align, *([distill] if is_distilled_so else [])):
        index = json.loads((directory / "model_index.json").read_text())
        (directory / "model_index.json").write_text(json.dumps(index | {"_class_name": "Flux2KleinKVPipeline"}))
    plan = plan_merge(base, distill, align)
    merge(plan, tmp_path / "out")
    made = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert made == {"_class_name": "Flux2KleinKVPipeline", "is_distilled": True}
    flux2 = json.loads((tmp_path / "out" / "clvr.json").read_text())["flux2"]
    assert flux2 == {**(sampling or {}), "reference_cache": "loop"}
    notes = " ".join(plan.notes)
    if not is_distilled_so:
        assert "references are attended to as in align: reference_cache loop" in notes
    differing = "distill was trained to attend to references otherwise (Flux2KleinPipeline)"
    assert (differing in notes) is not is_distilled_so


def test_references_may_be_attended_to_as_in_the_distilled_model(tmp_path):
    weights = random_tensors(0)
    base = pipeline(tmp_path / "base", weights)
    distill = pipeline(tmp_path / "distill", tuned(weights, 1), distilled=True, sampling={"reference_cache": "loop"})
    align = pipeline(tmp_path / "align", tuned(weights, 2), sampling={})
    for references_of, expected in (("distill", "loop"), ("align", None)):
        out = tmp_path / f"as_{references_of}"
        merge(plan_merge(base, distill, align, references_of=references_of), out)
        settings = json.loads((out / "clvr.json").read_text()) if (out / "clvr.json").exists() else {}
        assert settings.get("flux2", {}).get("reference_cache") == expected


def test_models_without_a_pipeline_attend_to_references_as_the_base_does(tmp_path):
    weights = random_tensors(0)
    base = pipeline(tmp_path / "base", weights, sampling={"num_inference_steps": 28})
    few = {"num_inference_steps": 4, "reference_cache": "loop"}
    distill = pipeline(tmp_path / "distill", tuned(weights, 1), distilled=True, sampling=few)
    align = write_model(tmp_path / "align", tuned(weights, 2))
    plan = plan_merge(base, distill, align)
    merge(plan, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "clvr.json").read_text())["flux2"] == {"num_inference_steps": 4}
    assert any("as in base" in note for note in plan.notes)
    assert any("otherwise (reference_cache loop)" in note for note in plan.notes)
    cached = pipeline(tmp_path / "cached", tuned(weights, 3), sampling={"reference_cache": "loop"})
    bare = write_model(tmp_path / "bare", tuned(weights, 1))
    assert not any("otherwise" in note for note in plan_merge(base, bare, cached).notes)


@pytest.mark.parametrize("shift", [None, 3.0])
def test_of_a_pipeline_the_transformer_is_merged_and_all_else_is_the_bases(tmp_path, shift):
    weights = random_tensors(0)
    steps = {"shift": shift} if shift else None
    base = pipeline(tmp_path / "base", weights)
    distill = pipeline(tmp_path / "distill", tuned(weights, 1), steps, distilled=True)
    align = write_model(tmp_path / "align", tuned(weights, 2))
    plan = plan_merge(base, distill, align)
    out = tmp_path / "out"
    merge(plan, out, finish=lambda folder, sums: write_provenance(plan, folder, out.name, "clvr merge ...", sums))
    made, ours, theirs = files(out), files(base), files(distill)
    own = {"README.md", "merge.json", "transformer/diffusion_pytorch_model.safetensors"}
    assert made.keys() == ours.keys() | {"merge.json"}
    assert plan.scheduler == ("distill" if shift else "base")
    for name in made.keys() - own:
        is_sampling = name == "model_index.json" or (shift and name.startswith("scheduler/"))
        expected = theirs if is_sampling else ours
        assert made[name] == expected[name], name
    recipe = json.loads(made["merge.json"])
    assert recipe["scheduler"] == plan.scheduler
    assert "the sampling options are those of distill: is_distilled true" in recipe["notes"]
    assert [recipe["inputs"][role]["license"] for role in ("base", "distill", "align")] == [
        "mit-of-base", "mit-of-distill", None,
    ]  # fmt: skip
    for role, path in (("base", base), ("distill", distill)):
        assert recipe["inputs"][role]["files"] == sha256(path / "transformer")
    card = made["README.md"].decode()
    for text in (
        str(base),
        str(distill),
        str(align),
        "mit-of-base",
        "W_base + w_d",
        "is_distilled true",
        "`transformer`",
    ):
        assert text in card


@pytest.mark.parametrize("sample_size", [64, 128])
def test_steps_and_guidance_are_those_of_distill_unless_more_differs(tmp_path, sample_size):
    weights = random_tensors(0)
    of_base = {"sample_size": 64, "num_inference_steps": 28, "guidance_scale": 1.7}
    of_distill = {"sample_size": sample_size, "num_inference_steps": 4, "guidance_scale": 1.0}
    base = pipeline(tmp_path / "base", weights, sampling=of_base)
    distill = pipeline(tmp_path / "distill", tuned(weights, 1), sampling=of_distill)
    plan = plan_merge(base, distill, write_model(tmp_path / "align", tuned(weights, 2)))
    merge(plan, tmp_path / "out")
    made = json.loads((tmp_path / "out" / "clvr.json").read_text())["flux2"]
    (note,) = (note for note in plan.notes if "num_inference_steps 4, guidance_scale 1.0" in note)
    assert made == (of_distill if sample_size == 64 else of_base)
    assert ("clvr.json is the base's" in note) == (sample_size == 128)


def test_a_scheduler_of_another_kind_stays_the_bases(tmp_path):
    weights = random_tensors(0)
    base = pipeline(tmp_path / "base", weights)
    distill = pipeline(tmp_path / "distill", tuned(weights, 1), {"_class_name": "LCMScheduler"})
    plan = plan_merge(base, distill, distill)
    assert plan.scheduler == "base"
    assert any("LCMScheduler" in note for note in plan.notes)


def test_a_merged_pipeline_runs_in_diffusers_as_the_sum_of_the_deltas(tmp_path):
    import diffusers

    from tests.merging.small_models import CONFIG
    from tests.models.flux2.test_transformer import make_inputs, run_reference
    from tests.models.parity import TOLERANCE, relative_error

    weights = random_tensors(0)
    sides = weights, tuned(weights, 1), tuned(weights, 2)
    names = ("base", "distill", "align")
    paths = [write_model(tmp_path / name, tensors) for name, tensors in zip(names, sides, strict=True)]
    models = [diffusers.Flux2Transformer2DModel.from_pretrained(path) for path in paths]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    absent, pipelines = dict.fromkeys(("vae", "text_encoder", "tokenizer")), []
    for path, model in zip(paths, models, strict=True):
        made = diffusers.Flux2KleinPipeline(scheduler=scheduler, transformer=model, **absent)
        made.save_pretrained(tmp_path / "pipelines" / path.name, max_shard_size="40KB")
        pipelines.append(tmp_path / "pipelines" / path.name)
    assert len(list((pipelines[0] / "transformer").glob("*.safetensors"))) > 1
    merge(plan_merge(*pipelines), tmp_path / "out")
    loaded = diffusers.Flux2KleinPipeline.from_pretrained(tmp_path / "out", **absent).transformer
    base, distill, align = (model.double().state_dict() for model in models)
    by_hand = models[0]
    by_hand.load_state_dict({key: distill[key] + align[key] - base[key] for key in base})
    inputs = make_inputs(CONFIG)
    expected = run_reference(by_hand.float(), inputs)
    assert relative_error(run_reference(loaded, inputs).numpy(), expected) < TOLERANCE
    alone = diffusers.Flux2Transformer2DModel.from_pretrained(paths[1])
    assert relative_error(run_reference(alone, inputs).numpy(), expected) > 0.01
    assert torch.isfinite(expected).all()


def test_peak_memory_of_blocks_does_not_hold_a_tensor_in_float32(tmp_path, monkeypatch):
    """Every array that is handed to the compiled expression is a block."""
    paths, sizes, real = three_models(tmp_path), [], streaming.merge_block
    small_blocks(monkeypatch)

    def watched(*operands, **options):
        sizes.extend(operand.size for operand in operands[:3])
        return real(*operands, **options)

    monkeypatch.setattr(streaming, "merge_block", watched)
    merge(plan_merge(*paths), tmp_path / "out")
    assert set(sizes) == {64, 256}
    assert max(s.nbytes for s in stored_tensors(paths[0]).values()) > 4 * 256
