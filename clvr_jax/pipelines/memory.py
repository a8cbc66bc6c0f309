"""The memory that models need, compared with the free memory of the devices before they are loaded."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clvr_jax.convert.architectures import (
    FLUX2_TRANSFORMER,
    FLUX2_VAE,
    QWEN3_VL,
    Architecture,
    architecture_of,
    quantized,
    qwen3_hidden_states,
)
from clvr_jax.convert.rules import leaves_of
from clvr_jax.errors import ClvrError
from clvr_jax.files.atomic_io import read_json
from clvr_jax.models.common.quantization import SCALE
from clvr_jax.models.flux2 import Flux2TransformerConfig
from clvr_jax.models.qwen3 import Qwen3Config
from clvr_jax.models.qwen3_vl import Qwen3VLConfig
from clvr_jax.models.stable_diffusion import UNet2DConditionConfig
from clvr_jax.pipelines.loading import Quantize, quantization_of, resolve_dtype
from clvr_jax.pipelines.registry import FLUX2, class_of, resolve
from clvr_jax.pipelines.sdxl.io import unet_heads
from clvr_jax.pipelines.working_memory import ImageCall, flux2_settings, working_bytes
from clvr_jax.sharding import MeshConfig, MeshLayout

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Part:
    """One model of a pipeline.

    name: in messages. directory: contains config.json. architecture: of the module. quantize_as: its name in
    `loading.QUANTIZED_PARTS`, "" if it is never quantized. is_offloaded: whether `offload` moves it to host memory.
    """

    name: str
    directory: Path
    architecture: Architecture
    quantize_as: str = ""
    is_offloaded: bool = True


def parts_of(model: str, vision_language: Mapping[str, Path] | None = None) -> list[Part]:
    """Returns the models of a pipeline; reads configurations only.

    Args:
      model: a shipped name or a directory in diffusers layout.
      vision_language: name in messages -> directory of each further Qwen3-VL; equal directories are one model.
    """
    path, chosen = resolve(model)
    further = {directory: name for name, directory in reversed(list((vision_language or {}).items()))}
    chat = [Part(name, directory, QWEN3_VL, "controller") for directory, name in further.items()]
    if class_of(path) not in FLUX2:
        found = [child for child in sorted(path.iterdir()) if (child / "config.json").exists()]
        known = [child for child in found if child.name in ("unet", "vae", "text_encoder", "text_encoder_2")]
        return [Part(child.name, child, architecture_of(child), is_offloaded=False) for child in known]
    encoder = qwen3_hidden_states(flux2_settings(path, chosen).text_encoder_out_layers)
    return [
        Part("transformer", path / chosen, FLUX2_TRANSFORMER, "transformer"),
        Part("text_encoder", path / "text_encoder", encoder, "text_encoder"),
        Part("vae", path / "vae", FLUX2_VAE, is_offloaded=False),
        *chat,
    ]


def bytes_per_device(
    parts: list[Part], dtype: np.dtype, quantize: Quantize = None, layout: MeshLayout | None = None
) -> dict[str, int]:
    """Returns the bytes of each model's weights on one device of a mesh, or on the one device if there is no mesh."""
    formats = quantization_of(quantize)
    found: dict[str, int] = {}
    for part in parts:
        architecture = quantized(part.architecture) if part.quantize_as in formats else part.architecture
        _, state = architecture.split(read_json(part.directory / "config.json"), dtype)
        leaves = leaves_of(state)
        placed = None if layout is None else leaves_of(layout.parameters(state))
        found[part.name] = 0
        for path, leaf in leaves.items():
            shape = leaf.shape if placed is None else placed[path].shard_shape(leaf.shape)
            # `load_model` casts floating-point arrays, except the scales of quantized weights.
            is_cast = jnp.issubdtype(leaf.dtype, jnp.floating) and not str(path[-1]).endswith(SCALE)
            found[part.name] += math.prod(shape) * (dtype if is_cast else np.dtype(leaf.dtype)).itemsize
    return found


class DeviceMemory(NamedTuple):
    """Memory of a device.

    free: bytes, None if not known. is_host: whether the device is a CPU, whose memory is that of the host.
    num_devices: number of devices.
    """

    free: int | None
    is_host: bool
    num_devices: int = 1

    def without(self, used: int) -> "DeviceMemory":
        """Returns the memory after `used` bytes of each device are taken."""
        return self if self.free is None else self._replace(free=max(self.free - used, 0))


def needed(parts: list[Part], sizes: Mapping[str, int], is_offloaded: bool, is_host: bool = False) -> int:
    """Returns the bytes that are on a device at the same time.

    On a CPU, the models that are offloaded are in the same memory as the copy of one of them.
    """
    swapped = [sizes[part.name] for part in parts if is_offloaded and part.is_offloaded]
    return sum(sizes.values()) - (0 if is_host else sum(swapped)) + max(swapped, default=0)


def device_memory(layout: MeshLayout | None = None) -> DeviceMemory:
    """Returns the memory of the device that has the least free.

    Virtual devices of a CPU share the memory of the machine, of which swap space is a part.
    """
    devices = jax.local_devices()
    if layout is not None:
        devices = [device for device in layout.mesh.devices.flat if device.process_index == jax.process_index()]
    else:
        devices = devices[:1]
    if devices[0].platform == "cpu":
        available = _available_on_host()
        return DeviceMemory(None if available is None else available // len(devices), True, jax.device_count())
    known = [statistics for device in devices if (statistics := device.memory_stats())]
    free = [stats["bytes_limit"] - stats.get("bytes_in_use", 0) for stats in known if "bytes_limit" in stats]
    return DeviceMemory(min(free, default=None), False, jax.device_count())


def _available_on_host() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return None
    amounts = {name: text.split()[0] for name, _, text in (line.partition(":") for line in lines) if text.split()}
    if "MemAvailable" not in amounts:
        return None
    return 1024 * (int(amounts["MemAvailable"]) + int(amounts.get("SwapFree", 0)))


def check_memory(
    parts: list[Part],
    dtype: str | None,
    quantize: Quantize,
    layout: MeshLayout | None,
    offload: str | None,
    device: DeviceMemory | None = None,
    call: ImageCall | None = None,
) -> None:
    """Checks that the weights of all models, and the largest arrays of one call, fit in the free memory.

    A call needs more than these arrays; `clvr plan` compiles the programs and gives all of their memory.

    Args:
      parts: from `parts_of`.
      dtype, quantize, layout, offload: as models are loaded.
      device: memory of a device; measured if None.
      call: the smallest call of the command; None counts weights only.
    Raises: ClvrError, one line with the options that would make them fit.
    """
    device = device or device_memory(layout)
    if device.free is None:
        return
    chosen = resolve_dtype(dtype, parts[0].directory, layout)
    sizes = bytes_per_device(parts, chosen, quantize, layout)
    weights = needed(parts, sizes, bool(offload), device.is_host)
    working = 0 if call is None else working_bytes(call, chosen, layout)
    if weights + working <= device.free:
        return
    if offload and not device.is_host:
        what = "the largest of " + " and ".join(part.name for part in parts if part.is_offloaded)
    else:
        what = " + ".join(f"{name} {_gib(size)}" for name, size in sizes.items())
        what += " + a copy of the largest" if offload else ""
    options = _options_that_fit(parts, chosen, quantize, layout, offload, device, call)
    if call is None or weights > device.free:
        raise ClvrError(
            f"the weights do not fit: {what} in {chosen} need {_gib(weights)}, without activations, of a device, which "
            f"has {_gib(device.free)} free; {options}"
        )
    raise ClvrError(
        f"an image of {call.height} x {call.width} does not fit: {what} in {chosen} need {_gib(weights)} of a device, "
        f"which has {_gib(device.free)} free, and the image at least {_gib(working)} more; choose a smaller --size; "
        f"{options}"
    )


def mesh_that_fits(
    parts: list[Part],
    dtype: str | None,
    quantize: Quantize,
    offload: str | None,
    device: DeviceMemory | None = None,
    call: ImageCall | None = None,
) -> MeshConfig | None:
    """Returns a mesh of all devices for models that do not fit one of them, by the figures of `check_memory`.

    The tensor axis is the largest one that divides the devices and all attention heads, because it divides memory and
    time; the rest is fsdp.

    Args: those of `check_memory`.
    Returns: None if everything fits one device, no such mesh would help, or the devices share their memory (CPUs).
    """
    device = device or device_memory()
    if device.free is None or device.is_host or device.num_devices == 1:
        return None
    chosen = resolve_dtype(dtype, parts[0].directory)
    common = math.gcd(*(count for part in parts for count in _heads(part)))

    def fits(layout: MeshLayout | None) -> bool:
        weights = needed(parts, bytes_per_device(parts, chosen, quantize, layout), bool(offload))
        return weights + (0 if call is None else working_bytes(call, chosen, layout)) <= (device.free or 0)

    if fits(None):
        return None
    axes = [n for n in range(device.num_devices, 0, -1) if device.num_devices % n == common % n == 0]
    meshes = [MeshConfig(fsdp=device.num_devices // tensor, tensor=tensor) for tensor in axes]
    return next((mesh for mesh in meshes if fits(MeshLayout(mesh.make()))), None)


def _heads(part: Part) -> tuple[int, ...]:
    """Returns the numbers of attention heads of a model that a tensor axis must divide; 0 divides by all."""
    config = part.architecture.config_from_dict(read_json(part.directory / "config.json"))
    if isinstance(config, Qwen3VLConfig):
        return config.text.num_attention_heads, config.vision.num_heads
    if isinstance(config, UNet2DConditionConfig):
        return tuple(unet_heads(config).values())
    # The small text encoders of Stable Diffusion need not be sharded evenly.
    return (config.num_attention_heads,) if isinstance(config, Flux2TransformerConfig | Qwen3Config) else (0,)


def _options_that_fit(
    parts: list[Part],
    dtype: np.dtype,
    quantize: Quantize,
    layout: MeshLayout | None,
    offload: str | None,
    device: DeviceMemory,
    call: ImageCall | None = None,
) -> str:
    """Returns the options that would make the weights and a call fit, or that there are none."""
    half = np.dtype("bfloat16") if dtype.itemsize > 2 else dtype
    can_quantize = any(part.quantize_as for part in parts)
    can_offload = any(part.is_offloaded for part in parts) and not device.is_host

    def size(as_dtype: np.dtype, as_format: Quantize, mesh: MeshLayout | None, is_offloaded: bool) -> int:
        weights = needed(parts, bytes_per_device(parts, as_dtype, as_format, mesh), is_offloaded, device.is_host)
        return weights + (0 if call is None else working_bytes(call, as_dtype, mesh))

    tries: list[tuple[str, Callable[[], int], bool]] = [
        (f"--dtype {half}", lambda: size(half, quantize, layout, bool(offload)), half != dtype),
        ("--quantize int8", lambda: size(dtype, "int8", layout, bool(offload)), can_quantize and not quantize),
        ("--offload components", lambda: size(dtype, quantize, layout, True), can_offload and not offload),
        ("no --offload", lambda: size(dtype, quantize, layout, False), bool(offload) and device.is_host),
        (
            f"--mesh.fsdp {device.num_devices}",
            lambda: size(dtype, quantize, MeshLayout(MeshConfig().make()), bool(offload)),
            layout is None and device.num_devices > 1 and not device.is_host,
        ),
        (f"--dtype {half} --quantize int8", lambda: size(half, "int8", layout, False), can_quantize),
        (
            f"--dtype {half} --quantize int8 --offload components",
            lambda: size(half, "int8", layout, True),
            can_quantize and can_offload,
        ),
    ]
    free = math.inf if device.free is None else device.free
    found = [(words, needs) for words, make, is_open in tries if is_open and (needs := make()) <= free]
    single = [each for each in found if each[0].count("--") == 1]
    fits = [f"{words} ({_gib(needs)})" for words, needs in single or found]
    return f"what would fit: {' or '.join(fits)}" if fits else "no dtype, quantization or offloading would make it fit"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.1f} MiB"
