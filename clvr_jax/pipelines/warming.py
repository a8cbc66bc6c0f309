"""The calls of a pipeline that make its programs ahead of the first image: sizes, references and lengths of texts."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from clvr_jax.compilation import release_programs
from clvr_jax.errors import UsageError
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.flux2.kept_latents import LatentReference, ReferenceImage, is_scaled
from clvr_jax.pipelines.flux2.noise import row_keys
from clvr_jax.pipelines.sdxl import SDXLPipeline


class WarmCall(NamedTuple):
    """A call: height and width in pixels, number of references of the same size, length of its text in tokens.

    text_tokens: a bucket of FLUX.2, 0 for models whose texts have one length.
    """

    size: tuple[int, int]
    references: int
    text_tokens: int

    def __str__(self) -> str:
        height, width = self.size
        text = f", {self.text_tokens} tokens" if self.text_tokens else ""
        return f"{height}x{width}, {self.references} references{text}"


def warm_calls(
    pipe: Flux2Pipeline | SDXLPipeline,
    sizes: Sequence[tuple[int, int]],
    references: Iterable[int],
    text_tokens: Sequence[int] = (),
) -> list[WarmCall]:
    """Returns the calls of a pipeline.

    Args:
      pipe: the pipeline.
      sizes: heights and widths in pixels; the model's own if empty.
      references: numbers of references; a Stable Diffusion model takes none.
      text_tokens: lengths of texts, of which each means its bucket; all buckets if empty.
    Raises: UsageError for a text that is longer than all buckets, or for references that the model does not take.
    """
    if isinstance(pipe, SDXLPipeline):
        if any(references):
            raise UsageError("--references: a Stable Diffusion model takes no references; leave it out")
        return [WarmCall(size, 0, 0) for size in sizes or [(0, 0)]]
    own = pipe.settings.sample_size
    buckets = sorted(pipe.settings.text_buckets)
    if text_tokens and max(text_tokens) > buckets[-1]:
        raise UsageError(f"--text-tokens {max(text_tokens)}: the model reads at most {buckets[-1]} tokens")
    wanted = {next(bucket for bucket in buckets if bucket >= length) for length in text_tokens} or set(buckets)
    chosen = [bucket for bucket in buckets if bucket in wanted and text_of(pipe, bucket) is not None]
    return [WarmCall(size, number, text) for size in sizes or [(own, own)] for number in references for text in chosen]


def text_of(pipe: Flux2Pipeline, bucket: int) -> str | None:
    """Returns a text whose tokens are padded to a bucket; None if every text is longer."""
    words = 1
    while pipe.prompt_length(" a" * words) < bucket:
        words *= 2
    low, high = 1, words  # the most words that fit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if pipe.prompt_length(" a" * middle) <= bucket else (low, middle - 1)
    text = " a" * low
    smaller = [each for each in pipe.settings.text_buckets if each < bucket]
    fits = max(smaller, default=0) < pipe.prompt_length(text) <= bucket
    return text if fits else None


def make_programs(
    pipe: Flux2Pipeline | SDXLPipeline, calls: Sequence[WarmCall], steps: int | None = None
) -> Iterator[WarmCall]:
    """Makes the programs of calls inside `programs.making_programs`; yields each call when its programs exist.

    Args:
      pipe: the pipeline.
      calls: from `warm_calls`.
      steps: number of sampler steps; the model's own if None.
    """
    for call in calls:
        release_programs(interval_seconds=2.0)
        if isinstance(pipe, SDXLPipeline):
            height, width = call.size if any(call.size) else (None, None)
            pipe("a", num_inference_steps=steps, output_type="np", height=height, width=width)
        else:
            text = text_of(pipe, call.text_tokens)
            assert text is not None
            height, width = call.size
            pipe.generate(
                [text],
                [[_reference(pipe, height, width)] * call.references],
                row_keys([0]),
                num_inference_steps=steps,
                height=height,
                width=width,
                output_type="np",
            )
        yield call


def _reference(pipe: Flux2Pipeline, height: int, width: int) -> ReferenceImage:
    """Returns a generated image as the references of a loop have it: with its latents, if these are kept."""
    image, token = Image.new("RGB", (width, height)), pipe.vae.config.token_pixels
    if pipe.reference_latents == "encoded" or is_scaled(image):
        return image
    shape = (height // token * (width // token), pipe.vae.config.token_channels)
    return LatentReference(image, np.zeros(shape, pipe.latents_dtype))
