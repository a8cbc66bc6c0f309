"""The pipeline of FLUX.2 klein: from a prompt and reference images to an image.

Jitted functions (encode text, encode and cache references, denoise, decode) are compiled once for each shape. To keep
the shapes few, text is padded to a bucket and the batch to a power of two, and references are grouped by number and
size.
Source: diffusers `Flux2KleinPipeline` and `Flux2KleinKVPipeline`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from PIL import Image

from clvr_jax.data.preprocessing.histories import FittedHistory, fit_history, token_count
from clvr_jax.data.preprocessing.text import bucket_for, check_prompt, encode_prompts
from clvr_jax.diffusion import KLEIN_SCHEDULE, FlowSchedule
from clvr_jax.errors import UsageError
from clvr_jax.files.atomic_io import located
from clvr_jax.interfaces.tokenizer import Tokenizer
from clvr_jax.models.common.quantization import Quantization
from clvr_jax.models.flux2 import AutoencoderKLFlux2, Flux2Transformer
from clvr_jax.models.qwen3 import Qwen3
from clvr_jax.pipelines.compatibility import check_flux2
from clvr_jax.pipelines.flux2 import io as flux2_io
from clvr_jax.pipelines.flux2.batching import any_row, common_sizes, split_rows
from clvr_jax.pipelines.flux2.kept_latents import ReferenceImage
from clvr_jax.pipelines.flux2.noise import batch_keys, make_noise, row_keys
from clvr_jax.pipelines.flux2.programs import decode, denoise, encode_text
from clvr_jax.pipelines.flux2.references import ReferencePipeline
from clvr_jax.pipelines.flux2.settings import (
    AbandonedError,
    Flux2Output,
    Flux2Settings,
    ReferenceLatents,
    ReferenceMode,
)
from clvr_jax.pipelines.images import check_size, to_pil
from clvr_jax.pipelines.jit_modules import jit_module
from clvr_jax.pipelines.loading import LoRA, Mesh, Quantize, computing_on, layout_of, on_mesh
from clvr_jax.pipelines.offload import Offload, offloader_of
from clvr_jax.sharding import process_allgather
from clvr_jax.trees import Params


class Flux2Pipeline(ReferencePipeline):
    """Generates images from text, and edits reference images.

    Components are public attributes: `transformer`, `vae`, `text_encoder`, `tokenizer`, `settings`, `schedule` (noise
    levels of the solver). Replacing `transformer` by one of the same configuration, such as a merged one, compiles
    nothing again. A text encoder is loaded without the layers that are never used; `text_encoder_source` is the
    directory that they are copied from when the pipeline is saved.
    """

    def __init__(
        self,
        transformer: Flux2Transformer,
        vae: AutoencoderKLFlux2,
        text_encoder: Qwen3,
        tokenizer: Tokenizer,
        settings: Flux2Settings,
        schedule: FlowSchedule = KLEIN_SCHEDULE,
        text_encoder_source: Path | None = None,
    ):
        check_flux2(transformer.config, vae.config, text_encoder.config, tokenizer, settings.text_encoder_out_layers)
        super().__init__()
        self.transformer, self.vae, self.text_encoder = transformer, vae, text_encoder
        self.tokenizer, self.settings, self.schedule = tokenizer, settings, schedule
        self.reference_cache, self.reference_latents = settings.reference_cache, settings.reference_latents
        self.text_encoder_source = text_encoder_source
        self._encode_text = jit_module(encode_text, static_argnums=(0, 4))
        self._decode = jit_module(_decode_tokens, replicate_weights=True, static_argnums=(0, 3))
        self._denoise = jit_module(denoise, static_argnums=(0, 7, 8), donate_argnums=2)

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        dtype: DTypeLike | None = "float32",
        transformer: str | None = None,
        *,
        mesh: Mesh = None,
        lora: Sequence[LoRA] = (),
        ignore_text_encoder: bool = False,
        quantize: Quantize = None,
        offload: Offload = None,
        reference_cache: ReferenceMode | None = None,
        reference_cache_dtype: Quantization | None = None,
        reference_latents: ReferenceLatents | None = None,
    ) -> Self:
        """Loads a pipeline.

        Args:
          model: a shipped name ("shapes-tiny", "shapes-tiny-base", ...) or a directory in diffusers layout.
          dtype: of weights and computation; None is the checkpoint's own on an accelerator, and float32 on a CPU.
          transformer: subdirectory of the transformer; the model's own, usually `transformer`, if None.
          mesh: shards parameters and computation by the rules of `clvr_jax.sharding`.
          lora: LoRAs of the transformer, each a file, directory or Hugging Face id, alone or with its weight. They are
            added to the weights before these are placed.
          ignore_text_encoder: leave out the tensors of a LoRA that adapt a text encoder, which are an error otherwise.
          quantize: "int8" stores the weights of transformer and text encoder as 8-bit integers (see
            `models.common.quantization`), {"transformer": "int8"} those of one model; a quantized pipeline cannot be
            saved.
          offload: "components" holds text encoder and transformer in host memory, and copies each to the devices while
            it computes; None leaves both on the devices.
          reference_cache: how images attend to references, see `ReferenceMode`; the model's own setting if None.
            Another one is an approximation, which is said in one line.
          reference_cache_dtype: "int8" stores keys and values of references as 8-bit integers, with one scale for each
            token and head, in about half the memory of bfloat16; None stores them in the dtype of the computation.
          reference_latents: which latents the images of a loop have as references, see `ReferenceLatents`; the model's
            own setting if None.
        Raises: ClvrError that names what is missing or does not match.
        """
        layout, offloader = layout_of(mesh), offloader_of(offload)
        with located(model), computing_on(layout):
            pipe = cls(
                *flux2_io.load_flux2(
                    model,
                    dtype,
                    transformer,
                    Flux2Settings,
                    layout,
                    lora,
                    ignore_text_encoder,
                    quantize,
                    offloader is not None,
                )
            )
        pipe.layout, pipe.offloader = layout, offloader
        pipe.choose_reference_cache(reference_cache, model, reference_cache_dtype)
        pipe.choose_reference_latents(reference_latents)
        return pipe

    def __call__(
        self,
        prompt: str | Sequence[str],
        images: Sequence[ReferenceImage] = (),
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        latents: np.ndarray | jax.Array | None = None,
        output_type: Literal["pil", "np"] = "pil",
    ) -> Flux2Output:
        """Generates one image for each prompt.

        Args:
          prompt: a text or several.
          images: references in order, shared by all prompts; each is encoded unless it is a `LatentReference`.
          num_inference_steps, guidance_scale: the model's own if None. A step takes one network evaluation with
            guidance 1 and with distilled models, and two with other guidance.
          height, width: in pixels; those of the first reference, else the model's, if None.
          seed: the same seed gives the same noise; every image of a batch has its own noise.
          latents: noise in the layout of diffusers, (b, token_channels, height / 16, width / 16) for FLUX.2.
          output_type: "pil", or "np" for float32 (b, h, w, 3) in [0, 1].
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        return self.generate(
            prompts,
            [list(images)] * len(prompts),
            noise=batch_keys(seed, len(prompts)) if latents is None else jnp.asarray(latents),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            output_type=output_type,
        )

    @on_mesh
    def generate(
        self,
        prompts: Sequence[str],
        references: Sequence[Sequence[ReferenceImage]],
        noise: jax.Array,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: Literal["pil", "np"] = "pil",
        on_step: Callable[[int, int], bool] | None = None,
    ) -> Flux2Output:
        """Generates images like `__call__`, with references and noise for each row.

        Args:
          prompts: (b,) texts.
          references: of each row; all rows have references of the same number and sizes.
          noise: (b,) random keys, or latents (b, c, h, w).
          num_inference_steps, guidance_scale, height, width, output_type: as in `__call__`.
          on_step: called before each step and after the last, with the numbers of steps done and of all steps; False
            abandons the images. The program is that of a generation without it, so the images are the same.
        Raises: AbandonedError if `on_step` says so.
        """
        if len(set(lengths := self._lengths(prompts))) > 1:
            # Padding is attended to: in the bucket of a longer row, a text would give another image than alone.
            return self._generate_by_length(
                lengths,
                prompts,
                references,
                noise,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                height=height,
                width=width,
                output_type=output_type,
                on_step=on_step,
            )
        steps = num_inference_steps or self.settings.num_inference_steps
        guidance = self.settings.guidance_scale if guidance_scale is None else guidance_scale
        use_guidance = guidance > 1 and not self.settings.is_distilled
        token = self.vae.config.token_pixels
        prepared = [[self._prepared(image) for image in row] for row in references]
        sizes = common_sizes(prepared)
        height = height or (sizes[0][0] if sizes else self.settings.sample_size)
        width = width or (sizes[0][1] if sizes else self.settings.sample_size)
        check_size(height, width, token)
        if on_step is not None and not on_step(0, steps):
            raise AbandonedError("the generation was abandoned before its first step")
        grid = (height // token, width // token)

        batch = len(prompts)
        padded = 1 << (batch - 1).bit_length()
        rows = [*range(batch), *[batch - 1] * (padded - batch)]
        if jnp.issubdtype(noise.dtype, jax.dtypes.prng_key):
            latents = make_noise(noise, np.asarray(rows), (*grid, self.transformer.config.in_channels))
        else:
            latents = self._given_latents(noise, batch, grid)[jnp.asarray(rows)]
        conditions = self._text([prompts[i] for i in rows], use_guidance)
        seen, seen_sizes = self._references([prepared[i] for i in rows], sizes)
        sigmas = np.asarray(self.schedule.sigmas(steps, grid[0] * grid[1]), np.float32)
        model = self._split("transformer")
        fixed = (conditions, seen, sigmas, np.float32(guidance), grid, seen_sizes)
        for first, last in [(0, steps)] if on_step is None else [(done, done + 1) for done in range(steps)]:
            latents = self._denoise(*model, latents, *fixed, (first, last))
            if on_step is not None:
                # Through host memory: a result is committed to its devices, unlike the noise, and the program would be
                # compiled a second time for it.
                latents = jnp.asarray(np.asarray(process_allgather(latents)))
                if not on_step(last, steps):
                    raise AbandonedError(f"the generation was abandoned after step {last} of {steps}")
        final = self._wait_if_offloaded(latents)
        decoded = self._decode(*self._split("vae"), final, grid)
        images = np.asarray(process_allgather(decoded), np.float32)[:batch]
        nfe = steps * (2 if use_guidance else 1)
        if output_type == "np":
            return Flux2Output(images, nfe)
        generated = [to_pil(image) for image in images]
        if self.reference_latents == "kept":
            self._keep_latents(generated, final)
        return Flux2Output(generated, nfe)

    def generate_each(
        self,
        prompts: Sequence[str],
        references: Sequence[Sequence[ReferenceImage]],
        seeds: Sequence[int],
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        rows_per_call: int | None = None,
        on_step: Callable[[int, int, int], bool] | None = None,
    ) -> Flux2Output:
        """Generates an image for each of several independent rows; a batch does not change an image.

        Rows share a call if their texts have the same bucket (padding is attended to, so that a text padded to the
        bucket of a longer one would give another image) and their references have the same number and sizes. The number
        of rows in a call is a power of two: six rows are computed as four and two.

        Programs for different numbers of rows round differently, which changes single bytes of an image. With
        `rows_per_call`, a power of two, every call computes exactly that many rows, filled up with copies of the last,
        so that an image has the same bytes in any batch.

        `on_step` is called for each row before and after each of its steps, with the number of the row and those of
        `generate`; it returns whether the row is still wanted. A call whose rows are all not wanted is abandoned; their
        images are None.
        """
        groups: dict[tuple[object, ...], list[int]] = {}
        for index, (length, images) in enumerate(zip(self._lengths(prompts), references, strict=True)):
            groups.setdefault((length, *(image.size for image in images)), []).append(index)
        generated: dict[int, Image.Image | np.ndarray] = {}
        nfe = 0
        for rows in [part for group in groups.values() for part in split_rows(group, rows_per_call)]:
            filled = [*rows, *rows[-1:] * ((rows_per_call or 0) - len(rows))]
            try:
                output = self.generate(
                    [prompts[index] for index in filled],
                    [references[index] for index in filled],
                    row_keys([seeds[index] for index in filled]),
                    num_inference_steps=num_inference_steps,
                    guidance_scale=guidance_scale,
                    height=height,
                    width=width,
                    on_step=None if on_step is None else any_row(rows, on_step),
                )
            except AbandonedError:
                continue
            nfe = output.nfe
            generated.update(zip(rows, output.images, strict=False))
        return Flux2Output([generated.get(index) for index in range(len(prompts))], nfe)

    def fit_history(self, prompt: str, replies: Sequence[str]) -> FittedHistory:
        """Returns the text of a history, without its oldest replies if it is too long (`histories.fit_history`)."""
        return fit_history(self.tokenizer, prompt, replies, max(self.settings.text_buckets))

    def prompt_length(self, prompt: str) -> int:
        """Returns the number of tokens of a prompt, the chat template included."""
        return token_count(self.tokenizer, prompt)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises ClvrError for a prompt that is empty, or longer than the largest bucket."""
        self._lengths(prompts)

    @property
    def nfe_per_step(self) -> int:
        """Network evaluations of a solver step under the model's own guidance."""
        return 2 if self.settings.guidance_scale > 1 and not self.settings.is_distilled else 1

    def steps_for(self, nfe: int) -> int:
        """Returns the number of solver steps with `nfe` network evaluations under the model's own guidance.

        Raises: UsageError if there is no such number.
        """
        per_step = self.nfe_per_step
        if nfe < per_step or nfe % per_step:
            raise UsageError(f"nfe must be a positive multiple of {per_step} (with guidance, two a step), got {nfe}")
        return nfe // per_step

    def save_pretrained(self, path: str, dtype: str = "float32") -> None:
        """Writes a directory in diffusers layout.

        `Flux2KleinPipeline.from_pretrained` loads it too, or `Flux2KleinKVPipeline` if the model was trained with
        cached references.
        """
        flux2_io.save_flux2(path, self, dtype)

    def _generate_by_length(
        self,
        lengths: Sequence[int],
        prompts: Sequence[str],
        references: Sequence[Sequence[ReferenceImage]],
        noise: jax.Array,
        **options: Any,
    ) -> Flux2Output:
        """Generates images like `generate`, with one call for the rows of each bucket."""
        if len(noise) != len(prompts):
            raise UsageError(f"{len(prompts)} prompts but noise for {len(noise)}; give noise for each prompt")
        images: dict[int, Any] = {}
        nfe = 0
        for length in sorted(set(lengths)):
            rows = [row for row, each in enumerate(lengths) if each == length]
            output = self.generate(
                [prompts[row] for row in rows],
                [references[row] for row in rows],
                noise[jnp.asarray(rows)],
                **options,
            )
            nfe = output.nfe
            images.update(zip(rows, output.images, strict=True))
        ordered = [images[row] for row in range(len(prompts))]
        return Flux2Output(np.stack(ordered) if options["output_type"] == "np" else ordered, nfe)

    def _lengths(self, prompts: Sequence[str]) -> list[int]:
        """Returns the bucket of each prompt, in tokens. Raises: ClvrError for a prompt that is empty or too long."""
        for text in prompts:
            check_prompt(text)
        return [bucket_for(token_count(self.tokenizer, text), self.settings.text_buckets) for text in prompts]

    def _text(self, prompts: list[str], use_guidance: bool) -> jax.Array:
        """Returns text conditions (b, length, d); with guidance (2 b, length, d), the unconditional ones first."""
        buckets, layers = self.settings.text_buckets, self.settings.text_encoder_out_layers
        ids, mask = encode_prompts(self.tokenizer, prompts, buckets)
        if use_guidance:
            empty_ids, empty_mask = encode_prompts(self.tokenizer, [""], (ids.shape[1],))
            ids = np.concatenate([np.repeat(empty_ids, len(prompts), 0), ids])
            mask = np.concatenate([np.repeat(empty_mask, len(prompts), 0), mask])
        return self._wait_if_offloaded(self._encode_text(*self._split("text_encoder"), ids, mask, layers))

    def _given_latents(self, latents: jax.Array, batch: int, grid: tuple[int, int]) -> jax.Array:
        expected = (batch, self.transformer.config.in_channels, *grid)
        if latents.shape != expected:
            raise UsageError(
                f"latents have shape {latents.shape}; expected {expected} (batch, channels, height, width)"
            )
        return latents.transpose(0, 2, 3, 1).reshape(batch, grid[0] * grid[1], -1).astype(jnp.float32)


def _decode_tokens(
    graphdef: nnx.GraphDef[AutoencoderKLFlux2], state: Params, latents_btc: jax.Array, grid: tuple[int, int]
) -> jax.Array:
    """Decodes the latent tokens of images, which are in rows of the grid, see `programs.decode`."""
    rows, _, channels = latents_btc.shape
    return decode(graphdef, state, latents_btc.reshape(rows, *grid, channels))
