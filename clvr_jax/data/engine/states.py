"""The state machine of the data engine, as plain data.

    generate_base_image -> inspect -> refine -> validate -> finalize

A state says which actions the controller may take in it, where each of them leads, and how often it may go wrong there:
a turn that cannot be read, an action that is not allowed, an image that its checklist does not accept, all count.
The machine can be drawn, changed and tested without running anything.

Source: arXiv 2605.14876, trajectory synthesis; which action leads where is ours.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from clvr_jax.data.engine.actions import ActionName
from clvr_jax.errors import ClvrError

StateName = Literal["generate_base_image", "inspect", "refine", "validate", "finalize"]
START: StateName = "generate_base_image"
END: StateName = "finalize"


@dataclass(frozen=True)
class State:
    """One state. actions: where each action that is allowed leads. retries: turns in a row that may fail before the one
    that discards the trajectory; also how often a wrong image is generated again, for a right one beside it."""

    name: StateName
    actions: Mapping[ActionName, StateName]
    retries: int = 1

    @property
    def allowed(self) -> tuple[ActionName, ...]:
        """The names of its actions."""
        return tuple(self.actions)


def _machine(*states: State) -> Mapping[StateName, State]:
    return MappingProxyType({state.name: state for state in states})


MACHINE: Mapping[StateName, State] = _machine(
    State("generate_base_image", {"INITIAL_GENERATION": "inspect"}),
    State("inspect", {"IMAGE_EDIT": "refine", "RESULT_VALIDATION": "validate"}),
    State("refine", {"IMAGE_EDIT": "refine", "RESULT_VALIDATION": "validate"}),
    # Entered when a validation found gaps: they are mended, or the trajectory ends without an accepted picture.
    State("validate", {"IMAGE_EDIT": "refine", "RESULT_VALIDATION": "validate", "END_TRAJECTORY": "finalize"}),
    State("finalize", {}, retries=0),
)


def check_machine(machine: Mapping[StateName, State]) -> None:
    """Raises: ClvrError if a state leads nowhere, cannot be reached, or cannot reach the end."""
    for name, state in machine.items():
        if absent := sorted(set(state.actions.values()) - machine.keys()):
            raise ClvrError(f"state {name} leads to {', '.join(absent)}, which is no state")
    reached = _closure(START, lambda name: machine[name].actions.values())
    if lost := sorted(machine.keys() - reached):
        raise ClvrError(f"states that cannot be reached: {', '.join(lost)}")
    back = _closure(END, lambda name: [other for other, state in machine.items() if name in state.actions.values()])
    if stuck := sorted(machine.keys() - back):
        raise ClvrError(f"states from which the end cannot be reached: {', '.join(stuck)}")


def _closure(start: StateName, following: Callable[[StateName], Iterable[StateName]]) -> set[StateName]:
    found, waiting = {start}, [start]
    while waiting:
        new = set(following(waiting.pop())) - found
        found |= new
        waiting += new
    return found
