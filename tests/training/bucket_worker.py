"""Runs of `clvr train` in processes that are forked from one that has imported everything."""

import os
from collections.abc import Mapping, Sequence

# Imported before the fork, without using a device or a connection.
import clvr_jax.training.checkpoint
import clvr_jax.training.recipes  # noqa: F401
from clvr_jax.cli import main


def run(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Runs `clvr` and ends this process with its exit code."""
    os.environ.update(environment)
    os._exit(main(list(arguments)))
