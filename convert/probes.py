"""Inputs and forward functions that compare a model in two frameworks: one probe per architecture.

Inputs are small NumPy arrays of uneven sizes for the model's configuration. Every weight contributes to the outputs,
except rows of embeddings that no token selects. PyTorch's outputs are permuted to channels-last.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from clvr_jax.convert.architectures import (
    AUTOENCODER_KL,
    CLIP_TEXT,
    CLIP_TEXT_PROJECTED,
    FLUX2_TRANSFORMER,
    FLUX2_VAE,
    QWEN3,
    QWEN3_VL,
    UNET,
    Architecture,
    ModelConfig,
)
from clvr_jax.models.common.autoencoder_blocks import Autoencoder, AutoencoderConfig
from clvr_jax.models.flux2 import AutoencoderKLFlux2, Flux2TransformerConfig
from clvr_jax.models.flux2.position_ids import latent_ids, reference_ids, text_ids
from clvr_jax.models.qwen3 import Qwen3Config
from clvr_jax.models.qwen3_vl import Qwen3VLConfig
from clvr_jax.models.qwen3_vl.positions import Conversation, batch_conversations, merged_tokens
from clvr_jax.models.stable_diffusion import CLIPText, CLIPTextConfig, UNet2DConditionConfig

if TYPE_CHECKING:
    import jax
    import torch

Inputs = dict[str, Any]
"""Arguments by name: NumPy arrays, or tensors of PyTorch, and the static ones of some models."""
Output: TypeAlias = "jax.Array | torch.Tensor"
Outputs = Mapping[str, Any]
TorchModule: TypeAlias = Any
"""A model of diffusers or transformers, each with its own arguments and outputs."""
JaxModule: TypeAlias = Any
"""The NNX module of the same architecture."""

BATCH = 2
TEXT = 7
GRID = (3, 5)
"""Rows and columns of latents."""


@dataclass(frozen=True)
class Probe:
    """One forward pass of an architecture in both frameworks.

    inputs: (our configuration, random generator) -> arguments by name, float32 and int32 arrays on the host.
    run_torch: (PyTorch model, inputs whose arrays are tensors) -> name of an output -> tensor.
    run_jax: (NNX module, inputs) -> the same names -> arrays of the same shapes.
    """

    inputs: Callable[[ModelConfig, np.random.Generator], Inputs]
    run_torch: Callable[[TorchModule, Inputs], Outputs]
    run_jax: Callable[[JaxModule, Inputs], Outputs]


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def _integers(rng: np.random.Generator, below: int, *shape: int) -> np.ndarray:
    return rng.integers(0, below, shape, np.int32)


def _channels_last(tensor_bchw: "torch.Tensor") -> "torch.Tensor":
    return tensor_bchw.permute(0, 2, 3, 1)


def _channels_first(tensor_bhwc: "torch.Tensor") -> "torch.Tensor":
    return tensor_bhwc.permute(0, 3, 1, 2)


def _flux2_inputs(config: Flux2TransformerConfig, rng: np.random.Generator) -> Inputs:
    img_ids = np.concatenate([latent_ids(*GRID), reference_ids([(2, 3)])])
    return {
        "hidden_states": _normal(rng, BATCH, len(img_ids), config.in_channels),
        "encoder_hidden_states": _normal(rng, BATCH, TEXT, config.joint_attention_dim),
        "timestep": np.array([0.25, 0.9], np.float32),
        "img_ids": img_ids,
        "txt_ids": text_ids(TEXT),
        "guidance": np.array([1.5, 4.0], np.float32) if config.guidance_embeds else None,
    }


def _autoencoder_inputs(config: AutoencoderConfig, rng: np.random.Generator) -> Inputs:
    height, width = (2 * config.downscale * n for n in GRID)
    return {
        "images_bhwc": rng.uniform(-1, 1, (1, height, width, config.in_channels)).astype(np.float32),
        "latents_bhwc": _normal(rng, 1, *GRID, config.latent_channels),
    }


def _torch_autoencoder(model: TorchModule, inputs: Inputs) -> Outputs:
    from torch.nn.functional import pixel_unshuffle

    posterior = model.encode(_channels_first(inputs["images_bhwc"])).latent_dist
    outputs = {
        "mean": posterior.mode(),
        "log-variance": posterior.logvar,
        "decoded": model.decode(_channels_first(inputs["latents_bhwc"])).sample,
    }
    if hasattr(model, "bn"):  # FLUX.2's
        outputs["tokens"] = model.bn(pixel_unshuffle(outputs["mean"], model.config.patch_size[0]))
    return {name: _channels_last(tensor) for name, tensor in outputs.items()}


def _jax_autoencoder(model: Autoencoder, inputs: Inputs) -> Outputs:
    mean, log_variance = model.moments(inputs["images_bhwc"])
    outputs = {"mean": mean, "log-variance": log_variance, "decoded": model.decode(inputs["latents_bhwc"])}
    if isinstance(model, AutoencoderKLFlux2):
        outputs["tokens"] = model.encode_tokens(inputs["images_bhwc"])
    return outputs


def _qwen3_inputs(config: Qwen3Config, rng: np.random.Generator) -> Inputs:
    lengths_b = np.array([[TEXT], [TEXT + 4]])
    mask_bt = np.arange(TEXT + 4) < lengths_b
    return {"input_ids": _integers(rng, config.vocab_size, *mask_bt.shape), "attention_mask": mask_bt.astype(np.int32)}


def _qwen3_vl_inputs(config: Qwen3VLConfig, rng: np.random.Generator) -> Inputs:
    merge = config.vision.spatial_merge_size
    grids = ((1, 2 * merge, 3 * merge),)
    special = (config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id)
    words = rng.choice(np.setdiff1d(np.arange(config.text.vocab_size), special), (2, TEXT)).tolist()
    image = [config.image_token_id] * merged_tokens(grids, merge)[0]
    ids = [*words[0], config.vision_start_token_id, *image, config.vision_end_token_id, *words[1]]
    patches = sum(t * h * w for t, h, w in grids)
    pixels = rng.uniform(-1, 1, (patches, config.vision.patch_features)).astype(np.float32)
    conversation = Conversation(ids, pixels, grids)
    return batch_conversations([conversation], image_token_id=config.image_token_id, merge=merge, length_multiple=1)


def _torch_qwen3_vl(model: TorchModule, inputs: Inputs) -> Outputs:
    ids_bt = inputs["input_ids_bt"]
    logits = model(
        input_ids=ids_bt,
        pixel_values=inputs["pixel_values"].flatten(0, -2),
        image_grid_thw=ids_bt.new_tensor(inputs["grid_thw"]),
        mm_token_type_ids=(ids_bt == model.config.image_token_id).int(),
    ).logits
    return {"logits": logits}


def _unet_inputs(config: UNet2DConditionConfig, rng: np.random.Generator) -> Inputs:
    inputs: Inputs = {
        "latents_bhwc": _normal(rng, BATCH, 9, 7, config.in_channels),
        "timestep_b": np.array([13, 951], np.float32),
        "text_bsd": _normal(rng, BATCH, TEXT, config.cross_attention_dim),
    }
    if config.addition_embed_type:
        sizes = 6 * (config.addition_time_embed_dim or 0)
        pooled = (config.projection_class_embeddings_input_dim or 0) - sizes
        inputs["text_embeds_bd"] = _normal(rng, BATCH, pooled)
        inputs["time_ids_b6"] = _integers(rng, 1024, BATCH, 6).astype(np.float32)
    if config.time_cond_proj_dim:
        inputs["timestep_cond_bd"] = _normal(rng, BATCH, config.time_cond_proj_dim)
    return inputs


def _torch_unet(model: TorchModule, inputs: Inputs) -> Outputs:
    noise = model(
        _channels_first(inputs["latents_bhwc"]),
        inputs["timestep_b"],
        inputs["text_bsd"],
        timestep_cond=inputs.get("timestep_cond_bd"),
        added_cond_kwargs={"text_embeds": inputs.get("text_embeds_bd"), "time_ids": inputs.get("time_ids_b6")},
    ).sample
    return {"noise": _channels_last(noise)}


def _clip_inputs(config: CLIPTextConfig, rng: np.random.Generator) -> Inputs:
    # The largest id is the end of text in published vocabularies, even if config.json has another one.
    length, last = config.max_position_embeddings, config.vocab_size - 1
    ids_bt = _integers(rng, last, BATCH, length)
    ends_b = np.array([length // 2, length - 1])
    ids_bt[np.arange(BATCH), ends_b] = config.eos_token_id if config.eos_token_id > 2 else last
    return {"input_ids": ids_bt}


def _torch_clip(model: TorchModule, inputs: Inputs) -> Outputs:
    found = model(**inputs, output_hidden_states=True)
    return _clip_outputs(
        found.hidden_states, found.last_hidden_state, found.get("pooler_output", found.get("text_embeds"))
    )


def _jax_clip(model: CLIPText, inputs: Inputs) -> Outputs:
    found = model(inputs["input_ids"])
    pooled = found.pooler_output_bd if found.text_embeds_bp is None else found.text_embeds_bp
    return _clip_outputs(found.hidden_states_lbtd, found.last_hidden_state_btd, pooled)


def _clip_outputs(hidden_states: "Sequence[Output] | Output", last_hidden_state: Output, pooled: Output) -> Outputs:
    return {"hidden state -2": hidden_states[-2], "last hidden state": last_hidden_state, "pooled": pooled}


_AUTOENCODER = Probe(_autoencoder_inputs, _torch_autoencoder, _jax_autoencoder)
_CLIP = Probe(_clip_inputs, _torch_clip, _jax_clip)

PROBES: Mapping[Architecture, Probe] = {
    FLUX2_TRANSFORMER: Probe(
        _flux2_inputs,
        lambda model, inputs: {"velocity": model(**inputs).sample},
        lambda model, inputs: {"velocity": model(*inputs.values())},
    ),
    FLUX2_VAE: _AUTOENCODER,
    AUTOENCODER_KL: _AUTOENCODER,
    QWEN3: Probe(
        _qwen3_inputs,
        lambda model, inputs: {"logits": model(**inputs).logits},
        lambda model, inputs: {"logits": model(*inputs.values())},
    ),
    QWEN3_VL: Probe(_qwen3_vl_inputs, _torch_qwen3_vl, lambda model, inputs: {"logits": model(**inputs)}),
    UNET: Probe(_unet_inputs, _torch_unet, lambda model, inputs: {"noise": model(**inputs)}),
    CLIP_TEXT: _CLIP,
    CLIP_TEXT_PROJECTED: _CLIP,
}
