import json

import pytest

from clvr_jax.cli import main
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.evaluation import ImageChecker, Score, compare, load_results
from clvr_jax.evaluation.comparison.systems import SystemResults, compare_systems, load_systems
from clvr_jax.evaluation.reporting.comparison import comparison_markdown
from clvr_jax.files.atomic_io import read_json, write_json
from clvr_jax.interfaces import ImageResponse, Usage
from clvr_jax.worlds.shapes.prompts import evaluation_prompts
from tests.evaluation.runs import run_function
from tests.reasoning.scripted import picture

METADATA = [*evaluation_prompts("complex")[::12], *evaluation_prompts("eval")[::40]]


def made(out, skill, seed=0, samples=1, prompts=METADATA, judge="bright"):
    """A run that is right where the prompt is shorter than `skill` words, and now and then elsewhere."""

    def draw_all(texts, seeds):
        usage = Usage(input_tokens=10 * skill, dollars=0.01)
        return [
            ImageResponse(picture(200 if len(text.split()) < skill or own % 7 == 0 else 0), usage)
            for text, own in zip(texts, seeds, strict=True)
        ]

    bright = ImageChecker(judge, "1", lambda image, metadata: Score.binary(bool(image.mean() > 100)))
    run_function(prompts, draw_all, out, bright, settings={"skill": skill}, seed=seed, samples=samples, device="here")
    return str(out)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {
        "weak": made(root / "weak", 8),
        "good-0": made(root / "good-0", 16),
        "good-1": made(root / "good-1", 16, seed=1),
        "best": made(root / "best", 40),
    }


def test_runs_with_other_seeds_are_one_system(runs):
    weak, good, best = load_systems([runs["weak"], f"good={runs['good-0']}", runs["good-1"], runs["best"]])
    assert [one.name for one in (weak, good, best)] == ["weak", "good (2 seeds)", "best"]
    comparison = compare_systems([weak, good, best])
    assert [system["seeds"] for system in comparison["systems"]] == [[0], [0, 1], [0]]
    overall = [system["overall"] for system in comparison["systems"]]
    assert [part["pictures"] for part in overall] == [len(METADATA), 2 * len(METADATA), len(METADATA)]
    assert {part["prompts"] for part in overall} == {comparison["prompts"]} == {len(METADATA)}
    assert overall[0]["score"] < overall[1]["score"] < overall[2]["score"]
    assert all(part["interval"][0] < part["score"] < part["interval"][1] for part in overall)

    pair = comparison["against_first"][1]
    alone = compare(read_json(weak.directories[0] / "results.json"), read_json(best.directories[0] / "results.json"))
    assert {key: pair[key] for key in alone} == alone
    assert pair["holm"] >= pair["overall"]["p_value"]
    assert comparison["systems"][0]["reported"] == pytest.approx(comparison["systems"][0]["mean_of_tags"])


def test_cost_and_complexity_stand_beside_the_scores(runs):
    comparison = compare_systems(load_systems([runs["weak"], runs["good-0"], runs["best"]]))
    cost = comparison["systems"][0]["cost"]
    assert (cost["input_tokens_per_picture"], cost["devices"]) == (80, {"here": len(METADATA)})
    assert cost["dollars"] == pytest.approx(0.01 * len(METADATA))
    areas = [comparison["complexity"]["systems"][name]["area"] for name in ("weak", "good-0", "best")]
    assert areas[0] < areas[1] <= areas[2]
    assert json.loads(json.dumps(comparison)) == comparison
    text = comparison_markdown(comparison)
    assert f"| complex ({sum(entry['tag'] == 'complex' for entry in METADATA)}) |" in text
    assert f"${0.01 * len(METADATA):.2f} in total" in text
    assert "area under the pass curve" in text


def test_the_command_writes_the_report(runs, tmp_path, capsys):
    out = tmp_path / "report"
    words = [f"a={runs['weak']}", f"b={runs['best']}/results.json", "--out", str(out)]
    assert main(["eval", "compare", *words]) == 0
    assert "p (Holm)" in capsys.readouterr().out
    names = {"comparison.json", "comparison.md", "scores.png", "cost.png", "complexity.png"}
    assert {path.name for path in out.iterdir()} == names
    assert main(["eval", "compare", *words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told["files"]) == names
    assert read_json(out / "comparison.json")["against_first"] == told["against_first"]


def test_results_without_their_pictures_have_no_complexity(runs, tmp_path):
    for name in ("weak", "best"):
        write_json(tmp_path / f"{name}.json", load_results(runs[name]))
    comparison = compare_systems(load_systems([f"weak={tmp_path / 'weak.json'}", f"best={tmp_path / 'best.json'}"]))
    assert comparison["complexity"] is None
    assert (
        comparison["systems"][0]["overall"]
        == compare_systems(load_systems([runs["weak"], runs["best"]]))["systems"][0]["overall"]
    )


def test_scores_in_a_unit_of_their_own(runs):
    first, second = (load_results(runs[name]) for name in ("weak", "best"))
    for results in (first, second):
        results["unit"] = "0 to 10"
        for entry in results["pictures"]:
            entry.update(score=8.5 if entry["correct"] else 2.5, correct=None)
    comparison = compare_systems(
        [SystemResults(name, (), (results,)) for name, results in (("a", first), ("b", second))]
    )
    right = sum(entry["score"] > 5 for entry in first["pictures"]) / len(METADATA)
    overall = comparison["systems"][0]["overall"]
    assert overall["score"] == pytest.approx(2.5 + 6 * right)
    assert 2.5 < overall["interval"][0] < overall["score"] < overall["interval"][1] < 8.5
    assert (comparison["unit"], comparison["complexity"]) == ("0 to 10", None)


def test_what_makes_no_comparison_is_refused(runs, tmp_path):
    with pytest.raises(UsageError, match="give at least two systems"):
        load_systems([runs["good-0"], runs["good-1"]])
    with pytest.raises(UsageError, match="the same system with the same seed"):
        load_systems([runs["weak"], runs["best"], runs["weak"]])
    with pytest.raises(UsageError, match="two systems are called x"):
        load_systems([f"x={runs['weak']}", f"x={runs['best']}"])
    with pytest.raises(ClvrError, match="no such file"):
        load_systems([runs["weak"], str(tmp_path / "none")])
    other = made(tmp_path / "other", 8, judge="strict")
    with pytest.raises(ClvrError, match="judge differs"):
        compare_systems(load_systems([runs["weak"], other]))
    fewer = made(tmp_path / "fewer", 9, prompts=METADATA[:5])
    with pytest.raises(ClvrError, match="in one result only"):
        compare_systems(load_systems([runs["weak"], fewer]))
