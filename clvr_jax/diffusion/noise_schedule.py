"""Noise levels of variance-preserving models (Stable Diffusion 1.5, SDXL): x = sqrt(alpha) x_0 + sqrt(1 - alpha) noise.

alpha is the entry of `alphas_cumprod` at a training timestep; sigma = sqrt((1 - alpha) / alpha).
"""

import dataclasses
from typing import Self

import numpy as np
from jaxtyping import Float32, Int32

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.json_input import JSON, UncheckedJSON, shown

_CHOICES = {
    "beta_schedule": ("scaled_linear", "linear"),
    "prediction_type": ("epsilon", "v_prediction"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
}
# The defaults of diffusers' scheduler classes for fields that scheduler_config.json does not have.
_LINEAR: dict[str, JSON] = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
_CLASS_DEFAULTS: dict[str, dict[str, JSON]] = {
    "EulerDiscreteScheduler": {**_LINEAR, "timestep_spacing": "linspace"},
    "DDIMScheduler": {**_LINEAR, "clip_sample": True},
    "PNDMScheduler": {**_LINEAR, "set_alpha_to_one": False},
    "LCMScheduler": {},
}
# The only values that the solvers support; null is the same.
_FIXED = {
    **dict.fromkeys(("clip_sample", "thresholding", "rescale_betas_zero_snr", "trained_betas"), False),
    **dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), False),
    **dict.fromkeys(("sigma_min", "sigma_max")),
    **{"interpolation_type": "linear", "timestep_type": "discrete", "final_sigmas_type": "zero"},
}
_TYPES: dict[object, tuple[type, ...]] = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}
_MAX_NUMBER = 10**6
_IGNORED = ("skip_prk_steps", "sample_max_value", "clip_sample_range", "dynamic_thresholding_ratio")


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """The noise schedule of training and the spacing of the solver's timesteps, with the field names of diffusers.

    original_inference_steps, timestep_scaling: of the solver that a latent consistency model was distilled from; only
    used by LCM.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0

    def __post_init__(self) -> None:
        self._check_types()
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ClvrError(f"NoiseSchedule.{name} is {getattr(self, name)!r}; it must be one of {choices}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ClvrError(
                f"NoiseSchedule: beta_start {self.beta_start} and beta_end {self.beta_end} must be increasing in (0, 1)"
            )
        if not 1 <= self.original_inference_steps <= self.num_train_timesteps:
            raise ClvrError(
                f"NoiseSchedule.original_inference_steps is {self.original_inference_steps}; it must be in "
                f"1..num_train_timesteps ({self.num_train_timesteps})"
            )

    def _check_types(self) -> None:
        """Raises ClvrError for values of another type, which external files may have, or out of range."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            fits = isinstance(value, _TYPES[field.type]) and (field.type is bool or not isinstance(value, bool))
            if not fits or (field.type in (int, float) and not abs(value) <= _MAX_NUMBER):
                raise ClvrError(
                    f"NoiseSchedule.{field.name} is {shown(value)}, which has another type or is out of range"
                )

    @classmethod
    def from_config(cls, config: UncheckedJSON, scheduler: str | None = None) -> Self:
        """Reads `scheduler_config.json`.

        Args:
          config: the JSON object.
          scheduler: diffusers' class, whose defaults apply to missing fields; None is the `_class_name` of the object.
        Raises: ClvrError for an unknown class or field, or a feature that the solvers do not support.
        """
        scheduler = scheduler or str(config.get("_class_name"))
        if scheduler not in _CLASS_DEFAULTS:
            raise ClvrError(
                f"scheduler_config.json: {scheduler:.80} is not supported, only {', '.join(_CLASS_DEFAULTS)}"
            )
        names = {field.name for field in dataclasses.fields(cls)}
        values = {}
        for key, value in {**_CLASS_DEFAULTS[scheduler], **config}.items():
            if key in names:
                values[key] = value
            elif key in _FIXED:
                if value not in (None, _FIXED[key]):
                    raise ClvrError(f"scheduler_config.json: {key} = {value!r} is not supported, only {_FIXED[key]!r}")
            elif not key.startswith("_") and key not in _IGNORED:
                raise ClvrError(f"scheduler_config.json: unknown field {key!r}")
        return cls(**values)

    @property
    def alphas_cumprod(self) -> Float32[np.ndarray, " t"]:
        """(num_train_timesteps,) float32, decreasing: the share of the clean image in the variance at each timestep."""
        power = 2 if self.beta_schedule == "scaled_linear" else 1
        ends = self.beta_start ** (1 / power), self.beta_end ** (1 / power)
        # Rounded to float32 where PyTorch rounds; otherwise the product of 1000 factors differs in the sixth digit.
        betas = np.linspace(*ends, self.num_train_timesteps, dtype=np.float32) ** power
        return np.cumprod(1 - betas, dtype=np.float64).astype(np.float32)

    @property
    def sigmas(self) -> Float32[np.ndarray, " t"]:
        """(num_train_timesteps,) float32, increasing: noise relative to the clean image, sqrt((1 - alpha) / alpha)."""
        out: np.ndarray = np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod)
        return out

    def euler_timesteps(self, steps: int) -> Float32[np.ndarray, " n"]:
        """Returns the timesteps of EulerDiscreteScheduler, (steps,) float32, decreasing; fractional for "linspace"."""
        return self._spaced(steps).astype(np.float32)

    def ddim_timesteps(self, steps: int) -> Int32[np.ndarray, " n"]:
        """Returns the timesteps of DDIMScheduler, (steps,) int32, decreasing."""
        return self._spaced(steps).round().astype(np.int32)

    def lcm_timesteps(self, steps: int) -> Int32[np.ndarray, " n"]:
        """Returns the timesteps of LCMScheduler, (steps,) int32, decreasing: a subset of those of the distillation."""
        original = self.original_inference_steps
        if not 1 <= steps <= original:
            raise UsageError(f"steps must be in 1..original_inference_steps ({original}), got {steps}")
        distilled = np.arange(original, 0, -1) * (self.num_train_timesteps // original) - 1
        out: np.ndarray = distilled[np.linspace(0, original, steps, endpoint=False).astype(int)].astype(np.int32)
        return out

    def _spaced(self, steps: int) -> np.ndarray:
        """Returns (steps,) timesteps, decreasing.

        Source: table 2 of "Common Diffusion Noise Schedules and Sample Steps are Flawed" (arXiv 2305.08891).
        """
        n = self.num_train_timesteps
        if not 1 <= steps <= n:
            raise UsageError(f"steps must be in 1..num_train_timesteps ({n}), got {steps}")
        if self.timestep_spacing == "linspace":
            return np.linspace(0, n - 1, steps)[::-1]
        if self.timestep_spacing == "trailing":
            # For some numbers of steps rounding gives one timestep too many, -1.
            return np.arange(n, 0, -n / steps).round()[:steps] - 1
        timesteps = np.arange(steps)[::-1] * (n // steps) + float(self.steps_offset)
        if timesteps[0] >= n:
            start = f"{steps} steps with steps_offset {self.steps_offset} start at {timesteps[0]:.0f}"
            raise UsageError(f"{start}, after the last timestep {n - 1}")
        return timesteps
