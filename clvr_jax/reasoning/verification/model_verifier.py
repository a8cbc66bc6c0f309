"""A vision-language model as the verifier: it derives requirements and checks images and plans against them.

Questions of a stage are asked together, for all images and requirements. How answers are read, and how a doubt about
the description enters the probability, is here; what is asked is in `verification`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from dataclasses import replace
from typing import get_args

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.image_io import ImageLike
from clvr_jax.interfaces import ChatModel, ChatRequest, ChatResponse, Usage
from clvr_jax.reasoning.conversation.actions import plan_items
from clvr_jax.reasoning.retries import RETRY_TEMPERATURE, retry_rounds
from clvr_jax.reasoning.verification.evidence import (
    ANSWER,
    answer_probability,
    evidence_probability,
    is_consistent,
    least_clause_probability,
    least_probable_clause,
    supports,
)
from clvr_jax.reasoning.verification.places import claimed_twice, in_reading_order, place_of
from clvr_jax.reasoning.verification.verification import (
    COMPARISON_PROMPT,
    DESCRIPTION_PROMPT,
    QUESTION_PROMPT,
    REQUIREMENTS_PROMPT,
    Mode,
    Requirement,
    Verification,
    Verifier,
    comparison_messages,
    description_messages,
    plan_text,
    question_messages,
    requirements_messages,
)

_TOP_LOGPROBS = 5
_NOTHING = frozenset({"nothing", "none"})
_REQUIRED = re.compile(r"Required:\s*(?P<items>.*?)\.?\s*$", re.DOTALL)


class ModelVerifier(Verifier):
    """A vision-language model as the verifier.

    Args:
      model: any `ChatModel`; all questions of a stage are asked together.
      mode: "describe" or "ask", see the module.
      is_instructed: whether system prompts explain the task; False for models that were trained for it.
      max_tokens: of each answer. An answer may quote the whole description.
      threshold: the least probability at which a requirement counts as met.
      clause_threshold: the least probability of every clause of the description that a yes rests on, if the model was
        trained to describe in fixed words; other models have many words for the same thing. A higher one accepts fewer
        wrong images, which end the loop, and rejects more right ones, each of which costs a generation.
      retries: how often a list of requirements that cannot be read is asked for again, at a temperature.
      comparison_retries: how often an answer that contradicts the description is sampled again, if the model was
        trained to quote it.
    """

    def __init__(
        self,
        model: ChatModel,
        mode: Mode = "describe",
        *,
        is_instructed: bool = True,
        max_tokens: int = 512,
        threshold: float = 0.5,
        clause_threshold: float = 0.5,
        retries: int = 2,
        comparison_retries: int = 8,
    ):
        if mode not in get_args(Mode):
            raise UsageError(f"verification: the mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
        if not 0 < threshold < 1:
            raise UsageError(f"verification: the threshold must lie between 0 and 1, got {threshold}")
        if not 0 <= clause_threshold < 1:
            raise UsageError(f"verification: clause_threshold must be at least 0 and below 1, got {clause_threshold}")
        self._model, self._mode, self._max_tokens = model, mode, max_tokens
        self._is_instructed, self._threshold, self._retries = is_instructed, threshold, retries
        self._clause_threshold = clause_threshold
        self._comparison_retries = comparison_retries
        self.usage = Usage()

    @property
    def name(self) -> str:
        """The model's name and the mode."""
        return f"{self._model.name}, {self._mode}"

    @property
    def adapted(self) -> tuple[str, ...]:
        """What the requests to the model lacked because its server refuses it, in words; for results."""
        return tuple(getattr(self._model, "adapted", ()))

    def verify(
        self,
        prompts: Sequence[str],
        images: Sequence[ImageLike],
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
            answers = self._chat(
                [
                    ChatRequest(
                        requirements_messages(prompts[index], system),
                        max_tokens=self._max_tokens,
                        temperature=RETRY_TEMPERATURE if attempt else 0.0,
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

    def check(self, requirements: Sequence[Sequence[str]], images: Sequence[ImageLike]) -> list[Verification]:
        """Checks every image against its requirements, alone and in fresh conversations.

        Raises: ClvrError if there are not as many lists of requirements as images; ProviderError.
        """
        _same_number(len(requirements), len(images), "images")
        if self._mode == "describe":
            system = self._system(DESCRIPTION_PROMPT)
            described = self._chat(
                [
                    ChatRequest(description_messages(system), [image], self._max_tokens, top_logprobs=_TOP_LOGPROBS)
                    for image in images
                ]
            )
            return self._compare(requirements, described)
        system = self._system(QUESTION_PROMPT)
        pairs = [(row, text) for row, texts in enumerate(requirements) for text in texts]
        answers = self._chat(
            [
                ChatRequest(
                    question_messages(text, system), [images[row]], self._max_tokens, top_logprobs=_TOP_LOGPROBS
                )
                for row, text in pairs
            ]
        )
        checked = [self._checked(text, answer) for (_, text), answer in zip(pairs, answers, strict=True)]
        return self._gathered(requirements, checked, [""] * len(images))

    def check_plans(self, requirements: Sequence[Sequence[str]], plans: Sequence[str]) -> list[Verification]:
        """Checks plans in words, each as if it were a description that is certain.

        A model that was trained to describe compares a plan in the order in which it describes, row by row. Nothing is
        met by a plan that puts two things in one place.
        """
        _same_number(len(requirements), len(plans), "plans")
        if self._is_instructed:
            return self._compare(requirements, [ChatResponse(plan) for plan in plans])
        items = [plan_items(plan) for plan in plans]
        texts = [plan_text(in_reading_order(each)) or plan for each, plan in zip(items, plans, strict=True)]
        checked = self._compare(requirements, [ChatResponse(text) for text in texts])
        return [
            _impossible(verification, twice) if (twice := claimed_twice(each)) else verification
            for verification, each in zip(checked, items, strict=True)
        ]

    def _compare(self, requirements: Sequence[Sequence[str]], described: Sequence[ChatResponse]) -> list[Verification]:
        system = self._system(COMPARISON_PROMPT)
        descriptions = [answer.text.strip() for answer in described]
        pairs = [(row, text) for row, texts in enumerate(requirements) for text in texts]
        requests = [
            ChatRequest(
                comparison_messages(descriptions[row], text, system),
                max_tokens=self._max_tokens,
                top_logprobs=_TOP_LOGPROBS,
            )
            for row, text in pairs
        ]
        answers = self._chat(requests)
        if not self._is_instructed:
            self._ask_again(requests, answers, [(descriptions[row], text) for row, text in pairs])
        checked = [
            self._checked(text, answer, described[row]) for (row, text), answer in zip(pairs, answers, strict=True)
        ]
        return self._gathered(requirements, checked, descriptions)

    def _ask_again(
        self, requests: Sequence[ChatRequest], answers: list[ChatResponse], pairs: Sequence[tuple[str, str]]
    ) -> None:
        """Samples answers that contradict the description again, in place; those that always do stay as they are.

        Args:
          requests: the comparisons.
          answers: the answer to each.
          pairs: description and requirement of each.
        """

        def is_contradictory(index: int, answer: ChatResponse) -> bool:
            return not is_consistent(*pairs[index], answer.text.strip())

        remaining = [index for index, answer in enumerate(answers) if is_contradictory(index, answer)]
        for attempts in retry_rounds(self._comparison_retries):
            sampled = iter(
                self._chat(
                    [
                        replace(requests[index], temperature=RETRY_TEMPERATURE, seed=attempt)
                        for index in remaining
                        for attempt in attempts
                    ]
                )
            )
            for index in remaining:
                own = [next(sampled) for _ in attempts]
                good = (each for each in own if ANSWER.search(each.text) and not is_contradictory(index, each))
                answers[index] = next(good, answers[index])
            remaining = [index for index in remaining if is_contradictory(index, answers[index])]

    def _checked(self, requirement: str, answer: ChatResponse, description: ChatResponse | None = None) -> Requirement:
        text = answer.text.strip()
        match = ANSWER.search(text)
        if match is None:
            return Requirement(requirement, None, None, f"no answer in {text[:120]!r}")
        is_yes = match[1].lower() == "yes"
        evidence = text[: match.start()].strip().rstrip(".")
        probability = answer_probability(answer)
        # A model that was trained to quote supports its yes by a quotation that names what is required. A sampled "no"
        # may stand where a yes is more probable.
        is_unsupported = is_doubtful = False
        doubt = ""
        if description is not None and not self._is_instructed:
            is_probable = is_yes or (probability or 0.0) >= self._threshold
            is_unsupported = is_probable and not supports(description.text, requirement, evidence)
            if is_yes and not is_unsupported:
                is_doubtful = least_clause_probability(description, evidence) < self._clause_threshold
                clause = least_probable_clause(description, evidence)
                doubt = clause if place_of(clause) else ""
        is_met = is_yes and not (is_unsupported or is_doubtful)
        if probability is not None:
            certainty = 1.0
            if description is not None:
                certainty = 0.0 if is_unsupported else evidence_probability(description, evidence)
            # If the description is wrong where it matters, a yes is lost, and a no is anybody's guess.
            supported = certainty * probability
            probability = supported + (1 - certainty) * (1 - probability) / 2
            # Doubt about the description never turns a no into a yes.
            is_met = probability >= self._threshold and (is_yes or supported >= self._threshold) and not is_doubtful
        return Requirement(requirement, is_met, probability, evidence, "" if is_met else doubt)

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

    def _chat(self, questions: Sequence[ChatRequest]) -> list[ChatResponse]:
        answers = self._model.chat_all(questions) if questions else []
        for answer in answers:
            self.usage += answer.usage
        return answers


def read_requirements(reply: str) -> tuple[str, ...] | None:
    """The requirements that a reply lists, () if it says that there are none, None if it cannot be read."""
    match = _REQUIRED.search(reply)
    items = [item.strip() for item in match["items"].split(";")] if match else []
    items = [item for item in items if item]
    if not items:
        return None
    return () if len(items) == 1 and items[0].lower() in _NOTHING else tuple(items)


def _impossible(verification: Verification, places: Set[str]) -> Verification:
    """Returns the verification of a plan that puts two things in each of these places: nothing is met."""
    reason = f"two things in one place: {', '.join(sorted(places))}"
    unmet = tuple(Requirement(each.text, False, 0.0, reason) for each in verification.requirements)
    return replace(verification, requirements=unmet)


def _same_number(requirements: int, others: int, what: str) -> None:
    if requirements != others:
        raise ClvrError(f"verification: requirements for {requirements} {what}, but {others} {what} were given")
