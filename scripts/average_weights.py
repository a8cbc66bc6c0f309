"""Averages the weights of models that were trained from one start, such as checkpoints of one run.

    python scripts/average_weights.py runs/a/export:0.4 runs/b/export:0.6 --out runs/average

The other files (config.json, tokenizer) are those of the first model. The shipped shapes controller is such an average;
the docstring of configs/shapes_controller.py says of what.
"""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.atomic_io import atomic_directory
from clvr_jax.files.output_paths import check_destination

WEIGHTS = "model.safetensors"


def average(models: list[tuple[Path, float]], out: Path) -> None:
    """Writes the weighted average of models.

    Args:
      models: directory and weight of each; the weights add up to 1.
      out: directory that is written, or replaced; the tensors have the dtypes of the first model.
    Raises: UsageError, ClvrError, one line, for weights that do not add up, models whose tensors differ, or an `out`
      inside of one of them.
    """
    if not np.isclose(sum(weight for _, weight in models), 1.0):
        raise UsageError(f"the weights add up to {sum(weight for _, weight in models):g}; they must add up to 1")
    check_destination(out, *(directory for directory, _ in models))
    first = _tensors(models[0][0])
    total = {name: models[0][1] * tensor.astype(np.float64) for name, tensor in first.items()}
    for directory, weight in models[1:]:
        tensors = _tensors(directory)
        if different := [
            name for name in sorted(first.keys() | tensors.keys()) if _shape(first, name) != _shape(tensors, name)
        ]:
            raise ClvrError(
                f"{directory}: {', '.join(different[:3])} not as in {models[0][0]}; average one architecture"
            )
        for name, tensor in tensors.items():
            total[name] += weight * tensor.astype(np.float64)
    with atomic_directory(out) as temporary:
        shutil.copytree(models[0][0], temporary, dirs_exist_ok=True)
        averaged = {name: tensor.astype(first[name].dtype) for name, tensor in total.items()}
        save_file(averaged, temporary / WEIGHTS, metadata={"format": "pt"})


def _tensors(directory: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(directory / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ClvrError(f"{directory / WEIGHTS}: no weights that can be averaged ({error})") from error


def _shape(tensors: dict[str, np.ndarray], name: str) -> tuple[int, ...] | None:
    return tensors[name].shape if name in tensors else None


def main(arguments: list[str]) -> int:
    """Parses the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="DIR:WEIGHT", help="Average these models with these weights.")
    parser.add_argument("--out", type=Path, required=True, help="Write the average to this directory.")
    options = parser.parse_args(arguments)
    try:
        pairs = [text.rpartition(":") for text in options.models]
        try:
            models = [(Path(directory), float(weight)) for directory, _, weight in pairs]
        except ValueError:
            raise UsageError("each model is DIR:WEIGHT with a number as the weight") from None
        average(models, options.out)
    except ClvrError as error:
        print(f"average_weights: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
