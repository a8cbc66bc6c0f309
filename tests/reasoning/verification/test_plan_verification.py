import pytest

from clvr_jax.reasoning.loop.decisions import is_settled
from clvr_jax.reasoning.verification.evidence import is_consistent
from clvr_jax.reasoning.verification.model_verifier import ModelVerifier
from clvr_jax.reasoning.verification.verification import Requirement, Verification
from tests.reasoning.verification.test_verification import IMAGE, ScriptedModel, answer, text_of


def always_yes(question):
    quoted = {"red star": "red star top", "blue cross": "blue cross left"}
    required = text_of(question).split("Required:")[1].strip().rstrip(".")
    return f"{quoted[required]}. yes"


def test_a_trained_model_compares_plans_in_the_order_in_which_it_describes():
    model = ScriptedModel(always_yes)
    ModelVerifier(model, is_instructed=False).check_plans([("red star",)], ["Plan: blue cross left; red star top."])
    assert "Plan: red star top; blue cross left." in text_of(model.questions[0])
    other = ScriptedModel(always_yes)
    ModelVerifier(other).check_plans([("red star",)], ["Plan: blue cross left; red star top."])
    assert "Plan: blue cross left; red star top." in text_of(other.questions[0])


def test_nothing_is_met_by_a_plan_with_two_things_in_one_place():
    plans = ["Plan: red star top; blue cross top.", "Plan: red star top; blue cross left."]
    impossible, possible = ModelVerifier(ScriptedModel(always_yes), is_instructed=False).check_plans(
        [("red star",), ("red star",)], plans
    )
    assert (impossible.accepted, impossible.score, possible.accepted) == (False, 0.0, True)
    assert impossible.requirements[0].evidence == "two things in one place: top"


@pytest.mark.parametrize(
    ("probabilities", "met", "expected"),
    [
        ((0.99, 0.95), True, True),
        ((0.99, 0.6), True, False),
        ((0.99, 0.95), False, False),
        ((None, 0.95), True, True),  # without probabilities the answers count
    ],
)
def test_a_plan_is_carried_out_at_once_only_if_it_surely_meets_all(probabilities, met, expected):
    plan = Verification(tuple(Requirement("red star", met, each) for each in probabilities))
    assert is_settled(plan) is expected


@pytest.mark.parametrize(
    ("requirement", "said", "expected"),
    [
        ("blue cross left", "red star top. no", False),
        ("blue cross left", "blue cross left. yes", True),
        ("green cross left", "blue cross left. no", True),
        ("green cross right", "blue cross left. no", True),  # the description has nothing there
        ("green cross right", "nothing right. no", True),
        ("green cross left of red star", "red star top; no green cross. no", True),
    ],
)
def test_an_answer_about_a_place_quotes_what_is_there(requirement, said, expected):
    assert is_consistent("I see red star top; blue cross left.", requirement, said) is expected


def test_a_sampled_no_is_no_yes_where_a_yes_would_be_more_probable():
    """The probability of yes is .9 at the word; what was quoted supports none."""

    def reply(question):
        if question.images:
            return answer(("I see", 1.0), (" red star top", 1.0), (".", 1.0))
        return answer(("red star top.", 1.0), (" no", 0.1), yes=0.9, no=0.1)

    (found,) = ModelVerifier(ScriptedModel(reply), is_instructed=False).check([("red star left",)], [IMAGE])
    assert found.requirements[0].met is False
    assert found.requirements[0].probability == pytest.approx(0.05)


def described_with_a_doubt(question):
    """The star is sure, the cross is not; requirements that name neither are answered with a sure no."""
    if question.images:
        return answer(("I see", 1.0), (" red star top", 0.99), (";", 1.0), (" blue cross left", 0.6), (".", 1.0))
    required = text_of(question).split("Required:")[1]
    if "green" in required:
        return answer(("no green dog.", 1.0), (" no", 1.0), no=1.0)
    return answer(("blue cross left." if "blue" in required else "red star top.", 1.0), (" yes", 1.0), yes=1.0)


def test_the_controller_reads_that_things_in_doubt_are_unclear():
    """What is unmet by doubt has a cause in the description that the controller reads; the verifier's words stay."""
    verifier = ModelVerifier(ScriptedModel(described_with_a_doubt), is_instructed=False, clause_threshold=0.7)
    (found,) = verifier.check([("red star", "blue cross")], [IMAGE])
    assert [each.doubt for each in found.requirements] == ["", "blue cross left"]
    assert found.description == "I see red star top; blue cross left."
    assert found.report == "I see red star top; something unclear left. Unmet: blue cross."
    assert Verification.from_dict(found.to_dict()) == found


def test_doubts_wait_while_something_is_missing():
    verifier = ModelVerifier(ScriptedModel(described_with_a_doubt), is_instructed=False, clause_threshold=0.7)
    (found,) = verifier.check([("red star", "blue cross", "green dog")], [IMAGE])
    assert found.unmet == ("blue cross", "green dog")
    assert found.report == "I see red star top; blue cross left. Unmet: green dog."


def test_the_rule_on_doubt_holds_for_models_that_were_trained_to_describe():
    verifier = ModelVerifier(ScriptedModel(described_with_a_doubt), clause_threshold=0.7)
    (found,) = verifier.check([("blue cross",)], [IMAGE])
    assert (found.accepted, found.requirements[0].doubt) == (True, "")


def test_what_is_more_probable_than_not_is_no_doubt_by_default():
    verifier = ModelVerifier(ScriptedModel(described_with_a_doubt), is_instructed=False)
    (found,) = verifier.check([("red star", "blue cross")], [IMAGE])
    assert found.accepted
    assert [each.probability for each in found.requirements] == pytest.approx([0.99, 0.6], abs=0.01)


def test_a_sure_no_leaves_no_doubt():
    def reply(question):
        if question.images:
            return described_with_a_doubt(question)
        return answer(("red star top; blue cross left.", 1.0), (" no", 1.0), no=1.0)

    required = ("red star left of blue cross",)
    (found,) = ModelVerifier(ScriptedModel(reply), is_instructed=False).check([required], [IMAGE])
    assert (found.accepted, found.requirements[0].doubt) == (False, "")
    assert found.report == "I see red star top; blue cross left. Unmet: red star left of blue cross."


def test_only_the_clause_in_doubt_is_called_unclear():
    """Its words may begin another clause."""
    requirement = Requirement("two red stars", False, 0.4, "red star top left; red star top", "red star top")
    described = Verification((requirement,), "I see red star top left; red star top.")
    assert described.report == "I see red star top left; something unclear top. Unmet: two red stars."
