"""Training of a LoRA instead of all weights."""

import dataclasses

import jax

from clvr_jax.merging.deltas import apply_delta
from clvr_jax.models.common.lora import LoRAConfig
from clvr_jax.training.optimization.step import Metrics
from clvr_jax.training.trainer import Task
from clvr_jax.trees import Batch, Params


def lora_task(task: Task, config: LoRAConfig, seed: int) -> Task:
    """Returns the task of training a LoRA of the model of `task`, whose own weights are frozen.

    In each step the LoRA's product is added to the weights in their own dtype, as it is when it is merged.

    Args:
      task: a task that trains all weights; its `export` gets the LoRA tree.
      config: configuration of the LoRA; its rank must be at least 1.
      seed: seed of the initial LoRA, whose delta is zero.
    """

    def loss(params: Params, frozen: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        return task.loss(apply_delta(frozen["base"], params), frozen["task"], batch, key)

    return dataclasses.replace(
        task,
        name=f"LoRA of rank {config.rank}, {task.name}",
        params=config.init(task.params, jax.random.key(seed)),
        frozen={"base": task.params, "task": task.frozen},
        loss=loss,
    )
