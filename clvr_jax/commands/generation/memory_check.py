"""The memory check of commands, before models are loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from clvr_jax.commands.generation.model_options import LoadOptions


def check_memory(
    model: str,
    loading: "LoadOptions",
    size: tuple[int, int] | None = None,
    images: "Sequence[np.ndarray]" = (),
    controller: str | None = None,
    verifier: str | None = None,
) -> None:
    """Checks that a command's models and one image fit the devices; reads configurations only.

    Args:
      model: the image generator.
      loading: how all models are loaded.
      size: height and width of the image in pixels; None as for `image_call`.
      images: the given images, (h, w, 3).
      controller, verifier: names or directories of Qwen3-VL models; None if there is none.
    Raises: ClvrError, one line that says what does not fit and which options would make it fit.
    """
    from clvr_jax.pipelines.loading import layout_of
    from clvr_jax.pipelines.memory import check_memory, parts_of
    from clvr_jax.pipelines.qwen3_vl.verifier import controller_directory
    from clvr_jax.pipelines.working_memory import image_call

    names = {"controller": controller, "verifier": verifier}
    chat: dict[str, Path] = {part: controller_directory(name)[0] for part, name in names.items() if name is not None}
    options = loading.arguments()
    layout = layout_of(options["mesh"])
    call = image_call(model, size, [(image.shape[0], image.shape[1]) for image in images])
    parts = parts_of(model, chat)
    check_memory(parts, options["dtype"], options["quantize"], layout, options["offload"], call=call)
