"""Checkpoints of a training run: written by Orbax in the background, and restored onto any mesh."""

import dataclasses
import logging
import re
import shutil
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.buckets import objects
from clvr_jax.files.buckets.paths import absolute, is_bucket
from clvr_jax.files.json_input import JSON
from clvr_jax.trees import dotted, leaves_by_path, some


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Configuration of the checkpoints of a run."""

    save_interval_minutes: float = 10.0
    """Save a checkpoint when so many minutes have passed since the last one, and at the end of the run."""
    max_to_keep: int = 2
    """Keep this many of the newest checkpoints."""

    def __post_init__(self) -> None:
        if self.max_to_keep < 1:
            raise UsageError(f"CheckpointConfig: max_to_keep must be at least 1, got {self.max_to_keep}")


class Checkpoints:
    """The checkpoint directory of one run.

    Args:
      directory: created if it does not exist; it may be in a bucket, where a checkpoint is complete when it holds the
        object `commit_success.txt`, which is written last.
      max_to_keep: number of the newest checkpoints that are kept.
    """

    def __init__(self, directory: Path, max_to_keep: int = 2):
        self._directory = absolute(directory)
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_is_not_from_writing)
        options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, create=True)
        try:
            self._manager = _manager(self._directory, options)
        except OSError as error:
            reason = error.strerror or " ".join(str(error).split())[:200]
            raise ClvrError(f"{directory}: cannot hold checkpoints ({reason}); choose another --out") from error

    def restore(self, abstract: PyTree, *, resume: bool) -> tuple[PyTree, Mapping[str, JSON]] | None:
        """Restores the newest checkpoint if there is one and `resume` is set.

        Args:
          abstract: the state's tree of shapes, dtypes and shardings, whatever mesh it was saved from; or of arrays.
          resume: whether there may be checkpoints.
        Returns: the state, and that of the data iterator, which may be empty; None if there is no checkpoint.
        Raises: UsageError if there are checkpoints and `resume` is not set; ClvrError if one is of another model.
        """
        step = self._manager.latest_step()
        if step is not None and not resume:
            raise _occupied(self._directory, step)
        self._remove_torn()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, abstract)
        wanted = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), input=ocp.args.JsonRestore())
        try:
            found = self._manager.restore(step, args=wanted)
        except Exception as error:
            raise _unreadable(self._directory / str(step), "recipe", error) from error
        return found["state"], found["input"] or {}

    def _remove_torn(self) -> None:
        """Removes checkpoints that a killed run left incomplete; nothing else would ever remove them."""
        if jax.process_index() != 0:
            return
        if is_bucket(self._directory):
            for step in steps_in_bucket(self._directory, is_complete=False):
                objects.delete_directory(self._directory / str(step))
        else:
            for path in self._directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)

    def save(self, step: int, state: PyTree, iterator_state: Mapping[str, JSON]) -> None:
        """Starts to save a state and that of the data iterator; returns when they are copied.

        Raises: ClvrError if this or an earlier checkpoint could not be written; the last complete one is kept.
        """
        both = ocp.args.Composite(state=ocp.args.StandardSave(state), input=ocp.args.JsonSave(dict(iterator_state)))
        try:
            self._manager.save(step, args=both)
        except Exception as error:  # clients of buckets have errors of their own
            raise self._failed(error) from error

    def wait(self) -> None:
        """Returns when all checkpoints are written. Raises: as `save`."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> ClvrError:
        reason = _reason(error)
        newest = self._manager.latest_step()
        left = "no checkpoint is there yet" if newest is None else f"the last complete one is step {newest}"
        return ClvrError(
            f"{self._directory}: a checkpoint cannot be written ({reason}); {left}, --resume continues from it"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failures = []
        for end in (self.wait, self._close):
            try:
                end()
            except ClvrError as failure:  # closing raises what `wait` has raised once more
                failures.append(failure)
        if failures and error is None:
            raise failures[0]

    def _close(self) -> None:
        try:
            self._manager.close()
        except Exception as error:
            raise self._failed(error) from error


def _is_not_from_writing(record: logging.LogRecord) -> bool:
    """Drops the tracebacks that the threads of Orbax log: `Checkpoints` raises each failure as one line."""
    trace = record.exc_info[2] if record.exc_info else None
    return not any("/orbax/" in Path(frame.filename).as_posix() for frame in traceback.extract_tb(trace))


def _reason(error: Exception) -> str:
    """Returns the first line of an error, the second after an address, without addresses and responses of servers."""
    lines = str(error).splitlines() or [type(error).__name__]
    text = " ".join(lines[:2] if "://" in lines[0] else lines[:1])
    return " ".join(re.sub(r"https?://\S+|\[(http_response|tensorstore_spec).*", "", text).split())[:200]


def refuse_occupied(directory: Path, *, resume: bool) -> None:
    """Checks, before anything is built or written, that a run may begin in a directory.

    Args:
      directory: `checkpoints/` of the run.
      resume: whether there may be checkpoints.
    Raises: UsageError if there are checkpoints and `resume` is not set.
    """
    if is_bucket(directory):
        steps = steps_in_bucket(directory)
    else:
        steps = [int(path.name) for path in directory.glob("*") if path.name.isdecimal()] if directory.is_dir() else []
    if steps and not resume:
        raise _occupied(absolute(directory), max(steps))


def steps_in_bucket(directory: Path, *, is_complete: bool = True) -> list[int]:
    """Returns the steps of the checkpoints in a directory of a bucket that are complete, or that are not."""
    found = [name.split("/") for name in objects.names(directory)]
    steps = {int(parts[0]) for parts in found if parts[0].isdecimal()}
    complete = {int(parts[0]) for parts in found if parts[0].isdecimal() and parts[1:] == [objects.COMMIT]}
    return sorted(complete if is_complete else steps - complete)


def _occupied(directory: Path, step: int) -> UsageError:
    return UsageError(f"{directory} already holds step {step}; add --resume to continue it or choose another --out")


def _manager(directory: Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    """Returns Orbax's manager, which reads the metadata of all checkpoints. Raises: ClvrError if it is damaged."""
    try:
        return ocp.CheckpointManager(directory, options=options)
    except OSError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ClvrError(
            f"{directory}: metadata of a checkpoint is damaged ({reason}); remove the checkpoint"
        ) from error


def _unreadable(checkpoint: Path, owner: str, error: Exception) -> ClvrError:
    """Returns the error for a checkpoint of another recipe or model, or a damaged one.

    A damaged file ends in whatever exception the code raises at which Orbax notices it.
    """
    reason = _reason(error)
    problem = "not a checkpoint of this " + owner + ", or damaged"
    if is_bucket(checkpoint):
        problem += ", or the bucket cannot be read"
    return ClvrError(f"{checkpoint}: {problem} ({reason})")


def restore_part(directory: Path, part: str, abstract: PyTree) -> tuple[PyTree, int]:
    """Reads one part of the newest checkpoint of a run, such as "params" or "ema", without the others.

    Args:
      directory: `checkpoints/` of the run.
      part: a field of the saved state.
      abstract: its tree of shapes, dtypes and shardings.
    Returns: the tree, and the step of the checkpoint.
    Raises: ClvrError if there is no checkpoint, or it is of another model.
    """
    with _manager(absolute(directory), ocp.CheckpointManagerOptions(create=False)) as manager:
        step = manager.latest_step()
        if step is None:
            raise ClvrError(f"{directory}: holds no checkpoint")
        shardings = ocp.checkpoint_utils.construct_restore_args({part: abstract})
        wanted = ocp.args.PyTreeRestore({part: abstract}, restore_args=shardings, partial_restore=True)
        try:
            found = manager.restore(step, args=ocp.args.Composite(state=wanted))
        except Exception as error:
            raise _unreadable(directory / str(step), "model", error) from error
        # Where the checkpoint has nothing, Orbax returns what was asked for.
        leaves = leaves_by_path(found["state"][part])
        if absent := [dotted(at) for at, leaf in leaves.items() if not isinstance(leaf, jax.Array)]:
            raise ClvrError(f"{directory}/{step}: not a checkpoint of this model (it lacks {some(absent)})")
        return found["state"][part], step
