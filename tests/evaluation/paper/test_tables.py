from dataclasses import replace

import numpy as np
import pytest

from clvr_jax.evaluation import Score, Shapes
from clvr_jax.evaluation.benchmarks.shapes import shapes_prompts
from clvr_jax.evaluation.comparison.systems import SystemResults
from clvr_jax.evaluation.harness.cost import mean_cost
from clvr_jax.evaluation.harness.run_directory import Record
from clvr_jax.evaluation.harness.summary import ScoredImage, summarize
from clvr_jax.evaluation.paper.corrections import Corrections
from clvr_jax.evaluation.paper.page import Measured, Section, write_page
from clvr_jax.evaluation.paper.rows import Row
from clvr_jax.evaluation.paper.tables import (
    by_phrasing,
    format_difference,
    format_interval,
    format_score,
    significant,
    systems_table,
    tiers_table,
)
from clvr_jax.evaluation.paper.timing import times_by_image_count
from clvr_jax.evaluation.statistics import Interval

SPLITS = {split: shapes_prompts(split, None, 24) for split in ("eval", "complex")}


def contestant(split, chance, seed, nfe=56):
    """Two runs that are right with a probability that falls with the number of objects."""
    rng = np.random.default_rng(seed)
    runs = []
    for _ in range(2):
        images = []
        for number, item in enumerate(Shapes().items(SPLITS[split])):
            score = Score.binary(bool(rng.random() < chance ** (item.tier or 1)))
            record = Record(item.prompt, 0, True, nfe=nfe, seconds=0.5, steps=2, outcome=None)
            images.append(ScoredImage(number, 0, item, score, record))
        pictures = [image.to_json() for image in images]
        judge = {"name": "shapes detector", "version": "1"}
        summary = {**summarize(Shapes(), images), "cost": mean_cost(pictures)}
        runs.append({"benchmark": "shapes", "judge": judge, "summary": summary, "pictures": pictures})
    return SystemResults("one", (), tuple(runs))


@pytest.fixture(scope="module")
def found():
    chances = {"base-one-shot": 0.6, "sft-loop": 0.95, "merged-loop": 0.94}
    return {
        name: {split: contestant(split, chance, number, 4 if name == "merged-loop" else 56) for split in SPLITS}
        for number, (name, chance) in enumerate(chances.items())
    }


def right(found, name, split):
    """Pictures that are right."""
    return sum(entry["correct"] for entry in found[name][split].pooled["pictures"])


def test_numbers_are_written_as_the_readme_has_them():
    assert format_interval(Interval(0.9346, 0.907, 1.0)) == ".935 [.907; 1.000]"
    assert format_difference({"difference": 0.036, "interval": (-0.0104, 0.061)}) == "+.036 [-.010; +.061]"
    assert format_difference({"difference": -0.5, "interval": (-1.0, 0.0)}) == "-.500 [-1.000; +.000]"


def test_holms_correction_stops_at_the_first_that_is_not_small_enough():
    parts = {name: {"p_value": p} for name, p in {"a": 0.04, "b": 0.01, "c": 0.02, "d": 0.2}.items()}
    assert significant(parts) == ["b"]  # .01 < .05 / 4; .02 > .05 / 3, and so for what is larger
    assert significant({"a": {"p_value": 0.04}}) == ["a"]
    assert significant({}) == []


def test_a_line_has_both_splits_and_the_paired_difference_over_all_prompts(found):
    lines = systems_table({"base-one-shot": "base", "merged-loop": "merged"}, found, "base-one-shot")
    assert len(lines) == 4
    base, merged = (line.split(" | ") for line in lines[2:])
    assert base[3:5] == ["", ""]
    shares = {name: [right(found, name, split) for split in SPLITS] for name in ("base-one-shot", "merged-loop")}
    assert merged[1].startswith(format_score(shares["merged-loop"][0] / 48))
    difference = (sum(shares["merged-loop"]) - sum(shares["base-one-shot"])) / 96
    assert merged[3].startswith(format_score(difference, "+"))
    assert merged[5:] == ["4.0", "0.50 |"]


def test_tiers_are_those_of_the_prompts_and_the_area_is_full_for_what_never_fails(found):
    perfect = {
        split: replace(
            own,
            runs=tuple(
                {**run, "pictures": [{**entry, "correct": True, "score": 1.0} for entry in run["pictures"]]}
                for run in own.runs
            ),
        )
        for split, own in found["sft-loop"].items()
    }
    lines = tiers_table({"sft-loop": "SFT", "p": "perfect"}, {**found, "p": perfect}, SPLITS)
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == [
        "3 objects", "4 objects", "5 objects", "6 objects", "area of the probe",
    ]  # fmt: skip
    area, full = (float(cell.strip("| ")) for cell in lines[-1].split(" | ")[1:])
    assert full == 100
    assert 50 < area < 100


def test_phrasings_are_compared_apart(found):
    parts = by_phrasing(found["sft-loop"]["eval"], found["merged-loop"]["eval"], SPLITS["eval"])
    assert sum(part["prompts"] for part in parts.values()) == 24
    assert set(parts) == {f"{entry['tag']}, phrasing {entry['phrasing']}" for entry in SPLITS["eval"]}


def test_times_are_medians_by_number_of_drawings():
    times = [
        {
            "images": generated,
            "nfe": 4 * generated,
            "seconds": seconds,
            "generation_seconds": seconds / 2,
            "diffusion_seconds": seconds / 4,
        }
        for generated, seconds in ((1, 1.0), (2, 3.0), (2, 5.0), (2, 40.0), (0, 9.0))
    ]
    groups = times_by_image_count(times)
    assert list(groups) == [1, 2]
    expected = {
        "prompts": 3,
        "nfe": 8,
        "seconds": 5.0,
        "generation_seconds": 2.5,
        "per_generation": 1.25,
        "diffusion": 0.625,
    }
    assert groups[2] == expected


def test_the_page_says_what_was_measured_and_shows_its_plots(found, tmp_path):
    times = {
        1: {
            "prompts": 3,
            "nfe": 56.0,
            "seconds": 2.0,
            "generation_seconds": 1.0,
            "per_generation": 1.0,
            "diffusion": 0.9,
        }
    }
    fast = {1: {**times[1], "nfe": 4.0, "per_generation": 0.08, "diffusion": 0.06}}
    one = {"additivity_error": 0.25, "angle": 80.0}
    point = {"limit": 1, "accuracy": 0.625, "low": 0.4, "high": 0.8, "nfe": 56.0, "seconds": 0.5}
    rows = {
        "base-one-shot": Row("base", "base", "one-shot"),
        "sft-loop": Row("SFT", "sft"),
        "merged-loop": Row("merged", "merged"),
    }
    # The strip needs pictures on disk; without a prompt that shows the loop there is none.
    shot = found["base-one-shot"]["complex"]
    first = {**shot.runs[0], "pictures": [{**entry, "correct": True} for entry in shot.runs[0]["pictures"]]}
    solved = replace(shot, runs=(first, *shot.runs[1:]))
    measured = Measured(
        command="make paper",
        rows=rows,
        found={**found, "base-one-shot": {**found["base-one-shot"], "complex": solved}},
        metadata=SPLITS,
        aligned="sft-loop",
        merged="merged-loop",
        times={"sft-loop": times, "merged-loop": fast},
        interactions={"levels": {"0.5": one}, "scales": {"1.0": one}, "scales_at": 0.7},
        norms={"distill": 0.03, "align": 0.16, "cosine": -0.01},
        scaling={
            "complex": {
                "benchmark": "shapes",
                "judge": {"name": "shapes detector", "version": "1"},
                "prompts": 24,
                "systems": [
                    {
                        "name": "best of 8",
                        "settings": {"mode": "best-of"},
                        "curves": {kind: [point] for kind in ("images", "nfe", "seconds")},
                        "perfect_choice": [{**point, "accuracy": 0.75}],
                        "gain": {"difference": 0.25, "interval": [0.125, 0.5], "won": 6, "lost": 0, "p_value": 0.03125},
                    }
                ],
            }
        },
        corrections={"merged-loop": Corrections(24, 10, 5, 18, 2, 3)},
        seconds={"a": 1800.0},
    )
    sections = [
        Section("Parts", "All of them.", ("base-one-shot", "pprl-loop", "merged-loop"), "base-one-shot", "a.png")
    ]
    write_page(tmp_path / "results.md", measured, sections, ("base-one-shot", "sft-loop"))
    text = (tmp_path / "results.md").read_text()
    assert "24 of `eval`, 24 of `complex`; images of each: 2" in text
    assert "pprl" not in text
    assert "(number of images): 12.5 (1);\nof its diffusion: 15.0 (1)." in text
    assert "distillation 3.00%, alignment 16.00%" in text
    assert "took 0.5 hours" in text
    assert "| best of 8 | .625 | +.250 [+.125; +.500], p = 0.031 |" in text
    assert "| best of 8, chosen by the detector | .750 |  |" in text
    assert "| merged | 10 | .500 [.237; .763] of 10 | 18 | .111 [.031; .328] of 18 | .125 [.043; .310] of 24 |" in text
    for name in ("a.png", "tiers.png", "seconds.png", "changes.png", "complex/scaling.png"):
        assert f"(results/{name})" in text
        assert (tmp_path / "results" / name).read_bytes().startswith(b"\x89PNG")
