"""`clvr eval steps`."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from clvr_jax.arguments import at_least_one, check_seed
from clvr_jax.commands.common import Common, Directory, Flags, Result, prepare_jax, results_directory
from clvr_jax.errors import UsageError

if TYPE_CHECKING:
    from clvr_jax.evaluation.steps import State
    from clvr_jax.evaluation.steps.results import StepResults
    from clvr_jax.files.json_input import JSON
    from clvr_jax.reasoning.conversation.protocols import ImageGenerator

_RENDERED = "rendered"


@dataclass(frozen=True)
class EvalSteps:
    """Measures the image generator alone: single steps of loops of the shapes world, whose requests are exact.

    For each state (a history and a request) several images are generated. An image is right if it shows what is
    requested and changes nothing else. The control scores each image against the request of another prompt.
    """

    EXAMPLE: ClassVar = "clvr eval steps --model shapes-tiny --out out/steps"

    out: Directory = None
    """Write results.json and steps.md to this directory. If not given, the table is only printed."""
    model: str = "shapes-tiny"
    """Generate with this model: a shipped name, a directory in diffusers layout, or a Hugging Face id."""
    histories: str = "shapes-tiny"
    """Whose images the histories have. rendered: renderings, six of ten with a simulated mistake. Otherwise a model,
    as for --model: images of its loops with exact replies, with its own mistakes."""
    states: int = 600
    """Number of states, taken in turn from first steps and steps with one, two, three, and more references."""
    noises: int = 4
    """Number of images of each state, each from its own noise."""
    against: Directory = None
    """Compare with the results of an earlier run in this directory, pair by pair: another model, the same states and
    noises. None if not given."""
    batch_size: int = 32
    """Generate this many images together; it changes only speed and memory."""
    seed: int = 0
    """The same seed gives the same states, for the same --histories, and the same noise."""
    common: Flags = field(default_factory=Common)

    def __post_init__(self) -> None:
        at_least_one("--states", self.states)
        at_least_one("--noises", self.noises)
        at_least_one("--batch-size", self.batch_size)
        check_seed(self.seed)
        if self.against and self.out and self.against.resolve() == self.out.resolve():
            raise UsageError(
                f"--against and --out are both {self.out}, whose results would be replaced; choose another --out"
            )

    def run(self) -> Result:
        """Generates and scores the images, and writes the results if there is a directory for them."""
        prepare_jax()
        from clvr_jax.evaluation import steps
        from clvr_jax.files.atomic_io import write_json, write_text

        with results_directory(self.out, steps.BENCHMARK):
            found = self._results()
            if self.out is not None:
                write_text(self.out / "steps.md", steps.markdown(found))
                write_json(self.out / "results.json", found)
        data = {key: value for key, value in found.items() if key != "steps"}
        table = steps.steps_table(found).rich()
        return Result(data if self.out is None else {**data, "out": str(self.out)}, table)

    def _results(self) -> "StepResults":
        """Generates and scores the images; returns the content of results.json."""
        from clvr_jax.display.console import progress
        from clvr_jax.evaluation.steps import step_results
        from clvr_jax.evaluation.steps.results import read_earlier
        from clvr_jax.evaluation.steps.run import generate_steps
        from clvr_jax.evaluation.verifier.generated import load_generator

        earlier = None if self.against is None else read_earlier(self.against, self.noises)
        generator = load_generator(self.model)
        states = self._states(generator)
        if earlier is not None:
            earlier.check(states)
        with progress("steps benchmark", len(states) * self.noises) as advance:
            scores, control = generate_steps(generator, states, self.noises, self.seed, self.batch_size, advance)
        settings: dict[str, JSON] = {
            "model": self.model,
            "histories": self.histories,
            "seed": self.seed,
            "noises": self.noises,
        }
        return step_results(states, scores, control, settings, earlier)

    def _states(self, generator: "ImageGenerator") -> "list[State]":
        """Returns the states; `generator` is that of `model`."""
        from clvr_jax.display.console import progress
        from clvr_jax.evaluation.steps import rendered_states, rollout_states
        from clvr_jax.evaluation.steps.states import num_loops
        from clvr_jax.evaluation.verifier.generated import load_generator

        if self.histories == _RENDERED:
            return rendered_states(self.states, self.seed)
        with progress("histories", num_loops(self.states)) as advance:
            if self.histories != self.model:
                generator = load_generator(self.histories)
            return rollout_states(generator, self.states, self.seed, self.batch_size, advance)
