"""The limits of a server: what one request, all requests together, and the stored loops may take."""

from __future__ import annotations

from dataclasses import dataclass

from clvr_jax.errors import UsageError

MAX_BATCH = 16
"""Maximum number of works in one batch."""


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
      max_running: prompts whose loops run at the same time.
      max_queue: prompts and chats that wait; further ones are refused with status 429.
      max_batch: works in one batch, at most `MAX_BATCH`.
      window_seconds: how long the first work of a request waits for others that could share its batch.
      concurrent_calls: calls in which a batch is performed at the same time, from 1 to `MAX_BATCH`. A part of a batch
        has at least `image_rows` works.
      image_rows: rows in each call of the diffusion model, see `Flux2Pipeline.generate_each`.
      max_body_bytes: size of the body of a request.
      max_body_seconds: time until the body of a request is complete.
      max_pixels: of one generated image, and of one image of a user.
      max_images: images of a user in one request.
      max_inference_steps: steps of the solver for one image.
      max_loop_steps: generated images in one loop.
      max_seconds: time limit of one loop, and its default.
      max_chat_tokens: tokens of a reply of POST /v1/chat/completions.
      keepalive_seconds: silence on a stream after which a comment is sent.
      drain_seconds: how long running loops may continue after SIGTERM.
      keep_days: age at which stored loops are deleted.
      keep_bytes: size of all stored loops; the oldest ones are deleted above it.
    """

    max_running: int = 32
    max_queue: int = 64
    max_batch: int = MAX_BATCH
    window_seconds: float = 0.005
    concurrent_calls: int = 1
    image_rows: int = 1
    max_body_bytes: int = 64 << 20
    max_body_seconds: float = 300.0
    max_pixels: int = 4 << 20
    max_images: int = 16
    max_inference_steps: int = 100
    max_loop_steps: int = 16
    max_seconds: float = 600.0
    max_chat_tokens: int = 1024
    keepalive_seconds: float = 15.0
    drain_seconds: float = 30.0
    keep_days: float = 30.0
    keep_bytes: float = 10 << 30

    def __post_init__(self) -> None:
        if not 1 <= self.max_batch <= MAX_BATCH:
            raise UsageError(f"limits: a batch has from 1 to {MAX_BATCH} works, got {self.max_batch}")
        if not 0 <= self.window_seconds <= 0.02:
            raise UsageError(f"limits: the window must be from 0 to 0.02 seconds, got {self.window_seconds}")
        if not 1 <= self.concurrent_calls <= MAX_BATCH:
            raise UsageError(f"limits: concurrent_calls must be from 1 to {MAX_BATCH}, got {self.concurrent_calls}")
        if self.image_rows not in (1, 2, 4, 8, 16):
            raise UsageError(f"limits: image_rows must be 1, 2, 4, 8 or 16, got {self.image_rows}")
        for name in ("max_running", "max_queue", "max_body_bytes", "max_body_seconds", "max_pixels", "max_images",
                     "max_loop_steps", "max_seconds"):  # fmt: skip
            if not 0 < getattr(self, name) <= _most(name):
                raise UsageError(
                    f"limits: {name} must be above 0 and at most {_most(name):g}, got {getattr(self, name)}"
                )
        for name in ("drain_seconds", "keep_days", "keep_bytes"):
            if not 0 <= getattr(self, name) <= _most(name):
                raise UsageError(f"limits: {name} must be from 0 to {_most(name):g}, got {getattr(self, name)}")


def _most(name: str) -> float:
    """Returns the largest value of a limit: clocks of the system end at some hundred years."""
    return 1e8 if name.endswith("seconds") else 1e15
