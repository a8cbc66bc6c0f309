"""The memory check of commands, before models are loaded."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clvr_jax.commands.model_options import LoadOptions


def check_memory(
    model: str, loading: "LoadOptions", controller: str | None = None, verifier: str | None = None
) -> None:
    """Checks that the weights of a command's models fit the devices; reads configurations only.

    Args:
      model: the image generator.
      loading: how all models are loaded.
      controller, verifier: names or directories of Qwen3-VL models; None if there is none.
    Raises: ClvrError, one line that says what does not fit and which options would make it fit.
    """
    from clvr_jax.pipelines.loading import layout_of
    from clvr_jax.pipelines.memory import check_memory, parts_of
    from clvr_jax.pipelines.verifier import controller_directory

    names = {"controller": controller, "verifier": verifier}
    chat: dict[str, Path] = {part: controller_directory(name)[0] for part, name in names.items() if name is not None}
    options = loading.arguments()
    layout = layout_of(options["mesh"])
    check_memory(parts_of(model, chat), options["dtype"], options["quantize"], layout, options["offload"])
