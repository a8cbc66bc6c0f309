"""Proxy prompts that a vision-language model writes during training, in place of those of the dataset.

Source: arXiv 2605.14876, Proxy Prompt RL: (p_T2I, p_I2I, I_ref) = f(c_t), by a strong model.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import asdict
from pathlib import Path

from clvr_jax.data.engine.roles.prompted import write_proxy_prompts
from clvr_jax.data.trajectories.proxy_steps import ProxyStep, ProxySteps
from clvr_jax.data.trajectories.record import ProxyPrompts
from clvr_jax.errors import ClvrError
from clvr_jax.files.atomic_io import open_lines
from clvr_jax.files.json_input import parse_object, stream_lines
from clvr_jax.interfaces import ChatModel, ProviderError
from clvr_jax.interfaces.answers import AnswerError
from clvr_jax.rewards.reward import is_single_reply_error

ProxyPromptGenerator = Callable[[ProxyStep], ProxyPrompts]
"""(step) -> its proxy prompts. It is called from many threads.

Raises: AnswerError if the model's reply cannot be used; ProviderError if the model cannot be reached.
"""


def vlm_proxy_prompt_generator(model: ChatModel, steps: ProxySteps) -> ProxyPromptGenerator:
    """Returns a generator that uses a model.

    The model receives what the policy is conditioned on: the request, all replies, and the images before the step.

    Args:
      model: a vision-language model.
      steps: of the dataset, which has the requests, replies and images.
    """

    def generate(step: ProxyStep) -> ProxyPrompts:
        replies = zip(step.history, steps.replies(step), strict=True)
        story = [
            *(f"picture {number}: {reply}" for number, reply in replies),
            f"the step in question: {step.last_text}",
        ]
        return write_proxy_prompts(model, steps.prompt(step), "\n".join(story), step.history, steps.references(step))

    return generate


class ProxyPromptCache:
    """Generates proxy prompts in the background and stores them, so that each step is generated once, also by a resumed
    run.

    Args:
      generate: the proxy-prompt generator.
      path: file of the stored proxy prompts, one JSON object per line; created when needed.
    """

    def __init__(self, generate: ProxyPromptGenerator, path: Path):
        self._generate, self._path = generate, path
        self._known = dict(_stored(path))
        self._lock = threading.Lock()
        self._pending: dict[str, Future[ProxyPrompts]] = {}

    def request(self, steps: Iterable[ProxyStep], pool: Executor) -> None:
        """Starts the generation for all steps that are not stored. Steps of an earlier call are not waited for."""
        unknown = {key: step for step in steps if (key := _key(step)) not in self._known}
        self._pending = {key: pool.submit(self._chat, key, step) for key, step in unknown.items()}

    def get(self, step: ProxyStep) -> ProxyPrompts | None:
        """Waits for the proxy prompts of a requested step; None if the generator's reply cannot be used.

        Raises: ProviderError if the generator cannot be reached.
        """
        key = _key(step)
        if key in self._known:
            return self._known[key]
        try:
            return self._pending[key].result()
        except AnswerError:
            return None
        except ProviderError as error:
            if is_single_reply_error(error):
                return None
            raise

    def _chat(self, key: str, step: ProxyStep) -> ProxyPrompts:
        found = self._generate(step)
        line = json.dumps({"step": key, **asdict(found)}).encode() + b"\n"
        with self._lock:
            try:
                with open_lines(self._path) as file:
                    file.write(line)
            except OSError as error:
                raise ClvrError(f"{self._path}: cannot be written ({error.strerror or error})") from error
            self._known[key] = found
        return found


def _key(step: ProxyStep) -> str:
    """Returns a key of number and text, since the same number is another step in another dataset."""
    return f"{step.number}-{hashlib.blake2b(step.text.encode(), digest_size=8).hexdigest()}"


def _stored(path: Path) -> Iterator[tuple[str, ProxyPrompts]]:
    for where, line in stream_lines(path) if path.exists() else ():
        try:
            data = parse_object(line, where)
            found = ProxyPrompts(data.text("p_t2i"), data.text("p_i2i"), data.integers("i_ref"))
            yield data.text("step"), found
        except ClvrError:
            continue  # an incomplete last line of a killed run
