"""Checkpoints with the names and shapes of FLUX.2 klein 4B (7.2 GiB), and commands timed in processes of their own."""

import dataclasses
import json
import os
import subprocess
import time
from pathlib import Path

import numpy as np

from clvr_jax.checkpoint_io.tensors import FLOATS, SHARD_BYTES, TensorSpec, preallocate_files, write_tensor
from clvr_jax.convert.architectures import FLUX2_TRANSFORMER
from clvr_jax.models.flux2 import Flux2TransformerConfig


def klein_4b(blocks: int | None = None) -> Flux2TransformerConfig:
    """The published configuration; with `blocks`, that many of each kind, to see whether a benchmark works."""
    config = Flux2TransformerConfig.klein_4b()
    return config if blocks is None else dataclasses.replace(config, num_layers=blocks, num_single_layers=blocks)


def make_checkpoint(
    folder: Path, config: Flux2TransformerConfig, tuned: int | None = None, shard_bytes: int = SHARD_BYTES
) -> list[TensorSpec]:
    """Random weights, finite and none zero, in shards as large as those of published checkpoints.

    Args:
      folder: of the model; made here.
      config: its configuration.
      tuned: None for a base; a seed for weights that differ from the base's by some units of the last place.
      shard_bytes: size of a file at most.
    """
    fields = FLUX2_TRANSFORMER.config_to_dict(config)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    entries = FLUX2_TRANSFORMER.entries(fields)
    specs = [TensorSpec(key, entry.torch_shape, FLOATS["bfloat16"]) for entry in entries for key in entry.keys]
    generator, change = np.random.default_rng(0), np.random.default_rng(tuned)
    for stored in preallocate_files(folder, specs, FLUX2_TRANSFORMER.file_name, shard_bytes).values():
        bits = generator.integers(1, 1 << 16, stored.shape, np.uint16) & 0xBFFF  # exponents below those of NaN
        if tuned is not None:
            bits ^= change.integers(0, 4, stored.shape, np.uint16)
        write_tensor(stored, bits.view(stored.dtype))
    return specs


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds and peak resident memory in GiB of a command."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return seconds, usage.ru_maxrss / 2**20
