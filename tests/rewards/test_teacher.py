"""Proxy prompts that a model writes live: what it is shown, what is remembered, and what its failures do."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from clvr_jax.data.proxy_steps import ProxySteps
from clvr_jax.data.trajectory_dataset import TrajectoryDataset, write_dataset
from clvr_jax.data.trajectory_record import ProxyPrompts
from clvr_jax.interfaces import ProviderError
from clvr_jax.reasoning import IMAGE_GEN, TERMINATE, Step, Trajectory
from clvr_jax.rewards.teacher import ProxyPromptCache, vlm_teacher
from tests.data.engine.test_prompted_roles import Scripted

FIRST = {"p_t2i": "a red circle", "p_i2i": "", "i_ref": []}
EDIT = {"p_t2i": "a red circle and a star", "p_i2i": "add a star", "i_ref": [0]}


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """A dataset without proxies: three drawings, the second of which was rolled back."""
    folder = tmp_path_factory.mktemp("data") / "d"
    drawn = [
        Step(f"reply {n}", IMAGE_GEN, (), np.full((8, 8, 3), 90 * n, np.uint8), rolled_back=n == 1) for n in range(3)
    ]
    write_dataset(folder, [Trajectory("a circle and a star", (*drawn, Step("done", TERMINATE)), "accepted")])
    return ProxySteps(TrajectoryDataset(folder), 8, is_live=True)


def asked(live, steps):
    with ThreadPoolExecutor(1) as pool:
        live.begin(steps, pool)
        return [live.of(step) for step in steps]


def test_the_teacher_sees_what_the_policy_is_conditioned_on(steps):
    model = Scripted(EDIT)
    found = vlm_teacher(model, steps)(steps.steps[1])
    assert found == ProxyPrompts("a red circle and a star", "add a star", (0,))
    text = model.text()
    for part in ("a circle and a star", "picture 0: reply 0", "the step in question: reply 2"):
        assert part in text
    assert "reply 1" not in text
    assert [shown[0, 0, 0] for shown in model.asked[0].images] == [0]  # not the picture that is to be drawn


def test_a_step_is_asked_about_once_also_by_a_run_that_goes_on(steps, tmp_path):
    path, model = tmp_path / "proxies.jsonl", Scripted(FIRST, EDIT)
    live = ProxyPromptCache(vlm_teacher(model, steps), path)
    first = asked(live, steps.steps)
    assert asked(live, steps.steps) == first
    with path.open("a") as file:
        file.write('{"step": "0-')  # killed while it wrote
    again = ProxyPromptCache(vlm_teacher(Scripted(), steps), path)
    assert asked(again, steps.steps) == first
    assert [one.i_ref for one in first] == [(), (0,)]


def test_an_answer_that_cannot_be_used_leaves_its_step_without_proxies_and_is_asked_for_again(steps, tmp_path):
    useless = {**EDIT, "i_ref": [1]}  # was rolled back
    model = Scripted(FIRST, useless, "no JSON", EDIT)
    live = ProxyPromptCache(vlm_teacher(model, steps), tmp_path / "proxies.jsonl")
    assert [one is None for one in asked(live, steps.steps)] == [False, True]
    assert "i_ref is [1]; it must list earlier pictures, of 0" in model.text(2)
    assert asked(live, steps.steps)[1] == ProxyPrompts(EDIT["p_t2i"], EDIT["p_i2i"], (0,))
    assert len((tmp_path / "proxies.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(("fault", "is_lost"), [("refused", True), ("malformed", True), ("down", False)])
def test_a_teacher_that_refuses_loses_the_step_and_one_that_is_gone_says_so(steps, tmp_path, fault, is_lost):
    def teach(step):
        raise ProviderError("teacher (localhost): no", fault)

    live = ProxyPromptCache(teach, tmp_path / "proxies.jsonl")
    if is_lost:
        assert asked(live, steps.steps) == [None, None]
    else:
        with pytest.raises(ProviderError, match="teacher"):
            asked(live, steps.steps)
    assert not (tmp_path / "proxies.jsonl").exists()
