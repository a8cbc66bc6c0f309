"""Metrics of a run: one JSON object a line, and TensorBoard events."""

import json
from pathlib import Path
from types import TracebackType
from typing import Self

from tensorboardX import SummaryWriter


class MetricLog:
    """Appends to `metrics.jsonl` and TensorBoard events in `folder`; a resumed run drops the steps it will redo."""

    def __init__(self, folder: Path, start: int):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    kept += [line] if json.loads(line)["step"] <= start else []
                except (ValueError, KeyError):
                    continue  # the torn last line of a killed run
        path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a")
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=start, flush_secs=30)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Records the metrics of one step."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._events.close()
