"""Proxy Prompt RL of the UNet of Stable Diffusion XL, 1 and 2, which generates first images from a text alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from clvr_jax.convert.architectures import UNET
from clvr_jax.convert.lora.trees import save_lora
from clvr_jax.cost_model.flops_images import decoder_flops, unet_flops
from clvr_jax.data.trajectories.proxy_steps import ProxyStep, ProxySteps
from clvr_jax.diffusion import VariancePreservingProcess, classifier_free_guidance, ddim_solve
from clvr_jax.errors import UsageError
from clvr_jax.pipelines.sdxl import SDXLPipeline
from clvr_jax.pipelines.sdxl.pipeline import Conditions, decode, encode_text
from clvr_jax.rewards import Reward
from clvr_jax.rl import DiffusionPolicy, PPRLConfig, PPRLTask, Predictor
from clvr_jax.sharding import replicate
from clvr_jax.tasks.rl_programs import PlannedPolicy
from clvr_jax.tasks.sdxl.models import SDXLModels, pipeline_export
from clvr_jax.trees import Batch, Params

LORA_TARGETS = (r"attn\d\.to_", r"ff\.net")
"""All products of the transformer blocks: self-attention, cross-attention and MLPs."""


@dataclass(frozen=True)
class Sampler:
    """Configuration of the rollout."""

    steps: int = 20
    """Number of steps of DDIM in the rollout."""
    guidance: float = 5.0
    """Classifier-free guidance in the rollout; 1 is without guidance, and above 1 each step takes two network
    evaluations."""
    size: int = 1024
    """Sample images with sides of this many pixels."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.guidance < 1 or self.size < 1:
            raise UsageError(f"{self}: steps, guidance and size must be at least 1")


def pprl_task(
    name: str,
    pipe: SDXLPipeline,
    train: PPRLConfig,
    sampler: Sampler,
    steps: ProxySteps,
    reward: Reward,
    remat: str = "dots",
    save_dtype: str = "float16",
) -> PPRLTask:
    """Returns the PPRL task of a loaded pipeline; exports the pipeline and, in `lora/`, the LoRA.

    Args:
      name: for progress lines and errors.
      pipe: the initial model.
      train, sampler: options of the run and of its rollout.
      steps: first images of trajectories. The text of each is its prompt, truncated to CLIP's context.
      reward: scores the images.
      remat: what the backward pass keeps of each block, a name in `layers.REMAT`.
      save_dtype: of the exported pipeline; a LoRA is exported in float32.
    Raises: ClvrError if the pipeline is a distilled one; UsageError for edits, or a size that the VAE cannot encode.
    """
    if any(step.history for step in steps.steps):
        raise UsageError(f"{name}: the model is conditioned on text alone; use the first images of trajectories only")
    models = SDXLModels.of(pipe)
    base, key_mapping = models.unet.weights, UNET.key_mapping(models.unet.config)
    export, encode_ids = pipeline_export(pipe, save_dtype), models.encode_ids

    def data(chosen: Sequence[ProxyStep]) -> dict[str, tuple[np.ndarray, ...]]:
        return {"ids": encode_ids([steps.prompt(step) for step in chosen]), "empty_ids": encode_ids([""])}

    def save(weights: Params, trained: Params, directory: Path) -> None:
        export(weights, directory)
        if train.lora.rank:
            # In float32: what RL changes is small beside the spacing of float16 numbers.
            save_lora(directory / "lora", trained, key_mapping, base)

    policy = sdxl_policy(models, sampler, remat)
    return PPRLTask(name, train, base, _frozen(models), policy, steps, data, lambda step: 0, reward, save)


def sdxl_policy(models: SDXLModels, sampler: Sampler, remat: str) -> DiffusionPolicy:
    """Returns Stable Diffusion as a policy: the UNet's prediction of noise or v under a text, guided or not.

    Args:
      models: loaded or abstract; the policy computes in the dtype of the UNet's weights.
      sampler: the rollout.
      remat: what the backward pass keeps of each block, a name in `layers.REMAT`.
    Raises: UsageError for a size that the VAE cannot encode.
    """
    schedule, config, downscale = models.schedule, models.unet.config, models.vae.config.downscale
    if sampler.size % downscale:
        raise UsageError(f"size {sampler.size}: must be a multiple of {downscale} pixels")
    side = sampler.size // downscale
    dtype = jax.tree.leaves(models.unet.weights)[0].dtype
    graphdef, vae_def = models.training_graphdef(dtype, remat), models.vae.graphdef
    text_defs = tuple(encoder.graphdef for encoder in models.text_encoders)
    # As in the pipeline: SDXL is guided away from zeros, the others from the empty text.
    guides_from_zeros = len(text_defs) == 2 and models.settings.force_zeros_for_empty_prompt
    takes_sizes = config.addition_embed_type is not None
    timesteps = schedule.ddim_timesteps(sampler.steps)

    def encode_conditions(frozen: Params, data: Batch) -> dict[str, Conditions]:
        rows = len(data["ids"][0])
        # Original size and target size are equal, and nothing was cropped.
        sizes = [sampler.size, sampler.size, 0, 0, sampler.size, sampler.size]
        time_ids = jnp.tile(jnp.asarray(sizes, jnp.float32), (rows, 1)) if takes_sizes else None

        def read(ids: tuple[jax.Array, ...]) -> Conditions:
            return Conditions(*encode_text(text_defs, frozen["text_encoders"], ids))

        text = read(data["ids"])
        found = {"conditional": text._replace(time_ids_b6=time_ids)}
        if sampler.guidance > 1:
            if guides_from_zeros:
                empty = jax.tree.map(jnp.zeros_like, text)
            else:  # the same for all groups, so read once
                empty = jax.tree.map(lambda leaf: jnp.repeat(leaf[:1], rows, axis=0), read(data["empty_ids"]))
            found["unconditional"] = empty._replace(time_ids_b6=time_ids)
        return found

    def predictor(weights: Params, conditions: dict[str, Conditions]) -> Predictor:
        # Copied and merged for each evaluation: Flax refuses to rematerialize a module whose variables are of an outer
        # trace, such as that around the loop of the solver.
        def predict(x: jax.Array, t_b: jax.Array, texts: Conditions) -> jax.Array:
            unet = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, weights))
            velocity: jax.Array = unet(x, t_b, **texts._asdict())
            return velocity

        given = conditions["conditional"]
        if "unconditional" not in conditions:
            return lambda x, t_b: predict(x, t_b, given)

        def both(x: jax.Array, t_b: jax.Array, texts: Conditions) -> jax.Array:
            return predict(x, jnp.concatenate([t_b, t_b]), texts)

        return classifier_free_guidance(both, given, conditions["unconditional"], sampler.guidance)

    def solve(predictor: Predictor, noise: jax.Array) -> jax.Array:
        return ddim_solve(lambda x, t: predictor(x, jnp.full(len(x), t)), noise, schedule, jnp.asarray(timesteps))

    def decode_images(frozen: Params, latents: jax.Array) -> jax.Array:
        return decode(vae_def, replicate(frozen["vae"]), latents.astype(dtype))

    process = VariancePreservingProcess(schedule)
    shape = (side, side, config.in_channels)
    return DiffusionPolicy(encode_conditions, predictor, solve, decode_images, shape, timesteps, process)


def planned_policy(title: str, models: SDXLModels, train: PPRLConfig, sampler: Sampler, remat: str) -> PlannedPolicy:
    """Returns the policy of `pprl_task` and the costs of a microbatch for the planner; see there for the arguments.

    The FLOPs of the text encoders, less than a hundredth of a rollout, are not counted.
    """
    groups, rows, passes = train.groups_per_microbatch, train.microbatch_size, 2 if sampler.guidance > 1 else 1
    side, length = sampler.size // models.vae.config.downscale, models.lengths[0]

    def ids(rows: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        return tuple(jax.ShapeDtypeStruct((rows, length), jnp.int32) for length in models.lengths)

    return PlannedPolicy(
        title,
        sdxl_policy(models, sampler, remat),
        train,
        size=sampler.size,
        steps=sampler.steps,
        base=models.unet.weights,
        frozen=_frozen(models),
        data={"ids": ids(groups), "empty_ids": ids(1)},
        reads={"text_encoders": 1, "vae": 1},
        evaluation=unet_flops(models.unet.config, passes * rows, side, side, length),
        other_flops=(decoder_flops(models.vae.config, rows, sampler.size, sampler.size).forward,),
    )


def _frozen(models: SDXLModels) -> dict[str, Params]:
    return {"text_encoders": tuple(encoder.weights for encoder in models.text_encoders), "vae": models.vae.weights}
