"""The actions of the planner of the data engine, and the parser of its turns.

A turn is one JSON object: what the planner perceives, why it acts, and one action with its parameters.

    {"perceive": "...", "reason": "...", "action": "IMAGE_EDIT", "parameters": {"prompt": "...", "ref_img_list": [0]}}

Source of the toolkit: arXiv 2605.14876, trajectory synthesis.
"""

from dataclasses import dataclass
from typing import Literal

from clvr_jax.files.json_input import JSON, UncheckedJSON
from clvr_jax.interfaces.answers import AnswerError, read_json_object

ActionName = Literal["INITIAL_GENERATION", "IMAGE_EDIT", "RESULT_VALIDATION", "END_TRAJECTORY"]
ACTIONS: tuple[ActionName, ...] = ("INITIAL_GENERATION", "IMAGE_EDIT", "RESULT_VALIDATION", "END_TRAJECTORY")
_LONGEST_PROMPT = 8000


@dataclass(frozen=True)
class InitialGeneration:
    """Generates a first image from text."""

    prompt: str
    name: ActionName = "INITIAL_GENERATION"


@dataclass(frozen=True)
class ImageEdit:
    """Generates the next image from earlier ones.

    Attributes:
      prompt: the edit instruction.
      ref_img_list: numbers of the reference images, from 0, in the order in which they are given.
    """

    prompt: str
    ref_img_list: tuple[int, ...]
    name: ActionName = "IMAGE_EDIT"


@dataclass(frozen=True)
class ResultValidation:
    """Asks for a validation of the latest image against the request."""

    name: ActionName = "RESULT_VALIDATION"


@dataclass(frozen=True)
class EndTrajectory:
    """Ends the trajectory with the latest image as the result."""

    name: ActionName = "END_TRAJECTORY"


Action = InitialGeneration | ImageEdit | ResultValidation | EndTrajectory


@dataclass(frozen=True)
class Turn:
    """A turn of the planner: PERCEIVE, REASON, ACT.

    Attributes:
      perceive: a comparison of the latest image with the request.
      reason: why the planner chose this action.
      action: the action and its parameters.
    """

    perceive: str
    reason: str
    action: Action


def read_turn(text: str, allowed: tuple[ActionName, ...], num_images: int) -> Turn:
    """Parses a turn.

    Args:
      text: the model's reply; a code fence around the object and words before and after it are ignored.
      allowed: actions of the current state.
      num_images: number of images that may be references.
    Raises: AnswerError if there is no object, the action is not allowed, or its parameters are invalid. Its message is
      sent back to the model.
    """
    data = read_json_object(text)
    perceive, reason = (_text(data, name) for name in ("perceive", "reason"))
    name = data.get("action")
    if name not in allowed:
        raise AnswerError(f"action is {name!r}; now it must be one of {', '.join(allowed)}")
    parameters = data.get("parameters", {})
    if not isinstance(parameters, dict):
        raise AnswerError(f"parameters must be an object, got {type(parameters).__name__}")
    return Turn(perceive, reason, _action(name, parameters, num_images))


def to_json(turn: Turn) -> dict[str, JSON]:
    """Returns a turn as the JSON object that the model writes, for the log of a trajectory."""
    parameters: UncheckedJSON = {}
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


def _action(name: ActionName, parameters: UncheckedJSON, num_images: int) -> Action:
    """Parses an action. The words of its errors are read by models and must not change."""
    known = {"INITIAL_GENERATION": {"prompt"}, "IMAGE_EDIT": {"prompt", "ref_img_list"}}.get(name, set())
    if unexpected := sorted(parameters.keys() - known):
        takes = f"takes {', '.join(sorted(known))}" if known else "takes no parameters"
        raise AnswerError(f"{name} {takes}, got also {', '.join(unexpected)}")
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
    if len(set(references)) != len(references) or not all(0 <= number < num_images for number in references):
        raise AnswerError(f"ref_img_list is {references}; it must name different pictures of 0..{num_images - 1}")
    return ImageEdit(prompt, tuple(references))


def _text(data: UncheckedJSON, name: str) -> str:
    value = data.get(name)
    if not isinstance(value, str) or not value.strip():
        raise AnswerError(f"{name} must be a text that is not empty, got {value!r}")
    return value.strip()
