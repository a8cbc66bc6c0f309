"""The roles of the data engine, implemented by vision-language models and prompt templates.

The templates are the files in `templates/`; their version is recorded with every trajectory. A reply that cannot be
parsed is requested once more, with the error message.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Literal, TypeVar

from typing_extensions import override

from clvr_jax.data.engine.actions import ActionName, ImageEdit, InitialGeneration, Turn
from clvr_jax.data.engine.roles.base import (
    Check,
    Event,
    History,
    Judge,
    Planner,
    Roles,
    Translator,
    Validation,
    Verifier,
)
from clvr_jax.data.engine.states import StateName
from clvr_jax.data.trajectories.record import ProxyPrompts
from clvr_jax.files.image_io import ImageLike
from clvr_jax.files.json_input import JSON, UncheckedJSON
from clvr_jax.interfaces import ChatModel, ChatRequest, Message
from clvr_jax.interfaces.answers import AnswerError, read_json_object
from clvr_jax.reasoning.conversation.actions import IMAGE_GEN, TERMINATE, ParseError, parse, strip_action
from clvr_jax.reasoning.seeds import derive_seed

TEMPLATES_VERSION = 2
"""Version of the templates, which increases with every change of one."""

_MOST_QUESTIONS = 12
_ACTIONS = {
    "INITIAL_GENERATION": 'draw the first picture; parameters {"prompt": "what to draw"}',
    "IMAGE_EDIT": 'draw the next picture; parameters {"prompt": "what to change and what must stay", "ref_img_list": '
    "[numbers of the pictures to edit]}",
    "RESULT_VALIDATION": "have the latest picture checked against the request; no parameters",
    "END_TRAJECTORY": "the latest picture is the result; no parameters",
}
_LAST_TEXT = {
    True: 'says what the final image shows, and "Unmet: nothing."',
    False: "is about the final image, which was rejected: like every later text, it says what is unmet, and what to "
    "change now.",
}
Read = TypeVar("Read")


@dataclass(frozen=True)
class PromptedPlanner(Planner):
    """A planner.

    Attributes:
      model: the vision-language model.
      temperature: above 0, so that a failed turn is not simply repeated.
    """

    model: ChatModel
    temperature: float = 0.7

    @override
    def turn(self, history: History, state: StateName, allowed: tuple[ActionName, ...], seed: int) -> str:
        error = history.events[-1].error if history.events else ""
        text = template("director").format(
            request=history.item.prompt,
            events=to_transcript(history.events) or "Nothing yet.",
            pictures=_numbered(history.path) or "there is none yet",
            state=state,
            actions="\n".join(f"- {name}: {_ACTIONS[name]}" for name in allowed),
            complaint=f"Your last answer could not be used: {error}\n" if error else "",
        )
        shown = [history.images[number] for number in history.path]
        question = ChatRequest(_chat(text, len(shown)), shown, 1024, self.temperature, seed, is_json=True)
        return self.model.chat(question).text


@dataclass(frozen=True)
class PromptedVerifier(Verifier):
    """A verifier."""

    model: ChatModel

    @override
    def checklist(self, history: History, turn: Turn) -> tuple[str, ...]:
        assert isinstance(turn.action, InitialGeneration | ImageEdit)
        edit = (
            "It is an edit of the pictures you see." if isinstance(turn.action, ImageEdit) else "It is a first drawing."
        )
        text = template("checklist").format(instruction=turn.action.prompt, kind=edit, limit=_MOST_QUESTIONS)

        def read(data: UncheckedJSON) -> tuple[str, ...]:
            questions = _texts(data, "questions")
            if not 1 <= len(questions) <= _MOST_QUESTIONS:
                raise AnswerError(f"{len(questions)} questions; there must be 1 to {_MOST_QUESTIONS}")
            return questions

        return _request_json(self.model, text, _references(history, turn), read)

    @override
    def check(self, history: History, turn: Turn, questions: tuple[str, ...], image: ImageLike) -> tuple[Check, ...]:
        before = _references(history, turn)
        shown = f"You see {len(before) + 1} pictures; the last one was made from the others." if before else ""
        numbered = "\n".join(f"{number}. {question}" for number, question in enumerate(questions, start=1))
        text = template("check").format(shown=shown or "You see one picture.", questions=numbered)

        def read(data: UncheckedJSON) -> tuple[Check, ...]:
            answers = data.get("answers")
            if not isinstance(answers, list) or len(answers) != len(questions):
                found = len(answers) if isinstance(answers, list) else "no"
                raise AnswerError(f"{found} answers to {len(questions)} questions")
            return tuple(_check(question, answer) for question, answer in zip(questions, answers, strict=True))

        return _request_json(self.model, text, [*before, image], read)

    @override
    def validate(self, history: History) -> Validation:
        text = template("validate").format(request=history.item.prompt, pictures=_numbered(history.path))

        def read(data: UncheckedJSON) -> Validation:
            accepted, back, gaps = data.get("accepted"), data.get("roll_back_to"), _texts(data, "gaps")
            if not isinstance(accepted, bool):
                raise AnswerError(f"accepted must be true or false, got {accepted!r}")
            if accepted and gaps:
                raise AnswerError(f"accepted, but with gaps: {'; '.join(gaps)}")
            if back is not None and (type(back) is not int or back not in history.path):
                raise AnswerError(f"roll_back_to is {back!r}; it must be null or one of {_numbered(history.path)}")
            return Validation(accepted, gaps, str(data.get("feedback", "")), back)

        return _request_json(self.model, text, [history.images[number] for number in history.path], read)


@dataclass(frozen=True)
class PromptedJudge(Judge):
    """A judge of two images."""

    model: ChatModel

    @override
    def prefer(
        self, prompt: str, first: ImageLike, second: ImageLike, seed: int
    ) -> Literal["first", "second", "neither"]:
        def read(data: UncheckedJSON) -> Literal["first", "second", "neither"]:
            better = str(data.get("better", "")).strip().lower()
            for choice in ("first", "second", "neither"):
                if better == choice:
                    return choice
            raise AnswerError(f"better is {better!r}; it must be first, second or neither")

        return _request_json(self.model, template("judge").format(request=prompt), [first, second], read, seed)


@dataclass(frozen=True)
class PromptedTranslator(Translator):
    """A translator of histories into replies of the controller and proxy prompts."""

    model: ChatModel

    @override
    def replies(self, history: History, accepted: bool) -> tuple[str, ...]:
        count = len(history.path) + 1
        text = template("replies").format(
            request=history.item.prompt,
            events=to_transcript(_on_path(history)),
            pictures=_numbered(history.path),
            count=count,
            last=_LAST_TEXT[accepted],
        )

        def read(data: UncheckedJSON) -> tuple[str, ...]:
            texts = _texts(data, "texts")
            if len(texts) != count:
                raise AnswerError(f"{len(texts)} texts; there must be {count}")
            return (*(each + IMAGE_GEN for each in texts[:-1]), texts[-1] + (TERMINATE if accepted else IMAGE_GEN))

        return _request_json(
            self.model, text, [history.images[number] for number in history.path], read, max_tokens=4096
        )

    @override
    def verdict(self, history: History, replies: tuple[str, ...]) -> str:
        text = template("verdict").format(
            request=history.item.prompt,
            events=to_transcript(_on_path(history)),
            replies="\n".join(map(strip_action, replies)),
            pictures=_numbered(history.path),
        )

        def read(data: UncheckedJSON) -> str:
            (said,) = _texts({"text": [data.get("text")]}, "text")
            try:
                unmet = parse(said + IMAGE_GEN, has_image=True).unmet
            except ParseError as error:
                raise AnswerError(str(error)) from error
            return said + (IMAGE_GEN if unmet else TERMINATE)

        return _request_json(self.model, text, [history.images[number] for number in history.path], read)

    @override
    def proxies(self, history: History) -> tuple[ProxyPrompts, ...]:
        """Makes one call for each image."""
        return tuple(self._proxy(history, index) for index in range(len(history.path)))

    def _proxy(self, history: History, index: int) -> ProxyPrompts:
        known = history.path[: index + 1]
        events = [event for event in _on_path(history) if event.image_index is None or event.image_index in known]
        shown = [history.images[number] for number in known]
        found = write_proxy_prompts(self.model, history.item.prompt, to_transcript(events), known[:-1], shown)
        return replace(found, i_ref=tuple(history.path.index(number) for number in found.i_ref))


def write_proxy_prompts(
    model: ChatModel, request: str, transcript: str, earlier: Sequence[int], images: Sequence[ImageLike]
) -> ProxyPrompts:
    """Returns the proxy prompts of one step of a trajectory.

    Args:
      model: writes them.
      request: prompt of the trajectory.
      transcript: text that describes all events up to the step.
      earlier: numbers of the images before the step, as the transcript and `i_ref` use them.
      images: images that the model receives.
    Raises: AnswerError if two replies cannot be parsed; ProviderError.
    """
    text = template("proxies").format(request=request, events=transcript)

    def read(data: UncheckedJSON) -> ProxyPrompts:
        p_t2i, p_i2i, i_ref = data.get("p_t2i"), data.get("p_i2i", ""), data.get("i_ref", [])
        if not isinstance(p_t2i, str) or not p_t2i.strip() or not isinstance(p_i2i, str):
            raise AnswerError("p_t2i must be a text that is not empty, p_i2i a text")
        if not isinstance(i_ref, list) or not all(number in earlier for number in i_ref):
            raise AnswerError(f"i_ref is {i_ref!r}; it must list earlier pictures, of {_numbered(earlier) or 'none'}")
        if bool(p_i2i.strip()) != bool(earlier) or bool(i_ref) != bool(earlier):
            raise AnswerError("p_i2i and i_ref belong to every picture but the first")
        return ProxyPrompts(p_t2i.strip(), p_i2i.strip(), tuple(i_ref))

    return _request_json(model, text, images, read)


def make_prompted_roles(planner: ChatModel, verifier: ChatModel, judges: Sequence[ChatModel] = ()) -> Roles:
    """Returns all roles, implemented by models; the model of the planner is the translator as well."""
    return Roles(
        PromptedPlanner(planner),
        PromptedVerifier(verifier),
        PromptedTranslator(planner),
        tuple(map(PromptedJudge, judges)),
    )


def template(name: str) -> str:
    """Returns the text of a template, with its fields in braces."""
    return resources.files(__package__).joinpath("templates", f"{name}.md").read_text(encoding="utf-8")


def to_transcript(events: Sequence[Event]) -> str:
    """Returns events as text that models read: one paragraph for each event."""
    lines = []
    for event in events:
        if event.turn is None:
            continue
        action = event.turn.action
        what = getattr(action, "prompt", "")
        lines.append(
            f"{action.name}{f' -> picture {event.image_index}' if event.image_index is not None else ''}: {what}".strip(
                " :"
            )
        )
        lines.append(f"  because: {event.turn.reason}")
        lines += [f"  {check.question} {'yes' if check.passed else 'no'} ({check.evidence})" for check in event.checks]
        if event.validation is not None:
            gaps = "; ".join(event.validation.gaps) or "none"
            lines.append(f"  accepted: {event.validation.accepted}; gaps: {gaps}. {event.validation.feedback}".rstrip())
    return "\n".join(lines)


def _request_json(
    model: ChatModel,
    text: str,
    images: Sequence[ImageLike],
    read: Callable[[UncheckedJSON], Read],
    seed: int = 0,
    max_tokens: int = 1024,
) -> Read:
    """Requests a JSON object and parses it; requests it once more if the reply is missing or cannot be parsed.

    Raises: AnswerError if the second reply cannot be parsed; ProviderError.
    """

    def once(text: str, temperature: float, seed: int) -> Read:
        chat = _chat(text, len(images))
        answer = model.chat(ChatRequest(chat, images, max_tokens, temperature, seed, is_json=True)).text
        return read(read_json_object(answer))

    try:
        return once(text, 0.0, seed)
    except AnswerError as error:
        again = f"{text}\nYour last answer could not be used: {error}\n"
        return once(again, 0.7, derive_seed(seed, "again"))


def _chat(text: str, num_images: int) -> list[Message]:
    parts: list[dict[str, str]] = [{"type": "image"} for _ in range(num_images)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def _references(history: History, turn: Turn) -> list[ImageLike]:
    numbers = turn.action.ref_img_list if isinstance(turn.action, ImageEdit) else ()
    return [history.images[number] for number in numbers]


def _on_path(history: History) -> list[Event]:
    return [event for event in history.events if event.image_index is None or event.image_index in history.path]


def _numbered(path: Sequence[int]) -> str:
    return ", ".join(map(str, path))


def _check(question: str, answer: JSON) -> Check:
    said = str(answer.get("answer", "") if isinstance(answer, dict) else answer).strip().lower()
    if said not in ("yes", "no"):
        raise AnswerError(f"the answer to {question!r} is {json.dumps(answer)[:80]}; it must be yes or no")
    return Check(question, said == "yes", str(answer.get("evidence", "")) if isinstance(answer, dict) else "")


def _texts(data: UncheckedJSON, name: str) -> tuple[str, ...]:
    values = data.get(name)
    if not isinstance(values, list) or not all(isinstance(value, str) and value.strip() for value in values):
        raise AnswerError(f"{name} must be a list of texts that are not empty, got {json.dumps(values)[:80]}")
    return tuple(value.strip() for value in values)
