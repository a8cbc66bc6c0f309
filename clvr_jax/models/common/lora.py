"""Low-rank adapters (LoRA) as trees: the nesting of the parameters, with a pair of factors at each adapted kernel.

The paths of a LoRA tree are a subset of those of the parameters. Base and adapter are separate trees: the frozen base,
the trained policy and the old policy are three trees, and no adapter is switched on or off.

Source: LoRA (arXiv 2106.09685); layout and initial values of the factors as in PEFT.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.typing import DTypeLike
from jaxtyping import Array, Float32, PRNGKeyArray

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.trees import Leaf, Params, Path, dotted, leaves_by_path, some

# The adapted kernels: linear layers, stacks of linear layers, convolutions.
KERNEL_AXES = (2, 3, 4)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("a", "b"), meta_fields=("scale",))
@dataclasses.dataclass(frozen=True, eq=False)
class LoRAPair:
    """The low-rank delta scale * a b of one kernel. `a` and `b` are leaves and trained; `scale` is static.

    a: (..., in, rank), the shape of the kernel with rank instead of out.
    b: (rank, out); (layers, rank, out) for a stack; (1, 1, rank, out) for a convolution.
    scale: alpha / rank, or one for each layer of a stack.
    """

    a: Leaf
    b: Leaf
    scale: float | tuple[float, ...] = 1.0

    def product(self) -> Float32[Array, "*outer c d"]:
        """Returns scale * a b in float32, in the shape of the kernel."""
        a, b = (jnp.asarray(factor, jnp.float32) for factor in (self.a, self.b))
        scale = jnp.asarray(self.scale, jnp.float32)
        # Full precision: the default of a TPU would round both factors to bfloat16.
        return scale.reshape(scale.shape + (1, 1) * scale.ndim) * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Configuration of a LoRA that is trained."""

    rank: int = 128
    """Rank of the LoRA; 0 trains all parameters instead."""
    alpha: float = 256.0
    """Scale of the LoRA: the weights change by alpha / rank times the product of its two matrices."""
    targets: tuple[str, ...] = ("kernel",)
    """Adapt the kernels in whose path one of these regular expressions is found."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise UsageError(f"LoRAConfig: rank must be at least 0, got {self.rank}")

    def init(self, params: Params, key: PRNGKeyArray) -> Params:
        """Returns a LoRA tree whose delta is zero, see `init_lora`."""
        return init_lora(params, self.targets, self.rank, self.alpha, key)


def is_pair(node: object) -> bool:
    """Returns whether a node is a `LoRAPair`: `is_leaf` for functions over LoRA trees."""
    return isinstance(node, LoRAPair)


def factor_shapes(kernel: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes of `a` and `b` for a kernel (in, out), (layers, in, out) or (height, width, in, out).

    Raises: ClvrError for other numbers of axes.
    """
    if len(kernel) not in KERNEL_AXES:
        raise ClvrError(
            f"LoRA: a kernel of shape {kernel} is neither linear, nor a stack of linear layers, nor a convolution"
        )
    *outer, features_in, features_out = kernel
    outer_b = [1, 1] if len(outer) == 2 else outer
    return (*outer, features_in, rank), (*outer_b, rank, features_out)


def init_lora(
    params: Params, targets: Sequence[str], rank: int, alpha: float, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32
) -> Params:
    """Returns a LoRA tree whose delta is zero: `a` is random, `b` is zero.

    Args:
      params: parameter tree, such as an NNX state or module; abstract arrays are accepted.
      targets: regular expressions; kernels whose path matches one are adapted, such as
        [r"transformer_blocks\\.attn\\.to_[qkv]\\."] for "transformer_blocks.attn.to_q.kernel".
      rank: at least 1.
      alpha: the delta is alpha / rank * a b.
      key: random key; `a` is uniform in +-1 / sqrt(inputs of the kernel).
      dtype: of both factors.
    Returns: nested dictionaries with the parameters' own keys.
    Raises: ClvrError for a rank below 1, or a target that matches no kernel's path.
    """
    if rank < 1:
        raise ClvrError(f"LoRA: rank is {rank}; it must be at least 1")
    kernels = {path: tuple(leaf.shape) for path, leaf in leaves_by_path(params).items() if path[-1] == "kernel"}
    if idle := [target for target in targets if not any(re.search(target, dotted(path)) for path in kernels)]:
        raise ClvrError(f"LoRA: targets {', '.join(idle)} match no kernel's path; kernels are {some(_names(kernels))}")
    adapted = [path for path in kernels if any(re.search(target, dotted(path)) for target in targets)]

    def pair(path: Path, key: jax.Array) -> LoRAPair:
        shape_a, shape_b = factor_shapes(kernels[path], rank)
        inputs = math.prod(shape_a[len(shape_a) == 3 : -1])  # of one layer
        bound = 1 / math.sqrt(inputs)
        a = jax.random.uniform(key, shape_a, jnp.float32, -bound, bound).astype(dtype)
        return LoRAPair(a, jnp.zeros(shape_b, dtype), alpha / rank)

    keys = jax.random.split(key, max(len(adapted), 1))
    return unflatten_dict({path: pair(path, own) for path, own in zip(adapted, keys, strict=False)})


def _names(paths: Iterable[Path]) -> list[str]:
    return [dotted(path) for path in paths]
