"""The display of the closed loop's events on a terminal."""

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.text import Text

from clvr_jax.display.console import console

if TYPE_CHECKING:
    from clvr_jax.reasoning.loop.events import Event
    from clvr_jax.reasoning.verification.verification import Verification


def show_event(event: "Event") -> None:
    """Prints an event of the loop."""
    from clvr_jax.reasoning.conversation.actions import parse, strip_action, unmet_span
    from clvr_jax.reasoning.loop.events import (
        Finished,
        Generated,
        PlanVerified,
        Replied,
        RolledBack,
        Selected,
        Verified,
    )

    if isinstance(event, Replied) and event.error:
        console.print(f"[yellow]  cannot be parsed:[/] {escape(event.error)}")
    elif isinstance(event, Replied):
        text = Text("  " + strip_action(event.text))
        span = unmet_span(text.plain)
        if span:
            met = parse(event.text, has_image=True).unmet == ()
            text.stylize("bold green" if met else "bold yellow", *span)
        console.print(text)
    elif isinstance(event, Generated):
        again = f", attempt {event.step.redraw + 1}" if event.step.redraw else ""
        console.print(f"[bold]step {event.number}[/]  {event.step.nfe} NFE  {event.step.seconds:.1f} s{again}")
        if event.step.left_out:
            replies = "reply is" if event.step.left_out == 1 else f"{event.step.left_out} replies are"
            console.print(f"[yellow]  the history is too long for the generator:[/] the oldest {replies} left out")
    elif isinstance(event, Verified):
        console.print(_verification_text(event.verification))
    elif isinstance(event, PlanVerified) and event.verification.unmet:
        console.print(f"[yellow]  the plan misses:[/] {escape('; '.join(event.verification.unmet))}")
    elif isinstance(event, Selected):
        console.print(f"  step {event.number} is the best of {len(event.among)} candidates")
    elif isinstance(event, RolledBack):
        console.print(f"[yellow]  step {event.number} is worse than step {event.to}: back to step {event.to}[/]")
    elif isinstance(event, Finished):
        color = "green" if event.trajectory.outcome == "accepted" else "yellow"
        spent = (
            f"{len(event.trajectory.generated)} generations, {event.trajectory.nfe} NFE, "
            f"{event.trajectory.seconds:.1f} s"
        )
        console.print(f"[bold {color}]{event.trajectory.outcome}[/]  {spent}")


def _verification_text(verification: "Verification") -> Text:
    """Returns one line for each requirement: whether it is met, its probability, and the evidence."""
    text = Text(f"  {verification.description}" if verification.description else "")
    for each in verification.requirements:
        style = {True: "green", False: "yellow", None: "red"}[each.met]
        sure = "" if each.probability is None else f" {each.probability:.2f}"
        text.append(f"\n    {each.state:>5}{sure}  ", style)
        text.append(each.text, "bold")
        if each.evidence:
            text.append(f"  ({each.evidence})", "dim")
    return text
