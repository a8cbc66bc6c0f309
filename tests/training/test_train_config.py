"""The configuration of supervised training: what is refused, and what is read of runs whose options had other names."""

import dataclasses

import pytest

from clvr_jax.configs import pprl_flux2
from clvr_jax.errors import UsageError
from clvr_jax.files.recipe_files import config_from_json, config_to_json
from clvr_jax.sharding import MeshConfig
from clvr_jax.training.checkpoint import CheckpointConfig
from clvr_jax.training.trainer import TrainConfig

FORMER = {
    **{"steps": 40, "learning_rate": 0.05, "warmup": 0.1, "accumulate": 4, "compute_dtype": "bfloat16", "seed": 7},
    **{"mesh": {"data": 1, "fsdp": -1, "sequence": 1, "tensor": 1, "slices": 1, "devices": 1}, "bad_steps": 5},
    **{"log_every": 2, "save_minutes": 3.0, "keep": 6, "wandb": "project", "profile": None},
}
"""`train` in the recipe.json of a run before the fields were renamed."""
CONFIG = TrainConfig(
    steps=40,
    learning_rate=0.05,
    warmup=0.1,
    gradient_accumulation_steps=4,
    compute_dtype="bfloat16",
    seed=7,
    mesh=MeshConfig(devices=1),
    max_nonfinite_steps=5,
    log_every=2,
    checkpoint=CheckpointConfig(3.0, 6),
    wandb="project",
)


def test_a_run_is_read_with_former_and_with_present_names():
    assert config_from_json(TrainConfig(), FORMER) == CONFIG
    assert config_from_json(TrainConfig(), config_to_json(CONFIG)) == CONFIG


@pytest.mark.parametrize("kind", [TrainConfig, pprl_flux2.Config])
def test_former_names_are_no_longer_fields_and_every_present_name_is_one(kind):
    fields = {field.name: field.default for field in dataclasses.fields(kind)}
    assert not set(fields) & set(kind.RENAMED)
    for name in kind.RENAMED.values():
        outer, _, inner = name.partition(".")
        assert outer in fields
        assert not inner or hasattr(fields[outer], inner)


def test_the_endpoint_of_proxy_prompts_is_read_with_its_former_name():
    former = {"teacher_url": "http://localhost:1/v1", "teacher_model": "m", "teacher_key": "KEY"}
    config = config_from_json(pprl_flux2.CONFIG, former)
    assert (config.proxy_prompt_url, config.proxy_prompt_model) == ("http://localhost:1/v1", "m")
    assert config.proxy_prompt_key == "KEY"


@pytest.mark.parametrize("name", ["gradient_accumulation_steps", "max_nonfinite_steps", "log_every"])
def test_counts_below_one_are_refused_by_name(name):
    with pytest.raises(UsageError, match=f"TrainConfig: {name} must be at least 1"):
        TrainConfig(**{name: 0})
