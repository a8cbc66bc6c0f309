"""How the pictures of an epoch get their scores while the next ones are drawn.

A judge that is far away, or a program on the host, is asked by process 0, in threads. One that lies on the mesh is
asked by all processes together, between the programs that draw.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import jax
import numpy as np

from clvr_jax.data.proxy_steps import ProxyStep, ProxySteps
from clvr_jax.data.trajectory_record import ProxyPrompts
from clvr_jax.errors import ClvrError
from clvr_jax.rewards.reward import Case, Reward, Scores
from clvr_jax.rewards.teacher import LiveProxies
from clvr_jax.training.distributed import from_process_0


class UnscoredError(ClvrError):
    """The pictures of an epoch cannot be scored."""


@dataclass(frozen=True)
class Judging:
    """Who scores. group: pictures of a step. live: proxy prompts that are written now, None for the dataset's."""

    reward: Reward
    steps: ProxySteps
    group: int
    live: LiveProxies | None = None

    @contextmanager
    def of(self, steps: Sequence[ProxyStep]) -> Iterator["EpochJudge"]:
        """For the time in which pictures are drawn for these steps."""
        with threads(8) as judging, threads(16) as teaching:
            if self.live and jax.process_index() == 0:
                self.live.begin(steps, teaching)
            yield EpochJudge(self, judging)


@dataclass
class EpochJudge:
    """The scores of an epoch, some of them still to come."""

    _judging: Judging
    _pool: ThreadPoolExecutor
    _waiting: list[Callable[[], Scores]] = field(default_factory=list)

    def add(self, steps: Sequence[ProxyStep], pictures: np.ndarray) -> None:
        """Has pictures scored, a group for each of the steps and perhaps some more; all processes have them whole.

        Raises: UnscoredError on every process, if a judge on the mesh fails.
        """
        if self._judging.reward.is_on_mesh:
            try:
                found = self._scores(steps, pictures, self._agreed_proxies(steps))
            except ClvrError as error:
                raise UnscoredError(str(error)) from error
            self._waiting.append(lambda: found)
        elif jax.process_index() == 0:
            scores = self._pool.submit(lambda: self._scores(steps, pictures, self._proxies(steps)))
            self._waiting.append(scores.result)

    def scores(self) -> Scores:
        """All of them in order, the same on every process.

        Raises: UnscoredError on every process, if there is no judge or no teacher to be had.
        """
        if self._judging.reward.is_on_mesh:
            return self._joined()
        try:
            told = from_process_0(lambda: self._joined().to_json())
        except ClvrError as error:
            raise UnscoredError(str(error)) from error
        return Scores.from_json(told)

    def _joined(self) -> Scores:
        return Scores.joined([scores() for scores in self._waiting])

    def _proxies(self, steps: Sequence[ProxyStep]) -> list[ProxyPrompts | None]:
        """What stands for each step's history; None where the teacher's answer cannot be used."""
        live = self._judging.live
        return [live.of(step) if live else step.proxies for step in steps]

    def _agreed_proxies(self, steps: Sequence[ProxyStep]) -> list[ProxyPrompts | None]:
        """The same on every process: process 0 alone has a teacher."""
        if self._judging.live is None:
            return [step.proxies for step in steps]
        told = from_process_0(lambda: [one and asdict(one) for one in self._proxies(steps)])
        return [one and ProxyPrompts(one["p_t2i"], one["p_i2i"], tuple(one["i_ref"])) for one in told]

    def _scores(
        self, steps: Sequence[ProxyStep], pictures: np.ndarray, proxies: Sequence[ProxyPrompts | None]
    ) -> Scores:
        judging, cases = self._judging, []
        has_proxies = np.zeros(len(steps) * judging.group, bool)
        for place, (step, told) in enumerate(zip(steps, proxies, strict=True)):
            if told is None:
                continue
            members = slice(place * judging.group, (place + 1) * judging.group)
            has_proxies[members] = True
            edited = judging.steps.edited(step, told)
            cases += [Case(picture, told, edited, step.last_text) for picture in pictures[members]]
        return judging.reward.scores(cases).among(has_proxies)


@contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool that on the way out drops what has not begun, and waits for nothing: a judge may take minutes to fail."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
