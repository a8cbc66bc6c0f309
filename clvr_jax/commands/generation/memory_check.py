"""The memory check of commands, before models are loaded, and the mesh that it chooses."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from clvr_jax.display.console import console

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
    prefix_cache: float = 0.0,
) -> "LoadOptions":
    """Checks that a command's models and one image fit the devices; reads configurations only.

    Without options for the mesh, models that do not fit one device get a mesh of all devices.

    Args:
      model: the image generator.
      loading: how all models are loaded.
      size: height and width of the image in pixels; None as for `image_call`.
      images: the given images, (h, w, 3).
      controller, verifier: names or directories of Qwen3-VL models; None if there is none.
      prefix_cache: memory of the prefix cache of each of them, in GiB, which is not free for anything else.
    Returns: `loading`, with the mesh.
    Raises: ClvrError, one line that says what does not fit and which options would make it fit.
    """
    from clvr_jax.commands.generation.model_options import MeshOptions
    from clvr_jax.pipelines.loading import layout_of
    from clvr_jax.pipelines.memory import check_memory, device_memory, mesh_that_fits, parts_of
    from clvr_jax.pipelines.qwen3_vl.verifier import controller_directory
    from clvr_jax.pipelines.working_memory import image_call

    names = {"controller": controller, "verifier": verifier}
    chat: dict[str, Path] = {part: controller_directory(name)[0] for part, name in names.items() if name is not None}
    given = [(image.shape[0], image.shape[1]) for image in images]
    call = image_call(model, size, given, loading.reference_cache, loading.reference_cache_dtype)
    parts, options = parts_of(model, chat), loading.arguments()
    dtype, quantize, offload = options["dtype"], options["quantize"], options["offload"]
    caches = int(prefix_cache * 2**30) * len({name for name in names.values() if name is not None})
    device = device_memory().without(caches)
    if options["mesh"] is None and (mesh := mesh_that_fits(parts, dtype, quantize, offload, device, call)):
        sizes = {axis: size for axis in ("fsdp", "tensor") if (size := getattr(mesh, axis)) > 1}
        words = " ".join(f"--mesh.{axis} {size}" for axis, size in sizes.items())
        console.print(f"the models do not fit one device and are sharded: {words}", highlight=False)
        loading = replace(loading, mesh=MeshOptions(fsdp=mesh.fsdp, tensor=mesh.tensor))
    layout = layout_of(loading.mesh.config())
    check_memory(parts, dtype, quantize, layout, offload, device_memory(layout).without(caches), call)
    return loading
