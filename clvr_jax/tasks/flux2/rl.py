"""Proxy Prompt RL of FLUX.2's transformer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from clvr_jax.convert.architectures import FLUX2_TRANSFORMER
from clvr_jax.convert.lora.trees import save_lora
from clvr_jax.cost_model.flops import flux2_flops, qwen3_flops
from clvr_jax.cost_model.flops_images import decoder_flops, encoder_flops
from clvr_jax.data.preprocessing.histories import fit_history
from clvr_jax.data.preprocessing.text import encode_prompts
from clvr_jax.data.trajectories.proxy_steps import ProxyStep, ProxySteps
from clvr_jax.diffusion import FlowProcess, classifier_free_guidance, euler_solve, flow_sigmas
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.flux2.programs import (
    attended_references,
    decode,
    encode_references,
    encode_text,
    velocity_field,
)
from clvr_jax.rewards import Reward
from clvr_jax.rl import DiffusionPolicy, PPRLConfig, PPRLTask, Predictor
from clvr_jax.sharding import replicate
from clvr_jax.tasks.flux2.models import Flux2Models, pipeline_export
from clvr_jax.tasks.rl_programs import PlannedPolicy
from clvr_jax.trees import Batch, Params

LORA_TARGETS = (r"attn\.(to|add)_", r"ff\w*\.linear")
"""All products of the blocks: attention, MLPs, and where both are one."""


@dataclass(frozen=True)
class Sampler:
    """Configuration of the rollout."""

    steps: int = 8
    """Number of steps of Euler's method in the rollout."""
    guidance: float = 4.0
    """Classifier-free guidance in the rollout; 1 is without guidance, and above 1 each step takes two network
    evaluations."""
    size: int = 512
    """Sample images with sides of this many pixels."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.guidance < 1 or self.size < 1:
            raise UsageError(f"{self}: steps, guidance and size must be at least 1")


def pprl_task(
    name: str,
    pipe: Flux2Pipeline,
    train: PPRLConfig,
    sampler: Sampler,
    steps: ProxySteps,
    reward: Reward,
    remat: str = "dots",
    save_dtype: str = "bfloat16",
) -> PPRLTask:
    """Returns the PPRL task of a loaded pipeline; exports the pipeline and, in `lora/`, the LoRA.

    Args:
      name: for progress lines and errors.
      pipe: the initial model.
      train, sampler: options of the run and of its rollout.
      steps: trajectory steps that images are sampled for.
      reward: scores the images.
      remat: what the backward pass keeps of each block, a name in `layers.REMAT`.
      save_dtype: of the exported pipeline; a LoRA is exported in float32.
    Raises: ClvrError if the pipeline is a distilled one; UsageError for a size that is no whole number of tokens.
    """
    if pipe.settings.is_distilled:
        raise ClvrError(f"{name}: the model is distilled; RL blurs such models: train its base, and merge afterwards")
    models = Flux2Models.of(pipe)
    base, key_mapping = models.transformer.weights, FLUX2_TRANSFORMER.key_mapping(models.transformer.config)
    export, tokenizer, buckets = pipeline_export(pipe, save_dtype), pipe.tokenizer, pipe.settings.text_buckets

    def ids(chosen: Sequence[ProxyStep]) -> tuple[np.ndarray, np.ndarray]:
        histories = [(steps.prompt(step), [*steps.replies(step), step.last_text]) for step in chosen]
        fitted = [fit_history(tokenizer, *history, max(buckets)) for history in histories]
        return encode_prompts(tokenizer, [history.text for history in fitted], buckets)

    def bucket(step: ProxyStep) -> tuple[int, int]:
        return len(step.history), ids([step])[0].shape[1]

    def data(chosen: Sequence[ProxyStep]) -> dict[str, np.ndarray]:
        given, mask = ids(chosen)
        empty, empty_mask = encode_prompts(tokenizer, [""] * len(chosen), (given.shape[1],))
        shape = (len(chosen), len(chosen[0].history), sampler.size, sampler.size, 3)
        references = np.array([steps.references(step) for step in chosen], np.uint8).reshape(shape)
        return {"ids": given, "mask": mask, "empty_ids": empty, "empty_mask": empty_mask, "references": references}

    def save(weights: Params, trained: Params, directory: Path) -> None:
        export(weights, directory)
        if train.lora.rank:
            # In float32: what RL changes is small beside the spacing of bfloat16 numbers.
            save_lora(directory / "lora", trained, key_mapping, base)

    policy = flux2_policy(models, sampler, remat)
    frozen = {"text_encoder": models.text_encoder.weights, "vae": models.vae.weights}
    return PPRLTask(name, train, base, frozen, policy, steps, data, bucket, reward, save)


def flux2_policy(models: Flux2Models, sampler: Sampler, remat: str) -> DiffusionPolicy:
    """Returns FLUX.2 as a policy: the velocity of an image's tokens beside its references, guided or not.

    Args:
      models: loaded or abstract; the policy computes in the dtype of the transformer's weights.
      sampler: the rollout.
      remat: what the backward pass keeps of each block, a name in `layers.REMAT`.
    Raises: UsageError for a size that is no whole number of tokens.
    """
    vae_config, layers = models.vae.config, models.settings.text_encoder_out_layers
    text_encoder_def, vae_def = models.text_encoder.graphdef, models.vae.graphdef
    dtype = jax.tree.leaves(models.transformer.weights)[0].dtype
    graphdef = models.training_graphdef(dtype, remat)
    if sampler.size % vae_config.token_pixels:
        raise UsageError(f"size {sampler.size}: must be a multiple of {vae_config.token_pixels} pixels")
    side = sampler.size // vae_config.token_pixels
    grid, tokens, mode = (side, side), side * side, models.settings.reference_cache
    sigmas = flow_sigmas(sampler.steps, tokens)

    def encode_conditions(frozen: Params, data: Batch) -> dict[str, jax.Array]:
        groups = len(data["ids"])

        def read(ids: jax.Array, mask: jax.Array) -> jax.Array:
            return encode_text(text_encoder_def, frozen["text_encoder"], ids, mask, layers)

        found = {
            "text": read(data["ids"], data["mask"]),
            "references": encode_references(vae_def, replicate(frozen["vae"]), data["references"], dtype),
        }
        if sampler.guidance > 1:
            # The same for all groups, so read once.
            found["empty"] = jnp.repeat(read(data["empty_ids"][:1], data["empty_mask"][:1]), groups, axis=0)
        return found

    def predictor(weights: Params, conditions: dict[str, jax.Array]) -> Predictor:
        model = nnx.merge(graphdef, weights)
        sizes = [grid] * (conditions["references"].shape[1] // tokens)
        references = attended_references(model, conditions["references"], sizes, mode)
        field = velocity_field(model, references, grid, sizes)
        if "empty" not in conditions:
            return lambda x, t_b: field(x, t_b, conditions["text"])

        def both(x: jax.Array, t_b: jax.Array, text: jax.Array) -> jax.Array:
            return field(x, jnp.concatenate([t_b, t_b]), text)

        return classifier_free_guidance(both, conditions["text"], conditions["empty"], sampler.guidance)

    def solve(predictor: Predictor, noise: jax.Array) -> jax.Array:
        return euler_solve(lambda x, sigma: predictor(x, jnp.full(len(x), sigma)), noise, jnp.asarray(sigmas))

    def decode_images(frozen: Params, latents: jax.Array) -> jax.Array:
        return decode(vae_def, replicate(frozen["vae"]), latents.astype(dtype).reshape(len(latents), *grid, -1))

    shape = (tokens, models.transformer.config.in_channels)
    return DiffusionPolicy(encode_conditions, predictor, solve, decode_images, shape, sigmas[:-1], FlowProcess())


def planned_policy(
    title: str, models: Flux2Models, train: PPRLConfig, sampler: Sampler, references: int, remat: str
) -> PlannedPolicy:
    """Returns the policy of `pprl_task` and the costs of a microbatch for the planner.

    Args:
      title: the model, for the names of programs.
      models: abstract models; the transformer is the base of the LoRA.
      train, sampler, remat: see `pprl_task`.
      references: number of images before the one that is generated.
    """
    groups, rows, side, vae = train.groups_per_microbatch, train.microbatch_size, sampler.size, models.vae.config
    passes, text = 2 if sampler.guidance > 1 else 1, models.settings.text_buckets[0]
    image, layers = (side // vae.token_pixels) ** 2, max(models.settings.text_encoder_out_layers)
    texts = {
        name: jax.ShapeDtypeStruct((groups, text), jnp.int32) for name in ("ids", "mask", "empty_ids", "empty_mask")
    }
    shape = jax.ShapeDtypeStruct((groups, references, side, side, 3), jnp.uint8)
    return PlannedPolicy(
        title,
        flux2_policy(models, sampler, remat),
        train,
        size=side,
        steps=sampler.steps,
        base=models.transformer.weights,
        frozen={"text_encoder": models.text_encoder.weights, "vae": models.vae.weights},
        data={**texts, "references": shape},
        reads={"text_encoder": passes, "vae": 1 + references},
        evaluation=flux2_flops(
            models.transformer.config, passes * rows, text=text, image=image, references=references * image
        ),
        other_flops=(
            qwen3_flops(models.text_encoder.config, passes * groups, text, layers=layers, logits=0).forward,
            encoder_flops(vae, groups * references, side, side).forward,
            decoder_flops(vae, rows, side, side).forward,
        ),
    )
