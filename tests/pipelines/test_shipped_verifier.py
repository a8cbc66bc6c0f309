"""The shipped verifier looks: it tells right images from wrong ones, and accepts none of the controls."""

from collections import defaultdict

import pytest

from clvr_jax.evaluation.verifier.cases import control_cases, rendered_cases, sample_prompts
from clvr_jax.evaluation.verifier.metrics import roc_auc
from clvr_jax.evaluation.verifier.run import check_cases
from clvr_jax.pipelines.verifier import Verifier

PROMPTS = 24
CONTROLS = ("noise", "blank", "swapped")


@pytest.fixture(scope="module")
def checked():
    """The verifier benchmark in small: 24 prompts, their right images, one mistake of each kind, and the controls."""
    verifier = Verifier.from_pretrained("shapes-tiny")
    prompts = sample_prompts(PROMPTS, seed=5)
    found, _ = check_cases(verifier, [*rendered_cases(prompts, 5), *control_cases(prompts, 5)])
    return found


@pytest.fixture(scope="module")
def accepted(checked):
    """Kind -> whether each image of it is accepted."""
    kinds = defaultdict(list)
    for each in checked:
        kinds[each.case.kind].append(each.accepted)
    return kinds


@pytest.mark.parametrize("kind", CONTROLS)
def test_controls_are_rejected(accepted, kind):
    assert len(accepted[kind]) == PROMPTS
    assert sum(accepted[kind]) == 0


def test_images_with_one_mistake_are_told_from_right_ones(accepted):
    wrong = [value for kind, values in accepted.items() if kind not in ("right", *CONTROLS) for value in values]
    assert len(wrong) >= 6 * PROMPTS
    assert sum(wrong) <= 0.15 * len(wrong)
    assert sum(accepted["right"]) >= 0.6 * PROMPTS


def test_probabilities_rank_right_images_above_wrong_ones(checked):
    answered = [each for each in checked if each.probability is not None]
    assert len(answered) == len(checked)
    assert roc_auc([each.case.label for each in answered], [each.probability for each in answered]) >= 0.85
