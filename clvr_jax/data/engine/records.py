"""Conversion of histories of the data engine to records: the trajectory, and verification examples.

A verification example is a history, its latest image, and the verdict on that image. Two kinds are made:

* counterfactual pairs: a wrong image of a trajectory, and a right one that was generated again from the same
  instruction and history; both examples share the history, and their ids are equal but for the last word;
* the final image of a trajectory that was rejected because that image is wrong.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from clvr_jax.data.engine.roles.base import Check, Event, History, Translator
from clvr_jax.data.trajectories.record import TrajectoryRecord
from clvr_jax.errors import ClvrError
from clvr_jax.files.image_io import ImageLike
from clvr_jax.files.json_input import JSON
from clvr_jax.interfaces import ImageResponse
from clvr_jax.reasoning.conversation.actions import IMAGE_GEN, TERMINATE, Reply, parse
from clvr_jax.reasoning.trajectories.trajectory import ACCEPTED, GAVE_UP, Step, Trajectory, Verdict, package_versions


class TranslationError(ClvrError):
    """Replies do not fit the history; the message says how."""


@dataclass(frozen=True)
class Retry:
    """A right image for a step whose image in the history is wrong: same instruction and history, another seed.

    Attributes:
      wrong: number of the wrong image.
      image: the right image.
      event: the event of the step, with the checks of the right image.
    """

    wrong: int
    image: ImageLike
    event: Event


@dataclass(frozen=True)
class RecordWriter:
    """Writes the records of one prompt.

    Attributes:
      translator: writes the replies of the controller.
      model: name of the image generator.
      seed, versions: recorded in the trajectory.
    """

    translator: Translator
    model: str
    seed: int
    versions: Mapping[str, str]

    def replies(self, history: History, accepted: bool) -> list[Reply]:
        """Returns the reply before each image of the path, and the reply after the final image.

        Args:
          history: the history.
          accepted: whether the final image meets the request, so that the last reply ends the trajectory.
        Raises: TranslationError or ParseError if the replies do not fit the images or their verdicts.
        """
        texts, wrong = self.translator.replies(history, accepted), wrong_images(history)
        if len(texts) != len(history.path) + 1:
            raise TranslationError(f"{len(history.path)} images got {len(texts)} replies")
        read = [parse(text, has_image=number > 0) for number, text in enumerate(texts)]
        if any(reply.action != IMAGE_GEN for reply in read[:-1]) or (read[-1].action == TERMINATE) != accepted:
            raise TranslationError(
                "the replies must request each image, and the last one must stop exactly if the final image is accepted"
            )
        if bool(read[-1].unmet) == accepted:
            raise TranslationError("the last reply must have nothing unmet exactly if the final image is accepted")
        for image, verdict in zip(history.path, read[1:], strict=True):
            if image in wrong and not verdict.unmet:
                raise TranslationError(f"image {image} failed its checklist, but the reply to it has nothing unmet")
        return read

    def trajectory(
        self, history: History, replies: Sequence[Reply], responses: Sequence[ImageResponse]
    ) -> TrajectoryRecord:
        """Returns the path as a trajectory of the loop.

        Args:
          history: the history, whose final image is accepted.
          replies: replies of the whole path, see `replies`.
          responses: response of the image generator for each image of the history.
        Raises: TranslationError if the numbers of proxy prompts and images differ, and errors of the translator.
        """
        proxies = self.translator.proxies(history)
        if len(proxies) != len(history.path):
            raise TranslationError(f"{len(history.path)} images got {len(proxies)} proxy prompts")
        steps = [
            Step(
                *_step_fields(number, reply),
                history.images[image],
                Verdict(following.unmet or (), following.reasoning),
                nfe=responses[image].usage.nfe,
                seconds=responses[image].usage.seconds,
            )
            for number, (reply, following, image) in enumerate(zip(replies, replies[1:], history.path, strict=False))
        ]
        trajectory = Trajectory(
            history.item.prompt,
            (*steps, Step(replies[-1].reasoning, TERMINATE)),
            ACCEPTED,
            self.model,
            self.seed,
            {**package_versions(), **self.versions},
            sum(one.usage.seconds for one in responses),
        )
        return TrajectoryRecord(
            history.item.id,
            trajectory,
            history.item.metadata,
            (*_checklists(history), None),
            (*proxies, None),
            _mistakes(history),
        )

    def verification(
        self, history: History, replies: Sequence[Reply], retries: Sequence[Retry], is_last_wrong: bool
    ) -> Iterator[TrajectoryRecord]:
        """Yields the verification examples of a path, see the docstring of this module.

        A pair for which the translator gives no usable verdict is left out.

        Args:
          history: the history.
          replies: replies of the whole path, see `replies`.
          retries: right images of steps whose image is wrong; those of steps that were rolled back are left out.
          is_last_wrong: whether the trajectory is rejected because the final image is wrong.
        """
        paired = set()
        for retry in retries:
            if retry.wrong not in history.path:
                continue
            position = history.path.index(retry.wrong)
            before = _truncate(history, position)
            try:
                right = _with_image(before, retry)
                texts = tuple(reply.text for reply in replies[: position + 1])
                verdict = parse(self.translator.verdict(right, texts), has_image=True)
                example = self._example(right, replies[: position + 1], verdict, is_wrong=False)
            except ClvrError:
                continue
            paired.add(position)
            yield self._example(
                _truncate(history, position + 1), replies[: position + 1], replies[position + 1], is_wrong=True
            )
            yield example
        last = len(history.path) - 1
        if is_last_wrong and last not in paired:
            yield self._example(history, replies[:-1], replies[-1], is_wrong=True)

    def _example(self, history: History, replies: Sequence[Reply], verdict: Reply, is_wrong: bool) -> TrajectoryRecord:
        if (verdict.action == TERMINATE) != (not verdict.unmet):
            raise TranslationError("a verdict must stop exactly if nothing is unmet")
        verdicts = [Verdict(reply.unmet or (), reply.reasoning) for reply in (*replies[1:], verdict)]
        steps = tuple(
            Step(*_step_fields(number, reply), history.images[image], found)
            for number, (reply, image, found) in enumerate(zip(replies, history.path, verdicts, strict=True))
        )
        last = len(steps) - 1
        return TrajectoryRecord(
            f"{history.item.id}-{last}-{'wrong' if is_wrong else 'right'}",
            Trajectory(
                history.item.prompt,
                steps,
                GAVE_UP if verdict.unmet else ACCEPTED,
                self.model,
                self.seed,
                {**package_versions(), **self.versions},
            ),
            history.item.metadata,
            _checklists(history),
            mistakes=tuple(sorted({*_mistakes(history), *([last] if is_wrong else [])})),
            is_verification=True,
        )


def wrong_images(history: History) -> frozenset[int]:
    """Returns the numbers of the images that failed their checklist."""
    return frozenset(
        event.image_index for event in history.events if event.image_index is not None and failed(event.checks)
    )


def failed(checks: Sequence[Check]) -> list[Check]:
    """Returns the checks that were answered with no."""
    return [check for check in checks if not check.passed]


def _step_fields(number: int, reply: Reply) -> tuple[str, str, tuple[int, ...]]:
    """Returns reasoning, action and references of step `number` of a path; the references are all images before it."""
    return reply.reasoning, IMAGE_GEN, tuple(range(number))


def _checklists(history: History) -> tuple[JSON, ...]:
    checks = {event.image_index: event.checks for event in history.events}
    return tuple([[check.question, check.evidence, check.passed] for check in checks[image]] for image in history.path)


def _mistakes(history: History) -> tuple[int, ...]:
    wrong = wrong_images(history)
    return tuple(position for position, image in enumerate(history.path) if image in wrong)


def _truncate(history: History, length: int) -> History:
    """Returns the history up to image `length` of the path, without later events."""
    path = history.path[:length]
    ends = [number for number, event in enumerate(history.events, start=1) if event.image_index in path]
    return History(history.item, history.images, path, history.events[: max(ends, default=0)])


def _with_image(history: History, retry: Retry) -> History:
    """Returns the history extended by the right image of a retry."""
    number = len(history.images)
    event = Event(retry.event.state, retry.event.turn, number, retry.event.checks)
    return History(history.item, (*history.images, retry.image), (*history.path, number), (*history.events, event))
