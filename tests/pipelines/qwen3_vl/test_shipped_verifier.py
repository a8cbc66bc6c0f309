"""The shipped verifier looks: it tells right images from wrong ones, and accepts none of the controls."""

from collections import defaultdict

import numpy as np
import pytest

from clvr_jax.data.preprocessing.text import load_tokenizer
from clvr_jax.data.shapes import Canvas
from clvr_jax.evaluation.verifier.cases import control_cases, rendered_cases, sample_prompts
from clvr_jax.evaluation.verifier.metrics import roc_auc
from clvr_jax.evaluation.verifier.run import check_cases
from clvr_jax.pipelines.qwen3_vl import Verifier
from clvr_jax.pipelines.qwen3_vl.verifier import MAX_TRAINED_TOKENS
from clvr_jax.pipelines.registry import SHIPPED
from clvr_jax.reasoning.verification.verification import comparison_reply
from clvr_jax.worlds.shapes.requirements import ShapesRequirement, check_requirement
from clvr_jax.worlds.shapes.scene import sample_scene_random
from tests.conftest import optimized

PROMPTS = 12
CONTROLS = ("noise", "blank", "swapped")


@pytest.fixture(scope="module")
def checked():
    """The verifier benchmark in small: 12 prompts, their right images, one mistake of each kind, and the controls."""
    verifier = Verifier.from_pretrained("shapes-tiny")
    prompts = sample_prompts(PROMPTS, seed=5)
    with optimized():
        found, _ = check_cases(verifier, [*rendered_cases(prompts, 5), *control_cases(prompts, 5)])
    return found


@pytest.fixture(scope="module")
def accepted(checked):
    """Kind -> whether each image of it is accepted."""
    kinds = defaultdict(list)
    for each in checked:
        kinds[each.case.kind].append(each.accepted)
    return kinds


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONTROLS)
def test_controls_are_rejected(accepted, kind):
    assert len(accepted[kind]) == PROMPTS
    assert sum(accepted[kind]) == 0


@pytest.mark.slow
def test_images_with_one_mistake_are_told_from_right_ones(accepted):
    wrong = [value for kind, values in accepted.items() if kind not in ("right", *CONTROLS) for value in values]
    assert len(wrong) >= 6 * PROMPTS
    assert sum(wrong) <= 0.05 * len(wrong)
    assert sum(accepted["right"]) >= 0.85 * PROMPTS


@pytest.mark.slow
def test_probabilities_rank_right_images_above_wrong_ones(checked):
    assert all(each.probability is not None for each in checked), "no answer is cut, on an empty image either"
    assert roc_auc([each.case.label for each in checked], [each.probability for each in checked]) >= 0.97


def test_an_answer_that_counts_nine_objects_is_not_cut():
    """A shorter limit once cut the answers on six objects and rejected the images."""
    tokenizer = load_tokenizer(SHIPPED / "shapes-tiny" / "controller")
    rng = np.random.default_rng(0)
    for _ in range(20):
        reading = Canvas(sample_scene_random(rng, 9)).reading()
        reply = comparison_reply(*check_requirement(ShapesRequirement(total=9), reading))
        assert len(tokenizer.encode(reply)) < MAX_TRAINED_TOKENS
