"""What the controller of the data engine may do, and how its turn is read.

A turn is one JSON object: what it perceives, why it acts, and one action with its parameters.

    {"perceive": "...", "reason": "...", "action": "IMAGE_EDIT", "parameters": {"prompt": "...", "ref_img_list": [0]}}

Source of the toolkit: arXiv 2605.14876, trajectory synthesis.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from clvr_jax.reasoning.answers import AnswerError, read_json_object

ActionName = Literal["INITIAL_GENERATION", "IMAGE_EDIT", "RESULT_VALIDATION", "END_TRAJECTORY"]
ACTIONS: tuple[ActionName, ...] = ("INITIAL_GENERATION", "IMAGE_EDIT", "RESULT_VALIDATION", "END_TRAJECTORY")
_LONGEST_PROMPT = 8000


@dataclass(frozen=True)
class InitialGeneration:
    """Draw a first picture from words."""

    prompt: str
    name: ActionName = "INITIAL_GENERATION"


@dataclass(frozen=True)
class ImageEdit:
    """Draw the next picture from earlier ones. ref_img_list: their numbers, from 0, in the order they are shown."""

    prompt: str
    ref_img_list: tuple[int, ...]
    name: ActionName = "IMAGE_EDIT"


@dataclass(frozen=True)
class ResultValidation:
    """Have the latest picture checked against the request."""

    name: ActionName = "RESULT_VALIDATION"


@dataclass(frozen=True)
class EndTrajectory:
    """The latest picture is the result."""

    name: ActionName = "END_TRAJECTORY"


Action = InitialGeneration | ImageEdit | ResultValidation | EndTrajectory


@dataclass(frozen=True)
class Turn:
    """PERCEIVE, REASON, ACT. perceive: what is there, against what is wanted. reason: why this action."""

    perceive: str
    reason: str
    action: Action


def read_turn(text: str, allowed: tuple[ActionName, ...], pictures: int) -> Turn:
    """Reads a turn.

    Args:
      text: the model's answer; a code fence around the object, or words before and after it, are put up with.
      allowed: actions of the state it is in.
      pictures: how many there are to refer to.
    Raises: AnswerError for no object, another action than those allowed, or parameters that make no sense.
    """
    data = read_json_object(text)
    perceive, reason = (_text(data, name) for name in ("perceive", "reason"))
    name = data.get("action")
    if name not in allowed:
        raise AnswerError(f"action is {name!r}; now it must be one of {', '.join(allowed)}")
    parameters = data.get("parameters", {})
    if not isinstance(parameters, dict):
        raise AnswerError(f"parameters must be an object, got {type(parameters).__name__}")
    return Turn(perceive, reason, _action(name, parameters, pictures))


def to_json(turn: Turn) -> dict[str, Any]:
    """A turn as the model would have written it, for the log that is kept with a trajectory."""
    parameters: Mapping[str, Any] = {}
    if isinstance(turn.action, InitialGeneration):
        parameters = {"prompt": turn.action.prompt}
    elif isinstance(turn.action, ImageEdit):
        parameters = {"prompt": turn.action.prompt, "ref_img_list": list(turn.action.ref_img_list)}
    return {
        "perceive": turn.perceive,
        "reason": turn.reason,
        "action": turn.action.name,
        "parameters": dict(parameters),
    }


def _action(name: ActionName, parameters: Mapping[str, Any], pictures: int) -> Action:
    known = {"INITIAL_GENERATION": {"prompt"}, "IMAGE_EDIT": {"prompt", "ref_img_list"}}.get(name, set())
    if surplus := sorted(parameters.keys() - known):
        takes = f"takes {', '.join(sorted(known))}" if known else "takes no parameters"
        raise AnswerError(f"{name} {takes}, got also {', '.join(surplus)}")
    if name == "RESULT_VALIDATION":
        return ResultValidation()
    if name == "END_TRAJECTORY":
        return EndTrajectory()
    prompt = _text(parameters, "prompt")
    if len(prompt) > _LONGEST_PROMPT:
        raise AnswerError(f"the prompt has {len(prompt)} characters; at most {_LONGEST_PROMPT}")
    if name == "INITIAL_GENERATION":
        return InitialGeneration(prompt)
    references = parameters.get("ref_img_list")
    is_list = isinstance(references, list) and all(type(number) is int for number in references)
    if not is_list or not references:
        raise AnswerError(f"ref_img_list must be a list of picture numbers, not empty, got {references!r}")
    if len(set(references)) != len(references) or not all(0 <= number < pictures for number in references):
        raise AnswerError(f"ref_img_list is {references}; it must name different pictures of 0..{pictures - 1}")
    return ImageEdit(prompt, tuple(references))


def _text(data: Mapping[str, Any], name: str) -> str:
    value = data.get(name)
    if not isinstance(value, str) or not value.strip():
        raise AnswerError(f"{name} must be a text that is not empty, got {value!r}")
    return value.strip()
