"""Cases of the verifier benchmark: exact labels, one mistake each, and prompts of their own."""

import itertools
from collections import Counter

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from clvr_jax.data.shapes import Canvas
from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.verifier.cases import CONTROLS, MISTAKES, ShapesPrompt, control_cases, rendered_cases
from clvr_jax.evaluation.verifier.cases import sample_prompts as sample
from clvr_jax.evaluation.verifier.generated import generated_cases
from clvr_jax.evaluation.verifier.reading import read_description
from clvr_jax.reasoning.conversation.protocols import GeneratedImage
from clvr_jax.worlds.shapes.metadata import has_held_out_pair
from clvr_jax.worlds.shapes.oracle import parse_edits, parse_plan
from clvr_jax.worlds.shapes.prompts import is_reserved
from clvr_jax.worlds.shapes.render import render
from clvr_jax.worlds.shapes.scene import BACKGROUND, HELD_OUT_PAIRS, Scene, place

METADATA = {
    "tag": "complex",
    "tier": 3,
    "prompt": "a red star left of a blue circle, and a green square",
    "include": [
        {"class": "circle", "count": 1, "color": "blue"},
        {"class": "star", "count": 1, "color": "red", "position": ["left of", 0]},
        {"class": "square", "count": 1, "color": "green"},
    ],
}


@pytest.fixture(scope="module")
def prompts():
    return sample(12, seed=3)


def prompt_of(*objects, smudges=()):
    rng = np.random.default_rng(0)
    scene = Scene(tuple(place(*item, rng) for item in objects))
    return ShapesPrompt(METADATA, Canvas(scene, smudges, seed=3))


STAR, CIRCLE, SQUARE = ("red", "star", "left"), ("blue", "circle", "right"), ("green", "square", "top")


@pytest.mark.parametrize(
    ("objects", "smudges", "label"),
    [
        ((STAR, CIRCLE, SQUARE), (), True),
        ((STAR, ("blue", "circle", "center"), ("green", "square", "bottom right")), (), True),  # free places
        ((STAR, CIRCLE), (), False),  # missing
        ((STAR, CIRCLE), ("top",), False),  # unclear
        ((STAR, CIRCLE, SQUARE), ("bottom",), False),  # something unclear beside the right objects
        ((STAR, ("cyan", "circle", "right"), SQUARE), (), False),  # color
        ((STAR, ("blue", "cross", "right"), SQUARE), (), False),  # shape
        ((STAR, ("black", "cross", "right"), SQUARE), (), False),  # other
        ((("red", "star", "bottom left"), CIRCLE, SQUARE), (), True),  # farther to the left than below
        ((("red", "star", "bottom"), CIRCLE, SQUARE), (), True),  # a diagonal neighbor
        ((("red", "star", "bottom right"), CIRCLE, SQUARE), (), False),  # place
        ((STAR, CIRCLE, SQUARE, ("red", "star", "bottom")), (), False),  # extra
        ((), (), False),  # blank
    ],
)
def test_labels_of_images_made_by_hand(objects, smudges, label):
    prompt = prompt_of(*objects, smudges=smudges)
    case = prompt.case(prompt.canvas.render(), "kind", "group")
    shown, unread = read_description(case.description)
    assert not unread
    assert len(shown) == len(objects) + len(smudges)
    assert case.label is label
    assert case.requirements == ("blue circle", "red star left of blue circle", "green square", "three objects")
    assert (case.tier, case.has_held_out, case.prompt) == (3, False, METADATA["prompt"])


@pytest.mark.slow
def test_prompts_are_not_evaluation_prompts_and_a_third_is_held_out():
    prompts = sample(24)
    assert Counter(each.metadata["tier"] for each in prompts) == {3: 6, 4: 6, 5: 6, 6: 6}
    assert Counter((each.metadata["tier"], each.has_held_out) for each in prompts if each.has_held_out) == {
        (tier, True): 2 for tier in (3, 4, 5, 6)
    }
    assert not any(is_reserved(each.metadata) for each in prompts)
    assert len({each.metadata["prompt"] for each in prompts}) == 24
    for each in prompts:
        shown = {(item.color, item.shape) for item in each.canvas.scene.objects}
        assert bool(shown & HELD_OUT_PAIRS) == has_held_out_pair(each.metadata)
    again = sample(24)
    assert [each.metadata for each in again] == [each.metadata for each in prompts]
    assert sample(24, seed=1)[0].metadata != prompts[0].metadata


def test_renderings_hold_exactly_one_mistake_of_their_kind(prompts):
    cases = list(rendered_cases(prompts))
    assert Counter(case.kind for case in cases) == {kind: 12 for kind in ("right", *MISTAKES)}
    by_prompt = {prompt.metadata["prompt"]: [] for prompt in prompts}
    for case in cases:
        assert case.label == (case.kind == "right")
        assert case.image.shape == (64, 64, 3)
        by_prompt[case.prompt].append(case)
    for own in by_prompt.values():
        right, *wrong = own
        before, _ = read_description(right.description)
        for case in wrong:
            after, _ = read_description(case.description)
            changed = {cell for cell in before.keys() | after.keys() if before.get(cell) != after.get(cell)}
            assert len(changed) == (2 if case.kind == "place" else 1)
            old = [before[cell].split() for cell in changed if cell in before]
            new = [after[cell].split() for cell in changed if cell in after]
            if case.kind == "missing":
                assert (len(old), new) == (1, [])
            elif case.kind == "unclear":
                assert new == [["something", "unclear"]]
            elif case.kind == "extra":
                assert (old, len(new)) == ([], 1)
            elif case.kind == "place":
                assert old == new
            else:
                ((color, shape),), ((new_color, new_shape),) = old, new
                assert (color != new_color, shape != new_shape) == {
                    "color": (True, False),
                    "shape": (False, True),
                    "other": (True, True),
                }[case.kind]
    again = list(rendered_cases(prompts))
    assert all(np.array_equal(one.image, other.image) for one, other in zip(cases, again, strict=True))


def test_controls_are_never_right(prompts):
    cases = list(control_cases(prompts))
    assert Counter((case.kind, case.label) for case in cases) == {(kind, False): 12 for kind in CONTROLS}
    blank = [case for case in cases if case.kind == "blank"]
    assert all((case.image == BACKGROUND).all() for case in blank)
    noise = [case.image.astype(float) for case in cases if case.kind == "noise"]
    assert all(image.std() > 70 for image in noise[::2])
    assert all(image.mean() > 200 and image.std() > 3 for image in noise[1::2])
    rights = {prompt.metadata["prompt"]: prompt.canvas.render() for prompt in prompts}
    for case in cases:
        if case.kind == "swapped":
            assert len(read_description(case.description)[0]) == case.tier
            assert not np.array_equal(case.image, rights[case.prompt])


class Forgetful:
    """A generator that does as it is told, but leaves out the last object of every second request."""

    def __init__(self):
        self.requests = []

    def generate(self, requests):
        rng = np.random.default_rng(0)
        found = []
        for request in requests:
            planned = [edit.object for edit in parse_edits(request.replies[-1])]
            assert planned == list(parse_plan(request.replies[0]))
            shown = planned[: -1 if len(self.requests) % 2 else None]
            self.requests.append(request)
            found.append(
                GeneratedImage(render(Scene(tuple(place(item.color, item.shape, item.cell, rng) for item in shown))), 4)
            )
        return found


def test_generated_images_are_labeled_by_the_detector(prompts):
    generator, done = Forgetful(), []
    cases = list(generated_cases(generator, "forgetful", prompts, batch_size=5, on_progress=done.append))
    assert [case.label for case in cases] == [True, False] * 6
    assert [case.kind for case in cases] == ["right", "wrong"] * 6
    assert {case.group for case in cases} == {"generated by forgetful"}
    assert done == [5, 10, 12]
    assert len({request.seed for request in generator.requests}) == 12
    assert [request.prompt for request in generator.requests] == [prompt.metadata["prompt"] for prompt in prompts]


def test_images_that_are_right_or_wrong_by_a_narrow_margin_are_kinds_of_their_own(prompts):
    """Blur makes an object unclear; just before and just after, the label could as well be the other one."""
    (prompt, image) = prompts[0], prompts[0].canvas.render()
    blurred = [gaussian_filter(image, (sigma, sigma, 0)) for sigma in np.linspace(0, 4, 41)]

    class Blurring:
        def generate(self, requests):
            return [GeneratedImage(blurred[len(done)], 1)]

    kinds, done = [], []
    for _ in blurred:
        kinds += [case.kind for case in generated_cases(Blurring(), "blurring", [prompt])]
        done.append(None)
    order = [kind for kind, _ in itertools.groupby(kinds)]
    assert order == ["right", "right, near a limit", "wrong, near a limit", "wrong"]


def test_generators_of_other_worlds_are_refused(prompts):
    class Large:
        def generate(self, requests):
            return [GeneratedImage(np.zeros((32, 48, 3), np.uint8), 1) for _ in requests]

    with pytest.raises(ClvrError, match=r"large: generates images of 48 x 32 pixels.*--images"):
        list(generated_cases(Large(), "large", prompts))
