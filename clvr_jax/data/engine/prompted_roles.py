"""The roles of the data engine played by vision-language models, through prompt templates.

The templates are the files beside this one, in `templates/`; their version is recorded with every trajectory. An answer
that cannot be read is asked for once more, with what was wrong with it.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, Literal, TypeVar

from clvr_jax.data.engine.actions import ActionName, ImageEdit, InitialGeneration, Turn
from clvr_jax.data.engine.roles import Check, Event, History, Roles, Validation
from clvr_jax.data.engine.states import StateName
from clvr_jax.data.trajectory_record import ProxyPrompts
from clvr_jax.image_io import ImageLike
from clvr_jax.interfaces import ChatModel, ChatRequest
from clvr_jax.reasoning.actions import IMAGE_GEN, TERMINATE, ParseError, parse, strip_action
from clvr_jax.reasoning.answers import AnswerError, read_json_object
from clvr_jax.reasoning.seeds import derive_seed

TEMPLATES_VERSION = 2
"""Goes up with every change of a template."""

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
class PromptedDirector:
    """Plans and acts. temperature: above 0, so that a turn that failed is not simply said again."""

    model: ChatModel
    temperature: float = 0.7

    def turn(self, history: History, state: StateName, allowed: tuple[ActionName, ...], seed: int) -> str:
        """See `Director`."""
        error = history.events[-1].error if history.events else ""
        text = template("director").format(
            request=history.item.prompt,
            events=told(history.events) or "Nothing yet.",
            pictures=_numbered(history.path) or "there is none yet",
            state=state,
            actions="\n".join(f"- {name}: {_ACTIONS[name]}" for name in allowed),
            complaint=f"Your last answer could not be used: {error}\n" if error else "",
        )
        shown = [history.pictures[number] for number in history.path]
        question = ChatRequest(_chat(text, len(shown)), shown, 1024, self.temperature, seed, is_json=True)
        return self.model.chat(question).text


@dataclass(frozen=True)
class PromptedVerifier:
    """Looks at pictures without having drawn them."""

    model: ChatModel

    def checklist(self, history: History, turn: Turn) -> tuple[str, ...]:
        """See `Verifier`."""
        assert isinstance(turn.action, InitialGeneration | ImageEdit)
        edit = (
            "It is an edit of the pictures you see." if isinstance(turn.action, ImageEdit) else "It is a first drawing."
        )
        text = template("checklist").format(instruction=turn.action.prompt, kind=edit, limit=_MOST_QUESTIONS)

        def read(data: dict[str, Any]) -> tuple[str, ...]:
            questions = _texts(data, "questions")
            if not 1 <= len(questions) <= _MOST_QUESTIONS:
                raise AnswerError(f"{len(questions)} questions; there must be 1 to {_MOST_QUESTIONS}")
            return questions

        return _asked(self.model, text, _references(history, turn), read)

    def check(self, history: History, turn: Turn, questions: tuple[str, ...], picture: ImageLike) -> tuple[Check, ...]:
        """See `Verifier`."""
        before = _references(history, turn)
        shown = f"You see {len(before) + 1} pictures; the last one was made from the others." if before else ""
        numbered = "\n".join(f"{number}. {question}" for number, question in enumerate(questions, start=1))
        text = template("check").format(shown=shown or "You see one picture.", questions=numbered)

        def read(data: dict[str, Any]) -> tuple[Check, ...]:
            answers = data.get("answers")
            if not isinstance(answers, list) or len(answers) != len(questions):
                found = len(answers) if isinstance(answers, list) else "no"
                raise AnswerError(f"{found} answers to {len(questions)} questions")
            return tuple(_check(question, answer) for question, answer in zip(questions, answers, strict=True))

        return _asked(self.model, text, [*before, picture], read)

    def validate(self, history: History) -> Validation:
        """See `Verifier`."""
        text = template("validate").format(request=history.item.prompt, pictures=_numbered(history.path))

        def read(data: dict[str, Any]) -> Validation:
            accepted, back, gaps = data.get("accepted"), data.get("roll_back_to"), _texts(data, "gaps")
            if not isinstance(accepted, bool):
                raise AnswerError(f"accepted must be true or false, got {accepted!r}")
            if accepted and gaps:
                raise AnswerError(f"accepted, but with gaps: {'; '.join(gaps)}")
            if back is not None and (type(back) is not int or back not in history.path):
                raise AnswerError(f"roll_back_to is {back!r}; it must be null or one of {_numbered(history.path)}")
            return Validation(accepted, gaps, str(data.get("feedback", "")), back)

        return _asked(self.model, text, [history.pictures[number] for number in history.path], read)


@dataclass(frozen=True)
class PromptedJudge:
    """Compares two pictures."""

    model: ChatModel

    def prefer(
        self, prompt: str, first: ImageLike, second: ImageLike, seed: int
    ) -> Literal["first", "second", "neither"]:
        """See `Judge`."""

        def read(data: dict[str, Any]) -> Literal["first", "second", "neither"]:
            better = str(data.get("better", "")).strip().lower()
            for choice in ("first", "second", "neither"):
                if better == choice:
                    return choice
            raise AnswerError(f"better is {better!r}; it must be first, second or neither")

        return _asked(self.model, template("judge").format(request=prompt), [first, second], read, seed)


@dataclass(frozen=True)
class PromptedTranslator:
    """Tells what was done as the loop's controller would have, and writes the proxy prompts."""

    model: ChatModel

    def replies(self, history: History, accepted: bool) -> tuple[str, ...]:
        """See `Translator`."""
        count = len(history.path) + 1
        text = template("replies").format(
            request=history.item.prompt,
            events=told(_on_path(history)),
            pictures=_numbered(history.path),
            count=count,
            last=_LAST_TEXT[accepted],
        )

        def read(data: dict[str, Any]) -> tuple[str, ...]:
            texts = _texts(data, "texts")
            if len(texts) != count:
                raise AnswerError(f"{len(texts)} texts; there must be {count}")
            return (*(each + IMAGE_GEN for each in texts[:-1]), texts[-1] + (TERMINATE if accepted else IMAGE_GEN))

        return _asked(self.model, text, [history.pictures[number] for number in history.path], read, max_tokens=4096)

    def verdict(self, history: History, replies: tuple[str, ...]) -> str:
        """See `Translator`."""
        text = template("verdict").format(
            request=history.item.prompt,
            events=told(_on_path(history)),
            replies="\n".join(map(strip_action, replies)),
            pictures=_numbered(history.path),
        )

        def read(data: dict[str, Any]) -> str:
            (said,) = _texts({"text": [data.get("text")]}, "text")
            try:
                unmet = parse(said + IMAGE_GEN, has_image=True).unmet
            except ParseError as error:
                raise AnswerError(str(error)) from error
            return said + (IMAGE_GEN if unmet else TERMINATE)

        return _asked(self.model, text, [history.pictures[number] for number in history.path], read)

    def proxies(self, history: History) -> tuple[ProxyPrompts, ...]:
        """See `Translator`; one call for each picture."""
        return tuple(self._proxy(history, place) for place in range(len(history.path)))

    def _proxy(self, history: History, place: int) -> ProxyPrompts:
        known = history.path[: place + 1]
        events = [event for event in _on_path(history) if event.picture is None or event.picture in known]
        shown = [history.pictures[number] for number in known]
        found = distilled(self.model, history.item.prompt, told(events), known[:-1], shown)
        return replace(found, i_ref=tuple(history.path.index(number) for number in found.i_ref))


def distilled(
    model: ChatModel, request: str, story: str, earlier: Sequence[int], pictures: Sequence[ImageLike]
) -> ProxyPrompts:
    """The proxy prompts of one step of a trajectory.

    Args:
      model: that writes them.
      request: what the trajectory is for.
      story: what was said and done up to the step.
      earlier: numbers of the pictures before the step, by which the story calls them and `i_ref` may.
      pictures: that the model sees.
    Raises: AnswerError if it cannot be read, twice; ProviderError.
    """
    text = template("proxies").format(request=request, events=story)

    def read(data: dict[str, Any]) -> ProxyPrompts:
        p_t2i, p_i2i, i_ref = data.get("p_t2i"), data.get("p_i2i", ""), data.get("i_ref", [])
        if not isinstance(p_t2i, str) or not p_t2i.strip() or not isinstance(p_i2i, str):
            raise AnswerError("p_t2i must be a text that is not empty, p_i2i a text")
        if not isinstance(i_ref, list) or not all(number in earlier for number in i_ref):
            raise AnswerError(f"i_ref is {i_ref!r}; it must list earlier pictures, of {_numbered(earlier) or 'none'}")
        if bool(p_i2i.strip()) != bool(earlier) or bool(i_ref) != bool(earlier):
            raise AnswerError("p_i2i and i_ref belong to every picture but the first")
        return ProxyPrompts(p_t2i.strip(), p_i2i.strip(), tuple(i_ref))

    return _asked(model, text, pictures, read)


def prompted_crew(director: ChatModel, verifier: ChatModel, judges: Sequence[ChatModel] = ()) -> Roles:
    """All roles by models; the director tells at the end what was done."""
    return Roles(
        PromptedDirector(director),
        PromptedVerifier(verifier),
        PromptedTranslator(director),
        tuple(map(PromptedJudge, judges)),
    )


def template(name: str) -> str:
    """The text of a template, with its fields in braces."""
    return resources.files(__package__).joinpath("templates", f"{name}.md").read_text(encoding="utf-8")


def told(events: Sequence[Event]) -> str:
    """What happened, for models to read: one paragraph for each event."""
    lines = []
    for event in events:
        if event.turn is None:
            continue
        action = event.turn.action
        what = getattr(action, "prompt", "")
        lines.append(
            f"{action.name}{f' -> picture {event.picture}' if event.picture is not None else ''}: {what}".strip(" :")
        )
        lines.append(f"  because: {event.turn.reason}")
        lines += [f"  {check.question} {'yes' if check.passed else 'no'} ({check.evidence})" for check in event.checks]
        if event.validation is not None:
            gaps = "; ".join(event.validation.gaps) or "none"
            lines.append(f"  accepted: {event.validation.accepted}; gaps: {gaps}. {event.validation.feedback}".rstrip())
    return "\n".join(lines)


def _asked(
    model: ChatModel,
    text: str,
    pictures: Sequence[ImageLike],
    read: Callable[[dict[str, Any]], Read],
    seed: int = 0,
    max_tokens: int = 1024,
) -> Read:
    """Asks, reads, and asks once more if there was no reply or it could not be read.

    Raises: AnswerError if it still cannot be read; ProviderError.
    """

    def once(text: str, temperature: float, seed: int) -> Read:
        chat = _chat(text, len(pictures))
        answer = model.chat(ChatRequest(chat, pictures, max_tokens, temperature, seed, is_json=True)).text
        return read(read_json_object(answer))

    try:
        return once(text, 0.0, seed)
    except AnswerError as error:
        again = f"{text}\nYour last answer could not be used: {error}\n"
        return once(again, 0.7, derive_seed(seed, "again"))


def _chat(text: str, pictures: int) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image"} for _ in range(pictures)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def _references(history: History, turn: Turn) -> list[ImageLike]:
    numbers = turn.action.ref_img_list if isinstance(turn.action, ImageEdit) else ()
    return [history.pictures[number] for number in numbers]


def _on_path(history: History) -> list[Event]:
    return [event for event in history.events if event.picture is None or event.picture in history.path]


def _numbered(path: Sequence[int]) -> str:
    return ", ".join(map(str, path))


def _check(question: str, answer: Any) -> Check:
    said = str(answer.get("answer", "") if isinstance(answer, dict) else answer).strip().lower()
    if said not in ("yes", "no"):
        raise AnswerError(f"the answer to {question!r} is {json.dumps(answer)[:80]}; it must be yes or no")
    return Check(question, said == "yes", str(answer.get("evidence", "")) if isinstance(answer, dict) else "")


def _texts(data: dict[str, Any], name: str) -> tuple[str, ...]:
    values = data.get(name)
    if not isinstance(values, list) or not all(isinstance(value, str) and value.strip() for value in values):
        raise AnswerError(f"{name} must be a list of texts that are not empty, got {json.dumps(values)[:80]}")
    return tuple(value.strip() for value in values)
