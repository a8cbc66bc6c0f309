"""What one prompt costs: providers that write down the price of every call, by the role that made it."""

import dataclasses
import threading
from dataclasses import dataclass, field

from clvr_jax.interfaces import (
    ChatModel,
    ChatRequest,
    ChatResponse,
    ImageModel,
    ImageRequest,
    ImageResponse,
    ProviderError,
    Usage,
)


class StoppedError(Exception):
    """The run ends, and its prompts are left where they are; no `ClvrError`, which a role might take for its own."""


@dataclass
class UsageTracker:
    """The bill of one prompt, worked on by one thread.

    Attributes:
      usage: for each role, all its calls, failed ones included.
      stop: once it is set, the next call raises StoppedError.
      adapted: for each server, which fields of requests it refused, see `OpenAIChatModel.adapted`.
    """

    usage: dict[str, Usage] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)
    adapted: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def begin(self) -> None:
        """Called before every call. Raises: StoppedError if the run ends."""
        if self.stop.is_set():
            raise StoppedError

    def note(self, provider: ChatModel | ImageModel) -> None:
        """Writes down how a provider's requests had to be adapted, if it says so."""
        if notes := getattr(provider, "adapted", ()):
            self.adapted[provider.name] = tuple(notes)

    def add(self, role: str, usage: Usage) -> None:
        """Puts a call on the bill."""
        self.usage[role] = self.usage.get(role, Usage()) + usage

    def model(self, role: str, model: ChatModel) -> ChatModel:
        """The model, metered."""
        return _MeteredChatModel(role, model, self)

    def tool(self, tool: ImageModel) -> ImageModel:
        """The image tool, metered as the role "draw"."""
        return _MeteredImageModel("draw", tool, self)

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
class _MeteredChatModel(ChatModel):
    role: str
    model: ChatModel
    meter: UsageTracker

    @property
    def name(self) -> str:
        return self.model.name

    def chat(self, question: ChatRequest) -> ChatResponse:
        self.meter.begin()
        try:
            answer = self.model.chat(question)
        except ProviderError as error:
            self.meter.add(self.role, error.usage)
            raise
        finally:
            self.meter.note(self.model)
        self.meter.add(self.role, answer.usage)
        return answer


@dataclass(frozen=True)
class _MeteredImageModel(ImageModel):
    role: str
    tool: ImageModel
    meter: UsageTracker

    @property
    def name(self) -> str:
        return self.tool.name

    def generate(self, task: ImageRequest) -> ImageResponse:
        self.meter.begin()
        try:
            made = self.tool.generate(task)
        except ProviderError as error:
            self.meter.add(self.role, error.usage)
            raise
        finally:
            self.meter.note(self.tool)
        self.meter.add(self.role, made.usage)
        return made
