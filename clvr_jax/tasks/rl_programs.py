"""The programs of PPRL for the planner: the functions that train, with shapes for their arguments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from clvr_jax.cost_model.flops import Flops
from clvr_jax.rl import (
    DiffusionPolicy,
    PPRLConfig,
    RandomSource,
    RolloutBatch,
    UpdateBatch,
    collect_rollout,
    loss_and_grads,
)
from clvr_jax.training.plan import Program
from clvr_jax.trees import Batch, Params

_SHAPE = jax.ShapeDtypeStruct


@dataclass(frozen=True)
class PlannedPolicy:
    """A policy without values, and the costs of a microbatch.

    title: the model, for the names of programs. size: height and width of an image in pixels. steps: of the sampler.
    base: shapes of the weights. frozen: shapes of what else the policy reads. data: shapes of the input of
    `DiffusionPolicy.encode_conditions`. reads: number of times that a rollout reads each tree of `frozen`. evaluation:
    FLOPs of an evaluation for all samples, with guidance. other_flops: of the encoders, and of decoding.
    """

    title: str
    policy: DiffusionPolicy
    train: PPRLConfig
    size: int
    steps: int
    base: Params
    frozen: Mapping[str, Params]
    data: Batch
    reads: Mapping[str, int]
    evaluation: Flops
    other_flops: Sequence[float]

    def program(self, planned: str) -> Program:
        """Returns the "rollout" or the "update" of a microbatch."""
        return self._update() if planned == "update" else self._rollout()

    def _update(self) -> Program:
        """Returns the loss of one inner step and its gradients, which is nearly all of an update."""
        policy, train = self.policy, self.train
        params, algorithm = self._params(), train.make_algorithm(policy)
        conditions = jax.eval_shape(policy.encode_conditions, self.frozen, self.data)
        of_sample, inner_step = _SHAPE((train.microbatch_size,), jnp.float32), _SHAPE((), jnp.int32)
        samples = _SHAPE((train.microbatch_size, *algorithm.sample_shape), jnp.float32)
        return Program(
            name=self._name("update"),
            function=lambda weights, data: loss_and_grads(
                policy, train, weights["params"], weights["base"], weights["old"], data
            ),
            weights={"base": self.base, "params": params, "old": params},
            data=UpdateBatch(samples, conditions, of_sample, of_sample, inner_step, self._random_source()),
            reads={"base": 5, "params": 3, "old": 1},  # three policies forward, one of them back
            # Of theta forward and back; of old and reference forward.
            flops=self.evaluation.training + 2 * self.evaluation.forward,
            calls=self._calls() * min(train.timesteps_per_sample, algorithm.num_train_timesteps),
            rows=train.microbatch_size,
        )

    def _rollout(self) -> Program:
        """Returns conditions, sampling and decoded images."""
        policy, train = self.policy, self.train
        names = tuple(self.frozen)
        return Program(
            name=self._name("rollout"),
            function=lambda weights, data: collect_rollout(
                policy, train, weights["base"], weights["old"], {name: weights[name] for name in names}, data
            ),
            weights={"base": self.base, "old": self._params(), **self.frozen},
            data=RolloutBatch(self.data, self._random_source()),
            reads={"base": self.steps, "old": 1, **self.reads},
            flops=sum(self.other_flops, start=self.steps * self.evaluation.forward),
            calls=self._calls(),
            rows=train.microbatch_size,
        )

    def _name(self, planned: str) -> str:
        groups = f"{self.train.groups_per_microbatch} x {self.train.group_size}"
        return f"{self.title}, PPRL {planned}, {groups} of {self.size} x {self.size}"

    def _params(self) -> Params:
        return jax.eval_shape(self.train.init_params, self.base)

    def _calls(self) -> int:
        """Returns the number of microbatches of the run."""
        return self.train.epochs * (self.train.prompts_per_epoch // self.train.groups_per_microbatch)

    def _random_source(self) -> RandomSource:
        groups = self.train.groups_per_microbatch
        return RandomSource(_SHAPE((), jnp.int32), _SHAPE((), jnp.int32), _SHAPE((groups,), jnp.int32))
