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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, get_args

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.reasoning.context import Message
from clvr_jax.reasoning.evidence import ANSWER, answer_probability, evidence_probability, invents, names_required
from clvr_jax.reasoning.images import Picture
from clvr_jax.reasoning.tools import Answer, Question, Usage, VisionLanguageModel

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

_RETRY_TEMPERATURE = 0.7
_TOP_LOGPROBS = 5
_NOTHING = frozenset({"nothing", "none"})
_REQUIRED = re.compile(r"Required:\s*(?P<items>.*?)\.?\s*$", re.DOTALL)


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


@dataclass(frozen=True)
class Requirement:
    """One thing that the prompt asks for, checked.

    Attributes:
      text: the requirement.
      met: whether the image meets it; None if the model answered neither yes nor no.
      probability: of being met, in [0, 1], from the model's token probabilities; None if it has none to give.
      evidence: what the answer rests on, in the model's words.
    """

    text: str
    met: bool | None
    probability: float | None = None
    evidence: str = ""

    @property
    def expectation(self) -> float:
        """The probability, or 1 or 0 where there is none."""
        return float(self.met is True) if self.probability is None else self.probability


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
        """What the controller reads beside the image."""
        return report(self.description, self.unmet)

    def to_dict(self) -> dict[str, Any]:
        """The content as JSON values."""
        return {**asdict(self), "requirements": [asdict(each) for each in self.requirements]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Verification:
        """Reads what `to_dict` wrote. Raises: ClvrError for missing or unknown fields and wrong types."""
        try:
            requirements = tuple(Requirement(**entry) for entry in data["requirements"])
            found = cls(**{**data, "requirements": requirements})
        except (KeyError, TypeError) as error:
            raise ClvrError(f"verification: malformed ({error})") from error
        texts = [found.description, found.mode, found.verifier, *(r.text for r in requirements)]
        texts += [each.evidence for each in requirements]
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

    def check(self, requirements: Sequence[Sequence[str]], images: Sequence[Picture]) -> list[Verification]:
        """Checks every image against its requirements."""
        ...

    def check_plans(self, requirements: Sequence[Sequence[str]], plans: Sequence[str]) -> list[Verification]:
        """Checks plans in words, as if each were the description of an image."""
        ...


class ModelVerifier(Verifier):
    """A vision-language model as the verifier.

    Args:
      model: any `VisionLanguageModel`; all questions of a stage are asked together.
      mode: "describe" or "ask", see the module.
      is_instructed: whether system prompts explain the task; False for models that were trained for it.
      max_tokens: of a description or a list of requirements; answers to comparisons get half of it.
      threshold: the least probability at which a requirement counts as met.
      retries: how often a list of requirements that cannot be read is asked for again, at a temperature.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        mode: Mode = "describe",
        *,
        is_instructed: bool = True,
        max_tokens: int = 512,
        threshold: float = 0.5,
        retries: int = 2,
    ):
        if mode not in get_args(Mode):
            raise UsageError(f"verification: the mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
        if not 0 < threshold < 1:
            raise UsageError(f"verification: the threshold must lie between 0 and 1, got {threshold}")
        self._model, self._mode, self._max_tokens = model, mode, max_tokens
        self._is_instructed, self._threshold, self._retries = is_instructed, threshold, retries
        self.usage = Usage()

    @property
    def name(self) -> str:
        """The model's name and the mode."""
        return f"{self._model.name}, {self._mode}"

    def verify(
        self,
        prompts: Sequence[str],
        images: Sequence[Picture],
        requirements: Sequence[Sequence[str]] | None = None,
    ) -> list[Verification]:
        """Checks every image against its prompt.

        Args:
          prompts: one for each image.
          images: PIL images or uint8 arrays (height, width, 3).
          requirements: for each image; derived from its prompt by the model if None.
        Returns: one Verification for each image, in order; `accepted` is None where there is nothing to check.
        Raises: UsageError if prompts and images differ in number; what `derive` and `check` raise.
        """
        if len(prompts) != len(images):
            raise UsageError(f"verification: {len(prompts)} prompts but {len(images)} images; give one prompt for each")
        if requirements is None:
            distinct = list(dict.fromkeys(prompts))
            derived = dict(zip(distinct, self.derive(distinct), strict=True))
            requirements = [derived[prompt] for prompt in prompts]
        return self.check(requirements, images)

    def derive(self, prompts: Sequence[str]) -> list[tuple[str, ...]]:
        """Asks for the requirements of every prompt.

        Raises: ClvrError if a reply cannot be read after all retries; ProviderError.
        """
        system = self._system(REQUIREMENTS_PROMPT)
        found: dict[int, tuple[str, ...]] = {}
        for attempt in range(self._retries + 1):
            missing = [index for index in range(len(prompts)) if index not in found]
            answers = self._ask(
                [
                    Question(
                        requirements_messages(prompts[index], system),
                        max_tokens=self._max_tokens,
                        temperature=_RETRY_TEMPERATURE if attempt else 0.0,
                        seed=attempt,
                    )
                    for index in missing
                ]
            )
            for index, answer in zip(missing, answers, strict=True):
                items = read_requirements(answer.text)
                if items is not None:
                    found[index] = items
                elif attempt == self._retries:
                    raise ClvrError(
                        f"verification: {self._model.name} lists no requirements of the prompt {prompts[index][:60]!r} "
                        f"but says {answer.text[:80]!r}; give them yourself or choose another verifier"
                    )
        return [found[index] for index in range(len(prompts))]

    def check(self, requirements: Sequence[Sequence[str]], images: Sequence[Picture]) -> list[Verification]:
        """Checks every image against its requirements, alone and in fresh conversations.

        Raises: ClvrError if there are not as many lists of requirements as images; ProviderError.
        """
        _same_number(len(requirements), len(images), "images")
        if self._mode == "describe":
            system = self._system(DESCRIPTION_PROMPT)
            described = self._ask(
                [
                    Question(description_messages(system), [image], self._max_tokens, top_logprobs=_TOP_LOGPROBS)
                    for image in images
                ]
            )
            return self._compare(requirements, described)
        system = self._system(QUESTION_PROMPT)
        pairs = [(row, text) for row, texts in enumerate(requirements) for text in texts]
        answers = self._ask(
            [
                Question(
                    question_messages(text, system), [images[row]], self._max_tokens // 2, top_logprobs=_TOP_LOGPROBS
                )
                for row, text in pairs
            ]
        )
        checked = [self._checked(text, answer) for (_, text), answer in zip(pairs, answers, strict=True)]
        return self._gathered(requirements, checked, [""] * len(images))

    def check_plans(self, requirements: Sequence[Sequence[str]], plans: Sequence[str]) -> list[Verification]:
        """Checks plans in words, each as if it were a description that is certain."""
        _same_number(len(requirements), len(plans), "plans")
        return self._compare(requirements, [Answer(plan) for plan in plans])

    def _compare(self, requirements: Sequence[Sequence[str]], described: Sequence[Answer]) -> list[Verification]:
        system = self._system(COMPARISON_PROMPT)
        descriptions = [answer.text.strip() for answer in described]
        pairs = [(row, text) for row, texts in enumerate(requirements) for text in texts]
        answers = self._ask(
            [
                Question(
                    comparison_messages(descriptions[row], text, system),
                    max_tokens=self._max_tokens // 2,
                    top_logprobs=_TOP_LOGPROBS,
                )
                for row, text in pairs
            ]
        )
        checked = [
            self._checked(text, answer, described[row]) for (row, text), answer in zip(pairs, answers, strict=True)
        ]
        return self._gathered(requirements, checked, descriptions)

    def _checked(self, requirement: str, answer: Answer, description: Answer | None = None) -> Requirement:
        text = answer.text.strip()
        match = ANSWER.search(text)
        if match is None:
            return Requirement(requirement, None, None, f"no answer in {text[:120]!r}")
        is_yes = match[1].lower() == "yes"
        evidence = text[: match.start()].strip().rstrip(".")
        # A model that was trained to quote supports its yes by a quotation that names what is required.
        is_unsupported = False
        if is_yes and description is not None and not self._is_instructed:
            is_unsupported = invents(description.text, evidence) or not names_required(requirement, evidence)
        probability = answer_probability(answer)
        if probability is None:
            return Requirement(requirement, is_yes and not is_unsupported, None, evidence)
        certainty = 1.0
        if description is not None:
            certainty = 0.0 if is_unsupported else evidence_probability(description, evidence)
        # If the description is wrong where it matters, a yes is lost, and a no is anybody's guess.
        supported = certainty * probability
        probability = supported + (1 - certainty) * (1 - probability) / 2
        # Doubt about the description never turns a no into a yes.
        is_met = probability >= self._threshold and (is_yes or supported >= self._threshold)
        return Requirement(requirement, is_met, probability, evidence)

    def _gathered(
        self, requirements: Sequence[Sequence[str]], checked: Sequence[Requirement], descriptions: Sequence[str]
    ) -> list[Verification]:
        remaining = iter(checked)
        return [
            Verification(tuple(next(remaining) for _ in texts), description, self._mode, self.name)
            for texts, description in zip(requirements, descriptions, strict=True)
        ]

    def _system(self, prompt: str) -> str | None:
        return prompt if self._is_instructed else None

    def _ask(self, questions: Sequence[Question]) -> list[Answer]:
        answers = self._model.ask_all(questions) if questions else []
        for answer in answers:
            self.usage += answer.usage
        return answers


# --- reading answers --------------------------------------------------------------------------------------------------


def read_requirements(reply: str) -> tuple[str, ...] | None:
    """The requirements that a reply lists, () if it says that there are none, None if it cannot be read."""
    match = _REQUIRED.search(reply)
    items = [item.strip() for item in match["items"].split(";")] if match else []
    items = [item for item in items if item]
    if not items:
        return None
    return () if len(items) == 1 and items[0].lower() in _NOTHING else tuple(items)


def _is_probability(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1)


def _same_number(requirements: int, others: int, what: str) -> None:
    if requirements != others:
        raise ClvrError(f"verification: requirements for {requirements} {what}, but {others} {what} were given")
