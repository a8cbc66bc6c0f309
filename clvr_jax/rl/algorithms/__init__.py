"""RL algorithms for diffusion policies: one file each, with its configuration, its loss and its sampler.

A new algorithm is a file here with a class that has the methods of `RLAlgorithm`, and a line in
`PPRLConfig.make_algorithm`.
"""

from clvr_jax.rl.algorithms.base import Predictors, RLAlgorithm
from clvr_jax.rl.algorithms.diffusion_nft import DiffusionNFT, NFTConfig, nft_loss
from clvr_jax.rl.algorithms.flow_grpo import FlowGRPO, GRPOConfig, grpo_loss

__all__ = [
    "DiffusionNFT",
    "FlowGRPO",
    "GRPOConfig",
    "NFTConfig",
    "Predictors",
    "RLAlgorithm",
    "grpo_loss",
    "nft_loss",
]
