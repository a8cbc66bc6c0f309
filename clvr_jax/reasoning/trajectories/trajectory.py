"""Trajectories of the closed loop: steps with reasoning, images and verifications, and the outcome.

A saved trajectory is a directory with `trajectory.json`, `step_00.png` ... and an `index.html` that shows it without a
server.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np

from clvr_jax.errors import ClvrError
from clvr_jax.files.file_names import is_regular_file, shown_path
from clvr_jax.files.image_io import ImageLike, encode_png, read_image
from clvr_jax.files.json_input import JSON, JsonObject, read_object
from clvr_jax.reasoning.conversation.actions import ACTIONS, SYSTEM_PROMPT_VERSION, TERMINATE
from clvr_jax.reasoning.trajectories.edits import Edit, Parent, dropped_by_user
from clvr_jax.reasoning.trajectories.trajectory_files import run_from_json, step_run_from_json, write_directory
from clvr_jax.reasoning.verification.verification import Verification

FORMAT = 1
ACCEPTED = "accepted"
GAVE_UP = "gave up"
STEP_LIMIT = "step limit"
NFE_LIMIT = "nfe limit"
TIME_LIMIT = "time limit"
UNPARSEABLE = "unparseable"
UNVERIFIED = "unverified"
STOPPED = "stopped"
CANCELED = "canceled"
OUTCOMES = (ACCEPTED, GAVE_UP, STEP_LIMIT, NFE_LIMIT, TIME_LIMIT, UNPARSEABLE, UNVERIFIED, STOPPED, CANCELED)


@dataclass(frozen=True)
class Verdict:
    """The controller's judgment of one image: the unmet items, () if there are none, and the reasoning."""

    unmet: tuple[str, ...]
    reasoning: str = ""

    @property
    def score(self) -> int:
        """Number of unmet items; fewer is better."""
        return len(self.unmet)


@dataclass(frozen=True)
class Step:
    """One action of the controller: an image generation, or the decision to stop (then `image` is None).

    Attributes:
      reasoning: what the controller wrote before its action.
      action: actions.IMAGE_GEN or actions.TERMINATE.
      references: the steps whose images were references of the generation, in order.
      image: the generated image.
      verdict: the controller's own judgment of that image, from its next reply; None without one.
      nfe: forward passes of the diffusion network.
      seconds: wall time of the calls that led here, each divided by the number of prompts it served.
      rolled_back: whether the image was dropped from the history, because it was worse than an earlier one, because
        another candidate of the step was better, or by the user.
      attempts: replies requested until one could be parsed; 1 if the first could, 0 if the user wrote the instruction.
      redraw: how many images had been generated from the same reply and history before.
      seed: seed of the generation; None for a stop.
      verification: the verifier's result for the image, requirement by requirement; None without a verifier.
      left_out: number of the oldest replies that did not fit into the generator's text length. The prompt, the images
        and the reply of this step are never left out.
    """

    reasoning: str
    action: str
    references: tuple[int, ...] = ()
    image: ImageLike | None = field(default=None, repr=False, compare=False)
    verdict: Verdict | None = None
    nfe: int = 0
    seconds: float = 0.0
    rolled_back: bool = False
    attempts: int = 1
    redraw: int = 0
    seed: int | None = None
    verification: Verification | None = None
    left_out: int = 0

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ClvrError(f"step: action must be one of {', '.join(ACTIONS)}, got {self.action!r}")
        if (self.image is None) != (self.action == TERMINATE):
            raise ClvrError(f"step: {self.action} {'without' if self.image is None else 'with'} an image")

    @property
    def unmet(self) -> tuple[str, ...] | None:
        """The unmet requirements by the verification, else by the controller's verdict; None without either."""
        if self.verification is not None:
            return self.verification.unmet
        return None if self.verdict is None else self.verdict.unmet

    @property
    def is_accepted(self) -> bool:
        """Whether a verification accepted the image."""
        return self.verification is not None and self.verification.accepted is True

    @property
    def score(self) -> float | None:
        """The quality of the image, higher is better; None if the image was not judged.

        It is the expected number of met requirements by the verification, else minus the number of unmet items.
        """
        if self.verification is not None:
            return self.verification.score
        return None if self.verdict is None else -float(self.verdict.score)


@dataclass(frozen=True)
class Trajectory:
    """All steps of the loop for one prompt.

    Attributes:
      prompt: the user's request.
      steps: all steps in the order they happened, rolled-back ones included.
      outcome: one of OUTCOMES. Only ACCEPTED means that a verification found everything met; UNVERIFIED that the
        controller stopped and nothing was verified. STOPPED and CANCELED: the user ended the loop, to take the best
        image so far or none.
      model: the model that generated the images.
      seed: the seed of the run.
      versions: package versions and the like.
      seconds: wall time of all calls for this prompt, each divided by the number of prompts it served.
      error: for UNPARSEABLE, what was wrong with the last reply.
      given_images: the user's own images, references of every step before those that it names.
      edits: what the user changed while the loop ran, in order.
      parent: the loop that this one branched off from; None if it began with the prompt.
    """

    prompt: str
    steps: tuple[Step, ...]
    outcome: str
    model: str = ""
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None
    given_images: tuple[ImageLike, ...] = field(default=(), repr=False, compare=False)
    edits: tuple[Edit, ...] = ()
    parent: Parent | None = None

    def __post_init__(self) -> None:
        if self.outcome not in OUTCOMES:
            raise ClvrError(f"trajectory: outcome must be one of {', '.join(OUTCOMES)}, got {self.outcome!r}")
        for number, step in enumerate(self.steps):
            for reference in step.references:
                if not 0 <= reference < number or self.steps[reference].image is None:
                    raise ClvrError(f"trajectory: step {number} refers to step {reference}, which is no earlier image")

    @property
    def best(self) -> int | None:
        """Index of the step whose image is the result; None if there is no image."""
        return result_step(self.steps, self.edits, self.parent)

    @property
    def image(self) -> ImageLike | None:
        """The result: the image of step `best`."""
        return None if self.best is None else self.steps[self.best].image

    @property
    def verdict(self) -> Verdict | None:
        """The verdict on the result."""
        return None if self.best is None else self.steps[self.best].verdict

    @property
    def verification(self) -> Verification | None:
        """The verification of the result."""
        return None if self.best is None else self.steps[self.best].verification

    @property
    def unmet(self) -> tuple[str, ...] | None:
        """The unmet requirements of the result; None if it was not judged."""
        return None if self.best is None else self.steps[self.best].unmet

    @property
    def nfe(self) -> int:
        """Network evaluations (NFE) of all steps."""
        return sum(step.nfe for step in self.steps)

    @property
    def generated(self) -> tuple[Step, ...]:
        """The steps that generated an image."""
        return tuple(step for step in self.steps if step.image is not None)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Writes the trajectory to a directory, completely or not at all.

        All files are written to a hidden temporary directory first. A new directory is then renamed. In an existing one
        `trajectory.json` is removed first and written last, so that a killed save leaves a whole trajectory or none.
        Files that are not part of a trajectory are kept.

        Raises: ClvrError, one line, if the directory cannot be written; nothing is left behind then.
        """
        directory = Path(directory)
        write_directory(directory, self.files())
        return directory

    def files(self) -> dict[str, bytes]:
        """Returns the files of a saved trajectory by name; `trajectory.json` is the last."""
        from clvr_jax.reasoning.trajectories.page import render

        files = {
            name: encode_png(step.image)
            for name, step in zip(_image_names(self.steps), self.steps, strict=True)
            if name is not None and step.image is not None
        }
        files |= {
            name: encode_png(image)
            for name, image in zip(_given_names(len(self.given_images)), self.given_images, strict=True)
        }
        files["index.html"] = render(self).encode("utf-8", "replace")
        # A prompt from the command line may hold bytes that are no UTF-8 (lone surrogates); the backslash form is
        # JSON's own.
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        return {**files, "trajectory.json": text.encode("utf-8", "backslashreplace")}

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Trajectory:
        """Reads a saved trajectory; images are uint8 arrays. Raises: ClvrError if a file is missing or malformed."""
        path = Path(directory) / "trajectory.json"
        if not is_regular_file(path):
            raise ClvrError(
                f"{shown_path(directory)}: no trajectory.json here; not a trajectory, or one whose saving was cut short"
            )
        entry = read_object(path)
        if entry.content.get("format") != FORMAT:
            raise ClvrError(f"{path}: not a trajectory of format {FORMAT}")
        steps = tuple(_step_from_json(step, path.parent) for step in entry.objects("steps"))
        try:
            given = tuple(read_image(path.parent / name) for name in _given_from_json(entry))
            # Trajectories of earlier versions have neither "edits" nor "parent".
            edits = tuple(map(Edit.from_json, entry.objects("edits"))) if "edits" in entry.content else ()
            parent = entry.optional("parent", entry.nested) if "parent" in entry.content else None
            return cls(
                entry.text("prompt"),
                steps,
                entry.text("outcome"),
                **run_from_json(entry),
                given_images=given,
                edits=edits,
                parent=None if parent is None else Parent.from_json(parent),
            )
        except ClvrError as error:
            raise error if str(error).startswith(str(path)) else ClvrError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, JSON]:
        """Returns the content of trajectory.json; images are file names."""
        names = _image_names(self.steps)
        return {
            "format": FORMAT,
            "prompt": self.prompt,
            "outcome": self.outcome,
            "error": self.error,
            "image": None if self.best is None else names[self.best],
            "best": self.best,
            "nfe": self.nfe,
            "seconds": round(self.seconds, 4),
            "model": self.model,
            "seed": self.seed,
            "versions": dict(self.versions),
            "given_images": _given_names(len(self.given_images)),
            "edits": [edit.to_dict() for edit in self.edits],
            "parent": None if self.parent is None else asdict(self.parent),
            "steps": [step_to_dict(step, name) for step, name in zip(self.steps, names, strict=True)],
        }


def best_step(steps: Sequence[Step], excluded: Collection[int] = ()) -> int | None:
    """Returns the index of the step with the best image, the latest among equals.

    An accepted image is better than all others, since an expected number of met requirements (`Step.score`) may be
    higher where one of them is not met.

    Args:
      steps: of a loop.
      excluded: numbers of steps that are not considered.
    Returns: the latest image if no image was judged; None if there is no image.
    """
    generated = [
        (number, step) for number, step in enumerate(steps) if step.image is not None and number not in excluded
    ]
    judged = [(step.is_accepted, step.score, number) for number, step in generated if step.score is not None]
    if judged:
        return max(judged)[-1]
    return generated[-1][0] if generated else None


def result_step(steps: Sequence[Step], edits: Sequence[Edit] = (), parent: Parent | None = None) -> int | None:
    """Returns the index of the step whose image is the result of a loop: the best one, see `best_step`.

    Images that the user rolled back are no result, and those of a parent only while there is no other.
    """
    dropped = dropped_by_user(edits)
    own = best_step(steps, dropped.union(range(parent.inherited if parent else 0)))
    return best_step(steps, dropped) if own is None else own


def package_versions(*packages: str) -> dict[str, str]:
    """Versions to record with a result: clvr-jax, Python, numpy, the prompt contract, and the given packages."""
    versions = {"python": platform.python_version(), "numpy": np.__version__, "contract": str(SYSTEM_PROMPT_VERSION)}
    for package in ("clvr-jax", *packages):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _image_names(steps: Sequence[Step]) -> list[str | None]:
    return [None if step.image is None else f"step_{number:02d}.png" for number, step in enumerate(steps)]


def _given_names(count: int) -> list[str]:
    return [f"given_{number:02d}.png" for number in range(count)]


def _given_from_json(entry: JsonObject) -> tuple[str, ...]:
    """File names of the user's own images; trajectories of earlier versions have none."""
    names = entry.texts("given_images") if "given_images" in entry.content else ()
    if names != tuple(_given_names(len(names))):
        raise ClvrError(f"{entry.where}: given_images must be named given_00.png, given_01.png and so on")
    return names


def step_to_dict(step: Step, image_name: str | None) -> dict[str, JSON]:
    """Returns a step as in trajectory.json, with the file name of its image."""
    verdict = step.verdict
    return {
        "reasoning": step.reasoning,
        "action": step.action,
        "references": list(step.references),
        "image": image_name,
        "verdict": None if verdict is None else {"unmet": list(verdict.unmet), "reasoning": verdict.reasoning},
        "verification": None if step.verification is None else step.verification.to_dict(),
        "nfe": step.nfe,
        "seconds": round(step.seconds, 4),
        "rolled_back": step.rolled_back,
        "attempts": step.attempts,
        "redraw": step.redraw,
        "seed": step.seed,
        "left_out": step.left_out,
    }


def verdict_from_json(entry: JsonObject) -> Verdict:
    """A verdict, checked. Raises: ClvrError for another type."""
    return Verdict(entry.texts("unmet"), entry.text("reasoning"))


def _step_from_json(entry: JsonObject, directory: Path) -> Step:
    name = entry.optional("image", entry.text)
    if name is not None and not re.fullmatch(r"step_\d{1,9}\.png", name):
        raise ClvrError(f"{entry.where}: an image must be named step_<number>.png, got {name!r:.80}")
    verdict = entry.optional("verdict", entry.nested)
    # Trajectories of earlier versions have neither "verification" nor "left_out".
    checked = entry.optional("verification", entry.nested) if "verification" in entry.content else None
    try:
        return Step(
            reasoning=entry.text("reasoning"),
            action=entry.text("action"),
            references=entry.integers("references"),
            image=None if name is None else read_image(directory / name),
            verdict=None if verdict is None else verdict_from_json(verdict),
            verification=None if checked is None else Verification.from_dict(checked.content),
            left_out=entry.integer("left_out", 0, low=0),
            **step_run_from_json(entry),
        )
    except ClvrError as error:
        raise error if str(error).startswith(str(directory)) else ClvrError(f"{entry.where}: {error}") from error
