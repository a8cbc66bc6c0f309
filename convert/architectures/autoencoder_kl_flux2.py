"""AutoencoderKLFlux2 <-> diffusers `vae/`."""

import dataclasses

from clvr_jax.convert.configs import from_known_fields
from clvr_jax.convert.rules import KeyMapping, Rule
from clvr_jax.files.json_input import JSON, UncheckedJSON
from clvr_jax.models.flux2 import AutoencoderKLFlux2Config

KEY_MAPPING = KeyMapping(special=(Rule(r"bn\.num_batches_tracked", dtype="int64"),))

# Fields of diffusers' config that our autoencoder does not have, and the only values that it supports.
_FIXED = {"act_fn": "silu"}


def config_from_dict(config: UncheckedJSON) -> AutoencoderKLFlux2Config:
    """Parses `vae/config.json`. Raises: ClvrError for a feature that our autoencoder does not support."""
    ignored = ("down_block_types", "up_block_types", "force_upcast", "scaling_factor", "shift_factor")
    return from_known_fields(AutoencoderKLFlux2Config, config, fixed=_FIXED, ignored=ignored)


def config_to_dict(config: AutoencoderKLFlux2Config) -> dict[str, JSON]:
    """Returns the content of `vae/config.json`."""
    blocks = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKLFlux2",
        **dataclasses.asdict(config),
        **_FIXED,
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
    }
