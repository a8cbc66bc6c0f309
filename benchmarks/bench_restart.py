"""Seconds from the start of a resumed run to the end of its first step, beside those that reading the checkpoint takes.

python benchmarks/bench_restart.py
python benchmarks/bench_restart.py --size 5 --repetitions 5

Trains a random FLUX.2 transformer of `bench_plan.py` for two steps on one CPU device, and resumes it for one step at a
time, in turns: with the programs in the directory of the run and all caches of the machine empty, as on a new host, and
without stored programs. The seconds are those of `goodput.jsonl`. Run it on a quiet machine.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TARGET_RATIO = 1.3
_PARTS = ("start", "restore", "compile", "input", "step")


def main() -> None:
    """Prints the seconds of both ways, and their ratio to reading the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4, help="number of the size in bench_plan.py, from 0 to 5")
    parser.add_argument("--repetitions", type=int, default=3, help="resumed starts of each way")
    parser.add_argument(
        "--train", nargs=2, metavar=("OUT", "STEPS"), help="train up to this step, in a process of its own"
    )
    options = parser.parse_args()
    if options.train:
        train(options.size, Path(options.train[0]), int(options.train[1]))
        return
    with tempfile.TemporaryDirectory() as directory:
        compare(options.size, options.repetitions, Path(directory))


def train(size: int, out: Path, steps: int) -> None:
    """Trains, or resumes, up to a step."""
    from bench_plan import SIZES, Config, task

    from clvr_jax.commands.common import prepare_jax
    from clvr_jax.training.checkpoint import CheckpointConfig
    from clvr_jax.training.monitoring.clock import Goodput, process_began
    from clvr_jax.training.trainer import fit

    prepare_jax()
    config = Config(*SIZES[size])
    long = dataclasses.replace(config.train, log_every=1, checkpoint=CheckpointConfig(save_interval_minutes=1000.0))
    with Goodput(process_began()):
        fit(task(config), long, out, resume=True, stop_after=steps)


def compare(size: int, repetitions: int, directory: Path) -> None:
    """Runs both ways in turns and prints their medians."""
    out, number = directory / "run", 2
    started(size, out, number, directory / "first", "")
    found: dict[str, list[dict[str, float]]] = {"stored programs": [], "without": []}
    for repetition in range(repetitions):
        for name, rows in found.items():
            number += 1
            programs = "off" if name == "without" else ""
            rows.append(started(size, out, number, directory / f"{name}{repetition}", programs))
    checkpoint = sum(path.stat().st_size for path in (out / "checkpoints" / str(number)).rglob("*") if path.is_file())
    print(f"checkpoint of {checkpoint / 2**20:.0f} MiB")
    for name, rows in found.items():
        parts = {part: statistics.median(row.get(part, 0.0) for row in rows) for part in _PARTS}
        total = statistics.median(sum(row.values()) for row in rows)
        after = statistics.median((sum(row.values()) - row["start"]) / row["restore"] for row in rows)
        print(
            f"{name:<16} first step after {total:6.2f} s: "
            + ", ".join(f"{part} {seconds:.2f}" for part, seconds in parts.items())
            + f"; without start over restore {after:.2f}, target {TARGET_RATIO:g}: "
            + ("reached" if after <= TARGET_RATIO else "not reached"),
            flush=True,
        )


def started(size: int, out: Path, steps: int, caches: Path, programs: str) -> dict[str, float]:
    """Runs one start with empty caches of the machine; returns its seconds up to the end of its first step."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(caches), "CLVR_PROGRAMS": programs}
    command = [sys.executable, __file__, "--size", str(size), "--train", str(out), str(steps)]
    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)  # noqa: S603 - this file's own
    rows: list[dict[str, Any]] = [json.loads(line) for line in (out / "goodput.jsonl").read_text().splitlines()]
    begin = max(index for index, row in enumerate(rows) if row.get("event") == "start")
    seconds: dict[str, float] = rows[begin + 1]["seconds"]
    return seconds


if __name__ == "__main__":
    main()
