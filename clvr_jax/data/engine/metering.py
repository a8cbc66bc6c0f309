"""What one prompt costs: providers that write down the price of every call, by the role that made it."""

import dataclasses
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


@dataclass
class Meter:
    """The bill of one prompt, worked on by one thread. usage: for each role, all its calls, failed ones included."""

    usage: dict[str, Usage] = field(default_factory=dict)

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
        try:
            answer = self.model.ask(question)
        except ProviderError as error:
            self.meter.add(self.role, error.usage)
            raise
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
        try:
            made = self.tool.draw(task)
        except ProviderError as error:
            self.meter.add(self.role, error.usage)
            raise
        self.meter.add(self.role, made.usage)
        return made
