"""Options for loading the models of a pipeline: dtype, mesh, quantization, and LoRAs that are added to the weights."""

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Concatenate, Literal, ParamSpec, Protocol, TypedDict, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from clvr_jax.checkpoint_io.orbax_tree import PARAMS, is_tree, open_tree
from clvr_jax.checkpoint_io.tensors import FLOATS, stored_tensors
from clvr_jax.convert.architectures import Architecture
from clvr_jax.convert.hub import local_directory
from clvr_jax.convert.lora.config import PEFT_CONFIG, PEFT_NAME
from clvr_jax.convert.lora.files import FILE_NAME
from clvr_jax.convert.lora.trees import load_lora
from clvr_jax.errors import UsageError
from clvr_jax.files.atomic_io import read_json
from clvr_jax.files.file_names import refuse_url
from clvr_jax.models.common.quantization import Quantization
from clvr_jax.sharding import MeshConfig, MeshLayout, active_layout
from clvr_jax.trees import Params

P = ParamSpec("P")
T = TypeVar("T")

Mesh = MeshConfig | MeshLayout | None
"""Where a model is placed: on a mesh to be made, on one that exists, or on the default device."""

LoRA = str | tuple[str, float]
"""A LoRA: its file, directory or Hugging Face id, alone (weight 1) or with its weight."""

Quantize = Quantization | Mapping[str, Quantization] | None
"""Which models are quantized: all that can be, those that are named, or none."""

QUANTIZED_PARTS = ("transformer", "text_encoder", "controller")
"""The models that can be quantized; "controller" is every Qwen3-VL of a loop, the verifier's as well."""

QUANTIZED_GENERATOR_PARTS = ("transformer", "text_encoder")
"""The models of an image generator that can be quantized."""


class LoadArguments(TypedDict, total=False):
    """Arguments of the pipelines' `from_pretrained` that all pipelines have, see `Flux2Pipeline.from_pretrained`."""

    dtype: Literal["float32", "bfloat16", "float16"] | None
    mesh: Mesh
    lora: Sequence[LoRA]
    ignore_text_encoder: bool
    quantize: Quantize
    offload: Literal["components"] | None
    reference_cache: Literal["none", "image", "loop"] | None
    reference_cache_dtype: Literal["int8"] | None
    reference_latents: Literal["encoded", "kept"] | None


SMALL = 10**8
"""Models with fewer parameters are loaded in float32 unless a dtype is given: they are stored in half precision to be
small files, and fit into any memory."""


def layout_of(mesh: Mesh) -> MeshLayout | None:
    """Returns the layout of a mesh, None for None. Raises: UsageError for a mesh that does not fit the devices."""
    return MeshLayout(mesh.make()) if isinstance(mesh, MeshConfig) else mesh


class _OnMesh(Protocol):
    """A pipeline with the layout that it computes on, None for one device."""

    layout: MeshLayout | None


Pipeline = TypeVar("Pipeline", bound=_OnMesh)


def computing_on(layout: MeshLayout | None) -> AbstractContextManager[object]:
    """Returns a context in which models are loaded and programs are traced for `layout`; None changes nothing."""
    return contextlib.nullcontext() if layout is None else layout.active()


def on_mesh(method: Callable[Concatenate[Pipeline, P], T]) -> Callable[Concatenate[Pipeline, P], T]:
    """Decorates a method of a pipeline so that it computes on the mesh of its attribute `layout`."""

    @functools.wraps(method)
    def run(self: Pipeline, *args: P.args, **options: P.kwargs) -> T:
        with computing_on(self.layout):
            return method(self, *args, **options)

    return run


def resolve_dtype(dtype: DTypeLike | None, directory: Path, layout: MeshLayout | None = None) -> np.dtype:
    """Returns the dtype to load a model with.

    Args:
      dtype: returned if it is not None.
      directory: of the model; decides on an accelerator: the dtype that most of its weights are stored in, and float32
        for a model of fewer than `SMALL` parameters. On a CPU it is float32, because CPUs are slow in other dtypes.
      layout: the mesh that the model is placed on; the active layout, else the default device, if None.
    """
    if dtype is not None:
        return np.dtype(jnp.dtype(dtype))
    layout = layout or active_layout()
    platform = layout.platform if layout else jax.default_backend()
    return FLOATS["float32"] if platform == "cpu" else stored_dtype(directory)


def stored_dtype(directory: Path) -> np.dtype:
    """Returns the dtype that most of a model's weights are stored in; float32 for small models and other dtypes."""
    sizes: Counter[np.dtype] = Counter()
    arrays = open_tree(directory / PARAMS) if is_tree(directory / PARAMS) else stored_tensors(directory)
    for array in arrays.values():
        sizes[np.dtype(array.dtype)] += math.prod(array.shape)
    if sizes.total() < SMALL:
        return FLOATS["float32"]
    most = max(sizes, key=lambda dtype: sizes[dtype], default=FLOATS["float32"])
    return most if most in FLOATS.values() else FLOATS["float32"]


def quantization_of(quantize: Quantize, parts: Sequence[str] = QUANTIZED_PARTS) -> dict[str, Quantization]:
    """Returns the format of each model that is quantized.

    parts: the models that a pipeline has; a format alone quantizes all of them.
    Raises: UsageError for other models or formats.
    """
    if isinstance(quantize, str):
        quantize = dict.fromkeys(parts, quantize)
    chosen = dict(quantize or {})
    formats = get_args(Quantization)
    for part, name in chosen.items():
        if part not in parts or name not in formats:
            raise UsageError(
                f"quantize: {part} to {name} is not possible; the formats are {', '.join(formats)}, the models "
                f"{', '.join(parts)}"
            )
    return chosen


def check_heads(layout: MeshLayout | None, heads: Mapping[str, int], *, is_causal: bool = True) -> None:
    """Checks that a mesh shards the heads of attention evenly: else some devices would wait for the others.

    Args:
      layout: of the mesh; None is always fine.
      heads: model -> number of its attention heads.
      is_causal: whether the attention is causal or shares a mesh with one that is; if not, the axes that shard tokens
        need not divide the heads, because `attention` can shard the queries along them.
    Raises: UsageError that names the model and what would divide all heads.
    """
    if layout is None:
        return
    axes = [axis for axis in layout.rules.heads if is_causal or axis not in layout.rules.tokens]
    sizes = {axis: layout.mesh.shape[axis] for axis in axes}
    ways = math.prod(sizes.values())
    wrong = next((name for name, count in heads.items() if count % ways), None)
    if wrong is not None:
        common = math.gcd(*heads.values())
        fits = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        named = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
        raise UsageError(
            f"mesh: {named} shards heads {ways} ways, which does not divide the {heads[wrong]} heads of {wrong}; "
            f"choose axes whose product is one of {fits}"
        )


def read_loras(
    directory: Path, architecture: Architecture, loras: Sequence[LoRA], ignore_text_encoder: bool = False
) -> list[tuple[Params, float]]:
    """Reads LoRAs of the model in `directory`, without its weights.

    Args:
      directory: holds config.json.
      architecture: the architecture.
      loras: what to read; the same LoRA may be given twice.
      ignore_text_encoder: leave out tensors that adapt a text encoder, which are an error otherwise.
    Returns: each LoRA tree with its weight.
    Raises: ClvrError, one line, for a LoRA that is missing, damaged, of another kind or of another model; UsageError
      for a weight that is no finite number.
    """
    if not loras:
        return []
    config = read_json(directory / "config.json")
    _, state = architecture.split(config)
    table = architecture.key_mapping(architecture.config_from_dict(config))
    trees = []
    for name, weight in weighted(loras):
        if not math.isfinite(weight):
            raise UsageError(f"{name}: the weight of a LoRA must be a finite number, got {weight}")
        tree = load_lora(lora_path(name), table, state, ignore_text_encoder=ignore_text_encoder)
        trees.append((tree, float(weight)))
    return trees


def weighted(loras: Sequence[LoRA]) -> list[tuple[str, float]]:
    """Returns each LoRA with its weight."""
    return [(lora, 1.0) if isinstance(lora, str) else lora for lora in loras]


def lora_path(name: str) -> Path:
    """Returns the file or directory of a LoRA on this machine; a Hugging Face id is downloaded. Raises: ClvrError."""
    refuse_url(name)
    return local_directory(name, allow_patterns=(FILE_NAME, PEFT_NAME, PEFT_CONFIG))
