"""Flux2Transformer <-> diffusers `transformer/` of a FLUX.2 pipeline."""

import dataclasses

from clvr_jax.convert.configs import from_known_fields
from clvr_jax.convert.rules import KeyMapping
from clvr_jax.files.json_input import JSON, UncheckedJSON
from clvr_jax.models.flux2 import Flux2TransformerConfig

KEY_MAPPING = KeyMapping(stacked=("transformer_blocks", "single_transformer_blocks"))


def config_from_dict(config: UncheckedJSON) -> Flux2TransformerConfig:
    """Parses `transformer/config.json`. Raises: ClvrError for an unknown field."""
    return from_known_fields(Flux2TransformerConfig, config)


def config_to_dict(config: Flux2TransformerConfig) -> dict[str, JSON]:
    """Returns the content of `transformer/config.json`."""
    return {"_class_name": "Flux2Transformer2DModel", **dataclasses.asdict(config)}
