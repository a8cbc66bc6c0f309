"""Verifiers whose answers are known: one that looks exactly, and a model that always says yes."""

import math

from clvr_jax.evaluation.verifier.cases import ShapesPrompt
from clvr_jax.files.image_io import pixels
from clvr_jax.interfaces import ChatModel, ChatResponse, Token
from clvr_jax.reasoning.verification.verification import Requirement, Verification
from clvr_jax.worlds.shapes.detect import Reading, detect
from clvr_jax.worlds.shapes.oracle import parse_plan
from clvr_jax.worlds.shapes.requirements import check_requirement, describe


class ExactVerifier:
    """Knows the exact requirements of its prompts and reads images with the detector."""

    name = "exact, describe"

    def __init__(self, prompts: list[ShapesPrompt]):
        self._requirements = {each.metadata["prompt"]: each.requirements for each in prompts}
        self._by_text = {str(each): each for own in self._requirements.values() for each in own}

    def derive(self, prompts):
        return [tuple(map(str, self._requirements[prompt])) for prompt in prompts]

    def check(self, requirements, images):
        return [self._checked(texts, detect(pixels(image))) for texts, image in zip(requirements, images, strict=True)]

    def check_plans(self, requirements, plans):
        return [
            self._checked(texts, Reading(parse_plan(plan))) for texts, plan in zip(requirements, plans, strict=True)
        ]

    def _checked(self, texts, reading):
        found = []
        for text in texts:
            evidence, met = check_requirement(self._by_text[text], reading)
            found.append(Requirement(text, met, float(met), evidence))
        return Verification(tuple(found), describe(reading), "describe", self.name)


class YesModel(ChatModel):
    """Lists one requirement, describes nothing, and answers yes to everything, with a probability or without."""

    name = "yes"

    def __init__(self, probability: float | None = 0.9):
        self._probability = probability

    def chat(self, question):
        text = question.messages[-1]["content"]
        if isinstance(text, str) and text.startswith("Required of: "):
            return ChatResponse("Required: one thing.")
        if question.images and len(text) == 1:
            return ChatResponse("I see nothing.")
        if self._probability is None:
            return ChatResponse("there it is. yes")
        yes, no = math.log(self._probability), math.log(1 - self._probability)
        return ChatResponse("there it is. yes", tokens=(Token("there it is.", 0.0), Token(" yes", yes, {" no": no})))
