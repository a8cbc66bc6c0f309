"""Checkpoints of a training run: Orbax, the newest two kept, written in the background."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from clvr_jax.errors import ClvrError, UsageError


class Checkpoints:
    """The checkpoint folder of one run."""

    def __init__(self, folder: Path):
        self._folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        try:
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        except OSError as error:
            raise ClvrError(f"{folder}: cannot hold checkpoints ({error.strerror}); choose another --out") from error

    def restore_or(self, state: Any, *, resume: bool) -> Any:
        """The newest checkpoint if there is one and `resume` is set, else `state`.

        Raises: UsageError if there are checkpoints and `resume` is not set; ClvrError if one is of another model.
        """
        step = self._manager.latest_step()
        if step is None:
            return state
        if not resume:
            raise UsageError(
                f"{self._folder} already holds step {step}; add --resume to continue it or choose another --out"
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except (ValueError, KeyError) as error:
            reason = str(error).splitlines()[0][:200]
            raise ClvrError(f"{self._folder}/{step}: not a checkpoint of this recipe ({reason})") from error

    def save(self, step: int, state: Any) -> None:
        """Starts saving; returns as soon as the state is copied."""
        self._manager.save(step, args=ocp.args.StandardSave(state))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.wait_until_finished()
        self._manager.close()
