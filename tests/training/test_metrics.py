"""Metrics are TensorBoard events as well as lines of JSON, and PyTorch is not needed to write them."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.training.metrics import MetricLog

WRITE = """if True:
    import sys
    from pathlib import Path
    from clvr_jax.training.metrics import MetricLog
    with MetricLog(Path(sys.argv[1]), 0) as log:
        log.write(3, {"loss": 0.5, "lr": 0.25})
    assert "torch" not in sys.modules, "PyTorch was imported"
"""


def records(file):
    """Yields the records of a TFRecord file: length, checksum, content, checksum."""
    content, at = file.read_bytes(), 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        yield content[at + 12 : at + 12 + length]
        at += 16 + length


@pytest.mark.slow
def test_metrics_are_written_twice_and_pytorch_is_not_imported(tmp_path):
    """Importing PyTorch would double the time that a run takes to start."""
    subprocess.run([sys.executable, "-c", WRITE, str(tmp_path)], check=True, timeout=100)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 3, "loss": 0.5, "lr": 0.25}
    from tensorboardX.proto.event_pb2 import Event

    (file,) = (tmp_path / "tensorboard").iterdir()
    events = [Event.FromString(record) for record in records(file)]
    found = {(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value}
    assert found == {(3, "loss", 0.5), (3, "lr", 0.25)}


def test_a_full_disk_is_one_line(tmp_path):
    with (
        pytest.raises(ClvrError, match=r"/dev/full: cannot be written \(No space left on device\)"),
        MetricLog(tmp_path, 0) as log,
        log._file,
        Path("/dev/full").open("wb", buffering=0) as log._file,
    ):
        log.write(1, {"loss": 0.5})
