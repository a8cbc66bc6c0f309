"""The steps of RL compiled for a mesh."""

import jax
import jax.numpy as jnp

from clvr_jax.programs import StoredFunction
from clvr_jax.rl.algorithms.base import Metrics
from clvr_jax.rl.config import PPRLConfig
from clvr_jax.rl.policy import DiffusionPolicy
from clvr_jax.rl.rollout import Rollout, RolloutBatch, collect_rollout
from clvr_jax.rl.state import PPRLState
from clvr_jax.rl.update import UpdateBatch, apply_gradients, loss_and_grads, update_old_policy
from clvr_jax.sharding import MeshLayout
from clvr_jax.training.optimization.step import GradAccumulator
from clvr_jax.trees import Params


class JittedSteps:
    """The functions of `rollout` and `update`, jitted; weights keep the shardings of parameters.

    rollout: (base, old, frozen, RolloutBatch) -> Rollout.
    accumulate: (params, base, old, GradAccumulator, UpdateBatch) -> GradAccumulator, with the batch added.
    apply_gradients: (state, GradAccumulator) -> (state, metrics).
    update_old_policy: state -> state of the next epoch.
    """

    def __init__(self, policy: DiffusionPolicy, config: PPRLConfig, layout: MeshLayout):
        def accumulate(
            params: Params, base: Params, old: Params, sums: GradAccumulator, batch: UpdateBatch
        ) -> GradAccumulator:
            total = sums.add(loss_and_grads(policy, config, params, base, old, batch))
            return total._replace(grads=jax.lax.with_sharding_constraint(total.grads, layout.parameters(params)))

        def apply(state: PPRLState, sums: GradAccumulator) -> tuple[PPRLState, Metrics]:
            next_state, metrics = apply_gradients(config, state, sums)
            return jax.lax.with_sharding_constraint(next_state, next_state.shardings(layout)), metrics

        def rollout(base: Params, old: Params, frozen: Params, batch: RolloutBatch) -> Rollout:
            return collect_rollout(policy, config, base, old, frozen, batch)

        def end_epoch(state: PPRLState) -> PPRLState:
            return update_old_policy(algorithm, state)

        def zero_grads(params: Params) -> Params:
            zeros = jax.tree.map(jnp.zeros_like, params)
            return jax.lax.with_sharding_constraint(zeros, layout.parameters(params))

        self.algorithm = algorithm = config.make_algorithm(policy)
        self.rollout = StoredFunction(rollout, trace=True)
        self.accumulate = StoredFunction(accumulate, donate_argnums=3, trace=True)
        self.apply_gradients = StoredFunction(apply, donate_argnums=0, trace=True)
        self.update_old_policy = StoredFunction(end_epoch, donate_argnums=0, trace=True)
        self._zero_grads = StoredFunction(zero_grads, trace=True)

    def zeros(self, params: Params) -> GradAccumulator:
        """Returns sums over no samples."""
        metrics = {name: jnp.float32(0) for name in (*self.algorithm.metrics, "loss")}
        return GradAccumulator(self._zero_grads(params), metrics, jnp.float32(0))
