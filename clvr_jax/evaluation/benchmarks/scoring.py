"""Marks of all pictures of a benchmark -> results.json."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from clvr_jax.evaluation.benchmarks.benchmark import Benchmark, JudgedBenchmark, Mark, rubric
from clvr_jax.evaluation.benchmarks.geneval import Detector, recorded_mark
from clvr_jax.evaluation.benchmarks.judging import AnswerFile, JudgeModel, Subject, ask_all
from clvr_jax.evaluation.benchmarks.pictures import Pictures, Place
from clvr_jax.evaluation.benchmarks.summary import summarize
from clvr_jax.evaluation.report import mean_cost
from clvr_jax.files import write_json
from clvr_jax.reasoning.images import read_encoded
from clvr_jax.reasoning.tools import Usage
from clvr_jax.reasoning.trajectory import package_versions

Progress = Callable[[int, int], None]


def score_judged(
    benchmark: JudgedBenchmark, pictures: Pictures, judge: JudgeModel, on_progress: Progress | None = None
) -> dict[str, Any]:
    """Has a judge look at all pictures; replies that are on disk are not asked for again.

    Args:
      benchmark: by whose rules; of the same prompts as the pictures'.
      pictures: what is looked at.
      judge: who looks.
      on_progress: called with (pictures done, pictures in all).
    Returns: the content of results.json, see `results`.
    Raises: ClvrError, one line; replies that came before are kept.
    """
    subjects, places = [], []
    for (index, sample), path in pictures.files.items():
        item = pictures.items[index]
        asked = benchmark.questions(item)
        if path is not None and asked:
            shown = partial(benchmark.shown, path, sample, pictures.samples)
            subjects.append(Subject(f"{item.id}/{sample}", shown, asked))
            places.append((index, sample))
    answers = AnswerFile(pictures.folder.root / "replies", judge)
    try:
        judged = ask_all(judge, subjects, answers, benchmark.attempts, on_progress)
    finally:
        answers.close()
    said = dict(zip(places, judged, strict=True))
    marks: dict[Place, Mark | None] = {}
    for (index, sample), path in pictures.files.items():
        if path is None:
            marks[index, sample] = _undrawn(pictures, (index, sample))
        elif (about := said.get((index, sample))) is not None:
            mark = benchmark.mark(pictures.items[index], about.found)
            marks[index, sample] = replace(mark, refused=about.is_refused)
        else:
            marks[index, sample] = None
    # Another wording of a rubric is another judge: scores that differ in it are never compared.
    texts = "".join(rubric(name) for name in benchmark.rubrics)
    owner = {
        "name": judge.model.name,
        "revision": judge.revision,
        "rubric": hashlib.sha256(texts.encode()).hexdigest()[:16],
    }
    usage = sum((about.usage for about in judged), Usage())
    adapted = sorted(frozenset[str]().union(*(about.adapted for about in judged)))
    return results(benchmark, pictures, marks, owner, usage, adapted)


def score_detected(pictures: Pictures, detector: Detector, on_progress: Progress | None = None) -> dict[str, Any]:
    """Scores GenEval's pictures by what a detector finds, recorded for the next time. See `score_judged`."""
    marks: dict[Place, Mark | None] = {}
    for number, (place, path) in enumerate(pictures.files.items()):
        if on_progress:
            on_progress(number, len(pictures.files))
        if path is None:
            marks[place] = _undrawn(pictures, place)
            continue
        record = pictures.folder.home(place[0]) / "detections" / f"{place[1]:04d}.json"
        marks[place] = recorded_mark(record, read_encoded(path), pictures.items[place[0]], detector)
    if on_progress:
        on_progress(len(pictures.files), len(pictures.files))
    owner = {"name": detector.name, "revision": detector.revision}
    return results(pictures.benchmark, pictures, marks, owner, Usage())


def results(
    benchmark: Benchmark,
    pictures: Pictures,
    marks: Mapping[Place, Mark | None],
    judge: Mapping[str, Any],
    usage: Usage,
    adapted: Sequence[str] = (),
) -> dict[str, Any]:
    """Sums up, and writes results.json.

    Args:
      benchmark: by whose rules.
      pictures: that were marked.
      marks: None for pictures that the rules leave out.
      judge: who marked; scores of different judges are never compared.
      usage: what the judge cost.
      adapted: what the requests to the judge lacked since its server refuses it, in words.
    Returns: {"benchmark", "judge", "adapted", "settings", "seed", "samples", "unit", "faults", "summary", "pictures",
      "versions"}; "summary" is {"tags": {tag: group}, "overall": group or {"score": None, "reason"}, "parts",
      "unreadable", "refused", "left_out", "cost", "judging"} with group = {"score", "interval", "prompts", "pictures"};
      intervals are 95 %.
    """
    rows = []
    for (index, sample), mark in marks.items():
        if mark is None:
            continue
        item, record = pictures.items[index], pictures.records.get((index, sample))
        rows.append(
            {
                "index": index,
                "sample": sample,
                "id": item.id,
                "prompt": item.prompt,
                "tag": item.tag,
                "tier": None,
                **asdict(mark),
                "reasons": list(mark.reasons),
                **({} if record is None else record.cost()),
            }
        )
    content = {
        "benchmark": benchmark.scored_as,
        "judge": dict(judge),
        "adapted": list(adapted),
        **pictures.made_by,
        "samples": pictures.samples,
        "unit": benchmark.unit,
        "faults": list(benchmark.faults),
        "summary": {
            **summarize(benchmark, rows),
            "cost": mean_cost(list(pictures.records.values())),
            "left_out": sorted({pictures.items[index].id for (index, _), mark in marks.items() if mark is None}),
            "judging": {name: value for name, value in asdict(usage).items() if value},
        },
        "pictures": rows,
        "versions": package_versions(),
    }
    write_json(pictures.folder.root / "results.json", content)
    return content


def _undrawn(pictures: Pictures, place: Place) -> Mark:
    """The mark where there is no picture: a closed loop that ended without one has failed."""
    binary = pictures.benchmark.is_binary
    return Mark(0.0, False if binary else None, reasons=(f"no picture was drawn ({pictures.records[place].outcome})",))
