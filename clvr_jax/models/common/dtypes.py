"""The dtypes that a model passes to all of its layers."""

from typing import TypedDict

from jax.typing import DTypeLike


class Dtypes(TypedDict, total=False):
    """The keyword arguments of a layer for its dtypes; those of `flax.nnx` apply without them.

    dtype: of the computation. param_dtype: of the weights.
    """

    dtype: DTypeLike
    param_dtype: DTypeLike
