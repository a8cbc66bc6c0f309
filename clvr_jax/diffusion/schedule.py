"""Noise levels of the FLUX.2 sampler: evenly spaced, then shifted towards noise by image size and number of steps."""

import dataclasses
import math
from typing import Any, Self

import numpy as np
from jaxtyping import Float32

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.json_input import JSON, UncheckedJSON

SCHEDULER_CLASS = "FlowMatchEulerDiscreteScheduler"
# Fields of diffusers' class of which the solver supports one value.
_FIXED = {
    "num_train_timesteps": 1000,  # the pipeline divides the timestep by 1000
    **dict.fromkeys(("invert_sigmas", "stochastic_sampling", "use_flow_sigmas"), False),
    **dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), False),
}
# `empirical_mu` computes mu; Flux2KleinPipeline does not read these fields either.
_IGNORED = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")


def empirical_mu(image_tokens: int, steps: int) -> float:
    """Returns the exponent mu of the shift.

    It is linear in the number of tokens, with coefficients of the model's authors for 10 and for 200 steps, and
    interpolates linearly in the number of steps; large images use the coefficients for 200 steps only.

    Args:
      image_tokens: number of tokens of the generated image, without references.
      steps: number of solver steps.
    Source: compute_empirical_mu (Flux2KleinPipeline, diffusers).
    """
    at_200 = 0.00016927 * image_tokens + 0.45666666
    if image_tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * image_tokens + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return slope * steps + (at_200 - 200.0 * slope)


@dataclasses.dataclass(frozen=True)
class FlowSchedule:
    """The spacing of the noise levels of a flow, with the field names and defaults of diffusers.

    shift: factor of the static shift. use_dynamic_shifting: whether to shift by `empirical_mu` instead.
    time_shift_type: formula of the dynamic shift, "exponential" or "linear". shift_terminal: the last noise level
    before 0; None does not rescale the levels.
    """

    shift: float = 1.0
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"
    shift_terminal: float | None = None

    def __post_init__(self) -> None:
        if self.time_shift_type not in ("exponential", "linear"):
            raise ClvrError(f"time_shift_type is {self.time_shift_type!r}; it must be exponential or linear")
        if not 0 < self.shift < 1e6:
            raise ClvrError(f"shift is {self.shift!r}; it must be a number above 0")
        if not 0 <= (self.shift_terminal or 0) < 1:
            raise ClvrError(f"shift_terminal is {self.shift_terminal!r}; it must be null or a number in [0, 1)")

    @classmethod
    def from_config(cls, config: UncheckedJSON) -> Self:
        """Reads `scheduler_config.json`.

        Raises: ClvrError, which names the field, for another class, an unknown field, or a value that is not supported.
        """
        if (found := config.get("_class_name")) != SCHEDULER_CLASS:
            raise ClvrError(f"a {found}, which is not supported, only {SCHEDULER_CLASS}")
        kinds: dict[str, type | tuple[type, ...]] = {
            "shift": (int, float),
            "use_dynamic_shifting": bool,
            "time_shift_type": str,
        }
        values: dict[str, Any] = {}
        for name, value in config.items():
            if name == "shift_terminal" and value is None:
                continue
            if name in kinds or name == "shift_terminal":
                kind = kinds.get(name, (int, float))
                if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
                    raise ClvrError(f"{name} is {value!r}, which has another type than in diffusers; correct it")
                values[name] = value
            elif name in _FIXED:
                if value not in (None, _FIXED[name]):
                    raise ClvrError(f"{name} = {value!r} is not supported, only {_FIXED[name]!r}")
            elif not name.startswith("_") and name not in _IGNORED:
                raise ClvrError(f"unknown field {name!r}; a {SCHEDULER_CLASS} has none of this name")
        return cls(**values)

    def to_config(self) -> dict[str, JSON]:
        """Returns `scheduler_config.json` for `from_config` and diffusers, with the fields of FLUX.2 klein."""
        terminal = {} if self.shift_terminal is None else {"shift_terminal": self.shift_terminal}
        return {
            "_class_name": SCHEDULER_CLASS,
            "base_image_seq_len": 256,
            "base_shift": 0.5,
            "max_image_seq_len": 4096,
            "max_shift": 1.15,
            "num_train_timesteps": 1000,
            "shift": self.shift,
            **terminal,
            "time_shift_type": self.time_shift_type,
            "use_dynamic_shifting": self.use_dynamic_shifting,
        }

    def sigmas(self, steps: int, image_tokens: int) -> Float32[np.ndarray, " n"]:
        """Returns the noise levels of the solver: (steps + 1,) float32, from 1 to 0.

        Source: FlowMatchEulerDiscreteScheduler.set_timesteps, as Flux2KleinPipeline calls it.
        """
        if steps < 1:
            raise UsageError(f"steps must be at least 1, got {steps}")
        sigmas = np.linspace(1.0, 1.0 / steps, steps)
        if not self.use_dynamic_shifting:
            sigmas = self.shift * sigmas / (1 + (self.shift - 1) * sigmas)
        else:
            mu = empirical_mu(image_tokens, steps)
            factor = math.exp(mu) if self.time_shift_type == "exponential" else mu
            sigmas = factor / (factor + 1.0 / sigmas - 1.0)
        if self.shift_terminal:
            if steps == 1:  # diffusers divides 0 by 0 here, and its image is NaN
                raise UsageError(f"one step cannot end at shift_terminal {self.shift_terminal}; use more steps")
            rest = 1.0 - sigmas
            sigmas = 1.0 - rest * (1.0 - self.shift_terminal) / rest[-1]
        return np.append(sigmas, 0.0).astype(np.float32)


KLEIN_SCHEDULE = FlowSchedule(shift=3.0, use_dynamic_shifting=True)
"""The schedule of the published FLUX.2 klein models."""


def flow_sigmas(steps: int, image_tokens: int) -> Float32[np.ndarray, " n"]:
    """Returns the noise levels of the published FLUX.2 klein: (steps + 1,) float32, from 1 to 0.

    sigma' = e^mu / (e^mu + 1 / sigma - 1) over sigma = 1, 1 - 1/n, ..., 1/n, then 0.
    Source: FlowMatchEulerDiscreteScheduler with dynamic exponential shifting, as Flux2KleinPipeline calls it.
    """
    return KLEIN_SCHEDULE.sigmas(steps, image_tokens)
