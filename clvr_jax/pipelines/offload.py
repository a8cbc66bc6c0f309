"""Offloading: large models in host memory, each copied to the devices only while it computes."""

from typing import Any, Literal

import jax

from clvr_jax.errors import UsageError
from clvr_jax.trees import Params

HOST = "pinned_host"
"""JAX's name for host memory that devices read directly."""


class Offloader:
    """Holds a copy of one model at a time on the devices, of several models in host memory.

    A model that is used twice in a row is copied once.
    """

    def __init__(self) -> None:
        self._held: Params = None
        self._copy: Params = None

    def on_device(self, weights: Params) -> Params:
        """Returns a copy of a model's weights on the devices, after freeing the copy of another model.

        Args:
          weights: in host memory; leaves on the devices are returned as they are. The computations with the copy of
            another model must be complete.
        """
        if weights is not self._held:
            self._held = self._copy = None  # freed before the next one is copied
            self._copy = jax.tree.map(_on_device, weights)
            self._held = weights
        return self._copy


Offload = Literal["components"] | Offloader | None
"""Whether models share the memory of the devices; an `Offloader` that exists is shared with other pipelines."""


def offloader_of(offload: Offload) -> Offloader | None:
    """Returns the offloader to use, None for None. Raises: UsageError for another text than "components"."""
    if offload is None or isinstance(offload, Offloader):
        return offload
    if offload != "components":
        raise UsageError(f"offload {offload!r}: the only choice is components")
    return Offloader()


def in_host(weights: Params) -> bool:
    """Returns whether a model's weights are in host memory."""
    return any(leaf.sharding.memory_kind == HOST for leaf in jax.tree.leaves(weights))


def _on_device(leaf: Any) -> Any:
    if leaf.sharding.memory_kind != HOST:
        return leaf
    (device, *_) = leaf.sharding.device_set
    return jax.device_put(leaf, leaf.sharding.with_memory_kind(device.default_memory().kind))
