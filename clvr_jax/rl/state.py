"""The state of a PPRL run: three policies as trees of parameters, the optimizer, and counters."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from clvr_jax.sharding import MeshLayout

Tree = Any


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["epoch", "step", "params", "old", "ema", "opt_state", "skipped", "skipped_in_a_row"],
    meta_fields=[],
)
@dataclasses.dataclass
class PPRLState:
    """Everything that a run resumes from.

    epoch: number of finished epochs. step: number of optimizer steps. params: of the policy that is trained. old: of
    the policy that samples. ema: average of params, which is exported. skipped: number of steps that changed nothing
    because the loss or gradients were not finite.
    """

    epoch: Any
    step: Any
    params: Tree
    old: Tree
    ema: Tree
    opt_state: Tree
    skipped: Any
    skipped_in_a_row: Any

    @classmethod
    def create(cls, params: Tree, optimizer: optax.GradientTransformation, layout: MeshLayout) -> "PPRLState":
        """Returns the state of epoch 0, sharded over the mesh: all policies are the same."""

        def start(params: Tree) -> "PPRLState":
            params, old, ema = (jax.tree.map(jnp.copy, params) for _ in range(3))
            zero = jnp.int32(0)
            return PPRLState(zero, zero, params, old, ema, optimizer.init(params), zero, zero)

        params = jax.device_put(params, layout.parameters(params))
        return jax.jit(start, out_shardings=state_shardings(jax.eval_shape(start, params), layout))(params)


def state_shardings(state: PPRLState, layout: MeshLayout) -> PPRLState:
    """Returns the sharding of every part of a state; shapes are enough."""
    replicated = layout.replicated
    params, old, ema = (layout.parameters(tree) for tree in (state.params, state.old, state.ema))
    opt_state = layout.optimizer_state(state.opt_state, state.params)
    return PPRLState(replicated, replicated, params, old, ema, opt_state, replicated, replicated)
