"""Compiles what we train for the slices we would train it on, ahead of time and without them, and prints the table.

    python launch/aot.py --out runs/plans

is the table of docs/how-to/training-on-tpu-pods.md; each line of a file given with --runs is the arguments of one
`clvr plan`:

    python launch/aot.py --out runs/plans --runs my_runs.txt

Each program is compiled by a process of its own, some minutes each on two cores and up to 8 GB of memory. Reports that
exist are not made again, so the same command resumes an interrupted table.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

RUNS = """
configs/flux2_sft.py --preset klein-4b --batch-size 128 --train.mesh.fsdp 128 --train.mesh.sequence 2 --topology v5e-256
configs/flux2_sft.py --preset klein-4b --batch-size 64 --topology v5p-128
configs/flux2_sft.py --preset klein-4b --batch-size 16 --topology v6e-16
configs/flux2_sft.py --preset klein-4b --batch-size 256 --topology v6e-256
configs/flux2_sft.py --preset klein-9b --batch-size 64 --train.mesh.fsdp 64 --train.mesh.sequence 4 --topology v5e-256
configs/flux2_sft.py --preset klein-9b --batch-size 64 --topology v5p-128
configs/flux2_sft.py --preset klein-9b --batch-size 256 --topology v6e-256
configs/qwen3_vl_sft.py --batch-size 256 --topology v5e-256
configs/qwen3_vl_sft.py --batch-size 64 --topology v5p-128
configs/qwen3_vl_sft.py --batch-size 256 --topology v6e-256
configs/flux2_sample.py --preset klein-4b --topology v6e-8
configs/pprl_flux2.py --preset klein-4b --planned rollout --topology v6e-16
configs/pprl_flux2.py --preset klein-4b --planned rollout --topology v5p-32
configs/pprl_flux2.py --preset klein-4b --planned update --topology v6e-16
configs/pprl_flux2.py --preset klein-4b --planned update --topology v5p-32
configs/pprl_flux2.py --preset klein-9b --planned rollout --topology v6e-16
configs/pprl_flux2.py --preset klein-9b --planned rollout --topology v5p-32
configs/pprl_flux2.py --preset klein-9b --planned update --topology v6e-16
configs/pprl_flux2.py --preset klein-9b --planned update --topology v5p-32
configs/pprl_flux2.py --planned reward --topology v6e-16
configs/pprl_flux2.py --planned reward --topology v5p-32
"""
_HEADER = ("recipe and options", "slice", "mesh", "memory of a chip", "sent by a chip", "step", "utilization", "HLO")


def main() -> int:
    """Plans every run, then prints the table; 1 if one of them could not be planned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="Write the reports to this directory.")
    parser.add_argument(
        "--runs",
        type=Path,
        help="Plan the runs of this file, with the arguments of one `clvr plan` in each line; the runs of the table in "
        "docs/how-to/training-on-tpu-pods.md if it is not given.",
    )
    options = parser.parse_args()
    text = options.runs.read_text(encoding="utf-8") if options.runs else RUNS
    options.out.mkdir(parents=True, exist_ok=True)
    rows, failed = [], 0
    for line in filter(None, map(str.strip, text.splitlines())):
        arguments = shlex.split(line)
        report = _planned(arguments, options.out)
        failed += report is None
        rows.append(_row(arguments, report))
    print("\n".join(_markdown(row) for row in (_HEADER, ("---",) * len(_HEADER), *rows)))
    return int(failed > 0)


def _planned(arguments: list[str], directory: Path) -> dict[str, Any] | None:
    """The report of one run, made now if it is not there; None if that fails, which `clvr plan` has then explained."""
    name = re.sub(r"\W+", "_", " ".join(arguments)).strip("_")
    path = directory / f"{name}.json"
    if not path.exists():
        print(f"clvr plan {shlex.join(arguments)}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "clvr_jax.cli", "plan", *arguments, "--out", str(path)]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            return None
    return json.loads(path.read_text(encoding="utf-8"))


def _row(arguments: list[str], report: dict[str, Any] | None) -> tuple[str, ...]:
    given = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    options = [f"{name} {value}" for name, value in given.items() if name != "--topology" and "mesh" not in name]
    name = f"`{Path(arguments[0]).stem}`" + "".join(f" `{option}`" for option in options)
    if report is None:
        return name, given["--topology"], *("-",) * (len(_HEADER) - 2)
    roofline, memory, gib = report["roofline"], report["memory"], 2**30
    least, most = roofline["overlapped"], roofline["serial"]
    share = roofline["mfu"]
    return (
        name,
        given["--topology"],
        " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1),
        f"{memory['total'] / gib:.1f} of {memory['available'] / gib:.1f} GiB",
        f"{sum(report['sent'].values()) / gib:.1f} GiB",
        f"{least:.2f} to {most:.2f} s",
        f"{share:.0%} to {share * least / most:.0%}",
        f"{report['instructions']:,}",
    )


def _markdown(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
