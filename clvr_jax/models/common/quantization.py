"""Weights as 8-bit integers: linear layers and token embeddings with one scale for each output channel.

A weight w is stored as round(w / scale), from -127 to 127, where the scale of an output channel (for embeddings: of a
token) is its largest absolute weight / 127. Activations are not quantized. The integers enter the matrix product after
a cast, and its result is multiplied by the scales, so that no copy of the weights in another dtype is stored.

Norms, biases, convolutions, the learned positions of a vision tower, and the layers of `UNQUANTIZED` keep their dtype;
together they are about 1% of a model. The layers of `UNQUANTIZED` are small, and their errors would reach every token
of an image.

qwix is not used: it finds the layers to quantize by calling the model, and does not find layers inside `jax.lax.scan`,
which have nearly all weights here.
"""

import re
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Int8

from clvr_jax.trees import Params, Path

Quantization = Literal["int8"]
"""The formats that weights can be quantized to."""

Module = TypeVar("Module", bound=nnx.Module)

INT8_MAX = 127
UNQUANTIZED = r"(^|\.)(x_embedder|proj_out|norm_out|time_guidance_embed|pos_embed)(\.|$)"
"""Pattern of the paths of layers that are not quantized."""
SCALE = "_scale"
"""The suffix of the name of a parameter's scales."""


def scale_path(path: Path) -> Path:
    """Returns the path of the scales of a parameter, which a model has if the parameter is quantized."""
    return (*path[:-1], f"{path[-1]}{SCALE}")


def quantize(weights: Float[Array, " *w"], axis: int) -> tuple[Int8[Array, " *w"], Float32[Array, "..."]]:
    """Quantizes weights.

    Args:
      weights: of any shape.
      axis: the axis along which weights share a scale.
    Returns: int8 of the same shape, and float32 scales without `axis`; the product of both is close to the weights.
    """
    values = weights.astype(jnp.float32)
    scale = jnp.max(jnp.abs(values), axis=axis, keepdims=True) / INT8_MAX
    rounded = jnp.round(values / jnp.where(scale == 0, 1, scale)).astype(jnp.int8)
    return rounded, jnp.squeeze(scale, axis)


class QuantizedLinear(nnx.Module):
    """A linear layer with int8 weights: kernel (in, out), kernel_scale (out,) float32; a stack has its layers first."""

    def __init__(self, linear: nnx.Linear) -> None:
        kernel, scale = quantize(linear.kernel[...], axis=-2)
        self.kernel, self.kernel_scale = nnx.Param(kernel), nnx.Param(scale)
        self.bias = None if linear.bias is None else nnx.Param(linear.bias[...])
        self.dtype = linear.dtype

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... d"]:
        """Maps (..., in) to (..., out) in the compute dtype."""
        dtype = self.dtype or x.dtype
        out = scaled_product(x.astype(dtype), self.kernel[...], self.kernel_scale[...])
        return (out if self.bias is None else out + self.bias[...].astype(jnp.float32)).astype(dtype)


class QuantizedEmbed(nnx.Module):
    """Token embeddings with int8 weights: embedding (vocabulary, features), embedding_scale (vocabulary,) float32."""

    def __init__(self, embed: nnx.Embed) -> None:
        embedding, scale = quantize(embed.embedding[...], axis=-1)
        self.embedding, self.embedding_scale = nnx.Param(embedding), nnx.Param(scale)
        self.dtype = embed.dtype or embed.param_dtype

    def __call__(self, ids: Int[Array, " *t"]) -> Float[Array, "*t d"]:
        """Returns the embeddings of token ids of any shape, (..., features), in the compute dtype."""
        rows = jnp.take(self.embedding[...], ids, axis=0).astype(jnp.float32)
        return (rows * jnp.take(self.embedding_scale[...], ids)[..., None]).astype(self.dtype)

    def attend(self, x: Float[Array, "... d"]) -> Float[Array, "... v"]:
        """Maps (..., features) to (..., vocabulary): the logits of a head that is tied to the embeddings."""
        embedding = self.embedding[...].T
        return scaled_product(x.astype(self.dtype), embedding, self.embedding_scale[...]).astype(self.dtype)


def scaled_product(
    x: Float[Array, "... c"], kernel: Int8[Array, "c d"], scale: Float32[Array, " d"]
) -> Float32[Array, "... d"]:
    """Returns x @ (kernel * scale) in float32: x (..., in), kernel (in, out) int8, scale (out,)."""
    # bfloat16 represents every int8, so the cast is exact.
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32) * scale


def quantize_layers(module: Module) -> Module:
    """Replaces the linear layers and embeddings of a module, in place, by quantized ones; returns the module.

    The module may be abstract, inside `nnx.eval_shape`.
    """
    _replace(module, ())
    return module


def _replace(node: Any, path: tuple[str, ...]) -> None:
    for name, child in list(enumerate(node) if isinstance(node, nnx.List) else vars(node).items()):
        own = (*path, str(name))
        make = _KINDS.get(type(child))
        if make is not None and not re.search(UNQUANTIZED, ".".join(own)):
            if isinstance(node, nnx.List):
                node[name] = make(child)
            else:
                setattr(node, name, make(child))
        elif isinstance(child, nnx.Module | nnx.List):
            _replace(child, own)


_KINDS: dict[type, Callable[..., nnx.Module]] = {nnx.Linear: QuantizedLinear, nnx.Embed: QuantizedEmbed}


def is_quantized(module: nnx.Module) -> bool:
    """Returns whether a module has quantized weights."""
    return any(str(path[-1]).endswith(SCALE) for path, _ in nnx.to_flat_state(nnx.state(module)))


def weight_bytes(tree: Params | nnx.Module) -> int:
    """Returns the bytes of all arrays, or shapes, of a module's state or another tree."""
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
