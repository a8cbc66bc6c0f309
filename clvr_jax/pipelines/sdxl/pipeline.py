"""The pipeline of Stable Diffusion XL, 1 and 2: from a prompt to an image.

Three jitted functions (encode text, denoise, decode) are compiled once for each shape; the batch is padded to a power
of two. Source: diffusers `StableDiffusionXLPipeline` and `StableDiffusionPipeline`.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from clvr_jax.data.preprocessing.clip_tokens import encode_clip
from clvr_jax.data.preprocessing.text import check_prompt
from clvr_jax.diffusion import NoiseSchedule, classifier_free_guidance, ddim_solve, euler_noise_solve, lcm_solve
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.atomic_io import located
from clvr_jax.files.json_input import UncheckedJSON
from clvr_jax.interfaces.tokenizer import Tokenizer
from clvr_jax.models.stable_diffusion import AutoencoderKL, CLIPText, UNet2DCondition
from clvr_jax.pipelines.compatibility import check_clip
from clvr_jax.pipelines.images import check_size, to_pil
from clvr_jax.pipelines.jit_modules import JittedPipeline, jit_module
from clvr_jax.pipelines.loading import LoRA, Mesh, Quantize, computing_on, layout_of, on_mesh
from clvr_jax.pipelines.offload import Offload
from clvr_jax.pipelines.sdxl import io as sdxl_io
from clvr_jax.pipelines.sdxl.io import Solver
from clvr_jax.programs import StoredFunction
from clvr_jax.sharding import process_allgather
from clvr_jax.trees import Params


@dataclasses.dataclass(frozen=True)
class SDXLSettings:
    """Settings of a pipeline in `clvr.json` and `model_index.json`; the defaults are those of SDXL.

    num_inference_steps, guidance_scale: the model's defaults. force_zeros_for_empty_prompt: without a negative prompt,
    the unconditional text features are zeros (SDXL), not those of the empty text. world: the only world whose language
    a small model knows, "" for other models.
    """

    num_inference_steps: int = 50
    guidance_scale: float = 5.0
    force_zeros_for_empty_prompt: bool = True
    world: str = ""


@dataclasses.dataclass(frozen=True)
class SDXLOutput:
    """Generated images.

    images: in the form of `output_type`. nfe: number of UNet evaluations for each image.
    """

    images: Any
    nfe: int


class Conditions(NamedTuple):
    """Conditions of the UNet, under its own argument names; None for those that it does not take."""

    text_bsd: jax.Array
    text_embeds_bd: jax.Array | None = None
    time_ids_b6: jax.Array | None = None
    timestep_cond_bd: jax.Array | None = None


class SDXLPipeline(JittedPipeline):
    """Generates images from text with SDXL (two text encoders) or Stable Diffusion 1 or 2 (one).

    Components are public attributes: `unet`, `vae`, `text_encoders`, `tokenizers`, `scheduler` (the content of
    scheduler_config.json), `settings`. Replacing `unet` by one of the same configuration, such as a merged one,
    compiles nothing again.
    """

    def __init__(
        self,
        unet: UNet2DCondition,
        vae: AutoencoderKL,
        text_encoders: Sequence[CLIPText],
        tokenizers: Sequence[Tokenizer],
        scheduler: UncheckedJSON,
        settings: SDXLSettings,
    ):
        _check_components(unet, vae, text_encoders, tokenizers)
        super().__init__()
        self.unet, self.vae = unet, vae
        self.text_encoders, self.tokenizers = tuple(text_encoders), tuple(tokenizers)
        self.scheduler, self.settings = dict(scheduler), settings
        self.schedule, self.solver = sdxl_io.read_scheduler(scheduler)
        self._encode_text = StoredFunction(encode_text, static_argnums=0)
        self._denoise = jit_module(_denoise, static_argnums=(0, 8, 9), donate_argnums=2)
        self._decode = jit_module(decode, replicate_weights=True, static_argnums=0)

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        dtype: DTypeLike | None = "float32",
        *,
        mesh: Mesh = None,
        lora: Sequence[LoRA] = (),
        ignore_text_encoder: bool = False,
        quantize: Quantize = None,
        offload: Offload = None,
        reference_cache: str | None = None,
        reference_cache_dtype: str | None = None,
        reference_latents: str | None = None,
    ) -> Self:
        """Loads a pipeline.

        Args:
          model: a directory in diffusers layout: `StableDiffusionXLPipeline`, `StableDiffusionPipeline` or
            `LatentConsistencyModelPipeline`. A safety checker in it is not used.
          dtype: of weights and computation; noise levels and latents stay in float32. None is the checkpoint's own on
            an accelerator, and float32 on a CPU.
          mesh: shards parameters and computation by the rules of `clvr_jax.sharding`; its sequence axis shards the
            tokens of the UNet's transformers.
          lora: LoRAs of the UNet, each a file, directory or Hugging Face id, alone or with its weight. They are added
            to the weights before these are placed.
          ignore_text_encoder: leave out the tensors of a LoRA that adapt a text encoder, which are an error otherwise.
          quantize, offload, reference_cache, reference_cache_dtype, reference_latents: must be None; they are for
            FLUX.2 models.
        Raises: ClvrError that names what is missing, does not match or is not supported.
        """
        if quantize:
            raise UsageError(
                f"quantize: {model} is a Stable Diffusion model, which cannot be quantized; FLUX.2 models can"
            )
        if offload:
            raise UsageError(f"offload: {model} is a Stable Diffusion model, which stays on the devices; leave it out")
        for name, value in {
            "reference_cache": reference_cache,
            "reference_cache_dtype": reference_cache_dtype,
            "reference_latents": reference_latents,
        }.items():
            if value:
                raise UsageError(f"{name}: {model} is a Stable Diffusion model, without references; leave it out")
        layout = layout_of(mesh)
        with located(model), computing_on(layout):
            pipe = cls(*sdxl_io.load_sdxl(model, dtype, SDXLSettings, layout, lora, ignore_text_encoder))
        pipe.layout = layout
        return pipe

    @on_mesh
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        latents: np.ndarray | jax.Array | None = None,
        solver: Solver | None = None,
        output_type: Literal["pil", "np", "latent"] = "pil",
    ) -> SDXLOutput:
        """Generates one image for each prompt.

        Args:
          prompt: a text or several; texts longer than CLIP's context are truncated.
          negative_prompt: guides away from this text; one for all prompts or one for each.
          num_inference_steps, guidance_scale: the model's own if None. A step with guidance above 1 takes two network
            evaluations, unless the UNet takes the guidance scale as an input (latent consistency models).
          height, width: in pixels; the model's own if None.
          seed: the same seed gives the same noise; every image of a batch has its own noise.
          latents: noise of unit variance in diffusers' layout, (b, 4, height / 8, width / 8) for published models.
          solver: that of the model's scheduler if None.
          output_type: "pil", "np" for float32 (b, h, w, 3) in [0, 1], or "latent" for float32 latents of the noise's
            shape.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        for text in prompts:
            check_prompt(text)
        steps = num_inference_steps or self.settings.num_inference_steps
        guidance = self.settings.guidance_scale if guidance_scale is None else guidance_scale
        embedded = self.unet.config.time_cond_proj_dim is not None
        use_guidance = guidance > 1 and not embedded
        solver = solver or self.solver
        height, width = self._size(height, width)
        grid = (height // self.vae.config.downscale, width // self.vae.config.downscale)

        batch = len(prompts)
        padded = 1 << (batch - 1).bit_length()
        rows = [*range(batch), *[batch - 1] * (padded - batch)]
        negatives = self._negatives(negative_prompt, batch) if use_guidance else None
        added = self._added((height, width), guidance, padded)
        conditional = self._text([prompts[i] for i in rows])._replace(**added)
        unconditional = None
        if use_guidance and negatives is None:
            unconditional = jax.tree.map(jnp.zeros_like, conditional)._replace(**added)
        elif negatives is not None:
            unconditional = self._text([negatives[i] for i in rows])._replace(**added)

        shape = (*grid, self.unet.config.in_channels)
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.asarray(rows))
        noise = _noise(keys, shape) if latents is None else self._given_noise(latents, batch, grid)[jnp.asarray(rows)]
        final = self._denoise(
            *self._split("unet"),
            noise,
            conditional,
            unconditional,
            jnp.asarray(solver_timesteps(self.schedule, solver, steps)),
            jnp.asarray(guidance, jnp.float32),
            step_noise(keys, steps, shape) if solver == "lcm" else None,
            self.schedule,
            solver,
        )
        nfe = steps * (2 if use_guidance else 1)
        if output_type == "latent":
            return SDXLOutput(np.asarray(process_allgather(final[:batch]), np.float32).transpose(0, 3, 1, 2), nfe)
        decoded = self._decode(*self._split("vae"), final)[:batch]
        images = np.asarray(process_allgather(decoded), np.float32)
        return SDXLOutput([to_pil(image) for image in images] if output_type == "pil" else images, nfe)

    def save_pretrained(self, path: str, dtype: str = "float32") -> None:
        """Writes a directory in diffusers layout, which diffusers' pipeline of the same class loads too."""
        sdxl_io.save_sdxl(path, self, dtype)

    def _text(self, prompts: list[str]) -> Conditions:
        """Returns the text conditions; the others are None."""
        ids = tuple(
            encode_clip(tokenizer, prompts, min(tokenizer.model_max_length, encoder.config.max_position_embeddings))
            for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True)
        )
        graphdefs, states = zip(*map(nnx.split, self.text_encoders), strict=True)
        return Conditions(*self._encode_text(graphdefs, states, ids))

    def _negatives(self, negative_prompt: str | Sequence[str] | None, batch: int) -> list[str] | None:
        """Returns the negative prompt of every row; None if their text features are zeros."""
        if negative_prompt is None:
            zeros = len(self.text_encoders) == 2 and self.settings.force_zeros_for_empty_prompt
            return None if zeros else [""] * batch
        negatives = [negative_prompt] * batch if isinstance(negative_prompt, str) else list(negative_prompt)
        if len(negatives) != batch:
            raise UsageError(f"{len(negatives)} negative prompts for {batch} prompts; give one, or one for each")
        return negatives

    def _added(self, size: tuple[int, int], guidance: float, rows: int) -> dict[str, jax.Array]:
        """Returns the conditions besides the text, which are the same for all rows."""
        added = {}
        if self.unet.add_embedding is not None:  # original size and target size are equal, and nothing was cropped
            added["time_ids_b6"] = jnp.tile(jnp.asarray([*size, 0, 0, *size], jnp.float32), (rows, 1))
        if self.unet.config.time_cond_proj_dim is not None:
            embedding = guidance_embedding(guidance, self.unet.config.time_cond_proj_dim)
            added["timestep_cond_bd"] = jnp.tile(embedding, (rows, 1))
        return added

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        scale, own = self.vae.config.downscale, self.unet.config.sample_size
        if own is None and (height is None or width is None):
            raise UsageError("this UNet names no sample_size; give height and width")
        height, width = height or scale * (own or 0), width or scale * (own or 0)
        check_size(height, width, scale)
        return height, width

    def _given_noise(self, latents: np.ndarray | jax.Array, batch: int, grid: tuple[int, int]) -> jax.Array:
        expected = (batch, self.unet.config.in_channels, *grid)
        if latents.shape != expected:
            raise UsageError(
                f"latents have shape {latents.shape}; expected {expected} (batch, channels, height, width)"
            )
        return jnp.asarray(latents, jnp.float32).transpose(0, 2, 3, 1)


def solver_timesteps(schedule: NoiseSchedule, solver: Solver, steps: int) -> np.ndarray:
    """Returns the (steps,) decreasing timesteps of a solver."""
    timesteps = {"euler": schedule.euler_timesteps, "ddim": schedule.ddim_timesteps, "lcm": schedule.lcm_timesteps}
    if solver not in timesteps:
        raise UsageError(f"solver {solver!r}: it must be one of {', '.join(timesteps)}")
    return timesteps[solver](steps)


@partial(StoredFunction, static_argnums=(1, 2))
def step_noise(keys: jax.Array, steps: int, shape: tuple[int, int, int]) -> jax.Array:
    """Returns the noise that LCM adds between steps, (steps - 1, b, h, w, c); each row depends on its own key only."""
    rows = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 1), (steps - 1, *shape)))(keys)
    return rows.swapaxes(0, 1)


def guidance_embedding(guidance: float, features: int) -> np.ndarray:
    """Returns float32 (features,): sines, then cosines, of 1000 (guidance - 1) at frequencies from 1 down to 1/10000.

    Source: get_guidance_scale_embedding (LatentConsistencyModelPipeline, diffusers).
    """
    half = features // 2
    frequencies = np.exp(np.arange(half, dtype=np.float32) * -(np.log(np.float32(10_000)) / np.float32(half - 1)))
    angles = np.float32(1000) * np.float32(guidance - 1) * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles), np.zeros(features % 2, np.float32)])


def _check_components(
    unet: UNet2DCondition, vae: AutoencoderKL, text_encoders: Sequence[CLIPText], tokenizers: Sequence[Tokenizer]
) -> None:
    config = unet.config
    if not len(tokenizers) == len(text_encoders) == (2 if config.addition_embed_type else 1):
        raise ClvrError(
            f"{len(text_encoders)} text encoders and {len(tokenizers)} tokenizers; a UNet that takes pooled text "
            "features (addition_embed_type, SDXL) needs two of each, other UNets need one"
        )
    for tokenizer, encoder in zip(tokenizers, text_encoders, strict=True):
        check_clip(tokenizer, encoder.config)
    width = sum(encoder.config.hidden_size for encoder in text_encoders)
    pairs = {
        "channels of latents": ((config.in_channels, config.out_channels), (vae.config.latent_channels,) * 2),
        "features of the text": (config.cross_attention_dim, width),
    }
    if config.addition_embed_type:
        sizes = 6 * (config.addition_time_embed_dim or 0)
        pairs["features of the pooled text"] = (
            (config.projection_class_embeddings_input_dim or 0) - sizes,
            text_encoders[-1].config.projection_dim,
        )
    for what, (wanted, found) in pairs.items():
        if wanted != found:
            raise ClvrError(
                f"the UNet takes {wanted} {what}, the other components give {found}; they belong to different "
                "checkpoints"
            )


@partial(StoredFunction, static_argnums=1)
def _noise(keys: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def encode_text(
    graphdefs: tuple[nnx.GraphDef[CLIPText], ...], states: Sequence[Params], ids: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the text features (b, s, d) and the pooled ones (b, p), None with one text encoder.

    Args:
      graphdefs, states: of each text encoder.
      ids: token ids (b, s) for each text encoder.
    """
    outputs = [
        nnx.merge(graphdef, state)(tokens) for graphdef, state, tokens in zip(graphdefs, states, ids, strict=True)
    ]
    if len(outputs) == 1:
        return outputs[0].last_hidden_state_btd, None
    # SDXL uses the penultimate hidden states of both text encoders.
    hidden = jnp.concatenate([output.hidden_states_lbtd[-2] for output in outputs], axis=-1)
    return hidden, outputs[-1].text_embeds_bp


def _denoise(
    graphdef: nnx.GraphDef[UNet2DCondition],
    state: Params,
    noise_bhwc: jax.Array,
    conditional: Conditions,
    unconditional: Conditions | None,
    timesteps: jax.Array,
    guidance: jax.Array,
    fresh_nbhwc: jax.Array | None,
    schedule: NoiseSchedule,
    solver: Solver,
) -> jax.Array:
    unet = nnx.merge(graphdef, state)

    def predict(x: jax.Array, timestep: jax.Array, conditions: Conditions) -> jax.Array:
        return unet(x, jnp.full(x.shape[0], timestep), **conditions._asdict())

    def given(x: jax.Array, timestep: jax.Array) -> jax.Array:
        return predict(x, timestep, conditional)

    model = given if unconditional is None else classifier_free_guidance(predict, conditional, unconditional, guidance)
    if solver == "lcm":
        return lcm_solve(model, noise_bhwc, schedule, timesteps, step_noise=fresh_nbhwc)
    solve = {"euler": euler_noise_solve, "ddim": ddim_solve}[solver]
    return solve(model, noise_bhwc, schedule, timesteps)


def decode(graphdef: nnx.GraphDef[AutoencoderKL], state: Params, latents_bhwc: jax.Array) -> jax.Array:
    """Decodes scaled latents to images: (b, h / 8, w / 8, c) -> float32 (b, h, w, 3) in [0, 1]."""
    images = nnx.merge(graphdef, state).decode_scaled(latents_bhwc)
    return jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1)
