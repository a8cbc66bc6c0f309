"""The usage of one prompt: models that record the cost of every call under the role that made it."""

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
    """Raised when the run ends before a prompt is finished. It is no `ClvrError`, which roles catch."""


@dataclass
class UsageTracker:
    """The usage of one prompt, which one thread synthesizes.

    Attributes:
      usage: role -> usage of all its calls, failed ones included.
      stop: if it is set, the next call raises StoppedError.
      adapted: server -> the request fields that it refused; see `OpenAIChatModel.adapted`.
    """

    usage: dict[str, Usage] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)
    adapted: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def begin(self) -> None:
        """Checks before a call that the run continues. Raises: StoppedError if it ends."""
        if self.stop.is_set():
            raise StoppedError

    def note(self, provider: ChatModel | ImageModel) -> None:
        """Records how the requests of a provider had to be adapted, if it has such a list."""
        if notes := getattr(provider, "adapted", ()):
            self.adapted[provider.name] = tuple(notes)

    def add(self, role: str, usage: Usage) -> None:
        """Adds the usage of a call."""
        self.usage[role] = self.usage.get(role, Usage()) + usage

    def model(self, role: str, model: ChatModel) -> ChatModel:
        """Returns the model with its usage tracked under `role`."""
        return _TrackedChatModel(role, model, self)

    def image_model(self, model: ImageModel) -> ImageModel:
        """Returns the image model with its usage tracked under the role "draw"."""
        return _TrackedImageModel("draw", model, self)

    @property
    def total(self) -> Usage:
        """The usage of all roles together."""
        return sum(self.usage.values(), Usage())

    def to_json(self) -> dict[str, dict[str, float]]:
        """Returns role -> the fields of its usage that are not zero."""
        return {
            role: {name: value for name, value in dataclasses.asdict(usage).items() if value}
            for role, usage in sorted(self.usage.items())
        }


@dataclass(frozen=True)
class _TrackedChatModel(ChatModel):
    role: str
    model: ChatModel
    tracker: UsageTracker

    @property
    def name(self) -> str:
        return self.model.name

    def chat(self, request: ChatRequest) -> ChatResponse:
        self.tracker.begin()
        try:
            response = self.model.chat(request)
        except ProviderError as error:
            self.tracker.add(self.role, error.usage)
            raise
        finally:
            self.tracker.note(self.model)
        self.tracker.add(self.role, response.usage)
        return response


@dataclass(frozen=True)
class _TrackedImageModel(ImageModel):
    role: str
    model: ImageModel
    tracker: UsageTracker

    @property
    def name(self) -> str:
        return self.model.name

    def generate(self, request: ImageRequest) -> ImageResponse:
        self.tracker.begin()
        try:
            response = self.model.generate(request)
        except ProviderError as error:
            self.tracker.add(self.role, error.usage)
            raise
        finally:
            self.tracker.note(self.model)
        self.tracker.add(self.role, response.usage)
        return response
