"""DSWM of three checkpoints with the names and shapes of FLUX.2 klein 4B (7.2 GiB each) beside `cat` and `cp`.

python benchmarks/bench_merge.py --folder /tmp     needs 40 GB of room there

What it is measured against reads the three and writes one: cat three > /dev/null && cp one. Each command runs in a
process of its own, whose peak resident memory the system reports. `--blocks 2` is a small trial.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from checkpoints import klein_4b, make_checkpoint, timed

ALLOWED_GIB = 1.5
TARGET = 0.5
ROLES = ("base", "distill", "align")


def main() -> None:
    """Makes the checkpoints, then in turns reads and copies them and merges them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=None, help="where there is room; a temporary one if not given")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=None, help="blocks of each kind; all of the 4B if not given")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        paths = {role: root / role for role in ROLES}
        for seed, (role, path) in enumerate(paths.items()):
            specs = make_checkpoint(path, klein_4b(options.blocks), tuned=None if role == "base" else seed)
        size, largest = sum(spec.nbytes for spec in specs) / 2**30, max(spec.nbytes for spec in specs) / 2**30
        print(f"merge: 3 x {len(specs)} tensors, {size:.1f} GiB, the largest {largest:.2f} GiB", flush=True)
        copy, merged = root / "copy", root / "merged"
        files = " ".join(str(path / "*.safetensors") for path in paths.values())
        reading = ["sh", "-c", f"cat {files} > /dev/null && cp -r {paths['base']} {copy}"]
        inputs = [word for role, path in paths.items() for word in (f"--{role}", str(path))]
        merging = [sys.executable, "-m", "clvr_jax.cli", "merge", *inputs, "--out", str(merged)]
        rounds, peak = [], 0.0
        for _ in range(options.rounds):
            seconds, own_peak = _with_room(merging, merged)
            rounds.append((seconds, _with_room(reading, copy)[0]))
            peak = max(peak, own_peak)
        ours, theirs = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratios = sorted(reading / merging for merging, reading in rounds)
        print(
            f"merge {ours:.1f} s, cat and cp {theirs:.1f} s, ratio {statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f}), target {TARGET}; "
            f"peak {peak:.2f} GiB, allowed {ALLOWED_GIB + 4 * largest:.2f}"
        )
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _with_room(command: list[str], made: Path) -> tuple[float, float]:
    """Time and memory of a command; what it made is removed, and what waits to be written is, before the next one."""
    shutil.rmtree(made, ignore_errors=True)
    os.sync()
    found = timed(command)
    shutil.rmtree(made)
    return found


if __name__ == "__main__":
    main()
