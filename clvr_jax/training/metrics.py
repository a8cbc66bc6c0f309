"""Metrics of a run, as lines of JSON, TensorBoard events and in Weights & Biases; and its throughput."""

import errno
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import jax

from clvr_jax.cost_model.hardware import CHIPS
from clvr_jax.errors import ClvrError
from clvr_jax.files.atomic_io import write_atomically
from clvr_jax.files.file_names import has_entry
from clvr_jax.files.json_input import JSON, parse_object, stream_lines
from clvr_jax.sharding import MeshLayout
from clvr_jax.trees import Batch

if TYPE_CHECKING:
    import wandb
    from tensorboardX import SummaryWriter

METRICS = "metrics.jsonl"


class MetricLog:
    """Appends to `metrics.jsonl` and TensorBoard events in `directory`; a resumed run drops the steps it will redo.

    Only process 0 writes.

    Args:
      directory: of the run.
      start: step that it begins or resumes at.
      wandb: project of Weights & Biases, "" for none; needs the package of that name.
      name, config: of the run, for Weights & Biases.
    """

    def __init__(
        self, directory: Path, start: int, wandb: str = "", name: str = "", config: Mapping[str, JSON] | None = None
    ):
        self._is_writer = jax.process_index() == 0
        self._wandb = _wandb_run(wandb, name, directory, config or {}) if wandb and self._is_writer else None
        if not self._is_writer:
            return
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / METRICS
        write_atomically(path, b"".join(line + b"\n" for line in _lines_up_to(start, path)))
        self._file = path.open("ab", buffering=0)  # a buffer that cannot be written would fail again when closed
        self._events = _summary_writer(directory / "tensorboard", start)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Records the metrics of one step."""
        if not self._is_writer:
            return
        line = json.dumps({"step": step, **metrics}).encode() + b"\n"
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise ClvrError(f"{self._file.name}: cannot be written ({error.strerror or error})") from error
        self.write_events(step, metrics)

    def write_events(self, step: int, values: Mapping[str, float]) -> None:
        """Records values that have a file of their own as TensorBoard events and in Weights & Biases."""
        if not self._is_writer:
            return
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_writer:
            self._file.close()
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()


def _summary_writer(directory: Path, start: int) -> "SummaryWriter":
    """Returns a writer of TensorBoard events.

    tensorboardX imports PyTorch and Google's client where they are installed, which takes more than 2 CPU seconds. The
    one serves annotations, the other events that are written to a bucket without a file; neither is used here.
    """
    hidden = {"torch", "google.cloud.storage"} - sys.modules.keys()
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # importing it raises ImportError, as if not installed
    try:
        from tensorboardX import SummaryWriter
    finally:
        for name in hidden:
            del sys.modules[name]
    return SummaryWriter(str(directory), purge_step=start, flush_secs=30)


def _lines_up_to(start: int, path: Path) -> Iterator[bytes]:
    """Yields the lines of earlier steps, none if there is no file."""
    for where, line in stream_lines(path) if has_entry(path) else ():
        try:
            is_kept = parse_object(line, where).integer("step") <= start
        except ClvrError:
            continue  # the torn last line of a killed run
        if is_kept:
            yield line


def _wandb_run(project: str, name: str, directory: Path, config: Mapping[str, JSON]) -> "wandb.Run":
    try:
        import wandb
    except ImportError as error:
        raise ClvrError("logging to Weights & Biases needs its package: pip install wandb") from error
    return wandb.init(project=project, name=name, dir=str(directory), config=dict(config), resume="allow")


class Throughput:
    """The throughput of the steps between two readings.

    Args:
      flops: batch -> model FLOPs of its step; None: not known.
      tokens: batch -> its number of tokens; None: not known.
      layout: of the devices that share the work.
    """

    def __init__(
        self, flops: Callable[[Batch], float] | None, tokens: Callable[[Batch], int] | None, layout: MeshLayout
    ) -> None:
        self._flops_of, self._tokens_of = flops, tokens
        self._peak = peak_flops(layout)
        self._begin()

    def add(self, batch: Batch) -> None:
        """Counts a batch."""
        self._steps += 1
        self._flops += self._flops_of(batch) if self._flops_of else 0.0
        self._tokens += self._tokens_of(batch) if self._tokens_of else 0

    def read(self) -> dict[str, float]:
        """Returns seconds_per_step since the last reading; where known tokens_per_second and model_flop_utilization."""
        seconds = time.monotonic() - self._since
        found = {"seconds_per_step": seconds / self._steps}
        if self._tokens_of:
            found["tokens_per_second"] = self._tokens / seconds
        if self._flops_of and self._peak:
            found["model_flop_utilization"] = self._flops / seconds / self._peak
        self._begin()
        return found

    def _begin(self) -> None:
        self._steps, self._flops, self._tokens, self._since = 0, 0.0, 0, time.monotonic()


# JAX's name of a chip -> its name in `cost_model.hardware`.
_CHIPS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "NVIDIA H100 80GB HBM3": "h100"}


def peak_flops(layout: MeshLayout) -> float | None:
    """Returns the bfloat16 FLOP/s of all devices together by their data sheets; None if the data sheet is not known."""
    chip = _CHIPS.get(layout.mesh.devices.flat[0].device_kind)
    return None if chip is None else CHIPS[chip].peak_flops * layout.mesh.size
