"""Flow matching: schedules, solvers, guidance. Everything takes a velocity function; nothing here knows a model."""

from clvr_jax.diffusion.guidance import guided
from clvr_jax.diffusion.schedule import empirical_mu, flow_sigmas
from clvr_jax.diffusion.solvers import Velocity, euler_solve

__all__ = ["Velocity", "empirical_mu", "euler_solve", "flow_sigmas", "guided"]
