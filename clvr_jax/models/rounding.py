"""Layers that round once where `flax.nnx` rounds twice: what makes bfloat16 agree with PyTorch's.

In float32 they are what they replace, bit for bit.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class Linear(nnx.Linear):
    """`nnx.Linear` that adds its bias to the float32 sums of the product, as PyTorch does, and not to rounded ones.

    The error of a layer in bfloat16 falls by a third.
    """

    def __init__(self, features_in: int, features_out: int, **options: Any):
        super().__init__(features_in, features_out, preferred_element_type=jnp.float32, **options)

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """(..., features_in) -> (..., features_out) in the compute dtype."""
        return super().__call__(inputs, *args, **kwargs).astype(self.dtype)


class Conv(nnx.Conv):
    """The same for `nnx.Conv`, at the two ends of a network, which have few channels.

    Inside, convolutions stay as they are: with float32 results not every accelerator has a fast one for bfloat16.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, preferred_element_type=jnp.float32, **options)

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """(b, h, w, features_in) -> (b, h, w, features_out) in the compute dtype."""
        return super().__call__(inputs, *args, **kwargs).astype(self.dtype)


def silu(x: jax.Array) -> jax.Array:
    """x sigmoid(x), computed in float32; shape and dtype of x."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, computed in float32; shape and dtype of x."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)
