"""The planning benchmark tells a controller that plans from one that does not."""

import json

import numpy as np

from clvr_jax.evaluation import planning
from clvr_jax.evaluation.verifier.cases import sample_prompts
from clvr_jax.reasoning.conversation.protocols import Controller
from clvr_jax.worlds.shapes.layout import PlannedObject, plan
from clvr_jax.worlds.shapes.oracle import first_reply
from tests.evaluation.verifier.scripted import ExactVerifier

PROMPTS = sample_prompts(24, seed=3)
METADATA = [each.metadata for each in PROMPTS]


class Planner(Controller):
    """Plans exactly, from the attempt `after` on; before, it puts the objects into random cells."""

    def __init__(self, after=0):
        self.metadata = {each["prompt"]: each for each in METADATA}
        self.after = after

    def reply(self, conversations):
        return [self._plan(each) for each in conversations]

    def _plan(self, conversation):
        exact = plan(self.metadata[conversation.prompt])
        if conversation.attempt >= self.after:
            return first_reply(exact)
        cells = np.random.default_rng(0).permutation([item.cell for item in exact])
        return first_reply([PlannedObject(i.color, i.shape, str(c)) for i, c in zip(exact, cells, strict=True)])


def rates(planner, retries=4):
    planned = planning.plan_prompts(planner, ExactVerifier(PROMPTS), METADATA, retries=retries, batch_size=10)
    return planning.results(planned, METADATA, model="scripted", prompts="own", seed=0, retries=retries)


def test_an_exact_planner_is_right_and_the_control_is_not():
    found = rates(Planner())
    everything = found["summary"]["all"]
    assert all(everything[key]["rate"] == 1 for key in ("requirements_exact", "right", "meets_requirements"))
    control = found["summary"][planning.CONTROL]
    assert (control["right"]["of"], control["right"]["count"], control["meets_requirements"]["count"]) == (24, 0, 0)
    assert [found["summary"][f"{number} objects"]["right"]["of"] for number in (3, 4, 5, 6)] == [6, 6, 6, 6]
    text = planning.markdown(json.loads(json.dumps(found)))
    assert "| all | 1.000 [0.862, 1.000] of 24 | 1.000" in text


def test_a_wrong_plan_counts_unless_the_verifier_has_it_sampled_again():
    assert rates(Planner(after=1), retries=0)["summary"]["all"]["right"]["rate"] < 0.5
    assert rates(Planner(after=1), retries=1)["summary"]["all"]["right"]["rate"] == 1


def test_a_reply_without_a_plan_is_wrong():
    class Mute(Controller):
        def reply(self, conversations):
            return ["Draw a red star at the top.<|image_gen|>" for _ in conversations]

    everything = rates(Mute())["summary"]["all"]
    assert (everything["right"]["count"], everything["meets_requirements"]["count"]) == (0, 0)
