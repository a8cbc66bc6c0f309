"""A FLUX.2 pipeline as the image generator of the closed loop."""

from collections.abc import Callable, Sequence

from clvr_jax.files.image_io import as_pil
from clvr_jax.pipelines.flux2.kept_latents import ReferenceImage
from clvr_jax.pipelines.flux2.pipeline import Flux2Pipeline
from clvr_jax.reasoning.conversation.protocols import GeneratedImage, GenerationRequest, ImageGenerator


class Flux2ImageGenerator(ImageGenerator):
    """A FLUX.2 pipeline as image generator, conditioned on the complete history.

    A generated image that becomes a reference is encoded, or keeps its latents, as `reference_latents` of the pipeline
    says. The user's own images are always encoded.

    Args:
      pipeline: the pipeline.
      steps, guidance: of the solver; the model's own if None.
      size: height and width in pixels; if None, those of the first reference, and the model's own without references.
      rows_per_call: see `Flux2Pipeline.generate_each`.
    """

    def __init__(
        self,
        pipeline: Flux2Pipeline,
        steps: int | None = None,
        guidance: float | None = None,
        size: tuple[int, int] | None = None,
        rows_per_call: int | None = None,
    ):
        self._pipeline, self._steps, self._guidance = pipeline, steps, guidance
        self._rows_per_call = rows_per_call
        self._height = None if size is None else size[0]
        self._width = None if size is None else size[1]

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GeneratedImage]:
        """Returns an image for each request."""
        return [image for image in self.generate_wanted(requests) if image is not None]

    def generate_wanted(
        self, requests: Sequence[GenerationRequest], on_step: Callable[[int, int, int], bool] | None = None
    ) -> list[GeneratedImage | None]:
        """Returns an image for each request, None for those that are abandoned.

        Args:
          requests: the histories.
          on_step: called for each step of each request; it returns whether the image is still wanted, see
            `Flux2Pipeline.generate_each`. None: all images are.
        """
        histories = [self._pipeline.fit_history(request.prompt, request.replies) for request in requests]
        output = self._pipeline.generate_each(
            [history.text for history in histories],
            [self._references(request) for request in requests],
            [request.seed for request in requests],
            num_inference_steps=self._steps,
            guidance_scale=self._guidance,
            height=self._height,
            width=self._width,
            rows_per_call=self._rows_per_call,
            on_step=on_step,
        )
        return [
            None if image is None else GeneratedImage(image, output.nfe, history.left_out)
            for image, history in zip(output.images, histories, strict=True)
        ]

    def _references(self, request: GenerationRequest) -> list[ReferenceImage]:
        return self._pipeline.with_latents([as_pil(image) for image in request.images], request.num_given)
