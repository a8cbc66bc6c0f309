"""What `clvr generate` prints while the loop runs."""

from clvr_jax.commands.generation.loop_events import show_event
from clvr_jax.reasoning.loop.events import Verified
from clvr_jax.reasoning.verification.verification import Requirement, Verification


def test_a_verification_has_a_line_for_each_requirement(capsys):
    requirements = (
        Requirement("red star", True, 0.98, "red star top"),
        Requirement("blue circle", False, 0.67, "blue circle left"),
        Requirement("green cross", False, 0.12, "no green cross"),
        Requirement("two objects", None),
    )
    show_event(Verified(0, 0, Verification(requirements, "I see red star top; blue circle left.")))
    lines = [" ".join(line.split()) for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "I see red star top; blue circle left.",
        "met 0.98 red star (red star top)",
        "doubt 0.67 blue circle (blue circle left)",
        "unmet 0.12 green cross (no green cross)",
        "no answer two objects",
    ]
