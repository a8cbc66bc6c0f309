"""Few-step distillation: a student with exactly the teacher's parameters learns to follow its guided path in few steps.

The student's noise levels divide the path from noise to image into windows. The teacher's ODE leads from a state at the
start of a window to its end in small steps; the student learns the one velocity that leads there in a straight line:

    target = (x_end - x_start) / (sigma_end - sigma_start)        x_t = x_start + (t - sigma_start) target
    loss = mean |student(x_t, t) - target|^2

where t is the window's start for a share of the timesteps, as when sampling, and else anywhere inside. Guidance is part
of the teacher's path, so that the student needs none. Nothing is added to the network: what distillation changed is a
difference of weights, which can be merged.

Every row goes through all windows, so that no evaluation of the teacher serves only to reach a state. Half of the rows
continue from the teacher's state, half from the state that the student's own step leads to, as when it samples.

Source: piecewise rectified flow (PeRFlow, arXiv 2405.07510); the student's own states are ours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import PyTree

from clvr_jax.diffusion import Velocity, classifier_free_guidance, euler_solve
from clvr_jax.errors import UsageError
from clvr_jax.trees import Params

Field = Callable[[jax.Array, jax.Array, PyTree], jax.Array]
"""(latents (b, t, c), timesteps (b,), condition: a tree of arrays of b rows) -> velocity (b, t, c)."""

_FOLLOWING = 0.5
"""Share of rows that continue from the student's states."""


@dataclass(frozen=True)
class DistillConfig:
    """Configuration of few-step distillation."""

    steps: int = 4
    """Number of sampler steps of the student."""
    substeps: int = 8
    """Number of teacher steps inside each step of the student."""
    guidance: float = 4.0
    """Classifier-free guidance of the teacher; 1 is without guidance, and above 1 each teacher step takes two network
    evaluations."""
    start_share: float = 0.5
    """Share of timesteps at the starts of the student's steps, where it samples; the others are uniform inside them."""

    def __post_init__(self) -> None:
        if min(self.steps, self.substeps) < 1 or self.guidance < 1:
            raise UsageError(f"{self}: steps, substeps and guidance must be at least 1")
        if not 0 <= self.start_share <= 1:
            raise UsageError(f"{self}: start_share must be in [0, 1]")

    @property
    def passes(self) -> int:
        """Returns the number of evaluations of the teacher in each substep."""
        return 2 if self.guidance > 1 else 1


class Windows(NamedTuple):
    """The states at the starts of all windows, and where the teacher goes from there; both (b, windows, t, c)."""

    starts: jax.Array
    ends: jax.Array


def distillation_loss(
    network: Callable[[Params], Field],
    params: Params,
    teacher: Params,
    conditional: PyTree,
    unconditional: PyTree,
    noise_btc: jax.Array,
    sigmas: ArrayLike,
    config: DistillConfig,
    key: jax.Array,
    teacher_network: Callable[[Params], Field] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the loss of a student, whose parameters are differentiated, on the paths from some noise.

    Args:
      network: weights -> field, of the student.
      params, teacher: weights of the student and of the teacher.
      conditional, unconditional: conditions with a row for each of `noise_btc`; without guidance the latter is unused.
      noise_btc: where the paths begin.
      sigmas: (steps + 1,) the student's noise levels, from 1 down to 0.
      config: see `DistillConfig`.
      key: for the rows that follow the student, and for timesteps.
      teacher_network: the same of the teacher, if it computes another function of its weights.
    Returns: scalar, float32; and the part of each window, `loss_window_0` and so on.
    """
    row_key, time_key = jax.random.split(key)
    count = noise_btc.shape[0]
    # The states of the student are not differentiated, only its velocity there.
    own = _at_all(network(jax.lax.stop_gradient(params)))
    guide = _at_all((teacher_network or network)(teacher))
    path = follow_windows(
        classifier_free_guidance(guide, conditional, unconditional, config.guidance)
        if config.passes == 2
        else lambda x, sigma: guide(x, sigma, conditional),
        lambda x, sigma: own(x, sigma, conditional),
        noise_btc,
        jax.random.bernoulli(row_key, _FOLLOWING, (count,)),
        sigmas,
        config.substeps,
    )
    field = network(params)
    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, config.steps, axis=0), conditional)
    return window_loss(lambda x, t: field(x, t, repeated), path, sigmas, time_key, config.start_share)


def follow_windows(
    teacher: Velocity,
    student: Velocity,
    noise_btc: jax.Array,
    follows_student_b: jax.Array,
    sigmas: ArrayLike,
    substeps: int,
) -> Windows:
    """Follows the teacher or the student through all windows.

    Args:
      teacher: with guidance. student: as it samples.
      noise_btc: starts of the paths.
      follows_student_b: rows whose next window begins where the student's step leads, not the teacher's.
      sigmas: (n + 1,) decreasing: the ends of the n windows.
      substeps: of the teacher in each window, equally long.
    """
    ends = jnp.asarray(sigmas, jnp.float32)
    levels_ns = jnp.linspace(ends[:-1], ends[1:], substeps + 1, axis=1)

    def through(x_btc: jax.Array, levels_s: jax.Array) -> tuple[jax.Array, Windows]:
        end = euler_solve(teacher, x_btc, levels_s)
        own = euler_solve(student, x_btc, levels_s[jnp.array([0, -1])])
        following = jnp.where(follows_student_b[:, None, None], own, end)
        return following, Windows(x_btc, end)

    _, found = jax.lax.scan(through, noise_btc, levels_ns)
    # Rows first, so that all windows of a row are on the same device.
    return Windows(*(jax.lax.stop_gradient(states).swapaxes(0, 1) for states in found))


def window_loss(
    student: Callable[[jax.Array, jax.Array], jax.Array],
    path: Windows,
    sigmas: ArrayLike,
    key: jax.Array,
    start_share: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the squared distance of the student to the straight path through each window.

    Args:
      student: (x_t of (b * n, t, c), timesteps (b * n,)) -> (b * n, t, c); the n windows of a row follow each other.
      path, sigmas: see `follow_windows`.
      key: for the timesteps.
      start_share: see `DistillConfig`.
    Returns: see `distillation_loss`.
    """
    rows, count = path.starts.shape[:2]
    levels = jnp.asarray(sigmas, jnp.float32)
    start_n, length_n = levels[:-1], jnp.diff(levels)
    start_key, inside_key = jax.random.split(key)
    at_start = jax.random.bernoulli(start_key, start_share, (rows, count))
    passed = jnp.where(at_start, 0.0, length_n * jax.random.uniform(inside_key, (rows, count)))[..., None, None]
    target = (path.ends - path.starts) / length_n[:, None, None]
    x_t = path.starts + passed * target
    t = start_n + passed[..., 0, 0]
    predicted = student(x_t.reshape(-1, *x_t.shape[2:]), t.reshape(-1)).reshape(target.shape)
    errors = jnp.mean(jnp.square((predicted - target).astype(jnp.float32)), axis=(0, 2, 3))
    return errors.mean(), {f"loss_window_{number}": error for number, error in enumerate(errors)}


def _at_all(field: Field) -> Callable[[jax.Array, jax.Array, PyTree], jax.Array]:
    """Returns the field at one timestep for all rows, as solvers take it."""

    def velocity(x: jax.Array, sigma: jax.Array, condition: PyTree) -> jax.Array:
        return field(x, jnp.full(x.shape[0], sigma), condition)

    return velocity
