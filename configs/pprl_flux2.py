"""Proxy Prompt RL of FLUX.2 klein as the paper does it: LoRA 128/256, rate 1e-4, groups of 16, 8 steps, 512 x 512.

clvr train configs/pprl_flux2.py --model black-forest-labs/FLUX.2-klein-base-4B --dataset data/trajectories \\
    --judge CodeGoat24/UnifiedReward-2.0-qwen3vl-8b --edit-judge CodeGoat24/UnifiedReward-Edit-qwen3vl-8b
clvr plan configs/pprl_flux2.py --preset klein-9b --planned update --topology v6e:16x16

The dataset needs proxy prompts. UnifiedReward 2.0 and UnifiedReward-Edit judge on the devices that train, or behind an
OpenAI-compatible server (`--reward-url`; vLLM, SGLang), while the next images are generated. Train a base model, not
a distilled one, and merge afterwards (`clvr merge`). Never run on the real weights: there was no accelerator. The tests
run it on `shapes-tiny`, whose models are of the same classes. Every 9B variant of FLUX.2 klein is for non-commercial
use only.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from clvr_jax import rl
from clvr_jax.arguments import StoragePath
from clvr_jax.data.trajectories.dataset import TrajectoryDataset
from clvr_jax.data.trajectories.proxy_steps import ProxySteps
from clvr_jax.models.common.lora import LoRAConfig
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.sharding import MeshConfig
from clvr_jax.tasks import flux2, reward_options
from clvr_jax.tasks.bundles import check_model_given
from clvr_jax.tasks.qwen3_vl import JudgingConfig, judging_program
from clvr_jax.training.plan import Program

fit = rl.fit


@dataclasses.dataclass(frozen=True)
class Config(reward_options.RewardOptions):
    """Configuration of the run, and of what `clvr plan` compiles."""

    train: rl.PPRLConfig = rl.PPRLConfig(lora=LoRAConfig(targets=flux2.LORA_TARGETS), mesh=MeshConfig(fsdp=-1))
    """Configuration of the training."""
    sampler: flux2.Sampler = flux2.Sampler()
    """Configuration of the rollout."""
    model: str = ""
    """Start from this model: a pipeline directory or a Hugging Face id; it must be given to train."""
    dataset: StoragePath = Path("data/trajectories")
    """Train on this dataset of trajectories with proxy prompts, a directory that `clvr synth` wrote, also in a bucket.
    """
    dtype: str = "bfloat16"
    """Load the frozen weights in this dtype."""
    remat: str = "attention"
    """Choose what the backward pass keeps of each block: "dots" keeps all matrix products, "attention" only the outputs
    of attention, and "full" nothing, which takes the least memory and the most time."""
    preset: Literal["klein-4b", "klein-9b"] = "klein-4b"
    """With `clvr plan` only: plan for this size of FLUX.2 klein."""
    references: int = 3
    """With `clvr plan` only: plan for this many images before the one that is generated."""
    planned: Literal["rollout", "reward", "update"] = "rollout"
    """With `clvr plan` only: plan the rollout, the optimizer step (update), or a Qwen3-VL 8B that judges the edits of a
    call on the same devices (reward)."""

    @property
    def mesh(self) -> MeshConfig:
        """The mesh of the run, and of its plan."""
        return self.train.mesh


CONFIG = Config()


def task(config: Config) -> rl.PPRLTask:
    """Returns the task for `fit`."""
    check_model_given("pprl_flux2", config.model, "FLUX.2 klein")
    reward = reward_options.make_reward("pprl_flux2", config, config.dtype, config.train.microbatch_size)
    reward_options.check_proxy_prompt_options("pprl_flux2", config)
    steps = ProxySteps(TrajectoryDataset(config.dataset), config.sampler.size, is_live=bool(config.proxy_prompt_url))
    generator = reward_options.make_proxy_prompt_generator(config, steps)
    pipe = Flux2Pipeline.from_pretrained(config.model, config.dtype)
    task = flux2.pprl_task("PPRL of FLUX.2", pipe, config.train, config.sampler, steps, reward, config.remat)
    return dataclasses.replace(task, proxy_prompt_generator=generator)


def program(config: Config) -> Program:
    """Returns a call of the rollout, of its judge, or of the update, for groups of the full sizes."""
    if config.planned == "reward":
        return judging_program(JudgingConfig(batch_size=config.train.microbatch_size, size=config.sampler.size))
    models = flux2.Flux2Models.abstract(config.preset, config.dtype)
    policy = flux2.planned_policy(config.preset, models, config.train, config.sampler, config.references, config.remat)
    return policy.program(config.planned)
