"""Flow matching and noise prediction: forward processes, schedules, solvers, guidance.

All functions get a function that predicts velocity or noise, and do not depend on a model.
"""

from clvr_jax.diffusion.forward_process import FlowProcess, ForwardProcess, VariancePreservingProcess, append_dims
from clvr_jax.diffusion.guidance import classifier_free_guidance
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
    "classifier_free_guidance",
    "ddim_solve",
    "empirical_mu",
    "euler_noise_solve",
    "euler_solve",
    "flow_sigmas",
    "lcm_solve",
]
