"""Trajectories as ShareGPT records, the form in which many trainers of language models take conversations.

    {"id": ..., "conversations": [{"from": "human", "value": "two red circles ..."},
                                  {"from": "gpt", "value": "Plan: ...<|image_gen|>"},
                                  {"from": "human", "value": "<IMG_GEN_1>"},
                                  {"from": "gpt", "value": "I see ... Unmet: nothing.<|terminate|>"}],
     "images": ["images/ID_1.png"], "wrong_images": []}

`<IMG_GEN_n>` stands for the n-th image. Wrong images are context: an image generator must not be trained on those that
`wrong_images` names. What "gpt" says of them is for a controller to learn.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from clvr_jax.data.trajectory_record import TrajectoryRecord
from clvr_jax.files import replacing
from clvr_jax.image_io import encode_png
from clvr_jax.reasoning.context import image_mark

RECORDS, IMAGES = "sharegpt.jsonl", "images"


def sharegpt_entry(record: TrajectoryRecord) -> dict[str, Any]:
    """A record without its pictures, which are named as `write_sharegpt` names them; rolled-back steps are left out."""
    said = [{"from": "human", "value": record.trajectory.prompt}]
    images: list[str] = []
    wrong: list[str] = []
    for number, step in enumerate(record.trajectory.steps):
        if step.rolled_back:
            continue
        said.append({"from": "gpt", "value": step.reasoning + step.action})
        if step.image is not None:
            images.append(f"{IMAGES}/{record.id}_{len(images) + 1}.png")
            said.append({"from": "human", "value": image_mark(len(images))})
            if number not in record.generator_targets:
                wrong.append(images[-1])
    return {"id": record.id, "conversations": said, "images": images, "wrong_images": wrong}


def write_sharegpt(records: Iterable[TrajectoryRecord], folder: Path) -> int:
    """Writes `sharegpt.jsonl` and its images to a folder, completely or not at all; returns the number of records.

    Raises: ClvrError, one line, if it cannot be written.
    """
    count = 0
    with replacing(folder) as temporary:
        (temporary / IMAGES).mkdir()
        with (temporary / RECORDS).open("w", encoding="utf-8", errors="backslashreplace") as lines:
            for record in records:
                entry = sharegpt_entry(record)
                kept = [step.image for step in record.trajectory.generated if not step.rolled_back]
                for name, picture in zip(entry["images"], kept, strict=True):
                    assert picture is not None
                    (temporary / name).write_bytes(encode_png(picture))
                lines.write(json.dumps(entry, ensure_ascii=False) + "\n")
                count += 1
    return count
