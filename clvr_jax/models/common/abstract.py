"""Models without weights: only the shapes and dtypes of their parameters."""

from collections.abc import Callable
from typing import TypeVar

import jax
from flax import nnx

Module = TypeVar("Module", bound=nnx.Module)


class _OneKeyStream(nnx.RngStream):
    """Random keys where only shapes are asked for: always the same one.

    A stream that counts its keys updates a traced counter, and for each update JAX composes an error message, which
    Flax drops, from all operations so far. That takes half of the time in which a model of many layers is traced.
    """

    def __call__(self) -> jax.Array:
        return self.key[...]


class ShapeRngs(nnx.Rngs):
    """The random numbers of a model of which only the shapes are asked for."""

    def __init__(self) -> None:
        super().__init__(0)
        self.default = _OneKeyStream(0, tag="default")


def abstract_module(make: Callable[[nnx.Rngs], Module]) -> Module:
    """Returns a module whose parameters are shapes and dtypes; allocates no weights.

    Args:
      make: rngs -> module. It is traced, not run.
    """
    module: Module = nnx.eval_shape(lambda: make(ShapeRngs()))
    return module
