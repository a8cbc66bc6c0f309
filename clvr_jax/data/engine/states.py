"""The state machine of the data engine as plain data.

    generate_base_image -> inspect -> refine -> validate -> finalize

A state lists the actions that the planner may take in it, the next state of each action, and the number of failures
that it allows. Failures are turns that cannot be parsed, actions that are not allowed, and images that fail their
checklist. The machine can be changed and tested without running a model.

Source: arXiv 2605.14876, trajectory synthesis; the transitions are ours.
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
    """One state.

    Attributes:
      name: its name.
      actions: allowed action -> next state.
      retries: number of consecutive turns that may fail; one more discards the trajectory. Also the number of times
        that a wrong image is generated again, to obtain a right one for a pair of verification examples.
    """

    name: StateName
    actions: Mapping[ActionName, StateName]
    retries: int = 1

    @property
    def allowed(self) -> tuple[ActionName, ...]:
        """The names of the allowed actions."""
        return tuple(self.actions)


def _machine(*states: State) -> Mapping[StateName, State]:
    return MappingProxyType({state.name: state for state in states})


MACHINE: Mapping[StateName, State] = _machine(
    State("generate_base_image", {"INITIAL_GENERATION": "inspect"}),
    State("inspect", {"IMAGE_EDIT": "refine", "RESULT_VALIDATION": "validate"}),
    State("refine", {"IMAGE_EDIT": "refine", "RESULT_VALIDATION": "validate"}),
    # After a validation that found something unmet, the planner corrects it or ends the trajectory unaccepted.
    State("validate", {"IMAGE_EDIT": "refine", "RESULT_VALIDATION": "validate", "END_TRAJECTORY": "finalize"}),
    State("finalize", {}, retries=0),
)


def check_machine(machine: Mapping[StateName, State]) -> None:
    """Checks a state machine.

    Raises: ClvrError if a next state does not exist, or a state cannot be reached or cannot reach the end.
    """
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
