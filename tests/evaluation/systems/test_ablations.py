"""The ablations of the verifier: blank images, which replace nothing else, and exact descriptions."""

import io

import numpy as np
import pytest
from PIL import Image

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.systems.ablations import BlindController, BlindVerifier, ExactDescriptions, blank_image
from clvr_jax.files.image_io import EncodedImage, pixels
from clvr_jax.interfaces import Usage
from clvr_jax.reasoning.conversation.protocols import Conversation
from clvr_jax.reasoning.verification.verification import Requirement, Verification
from clvr_jax.worlds.shapes.detect import detect
from clvr_jax.worlds.shapes.render import render
from clvr_jax.worlds.shapes.requirements import describe
from clvr_jax.worlds.shapes.scene import Scene, sample_scene_random


class Recording:
    """A verifier and a controller that keep what they are given."""

    name, usage = "recording", Usage(calls=3)

    def derive(self, prompts):
        return [(prompt, "one object") for prompt in prompts]

    def check(self, requirements, images):
        self.seen = (requirements, images)
        return [Verification(tuple(Requirement(text, True) for text in texts)) for texts in requirements]

    def check_plans(self, requirements, plans):
        self.seen = (requirements, plans)
        return [Verification(tuple(Requirement(text, True) for text in texts)) for texts in requirements]

    def reply(self, conversations):
        self.seen = conversations
        return ["reply"] * len(conversations)


def encoded(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return EncodedImage(buffer.getvalue(), "png")


@pytest.mark.parametrize("kind", [lambda image: image, Image.fromarray, encoded])
def test_a_blank_image_has_the_size_and_the_background_of_the_image(kind):
    shapes = render(sample_scene_random(np.random.default_rng(0)))
    np.testing.assert_array_equal(blank_image(kind(shapes)), render(Scene()))
    other = blank_image(kind(np.zeros((48, 80, 3), np.uint8)))
    assert other.shape == (48, 80, 3)
    assert (other == 255).all()
    assert (blank_image(kind(shapes), (1, 2, 3)) == (1, 2, 3)).all()


def test_a_blind_verifier_checks_blank_images_and_leaves_the_rest():
    inner = Recording()
    blind = BlindVerifier(inner)
    image = render(sample_scene_random(np.random.default_rng(1), 3))
    assert blind.name == "recording, blind"
    assert blind.usage == Usage(calls=3)
    assert blind.derive(["a"]) == [("a", "one object")]
    assert blind.check([("a",)], [image])[0].accepted
    assert inner.seen[0] == [("a",)]
    np.testing.assert_array_equal(inner.seen[1][0], render(Scene()))
    blind.check_plans([("a",)], ["Plan: a."])
    assert inner.seen == ([("a",)], ["Plan: a."])


def test_a_blind_controller_sees_blank_images_and_the_same_texts():
    inner = Recording()
    blind = BlindController(inner)
    image = render(sample_scene_random(np.random.default_rng(2), 3))
    conversation = Conversation("a prompt", ("first", "second"), (image, image), seed=7, attempt=1)
    assert blind.reply([conversation, Conversation("another")]) == ["reply", "reply"]
    assert inner.seen == [conversation, Conversation("another")]  # images are not compared
    assert [np.array_equal(pixels(each), render(Scene())) for each in inner.seen[0].images] == [True, True]
    assert blind.usage == Usage(calls=3)


def test_exact_descriptions_are_compared_in_place_of_the_models_own():
    inner = Recording()
    exact = ExactDescriptions(inner)
    scene = sample_scene_random(np.random.default_rng(1), 3)
    (found,) = exact.check([("a",)], [Image.fromarray(render(scene))])
    assert inner.seen == ([("a",)], [describe(detect(render(scene)))])
    assert found.verifier == "recording, exact descriptions"
    exact.check_plans([("a",)], ["Plan: a."])
    assert inner.seen == ([("a",)], ["Plan: a."])
    assert exact.derive(["a"]) == [("a", "one object")]
    with pytest.raises(ClvrError):
        exact.check([("a",)], [np.zeros((128, 128, 3), np.uint8)])
