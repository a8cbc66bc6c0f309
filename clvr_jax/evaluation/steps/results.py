"""Results of the steps benchmark: rates by kind of step, and the paired difference from an earlier run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

from clvr_jax.display.tables import Table, plain
from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.statistics import clustered_interval, paired_bootstrap, sign_test
from clvr_jax.evaluation.steps.scores import SCORES, StepScore
from clvr_jax.evaluation.steps.states import KINDS, State, fingerprint
from clvr_jax.files.json_input import JSON, read_object

BENCHMARK = "steps"
CONTROL = "requests of other prompts (control)"
COLUMNS = ("", "right", "edits made", "rest preserved", "drawn early")


class StepRate(TypedDict):
    """The share of images with a property, its 95 % interval over states, and the number of states."""

    rate: float
    interval: list[float]
    states: int


class StepDifference(TypedDict):
    """Mean of "right" minus that of the earlier run, on the same states and noises: interval over states, sign test."""

    difference: float
    interval: list[float]
    better: int
    worse: int
    p_value: float


class StepResults(TypedDict):
    """The content of results.json; `steps` has an entry for each state."""

    benchmark: str
    settings: Mapping[str, JSON]
    states: str
    summary: dict[str, dict[str, StepRate]]
    against: NotRequired[str]
    differences: NotRequired[dict[str, StepDifference]]
    steps: list[dict[str, JSON]]


@dataclass(frozen=True)
class EarlierRun:
    """An earlier run to compare with.

    path: of its results.json. states: fingerprint of its states. right: share of right images of each state.
    """

    path: Path
    states: str
    right: tuple[float, ...]

    def check(self, states: Sequence[State]) -> None:
        """Raises ClvrError if it was measured on other states."""
        if self.states != fingerprint(states) or len(self.right) != len(states):
            raise ClvrError(
                f"{self.path}: was measured on other states; give both runs the same --histories, --states and --seed"
            )


def step_results(
    states: Sequence[State],
    scores: Sequence[Sequence[StepScore]],
    control: Sequence[Sequence[StepScore]],
    settings: Mapping[str, JSON],
    earlier: EarlierRun | None = None,
) -> StepResults:
    """Returns the content of results.json.

    Args:
      states: the states.
      scores: of the images of each state.
      control: the scores of images against requests of other prompts.
      settings: model and options, recorded.
      earlier: an earlier run on the same states, to compare with.
    Raises: ClvrError if the earlier run has other states.
    """
    found = StepResults(
        benchmark=BENCHMARK,
        settings=settings,
        states=fingerprint(states),
        summary={name: _rates([scores[row] for row in rows]) for name, rows in _groups(states)},
        steps=[
            {
                "prompt": state.prompt,
                "kind": state.kind,
                "objects": state.objects,
                "held_out": state.has_held_out,
                "request": state.replies[-1],
                "images": [asdict(each) for each in own],
            }
            for state, own in zip(states, scores, strict=True)
        ],
    )
    if control:
        found["summary"][CONTROL] = _rates(control)
    if earlier is not None:
        earlier.check(states)
        now = [sum(each.right for each in own) / len(own) for own in scores]
        found["against"] = str(earlier.path.parent)
        found["differences"] = {
            name: _difference([earlier.right[row] for row in rows], [now[row] for row in rows])
            for name, rows in _groups(states)
        }
    return found


def _groups(states: Sequence[State]) -> Iterator[tuple[str, list[int]]]:
    """Yields (name, numbers of its states) for the groups that are not empty."""
    members = {"all": [True] * len(states), "edits": [bool(state.images) for state in states]}
    members |= {kind: [state.kind == kind for state in states] for kind in KINDS}
    for number in sorted({state.objects for state in states}):
        members[f"{number} objects"] = [state.objects == number for state in states]
    members["held-out pairs"] = [state.has_held_out for state in states]
    members["other pairs"] = [not state.has_held_out for state in states]
    for name, is_member in members.items():
        if rows := [row for row in range(len(states)) if is_member[row]]:
            yield name, rows


def _rates(scores: Sequence[Sequence[StepScore]]) -> dict[str, StepRate]:
    rates = {}
    for name in SCORES:
        found = clustered_interval([[float(getattr(each, name)) for each in own] for own in scores])
        rates[name] = StepRate(rate=found.estimate, interval=[found.low, found.high], states=len(scores))
    return rates


def _difference(before: Sequence[float], now: Sequence[float]) -> StepDifference:
    found, test = paired_bootstrap(before, now), sign_test(before, now)
    return {
        "difference": found.estimate,
        "interval": [found.low, found.high],
        "better": test.second_wins,
        "worse": test.first_wins,
        "p_value": test.p_value,
    }


def read_earlier(directory: Path, noises: int) -> EarlierRun:
    """Reads the results of an earlier run.

    Args:
      directory: of the run.
      noises: number of images of each state that it must have.
    Raises: ClvrError, one line, for results of another benchmark or with another number of images.
    """
    path = directory / "results.json"
    content = read_object(path)
    if (benchmark := content.text("benchmark")) != BENCHMARK:
        raise ClvrError(f"{path}: has results of the benchmark {benchmark!r}, not of {BENCHMARK!r}")
    right = []
    for step in content.objects("steps"):
        images = [image.boolean("right") for image in step.objects("images")]
        if len(images) != noises:
            raise ClvrError(
                f"{path}: has {len(images)} images of a state, not {noises}; give both runs the same --noises"
            )
        right.append(sum(images) / noises)
    return EarlierRun(path, content.text("states"), tuple(right))


def steps_table(results: StepResults) -> Table:
    """Returns the summary of results as a table."""
    differences = results.get("differences", {})
    columns = (*COLUMNS, "right, minus the earlier run") if differences else COLUMNS
    rows = []
    for name, rates in results["summary"].items():
        cells = [_cell(rates[score], with_states=score == "right") for score in SCORES]
        if differences:
            cells.append(_difference_cell(differences[name]) if name in differences else "")
        rows.append((name, *cells))
    return Table(columns, [rows], title=f"Steps benchmark: {results['settings']['model']}")


def _cell(rate: StepRate, with_states: bool) -> str:
    low, high = rate["interval"]
    return f"{rate['rate']:.3f} [{low:.3f}, {high:.3f}]" + (f" of {rate['states']}" if with_states else "")


def _difference_cell(found: StepDifference) -> str:
    low, high = found["interval"]
    return (
        f"{found['difference']:+.3f} [{low:+.3f}, {high:+.3f}], {found['better']} better, {found['worse']} worse, "
        f"p {found['p_value']:.2g}"
    )


def markdown(results: StepResults) -> str:
    """Returns the results as Markdown."""
    settings = results["settings"]
    lines = [
        f"# Steps benchmark: {plain(str(settings['model']))}",
        "",
        f"Histories: {plain(str(settings['histories']))}, seed {settings['seed']}, {settings['noises']} images of each "
        "state. In brackets 95 % intervals over states, then the number of states. Right: the requested edits are "
        "made, the rest is preserved, and nothing is drawn early.",
        "",
        *steps_table(results).markdown(),
    ]
    if "against" in results:
        lines += [
            "",
            f"The earlier run is {plain(results['against'])}: the same states and noises, sign test over states.",
        ]
    return "\n".join(lines) + "\n"
