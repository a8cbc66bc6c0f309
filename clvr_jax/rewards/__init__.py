"""Rewards of Proxy Prompt RL: what a picture is worth, by reward models that read short texts, or by a program."""

from clvr_jax.rewards.mesh import MeshReward
from clvr_jax.rewards.proxy import LastTextReward, ProxyReward
from clvr_jax.rewards.reward import Case, EditJudge, Marks, PictureJudge, Reward, Scores, WeightedReward
from clvr_jax.rewards.shapes import ShapesJudge
from clvr_jax.rewards.unified_reward import UnifiedReward, UnifiedRewardEdit

__all__ = [
    "Case",
    "EditJudge",
    "LastTextReward",
    "Marks",
    "MeshReward",
    "PictureJudge",
    "ProxyReward",
    "Reward",
    "Scores",
    "ShapesJudge",
    "UnifiedReward",
    "UnifiedRewardEdit",
    "WeightedReward",
]
