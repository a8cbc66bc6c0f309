"""Tests that the training chats of the small verifier are exact, balanced, and without held-out pairs."""

import numpy as np
import pytest
from scipy import ndimage

from clvr_jax.data.shapes_augmentation import (
    blur_cells,
    random_canvas,
    resembles_held_out_pair,
    vary_appearance,
)
from clvr_jax.data.shapes_distractors import (
    MORE_COLORS,
    MORE_SHAPES,
    distractor_image,
    random_colors,
    recolor_objects,
)
from clvr_jax.data.shapes_verification import (
    BARE_CHECKLIST,
    CHECKLIST_MISSING,
    comparisons_chat,
    conversation_chat,
    plan_chat,
    requirements_chat,
    training_metadata,
)
from clvr_jax.reasoning.verification.model_verifier import read_requirements
from clvr_jax.worlds.shapes.detect import DetectedObject, Reading, detect, examine
from clvr_jax.worlds.shapes.metadata import Metadata
from clvr_jax.worlds.shapes.oracle import next_reply, parse_plan
from clvr_jax.worlds.shapes.prompts import has_held_out_pair
from clvr_jax.worlds.shapes.render import render
from clvr_jax.worlds.shapes.requirements import ShapesRequirement, check_requirement, describe
from clvr_jax.worlds.shapes.scene import HELD_OUT_PAIRS, Scene, cell_center, place

SEED = 3


def has_held_out_object(reading):
    return any((item.color, item.shape) in HELD_OUT_PAIRS for item in reading.objects)


def texts(messages, role):
    return [message["content"] for message in messages if message["role"] == role]


def test_comparisons_share_one_description_and_half_of_them_are_met():
    rng = np.random.default_rng(SEED)
    chats = [comparisons_chat(rng, 5) for _ in range(300)]
    answers = [text.rsplit(" ", 1)[1] for chat in chats for text in texts(chat.messages, "assistant")]
    assert set(answers) == {"yes", "no"}
    share = answers.count("yes") / len(answers)
    assert share == pytest.approx(0.5, abs=4 * 0.5 / len(answers) ** 0.5)  # four standard errors, seed 3
    for chat in chats:
        first, *others = texts(chat.messages, "user")
        assert first.startswith(("I see", "Plan: "))
        assert all(text.startswith("Required: ") for text in [first.split("\n", 1)[1], *others])
        asked = [text.split("Required: ", 1)[1] for text in (first, *others)]
        assert len(set(asked)) == len(asked)


def test_most_plans_have_the_requirements_in_their_input():
    rng = np.random.default_rng(SEED)
    asked = [texts(plan_chat(rng).messages, "user")[0] for _ in range(400)]
    without = [text for text in asked if "\nRequired: " not in text]
    expected = (1 - BARE_CHECKLIST) * CHECKLIST_MISSING
    error = (expected * (1 - expected) / 400) ** 0.5
    assert len(without) / 400 == pytest.approx(expected, abs=4 * error)  # four standard errors, seed 3
    assert all(read_requirements(text.split("\n")[-1]) for text in asked if text not in without)


def test_requirements_can_be_parsed():
    rng = np.random.default_rng(SEED)
    for _ in range(200):
        chat = requirements_chat(rng)
        assert read_requirements(texts(chat.messages, "assistant")[0]) is not None


def test_no_training_prompt_or_image_has_a_held_out_pair():
    rng = np.random.default_rng(SEED)
    prompts: list[Metadata] = [training_metadata(rng) for _ in range(400)]
    assert not any(has_held_out_pair(metadata) for metadata in prompts)
    assert not any(has_held_out_object(random_canvas(rng).reading()) for _ in range(400))


def test_a_conversation_ends_with_the_exact_reply_also_after_wrong_replies():
    rng = np.random.default_rng(SEED)
    num_reports = num_wrong = 0
    for _ in range(40):
        chat = conversation_chat(rng, 0.5, lambda images: images)
        image, *report = chat.messages[-2]["content"]
        assert image == {"type": "image"}
        num_reports += len(report)
        replies = [message["content"] for message in chat.messages if message["role"] == "assistant"]
        planned = parse_plan(replies[0])
        exact = [next_reply(planned, detect(each)) for each in chat.images]
        assert replies[-1] == exact[-1]
        assert all(part["text"].startswith(replies[-1].split(" Unmet:")[0]) for part in report)
        num_wrong += sum(reply != right for reply, right in zip(replies[1:-1], exact[:-1], strict=True))
        assert len(chat.images) == len(replies) - 1
    assert 30 <= num_reports < 40
    assert num_wrong >= 3


@pytest.mark.slow
def test_distractor_labels_agree_with_the_detector():
    rng = np.random.default_rng(SEED)
    clear = unclear = 0
    for _ in range(300):
        image, description = distractor_image(rng)
        seen = detect(image)
        for clause in description.removeprefix("I see ").removesuffix(".").split("; "):
            if clause.startswith("something unclear "):
                unclear += 1
                cell = clause.removeprefix("something unclear ")
                assert cell not in {item.cell for item in seen.objects}
            elif clause != "nothing" and not set(clause.split()) & (MORE_COLORS.keys() | MORE_SHAPES.keys()):
                clear += 1
                assert clause in map(str, seen.objects)
                assert tuple(clause.split()[:2]) not in HELD_OUT_PAIRS
    assert (clear, unclear) > (50, 100)


@pytest.mark.slow
def test_recolored_objects_stay_as_clear_as_they_were():
    rng = np.random.default_rng(SEED)
    unequal = checked = more = 0
    for _ in range(150):
        canvas = random_canvas(rng)
        cells = [item.cell for item in canvas.scene.objects]
        image = vary_appearance(canvas, rng)
        image = blur_cells(image, rng, cells) if cells else image
        reading = detect(image)
        recolored, description = recolor_objects(image, reading, rng)
        seen = describe(detect(recolored)).removeprefix("I see ").removesuffix(".").split("; ")
        for clause in description.removeprefix("I see ").removesuffix(".").split("; "):
            color, shape = clause.split()[:2] if clause != "nothing" else ("", "")
            assert (color, shape) not in HELD_OUT_PAIRS
            if color in MORE_COLORS:
                more += 1
            elif clause != "nothing":
                checked += 1
                unequal += clause not in seen
        assert has_held_out_object(detect(recolored)) is False
    assert min(checked, more) > 200
    assert unequal <= 0.03 * checked, "pixels are rounded and clipped, which few objects on the border notice"


@pytest.mark.slow
def test_outlines_stay_as_clear_as_they_were_in_random_colors():
    rng = np.random.default_rng(SEED)
    present = unequal = 0
    for _ in range(100):
        canvas = random_canvas(rng)
        cells = [item.cell for item in canvas.scene.objects]
        image = blur_cells(vary_appearance(canvas, rng), rng, cells) if cells else canvas.render()
        examined = examine(image)
        recolored, clarity = random_colors(image, examined, rng)
        if has_held_out_object(examined.reading):
            continue
        assert has_held_out_object(detect(recolored)) is False
        shown = (clarity[:, 0] > 0) & np.isnan(clarity[:, 1])
        assert not np.isnan(clarity[clarity[:, 0] == 0]).any()
        present += shown.sum()
        unequal += ((clarity[:, 2] >= 0) != (examine(recolored).clarity[:, 2] >= 0))[shown].sum()
    assert present > 300
    assert unequal <= 0.05 * present, "pixels are rounded and clipped, and light colors have less contrast"


def test_no_unclear_object_looks_like_a_held_out_pair():
    rng = np.random.default_rng(SEED)
    star = render(Scene((place("purple", "star", "center", rng),)))
    assert resembles_held_out_pair(star)
    out_of_focus = ndimage.gaussian_filter(star, (1.5, 1.5, 0))
    assert detect(out_of_focus).unclear == ("center",)
    assert resembles_held_out_pair(out_of_focus), "although the detector reads no pair"
    assert not resembles_held_out_pair(render(Scene((place("blue", "star", "center", rng),))))
    checked = 0
    for _ in range(200):
        image, description = distractor_image(rng)
        for clause in description.removeprefix("I see ").removesuffix(".").split("; "):
            if clause.startswith("something unclear"):
                checked += 1
                x, y = cell_center(clause.removeprefix("something unclear "))
                alone = np.full_like(image, 250)
                rows, columns = (slice(max(round(value) - 10, 0), round(value) + 11) for value in (y, x))
                alone[rows, columns] = image[rows, columns]
                assert not resembles_held_out_pair(alone)
    assert checked > 100


def test_uneven_colors_leave_every_object_as_it_was():
    rng = np.random.default_rng(SEED)
    uneven = []
    for _ in range(60):
        canvas = random_canvas(rng)
        image = vary_appearance(canvas, rng)
        assert describe(detect(image)) == describe(canvas.reading())
        for item in detect(image).objects:
            row, column = round(item.y), round(item.x)
            patch = image[row - 3 : row + 4, column - 3 : column + 4].astype(int)
            uneven.append(np.ptp(patch, axis=(0, 1)).max() if item.shape == "square" else 0)
    assert 40 <= max(uneven) < 120, "an object of one color has differences below 10"


def test_the_number_of_objects_is_counted_one_by_one():
    objects = (
        DetectedObject("red", "star", "top left", 10, 10, 8),
        DetectedObject("blue", "circle", "center", 32, 32, 8),
    )
    two = ShapesRequirement(total=2)
    assert check_requirement(two, Reading(objects)) == ("one: red star top left; two: blue circle center", True)
    assert check_requirement(two, Reading(objects[::-1]))[0] == "one: blue circle center; two: red star top left"
    assert check_requirement(two, Reading(objects, ("top",))) == (
        "one: red star top left; something unclear top; two: blue circle center",
        False,
    )
    assert check_requirement(two, Reading()) == ("nothing", False)
