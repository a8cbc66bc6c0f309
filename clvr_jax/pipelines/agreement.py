"""Checks that the parts of a pipeline belong to one checkpoint, before a prompt is read with them.

Parts of different checkpoints often fit in shape: the images are then noise, or nearly right, and no error says so.
"""

from collections.abc import Sequence
from typing import Any

from clvr_jax.data.qwen3_vl_images import Qwen3VLImageProcessor
from clvr_jax.data.text import TURN_TOKENS, check_tokenizer
from clvr_jax.errors import ClvrError
from clvr_jax.models.autoencoder_kl_flux2 import AutoencoderKLFlux2Config
from clvr_jax.models.clip_text import CLIPTextConfig
from clvr_jax.models.flux2_transformer import Flux2TransformerConfig
from clvr_jax.models.qwen3 import Qwen3Config
from clvr_jax.models.qwen3_vl import Qwen3VLConfig

_LEGACY_EOS = 2
"""In a CLIP configuration: the pooled token is the one with the largest id, whatever that is."""


def check_flux2(
    transformer: Flux2TransformerConfig,
    vae: AutoencoderKLFlux2Config,
    text_encoder: Qwen3Config,
    tokenizer: Any,
    out_layers: Sequence[int],
) -> None:
    """Checks the parts of a FLUX.2 pipeline against each other.

    Args:
      transformer, vae, text_encoder: configurations of the models.
      tokenizer: a transformers tokenizer.
      out_layers: hidden states of the text encoder that condition the transformer.
    Raises: ClvrError, with both sides, for the first that does not fit.
    """
    if transformer.in_channels != vae.token_channels:
        raise ClvrError(
            f"transformer reads {transformer.in_channels} channels a token, the autoencoder makes "
            f"{vae.token_channels}; they do not belong together"
        )
    if not out_layers or min(out_layers) < 0 or max(out_layers) > text_encoder.num_hidden_layers:
        raise ClvrError(
            f"text_encoder_out_layers {tuple(out_layers)}: the text encoder has hidden states 0 to "
            f"{text_encoder.num_hidden_layers}; correct clvr.json or take the text encoder of this model"
        )
    width = len(out_layers) * text_encoder.hidden_size
    if transformer.joint_attention_dim != width:
        raise ClvrError(
            f"transformer reads {transformer.joint_attention_dim} features of the text, the text encoder makes {width} "
            f"({len(out_layers)} hidden states of {text_encoder.hidden_size}); they do not belong together"
        )
    check_tokenizer(tokenizer, text_encoder.vocab_size, TURN_TOKENS)
    if not tokenizer.chat_template:
        raise ClvrError("the tokenizer has no chat template; copy chat_template.jinja or tokenizer_config.json again")


def check_clip(tokenizer: Any, text_encoder: CLIPTextConfig) -> None:
    """Checks a CLIP tokenizer against its text encoder.

    Raises: ClvrError if a token has no embedding, or the two name different ends of a text.
    """
    check_tokenizer(tokenizer, text_encoder.vocab_size)
    named = text_encoder.eos_token_id
    if named not in (_LEGACY_EOS, tokenizer.eos_token_id):
        raise ClvrError(
            f"the tokenizer ends a text with id {tokenizer.eos_token_id}, the text encoder's eos_token_id is {named}; "
            "tokenizer and text encoder belong to different checkpoints"
        )


def check_qwen3_vl(model: Qwen3VLConfig, tokenizer: Any, processor: Qwen3VLImageProcessor) -> None:
    """Checks tokenizer and image processor of a Qwen3-VL against its configuration.

    Raises: ClvrError, with both sides, for the first that does not fit.
    """
    check_tokenizer(tokenizer, model.text.vocab_size, TURN_TOKENS)
    named = {
        "<|image_pad|>": model.image_token_id,
        "<|vision_start|>": model.vision_start_token_id,
        "<|vision_end|>": model.vision_end_token_id,
    }
    for token, expected in named.items():
        if (found := tokenizer.convert_tokens_to_ids(token)) != expected:
            raise ClvrError(
                f"the tokenizer's id of {token} is {found}, config.json says {expected}; tokenizer and model belong to "
                "different checkpoints"
            )
    vision = model.vision
    sizes = {
        "patch_size": (processor.patch_size, vision.patch_size),
        "temporal_patch_size": (processor.temporal_patch_size, vision.temporal_patch_size),
        "merge_size": (processor.merge_size, vision.spatial_merge_size),
    }
    for name, (ours, theirs) in sizes.items():
        if ours != theirs:
            raise ClvrError(
                f"the image processor's {name} is {ours}, the vision tower's {theirs}; "
                "they belong to different checkpoints"
            )
