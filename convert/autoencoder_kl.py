"""AutoencoderKL <-> diffusers `vae/` of SDXL and Stable Diffusion 1.5."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from clvr_jax.convert.configs import from_known_fields
from clvr_jax.convert.rules import Rule, Table

from clvr_jax.errors import ClvrError
from clvr_jax.models.autoencoder_kl import AutoencoderKLConfig

TABLE = Table()

# Old checkpoints, Stable Diffusion 1.5 among them, name the projections of attention otherwise; diffusers reads both.
_OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", r"to_out\.0": "proj_attn"}
OLD_TABLE = Table(
    special=tuple(
        Rule(rf"(.+\.attentions\.0)\.{new}\.{kind}", rf"\1.{old}.{torch_kind}")
        for new, old in _OLD_NAMES.items()
        for kind, torch_kind in (("kernel", "weight"), ("bias", "bias"))
    )
)

# Fields of diffusers' config that our autoencoder does not have, and the only values it is written for.
_FIXED = {"act_fn": "silu", "latents_mean": None, "latents_std": None}
_BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}


def config_from_dict(config: Mapping[str, Any]) -> AutoencoderKLConfig:
    """`vae/config.json` -> AutoencoderKLConfig. Raises ClvrError for what our autoencoder is not written for."""
    for name, kind in _BLOCKS.items():
        if set(config.get(name, ())) - {kind}:
            raise ClvrError(f"AutoencoderKLConfig: {name} = {config[name]!r} is not supported, only {kind!r}")
    return from_known_fields(AutoencoderKLConfig, config, fixed=_FIXED, ignored=("force_upcast", *_BLOCKS))


def config_to_dict(config: AutoencoderKLConfig) -> dict[str, Any]:
    """AutoencoderKLConfig -> `vae/config.json`."""
    blocks = {name: [kind] * len(config.block_out_channels) for name, kind in _BLOCKS.items()}
    return {"_class_name": "AutoencoderKL", **dataclasses.asdict(config), **_FIXED, **blocks}
