"""Proxy prompts that a vision-language model writes while the policy trains, instead of those of a dataset.

Source: arXiv 2605.14876, Proxy Prompt RL: (p_T2I, p_I2I, I_ref) = f(c_t), by a strong model.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import asdict
from pathlib import Path

from clvr_jax.data.engine.prompted_roles import write_proxy_prompts
from clvr_jax.data.proxy_steps import ProxyStep, ProxySteps
from clvr_jax.data.trajectory_record import ProxyPrompts
from clvr_jax.errors import ClvrError
from clvr_jax.interfaces import ChatModel, ProviderError
from clvr_jax.json_input import parse_object, stream_lines
from clvr_jax.reasoning.answers import AnswerError
from clvr_jax.rewards.reward import is_of_one_answer

Teacher = Callable[[ProxyStep], ProxyPrompts]
"""Called from many threads. Raises: AnswerError if its answer cannot be used; ProviderError."""


def vlm_teacher(model: ChatModel, steps: ProxySteps) -> Teacher:
    """A model that reads what the policy is conditioned on: the request, all replies, the pictures before the step."""

    def teach(step: ProxyStep) -> ProxyPrompts:
        told = zip(step.history, steps.replies(step), strict=True)
        story = [*(f"picture {number}: {reply}" for number, reply in told), f"the step in question: {step.last_text}"]
        return write_proxy_prompts(model, steps.prompt(step), "\n".join(story), step.history, steps.references(step))

    return teach


class ProxyPromptCache:
    """What a teacher wrote, and what it is writing; a step is asked about once, also by a run that goes on.

    Args:
      teacher: that is asked.
      path: file that remembers its answers, one JSON object a line.
    """

    def __init__(self, teacher: Teacher, path: Path):
        self._teacher, self._path = teacher, path
        self._known = dict(_remembered(path))
        self._writing = threading.Lock()
        self._asked: dict[str, Future[ProxyPrompts]] = {}

    def begin(self, steps: Iterable[ProxyStep], pool: Executor) -> None:
        """Has the steps asked about that are not known yet; those of an earlier call are waited for no more."""
        unknown = {key: step for step in steps if (key := _key(step)) not in self._known}
        self._asked = {key: pool.submit(self._chat, key, step) for key, step in unknown.items()}

    def of(self, step: ProxyStep) -> ProxyPrompts | None:
        """The proxies of a step that was begun, waited for; None if the teacher's answer cannot be used.

        Raises: ProviderError if the teacher cannot be asked at all.
        """
        key = _key(step)
        if key in self._known:
            return self._known[key]
        try:
            return self._asked[key].result()
        except AnswerError:
            return None
        except ProviderError as error:
            if is_of_one_answer(error):
                return None
            raise

    def _chat(self, key: str, step: ProxyStep) -> ProxyPrompts:
        found = self._teacher(step)
        with self._writing:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": key, **asdict(found)}) + "\n")
            self._known[key] = found
        return found


def _key(step: ProxyStep) -> str:
    """Number and text: in another dataset the same number is another step."""
    return f"{step.number}-{hashlib.blake2b(step.text.encode(), digest_size=8).hexdigest()}"


def _remembered(path: Path) -> Iterator[tuple[str, ProxyPrompts]]:
    for where, line in stream_lines(path) if path.exists() else ():
        try:
            told = parse_object(line, where)
            found = ProxyPrompts(told.text("p_t2i"), told.text("p_i2i"), told.integers("i_ref"))
            yield told.text("step"), found
        except ClvrError:
            continue  # the torn last line of a killed run
