"""Small Stable Diffusion pipelines of diffusers with random weights."""

import diffusers
import transformers

from clvr_jax.convert.architectures.clip_text import config_to_dict as clip_dict
from clvr_jax.convert.architectures.unet_2d_condition import config_to_dict as unet_dict
from clvr_jax.data.preprocessing.clip_tokens import make_clip_tokenizer
from clvr_jax.models.stable_diffusion import CLIPTextConfig, UNet2DConditionConfig
from tests.models.parity import randomize

LENGTH = 12
NOISE_LEVELS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "euler": lambda: diffusers.EulerDiscreteScheduler(**NOISE_LEVELS, timestep_spacing="leading", steps_offset=1),
    "pndm": lambda: diffusers.PNDMScheduler(**NOISE_LEVELS, skip_prk_steps=True, steps_offset=1),
    "lcm": lambda: diffusers.LCMScheduler(**NOISE_LEVELS),
}


def tokenizer(pad="<|endoftext|>"):
    made = make_clip_tokenizer(["a", "red", "circle", "blue", "star", "above"], LENGTH)
    made.pad_token = pad
    return made


def text_encoder(seed, **fields):
    config = CLIPTextConfig(
        len(tokenizer()), **{"hidden_size": 16, "intermediate_size": 24, **fields}, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=LENGTH, eos_token_id=tokenizer().eos_token_id,
    )  # fmt: skip
    fields = clip_dict(config)
    return randomize(getattr(transformers, fields["architectures"][0])(transformers.CLIPTextConfig(**fields)), seed)


def components(xl, scheduler, embeds_guidance):
    shared = {"sample_size": 8, "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 2}
    if embeds_guidance:
        shared["time_cond_proj_dim"] = 10
    if xl:
        config = UNet2DConditionConfig(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(16, 24), cross_attention_dim=36, transformer_layers_per_block=(1, 2),
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=60, **shared,
        )  # fmt: skip
    else:
        config = UNet2DConditionConfig(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(16, 24), cross_attention_dim=16, **shared,
        )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,) * 4, norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, scaling_factor=0.3,
    )  # fmt: skip
    parts = {
        "unet": randomize(diffusers.UNet2DConditionModel.from_config(unet_dict(config)), 1),
        "vae": randomize(vae, 2),
        "text_encoder": text_encoder(3),
        "tokenizer": tokenizer(),
        "scheduler": SCHEDULERS[scheduler](),
    }
    if xl:
        second = text_encoder(4, hidden_size=20, hidden_act="gelu", projection_dim=12)
        return {**parts, "text_encoder_2": second, "tokenizer_2": tokenizer("!")}
    return {**parts, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
