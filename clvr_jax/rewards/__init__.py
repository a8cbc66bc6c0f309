"""Rewards of Proxy Prompt RL: scores of images by reward models that read short texts, or by a program."""

from clvr_jax.rewards.edit_rrm import EditRRM
from clvr_jax.rewards.firm import FirmEdit, FirmGen
from clvr_jax.rewards.mesh import MeshReward
from clvr_jax.rewards.proxy import LastTextReward, ProxyReward
from clvr_jax.rewards.reward import EditJudge, ImageJudge, Reward, RewardInput, Score, Scores, WeightedReward
from clvr_jax.rewards.shapes import ShapesJudge
from clvr_jax.rewards.text import TextJudge, TextReward
from clvr_jax.rewards.unified_reward import UnifiedReward, UnifiedRewardEdit

__all__ = [
    "EditJudge",
    "EditRRM",
    "FirmEdit",
    "FirmGen",
    "ImageJudge",
    "LastTextReward",
    "MeshReward",
    "ProxyReward",
    "Reward",
    "RewardInput",
    "Score",
    "Scores",
    "ShapesJudge",
    "TextJudge",
    "TextReward",
    "UnifiedReward",
    "UnifiedRewardEdit",
    "WeightedReward",
]
