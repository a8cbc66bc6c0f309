"""Proxy Prompt RL: draw with the old policy, have the pictures judged, learn from what was better than its group.

An epoch draws a group of pictures for each of some trajectory steps, under the whole history c_t; only the reward reads
the proxy prompts. Judges work on the host, or far away, while the devices draw the next pictures.

All randomness of an epoch follows from seed and epoch, so a run that stopped and went on is the run that did not.

Source: arXiv 2605.14876 (PPRL); arXiv 2509.16117 (DiffusionNFT, its policy optimizer); arXiv 2505.05470 (Flow-GRPO).
"""

import dataclasses
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clvr_jax.console import console, progress
from clvr_jax.data.proxy_steps import ProxyStep, ProxySteps
from clvr_jax.errors import ClvrError
from clvr_jax.files import read_json, write_json
from clvr_jax.rewards.reward import Reward
from clvr_jax.rewards.teacher import LiveProxies, Teacher
from clvr_jax.sharding import MeshLayout, active_layout, process_allgather, without_layout
from clvr_jax.training.checkpoint import Checkpoints
from clvr_jax.training.diffusion_nft import group_advantages
from clvr_jax.training.feed import check_batch
from clvr_jax.training.metrics import MetricLog
from clvr_jax.training.pprl_judging import EpochJudge, Judging, UnscoredError, threads
from clvr_jax.training.pprl_methods import Backbone
from clvr_jax.training.pprl_metrics import Stopwatch, means_over_updates, of_rewards, write_grid
from clvr_jax.training.pprl_step import Drawn, PPRLConfig, PPRLState, Programs
from clvr_jax.training.preemption import Preemption, agreed, preemption

Tree = Any

_BEGUN = "begun.json"


@dataclasses.dataclass(frozen=True)
class PPRLTask:
    """What a recipe hands to `fit`.

    name: used in progress lines. config: of the run. base: weights of the model that starts, the reference of the loss.
    frozen: what else the backbone reads. backbone: how it draws. steps: what is drawn for. data: (steps of one bucket)
    -> what `Backbone.condition` takes, a pytree of NumPy arrays with one row for each. bucket: steps with the same one
    have data of the same shapes. reward: of the pictures. save: (weights, what was trained on top of the base, folder)
    -> None, writes the trained model. teacher: writes proxy prompts while pictures are drawn; None takes the dataset's.
    """

    name: str
    config: PPRLConfig
    base: Tree
    frozen: Tree
    backbone: Backbone
    steps: ProxySteps
    data: Callable[[Sequence[ProxyStep]], Any]
    bucket: Callable[[ProxyStep], Hashable]
    reward: Reward
    save: Callable[[Tree, Tree, Path], None]
    teacher: Teacher | None = None

    @property
    def params(self) -> Tree:
        """What trains, as it starts; what `recipes.export_run` restores."""
        return self.config.start(self.base)

    def export(self, trained: Tree, folder: Path) -> None:
        """Writes the model with what was trained on top of the base."""
        self.save(self.config.weights(self.base, trained), trained, folder)


def fit(
    task: PPRLTask,
    config: PPRLConfig,
    out: Path,
    *,
    resume: bool = False,
    stop_after: int | None = None,
    on_begin: Callable[[], None] | None = None,
) -> PPRLState:
    """Trains; checkpoints, metrics, grids of samples and the exported model lie under `out`.

    Args:
      task: what to train; made for `config`.
      config: how.
      out: folder of the run: `checkpoints/`, `metrics.jsonl`, `samples/`, `export/`.
      resume: continue from the newest checkpoint in `out`; without it an `out` that holds one is an error.
      stop_after: stop (with a checkpoint) once this many epochs are done.
      on_begin: called once nothing refuses the run any more, before its first epoch.
    Returns: the final state; of a run that was asked to stop (SIGTERM), the state that was saved.
    Raises: ClvrError, with the state saved, if pictures cannot be judged any more or too many updates in a row are not
      finite; UsageError for a mesh or numbers that do not fit together.
    """
    layout = active_layout() or MeshLayout(config.mesh.make())
    check_batch(np.zeros((config.rows, 1)), layout, 1)
    with layout.active(), Checkpoints(out / "checkpoints", config.keep) as checkpoints:
        state = PPRLState.create(task.params, config.optimizer(), layout)
        if resume:
            _check_begun(config, out)
        state, _ = checkpoints.restore_or(state, resume=resume)
        if on_begin is not None:
            on_begin()
        if jax.process_index() == 0:
            write_json(out / _BEGUN, config.begun)
        last = min(config.epochs, stop_after or config.epochs)
        if int(state.epoch) < last:
            state = _Run(task, config, layout, out, checkpoints).to(state, last)
        if int(state.epoch) == config.epochs:
            _export(task, state, out / "export")
    return state


class _StopError(Exception):
    """The run was asked to stop in the middle of an epoch, before anything was learned in it."""


@dataclasses.dataclass
class _Call:
    """Groups of one bucket that are drawn, and later learned from, by one call of a program.

    steps: of the groups; filled up to a whole call, the last ones may be there twice. real: how many are not.
    """

    steps: tuple[ProxyStep, ...]
    real: int
    data: Any
    drawn: Drawn | None = None


@dataclasses.dataclass
class _Run:
    """The loop, with what it needs in every epoch."""

    task: PPRLTask
    config: PPRLConfig
    layout: MeshLayout
    out: Path
    checkpoints: Checkpoints

    def __post_init__(self) -> None:
        task, layout = self.task, self.layout
        self.programs = Programs(task.backbone, self.config, layout)
        self.base = jax.device_put(task.base, layout.parameters(task.base))
        self.frozen = jax.device_put(task.frozen, layout.parameters(task.frozen))
        live = LiveProxies(task.teacher, self.out / "proxies.jsonl") if task.teacher else None
        self.judging = Judging(task.reward, task.steps, self.config.group, live)

    def to(self, state: PPRLState, last: int) -> PPRLState:
        """Trains up to epoch `last`, or until it is asked to stop."""
        config, start = self.config, int(state.epoch)
        saved_epoch, saved_at = start if start else -1, time.monotonic()

        def save(state: PPRLState) -> None:
            nonlocal saved_epoch, saved_at
            if int(state.epoch) != saved_epoch:
                self.checkpoints.save(int(state.epoch), state, {})
                saved_epoch, saved_at = int(state.epoch), time.monotonic()

        with (
            MetricLog(self.out, start, config.wandb, self.task.name, dataclasses.asdict(config)) as log,
            progress(self.task.name, config.epochs, start) as advance,
            preemption() as asked,
        ):
            for epoch in range(start, last):
                try:
                    state, metrics = self._epoch(state, epoch, asked)
                except _StopError:
                    save(state)
                    self.checkpoints.wait()
                    console.print(f"{self.task.name}: asked to stop; epoch {epoch} is saved, --resume goes on")
                    break
                except UnscoredError as error:
                    save(state)
                    raise ClvrError(
                        f"{self.task.name}: epoch {epoch + 1} cannot be scored ({error}); epoch {epoch} is saved, "
                        "--resume goes on from it"
                    ) from error
                log.write(epoch + 1, metrics)
                advance(epoch + 1, f"reward {metrics['reward']:.3f}  {metrics['seconds']:.1f} s/epoch")
                self._check(state)
                if epoch + 1 == last or agreed(time.monotonic() - saved_at > 60 * config.save_minutes):
                    save(state)
        return state

    def _epoch(self, state: PPRLState, epoch: int, asked: Preemption) -> tuple[PPRLState, dict[str, float]]:
        config, watch = self.config, Stopwatch()
        # In the order of the dataset, so that nothing depends on the order in which they were chosen.
        steps = sorted(self.task.steps.chosen(epoch, config.groups, config.seed), key=lambda step: step.number)
        with threads(1) as preparing, self.judging.of(steps) as judge:
            calls = self._sampled(state, epoch, steps, asked, watch, preparing, judge)
            with watch("reward"):
                scores = judge.scores()
        kinds = np.repeat([step.kind for call in calls for step in call.steps[: call.real]], config.group)
        keys = np.repeat([step.number for call in calls for step in call.steps[: call.real]], config.group)
        try:
            advantages = group_advantages(scores.values, keys, config.spread)
        except ClvrError as error:
            raise UnscoredError(str(error)) from error
        if config.grid_every and (epoch + 1) % config.grid_every == 0:
            self._grid(calls, epoch)
        merits = np.asarray(self.programs.learner.merits(advantages.values), np.float32)
        with watch("update"):
            state, learned = self._learned(state, epoch, calls, merits, advantages.counts.astype(np.float32))
            state = jax.block_until_ready(self.programs.followed(state))
        return state, {**of_rewards(scores, advantages, kinds, keys), **learned, **watch.read()}

    def _sampled(
        self,
        state: PPRLState,
        epoch: int,
        steps: Sequence[ProxyStep],
        asked: Preemption,
        watch: Stopwatch,
        preparing: ThreadPoolExecutor,
        judge: EpochJudge,
    ) -> list[_Call]:
        """Draws for all steps; while the pictures of one call are judged, those of the next are drawn."""
        config = self.config
        waiting = [preparing.submit(self._prepared, part) for part in self._cut(steps)]
        calls: list[_Call] = []
        for number, prepared in enumerate(waiting):
            if asked.reached(epoch * config.groups + number):
                raise _StopError
            call = prepared.result()
            with watch("sampling"):
                rows = {"data": call.data, "number": _numbers(call.steps), **self._when(epoch)}
                call.drawn = self.programs.rollout(self.base, state.old, self.frozen, self._placed(rows))
                self._in_order(call.drawn)
            calls.append(call)
            if number:
                self._judged(calls[-2], watch, judge)
        self._judged(calls[-1], watch, judge)
        return calls

    def _judged(self, call: _Call, watch: Stopwatch, judge: EpochJudge) -> None:
        assert call.drawn is not None
        with watch("sampling"):
            pictures = np.asarray(process_allgather(call.drawn.pictures))
        with watch("reward"):
            judge.add(call.steps[: call.real], pictures)

    def _cut(self, steps: Sequence[ProxyStep]) -> Iterator[Sequence[ProxyStep]]:
        """Parts of one bucket, of as many groups as a call holds, or fewer at the end of a bucket."""
        buckets: dict[Hashable, list[ProxyStep]] = {}
        for step in steps:
            buckets.setdefault(self.task.bucket(step), []).append(step)
        for found in buckets.values():
            for begin in range(0, len(found), self.config.groups_per_call):
                yield found[begin : begin + self.config.groups_per_call]

    def _prepared(self, steps: Sequence[ProxyStep]) -> _Call:
        whole = (*steps, *[steps[-1]] * (self.config.groups_per_call - len(steps)))
        return _Call(whole, len(steps), self.task.data(whole))

    def _learned(
        self, state: PPRLState, epoch: int, calls: Sequence[_Call], merits: np.ndarray, counts: np.ndarray
    ) -> tuple[PPRLState, dict[str, float]]:
        """The optimizer steps of an epoch."""
        config, found = self.config, []
        draws = min(config.timesteps, self.programs.learner.places)
        ends = np.cumsum([call.real * config.group for call in calls])
        order = np.random.default_rng((config.seed, epoch, 1)).permutation(len(calls))
        for part in np.array_split(order, config.updates):
            sums = self.programs.nothing(state.params)
            # Within a step in the order of the dataset: sums are rounded.
            for place in sorted(part):
                call = calls[place]
                rows = slice(ends[place] - call.real * config.group, ends[place])
                for draw in range(draws if counts[rows].any() else 0):
                    batch = self._batch(call, epoch, draw, merits[rows], counts[rows])
                    sums = self.programs.added(state.params, self.base, state.old, sums, batch)
                    self._in_order(sums)
            if float(sums.weight) > 0:
                state, metrics = self.programs.updated(state, sums)
                found.append(jax.device_get(metrics))
        return state, {**means_over_updates(found), "skipped": float(state.skipped)}

    def _batch(self, call: _Call, epoch: int, draw: int, merits: np.ndarray, counts: np.ndarray) -> Any:
        assert call.drawn is not None
        unused = self.config.rows - len(merits)
        host = {
            "merits": np.pad(merits, (0, unused)),
            "counts": np.pad(counts, (0, unused)),
            "number": _numbers(call.steps),
            **self._when(epoch),
            "draw": np.int32(draw),
        }
        return {**self._placed(host), "kept": call.drawn.kept, "conditions": call.drawn.conditions}

    def _when(self, epoch: int) -> dict[str, np.int32]:
        """What random numbers follow from; as data, so that runs of several seeds share their programs."""
        return {"seed": np.int32(self.config.seed), "epoch": np.int32(epoch)}

    def _placed(self, rows: Any) -> Any:
        """Puts what every process has whole on the devices, cut by rows."""

        def place(leaf: Any) -> jax.Array:
            leaf = np.asarray(leaf)
            return jax.make_array_from_callback(leaf.shape, self.layout.batch(leaf), lambda index: leaf[index])

        return jax.tree.map(place, rows)

    def _in_order(self, result: Any) -> None:
        if self.layout.platform == "cpu":
            # Virtual devices share few threads: calls in flight could wait for one another for ever.
            jax.block_until_ready(result)

    def _grid(self, calls: Sequence[_Call], epoch: int) -> None:
        """The groups of the first calls as rows of a picture."""
        pictures = [np.asarray(process_allgather(call.drawn.pictures)) for call in calls[:8] if call.drawn is not None]
        if jax.process_index() == 0:
            write_grid(self.out / "samples" / f"epoch_{epoch + 1:05d}.png", pictures, self.config.group)

    def _check(self, state: PPRLState) -> None:
        if (bad := int(state.skipped_in_a_row)) >= self.config.bad_updates:
            raise ClvrError(
                f"{self.task.name}: loss or gradients of {bad} updates in a row are not finite, up to epoch "
                f"{int(state.epoch)}; resume the last checkpoint in {self.out / 'checkpoints'} with a smaller learning "
                "rate"
            )


def _numbers(steps: Sequence[ProxyStep]) -> np.ndarray:
    return np.array([step.number for step in steps], np.int32)


def _check_begun(config: PPRLConfig, out: Path) -> None:
    """Before arrays are read: their shapes would tell of another rank in many words, and of another alpha in none."""
    if (out / _BEGUN).exists() and (found := read_json(out / _BEGUN)) != config.begun:
        raise ClvrError(f"{out}: was begun with {found}, this run has {config.begun}; choose another --out")


def _export(task: PPRLTask, state: PPRLState, folder: Path) -> None:
    """Process 0 exports; what is spread over several hosts comes together there first."""
    whole = dataclasses.replace(task, base=process_allgather(task.base))
    ema = process_allgather(state.ema)
    if jax.process_index() == 0:
        with without_layout():
            whole.export(ema, folder)
