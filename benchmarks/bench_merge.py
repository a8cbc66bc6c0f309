"""DSWM of three checkpoints with the names and shapes of FLUX.2 klein 4B (7.2 GiB each) beside `cat` and `cp`.

python benchmarks/bench_merge.py --folder /tmp     needs 40 GB of room there

What it is measured against reads the three and writes one: cat three > /dev/null && cp one. Each command runs in a
process of its own, whose peak resident memory the system reports. `--blocks 1` is a small trial.

With `--mergekit`, mergekit's task arithmetic on the same bytes takes part (50 GB of room); the checkpoints are then one
file each, since mergekit-pytorch reads no shards. Its environment, with this one's PyTorch:

    python -m venv --without-pip /tmp/mergekit
    python -c "import site; print(site.getsitepackages()[0])" > /tmp/mergekit/lib/python3.11/site-packages/outer.pth
    pip --python /tmp/mergekit/bin/python install --no-deps mergekit==0.1.5 immutables
    python benchmarks/bench_merge.py --folder /tmp --mergekit /tmp/mergekit/bin/mergekit-pytorch
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from checkpoints import klein_4b, make_checkpoint, timed

from clvr_jax.checkpoint_io.tensors import SHARD_BYTES, read_header

ALLOWED_GIB = 1.5
TARGET = 0.5
ROLES = ("base", "distill", "align")


def main() -> None:
    """Makes the checkpoints, then in turns merges them, by one or two programs, and reads and copies them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=None, help="where there is room; a temporary one if not given")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=None, help="blocks of each kind; all of the 4B if not given")
    parser.add_argument("--mergekit", type=Path, default=None, help="the program mergekit-pytorch")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir=options.folder))
    shard = SHARD_BYTES if options.mergekit is None else 2**40
    try:
        paths = {role: root / role for role in ROLES}
        for seed, (role, path) in enumerate(paths.items()):
            specs = make_checkpoint(path, klein_4b(options.blocks), None if role == "base" else seed, shard)
        size, largest = sum(spec.nbytes for spec in specs) / 2**30, max(spec.nbytes for spec in specs) / 2**30
        print(f"merge: 3 x {len(specs)} tensors, {size:.1f} GiB, the largest {largest:.2f} GiB", flush=True)
        copy, merged, other = root / "copy", root / "merged", root / "mergekit"
        files = " ".join(str(path / "*.safetensors") for path in paths.values())
        reading = ["sh", "-c", f"cat {files} > /dev/null && cp -r {paths['base']} {copy}"]
        inputs = [word for role, path in paths.items() for word in (f"--{role}", str(path))]
        merging = [sys.executable, "-m", "clvr_jax.cli", "merge", *inputs, "--out", str(merged)]
        runs = {"merge": (merging, merged), "cat and cp": (reading, copy)}
        if options.mergekit is not None:
            runs["mergekit"] = ([str(options.mergekit), "--quiet", str(_settings(root, paths)), str(other)], other)
        rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for _ in range(options.rounds):
            for name, (command, made) in runs.items():
                rounds[name].append(_with_room(command, made, keep=options.mergekit is not None and made != copy))
        seconds = {name: statistics.median(column[0] for column in own) for name, own in rounds.items()}
        peaks = {name: max(column[1] for column in own) for name, own in rounds.items()}
        ratios = _ratios(rounds, "cat and cp")
        print(
            f"merge {seconds['merge']:.1f} s, cat and cp {seconds['cat and cp']:.1f} s, "
            f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), target {TARGET}; "
            f"peak {peaks['merge']:.2f} GiB, allowed {ALLOWED_GIB + 4 * largest:.2f}"
        )
        if options.mergekit is not None:
            ratios = _ratios(rounds, "mergekit")
            print(
                f"mergekit {seconds['mergekit']:.1f} s, ratio {statistics.median(ratios):.2f} "
                f"({ratios[0]:.2f} to {ratios[-1]:.2f}), target 1.0; peak {peaks['mergekit']:.2f} GiB; "
                f"{_differing(merged, other):.1e} of the numbers differ"
            )
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _settings(root: Path, paths: dict[str, Path]) -> Path:
    """What mergekit is to do: the same sum, in float32, of files in bfloat16."""
    files = {role: str(next(path.glob("*.safetensors"))) for role, path in paths.items()}
    tuned = [{"model": files[role], "parameters": {"weight": 1.0}} for role in ROLES[1:]]
    settings = {"merge_method": "task_arithmetic", "base_model": files["base"], "models": tuned}
    path = root / "mergekit.yaml"
    path.write_text(json.dumps({**settings, "dtype": "float32", "out_dtype": "bfloat16"}))  # JSON is YAML
    return path


def _with_room(command: list[str], made: Path, keep: bool) -> tuple[float, float]:
    """Time and memory of a command. What it made before is removed, and what waits to be written is, before it runs."""
    shutil.rmtree(made, ignore_errors=True)
    os.sync()
    found = timed(command)
    if not keep:
        shutil.rmtree(made)
    return found


def _ratios(rounds: dict[str, list[tuple[float, float]]], name: str) -> list[float]:
    """Times of one beside those of the merge in the same round, rising: above 1 the merge is faster."""
    return sorted(other[0] / merge[0] for merge, other in zip(rounds["merge"], rounds[name], strict=True))


def _differing(one: Path, other: Path) -> float:
    """Share of numbers that two folders of the same tensors do not agree in; those that are as good as 0 left out.

    Of the random exponents here, 6 % are so small that differences are denormal, which XLA takes for 0 on a CPU.
    """
    found = [
        {stored.key: stored for file in folder.glob("*.safetensors") for stored in read_header(file)}
        for folder in (one, other)
    ]
    if found[0].keys() != found[1].keys():
        raise SystemExit(f"{one} and {other} hold different tensors")
    differing = 0
    for key, stored in found[0].items():
        ours, theirs = (each.open().astype(np.float32) for each in (stored, found[1][key]))
        differing += np.count_nonzero((ours != theirs) & (np.maximum(abs(ours), abs(theirs)) > 1e-30))
    return differing / sum(stored.nbytes // 2 for stored in found[0].values())


if __name__ == "__main__":
    main()
