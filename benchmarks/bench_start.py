"""Seconds from the start of a command to its first image: with no cache, with JAX's cache, and with stored programs.

python benchmarks/bench_start.py
python benchmarks/bench_start.py --model DIR --dtype bfloat16 --sizes 1024 --text-tokens 512

The first line is `make demo` up to its first image, by the clock and by the seconds of all cores. The three ways take
turns, so that their ratios are of one run. With --model, the time until the model is ready, its weights and its
programs loaded, is compared with the time to read the same tensors into fresh memory: `clvr warm` does just that if all
programs exist. Both are processes of their own that take turns; the time of the first has the start of the process in
it, that of the second has not. Run it on a quiet machine. A random model of the size of klein 4B, 13 GiB in a directory
that needs 20 GB of disk, is made by

python benchmarks/bench_full_size.py --directory /tmp --steps make --keep

as /tmp/clvr-full-size/klein.
"""

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

PROMPT = (
    "a red star at the top left, a blue circle at the top, an orange star in the center, a green square at the left, "
    "a yellow triangle at the bottom left, and a purple cross at the bottom right"
)
CLVR = (sys.executable, "-m", "clvr_jax.cli")
TARGET_SECONDS, TARGET_RATIO = 3.0, 1.2


def main() -> None:
    """Prints the seconds of the three ways and their ratios, or those of a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5, help="of the ways that do not compile")
    parser.add_argument("--model", help="shipped name or directory, whose time to be ready is measured instead")
    parser.add_argument("--sizes", nargs="+", default=[], help="of `clvr warm`")
    parser.add_argument("--references", default="0", help="of `clvr warm`")
    parser.add_argument("--text-tokens", nargs="+", default=[], help="of `clvr warm`")
    parser.add_argument("--dtype", help="of `clvr warm`")
    parser.add_argument("--read", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        print(json.dumps(read(options.read)))
        return
    given = {"--references": [options.references], "--sizes": options.sizes, "--text-tokens": options.text_tokens}
    given["--dtype"] = [options.dtype] if options.dtype else []
    with tempfile.TemporaryDirectory() as directory:
        if options.model:
            words = [word for name, values in given.items() if values for word in (name, *values)]
            ready(options.model, words, Path(directory), options.repetitions)
        else:
            first_images(Path(directory), options.repetitions)


def first_images(directory: Path, repetitions: int) -> None:
    """Prints the times to the first image."""
    ways = {
        "JAX's cache": variables(directory / "xla", "off"),
        "stored programs": variables(directory / "xla", str(directory / "programs")),
    }
    empty = [first_image(own, directory) for own in ways.values()]  # fills both
    print(f"{'no cache':<16} {empty[0][0]:6.2f} s, {empty[0][1]:6.2f} s of all cores", flush=True)
    first_image(ways["stored programs"], directory)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repetitions):
        for name, own in ways.items():
            found[name].append(first_image(own, directory))
    for name, own in found.items():
        clock, cores = (statistics.median(values) for values in zip(*own, strict=True))
        low, high = min(own)[0], max(own)[0]
        print(f"{name:<16} {clock:6.2f} s ({low:.2f} to {high:.2f}), {cores:6.2f} s of all cores", flush=True)
    ratios = sorted(new[0] / old[0] for old, new in zip(*found.values(), strict=True))
    median = statistics.median(each for each, _ in found["stored programs"])
    print(
        f"stored programs over JAX's cache {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); "
        f"target {TARGET_SECONDS:g} s: {'reached' if median <= TARGET_SECONDS else 'not reached'}"
    )


def first_image(environment: dict[str, str], directory: Path) -> tuple[float, float]:
    """Runs the loop; returns the seconds to its first image, by the clock and of all cores to the end of one step."""
    command = [*CLVR, "generate", PROMPT, "--model", "shapes-tiny", "--max-steps", "1", "--out", str(directory / "out")]
    before, began = cpu_seconds(), time.perf_counter()
    with subprocess.Popen(  # noqa: S603 - this file's own command
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as run:
        assert run.stderr is not None
        clock = next((time.perf_counter() - began for line in run.stderr if line.startswith("step 0")), None)
        run.stderr.read()
    if run.returncode or clock is None:
        raise SystemExit(f"{' '.join(command)}: exit code {run.returncode}")
    return clock, cpu_seconds() - before


def ready(model: str, options: list[str], directory: Path, repetitions: int) -> None:
    """Prints the time until a model is ready, with these options of `clvr warm`, and the time to read its tensors."""
    environment = variables(directory / "xla", str(directory / "programs"))
    command = [*CLVR, "warm", model, *options]
    run = functools.partial(subprocess.run, command, env=environment, check=True, stdout=subprocess.DEVNULL)
    began = time.perf_counter()
    run()
    print(f"{' '.join(command[1:])}: {time.perf_counter() - began:.1f} s with compilation", flush=True)
    times: list[tuple[float, float]] = []
    for _ in range(repetitions):
        reading = subprocess.run(  # noqa: S603 - this file
            [sys.executable, __file__, "--read", model], env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
        found = json.loads(reading.stdout.splitlines()[-1])
        began = time.perf_counter()
        run(stderr=subprocess.DEVNULL)
        times.append((found["seconds"], time.perf_counter() - began))
        print(f"  read in {times[-1][0]:.2f} s, ready after {times[-1][1]:.2f} s", flush=True)
    before, after = (statistics.median(values) for values in zip(*times, strict=True))
    ratios = sorted(own / reading for reading, own in times)
    ratio = statistics.median(ratios)
    print(
        f"{model}: {found['gib']:.2f} GiB are read in {before:.2f} s, the model is ready after {after:.2f} s; ratio "
        f"{ratio:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), target {TARGET_RATIO:g}: "
        f"{'reached' if ratio <= TARGET_RATIO else 'not reached'}"
    )


def read(model: str) -> dict[str, float]:
    """Reads the tensors that a FLUX.2 pipeline loads into fresh memory; returns seconds and GiB."""
    from clvr_jax.checkpoint_io.tensors import stored_tensors
    from clvr_jax.convert.architectures import qwen3_hidden_states
    from clvr_jax.files.atomic_io import read_json
    from clvr_jax.pipelines.registry import resolve
    from clvr_jax.pipelines.working_memory import flux2_settings

    path, transformer = resolve(model)
    tensors = [tensor for part in (transformer, "vae") for tensor in stored_tensors(path / part).values()]
    encoder = qwen3_hidden_states(flux2_settings(path, transformer).text_encoder_out_layers)
    config = encoder.config_from_dict(read_json(path / "text_encoder" / "config.json"))
    tensors += encoder.canonicalize_keys(stored_tensors(path / "text_encoder"), config).values()
    held = []
    began = time.perf_counter()
    for tensor in tensors:
        memory = np.empty(tensor.nbytes, np.uint8)
        view, done = memoryview(memory), 0
        with tensor.file.open("rb", buffering=0) as file:
            file.seek(tensor.offset)
            while done < tensor.nbytes:
                done += file.readinto(view[done:])
        held.append(memory)
    return {"seconds": time.perf_counter() - began, "gib": sum(tensor.nbytes for tensor in tensors) / 2**30}


def variables(cache: Path, programs: str) -> dict[str, str]:
    """Returns the environment of a command with its caches in given directories."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "CLVR_"))}
    own.pop("PYTHONDONTWRITEBYTECODE", None)  # each start would compile all modules
    own["PYTHONPYCACHEPREFIX"] = str(cache.with_name("bytecode"))
    platform = {"JAX_PLATFORMS": os.environ["JAX_PLATFORMS"]} if "JAX_PLATFORMS" in os.environ else {}
    return {**own, **platform, "JAX_COMPILATION_CACHE_DIR": str(cache), "CLVR_PROGRAMS": programs}


def cpu_seconds() -> float:
    """Returns the processor time of all processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
