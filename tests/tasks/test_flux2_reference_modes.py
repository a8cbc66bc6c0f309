"""Training computes what images attend to of their references as the model's setting says."""

import jax
import numpy as np
import pytest
from flax import nnx

from clvr_jax.models.flux2.position_ids import reference_ids
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.flux2.programs import velocity_field
from clvr_jax.tasks.flux2 import Flux2Models, Sampler, flux2_policy
from clvr_jax.tasks.shapes.sft import sft_task
from tests.models.parity import relative_error, run_jitted

GRID, TOKENS, COUNT = (4, 4), 16, 2


@pytest.fixture(scope="module")
def pipe():
    return Flux2Pipeline.from_pretrained("shapes-tiny-sft")


@pytest.fixture(scope="module")
def data(pipe):
    random, config = np.random.default_rng(0), pipe.transformer.config
    return {
        "x": random.normal(size=(1, TOKENS, config.in_channels)).astype(np.float32),
        "text": random.normal(size=(1, 28, config.joint_attention_dim)).astype(np.float32),
        "references": random.normal(size=(1, COUNT * TOKENS, config.in_channels)).astype(np.float32),
    }


def expected_of(mode, transformer, references):
    """What the pipeline passes on: tokens, one cache, or one cache for each reference after those before it."""
    if mode == "none":
        return references
    if mode == "image":
        return (transformer.reference_cache(references, reference_ids([GRID] * COUNT)),)
    first = transformer.reference_cache(references[:, :TOKENS], reference_ids([GRID]))
    return first, transformer.reference_cache(references[:, TOKENS:], reference_ids([GRID], 1), earlier=(first,))


@pytest.mark.slow
def test_a_policy_attends_to_references_as_the_model(pipe, data):
    found = {}
    weights, times = nnx.state(pipe.transformer), np.array([0.7], np.float32)
    for mode in ("none", "image", "loop"):
        policy = flux2_policy(Flux2Models.of(pipe, mode), Sampler(steps=2, guidance=1.0, size=64), "dots")

        def predicted(weights, data, policy=policy):
            conditions = {"text": data["text"], "references": data["references"]}
            return policy.predictor(weights, conditions)(data["x"], times)

        def expected(transformer, data, mode=mode):
            references = expected_of(mode, transformer, data["references"])
            return velocity_field(transformer, references, GRID, [GRID] * COUNT)(data["x"], times, data["text"])

        found[mode] = jax.jit(predicted)(weights, data)
        assert relative_error(found[mode], run_jitted(expected, pipe.transformer, data)) < 1e-5
    assert relative_error(found["loop"], found["image"]) > 1e-3
    assert relative_error(found["loop"], found["none"]) > 1e-3


@pytest.mark.parametrize("mode", ["none", "loop"])
def test_the_shapes_recipe_exports_the_mode_it_trained(tmp_path, mode):
    task = sft_task("shapes-tiny-sft", None, reference_cache=mode, dropout=0.1, shift=2.5, seed=0)
    task.export(task.params, tmp_path / "export")
    assert Flux2Pipeline.from_pretrained(str(tmp_path / "export")).reference_cache == mode
    again = sft_task(str(tmp_path / "export"), None, dropout=0.1, shift=2.5, seed=0)
    again.export(again.params, tmp_path / "again")
    assert Flux2Pipeline.from_pretrained(str(tmp_path / "again")).reference_cache == mode
