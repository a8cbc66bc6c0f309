"""Tests of the options that choose judges and the protocols by which they are asked."""

import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.rewards import EditRRM, FirmEdit, FirmGen, TextReward, UnifiedReward, UnifiedRewardEdit
from clvr_jax.tasks import reward_options
from clvr_jax.tasks.reward_options import ImageRewardOptions, RewardOptions, make_reward

URL = "http://localhost:1/v1"


class Loaded:
    """A model that was loaded from a directory, in place of a Qwen3-VL."""

    def __init__(self, name):
        self.name = name


@pytest.fixture(autouse=True)
def loaded(monkeypatch):
    class Pipeline:
        from_pretrained = staticmethod(lambda model, dtype: model)

    monkeypatch.setattr(reward_options, "Qwen3VLPipeline", Pipeline)
    monkeypatch.setattr(reward_options, "MeshChatModel", lambda pipeline, name, batch: Loaded(name))


def judges(**options):
    """The judges that the options choose: type and name of the model."""
    reward = make_reward("pprl_flux2", RewardOptions(**options), "bfloat16", batch_size=8)
    return [(type(judge), model_name(judge.model)) for judge in (reward._image, reward._edit)], reward._edit


def model_name(model):
    return model.name.removesuffix(" (localhost:1)")


def test_a_protocol_has_the_name_that_it_was_published_with():
    found, _ = judges(reward_url=URL)
    assert found == [
        (UnifiedReward, "CodeGoat24/UnifiedReward-2.0-qwen3vl-8b"),
        (UnifiedRewardEdit, "CodeGoat24/UnifiedReward-Edit-qwen3vl-8b"),
    ]
    found, _ = judges(reward_url=URL, judge_protocol="firm", edit_judge_protocol="firm", reward_model="mine")
    assert found == [(FirmGen, "mine"), (FirmEdit, "VisionXLab/FIRM-Edit-8B")]


def test_edit_rrm_has_a_model_that_writes_the_points():
    options = {"judge": "a", "edit_judge": "b", "edit_judge_protocol": "edit_rrm"}
    found, edit = judges(**options)
    assert found == [(UnifiedReward, "a"), (EditRRM, "b")]
    assert edit._points_model is edit.model
    _, edit = judges(**options, points_model="a")
    assert edit._points_model.name == "a"
    _, served = judges(reward_url=URL, edit_judge_protocol="edit_rrm", edit_reward_model="rrm", points_model="writer")
    assert [model_name(model) for model in (served.model, served._points_model)] == ["rrm", "writer"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edit_judge_protocol": "edit_rrm"}, "edit_rrm needs --edit-reward-model"),
        ({"points_model": "writer"}, "--points-model goes with"),
    ],
)
def test_missing_names_are_one_line(options, message):
    with pytest.raises(ClvrError, match=message):
        make_reward("pprl_flux2", RewardOptions(reward_url=URL, **options), "bfloat16", batch_size=8)


def test_a_model_that_cannot_edit_needs_no_judge_of_edits():
    reward = make_reward("pprl_sdxl", ImageRewardOptions(judge="a", judge_protocol="firm"), "bfloat16", batch_size=8)
    assert isinstance(reward._image, FirmGen)


def test_a_share_of_a_served_reward_is_text(monkeypatch):
    monkeypatch.setattr(reward_options, "RapidTextReader", lambda: None)
    options = RewardOptions(reward_url=URL, text_weight=0.25)
    reward = make_reward("pprl_flux2", options, "bfloat16", batch_size=8)
    assert isinstance(reward, TextReward)
    assert reward._weight == 0.25
    for wrong, message in (
        ({"judge": "a", "edit_judge": "b"}, "with --reward-url"),
        ({"reward_url": URL}, "from 0 to 1"),
    ):
        weight = 1.5 if "reward_url" in wrong else 0.5
        with pytest.raises(ClvrError, match=message):
            make_reward("pprl_flux2", RewardOptions(text_weight=weight, **wrong), "bfloat16", batch_size=8)
