"""A small Qwen3-VL with random weights in both frameworks, and conversations for it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import Qwen3VLConfig as ReferenceConfig
from transformers import Qwen3VLForConditionalGeneration

from clvr_jax.convert.architectures.qwen3_vl import KEY_MAPPING, config_to_dict
from clvr_jax.models.common.abstract import abstract_module
from clvr_jax.models.qwen3_vl import Qwen3VL, Qwen3VLConfig, Qwen3VLTextConfig, Qwen3VLVisionConfig
from clvr_jax.models.qwen3_vl.positions import Grids, merged_tokens
from tests.models.parity import load_tensors, randomize

SMALL = Qwen3VLConfig(
    text=Qwen3VLTextConfig(
        vocab_size=800,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        mrope_section=(6, 5, 5),
    ),
    vision=Qwen3VLVisionConfig(
        depth=4,
        hidden_size=128,
        intermediate_size=256,
        num_heads=4,
        patch_size=8,
        out_hidden_size=128,
        num_position_embeddings=256,
        deepstack_visual_indexes=(0, 1, 2),
    ),
    tie_word_embeddings=True,
    image_token_id=798,
    video_token_id=799,
    vision_start_token_id=796,
    vision_end_token_id=797,
)


def make_pair(config: Qwen3VLConfig = SMALL, seed: int = 0) -> tuple[Qwen3VL, Qwen3VLForConditionalGeneration]:
    """Ours and transformers' with the same random weights."""
    reference_config = ReferenceConfig(**config_to_dict(config), attn_implementation="eager")
    reference = randomize(Qwen3VLForConditionalGeneration(reference_config), seed)
    model = abstract_module(lambda rngs: Qwen3VL(config, rngs=rngs))
    load_tensors(model, checkpoint_of(reference), KEY_MAPPING)
    return model, reference


def checkpoint_of(reference: Qwen3VLForConditionalGeneration) -> dict[str, np.ndarray]:
    """What `save_pretrained` writes: a tied head is not written a second time."""
    tied = reference.config.tie_word_embeddings
    tensors = {key: tensor.detach().numpy() for key, tensor in reference.state_dict().items()}
    return {key: tensor for key, tensor in tensors.items() if not (tied and key == "lm_head.weight")}


def conversation(
    rng: np.random.Generator, grids: Grids, text: int, config: Qwen3VLConfig = SMALL
) -> tuple[list[int], np.ndarray]:
    """Token ids with `text` random words before each image and after the last, and patches of random images."""
    words = rng.integers(0, 700, (len(grids) + 1, text))
    ids: list[int] = words[0].tolist()
    for count, after in zip(merged_tokens(grids, config.vision.spatial_merge_size), words[1:], strict=True):
        ids += [config.vision_start_token_id, *[config.image_token_id] * count, config.vision_end_token_id]
        ids += after.tolist()
    patches = sum(t * h * w for t, h, w in grids)
    return ids, rng.uniform(-1, 1, (patches, config.vision.patch_features)).astype(np.float32)


def pad(rows: list[list[int]], side: str, length: int = 0, pad_id: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (b, t) padded on one side, and their mask."""
    length = max(length, *map(len, rows))
    ids = np.full((len(rows), length), pad_id)
    mask = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


def reference_inputs(
    ids_bt: np.ndarray, pixel_values: np.ndarray, grids: Grids, mask_bt: np.ndarray | None = None
) -> dict[str, Any]:
    """Arguments of the PyTorch model."""
    return {
        "input_ids": torch.tensor(ids_bt, dtype=torch.long),
        "pixel_values": torch.tensor(pixel_values),
        "image_grid_thw": torch.tensor(grids),
        "mm_token_type_ids": torch.tensor((ids_bt == SMALL.image_token_id).astype(np.int32)),
        "attention_mask": torch.tensor(np.ones_like(ids_bt) if mask_bt is None else mask_bt),
    }


def compiled(model: nnx.Module, method: str = "__call__", **arguments: Any) -> Any:
    """Calls a method as one compiled program, which takes less time than compiling it operation by operation."""
    graphdef, state = nnx.split(model)
    traced = {name: jnp.asarray(value) for name, value in arguments.items() if hasattr(value, "dtype")}
    static = {name: value for name, value in arguments.items() if name not in traced}
    return jax.jit(lambda state, traced: getattr(nnx.merge(graphdef, state), method)(**traced, **static))(state, traced)
