"""Runs the verifier benchmark: makes the cases, has them checked, and writes results.json and verifier.md."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from clvr_jax.display.console import progress
from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.benchmarks.shapes import SHAPES_JUDGE_VERSION
from clvr_jax.evaluation.verifier.cases import Case, control_cases, rendered_cases, sample_prompts
from clvr_jax.evaluation.verifier.generated import generated_cases
from clvr_jax.evaluation.verifier.image_directory import load_image
from clvr_jax.evaluation.verifier.metrics import CheckedCase, summarize
from clvr_jax.evaluation.verifier.report import VerifierResults, markdown
from clvr_jax.files.atomic_io import write_json, write_text
from clvr_jax.files.json_input import JSON
from clvr_jax.interfaces import ProviderError, Usage
from clvr_jax.reasoning.conversation.protocols import ImageGenerator
from clvr_jax.reasoning.trajectories.trajectory import package_versions
from clvr_jax.reasoning.verification.verification import Verification, Verifier

BENCHMARK = "verifier"
RESULTS, TABLE = "results.json", "verifier.md"
BATCH_SIZE = 64
_TOLERATED_FAULTS = ("refused", "malformed")
"""Faults of a provider that concern one question, not all of them."""

Row = TypeVar("Row")
Reply = TypeVar("Reply")


def evaluate(
    verifier: Verifier,
    out: Path | None,
    *,
    count: int = 300,
    seed: int = 0,
    generators: Mapping[str, Callable[[], ImageGenerator]] | None = None,
    images: Sequence[Case] = (),
    settings: Mapping[str, JSON] | None = None,
    batch_size: int = BATCH_SIZE,
    exact_requirements: bool = False,
) -> VerifierResults:
    """Runs the benchmark and writes its results; a run that fails writes none.

    Args:
      verifier: checks the images.
      out: directory for results.json and verifier.md; None writes nothing.
      count: number of prompts of the shapes world, which is the number of images of each kind; 0 for `images` only.
      seed: of prompts, renderings and generated images.
      generators: name -> function that loads the generator; each generates one image for each prompt.
      images: labeled images, as `image_directory.labeled_images` returns them.
      settings: JSON values to record, such as the model.
      batch_size: images that are checked together.
      exact_requirements: give the verifier the exact requirements where they are known; it derives them otherwise.
    Returns: the content of results.json, with the summary of `metrics.summarize`.
    Raises: ClvrError, one line.
    """
    began = time.monotonic()
    cases = [*_shapes_cases(count, seed, generators or {}), *images]
    if not cases:
        raise ClvrError("verifier benchmark: nothing to check; give a count above 0, or labeled images")
    checked, derived = check_cases(verifier, cases, batch_size, exact_requirements)
    summary = summarize(checked, derived)
    results: VerifierResults = {
        "benchmark": BENCHMARK,
        "verifier": verifier.name,
        "settings": {
            **(settings or {}),
            "requirements": "exact" if exact_requirements else "derived",
            "count": count,
            "generators": list(generators or {}),
            "images": len(images),
        },
        "seed": seed,
        "adapted": list(getattr(verifier, "adapted", ())),
        "summary": summary,
        "usage": {**asdict(getattr(verifier, "usage", Usage())), "seconds": time.monotonic() - began},
        "versions": {**package_versions("jax", "scipy"), "shapes detector": SHAPES_JUDGE_VERSION},
        "cases": [each.to_dict() for each in checked],
    }
    if out is not None:
        write_text(out / TABLE, markdown(results))
        # results.json is written last: where it exists, the run is complete.
        write_json(out / RESULTS, results)
    return results


def _shapes_cases(count: int, seed: int, generators: Mapping[str, Callable[[], ImageGenerator]]) -> list[Case]:
    prompts = sample_prompts(count, seed)
    cases = [*rendered_cases(prompts, seed), *control_cases(prompts, seed)]
    for name, load in generators.items() if prompts else ():
        generator = load()
        with progress(f"verifier benchmark, generating with {name}", len(prompts)) as advance:
            cases += generated_cases(generator, name, prompts, seed, on_progress=advance)
    return cases


def check_cases(
    verifier: Verifier, cases: Sequence[Case], batch_size: int = BATCH_SIZE, exact_requirements: bool = False
) -> tuple[list[CheckedCase], list[tuple[Case, tuple[str, ...] | None]]]:
    """Derives the requirements of each prompt once, and checks each image against those of its prompt.

    Args: as for `evaluate`.
    Returns: the checked cases, in order; and, for each prompt whose exact requirements are known and which was derived,
      a case with the prompt and the derived requirements, None if the verifier derives none.
    Raises: ClvrError if none of the first prompts yields requirements; ProviderError.
    """
    known = {case.prompt: case for case in cases if case.requirements is not None}
    given: Derived = {prompt: (case.requirements, "") for prompt, case in known.items()} if exact_requirements else {}
    asked = [prompt for prompt in dict.fromkeys(case.prompt for case in cases) if prompt not in given]
    derived = given | _derive(verifier, asked, batch_size)
    checked: list[CheckedCase] = []
    with progress("verifier benchmark, checking images", len(cases)) as advance:
        for begin in range(0, len(cases), batch_size):
            checked += _check(verifier, cases[begin : begin + batch_size], derived)
            advance(len(checked))
    return checked, [(case, derived[prompt][0]) for prompt, case in known.items() if prompt not in given]


Derived = dict[str, tuple[tuple[str, ...] | None, str]]
"""Prompt -> its requirements, None if there are none to be had; and why."""


def _derive(verifier: Verifier, prompts: Sequence[str], batch_size: int) -> Derived:
    found: Derived = {}
    if not prompts:
        return found
    with progress("verifier benchmark, deriving requirements", len(prompts)) as advance:
        for begin in range(0, len(prompts), batch_size):
            batch = prompts[begin : begin + batch_size]
            # A reply that cannot be read is a ClvrError: it counts against the verifier and does not end the run.
            answered = _tolerant(verifier.derive, batch, lambda error: not isinstance(error, ProviderError))
            found.update(zip(batch, answered, strict=True))
            if begin == 0 and all(requirements is None for requirements, _ in answered):
                raise ClvrError(
                    f"verifier benchmark: no requirements for any of the first {len(batch)} prompts; "
                    f"{answered[0][1].removeprefix('verification: ')}"
                )
            advance(len(found))
    return found


def _check(verifier: Verifier, cases: Sequence[Case], derived: Derived) -> list[CheckedCase]:
    rows = [(case, requirements) for case in cases if (requirements := derived[case.prompt][0]) is not None]

    def check(batch: Sequence[tuple[Case, tuple[str, ...]]]) -> list[Verification]:
        return verifier.check([texts for _, texts in batch], [load_image(case) for case, _ in batch])

    answers = iter(_tolerant(check, rows, lambda error: False)) if rows else iter(())
    return [
        CheckedCase(case, *next(answers)) if requirements is not None else CheckedCase(case, None, problem)
        for case in cases
        for requirements, problem in (derived[case.prompt],)
    ]


def _tolerant(
    call: Callable[[Sequence[Row]], Sequence[Reply]], rows: Sequence[Row], tolerates: Callable[[ClvrError], bool]
) -> list[tuple[Reply | None, str]]:
    """Calls with all rows, or with each of them if that fails for a reason that may concern one row only.

    Returns: for each row its reply and "", or None and what went wrong.
    """

    def concerns_one(error: ClvrError) -> bool:
        return tolerates(error) or (isinstance(error, ProviderError) and error.fault in _TOLERATED_FAULTS)

    try:
        return [(reply, "") for reply in call(rows)]
    except ClvrError as error:
        if not concerns_one(error):
            raise
    found: list[tuple[Reply | None, str]] = []
    for row in rows:
        try:
            (reply,) = call([row])
            found.append((reply, ""))
        except ClvrError as error:
            if not concerns_one(error):
                raise
            found.append((None, str(error)))
    return found
