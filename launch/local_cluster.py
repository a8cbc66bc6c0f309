"""Rehearses a pod on one machine: N processes of M virtual devices each, joined over loopback.

    python launch/local_cluster.py --processes 2 --devices 4 configs/shapes_vae.py --out runs/try --train.steps 20

runs the same `launch/train.py` that a pod runs; `generate` or `sample` as the first argument generates images. What
process 0 prints is shown, what the others print goes to logs in a temporary directory, which is named if one fails.
Ctrl-C and SIGTERM reach all of them; the exit code is then that of `launch/train.py`: 130 after Ctrl-C, 143 after
SIGTERM.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from clvr_jax.training.distributed import virtual_devices

_TRAIN = Path(__file__).with_name("train.py")
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # of a process that was asked to stop


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(processes: int, devices: int, arguments: list[str], logs: Path) -> list[subprocess.Popen[Any]]:
    """Starts all processes; `logs`/process-K.log takes what process K > 0 prints."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **virtual_devices(devices)}
    coordinator = f"127.0.0.1:{free_port()}"
    started = []
    for number in range(processes):
        who = ["--coordinator", coordinator, "--processes", str(processes), "--process", str(number)]
        output = None if number == 0 else (logs / f"process-{number}.log").open("w")
        command = [sys.executable, str(_TRAIN), *who, *arguments]
        started.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True))
    return started


def main() -> int:
    """Starts the processes and waits; the first that fails decides the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="Start this many processes; the default is 2.")
    parser.add_argument("--devices", type=int, default=4, help="Virtual devices of each process; the default is 4.")
    options, rest = parser.parse_known_args()
    logs = Path(tempfile.mkdtemp(prefix="clvr-cluster-"))
    started = start(options.processes, options.devices, rest, logs)

    def forward(number: int, frame: Any) -> None:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    while any(process.poll() is None for process in started):
        time.sleep(0.2)
    codes = [process.returncode for process in started]
    if failed := [number for number, code in enumerate(codes) if code not in (0, *_STOPPED)]:
        print(f"clvr: process {failed[0]} of {len(codes)} failed; logs are in {logs}", file=sys.stderr)
    else:
        shutil.rmtree(logs)
    failures = [codes[number] for number in failed] or [code for code in codes if code]
    return next((code if code > 0 else 1 for code in failures), 0)


if __name__ == "__main__":
    sys.exit(main())
