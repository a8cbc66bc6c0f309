"""The modules that a pipeline is made of, as its jitted programs take them."""

from typing import Any

from flax import nnx


class Components:
    """Something whose attributes are NNX modules that may be replaced by others."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[nnx.Module, Any]] = {}

    def _split(self, name: str) -> Any:
        """(graphdef, state) of the module that the attribute `name` holds, as `nnx.split` gives them.

        Kept for as long as it is the same module: to walk through one takes as long as a small program runs. The state
        holds the module's own variables, so new values are seen; a module that gets other variables must be assigned.
        """
        module = getattr(self, name)
        found, split = self._found.get(name, (None, None))
        if found is not module:
            split = nnx.split(module)
            self._found[name] = module, split
        return split
