import pytest

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.evaluation.benchmarks.shapes import shapes_prompts
from clvr_jax.evaluation.systems.models import Oracle, _identity, _usage_per_prompt, budget_for_mode, non_default_fields
from clvr_jax.interfaces import Usage
from clvr_jax.reasoning import Budget, Conversation, parse
from clvr_jax.worlds.shapes.prompts import evaluation_prompts


def test_a_short_run_still_meets_every_tag_and_tier():
    assert {entry["tag"] for entry in shapes_prompts("eval", limit=12)} == {
        entry["tag"] for entry in evaluation_prompts("eval")
    }
    assert [entry["tier"] for entry in shapes_prompts("complex", limit=4)] == [3, 4, 5, 6]
    assert shapes_prompts("complex", limit=1000) == shapes_prompts("complex") == evaluation_prompts("complex")


def test_the_oracle_plans_what_each_prompt_asks_for():
    entries = evaluation_prompts("complex")[:2]
    replies = Oracle(entries).reply([Conversation(entry["prompt"]) for entry in reversed(entries)])
    for entry, reply in zip(reversed(entries), replies, strict=True):
        plan = parse(reply, has_image=False).reasoning
        for item in entry["include"]:
            assert item["color"] + " " + item["class"] in plan


def test_the_oracle_refuses_a_prompt_with_two_meanings():
    first, second = evaluation_prompts("eval")[:2]
    Oracle([first, dict(first)])
    with pytest.raises(ClvrError, match="two meanings"):
        Oracle([first, {**second, "prompt": first["prompt"]}])


def test_a_model_that_was_trained_further_is_another_model(tmp_path):
    weights = {}
    for part in ("transformer", "controller"):
        (tmp_path / part).mkdir()
        weights[part] = tmp_path / part / "diffusion_pytorch_model.safetensors"
        weights[part].write_bytes(bytes(3 << 20))
    (tmp_path / "model_index.json").write_text("{}")
    before = _identity(str(tmp_path))
    weights["controller"].write_bytes(bytes(3 << 20)[:-1] + b"1")
    assert _identity(str(tmp_path)) == before  # one shot has no controller
    weights["transformer"].write_bytes(bytes(3 << 20)[:-1] + b"1")
    assert _identity(str(tmp_path)) != before
    after = _identity(str(tmp_path), "controller")
    weights["controller"].write_bytes(bytes(3 << 20))
    assert _identity(str(tmp_path), "controller") != after


def test_what_a_batch_spent_is_divided_without_a_rest():
    before = Usage(calls=3, input_tokens=10, output_tokens=1, dollars=0.5)
    after = Usage(calls=9, input_tokens=110, output_tokens=12, dollars=2.0)
    shares = _usage_per_prompt(before, after, 7)
    assert sum(share.input_tokens for share in shares) == 100
    assert {share.input_tokens for share in shares} == {14, 15}
    assert sum(share.output_tokens for share in shares) == 11
    assert sum(share.dollars for share in shares) == pytest.approx(1.5)


def test_modes_are_budgets_of_the_loop():
    assert budget_for_mode("closed-loop", None) == Budget()
    once = budget_for_mode("open-loop", Budget(max_steps=5, candidates=3, max_nfe=9))
    assert (once.max_steps, once.candidates, once.stop_when, once.max_nfe) == (1, 1, "drawn", 9)
    best = budget_for_mode("best-of", Budget(max_steps=2, candidates=6))
    assert (best.max_steps, best.candidates, best.stop_when) == (6, 6, "controller")
    with pytest.raises(UsageError, match="at least 2 candidates"):
        budget_for_mode("best-of", None)
    # What is as usual is not written down: folders from before there were so many limits can go on.
    assert non_default_fields(Budget(max_steps=4)) == {"max_steps": 4}
    assert non_default_fields(Budget(max_nfe=9, stop_when="verified")) == {
        "max_steps": 8,
        "max_nfe": 9,
        "stop_when": "verified",
    }
