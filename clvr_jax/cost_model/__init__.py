"""A cost model of compiled programs: FLOPs, memory, communication, a lower bound of the time, and dollars."""

from clvr_jax.cost_model.flops import Flops, flux2_flops, qwen3_flops, qwen3_vl_flops
from clvr_jax.cost_model.flops_images import decoder_flops, encoder_flops, unet_flops
from clvr_jax.cost_model.hardware import CHIPS, Chip, Topology, parse_topology
from clvr_jax.cost_model.hlo import Collective, collectives, sent_by_axis
from clvr_jax.cost_model.report import Report, elements_per_chip, measure
from clvr_jax.cost_model.roofline import Roofline, fits, interconnect_seconds, roofline, run_cost, training_hbm_bytes

__all__ = [
    "CHIPS",
    "Chip",
    "Collective",
    "Flops",
    "Report",
    "Roofline",
    "Topology",
    "collectives",
    "decoder_flops",
    "elements_per_chip",
    "encoder_flops",
    "fits",
    "flux2_flops",
    "interconnect_seconds",
    "measure",
    "parse_topology",
    "qwen3_flops",
    "qwen3_vl_flops",
    "roofline",
    "run_cost",
    "sent_by_axis",
    "training_hbm_bytes",
    "unet_flops",
]
