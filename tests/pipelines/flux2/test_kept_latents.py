"""Generated images that become references with their latents, beside computations that know neither store nor cache."""

import dataclasses
import gc
import io
import json

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from clvr_jax.cli import main
from clvr_jax.errors import UsageError
from clvr_jax.models.flux2 import AutoencoderKLFlux2
from clvr_jax.pipelines.closed_loop import ClosedLoopPipeline
from clvr_jax.pipelines.flux2 import Flux2Pipeline, kept_latents, references
from clvr_jax.pipelines.flux2.image_generator import Flux2ImageGenerator
from clvr_jax.pipelines.flux2.kept_latents import LatentReference
from clvr_jax.pipelines.flux2.noise import make_noise, row_keys
from clvr_jax.pipelines.flux2.programs import attended_references, denoise
from clvr_jax.pipelines.flux2.references import ReferenceStore
from clvr_jax.pipelines.images import to_pil
from clvr_jax.pipelines.sdxl import SDXLPipeline
from clvr_jax.reasoning import GenerationRequest
from clvr_jax.reasoning.loop.budget import Budget
from clvr_jax.sharding import MeshConfig
from tests.helpers.models import random_module
from tests.models.parity import run_jitted
from tests.reasoning.scripted import NoisyController

PROMPT = "a red circle"
REPLIES = ("a circle<|image_gen|>", "Unmet: red.<|image_gen|>", "Unmet: a circle.<|image_gen|>")
GRID, TOKENS, CHANNELS = (8, 8), 64, 16
EVAL = ("eval", "shapes", "--model", "shapes-tiny", "--out", "o")


@pytest.fixture(scope="module")
def pipe(folder):
    """A pipeline that keeps latents, whose programs several tests share."""
    return Flux2Pipeline.from_pretrained(str(folder), reference_cache="loop", reference_latents="kept")


def photo(seed, width=64, height=64):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def latents(seed):
    return np.random.default_rng(seed).normal(size=(TOKENS, CHANNELS)).astype(np.float32)


def decoded(pipe, latents_tc):
    """The image of latents, by the autoencoder itself."""
    tokens = latents_tc.reshape(1, *GRID, CHANNELS)
    image = run_jitted(lambda vae, given: vae.decode_tokens(given), pipe.vae, tokens)
    return to_pil(np.clip(np.asarray(image[0]) / 2 + 0.5, 0, 1))


def difference(one, other):
    return np.abs(np.asarray(one, int) - np.asarray(other, int)).max()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "image", "loop"])
def test_a_loop_equals_a_direct_computation_from_the_latents(folder, mode):
    """Each generation is computed from the user's encoded image and the latents of all before it, from scratch."""
    pipe = Flux2Pipeline.from_pretrained(str(folder), reference_cache=mode, reference_latents="kept")
    graphdef, state = nnx.split(pipe.transformer)
    sigmas = np.asarray(pipe.schedule.sigmas(2, TOKENS), np.float32)

    def direct(text, tokens, seed):
        conditions = pipe._text([text], use_guidance=True)
        noise = make_noise(row_keys([seed]), np.array([0]), (*GRID, CHANNELS))
        grids = (GRID,) * (tokens.shape[1] // TOKENS)

        def run(state, noise, conditions, tokens):
            seen = attended_references(nnx.merge(graphdef, state), tokens, grids, mode)
            shown = grids if mode == "none" else ()
            return denoise(graphdef, state, noise, conditions, seen, sigmas, np.float32(3), GRID, shown)

        return np.asarray(jax.jit(run)(state, noise, conditions, tokens))

    own = photo(0)
    pixels = np.asarray(own, np.float32)[None] / 127.5 - 1
    tokens = run_jitted(lambda vae, images: vae.encode_tokens(images), pipe.vae, pixels).reshape(1, TOKENS, CHANNELS)
    tokens, images, generator = np.asarray(tokens), (own,), Flux2ImageGenerator(pipe, steps=2)
    for number in range(3):
        request = GenerationRequest(PROMPT, REPLIES[: number + 1], images, seed=number, num_given=1)
        expected = direct(pipe.fit_history(PROMPT, request.replies).text, tokens, number)
        (generated,) = generator.generate([request])
        found = pipe.kept_latents.get(generated.image)
        np.testing.assert_allclose(found, expected[0], atol=1e-4)
        assert difference(generated.image, decoded(pipe, found)) <= 1
        tokens = np.concatenate([tokens, expected], axis=1)
        images = (*images, generated.image)
    pipe.choose_reference_latents("encoded")
    (other,) = generator.generate([request])
    assert difference(other.image, generated.image) > 1  # encoding again makes another image
    assert len(pipe.kept_latents) == 3


@pytest.mark.slow
def test_in_loops_with_roll_backs_and_candidates_latents_are_those_of_their_image(pipe, monkeypatch, capsys):
    """Three loops together, of two candidates a step, with replies and verdicts at random."""
    calls, generate_each = [], pipe.generate_each

    def recorded(texts, histories, seeds, **options):
        output = generate_each(texts, histories, seeds, **options)
        calls.append((texts, histories, seeds, options, output.images))
        return output

    monkeypatch.setattr(pipe, "generate_each", recorded)
    own = [[], [np.asarray(photo(5))], [np.asarray(photo(5))]]
    budget, options = Budget(max_steps=5, candidates=2), {"verification": "controller", "images": own, "nfe": 2}
    trajectories = ClosedLoopPipeline(pipe, NoisyController()).run([PROMPT] * 3, [3, 4, 5], budget, **options)
    assert any(step.rolled_back for trajectory in trajectories for step in trajectory.steps)
    used = [image for _, histories, *_ in calls for row in histories for image in row]
    kept = [each for each in used if isinstance(each, LatentReference)]
    assert len({id(each.image) for each in kept}) > 3
    assert all(difference(each, photo(5)) == 0 for each in used if not isinstance(each, LatentReference))
    for each in kept:
        assert difference(each.image, decoded(pipe, each.latents_tc)) <= 1
    monkeypatch.setattr(pipe, "kept_references", NothingKept())
    for *arguments, options, images in calls:
        for found, expected in zip(images, generate_each(*arguments, **options).images, strict=True):
            assert difference(found, expected) <= 1
    assert capsys.readouterr().err == ""


class NothingKept(ReferenceStore):
    """A store that finds nothing, so that every reference is computed again in every generation."""

    def get(self, key):
        return None


@pytest.mark.slow
def test_rows_with_and_without_latents_share_a_call(pipe):
    rows = [[LatentReference(photo(1), latents(1))], [photo(2)]]
    together = pipe.generate_each([PROMPT] * 2, rows, [1, 2], num_inference_steps=2, rows_per_call=2).images
    pipe.kept_references.clear()
    for row, history in enumerate(rows):
        (alone,) = pipe.generate_each([PROMPT], [history], [1 + row], num_inference_steps=2, rows_per_call=2).images
        np.testing.assert_array_equal(np.asarray(alone), np.asarray(together[row]))
    (encoded,) = pipe.generate_each([PROMPT], [[photo(1)]], [1], num_inference_steps=2, rows_per_call=2).images
    assert difference(encoded, together[0]) > 1


@pytest.mark.slow
def test_a_mesh_computes_what_one_device_computes(pipe, folder):
    options = {"mesh": MeshConfig(tensor=2, devices=2), "reference_cache": "loop", "reference_latents": "kept"}
    sharded = Flux2Pipeline.from_pretrained(str(folder), **options)
    images = ()
    for number in range(2):
        request = GenerationRequest(PROMPT, REPLIES[: number + 1], images, seed=number)
        (found,), (expected,) = (Flux2ImageGenerator(each, steps=2).generate([request]) for each in (sharded, pipe))
        assert difference(found.image, expected.image) <= 1
        one, other = (each.kept_latents.get(image.image) for each, image in ((sharded, found), (pipe, expected)))
        np.testing.assert_allclose(one, other, atol=1e-4)
        for each in (sharded, pipe):  # the same image for both
            each.kept_latents.put(found.image, one)
        images = (*images, found.image)


def test_only_the_image_itself_has_its_latents(pipe, capsys):
    image = photo(1)
    pipe.kept_latents.claim(pipe._held("vae"))
    pipe.kept_latents.put(image, latents(1))

    def latents_of(*images, num_given=0):
        found = pipe.with_latents(images, num_given)
        return [getattr(each, "latents_tc", None) for each in found]

    file = io.BytesIO()
    image.save(file, "PNG")
    again = Image.open(file)
    assert [found is not None for found in latents_of(image, again, image)] == [True] * 3  # in any order, by content
    assert latents_of(image, image, num_given=1)[0] is None  # the user's own
    assert capsys.readouterr().err == ""
    changed, transposed = image.copy(), image.transpose(Image.Transpose.TRANSPOSE)
    changed.putpixel((3, 3), (1, 2, 3))
    assert latents_of(changed, transposed, photo(2)) == [None] * 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "reference_latents kept: an earlier image was not generated by the models in memory" in said
    assert latents_of(changed) == [None]
    assert capsys.readouterr().err == ""
    image.putpixel((3, 3), (1, 2, 3))
    assert latents_of(image) == [None]


def test_of_images_with_the_same_pixels_each_has_its_own_latents(pipe):
    first, second, third = photo(7), photo(7), photo(7)
    for image, seed in ((first, 1), (second, 2)):
        pipe.kept_latents.put(image, latents(seed))
    for image, seed in ((first, 1), (second, 2), (third, 1)):
        np.testing.assert_array_equal(pipe.kept_latents.get(image), latents(seed))
    del first
    gc.collect()
    np.testing.assert_array_equal(pipe.kept_latents.get(third), latents(2))


def test_an_image_that_is_scaled_down_is_encoded(pipe, monkeypatch, capsys):
    for module in (kept_latents, references):
        monkeypatch.setattr(module, "MAX_REFERENCE_PIXELS", 32 * 32)
    image = photo(3)
    pipe._keep_latents([image], jax.numpy.zeros((1, TOKENS, CHANNELS)))
    assert pipe.kept_latents.get(image) is None
    assert pipe.with_latents([image]) == [image]
    assert "an earlier image is scaled down, so that it is encoded" in capsys.readouterr().err


def test_latents_are_dropped_with_their_image_and_with_other_weights(pipe):
    gc.collect()
    before = len(pipe.kept_latents)
    images = [photo(seed) for seed in range(10, 13)]
    for image in images:
        pipe.kept_latents.put(image, latents(0))
    assert len(pipe.kept_latents) == before + 3
    assert pipe.kept_latents.nbytes == (before + 3) * 4 * TOKENS * CHANNELS
    del images[1:], image
    gc.collect()
    assert len(pipe.kept_latents) == before + 1
    trained = pipe.vae
    try:
        pipe.vae = random_module(lambda rngs: AutoencoderKLFlux2(trained.config, rngs=rngs), seed=8)
        assert pipe.with_latents(images) == images
        assert len(pipe.kept_latents) == 0
    finally:
        pipe.vae = trained


def test_latents_of_another_size_are_refused(pipe):
    with pytest.raises(UsageError, match=r"reference of 64 x 64 pixels have shape \(32, 16\); expected \(64, 16\)"):
        pipe(PROMPT, [LatentReference(photo(0), latents(0)[:32])])
    with pytest.raises(UsageError, match="size 60 x 64"):
        pipe(PROMPT, [LatentReference(photo(0, 64, 60), latents(0))])


def test_the_setting_of_a_model_is_used_and_saved(folder, tmp_path):
    trained = Flux2Pipeline.from_pretrained(str(folder))
    assert trained.reference_latents == "encoded"
    trained.settings = dataclasses.replace(trained.settings, reference_latents="kept")
    trained.save_pretrained(str(tmp_path / "kept"))
    assert json.loads((tmp_path / "kept" / "clvr.json").read_text())["flux2"]["reference_latents"] == "kept"
    assert Flux2Pipeline.from_pretrained(str(tmp_path / "kept")).reference_latents == "kept"
    chosen = Flux2Pipeline.from_pretrained(str(tmp_path / "kept"), reference_latents="encoded")
    assert (chosen.reference_latents, chosen.settings.reference_latents) == ("encoded", "kept")
    with pytest.raises(UsageError, match="reference_latents 'keep': choose one of encoded, kept"):
        Flux2Pipeline.from_pretrained(str(folder), reference_latents="keep")
    with pytest.raises(UsageError, match="reference_latents: somewhere is a Stable Diffusion model"):
        SDXLPipeline.from_pretrained("somewhere", reference_latents="kept")


@pytest.mark.parametrize(
    ("command", "where"),
    [
        ([*EVAL, "--endpoint", "http://localhost:1/v1"], "with --endpoint there are no latents"),
        ([*EVAL, "--pictures", "images"], "with --pictures there are no latents"),
        ([*EVAL, "--mode", "one-shot"], "with --mode one-shot there are no latents"),
        (["sample", "a red circle"], "clvr sample refers to your own images only"),
    ],
)
def test_commands_without_generated_references_refuse_to_keep_latents(command, where, capsys):
    assert main([*command, "--reference-latents", "kept"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--reference-latents kept" in said
    assert where in said
