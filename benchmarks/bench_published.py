"""Planned steps beside published ones, on the TPUs they were published for.

python benchmarks/bench_published.py

* A training step of a transformer of FLUX.1 dev's size, 8 pictures of 1024 x 1024 on v5p-8 (four chips): 1.769 s in
  maxdiffusion's README, which draws on latents and texts that are encoded beforehand. Our blocks are FLUX.2's, whose
  gated MLPs do 13/12 of the work.
* Sampling with FLUX.2 klein 4B, 4 steps, 8 pictures of 1024 x 1024 on v6e-8: 0.394 s.

Needs libtpu and several minutes, no accelerator. An estimate is a lower bound: no kernel runs at peak.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from clvr_jax.configs import flux2_sample
from clvr_jax.convert.architectures import FLUX2_TRANSFORMER
from clvr_jax.cost_model.flops import flux2_flops
from clvr_jax.models.common.abstract import abstract_module
from clvr_jax.models.flux2 import Flux2Transformer, Flux2TransformerConfig
from clvr_jax.models.flux2.position_ids import latent_ids, text_ids
from clvr_jax.sharding import MeshConfig
from clvr_jax.training.objectives.losses import flow_matching_loss
from clvr_jax.training.plan import plan
from clvr_jax.training.recipes import Recipe, load_recipe
from clvr_jax.training.trainer import Task, TrainConfig

FLUX1_DEV = Flux2TransformerConfig(
    in_channels=64,
    num_layers=19,
    num_single_layers=38,
    attention_head_dim=128,
    num_attention_heads=24,
    joint_attention_dim=4096,
    axes_dims_rope=(32, 32, 32, 32),
    guidance_embeds=True,
)
BATCH, SIDE, TEXT = 8, 64, 512
PUBLISHED_TRAINING, PUBLISHED_SAMPLING = 1.769, 0.394


@dataclasses.dataclass(frozen=True)
class Config:
    """remat: of the blocks."""

    train: TrainConfig = TrainConfig(mesh=MeshConfig(fsdp=4), compute_dtype="bfloat16")
    remat: str = "attention"


def task(config: Config) -> Task:
    """Flow matching on latents and texts that are encoded already."""
    dtype = jnp.dtype(config.train.compute_dtype)
    params = FLUX2_TRANSFORMER.split(FLUX2_TRANSFORMER.config_to_dict(FLUX1_DEV))[1]
    graphdef, _ = nnx.split(
        abstract_module(lambda rngs: Flux2Transformer(FLUX1_DEV, rngs=rngs, dtype=dtype, remat=config.remat))
    )
    shape = jax.ShapeDtypeStruct
    batch = {
        "tokens": shape((BATCH, SIDE**2, FLUX1_DEV.in_channels), dtype),
        "text": shape((BATCH, TEXT, FLUX1_DEV.joint_attention_dim), dtype),
    }
    flops = flux2_flops(FLUX1_DEV, BATCH, text=TEXT, image=SIDE**2)

    def loss(params: Any, frozen: Any, data: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = nnx.merge(graphdef, params)

        def velocity(x: jax.Array, t: jax.Array) -> jax.Array:
            return model(x, data["text"], t, latent_ids(SIDE, SIDE), text_ids(TEXT), jnp.full(BATCH, 3.5))

        return flow_matching_loss(velocity, data["tokens"], key, 2.0), {}

    return Task(
        "step of FLUX.1 dev's size",
        params,
        {},
        loss,
        lambda step: batch,
        lambda ema, folder: None,
        flops=lambda batch: flops.training,
        hardware_flops=lambda batch: flops.hardware(config.remat, flash=True),
    )


def main() -> None:
    """Prints both."""
    config = Config()
    training = plan(Recipe("flux1_dev", config, task, abstract_task=task), config, "v5p:2x2x1")
    sampler = load_recipe(Path(flux2_sample.__file__))
    sampling = plan(sampler, sampler.config, "v6e-8")
    for report, published in ((training, PUBLISHED_TRAINING), (sampling, PUBLISHED_SAMPLING)):
        roofline = report.roofline
        print(
            f"{report.name} on {report.topology}: published {published} s, planned {roofline.overlapped:.3f} to "
            f"{roofline.serial:.3f} s, published / planned {published / roofline.serial:.2f} to "
            f"{published / roofline.overlapped:.2f}; {report.memory.total / 2**30:.1f} GiB a chip",
            flush=True,
        )


if __name__ == "__main__":
    main()
