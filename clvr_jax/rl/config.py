"""Configuration of Proxy Prompt RL."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from clvr_jax.errors import UsageError
from clvr_jax.files.json_input import JSON
from clvr_jax.merging.deltas import apply_delta
from clvr_jax.models.common.lora import LoRAConfig
from clvr_jax.rl.algorithms import DiffusionNFT, FlowGRPO, GRPOConfig, NFTConfig, RLAlgorithm
from clvr_jax.rl.policy import DiffusionPolicy
from clvr_jax.sharding import MeshConfig
from clvr_jax.training.checkpoint import CheckpointConfig
from clvr_jax.training.loop import LoopConfig
from clvr_jax.training.optimization.optimizer import AdamWConfig
from clvr_jax.trees import Params


@dataclasses.dataclass(frozen=True)
class PPRLConfig:
    """Configuration of a PPRL run; the defaults are the paper's, and DiffusionNFT's where the paper gives none."""

    epochs: int = 100
    """Train for this many epochs of sampling and learning."""
    prompts_per_epoch: int = 32
    """Sample images for this many trajectory steps in each epoch, one group of images for each."""
    group_size: int = 16
    """Number of images sampled for each trajectory step, which are compared with each other."""
    groups_per_microbatch: int = 1
    """Number of groups of one shape that are computed at once; every device needs at least one of their images."""
    updates_per_epoch: int = 1
    """Number of optimizer steps in each epoch; each takes an equal share of the groups."""
    timesteps_per_sample: int = 4
    """Number of timesteps of the sampler at which each image is learned from; all of them are used if there are fewer.
    """
    advantage_normalization: Literal["group", "epoch"] = "group"
    """Divide advantages by the standard deviation of the rewards in the group, or of all rewards in the epoch."""
    algorithm: Literal["nft", "grpo"] = "nft"
    """RL algorithm: nft is DiffusionNFT, and grpo is Flow-GRPO, a baseline."""
    nft: NFTConfig = NFTConfig()
    """Configuration of DiffusionNFT, used with algorithm nft."""
    grpo: GRPOConfig = GRPOConfig()
    """Configuration of Flow-GRPO, used with algorithm grpo."""
    old_decay: Literal["linear", "delayed"] = "linear"
    """How the old policy, which samples, follows the trained one. linear: its decay grows by 0.001 a step up to 0.5.
    delayed: it is a copy for 75 steps, then its decay grows up to 0.999. Flow-GRPO always samples from the trained
    policy."""
    ema_decay: float = 0.9
    """Decay of the exponential moving average (EMA) of the parameters, which is what is evaluated and exported."""
    lora: LoRAConfig = LoRAConfig()
    """Configuration of the LoRA that is trained."""
    optimizer: AdamWConfig = AdamWConfig()
    """Configuration of the optimizer."""
    max_nonfinite_steps: int = 8
    """End the run after this many optimizer steps in a row whose loss or gradients are not finite; fewer are skipped
    and counted."""
    grid_every: int = 10
    """Write a grid of sampled images every so many epochs; 0 writes none."""
    seed: int = 0
    """Seed of all random numbers; the same seed on the same number of devices gives the same run."""
    mesh: MeshConfig = MeshConfig()
    """Configuration of the device mesh."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Configuration of the checkpoints, which are saved at the end of an epoch."""
    wandb: str = ""
    """Log to this project of Weights & Biases as well; nothing is logged there if it is empty."""
    goodput_logger: str = ""
    """Report the goodput to this logger of Google Cloud Logging as well, by the package ml-goodput-measurement; nothing
    is reported there if it is empty."""
    profile: int | None = None
    """Write a profile of this epoch, counted from 0, to OUT/profile; nothing is profiled if it is not given."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "groups": "prompts_per_epoch",
        "group": "group_size",
        "groups_per_call": "groups_per_microbatch",
        "updates": "updates_per_epoch",
        "timesteps": "timesteps_per_sample",
        "spread": "advantage_normalization",
        "method": "algorithm",
        "lora_rank": "lora.rank",
        "lora_alpha": "lora.alpha",
        "lora_targets": "lora.targets",
        "learning_rate": "optimizer.learning_rate",
        "b1": "optimizer.b1",
        "b2": "optimizer.b2",
        "weight_decay": "optimizer.weight_decay",
        "clip_norm": "optimizer.clip_norm",
        "bad_updates": "max_nonfinite_steps",
        "save_minutes": "checkpoint.save_interval_minutes",
        "keep": "checkpoint.max_to_keep",
    }
    """Names in `recipe.json` of runs before these fields were renamed -> today's, for `config_from_json`."""

    def __post_init__(self) -> None:
        counts = ("epochs", "prompts_per_epoch", "groups_per_microbatch", "updates_per_epoch", "timesteps_per_sample")
        if low := [name for name in (*counts, "max_nonfinite_steps") if getattr(self, name) < 1]:
            raise UsageError(f"PPRLConfig: {', '.join(low)} must be at least 1")
        if self.group_size < 2:
            raise UsageError(
                f"PPRLConfig: group_size is {self.group_size}; an image is compared with others of its group, so it "
                "must be at least 2"
            )
        if self.grid_every < 0 or not 0 <= self.seed < 2**31:
            raise UsageError("PPRLConfig: grid_every and seed must be at least 0, seed below 2^31")
        if not 0 <= self.ema_decay < 1:
            raise UsageError(f"PPRLConfig: ema_decay must be in [0, 1), got {self.ema_decay}")

    @property
    def microbatch_size(self) -> int:
        """Number of samples in a microbatch."""
        return self.groups_per_microbatch * self.group_size

    def loop(self, name: str) -> LoopConfig:
        """Returns the fields that the training loop needs, for a task of some name."""
        return LoopConfig(
            name=name,
            unit="epoch",
            iterations=self.epochs,
            max_nonfinite_steps=self.max_nonfinite_steps,
            checkpoint=self.checkpoint,
            note=lambda metrics: f"reward {metrics['reward']:.3f}  {metrics['seconds']:.1f} s/epoch",
            wandb=self.wandb,
            goodput_logger=self.goodput_logger,
            logged_config=dataclasses.asdict(self),
            profile=range(0) if self.profile is None else range(self.profile, self.profile + 1),
        )

    @property
    def identity(self) -> dict[str, JSON]:
        """The options that a checkpoint depends on, as `begun.json` names them; a resumed run must have the same."""
        return {"method": self.algorithm, "lora_rank": self.lora.rank, "lora_alpha": self.lora.alpha}

    def make_algorithm(self, policy: DiffusionPolicy) -> RLAlgorithm:
        """Returns the algorithm for a policy."""
        if self.algorithm == "grpo":
            return FlowGRPO(policy, self.grpo)
        return DiffusionNFT(policy, self.nft, self.old_decay)

    def init_params(self, base: Params) -> Params:
        """Returns the initial parameters: a LoRA tree that changes nothing, or float32 copies of all parameters.

        Args:
          base: weights of the initial model; their shapes are enough for a LoRA.
        """
        if self.lora.rank:
            return self.lora.init(base, jax.random.key(self.seed))
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), base)

    def policy_weights(self, base: Params, params: Params) -> Params:
        """Returns the weights of a policy from its parameters, in the base's dtypes; a LoRA is multiplied out."""
        if self.lora.rank:
            return apply_delta(base, params)
        return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), params, base)
