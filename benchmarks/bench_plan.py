"""Planned steps beside real ones: is the estimate in the right order, and how far below the measured time?

python benchmarks/bench_plan.py

Trains random FLUX.2 transformers of several sizes for a few steps on one CPU device, and plans the same steps for that
device, whose peak rates are measured first. An estimate is a lower bound: no kernel runs at peak.
"""

import argparse
import dataclasses
import time
from typing import Any

import jax
import numpy as np
from flax import nnx

from clvr_jax.cost_model.flops import flux2_flops
from clvr_jax.models.flux2 import Flux2Transformer, Flux2TransformerConfig
from clvr_jax.models.flux2.position_ids import latent_ids, text_ids
from clvr_jax.sharding import MeshConfig, MeshLayout
from clvr_jax.training.objectives.losses import flow_matching_loss
from clvr_jax.training.optimization.step import TrainState, make_train_step
from clvr_jax.training.plan import plan
from clvr_jax.training.recipes import Recipe
from clvr_jax.training.trainer import Task, TrainConfig

TEXT = 64
# heads of 64 channels, double and single blocks, tokens of a side, rows
SIZES = ((2, 2, 8, 16), (4, 2, 8, 16), (4, 4, 16, 8), (8, 4, 8, 16), (8, 4, 16, 8), (12, 4, 16, 4))


@dataclasses.dataclass(frozen=True)
class Config:
    """One size."""

    heads: int
    depth: int
    side: int
    batch_size: int
    train: TrainConfig = TrainConfig(mesh=MeshConfig(devices=1))


def task(config: Config) -> Task:
    """Flow matching on random tokens."""
    sizes = Flux2TransformerConfig(
        in_channels=128,
        num_layers=config.depth,
        num_single_layers=config.depth,
        attention_head_dim=64,
        num_attention_heads=config.heads,
        joint_attention_dim=256,
        axes_dims_rope=(16, 16, 16, 16),
        guidance_embeds=False,
    )
    graphdef, params = nnx.split(Flux2Transformer(sizes, rngs=nnx.Rngs(0)))
    tokens = config.side**2

    def loss(params: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        def velocity(x: jax.Array, t: jax.Array) -> jax.Array:
            ids = latent_ids(config.side, config.side)
            return nnx.merge(graphdef, params)(x, batch["text"], t, ids, text_ids(TEXT))

        return flow_matching_loss(velocity, batch["tokens"], key, 2.0), {}

    def batches(step: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(step)
        return {
            "tokens": rng.normal(size=(config.batch_size, tokens, 128)).astype(np.float32),
            "text": rng.normal(size=(config.batch_size, TEXT, 256)).astype(np.float32),
        }

    def count(batch: Any) -> Any:
        return flux2_flops(sizes, len(batch["tokens"]), text=TEXT, image=tokens)

    return Task(
        "step",
        params,
        {},
        loss,
        batches,
        lambda ema, folder: None,
        flops=lambda batch: count(batch).training,
        hardware_flops=lambda batch: count(batch).hardware("dots"),
    )


def measured(config: Config, steps: int) -> float:
    """Median seconds of a step, the first left out."""
    run = task(config)
    with MeshLayout(config.train.mesh.make()).active() as layout:
        optimizer = config.train.optimizer()
        state = TrainState.create(run.params, optimizer, layout)
        step, seconds = make_train_step(run.loss, optimizer, config.train.step, layout), []
        for number in range(steps + 1):
            batch = jax.device_put(run.batches(number))  # type: ignore[operator]
            start = time.perf_counter()
            state, metrics = step(state, {}, batch)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


def main() -> None:
    """Prints a line for each size, then how well the order agrees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    rows = []
    for size in SIZES:
        config = Config(*size)
        report = plan(Recipe("size", config, task), config, "cpu:1")
        real, least = measured(config, options.steps), report.roofline.overlapped
        rows.append((real, least))
        print(
            f"{report.parameters / 1e6:5.1f} M parameters, {config.batch_size:2} x {config.side**2 + TEXT} tokens: "
            f"measured {real:.3f} s, planned {least:.3f} to {report.roofline.serial:.3f} s, "
            f"measured / planned {real / least:.2f}",
            flush=True,
        )
    order = np.argsort(np.argsort(rows, axis=0), axis=0)
    print(f"rank correlation {np.corrcoef(order.T)[0, 1]:.2f}; ratios "
          f"{min(r / p for r, p in rows):.2f} to {max(r / p for r, p in rows):.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
