import io
import json

import pytest
from rich.console import Console

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation import Item, Score, Shapes, results_table
from clvr_jax.evaluation.harness.cost import cost_line, mean_cost
from clvr_jax.evaluation.harness.summary import ScoredImage, summarize
from clvr_jax.evaluation.statistics import wilson_interval


def images():
    counts = [("zebra", None, 1, 2), ("complex", 3, 1, 1), ("complex", 4, 0, 3), ("counting", None, 3, 4)]
    rows = []
    for tag, tier, correct, number in counts:
        for image in range(number):
            item = Item(f"{len(rows):05d}", f"p{len(rows)}", tag, {}, tier)
            rows.append(ScoredImage(len(rows), 0, item, Score.binary(image < correct)))
    return rows


COSTS = [
    {"nfe": 8, "seconds": float(number), "steps": 2, "outcome": "accepted"} for number in (0, 1, 0, 0, 1, 2, 0, 1, 2, 3)
]


def test_summary_counts_tags_and_tiers():
    summary = summarize(Shapes(), images())
    assert list(summary["tags"]) == ["counting", "complex", "zebra"]
    assert summary["tags"]["complex"]["correct"] == 1
    assert summary["tiers"]["4"] == {
        "correct": 0,
        "accuracy": 0.0,
        "score": 0.0,
        "interval": [0.0, wilson_interval(0, 3).high],
        "prompts": 3,
        "pictures": 3,
    }
    assert json.loads(json.dumps(summary)) == summary


def test_overall_is_the_mean_of_tags_and_not_of_pictures():
    overall = summarize(Shapes(), images())["overall"]
    assert overall["score"] == overall["mean_of_tags"] == pytest.approx((3 / 4 + 1 / 4 + 1 / 2) / 3)
    assert overall["over_pictures"]["accuracy"] == 0.5
    assert overall["interval"][0] < overall["mean_of_tags"] < overall["interval"][1]


def test_cost_per_picture():
    cost = mean_cost(COSTS)
    assert (cost["nfe_per_picture"], cost["seconds_per_picture"]) == (8, 1.0)
    assert cost["median_seconds_per_picture"] == 1.0
    assert (cost["steps"], cost["outcomes"]) == ({"2": 10}, {"accepted": 10})
    assert cost["dollars"] is None
    paid = {"input_tokens": 90, "output_tokens": 10, "dollars": 0.5, "device": "TPU v6 lite x 8", "nfe": None}
    line = cost_line(mean_cost([paid, paid]))
    assert "90 + 10 tokens per image" in line
    assert "$1.00 in total" in line
    assert "devices: TPU v6 lite x 8 x 2" in line
    assert mean_cost([{}])["nfe_per_picture"] is None
    assert cost_line(mean_cost([])) == "cost not recorded"


def test_tables_show_every_row():
    table = results_table({"summary": {**summarize(Shapes(), images()), "cost": mean_cost(COSTS)}}, "toy")
    text = "\n".join(table.markdown())
    assert "| counting | 0.750 | 0.301 .. 0.954 | 3 / 4 |" in text
    assert "| tier 4 | 0.000 | 0.000 .. 0.561 | 0 / 3 |" in text
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table.rich())
    shown = console.export_text()
    assert "8.0 NFE per image; 1.00 s per image" in shown
    for name in ("counting", "complex", "zebra", "mean of tags", "over images", "tier 3", "tier 4"):
        assert name in shown


def test_nothing_to_report_is_an_error():
    with pytest.raises(ClvrError, match="no scored images"):
        summarize(Shapes(), [])
