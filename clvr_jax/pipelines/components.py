"""The modules that a pipeline is made of, as its jitted programs take them.

To walk through a module, and to compare it with the one that a program was compiled for, takes as long as a small
program runs. Here the first is done once for each module, the second once for each graph.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from clvr_jax.pipelines.offload import Offloader, in_host
from clvr_jax.sharding import MeshLayout, replicate


class Graph:
    """A module's graph that knows its hash. Equal graphs share a program."""

    def __init__(self, graphdef: Any):
        self.graphdef = graphdef
        self._hash = hash(graphdef)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Graph) and self.graphdef == other.graphdef)


def jitted(function: Callable[..., Any], *, gathers_weights: bool = False, **options: Any) -> Any:
    """`function(graphdef, state, ...)` under `jax.jit`, with the `options` of that; it takes (Graph, state, ...).

    gathers_weights: every device of a mesh computes with all weights of the module, for modules so small that sharding
      their products would cost more.
    """

    @functools.wraps(function)
    def of_graph(graph: Graph, state: Any, *rest: Any) -> Any:
        return function(graph.graphdef, replicate(state) if gathers_weights else state, *rest)

    return jax.jit(of_graph, **options)


class Components:
    """Something whose attributes are NNX modules that may be replaced by others."""

    layout: MeshLayout | None = None
    """Where the modules are placed, and programs are traced for; the default device, or the active layout, if None."""

    offloader: Offloader | None = None
    """Copies modules in host memory to the devices while they compute; None: all are on the devices."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[nnx.Module, tuple[Graph, Any]]] = {}

    def _split(self, name: str) -> tuple[Graph, Any]:
        """The module that the attribute `name` holds, as `jitted` functions take it.

        The state holds the module's own variables, so new values are seen; a module that gets other variables must be
        assigned again.
        """
        module = getattr(self, name)
        found, split = self._found.get(name, (None, None))
        if found is not module or split is None:
            graphdef, state = nnx.split(module)
            split = Graph(graphdef), state
            self._found[name] = module, split
        graph, state = split
        return graph, self.offloader.on_device(state) if self.offloader and in_host(state) else state

    def _completed(self, result: Any) -> Any:
        """Waits for a result if the module that computes it leaves the devices afterwards."""
        return result if self.offloader is None else jax.block_until_ready(result)
