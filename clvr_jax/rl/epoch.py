"""One epoch of Proxy Prompt RL: sample, score, advantages, update, old policy.

The old policy samples a group of images for each of some trajectory steps, under their whole history c_t; only the
reward reads the proxy prompts. Rewards are computed on the host, or remotely, while the devices sample the next images.

All random numbers of an epoch follow from seed and epoch, so an interrupted run that is resumed gives the same bits.

Source: arXiv 2605.14876 (PPRL).
"""

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from clvr_jax.data.trajectories.proxy_steps import ProxyStep
from clvr_jax.errors import ClvrError
from clvr_jax.rewards.proxy_prompt_generator import ProxyPromptCache
from clvr_jax.rewards.reward import Scores
from clvr_jax.rl.advantages import Advantages, group_advantages
from clvr_jax.rl.config import PPRLConfig
from clvr_jax.rl.jitted_steps import JittedSteps
from clvr_jax.rl.metrics import Stopwatch, mean_over_updates, reward_metrics, write_grid
from clvr_jax.rl.random_keys import RandomSource
from clvr_jax.rl.rollout import Rollout, RolloutBatch
from clvr_jax.rl.scoring import EpochScores, Scorer, ScoringError, thread_pool
from clvr_jax.rl.state import PPRLState
from clvr_jax.rl.task import PPRLTask
from clvr_jax.rl.update import UpdateBatch
from clvr_jax.sharding import MeshLayout, process_allgather
from clvr_jax.training.graceful_shutdown import GracefulShutdown
from clvr_jax.training.loop import StepMetrics, StopRequestedError, wait_on_cpu
from clvr_jax.training.monitoring.clock import phase
from clvr_jax.training.prefetch import IteratorState, shard_batch
from clvr_jax.trees import Batch

PROXY_PROMPTS = "proxies.jsonl"
"""File of the proxy prompts that are written during training."""

_GRID_MICROBATCHES = 8


@dataclass
class Microbatch:
    """Groups of one bucket that are sampled, and later learned from, at once.

    steps: of the groups; the last one is repeated up to `groups_per_microbatch`. num_real: number of groups that are no
    such repetition. data: of the steps. rollout: None until it was sampled.
    """

    steps: tuple[ProxyStep, ...]
    num_real: int
    data: Batch
    rollout: Rollout | None = None


class EpochRunner:
    """Runs the epochs of a task on a mesh.

    Args:
      task, config: of the run.
      layout: of the mesh.
      out: directory on this machine, for grids of samples and for proxy prompts that are written during training.
    """

    def __init__(self, task: PPRLTask, config: PPRLConfig, layout: MeshLayout, out: Path):
        self.task, self.config, self.layout, self.out = task, config, layout, out
        self.jitted = JittedSteps(task.policy, config, layout)
        self.base = jax.device_put(task.base, layout.parameters(task.base))
        self.frozen = jax.device_put(task.frozen, layout.parameters(task.frozen))
        generator = task.proxy_prompt_generator
        cache = ProxyPromptCache(generator, out / PROXY_PROMPTS) if generator else None
        self.scorer = Scorer(task.reward, task.steps, config.group_size, cache)

    def run(self, state: PPRLState, iteration: int, shutdown: GracefulShutdown) -> tuple[PPRLState, dict[str, float]]:
        """Runs the epoch whose number is `iteration`.

        Returns: the state after it, and its metrics.
        Raises: StopRequestedError before the first update, if the run was asked to stop; ScoringError if there are no
          rewards. The state is then still that of the epoch before.
        """
        epoch, watch = iteration, Stopwatch()
        # In the order of the dataset, so that nothing depends on the order in which they were chosen.
        steps = sorted(
            self.task.steps.sample(epoch, self.config.prompts_per_epoch, self.config.seed),
            key=lambda step: step.number,
        )
        microbatches, scores = self._sample_and_score(state, epoch, steps, shutdown, watch)
        advantages, metrics = self._advantages(microbatches, scores)
        with phase("evaluation"):
            self._write_grid(microbatches, epoch)
        with watch("update"):
            state, update_metrics = self._update(state, epoch, microbatches, advantages)
            state = jax.block_until_ready(self.jitted.update_old_policy(state))
        return state, {**metrics, **update_metrics, **watch.read()}

    def summarize(self, metrics: Sequence[StepMetrics]) -> dict[str, float]:
        """Returns the metrics of an epoch, which are logged after each."""
        (of_epoch,) = metrics
        return {name: float(value) for name, value in of_epoch.items()}

    def iterator_state(self) -> IteratorState:
        """Returns nothing: the steps of an epoch follow from the seed and its number."""
        return {}

    def _sample_and_score(
        self, state: PPRLState, epoch: int, steps: Sequence[ProxyStep], shutdown: GracefulShutdown, watch: Stopwatch
    ) -> tuple[list[Microbatch], Scores]:
        """Samples images for all steps; while those of one microbatch are scored, those of the next are sampled."""
        microbatches: list[Microbatch] = []
        with thread_pool(1) as preparing, self.scorer.epoch(steps) as scores:
            for index, prepared in enumerate(self._prepare(steps, preparing)):
                if index and shutdown.should_stop():
                    raise StopRequestedError
                with phase("input"):
                    microbatch = prepared()
                with watch("sampling"):
                    self._sample(state, epoch, microbatch)
                microbatches.append(microbatch)
                if index:
                    self._submit(microbatches[-2], scores, watch)
            self._submit(microbatches[-1], scores, watch)
            with watch("reward"):
                return microbatches, scores.result()

    def _prepare(self, steps: Sequence[ProxyStep], pool: ThreadPoolExecutor) -> list[Callable[[], Microbatch]]:
        """Makes the data of microbatches, each of one bucket, in a thread. Returns: functions that wait for them."""
        size = self.config.groups_per_microbatch
        buckets: dict[Hashable, list[ProxyStep]] = {}
        for step in steps:
            buckets.setdefault(self.task.bucket(step), []).append(step)

        def make(part: Sequence[ProxyStep]) -> Microbatch:
            padded = (*part, *[part[-1]] * (size - len(part)))
            return Microbatch(padded, len(part), self.task.data(padded))

        parts = [same[start : start + size] for same in buckets.values() for start in range(0, len(same), size)]
        return [pool.submit(make, part).result for part in parts]

    def _sample(self, state: PPRLState, epoch: int, microbatch: Microbatch) -> None:
        batch = shard_batch(RolloutBatch(microbatch.data, self._random_source(epoch, microbatch)), self.layout)
        microbatch.rollout = self.jitted.rollout(self.base, state.old, self.frozen, batch)
        wait_on_cpu(self.layout, microbatch.rollout)

    def _submit(self, microbatch: Microbatch, scores: EpochScores, watch: Stopwatch) -> None:
        assert microbatch.rollout is not None
        with watch("sampling"):
            images = np.asarray(process_allgather(microbatch.rollout.images))
        with watch("reward"):
            scores.submit(microbatch.steps[: microbatch.num_real], images)

    def _advantages(self, microbatches: Sequence[Microbatch], scores: Scores) -> tuple[Advantages, dict[str, float]]:
        """Compares every sample with its group. Returns: advantages in the order of the samples, and metrics."""
        steps = [step for each in microbatches for step in each.steps[: each.num_real]]
        kinds, groups = (
            np.repeat(of_step, self.config.group_size)
            for of_step in ([step.kind for step in steps], [step.number for step in steps])
        )
        try:
            advantages = group_advantages(scores.values, groups, self.config.advantage_normalization)
        except ClvrError as error:
            raise ScoringError(str(error)) from error
        return advantages, reward_metrics(scores, advantages, kinds, groups)

    def _update(
        self, state: PPRLState, epoch: int, microbatches: Sequence[Microbatch], advantages: Advantages
    ) -> tuple[PPRLState, dict[str, float]]:
        """Takes the optimizer steps of an epoch, each on an equal share of the microbatches, in random order."""
        config, algorithm = self.config, self.jitted.algorithm
        weights = np.asarray(algorithm.sample_weights(advantages.values), np.float32)
        valid_mask = advantages.valid_mask.astype(np.float32)
        inner_steps = min(config.timesteps_per_sample, algorithm.num_train_timesteps)
        ends = np.cumsum([each.num_real * config.group_size for each in microbatches])
        order = np.random.default_rng((config.seed, epoch, 1)).permutation(len(microbatches))
        metrics = []
        for share in np.array_split(order, config.updates_per_epoch):
            sums = self.jitted.zeros(state.params)
            # In the order of the dataset: sums are rounded.
            for index in sorted(share):
                microbatch = microbatches[index]
                rows = slice(ends[index] - microbatch.num_real * config.group_size, ends[index])
                for inner_step in range(inner_steps if valid_mask[rows].any() else 0):
                    batch = self._update_batch(microbatch, epoch, inner_step, weights[rows], valid_mask[rows])
                    sums = self.jitted.accumulate(state.params, self.base, state.old, sums, batch)
                    wait_on_cpu(self.layout, sums)
            if float(sums.weight) > 0:
                state, step_metrics = self.jitted.apply_gradients(state, sums)
                metrics.append(jax.device_get(step_metrics))
        return state, {**mean_over_updates(metrics), "skipped": float(state.skipped)}

    def _update_batch(
        self, microbatch: Microbatch, epoch: int, inner_step: int, weights: np.ndarray, valid_mask: np.ndarray
    ) -> UpdateBatch:
        assert microbatch.rollout is not None
        padding = (0, self.config.microbatch_size - len(weights))
        rows = np.pad(weights, padding), np.pad(valid_mask, padding), np.int32(inner_step)
        on_devices = shard_batch((*rows, self._random_source(epoch, microbatch)), self.layout)
        return UpdateBatch(microbatch.rollout.samples, microbatch.rollout.conditions, *on_devices)

    def _random_source(self, epoch: int, microbatch: Microbatch) -> RandomSource:
        step_numbers = np.array([step.number for step in microbatch.steps], np.int32)
        return RandomSource(np.int32(self.config.seed), np.int32(epoch), step_numbers)

    def _write_grid(self, microbatches: Sequence[Microbatch], epoch: int) -> None:
        if not self.config.grid_every or (epoch + 1) % self.config.grid_every:
            return
        shown = [each.rollout for each in microbatches[:_GRID_MICROBATCHES] if each.rollout is not None]
        images = [np.asarray(process_allgather(rollout.images)) for rollout in shown]
        if jax.process_index() == 0:
            write_grid(self.out / "samples" / f"epoch_{epoch + 1:05d}.png", images, self.config.group_size)
