"""UNet2DCondition <-> diffusers `unet/`."""

import dataclasses

from clvr_jax.convert.configs import from_known_fields
from clvr_jax.convert.rules import KeyMapping
from clvr_jax.files.json_input import JSON, UncheckedJSON
from clvr_jax.models.stable_diffusion import UNet2DConditionConfig

# Fields of diffusers' config that our UNet does not have, and the only values that it supports.
_FIXED = {
    "act_fn": "silu",
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
# Our softmax is always float32; the other fields belong to kinds of blocks and embeddings that are refused above.
_IGNORED = ("upcast_attention", "mid_block_only_cross_attention", "addition_embed_type_num_heads")


def key_mapping(config: UNet2DConditionConfig) -> KeyMapping:
    """Returns the key mapping, in which the blocks of each transformer are one stack."""
    return KeyMapping(stacked=tuple(f"{path}.transformer_blocks" for path in config.attentions))


def config_from_dict(config: UncheckedJSON) -> UNet2DConditionConfig:
    """Parses `unet/config.json`. Raises: ClvrError for a feature that our UNet does not support."""
    return from_known_fields(UNet2DConditionConfig, config, fixed=_FIXED, ignored=_IGNORED)


def config_to_dict(config: UNet2DConditionConfig) -> dict[str, JSON]:
    """Returns the content of `unet/config.json`."""
    return {"_class_name": "UNet2DConditionModel", **dataclasses.asdict(config), **_FIXED}
