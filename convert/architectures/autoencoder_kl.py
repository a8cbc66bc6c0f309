"""AutoencoderKL <-> diffusers `vae/` of SDXL and Stable Diffusion 1.5."""

import dataclasses
import re
from collections.abc import Mapping
from typing import TypeVar

from clvr_jax.convert.configs import from_known_fields
from clvr_jax.convert.rules import KeyMapping
from clvr_jax.errors import ClvrError
from clvr_jax.files.json_input import JSON, UncheckedJSON
from clvr_jax.models.stable_diffusion import AutoencoderKLConfig

Tensor = TypeVar("Tensor")

KEY_MAPPING = KeyMapping()

# Old checkpoints, Stable Diffusion 1.5 among them, name the projections of attention otherwise; diffusers reads both.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(rf"(.+\.attentions\.0)\.({'|'.join(_OLD_NAMES)})\.(weight|bias)")

# Fields of diffusers' config that our autoencoder does not have, and the only values that it supports.
_FIXED = {"act_fn": "silu", "latents_mean": None, "latents_std": None}
_BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}


def config_from_dict(config: UncheckedJSON) -> AutoencoderKLConfig:
    """Parses `vae/config.json`. Raises: ClvrError for a feature that our autoencoder does not support."""
    for name, kind in _BLOCKS.items():
        if set(config.get(name, ())) - {kind}:
            raise ClvrError(f"AutoencoderKLConfig: {name} = {config[name]!r} is not supported, only {kind!r}")
    return from_known_fields(AutoencoderKLConfig, config, fixed=_FIXED, ignored=("force_upcast", *_BLOCKS))


def config_to_dict(config: AutoencoderKLConfig) -> dict[str, JSON]:
    """Returns the content of `vae/config.json`."""
    blocks = {name: [kind] * len(config.block_out_channels) for name, kind in _BLOCKS.items()}
    return {"_class_name": "AutoencoderKL", **dataclasses.asdict(config), **_FIXED, **blocks}


def canonicalize_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors of an old or new file to the keys of `KEY_MAPPING`, which are those of current diffusers."""
    return {
        _OLD_NAME.sub(lambda old: f"{old[1]}.{_OLD_NAMES[old[2]]}.{old[3]}", key): tensor
        for key, tensor in tensors.items()
    }
