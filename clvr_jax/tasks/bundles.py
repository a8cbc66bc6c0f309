"""One model of a task: with weights, or with their shapes for the planner."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from clvr_jax.convert.architectures import Architecture, quantized
from clvr_jax.errors import ClvrError
from clvr_jax.sharding import process_allgather
from clvr_jax.trees import Leaf, Params

Config = TypeVar("Config")
Module = TypeVar("Module", bound=nnx.Module)

Quantized = Literal["int8"] | None

Export = Callable[[Params, Path], None]
"""(trained parameters, directory) -> None, writes the trained model."""


class _Configured(Protocol[Config]):
    """A module with its configuration."""

    config: Config


@dataclass(frozen=True)
class ModelBundle(Generic[Config]):
    """A model as its configuration, graph definition and weights, which are arrays or `jax.ShapeDtypeStruct`."""

    config: Config
    graphdef: nnx.GraphDef[Any]
    weights: Params

    @classmethod
    def abstract(
        cls, architecture: Architecture, config: Config, dtype: DTypeLike, quantize: Quantized = None
    ) -> "ModelBundle[Config]":
        """Returns a model without values; no weights are allocated.

        Args:
          architecture, config: of the model.
          dtype: of the weights and of the computation.
          quantize: format of the large weights, None for `dtype`.
        """
        fields = architecture.config_to_dict(config)
        stored = architecture if quantize is None else quantized(architecture)
        return cls(config, *stored.split(fields, jnp.dtype(dtype)))

    @classmethod
    def of(cls, model: "_Configured[Config]") -> "ModelBundle[Config]":
        """Returns the bundle of a loaded module, which has its configuration as `config`."""
        return cls(model.config, *nnx.split(model))


def cast_weights(weights: Params, dtype: DTypeLike) -> Params:
    """Returns weights, or their shapes, in another dtype."""

    def cast(leaf: Leaf) -> Leaf:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype))
        return leaf.astype(dtype)

    return jax.tree.map(cast, weights)


def allgathered(model: Module) -> Module:
    """Returns a module with all weights in the memory of every process, for an export."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, process_allgather(state))


def no_export(params: Params, directory: Path) -> None:
    """The export of a task that is only planned: shapes have nothing to write."""


def check_model_given(recipe: str, model: str, kind: str) -> None:
    """Raises ClvrError, which names the recipe and the kind of model that it trains, if no model is given."""
    if not model:
        raise ClvrError(f"{recipe}: --model is missing; give a directory or a Hugging Face id of {kind}")
