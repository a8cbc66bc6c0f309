"""Tests of proxy prompts that a model writes during training: its input, the cache, and failures."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from clvr_jax.data.trajectories.dataset import TrajectoryDataset, write_dataset
from clvr_jax.data.trajectories.proxy_steps import ProxySteps
from clvr_jax.data.trajectories.record import ProxyPrompts
from clvr_jax.errors import ClvrError
from clvr_jax.interfaces import ProviderError
from clvr_jax.reasoning import IMAGE_GEN, TERMINATE, Step, Trajectory
from clvr_jax.rewards.proxy_prompt_generator import ProxyPromptCache, vlm_proxy_prompt_generator
from tests.data.engine.test_prompted_roles import Scripted

FIRST = {"p_t2i": "a red circle", "p_i2i": "", "i_ref": []}
EDIT = {"p_t2i": "a red circle and a star", "p_i2i": "add a star", "i_ref": [0]}


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Writes a dataset without proxies: three images, of which the second was rolled back."""
    directory = tmp_path_factory.mktemp("data") / "d"
    steps_with_images = [
        Step(f"reply {n}", IMAGE_GEN, (), np.full((8, 8, 3), 90 * n, np.uint8), rolled_back=n == 1) for n in range(3)
    ]
    write_dataset(
        directory, [Trajectory("a circle and a star", (*steps_with_images, Step("done", TERMINATE)), "accepted")]
    )
    return ProxySteps(TrajectoryDataset(directory), 8, is_live=True)


def request(live, steps):
    with ThreadPoolExecutor(1) as pool:
        live.request(steps, pool)
        return [live.get(step) for step in steps]


def test_the_generator_receives_the_conditions_of_the_policy(steps):
    model = Scripted(EDIT)
    found = vlm_proxy_prompt_generator(model, steps)(steps.steps[1])
    assert found == ProxyPrompts("a red circle and a star", "add a star", (0,))
    text = model.text()
    for part in ("a circle and a star", "picture 0: reply 0", "the step in question: reply 2"):
        assert part in text
    assert "reply 1" not in text
    assert [shown[0, 0, 0] for shown in model.requests[0].images] == [0]  # not the image that is to be generated


def test_each_step_is_generated_once_also_by_a_resumed_run(steps, tmp_path):
    path, model = tmp_path / "proxies.jsonl", Scripted(FIRST, EDIT)
    live = ProxyPromptCache(vlm_proxy_prompt_generator(model, steps), path)
    first = request(live, steps.steps)
    assert request(live, steps.steps) == first
    with path.open("a") as file:
        file.write('{"step": "0-')  # killed during the write
    again = ProxyPromptCache(vlm_proxy_prompt_generator(Scripted(), steps), path)
    assert request(again, steps.steps) == first
    assert [one.i_ref for one in first] == [(), (0,)]


def test_a_record_after_one_that_was_cut_is_kept_and_a_full_disk_is_one_line(steps, tmp_path):
    path, (first, second) = tmp_path / "proxies.jsonl", steps.steps
    path.write_text('{"step": "0-')  # killed during the write
    request(ProxyPromptCache(vlm_proxy_prompt_generator(Scripted(FIRST), steps), path), [first])
    known = ProxyPromptCache(vlm_proxy_prompt_generator(Scripted(), steps), path)
    assert request(known, [first]) == [ProxyPrompts("a red circle", "", ())]
    full = tmp_path / "full.jsonl"
    live = ProxyPromptCache(vlm_proxy_prompt_generator(Scripted(EDIT), steps), full)
    full.symlink_to("/dev/full")
    with pytest.raises(ClvrError, match=r"full\.jsonl: cannot be written \(No space left on device\)"):
        request(live, [second])


def test_a_step_with_an_unusable_reply_has_no_proxies_and_is_requested_again(steps, tmp_path):
    useless = {**EDIT, "i_ref": [1]}  # was rolled back
    model = Scripted(FIRST, useless, "no JSON", EDIT)
    live = ProxyPromptCache(vlm_proxy_prompt_generator(model, steps), tmp_path / "proxies.jsonl")
    assert [one is None for one in request(live, steps.steps)] == [False, True]
    assert "i_ref is [1]; it must list earlier pictures, of 0" in model.text(2)
    assert request(live, steps.steps)[1] == ProxyPrompts(EDIT["p_t2i"], EDIT["p_i2i"], (0,))
    assert len((tmp_path / "proxies.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(("fault", "is_lost"), [("refused", True), ("malformed", True), ("down", False)])
def test_a_refusal_loses_the_step_and_an_unreachable_generator_is_an_error(steps, tmp_path, fault, is_lost):
    def generate(step):
        raise ProviderError("generator (localhost): no", fault)

    live = ProxyPromptCache(generate, tmp_path / "proxies.jsonl")
    if is_lost:
        assert request(live, steps.steps) == [None, None]
    else:
        with pytest.raises(ProviderError, match="generator"):
            request(live, steps.steps)
    assert not (tmp_path / "proxies.jsonl").exists()
