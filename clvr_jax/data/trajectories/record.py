"""Records of trajectory datasets, and their conversion to and from TFDS features.

Source of the content: arXiv 2605.14876, trajectory synthesis (checklists) and Proxy Prompt RL (proxy prompts).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clvr_jax.errors import ClvrError
from clvr_jax.files.image_io import ImageLike, encode_png, lazy_image
from clvr_jax.files.json_input import JSON, JsonObject, UncheckedJSON, parse_json, parse_object
from clvr_jax.reasoning.trajectories.trajectory import Step, Trajectory, verdict_from_json
from clvr_jax.reasoning.trajectories.trajectory_files import run_from_json, step_run_from_json
from clvr_jax.training_packages import training_package

SCHEMA = "1.1.0"
"""Version of the features below and of TFDS datasets with them; it increases with each change."""

READABLE_SCHEMAS = ("1.0.0", SCHEMA)
"""Versions that this module reads. In 1.0.0 no image is marked as wrong: all are right and may be targets."""


@dataclass(frozen=True)
class ProxyPrompts:
    """Short texts for reward models in place of the long history of a step.

    Attributes:
      p_t2i: description of the whole image after the step; not empty.
      p_i2i: edit instruction of the step, "" for a first image.
      i_ref: indices of the earlier steps whose images are edited, () for a first image.
    Raises: ClvrError if p_t2i is empty, or only one of p_i2i and i_ref is.
    """

    p_t2i: str
    p_i2i: str = ""
    i_ref: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.p_t2i:
            raise ClvrError("proxy prompts: p_t2i is empty; leave the proxies of a step out as None")
        if bool(self.p_i2i) != bool(self.i_ref):
            raise ClvrError(f"proxy prompts: p_i2i and i_ref go together, got {self.p_i2i!r} and {self.i_ref}")


@dataclass(frozen=True)
class TrajectoryRecord:
    """A trajectory with its metadata.

    Attributes:
      id: name of the record for users; uniqueness is not checked.
      trajectory: the trajectory.
      metadata: metadata of the prompt in types of JSON, for example the specification of a right image.
      checklists: for each step the checklist of its image in types of JSON, or None; () if no step has one. The data
        engine writes [question, evidence, whether it passed] for each question; a pair without the last value passed.
      proxies: for each step its proxy prompts, or None; () if no step has them.
      mistakes: indices of the steps whose image is wrong: context of later steps, never a target of an image generator.
      is_verification: the record is a verification example: a history, its latest image, and the verdict on that image,
        which is the only target. None of its images is a target.
    Raises: ClvrError for fields that do not fit together.
    """

    id: str
    trajectory: Trajectory
    metadata: UncheckedJSON = field(default_factory=dict)
    checklists: tuple[JSON, ...] = ()
    proxies: tuple[ProxyPrompts | None, ...] = ()
    mistakes: tuple[int, ...] = ()
    is_verification: bool = False

    def __post_init__(self) -> None:
        steps = self.trajectory.steps
        if self.trajectory.given_images:
            raise ClvrError(f"trajectory {self.id}: starts from images of the user, which records cannot store")
        for name, given in (("checklists", self.checklists), ("proxies", self.proxies)):
            if given and len(given) != len(steps):
                raise ClvrError(f"trajectory {self.id}: {len(steps)} steps but {len(given)} {name}")
        for number, proxy in enumerate(self.proxies):
            for reference in () if proxy is None else proxy.i_ref:
                if not 0 <= reference < number or steps[reference].image is None:
                    raise ClvrError(
                        f"trajectory {self.id}: i_ref of step {number} is {reference}, which is no earlier image"
                    )
        for number in self.mistakes:
            if not 0 <= number < len(steps) or steps[number].image is None:
                raise ClvrError(f"trajectory {self.id}: mistakes has step {number}, which has no image")
        if self.is_verification and not (steps and steps[-1].image is not None and steps[-1].verdict):
            raise ClvrError(f"trajectory {self.id}: a verification example ends with an image and the verdict on it")

    @property
    def generator_targets(self) -> tuple[int, ...]:
        """Indices of the steps whose image may be a target of an image generator: right and not rolled back.

        All training of image generators on recorded images takes its targets from here.
        """
        if self.is_verification:
            return ()
        steps = enumerate(self.trajectory.steps)
        return tuple(
            number
            for number, step in steps
            if step.image is not None and not step.rolled_back and number not in self.mistakes
        )


def record_features() -> Any:
    """Returns the TFDS features of a record.

    Values without a fixed shape are JSON, and so are lists of numbers: without TensorFlow, TFDS cannot write nested
      lists.
    """
    tfds = training_package("tensorflow_datasets")

    text = tfds.features.Text()
    return tfds.features.FeaturesDict(
        {
            "id": text,
            "prompt": text,
            "metadata": text,
            "outcome": text,
            "run": text,  # model, seed, versions, seconds, error, is_verification
            "steps": tfds.features.Sequence(
                {
                    "reasoning": text,
                    "action": text,
                    "references": text,
                    "image": tfds.features.Tensor(shape=(), dtype=np.str_),  # an RGB PNG file, "" for none
                    "verdict": text,
                    "checklist": text,
                    "p_t2i": text,
                    "p_i2i": text,
                    "i_ref": text,
                    "run": text,  # nfe, seconds, rolled_back, attempts, redraw, seed, is_mistake
                }
            ),
        }
    )


def record_to_example(record: TrajectoryRecord) -> dict[str, bytes | list[dict[str, bytes]]]:
    """Converts a record to the values of `record_features`, bytes each."""
    trajectory = record.trajectory
    run = {name: getattr(trajectory, name) for name in ("model", "seed", "seconds", "error")}
    nothing = (None,) * len(trajectory.steps)
    return {
        "id": _text(record.id),
        "prompt": _text(trajectory.prompt),
        "metadata": _json(dict(record.metadata)),
        "outcome": _text(trajectory.outcome),
        "run": _json({**run, "versions": dict(trajectory.versions), "is_verification": record.is_verification}),
        "steps": [
            _step_to_example(*entry, is_mistake=number in record.mistakes)
            for number, entry in enumerate(
                zip(trajectory.steps, record.checklists or nothing, record.proxies or nothing, strict=True)
            )
        ],
    }


def record_from_example(example: Mapping[str, Any]) -> TrajectoryRecord:
    """Inverts `record_to_example`, for features as TFDS reads them, where the sequence of steps is a dict of lists.

    Images are PIL images whose size is known and whose pixels are decoded at the first access.
    Raises: KeyError, ValueError, TypeError, OSError or ClvrError if the example has other features.
    """
    columns = example["steps"]
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    checklists = tuple(parse_json(row["checklist"], "checklist") for row in rows)
    proxies = tuple(_proxy_from_example(row) for row in rows)
    run = parse_object(example["run"], "run")
    step_runs = [parse_object(row["run"], f"run of step {number}") for number, row in enumerate(rows)]
    # Datasets of schema 1.0.0 have neither.
    is_verification = run.boolean("is_verification", False)
    mistakes = tuple(number for number, step in enumerate(step_runs) if step.boolean("is_mistake", False))
    trajectory = Trajectory(
        prompt=_str(example["prompt"]),
        steps=tuple(map(_step_from_example, rows, step_runs)),
        outcome=_str(example["outcome"]),
        **run_from_json(run),
    )
    return TrajectoryRecord(
        _str(example["id"]),
        trajectory,
        parse_object(example["metadata"], "metadata").content,
        checklists if any(checklist is not None for checklist in checklists) else (),
        proxies if any(proxies) else (),
        mistakes,
        is_verification,
    )


def _step_to_example(step: Step, checklist: JSON, proxy: ProxyPrompts | None, is_mistake: bool) -> dict[str, bytes]:
    verdict = step.verdict
    run = {name: getattr(step, name) for name in ("nfe", "seconds", "rolled_back", "attempts", "redraw", "seed")}
    run["is_mistake"] = is_mistake
    return {
        "reasoning": _text(step.reasoning),
        "action": _text(step.action),
        "references": _json(step.references),
        "image": b"" if step.image is None else encode_png(step.image),
        "verdict": _json(None if verdict is None else {"unmet": verdict.unmet, "reasoning": verdict.reasoning}),
        "checklist": _json(checklist),
        "p_t2i": _text(proxy.p_t2i if proxy else ""),
        "p_i2i": _text(proxy.p_i2i if proxy else ""),
        "i_ref": _json(proxy.i_ref if proxy else ()),
        "run": _json(run),
    }


def _step_from_example(row: Mapping[str, bytes], run: JsonObject) -> Step:
    verdict = JsonObject({"verdict": parse_json(row["verdict"], run.where)}, run.where)
    found = verdict.optional("verdict", verdict.nested)
    return Step(
        reasoning=_str(row["reasoning"]),
        action=_str(row["action"]),
        references=_integers(row["references"], run.where),
        image=_image(row["image"]),
        verdict=None if found is None else verdict_from_json(found),
        **step_run_from_json(run),
    )


def _proxy_from_example(row: Mapping[str, bytes]) -> ProxyPrompts | None:
    if not row["p_t2i"]:
        return None
    return ProxyPrompts(_str(row["p_t2i"]), _str(row["p_i2i"]), _integers(row["i_ref"], "i_ref"))


def _image(png: bytes) -> ImageLike | None:
    return lazy_image(png) if png else None


def _integers(text: bytes, where: str) -> tuple[int, ...]:
    return JsonObject({"references": parse_json(text, where)}, where).integers("references")


def _json(content: JSON) -> bytes:
    return json.dumps(content).encode()


# A prompt from the command line may have lone surrogates, for bytes that are not UTF-8.
def _text(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _str(content: bytes) -> str:
    return content.decode("utf-8", "surrogatepass")
