"""The configuration of a run: what is refused, and what is read of runs whose options had other names."""

import dataclasses

import jax
import pytest

from clvr_jax.errors import UsageError
from clvr_jax.files.recipe_files import config_from_json, config_to_json
from clvr_jax.models.common.lora import LoRAConfig
from clvr_jax.rl import GRPOConfig, PPRLConfig, PPRLState
from clvr_jax.sharding import MeshConfig, MeshLayout
from clvr_jax.training.checkpoint import CheckpointConfig
from clvr_jax.training.optimization.optimizer import AdamWConfig
from clvr_jax.trees import dotted, leaves_by_path

FORMER = {
    **{"epochs": 4, "groups": 6, "group": 8, "groups_per_call": 2, "updates": 3, "timesteps": 2, "spread": "epoch"},
    **{"method": "grpo", "nft": {"beta": 1.0, "scale": 5.0, "kl_weight": 1e-05, "advantage_clip": 5.0}},
    **{"grpo": {"eta": 0.5, "clip": 0.0001, "kl_weight": 0.04, "advantage_clip": 5.0}, "old_decay": "delayed"},
    **{"ema_decay": 0.8, "lora_rank": 3, "lora_alpha": 6.0, "lora_targets": ["inner", "outer"], "learning_rate": 0.003},
    **{"b1": 0.8, "b2": 0.98, "weight_decay": 0.01, "clip_norm": 2.0, "bad_updates": 5, "grid_every": 2, "seed": 7},
    **{"mesh": {"data": 1, "fsdp": -1, "sequence": 1, "tensor": 1, "slices": 1, "devices": 1}, "save_minutes": 3.0},
    **{"keep": 4, "wandb": "project"},
}
"""`train` in the recipe.json of a run before the fields were renamed."""
CONFIG = PPRLConfig(
    epochs=4,
    prompts_per_epoch=6,
    group_size=8,
    groups_per_microbatch=2,
    updates_per_epoch=3,
    timesteps_per_sample=2,
    advantage_normalization="epoch",
    algorithm="grpo",
    grpo=GRPOConfig(eta=0.5),
    old_decay="delayed",
    ema_decay=0.8,
    lora=LoRAConfig(3, 6.0, ("inner", "outer")),
    optimizer=AdamWConfig(0.003, 0.8, 0.98, 0.01, 2.0),
    max_nonfinite_steps=5,
    grid_every=2,
    seed=7,
    mesh=MeshConfig(devices=1),
    checkpoint=CheckpointConfig(3.0, 4),
    wandb="project",
)


def test_a_run_is_read_with_former_and_with_present_names():
    assert config_from_json(PPRLConfig(), FORMER) == CONFIG
    assert config_from_json(PPRLConfig(), config_to_json(CONFIG)) == CONFIG
    assert config_from_json(PPRLConfig(), {"lora_rank": 1, **config_to_json(CONFIG)}) == CONFIG


def test_former_names_are_no_longer_fields_and_every_present_name_is_one():
    fields = {field.name for field in dataclasses.fields(PPRLConfig)}
    assert not fields & set(PPRLConfig.RENAMED)
    for name in PPRLConfig.RENAMED.values():
        outer, _, inner = name.partition(".")
        assert outer in fields
        assert not inner or hasattr(getattr(CONFIG, outer), inner)


def test_checkpoints_and_what_they_are_compared_with_keep_their_names():
    """The arrays of a checkpoint are found by these names, and `begun.json` is compared with this dictionary."""
    layout = MeshLayout(MeshConfig(devices=1).make())
    base = {"inner": {"kernel": jax.numpy.ones((2, 2))}, "outer": {"kernel": jax.numpy.ones((2, 2))}}
    state = PPRLState.create(CONFIG.init_params(base), CONFIG.optimizer.make(), layout)
    names = [dotted(path) for path in leaves_by_path(state)]
    factors = [f"{matrix}.kernel.{factor}" for matrix in ("inner", "outer") for factor in ("a", "b")]
    trees = [f"{tree}.{factor}" for tree in ("params", "old", "ema") for factor in factors]
    moments = [f"opt_state.1.0.{moment}.{factor}" for moment in ("mu", "nu") for factor in factors]
    counters = ["epoch", "step", "skipped", "skipped_in_a_row", "opt_state.1.0.count"]
    assert sorted(names) == sorted([*counters, *trees, *moments])
    assert CONFIG.identity == {"method": "grpo", "lora_rank": 3, "lora_alpha": 6.0}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CheckpointConfig(max_to_keep=0), "max_to_keep must be at least 1"),
        (lambda: LoRAConfig(rank=-1), "rank must be at least 0"),
        (lambda: PPRLConfig(groups_per_microbatch=0), "groups_per_microbatch must be at least 1"),
        (lambda: PPRLConfig(seed=2**31), "seed below"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()
