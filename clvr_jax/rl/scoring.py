"""Scoring: the images of an epoch are scored by the reward while the next ones are being sampled.

Process 0 sends requests to a remote judge, or calls a program on the host, in threads. A judge on the mesh is called by
all processes together, between the rollouts.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import jax
import numpy as np

from clvr_jax.data.trajectories.proxy_steps import ProxyStep, ProxySteps
from clvr_jax.data.trajectories.record import ProxyPrompts
from clvr_jax.errors import ClvrError
from clvr_jax.processes import broadcast_from_host0
from clvr_jax.rewards.proxy_prompt_generator import ProxyPromptCache
from clvr_jax.rewards.reward import Reward, RewardInput, Scores
from clvr_jax.training.loop import IterationError


class ScoringError(IterationError):
    """The images of an epoch cannot be scored."""

    problem = "cannot be scored"


@dataclass(frozen=True)
class Scorer:
    """Scores images for trajectory steps.

    reward: that scores. steps: of the dataset. group_size: number of images for each step. live: proxy prompts that are
    written during training; None uses the dataset's.
    """

    reward: Reward
    steps: ProxySteps
    group_size: int
    live: ProxyPromptCache | None = None

    @contextmanager
    def epoch(self, steps: Sequence[ProxyStep]) -> Iterator["EpochScores"]:
        """Opens the scores of an epoch, and starts writing the proxy prompts for its steps."""
        with thread_pool(8) as scoring, thread_pool(16) as writing:
            if self.live and jax.process_index() == 0:
                self.live.request(steps, writing)
            yield EpochScores(self, scoring)


@dataclass
class EpochScores:
    """The scores of an epoch, some of them pending."""

    _scorer: Scorer
    _pool: ThreadPoolExecutor
    _pending: list[Callable[[], Scores]] = field(default_factory=list)

    def submit(self, steps: Sequence[ProxyStep], images: np.ndarray) -> None:
        """Starts scoring images (n, h, w, 3), a group for each of the steps and perhaps some more that are ignored.

        Every process passes all of them.

        Raises: ScoringError on every process, if a judge on the mesh fails.
        """
        if self._scorer.reward.runs_on_devices:
            try:
                found = self._score(steps, images, self._broadcast_proxies(steps))
            except ClvrError as error:
                raise ScoringError(str(error)) from error
            self._pending.append(lambda: found)
        elif jax.process_index() == 0:
            scores = self._pool.submit(lambda: self._score(steps, images, self._proxies(steps)))
            self._pending.append(scores.result)

    def result(self) -> Scores:
        """Waits for all scores. Returns: them in order, the same on every process.

        Raises: ScoringError on every process, if the judge or the proxy-prompt generator cannot be reached.
        """
        if self._scorer.reward.runs_on_devices:
            return self._joined()
        try:
            serialized = broadcast_from_host0(lambda: self._joined().to_json())
        except ClvrError as error:
            raise ScoringError(str(error)) from error
        return Scores.from_json(serialized)

    def _joined(self) -> Scores:
        return Scores.concatenate([scores() for scores in self._pending])

    def _proxies(self, steps: Sequence[ProxyStep]) -> list[ProxyPrompts | None]:
        """Returns the proxy prompts of each step; None where the generator's reply cannot be used."""
        live = self._scorer.live
        return [live.get(step) if live else step.proxies for step in steps]

    def _broadcast_proxies(self, steps: Sequence[ProxyStep]) -> list[ProxyPrompts | None]:
        """Returns the same on every process: only process 0 has a generator."""
        if self._scorer.live is None:
            return [step.proxies for step in steps]
        serialized = broadcast_from_host0(
            lambda: [None if one is None else asdict(one) for one in self._proxies(steps)]
        )
        return [
            None if one is None else ProxyPrompts(one["p_t2i"], one["p_i2i"], tuple(one["i_ref"])) for one in serialized
        ]

    def _score(self, steps: Sequence[ProxyStep], images: np.ndarray, proxies: Sequence[ProxyPrompts | None]) -> Scores:
        scorer, cases = self._scorer, []
        has_proxies = np.zeros(len(steps) * scorer.group_size, bool)
        for index, (step, prompts) in enumerate(zip(steps, proxies, strict=True)):
            if prompts is None:
                continue
            rows = slice(index * scorer.group_size, (index + 1) * scorer.group_size)
            has_proxies[rows] = True
            sources = scorer.steps.sources(step, prompts)
            cases += [RewardInput(image, prompts, sources, step.last_text) for image in images[rows]]
        return scorer.reward.scores(cases).scatter(has_proxies)


@contextmanager
def thread_pool(size: int) -> Iterator[ThreadPoolExecutor]:
    """Opens a thread pool that, when closed, drops what has not begun and waits for nothing: a judge may take minutes
    to fail."""
    pool = ThreadPoolExecutor(size)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
