"""Proxy Prompt RL of the UNet of SDXL, or of Stable Diffusion 1 and 2: a LoRA, trained on first images.

clvr train pprl_sdxl --model stabilityai/stable-diffusion-xl-base-1.0 --dataset data/trajectories \\
    --judge CodeGoat24/UnifiedReward-2.0-qwen3vl-8b
clvr plan pprl_sdxl --planned update --topology v6e:4x4

The model is conditioned on text alone, so only the first image of each trajectory is sampled; its text is the prompt,
truncated to CLIP's context. The dataset needs proxy prompts. Train a base model, not a distilled one. Never run on the
real weights: there was no accelerator. The tests run it on a small model of the same classes.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from clvr_jax import rl
from clvr_jax.arguments import StoragePath
from clvr_jax.data.trajectories.dataset import TrajectoryDataset
from clvr_jax.data.trajectories.proxy_steps import ProxySteps
from clvr_jax.models.common.lora import LoRAConfig
from clvr_jax.pipelines.sdxl import SDXLPipeline
from clvr_jax.sharding import MeshConfig
from clvr_jax.tasks import reward_options, sdxl
from clvr_jax.tasks.bundles import check_model_given
from clvr_jax.training.plan import Program

fit = rl.fit


@dataclasses.dataclass(frozen=True)
class Config(reward_options.ImageRewardOptions):
    """Configuration of the run, and of what `clvr plan` compiles."""

    train: rl.PPRLConfig = rl.PPRLConfig(
        lora=LoRAConfig(rank=64, alpha=128.0, targets=sdxl.LORA_TARGETS), mesh=MeshConfig(fsdp=-1)
    )
    """Configuration of the training."""
    sampler: sdxl.Sampler = sdxl.Sampler()
    """Configuration of the rollout."""
    model: str = ""
    """Start from this model: a pipeline directory or a Hugging Face id; it must be given to train."""
    dataset: StoragePath = Path("data/trajectories")
    """Train on this dataset of trajectories with proxy prompts, a directory that `clvr synth` wrote, also in a bucket.
    """
    dtype: str = "bfloat16"
    """Load the frozen weights in this dtype."""
    remat: str = "dots"
    """Choose what the backward pass keeps of each block: "dots" keeps all matrix products, "attention" only the outputs
    of attention, and "full" nothing, which takes the least memory and the most time."""
    planned: Literal["rollout", "update"] = "rollout"
    """With `clvr plan` only: plan the rollout, or the optimizer step (update), of SDXL."""

    @property
    def mesh(self) -> MeshConfig:
        """The mesh of the run, and of its plan."""
        return self.train.mesh


CONFIG = Config()


def task(config: Config) -> rl.PPRLTask:
    """Returns the task for `fit`."""
    check_model_given("pprl_sdxl", config.model, "SDXL")
    reward = reward_options.make_reward("pprl_sdxl", config, config.dtype, config.train.microbatch_size)
    reward_options.check_proxy_prompt_options("pprl_sdxl", config)
    is_live = bool(config.proxy_prompt_url)
    dataset = TrajectoryDataset(config.dataset)
    steps = ProxySteps(dataset, config.sampler.size, is_live=is_live, first_images_only=True)
    generator = reward_options.make_proxy_prompt_generator(config, steps)
    pipe = SDXLPipeline.from_pretrained(config.model, config.dtype)
    task = sdxl.pprl_task("PPRL of SDXL", pipe, config.train, config.sampler, steps, reward, config.remat)
    return dataclasses.replace(task, proxy_prompt_generator=generator)


def program(config: Config) -> Program:
    """Returns a call of the rollout, or of the update, for groups of SDXL's size."""
    models = sdxl.SDXLModels.abstract(config.dtype)
    policy = sdxl.planned_policy("SDXL", models, config.train, config.sampler, config.remat)
    return policy.program(config.planned)
