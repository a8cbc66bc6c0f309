"""What one prompt costs: providers that write down the price of every call, by the role that made it."""

import dataclasses
import threading
from dataclasses import dataclass, field

from clvr_jax.reasoning.tools import (
    Answer,
    ImageTask,
    ImageTool,
    Made,
    ProviderError,
    Question,
    Usage,
    VisionLanguageModel,
)


class StoppedError(Exception):
    """The run ends, and its prompts are left where they are; no `ClvrError`, which a role might take for its own."""


@dataclass
class Meter:
    """The bill of one prompt, worked on by one thread.

    Attributes:
      usage: for each role, all its calls, failed ones included.
      stop: once it is set, the next call raises StoppedError.
      adapted: for each server, which fields of requests it refused, see `OpenAIVisionLanguageModel.adapted`.
    """

    usage: dict[str, Usage] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)
    adapted: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def begin(self) -> None:
        """Called before every call. Raises: StoppedError if the run ends."""
        if self.stop.is_set():
            raise StoppedError

    def note(self, provider: VisionLanguageModel | ImageTool) -> None:
        """Writes down how a provider's requests had to be adapted, if it says so."""
        if notes := getattr(provider, "adapted", ()):
            self.adapted[provider.name] = tuple(notes)

    def add(self, role: str, usage: Usage) -> None:
        """Puts a call on the bill."""
        self.usage[role] = self.usage.get(role, Usage()) + usage

    def model(self, role: str, model: VisionLanguageModel) -> VisionLanguageModel:
        """The model, metered."""
        return _MeteredModel(role, model, self)

    def tool(self, tool: ImageTool) -> ImageTool:
        """The image tool, metered as the role "draw"."""
        return _MeteredTool("draw", tool, self)

    @property
    def total(self) -> Usage:
        """Everything."""
        return sum(self.usage.values(), Usage())

    def to_json(self) -> dict[str, dict[str, float]]:
        """For each role what is not zero."""
        return {
            role: {name: value for name, value in dataclasses.asdict(usage).items() if value}
            for role, usage in sorted(self.usage.items())
        }


@dataclass(frozen=True)
class _MeteredModel(VisionLanguageModel):
    role: str
    model: VisionLanguageModel
    meter: Meter

    @property
    def name(self) -> str:
        return self.model.name

    def ask(self, question: Question) -> Answer:
        self.meter.begin()
        try:
            answer = self.model.ask(question)
        except ProviderError as error:
            self.meter.add(self.role, error.usage)
            raise
        finally:
            self.meter.note(self.model)
        self.meter.add(self.role, answer.usage)
        return answer


@dataclass(frozen=True)
class _MeteredTool(ImageTool):
    role: str
    tool: ImageTool
    meter: Meter

    @property
    def name(self) -> str:
        return self.tool.name

    def draw(self, task: ImageTask) -> Made:
        self.meter.begin()
        try:
            made = self.tool.draw(task)
        except ProviderError as error:
            self.meter.add(self.role, error.usage)
            raise
        finally:
            self.meter.note(self.tool)
        self.meter.add(self.role, made.usage)
        return made
