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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from clvr_jax import rl
from clvr_jax.configs import qwen3_vl_judge
from clvr_jax.convert.architectures import FLUX2_TRANSFORMER, FLUX2_VAE, qwen3_hidden_states
from clvr_jax.convert.lora import save_lora
from clvr_jax.cost_model.flops import flux2_flops, qwen3_flops
from clvr_jax.cost_model.flops_images import decoder_flops, encoder_flops
from clvr_jax.data.histories import fit_history
from clvr_jax.data.proxy_steps import ProxyStep, ProxySteps
from clvr_jax.data.text import encode_prompts
from clvr_jax.data.trajectory_dataset import TrajectoryDataset
from clvr_jax.diffusion import FlowProcess, classifier_free_guidance, euler_solve, flow_sigmas
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.models.autoencoder_kl_flux2 import AutoencoderKLFlux2Config
from clvr_jax.models.flux2_transformer import Flux2Transformer, Flux2TransformerConfig
from clvr_jax.models.lora import LoRAConfig
from clvr_jax.pipelines.flux2 import KLEIN, Flux2Pipeline, Flux2Settings
from clvr_jax.pipelines.flux2_programs import decode, encode_references, encode_text, velocity_field
from clvr_jax.pipelines.vlm import Qwen3VLPipeline
from clvr_jax.providers.endpoint import Endpoint
from clvr_jax.providers.local import MeshChatModel
from clvr_jax.providers.openai_chat import OpenAIChatModel
from clvr_jax.rewards import LastTextReward, MeshReward, ProxyReward, Reward, UnifiedReward, UnifiedRewardEdit
from clvr_jax.rewards.proxy_prompt_generator import vlm_proxy_prompt_generator
from clvr_jax.rl import (
    DiffusionPolicy,
    PPRLConfig,
    Predictor,
    RandomSource,
    RolloutBatch,
    UpdateBatch,
    collect_rollout,
    loss_and_grads,
)
from clvr_jax.sharding import MeshConfig, process_allgather, replicate
from clvr_jax.training.plan import Program

fit = rl.fit

LORA_TARGETS = (r"attn\.(to|add)_", r"ff\w*\.linear")
"""All products of the blocks: attention, MLPs, and where both are one."""


@dataclasses.dataclass(frozen=True)
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


@dataclasses.dataclass(frozen=True)
class Config:
    """Configuration of the run, and of what `clvr plan` compiles."""

    train: PPRLConfig = PPRLConfig(lora=LoRAConfig(targets=LORA_TARGETS), mesh=MeshConfig(fsdp=-1))
    """Configuration of the training."""
    sampler: Sampler = Sampler()
    """Configuration of the rollout."""
    model: str = ""
    """Start from this model: a pipeline directory or a Hugging Face id; it must be given to train."""
    dataset: Path = Path("data/trajectories")
    """Train on this dataset of trajectories with proxy prompts, a directory that `clvr synth` wrote."""
    dtype: str = "bfloat16"
    """Load the frozen weights in this dtype."""
    simple: bool = False
    """Train the ablation "simple RL", whose reward reads only the latest image and the last text."""
    remat: str = "attention"
    """Choose what the backward pass keeps of each block: "dots" keeps all matrix products, "attention" only the outputs
    of attention, and "full" nothing, which takes the least memory and the most time."""
    judge: str = ""
    """Judge images with this UnifiedReward, a directory or Hugging Face id, on the devices that train; give either this
    or --reward-url."""
    edit_judge: str = ""
    """Judge edits with this UnifiedReward-Edit, a directory or Hugging Face id, on the devices that train; it goes with
    --judge."""
    reward_url: str = ""
    """Judge behind this OpenAI-compatible chat API, up to and including the version, such as http://localhost:8000/v1;
    give either this or --judge."""
    reward_model: str = "CodeGoat24/UnifiedReward-2.0-qwen3vl-8b"
    """With --reward-url: the server's name for the model that judges images."""
    edit_reward_model: str = "CodeGoat24/UnifiedReward-Edit-qwen3vl-8b"
    """With --reward-url: the server's name for the model that judges edits."""
    reward_key: str = ""
    """Environment variable with the key of --reward-url; empty for a server without keys."""
    proxy_prompt_url: str = ""
    """Let a model behind this OpenAI-compatible chat API write the proxy prompts during training; the dataset's own are
    used if it is empty."""
    proxy_prompt_model: str = ""
    """The server's name for the model of --proxy-prompt-url."""
    proxy_prompt_key: str = ""
    """Environment variable with the key of --proxy-prompt-url; empty for a server without keys."""
    endpoint_max_seconds: float = 1200.0
    """Wait this many seconds at most for a whole reply of --reward-url or --proxy-prompt-url, however slowly it comes.
    """
    preset: Literal["klein-4b", "klein-9b"] = "klein-4b"
    """With `clvr plan` only: plan for this size of FLUX.2 klein."""
    references: int = 3
    """With `clvr plan` only: plan for this many images before the one that is generated."""
    planned: Literal["rollout", "reward", "update"] = "rollout"
    """With `clvr plan` only: plan the rollout, the optimizer step (update), or a Qwen3-VL 8B that judges the edits of a
    call on the same devices (reward)."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "teacher_url": "proxy_prompt_url",
        "teacher_model": "proxy_prompt_model",
        "teacher_key": "proxy_prompt_key",
    }
    """Names in `recipe.json` of runs before these fields were renamed -> today's, for `config_from_json`."""

    @property
    def mesh(self) -> MeshConfig:
        """The mesh of the run, and of its plan."""
        return self.train.mesh


CONFIG = Config()


def task(config: Config) -> rl.PPRLTask:
    """Returns the task for `fit`."""
    if not config.model:
        raise ClvrError("pprl_flux2: --model is missing; give a directory or a Hugging Face id of FLUX.2 klein")
    reward = reward_of(config)
    if bool(config.proxy_prompt_url) != bool(config.proxy_prompt_model):
        raise ClvrError(
            "pprl_flux2: --proxy-prompt-url and --proxy-prompt-model go together: where it is served, and its name"
        )
    steps = ProxySteps(TrajectoryDataset(config.dataset), config.sampler.size, is_live=bool(config.proxy_prompt_url))
    generator = None
    if config.proxy_prompt_url:
        writer = _endpoint(config, config.proxy_prompt_model, config.proxy_prompt_url, config.proxy_prompt_key)
        generator = vlm_proxy_prompt_generator(OpenAIChatModel(writer), steps)
    pipe = Flux2Pipeline.from_pretrained(config.model, config.dtype)
    task = flux2_task("PPRL of FLUX.2", pipe, config.train, config.sampler, steps, reward, config.remat)
    return dataclasses.replace(task, proxy_prompt_generator=generator)


def _endpoint(config: Config, model: str, url: str, key_variable: str) -> Endpoint:
    return Endpoint(model, url, key_variable or None, max_seconds=config.endpoint_max_seconds)


def reward_of(config: Config) -> Reward:
    """Returns UnifiedReward on the devices that train (those of the active layout), or behind an endpoint."""
    if bool(config.judge) == bool(config.reward_url):
        raise ClvrError(
            "pprl_flux2: the judge is missing; give either --judge, a directory or Hugging Face id of UnifiedReward "
            "for the devices that train, or --reward-url, where it is served, e.g. http://localhost:8000/v1"
        )
    if not config.judge:
        served = [
            OpenAIChatModel(_endpoint(config, name, config.reward_url, config.reward_key))
            for name in (config.reward_model, config.edit_reward_model)
        ]
        picture = UnifiedReward(served[0])
        return LastTextReward(picture) if config.simple else ProxyReward(picture, UnifiedRewardEdit(served[1]))
    if config.simple:
        return MeshReward(UnifiedReward(_judge(config, config.judge)))
    if not config.edit_judge:
        raise ClvrError(
            "pprl_flux2: --judge judges images; give --edit-judge for a judge of edits, or --simple to leave edits out"
        )
    judge = _judge(config, config.judge)
    edit_judge = judge if config.edit_judge == config.judge else _judge(config, config.edit_judge)
    return MeshReward(UnifiedReward(judge), UnifiedRewardEdit(edit_judge))


def _judge(config: Config, model: str) -> MeshChatModel:
    """Loads a Qwen3-VL on the mesh that answers as many questions at once as a call has images."""
    return MeshChatModel(Qwen3VLPipeline.from_pretrained(model, config.dtype), model, config.train.microbatch_size)


def flux2_task(
    name: str,
    pipe: Flux2Pipeline,
    train: PPRLConfig,
    sampler: Sampler,
    steps: ProxySteps,
    reward: Reward,
    remat: str = "dots",
    save_dtype: str = "bfloat16",
) -> rl.PPRLTask:
    """PPRL of any FLUX.2 pipeline on steps of trajectories; exports the pipeline and, in `lora/`, the LoRA."""
    if pipe.settings.is_distilled:
        raise ClvrError(f"{name}: the model is distilled; RL blurs such models: train its base, and merge afterwards")
    transformer_def, base = nnx.split(pipe.transformer)
    (text_encoder_def, text_encoder), (vae_def, vae) = nnx.split(pipe.text_encoder), nnx.split(pipe.vae)
    unchanged = nnx.merge(vae_def, process_allgather(vae)), nnx.merge(text_encoder_def, process_allgather(text_encoder))
    settings, schedule, tokenizer, transformer_config = (
        pipe.settings,
        pipe.schedule,
        pipe.tokenizer,
        pipe.transformer.config,
    )
    source = pipe.text_encoder_source

    def ids(chosen: Sequence[ProxyStep]) -> tuple[np.ndarray, np.ndarray]:
        told = [(steps.prompt(step), [*steps.replies(step), step.last_text]) for step in chosen]
        fitted = [fit_history(tokenizer, *history, max(settings.text_buckets)) for history in told]
        return encode_prompts(tokenizer, [history.text for history in fitted], settings.text_buckets)

    def bucket(step: ProxyStep) -> tuple[int, int]:
        return len(step.history), ids([step])[0].shape[1]

    def data(chosen: Sequence[ProxyStep]) -> dict[str, np.ndarray]:
        given, mask = ids(chosen)
        empty, empty_mask = encode_prompts(tokenizer, [""] * len(chosen), (given.shape[1],))
        shape = (len(chosen), len(chosen[0].history), sampler.size, sampler.size, 3)
        shown = np.array([steps.references(step) for step in chosen], np.uint8).reshape(shape)
        return {"ids": given, "mask": mask, "empty_ids": empty, "empty_mask": empty_mask, "references": shown}

    def save(weights: Any, trained: Any, directory: Path) -> None:
        transformer = nnx.merge(transformer_def, weights)
        generator = Flux2Pipeline(transformer, *unchanged, tokenizer, settings, schedule, source)
        generator.save_pretrained(str(directory), dtype=save_dtype)
        if train.lora.rank:
            # In float32: what RL changes is small beside the spacing of bfloat16 numbers.
            save_lora(directory / "lora", trained, FLUX2_TRANSFORMER.key_mapping(transformer_config), base)

    policy = flux2_policy(
        (transformer_config, remat), text_encoder_def, (pipe.vae.config, vae_def), settings, sampler, base
    )
    frozen = {"text_encoder": text_encoder, "vae": vae}
    return rl.PPRLTask(name, train, base, frozen, policy, steps, data, bucket, reward, save)


def flux2_policy(
    transformer: tuple[Flux2TransformerConfig, str],
    text_encoder_def: Any,
    autoencoder: tuple[AutoencoderKLFlux2Config, Any],
    settings: Flux2Settings,
    sampler: Sampler,
    base: Any,
) -> DiffusionPolicy:
    """Returns FLUX.2 as a policy: the velocity of an image's tokens beside its references, guided or not.

    Args:
      transformer: its configuration, and the rematerialization policy.
      text_encoder_def: graph definition of the text encoder. autoencoder: configuration and graph definition.
      settings: of the pipeline. sampler: the rollout. base: weights or their shapes, for their dtype.
    """
    (transformer_config, remat), (vae_config, vae_def) = transformer, autoencoder
    dtype = jax.tree.leaves(base)[0].dtype
    graphdef, _ = nnx.split(
        nnx.eval_shape(lambda: Flux2Transformer(transformer_config, rngs=nnx.Rngs(0), dtype=dtype, remat=remat))
    )
    if sampler.size % vae_config.token_pixels:
        raise UsageError(f"size {sampler.size}: must be a multiple of {vae_config.token_pixels} pixels")
    side = sampler.size // vae_config.token_pixels
    grid, tokens = (side, side), side * side
    sigmas = flow_sigmas(sampler.steps, tokens)
    layers = settings.text_encoder_out_layers

    def encode_conditions(frozen: Any, data: Any) -> dict[str, jax.Array]:
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

    def predictor(weights: Any, conditions: dict[str, jax.Array]) -> Predictor:
        references = conditions["references"]
        count = references.shape[1] // tokens
        field = velocity_field(nnx.merge(graphdef, weights), references, grid, [grid] * count)
        if "empty" not in conditions:
            return lambda x, t_b: field(x, t_b, conditions["text"])

        def both(x: jax.Array, t_b: jax.Array, text: jax.Array) -> jax.Array:
            return field(x, jnp.concatenate([t_b, t_b]), text)

        return classifier_free_guidance(both, conditions["text"], conditions["empty"], sampler.guidance)

    def solve(predictor: Predictor, noise: jax.Array) -> jax.Array:
        return euler_solve(lambda x, sigma: predictor(x, jnp.full(len(x), sigma)), noise, jnp.asarray(sigmas))

    def decode_images(frozen: Any, latents: jax.Array) -> jax.Array:
        return decode(vae_def, replicate(frozen["vae"]), latents.astype(dtype).reshape(len(latents), *grid, -1))

    shape = (tokens, transformer_config.in_channels)
    return DiffusionPolicy(encode_conditions, predictor, solve, decode_images, shape, sigmas[:-1], FlowProcess())


def program(config: Config) -> Program:
    """Returns a call of the rollout, of its judge, or of the update, for groups of the full sizes."""
    train, sampler, settings = config.train, config.sampler, Flux2Settings()
    if config.planned == "reward":
        return qwen3_vl_judge.program(
            qwen3_vl_judge.Config(config.mesh, batch_size=train.microbatch_size, images=2, size=sampler.size)
        )
    (transformer_config, text_encoder), vae = KLEIN[config.preset], AutoencoderKLFlux2Config()
    dtype = jnp.dtype(config.dtype)
    _, base = FLUX2_TRANSFORMER.split(FLUX2_TRANSFORMER.config_to_dict(transformer_config), dtype)
    encoder = qwen3_hidden_states(settings.text_encoder_out_layers)
    text_encoder_def, text_encoder_state = encoder.split(encoder.config_to_dict(text_encoder), dtype)
    vae_def, vae_state = FLUX2_VAE.split(FLUX2_VAE.config_to_dict(vae), dtype)
    policy = flux2_policy((transformer_config, config.remat), text_encoder_def, (vae, vae_def), settings, sampler, base)
    params = jax.eval_shape(train.init_params, base)
    groups, rows, text = train.groups_per_microbatch, train.microbatch_size, settings.text_buckets[0]
    shape, passes = jax.ShapeDtypeStruct, 2 if sampler.guidance > 1 else 1
    tokens = (sampler.size // vae.token_pixels) ** 2
    source = RandomSource(shape((), jnp.int32), shape((), jnp.int32), shape((groups,), jnp.int32))
    evaluation = flux2_flops(
        transformer_config, passes * rows, text=text, image=tokens, references=config.references * tokens
    )
    title = f"{config.preset}, PPRL {config.planned}, {groups} x {train.group_size} of {sampler.size} x {sampler.size}"
    if config.planned == "update":
        algorithm = train.make_algorithm(policy)
        conditions = {
            "text": shape((groups, text, transformer_config.joint_attention_dim), dtype),
            "references": shape((groups, config.references * tokens, vae.token_channels), dtype),
            **({"empty": shape((groups, text, transformer_config.joint_attention_dim), dtype)} if passes == 2 else {}),
        }
        of_sample, inner_step = shape((rows,), jnp.float32), shape((), jnp.int32)
        samples = shape((rows, *algorithm.sample_shape), jnp.float32)
        return Program(
            name=title,
            function=lambda weights, data: loss_and_grads(
                policy, train, weights["params"], weights["base"], weights["old"], data
            ),
            weights={"base": base, "params": params, "old": params},
            data=UpdateBatch(samples, conditions, of_sample, of_sample, inner_step, source),
            reads={"base": 5, "params": 3, "old": 1},  # three policies forward, one of them back
            # Of theta forward and back; of old and reference forward.
            flops=evaluation.training + 2 * evaluation.forward,
            calls=train.epochs
            * (train.prompts_per_epoch // groups)
            * min(train.timesteps_per_sample, algorithm.num_train_timesteps),
            rows=rows,
        )
    references = (groups, config.references, sampler.size, sampler.size, 3)
    texts = {name: shape((groups, text), jnp.int32) for name in ("ids", "mask", "empty_ids", "empty_mask")}
    read = qwen3_flops(text_encoder, passes * groups, text, layers=max(settings.text_encoder_out_layers), logits=0)
    shown = encoder_flops(vae, groups * config.references, sampler.size, sampler.size)
    drawn = decoder_flops(vae, rows, sampler.size, sampler.size)
    return Program(
        name=title,
        function=lambda weights, data: collect_rollout(
            policy,
            train,
            weights["base"],
            weights["old"],
            {name: weights[name] for name in ("text_encoder", "vae")},
            data,
        ),
        weights={"base": base, "old": params, "text_encoder": text_encoder_state, "vae": vae_state},
        data=RolloutBatch({**texts, "references": shape(references, jnp.uint8)}, source),
        reads={"base": sampler.steps, "old": 1, "text_encoder": passes, "vae": 1 + config.references},
        flops=sampler.steps * evaluation.forward + read.forward + shown.forward + drawn.forward,
        calls=train.epochs * (train.prompts_per_epoch // groups),
        rows=rows,
    )
