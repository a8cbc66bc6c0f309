"""The cost of calls to models, and their failures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clvr_jax.errors import ClvrError

Fault = Literal["down", "limited", "refused", "malformed", "rejected"]
"""Kind of failure; see `ProviderError`."""


@dataclass(frozen=True)
class Usage:
    """The cost of one call or of many.

    Attributes:
      calls: number of chat or image requests.
      input_tokens, output_tokens: tokens that the model read and wrote.
      pictures: generated images.
      nfe: network evaluations of our own diffusion models; 0 for endpoints.
      seconds: wall-clock time from request to response, including waiting.
      dollars: cost by the provider's price list; 0 without one.
      retries: HTTP requests beyond the first of each call.
    """

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    pictures: int = 0
    nfe: int = 0
    seconds: float = 0.0
    dollars: float = 0.0
    retries: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            calls=self.calls + other.calls,
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            pictures=self.pictures + other.pictures,
            nfe=self.nfe + other.nfe,
            seconds=self.seconds + other.seconds,
            dollars=self.dollars + other.dollars,
            retries=self.retries + other.retries,
        )


class ProviderError(ClvrError):
    """A provider gave no usable response after all retries.

    Attributes:
      fault: "down" (no connection, timeout, server error), "limited" (rate or quota), "refused" (by the provider's
        policy), "malformed" (an empty response, no image, a wrong size), or "rejected" (a wrong key, model or size).
      usage: the cost of the call; refusals and malformed responses are paid for like any other.
    """

    def __init__(self, message: str, fault: Fault, usage: Usage | None = None):
        super().__init__(message)
        self.fault, self.usage = fault, usage or Usage()

    def __reduce__(self) -> tuple[type[ProviderError], tuple[str, Fault, Usage]]:
        # Pickle keeps the message only; worker processes send the other fields back as well.
        return type(self), (str(self), self.fault, self.usage)
