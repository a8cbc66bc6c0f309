"""NNX modules as arguments of jitted functions.

To split a module, and to compare its graph definition with the one that a function was compiled for, takes as long as a
small program runs. Here a module is split once, and its graph definition is hashed once.
"""

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import jax
from flax import nnx

from clvr_jax.pipelines.offload import Offloader, in_host
from clvr_jax.programs import StoredFunction
from clvr_jax.programs.fingerprint import fingerprint
from clvr_jax.sharding import MeshLayout, replicate
from clvr_jax.trees import Params

Module = TypeVar("Module", bound=nnx.Module)
P = ParamSpec("P")
Result = TypeVar("Result")


class HashedGraphDef:
    """A module's graph definition with a stored hash. Modules with equal graph definitions share compiled programs."""

    def __init__(self, graphdef: nnx.GraphDef[Any]):
        self.graphdef = graphdef
        self._hash = hash(graphdef)

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def fingerprint(self) -> str:
        """The digest of the graph definition, which is the same in every process."""
        return fingerprint(self.graphdef)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, HashedGraphDef) and self.graphdef == other.graphdef)


def jit_module(
    function: Callable[Concatenate[nnx.GraphDef[Module], Params, P], Result],
    *,
    replicate_weights: bool = False,
    static_argnums: int | Sequence[int] | None = None,
    donate_argnums: int | Sequence[int] | None = None,
) -> Callable[..., Result]:
    """Returns `function(graphdef, state, ...)`, jitted; the result takes (HashedGraphDef, state, ...).

    Args:
      function: computes with a module.
      replicate_weights: replicate the module's weights on every device of the mesh, for small modules, whose sharded
        matrix products would cost more.
      static_argnums, donate_argnums: of `jax.jit`.
    """

    @functools.wraps(function)
    def with_graphdef(hashed: HashedGraphDef, state: Params, *rest: P.args, **named: P.kwargs) -> Result:
        return function(hashed.graphdef, replicate(state) if replicate_weights else state, *rest, **named)

    return StoredFunction(with_graphdef, static_argnums=static_argnums, donate_argnums=donate_argnums)


class ModelTracker:
    """Tells whether models have changed since the call before, by graph definitions and the identity of their weights.

    It keeps no weights in memory.
    """

    def __init__(self) -> None:
        self._graphs: list[HashedGraphDef] = []
        self._context: object = None
        self._weights: list[weakref.ref[jax.Array]] = []

    def are_same(self, models: Sequence[tuple[HashedGraphDef, Params]], context: object = None) -> bool:
        """Returns whether models, weights and context are those of the call before, and remembers them.

        models: graph definition and weights of each model. context: what else must be equal, such as the mesh.
        """
        graphs, leaves = [graph for graph, _ in models], jax.tree.leaves([weights for _, weights in models])
        are_same = len(leaves) == len(self._weights) and all(
            reference() is leaf for reference, leaf in zip(self._weights, leaves, strict=True)
        )
        if are_same and graphs == self._graphs and context == self._context:
            return True
        self._graphs, self._context = graphs, context
        self._weights = [weakref.ref(leaf) for leaf in leaves]
        return False


class JittedPipeline:
    """Base of pipelines whose attributes are NNX modules, which may be replaced by others."""

    layout: MeshLayout | None = None
    """The layout that the modules are placed on and programs are traced for; None: the active one, else one device."""

    offloader: Offloader | None = None
    """Copies modules in host memory to the devices while they compute; None: all modules are on the devices."""

    def __init__(self) -> None:
        self._cache: dict[str, tuple[nnx.Module, tuple[HashedGraphDef, Params]]] = {}

    def _held(self, name: str) -> tuple[HashedGraphDef, Params]:
        """Returns the graph definition and the state of the module in the attribute `name`, where it is placed.

        The state holds the module's own variables, so that new values are used; a module that gets other variables must
        be assigned again.
        """
        module = getattr(self, name)
        cached, split = self._cache.get(name, (None, None))
        if cached is not module or split is None:
            graphdef, state = nnx.split(module)
            split = HashedGraphDef(graphdef), state
            self._cache[name] = module, split
        return split

    def _split(self, name: str) -> tuple[HashedGraphDef, Params]:
        """Returns the module in the attribute `name` as arguments of a `jit_module` function."""
        hashed, state = self._held(name)
        return hashed, self.offloader.on_device(state) if self.offloader and in_host(state) else state

    def _wait_if_offloaded(self, result: Result) -> Result:
        """Waits for a result if the module that computes it leaves the devices afterwards, and returns the result."""
        return result if self.offloader is None else jax.block_until_ready(result)
