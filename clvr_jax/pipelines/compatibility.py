"""Checks that the components of a pipeline belong to one checkpoint, before a prompt is encoded with them.

Components of different checkpoints often agree in shape: the images are then noise, or nearly right, without an error.
"""

from collections.abc import Sequence

from clvr_jax.data.preprocessing.qwen3_vl_images import Qwen3VLImageProcessor
from clvr_jax.data.preprocessing.text import TURN_TOKENS, check_tokenizer
from clvr_jax.errors import ClvrError
from clvr_jax.interfaces.tokenizer import Tokenizer
from clvr_jax.models.flux2 import AutoencoderKLFlux2Config, Flux2TransformerConfig
from clvr_jax.models.qwen3 import Qwen3Config
from clvr_jax.models.qwen3_vl import Qwen3VLConfig
from clvr_jax.models.stable_diffusion import CLIPTextConfig

_LEGACY_EOS = 2
"""In a CLIP configuration: the pooled token is the one with the largest id, whatever its meaning."""


def check_flux2(
    transformer: Flux2TransformerConfig,
    vae: AutoencoderKLFlux2Config,
    text_encoder: Qwen3Config,
    tokenizer: Tokenizer,
    out_layers: Sequence[int],
) -> None:
    """Checks the components of a FLUX.2 pipeline against each other.

    Args:
      transformer, vae, text_encoder: configurations of the models.
      tokenizer: a transformers tokenizer.
      out_layers: hidden states of the text encoder that condition the transformer.
    Raises: ClvrError, with both sides, for the first mismatch.
    """
    if transformer.in_channels != vae.token_channels:
        raise ClvrError(
            f"the transformer takes {transformer.in_channels} channels per token, the autoencoder gives "
            f"{vae.token_channels}; they belong to different checkpoints"
        )
    if not out_layers or min(out_layers) < 0 or max(out_layers) > text_encoder.num_hidden_layers:
        raise ClvrError(
            f"text_encoder_out_layers {tuple(out_layers)}: the text encoder has hidden states 0 to "
            f"{text_encoder.num_hidden_layers}; correct clvr.json or take the text encoder of this model"
        )
    width = len(out_layers) * text_encoder.hidden_size
    if transformer.joint_attention_dim != width:
        raise ClvrError(
            f"the transformer takes {transformer.joint_attention_dim} text features, the text encoder gives {width} "
            f"({len(out_layers)} hidden states of {text_encoder.hidden_size}); they belong to different checkpoints"
        )
    check_tokenizer(tokenizer, text_encoder.vocab_size, TURN_TOKENS)
    if not tokenizer.chat_template:
        raise ClvrError("the tokenizer has no chat template; copy chat_template.jinja or tokenizer_config.json again")


def check_clip(tokenizer: Tokenizer, text_encoder: CLIPTextConfig) -> None:
    """Checks a CLIP tokenizer against its text encoder.

    Raises: ClvrError if a token has no embedding, or the two have different end-of-sequence tokens.
    """
    check_tokenizer(tokenizer, text_encoder.vocab_size)
    expected = text_encoder.eos_token_id
    if expected not in (_LEGACY_EOS, tokenizer.eos_token_id):
        raise ClvrError(
            f"the tokenizer ends a text with id {tokenizer.eos_token_id}, the text encoder's eos_token_id is "
            f"{expected}; tokenizer and text encoder belong to different checkpoints"
        )


def check_qwen3_vl(model: Qwen3VLConfig, tokenizer: Tokenizer, processor: Qwen3VLImageProcessor) -> None:
    """Checks tokenizer and image processor of a Qwen3-VL against its configuration.

    Raises: ClvrError, with both sides, for the first mismatch.
    """
    check_tokenizer(tokenizer, model.text.vocab_size, TURN_TOKENS)
    special_tokens = {
        "<|image_pad|>": model.image_token_id,
        "<|vision_start|>": model.vision_start_token_id,
        "<|vision_end|>": model.vision_end_token_id,
    }
    for token, expected in special_tokens.items():
        if (found := tokenizer.convert_tokens_to_ids(token)) != expected:
            raise ClvrError(
                f"the tokenizer's id of {token} is {found}, that of config.json is {expected}; tokenizer and model "
                "belong to different checkpoints"
            )
    vision = model.vision
    pairs = {
        "patch_size": (processor.patch_size, vision.patch_size),
        "temporal_patch_size": (processor.temporal_patch_size, vision.temporal_patch_size),
        "merge_size": (processor.merge_size, vision.spatial_merge_size),
    }
    for name, (of_processor, of_tower) in pairs.items():
        if of_processor != of_tower:
            raise ClvrError(
                f"the image processor's {name} is {of_processor}, the vision tower's {of_tower}; "
                "they belong to different checkpoints"
            )
