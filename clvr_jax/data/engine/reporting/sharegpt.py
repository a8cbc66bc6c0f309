"""Trajectories as ShareGPT records, a format of conversations that many trainers of language models read.

    {"id": ..., "conversations": [{"from": "human", "value": "two red circles ..."},
                                  {"from": "gpt", "value": "Plan: ...<|image_gen|>"},
                                  {"from": "human", "value": "<IMG_GEN_1>"},
                                  {"from": "gpt", "value": "I see ... Unmet: nothing.<|terminate|>"}],
     "images": ["images/ID_1.png"], "wrong_images": []}

`<IMG_GEN_n>` is the n-th image. Wrong images are context: those in `wrong_images` must not be targets of an image
generator. The turns of "gpt" about them are targets of a controller.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

from clvr_jax.data.trajectories.record import TrajectoryRecord
from clvr_jax.files.atomic_io import atomic_directory
from clvr_jax.files.image_io import encode_png
from clvr_jax.reasoning.conversation.context import image_mark

RECORDS, IMAGES = "sharegpt.jsonl", "images"


class ShareGPTEntry(TypedDict):
    """One record in the ShareGPT format; `wrong_images` is our extension."""

    id: str
    conversations: list[dict[str, str]]
    images: list[str]
    wrong_images: list[str]


def sharegpt_entry(record: TrajectoryRecord) -> ShareGPTEntry:
    """Converts a record; rolled-back steps are left out. `write_sharegpt` writes the images under the names in it."""
    turns = [{"from": "human", "value": record.trajectory.prompt}]
    images: list[str] = []
    wrong: list[str] = []
    for number, step in enumerate(record.trajectory.steps):
        if step.rolled_back:
            continue
        turns.append({"from": "gpt", "value": step.reasoning + step.action})
        if step.image is not None:
            images.append(f"{IMAGES}/{record.id}_{len(images) + 1}.png")
            turns.append({"from": "human", "value": image_mark(len(images))})
            if number not in record.generator_targets:
                wrong.append(images[-1])
    return {"id": record.id, "conversations": turns, "images": images, "wrong_images": wrong}


def write_sharegpt(records: Iterable[TrajectoryRecord], directory: Path) -> int:
    """Writes `sharegpt.jsonl` and its images, completely or not at all.

    Args:
      records: the records.
      directory: output directory.
    Returns: the number of records.
    Raises: ClvrError, one line, if the directory cannot be written.
    """
    count = 0
    with atomic_directory(directory) as temporary:
        (temporary / IMAGES).mkdir()
        with (temporary / RECORDS).open("w", encoding="utf-8", errors="backslashreplace") as lines:
            for record in records:
                entry = sharegpt_entry(record)
                kept = [step.image for step in record.trajectory.generated if not step.rolled_back]
                for name, image in zip(entry["images"], kept, strict=True):
                    assert image is not None
                    (temporary / name).write_bytes(encode_png(image))
                lines.write(json.dumps(entry, ensure_ascii=False) + "\n")
                count += 1
    return count
