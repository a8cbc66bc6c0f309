"""The steps benchmark: does the image generator make what one step of a loop requests of it?"""

from clvr_jax.evaluation.steps.results import BENCHMARK, markdown, step_results, steps_table
from clvr_jax.evaluation.steps.scores import StepScore, score_step
from clvr_jax.evaluation.steps.states import State, rendered_states, rollout_states

__all__ = [
    "BENCHMARK",
    "State",
    "StepScore",
    "markdown",
    "rendered_states",
    "rollout_states",
    "score_step",
    "step_results",
    "steps_table",
]
