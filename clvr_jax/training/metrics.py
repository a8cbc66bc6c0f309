"""Metrics of a run: one JSON object a line, TensorBoard events, Weights & Biases if asked for; and how fast it goes."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
from tensorboardX import SummaryWriter

from clvr_jax.costs.hardware import CHIPS
from clvr_jax.errors import ClvrError
from clvr_jax.files import write_atomically
from clvr_jax.json_input import parse_object, stream_lines
from clvr_jax.sharding import MeshLayout


class MetricLog:
    """Appends to `metrics.jsonl` and TensorBoard events in `folder`; a resumed run drops the steps it will redo.

    Only process 0 writes.

    Args:
      folder: of the run.
      start: step that it begins or goes on at.
      wandb: project of Weights & Biases, "" for none; needs the package of that name.
      name, config: of the run, for Weights & Biases.
    """

    def __init__(
        self, folder: Path, start: int, wandb: str = "", name: str = "", config: Mapping[str, Any] | None = None
    ):
        self._is_writer = jax.process_index() == 0
        self._wandb = _wandb_run(wandb, name, folder, config or {}) if wandb and self._is_writer else None
        if not self._is_writer:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        write_atomically(path, b"".join(line + b"\n" for line in _lines_up_to(start, path)))
        self._file = path.open("a")
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=start, flush_secs=30)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Records the metrics of one step."""
        if not self._is_writer:
            return
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)

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


def _lines_up_to(start: int, path: Path) -> Iterator[bytes]:
    """The lines of earlier steps, none if there is no file."""
    for where, line in stream_lines(path) if path.exists() else ():
        try:
            is_kept = parse_object(line, where).integer("step") <= start
        except ClvrError:
            continue  # the torn last line of a killed run
        if is_kept:
            yield line


def _wandb_run(project: str, name: str, folder: Path, config: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ClvrError("logging to Weights & Biases needs its package: pip install wandb") from error
    return wandb.init(project=project, name=name, dir=str(folder), config=dict(config), resume="allow")


class Throughput:
    """How fast steps go between two readings.

    Args:
      flops: batch -> model FLOPs of its step; None: not known.
      tokens: batch -> its tokens.
      layout: the devices that share the work.
    """

    def __init__(
        self, flops: Callable[[Any], float] | None, tokens: Callable[[Any], int] | None, layout: MeshLayout
    ) -> None:
        self._flops_of, self._tokens_of = flops, tokens
        self._peak = peak_flops(layout)
        self._begin()

    def add(self, batch: Any) -> None:
        """Counts a batch."""
        self._steps += 1
        self._flops += self._flops_of(batch) if self._flops_of else 0.0
        self._tokens += self._tokens_of(batch) if self._tokens_of else 0

    def read(self) -> dict[str, float]:
        """seconds_per_step, and where known tokens_per_second and model_flop_utilization, since the last reading."""
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


# What JAX calls the chips of `costs.hardware`.
_CHIPS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "NVIDIA H100 80GB HBM3": "h100"}


def peak_flops(layout: MeshLayout) -> float | None:
    """bfloat16 FLOP/s of all devices together by their data sheets, None for devices that have none here."""
    chip = _CHIPS.get(layout.mesh.devices.flat[0].device_kind)
    return None if chip is None else CHIPS[chip].peak_flops * layout.mesh.size
