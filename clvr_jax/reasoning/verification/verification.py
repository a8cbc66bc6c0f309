"""Verification: is what the prompt asks for in the image, requirement by requirement?

    requirements = model("Required of: {prompt}")                      once for each prompt
    description  = model(image)                                        once for each image, in a fresh conversation
    evidence, yes or no = model(description, requirement)              once for each requirement

No conversation holds the plan or what was said before, so an image is judged by what it shows and not by what was meant
to be in it. In the mode "describe" the image is described before a requirement is seen; the mode "ask" asks each
requirement of the image directly, which large pretrained models can be trusted with and small ones cannot: a question
that names the answer invites them to copy it. Probabilities are the model's own, from the probabilities of its tokens.

Source: arXiv 2605.14876, verification by checklists; the two modes and the probabilities are ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, Protocol

from clvr_jax.errors import ClvrError
from clvr_jax.files.image_io import ImageLike
from clvr_jax.files.json_input import JSON, UncheckedJSON
from clvr_jax.interfaces import Message
from clvr_jax.reasoning.verification.places import place_of

Mode = Literal["describe", "ask"]
VerificationMode = Literal["separate", "controller", "none"]
"""Who accepts an image in the loop: a verifier that sees it alone, the controller in its conversation, or nobody."""

REQUIREMENTS_PROMPT = """\
You prepare the inspection of an image that was made for a request. List every single thing that the request asks for \
and that can be seen in an image: each object with its color and number, each place, each relation, each text, and the \
number of objects if the request fixes it. Write one line that begins with "Required:", short items with a semicolon \
between them and a period at the end. If the request asks for nothing that can be checked, write "Required: nothing."
"""
DESCRIPTION_PROMPT = """\
You describe images exactly. Begin with "I see" and name everything in the image, one item after the other with a \
semicolon between them: what it is, its color, its number, where it is, and what it stands next to. Name what is \
blurred or unclear as unclear. Describe only what is really there. End with a period.
"""
COMPARISON_PROMPT = """\
You compare the description of an image with one requirement. First quote the parts of the description that decide, \
or say what is missing from it, and end this sentence with a period. Then write yes if the description meets the \
requirement, no if it does not. Judge strictly: what the description does not say is not there.
"""
QUESTION_PROMPT = """\
You inspect an image for one requirement. First say in one short sentence what the image really shows where it \
matters, and end it with a period. Then write yes if the image meets the requirement, no if it does not. Judge \
strictly: what cannot be seen clearly is not there.
"""


# --- what is asked, and how it is answered ----------------------------------------------------------------------------


def requirements_messages(prompt: str, system: str | None = None) -> list[Message]:
    """Asks for the requirements of a prompt."""
    return _chat(f"Required of: {prompt}", system)


def description_messages(system: str | None = None) -> list[Message]:
    """Asks for the description of one image."""
    return _chat([{"type": "image"}], system)


def comparison_messages(description: str, requirement: str, system: str | None = None) -> list[Message]:
    """Asks whether a description meets a requirement."""
    return _chat(f"{description}\nRequired: {requirement}.", system)


def question_messages(requirement: str, system: str | None = None) -> list[Message]:
    """Asks whether one image meets a requirement."""
    return _chat([{"type": "image"}, {"type": "text", "text": f"Required: {requirement}."}], system)


def comparison_reply(evidence: str, met: bool) -> str:
    """A reply to a comparison or a question, as models are trained to write it."""
    return f"{evidence}. {'yes' if met else 'no'}"


UNCLEAR = "something unclear"
"""How a model that was trained to describe says that it cannot tell what is in a place."""


def report(description: str, unmet: Sequence[str]) -> str:
    """What the controller reads beside an image: the description, and what is unmet."""
    return f"{description} Unmet: {'; '.join(unmet) or 'nothing'}.".lstrip()


def plan_text(items: Sequence[str]) -> str | None:
    """A plan as the verifier compares it with requirements; None if it has no items."""
    return f"Plan: {'; '.join(items)}." if items else None


def _chat(content: object, system: str | None) -> list[Message]:
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return [*messages, {"role": "user", "content": content}]


# --- what is found out ------------------------------------------------------------------------------------------------

DOUBT_NOTE = "Doubt: described as met, but the description is not sure enough to count."
"""Explains the state "doubt" of a requirement where one is shown."""


@dataclass(frozen=True)
class Requirement:
    """One thing that the prompt asks for, checked.

    Attributes:
      text: the requirement.
      met: whether the image meets it; None if the model answered neither yes nor no.
      probability: of being met, in [0, 1], from the model's token probabilities; None if it has none to give.
      evidence: what the answer rests on, in the model's words.
      doubt: the clause of the description that a yes rests on and that is not sure enough to count as met; "" unless
        this alone makes the requirement unmet.
    """

    text: str
    met: bool | None
    probability: float | None = None
    evidence: str = ""
    doubt: str = ""

    @property
    def expectation(self) -> float:
        """The probability, or 1 or 0 where there is none."""
        return float(self.met is True) if self.probability is None else self.probability

    @property
    def is_doubtful(self) -> bool:
        """Whether it is unmet only because what a yes rests on is not sure enough."""
        return self.met is False and (bool(self.doubt) or (self.probability or 0.0) > 0.5)

    @property
    def state(self) -> str:
        """What was found out, in words: "met", "doubt", "unmet" or "no answer"."""
        if self.met is None:
            return "no answer"
        return "met" if self.met else "doubt" if self.is_doubtful else "unmet"


@dataclass(frozen=True)
class Verification:
    """What a verifier found out about one image.

    Attributes:
      requirements: in the order of the prompt; () if the prompt asks for nothing that can be checked.
      description: the image in the verifier's words; "" in the mode "ask".
      mode: how it was checked.
      verifier: the model that checked.
    """

    requirements: tuple[Requirement, ...]
    description: str = ""
    mode: str = "describe"
    verifier: str = ""

    @property
    def accepted(self) -> bool | None:
        """Whether all requirements are met; None if there are none."""
        return all(each.met is True for each in self.requirements) if self.requirements else None

    @property
    def probability(self) -> float | None:
        """That of the least certain requirement; None if one of them has none."""
        values = [each.probability for each in self.requirements]
        return None if not values or None in values else min(value for value in values if value is not None)

    @property
    def score(self) -> float:
        """Expected number of met requirements; more is better."""
        return sum(each.expectation for each in self.requirements)

    @property
    def unmet(self) -> tuple[str, ...]:
        """The requirements that are not met, or could not be checked."""
        return tuple(each.text for each in self.requirements if each.met is not True)

    @property
    def report(self) -> str:
        """The text that the controller reads beside the image: a description, and what is unmet according to it.

        While something is missing, doubts can wait: what is redrawn without need may be spoiled. If nothing else keeps
        the image from being accepted, the things in doubt are described as unclear.
        """
        unmet = [each for each in self.requirements if each.met is not True]
        certain = tuple(each.text for each in unmet if not each.doubt)
        if certain or not unmet:
            return report(self.description, certain)
        description = self.description
        for clause in dict.fromkeys(each.doubt for each in unmet):
            # The whole clause: "red star top" is also the beginning of "red star top left".
            whole = rf"(?:^|(?<=; )|(?<=I see )){re.escape(clause)}(?=[;.]|$)"
            description = re.sub(whole, f"{UNCLEAR} {place_of(clause)}", description)
        return report(description, self.unmet)

    def to_dict(self) -> dict[str, JSON]:
        """The content as JSON values."""
        return {**asdict(self), "requirements": [asdict(each) for each in self.requirements]}

    @classmethod
    def from_dict(cls, data: UncheckedJSON) -> Verification:
        """Reads what `to_dict` wrote. Raises: ClvrError for missing or unknown fields and wrong types."""
        try:
            requirements = tuple(Requirement(**entry) for entry in data["requirements"])
            found = cls(**{**data, "requirements": requirements})
        except (KeyError, TypeError) as error:
            raise ClvrError(f"verification: malformed ({error})") from error
        texts = [found.description, found.mode, found.verifier, *(r.text for r in requirements)]
        texts += [text for each in requirements for text in (each.evidence, each.doubt)]
        if not all(isinstance(text, str) for text in texts):
            raise ClvrError("verification: malformed (a text is no text)")
        for each in requirements:
            if each.met not in (True, False, None) or not _is_probability(each.probability):
                raise ClvrError(f"verification: malformed (met {each.met!r}, probability {each.probability!r})")
        return found


class Verifier(Protocol):
    """Derives requirements and checks images against them, always for a batch."""

    @property
    def name(self) -> str:
        """Model, revision and mode, recorded with every verification."""
        ...

    def derive(self, prompts: Sequence[str]) -> list[tuple[str, ...]]:
        """The requirements of every prompt, in order; () for a prompt that asks for nothing that can be checked."""
        ...

    def check(self, requirements: Sequence[Sequence[str]], images: Sequence[ImageLike]) -> list[Verification]:
        """Checks every image against its requirements."""
        ...

    def check_plans(self, requirements: Sequence[Sequence[str]], plans: Sequence[str]) -> list[Verification]:
        """Checks plans in words, as if each were the description of an image."""
        ...


def _is_probability(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1)
