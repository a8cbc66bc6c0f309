"""The state of a PPRL run: that of any training run, with the old policy."""

import dataclasses
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree
from typing_extensions import override

from clvr_jax.sharding import MeshLayout
from clvr_jax.training.optimization.step import TrainState
from clvr_jax.trees import Params


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["epoch", "step", "params", "old", "ema", "opt_state", "skipped", "skipped_in_a_row"],
    meta_fields=[],
)
@dataclasses.dataclass
class PPRLState(TrainState):
    """Everything that a run resumes from; `params` are those of the policy that is trained, `ema` is exported.

    epoch: number of finished epochs. old: parameters of the policy that samples.
    """

    epoch: jax.Array
    old: Params

    @override
    @property
    def iteration(self) -> Int[Array, ""]:
        return self.epoch

    @override
    @classmethod
    def _initial(cls, params: Params, optimizer: optax.GradientTransformation) -> dict[str, PyTree]:
        old = jax.tree.map(jnp.copy, params)
        return {**super()._initial(params, optimizer), "epoch": jnp.int32(0), "old": old}

    @override
    def shardings(self, layout: MeshLayout) -> Self:
        own: dict[str, PyTree] = {"epoch": layout.replicated, "old": layout.parameters(self.old)}
        return dataclasses.replace(super().shardings(layout), **own)
