import copy
import json

import numpy as np
import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation import compare, load_results
from clvr_jax.evaluation.comparison.pairs import comparison_table
from clvr_jax.evaluation.statistics import sign_test
from clvr_jax.files.atomic_io import write_json


def result(verdicts, tags=None, samples=1):
    pictures = [
        {
            "index": index // samples,
            "sample": index % samples,
            "prompt": f"p {index // samples}",
            "tag": tags[index // samples] if tags else "colors",
            "tier": index // samples % 2,
            "correct": bool(correct),
        }
        for index, correct in enumerate(verdicts)
    ]
    return {"benchmark": "shapes", "judge": {"name": "d", "version": "1"}, "pictures": pictures}


def test_difference_test_and_interval():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 2, 200)
    second = np.where(rng.random(200) < 0.4, 1, first)
    part = compare(result(first), result(second))["overall"]
    assert part["prompts"] == 200
    assert part["difference"] == pytest.approx(second.mean() - first.mean())
    assert part["interval"][0] < part["difference"] < part["interval"][1]
    test = sign_test(first.tolist(), second.tolist())
    assert (part["first_wins"], part["second_wins"], part["p_value"]) == (0, test.second_wins, test.p_value)


def test_order_of_the_pictures_does_not_matter():
    first, second = result([1, 0, 1, 0]), result([1, 1, 0, 0])
    shuffled = {**second, "pictures": second["pictures"][::-1]}
    assert compare(first, shuffled) == compare(first, second)


def test_tags_tiers_and_mean_of_tags():
    tags = ["colors"] * 6 + ["counting"] * 2
    outcome = compare(result([0] * 8, tags), result([1] * 3 + [0] * 3 + [1] * 2, tags))
    assert outcome["tags"]["colors"]["difference"] == 0.5
    assert outcome["tags"]["counting"]["difference"] == 1.0
    assert outcome["mean_of_tags"]["difference"] == 0.75
    assert set(outcome["tiers"]) == {"0", "1"}
    assert outcome["overall"]["difference"] == 5 / 8
    text = "\n".join(comparison_table(outcome, "base", "loop").markdown())
    assert "| colors | 0.000 | 0.500 | +0.500 |" in text
    assert "| mean of tags |  |  | +0.750 |" in text


def test_several_pictures_of_a_prompt_count_as_one_pair():
    part = compare(result([1, 1, 0, 0], samples=4), result([1, 1, 1, 1], samples=4))["overall"]
    assert (part["prompts"], part["first"], part["second_wins"], part["p_value"]) == (1, 0.5, 1, 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda other: other.update(benchmark="geneval"), "benchmark differs"),
        (lambda other: other["judge"].update(version="2"), "judge differs"),
        (lambda other: other["pictures"].pop(), "1 and 0 prompts are in one result only"),
        (lambda other: other["pictures"][0].update(prompt="q"), "1 and 1 prompts are in one result only"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, message):
    first = result([1, 0])
    other = copy.deepcopy(first)
    change(other)
    with pytest.raises(ClvrError, match=message):
        compare(first, other)


def test_results_are_read_from_file_or_folder(tmp_path):
    write_json(tmp_path / "results.json", result([1]))
    assert load_results(tmp_path) == load_results(tmp_path / "results.json") == result([1])
    write_json(tmp_path / "other.json", {"benchmark": "x"})
    with pytest.raises(ClvrError, match="lacks judge, pictures"):
        load_results(tmp_path / "other.json")
    with pytest.raises(ClvrError, match="no such file"):
        load_results(tmp_path / "none")


@pytest.mark.parametrize(
    ("field", "value"),
    [("index", -1), ("index", "0"), ("prompt", 3), ("tag", None), ("tier", "hard"), ("correct", "yes"), ("nfe", "4"),
     ("seconds", float("nan")), ("outcome", ["x"]), ("score", "8")],
)  # fmt: skip
def test_fields_of_results_have_their_types(field, value, tmp_path):
    bad = result([1, 0])
    bad["pictures"][1][field] = value
    (tmp_path / "results.json").write_text(json.dumps(bad))
    with pytest.raises(ClvrError, match=rf"results\.json: pictures\[1\]: {field} must be "):
        load_results(tmp_path)


def test_results_without_pictures_or_with_broken_texts_are_refused(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({**result([]), "pictures": []}))
    with pytest.raises(ClvrError, match="'pictures' is empty"):
        load_results(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({**result([1]), "benchmark": "\ud800"}))
    with pytest.raises(ClvrError, match="lone surrogate"):
        load_results(tmp_path)
