"""Flow matching and noise prediction: forward processes, schedules, solvers, guidance.

Everything takes a function that predicts a velocity or noise; nothing here knows a model.
"""

from clvr_jax.diffusion.forward_process import FlowProcess, ForwardProcess, VariancePreservingProcess, append_dims
from clvr_jax.diffusion.guidance import guided
from clvr_jax.diffusion.noise_schedule import NoiseSchedule
from clvr_jax.diffusion.noise_solvers import Prediction, ddim_solve, euler_noise_solve, lcm_solve
from clvr_jax.diffusion.schedule import KLEIN_SCHEDULE, FlowSchedule, empirical_mu, flow_sigmas
from clvr_jax.diffusion.solvers import Velocity, euler_solve

__all__ = [
    "KLEIN_SCHEDULE",
    "FlowProcess",
    "FlowSchedule",
    "ForwardProcess",
    "NoiseSchedule",
    "Prediction",
    "VariancePreservingProcess",
    "Velocity",
    "append_dims",
    "ddim_solve",
    "empirical_mu",
    "euler_noise_solve",
    "euler_solve",
    "flow_sigmas",
    "guided",
    "lcm_solve",
]
