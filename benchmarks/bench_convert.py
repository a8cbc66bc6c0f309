"""Conversion of a checkpoint with the names and shapes of FLUX.2 klein 4B (7.2 GiB) beside `cp`, and its memory.

python benchmarks/bench_convert.py --folder /tmp     needs 32 GB of room there

Each command runs in a process of its own, whose peak resident memory the system reports.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from checkpoints import klein_4b, make_checkpoint, timed

ALLOWED_GIB = 1.5
TARGET = 0.6


def main() -> None:
    """Makes the checkpoint, then in turns copies it and converts it there and back; compares the bytes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=None, help="where there is room; a temporary one if not given")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        source, there, back, copy = (root / name for name in ("source", "jax", "torch", "copy"))
        specs = make_checkpoint(source, klein_4b())
        size, largest = sum(spec.nbytes for spec in specs) / 2**30, max(spec.nbytes for spec in specs) / 2**30
        print(f"conversion: {len(specs)} tensors, {size:.1f} GiB, the largest {largest:.2f} GiB", flush=True)
        clvr = [sys.executable, "-m", "clvr_jax.cli", "convert"]
        directions = {
            "torch to jax": ([*clvr, str(source), str(there), "--to", "jax"], source),
            "jax to torch": ([*clvr, str(there), str(back), "--to", "torch"], there),
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in directions}
        peaks = dict.fromkeys(directions, 0.0)
        for _ in range(options.rounds):
            for folder in (there, back):
                shutil.rmtree(folder, ignore_errors=True)
            for name, (command, copied) in directions.items():
                copying, _ = timed(["cp", "-r", str(copied), str(copy)])
                shutil.rmtree(copy)
                converting, peak = timed(command)
                times[name].append((converting, copying))
                peaks[name] = max(peaks[name], peak)
        for name, rounds in times.items():
            converting, copying = (statistics.median(column) for column in zip(*rounds, strict=True))
            ratios = sorted(copy / convert for convert, copy in rounds)
            print(
                f"{name}: {converting:.1f} s, cp {copying:.1f} s, ratio {statistics.median(ratios):.2f} "
                f"({ratios[0]:.2f} to {ratios[-1]:.2f}), target {TARGET}; "
                f"peak {peaks[name]:.2f} GiB, allowed {ALLOWED_GIB + 2 * largest:.2f}"
            )
        names = sorted(path.name for path in source.iterdir())
        same = all(subprocess.run(["cmp", "-s", source / name, back / name]).returncode == 0 for name in names)
        print(f"the files returned are {'the same, byte for byte' if same else 'NOT THE SAME'}")
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
