"""Single files of FLUX.2 in the format of Black Forest Labs (BFL) and ComfyUI, viewed as diffusers' tensors.

A transformer (`flux-2-klein-base-4b.safetensors`, `flux2-dev.safetensors`) fuses query, key and value of a double block
in one matrix and ends in (shift, scale) where diffusers has (scale, shift). An autoencoder (`ae.safetensors`,
`flux2-vae.safetensors`) counts the decoder's levels from the finest and writes linear layers as 1x1 convolutions.

Keys are translated in one direction, from diffusers' to BFL's, so that our own module defines the content of a complete
file. No tensor is copied unless its rows are reordered.

Source of the names: diffusers' `loaders/single_file_utils.py`; the autoencoder is named as in latent diffusion.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from clvr_jax.checkpoint_io.tensors import StoredTensor, TensorSpec
from clvr_jax.convert.architectures import FLUX2_TRANSFORMER, FLUX2_VAE
from clvr_jax.convert.rules import check_keys
from clvr_jax.errors import ClvrError
from clvr_jax.files.json_input import UncheckedJSON
from clvr_jax.models.flux2 import AutoencoderKLFlux2Config, Flux2TransformerConfig

_TRANSFORMER_MARKS = ("double_blocks.", "single_blocks.")
_AUTOENCODER_MARKS = ("encoder.down.", "decoder.up.")

# All names below are substitutions that are applied in order. These are the variants of one key between publishers:
# ComfyUI's prefix and scales of norms, latent diffusion's location of the quantizing convolutions.
_SPELLINGS = (
    (r"^model\.diffusion_model\.", ""),
    (r"\.(query|key)_norm\.weight$", r".\1_norm.scale"),
    (r"^quant_conv\.", "encoder.quant_conv."),
    (r"^post_quant_conv\.", "decoder.post_quant_conv."),
)

# diffusers' key -> BFL's.
_TRANSFORMER_NAMES = (
    (r"^x_embedder\.", "img_in."),
    (r"^context_embedder\.", "txt_in."),
    (r"^time_guidance_embed\.(time|guidance)(?:step)?_embedder\.", r"\1_in."),
    (r"_in\.linear_1\.", "_in.in_layer."),
    (r"_in\.linear_2\.", "_in.out_layer."),
    (r"^(.+_stream_modulation.*)\.linear\.", r"\1.lin."),
    (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
    (r"^proj_out\.", "final_layer.linear."),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj\.", r"single_blocks.\1.linear1."),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_out\.", r"single_blocks.\1.linear2."),
    (r"^single_transformer_blocks\.(\d+)\.attn\.norm_", r"single_blocks.\1.norm_"),
    (r"^transformer_blocks\.", "double_blocks."),
    (r"\.attn\.to_[qkv]\.", ".img_attn.qkv."),
    (r"\.attn\.add_[qkv]_proj\.", ".txt_attn.qkv."),
    (r"\.attn\.to_out\.0\.", ".img_attn.proj."),
    (r"\.attn\.to_add_out\.", ".txt_attn.proj."),
    (r"\.attn\.norm_added_([qk])\.", r".txt_attn.norm_\1."),
    (r"\.attn\.norm_([qk])\.", r".img_attn.norm_\1."),
    (r"\.norm_q\.weight$", ".norm.query_norm.scale"),
    (r"\.norm_k\.weight$", ".norm.key_norm.scale"),
    (r"\.ff\.linear_in\.", ".img_mlp.0."),
    (r"\.ff\.linear_out\.", ".img_mlp.2."),
    (r"\.ff_context\.linear_in\.", ".txt_mlp.0."),
    (r"\.ff_context\.linear_out\.", ".txt_mlp.2."),
)
_AUTOENCODER_NAMES = (
    (r"\.(down|up)_blocks\.(\d+)\.resnets\.", r".\1.\2.block."),
    (r"\.(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.", r".\1.\2.\3sample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.attn_1\.group_norm\.", ".attn_1.norm."),
    (r"\.attn_1\.to_([qkv])\.", r".attn_1.\1."),
    (r"\.attn_1\.to_out\.0\.", ".attn_1.proj_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    *_SPELLINGS[2:],
)

_FUSED = re.compile(r"transformer_blocks\.\d+\.attn\.(?:to|add)_([qkv])(?:_proj)?\.weight")
_SWAPPED = "norm_out.linear.weight"
_AS_CONVOLUTION = re.compile(r".+\.attentions\.0\.to_.+\.weight")
_QUANTIZED = re.compile(r".+(?:_scale|_scale_2|scaled_fp8|comfy_quant|absmax|quant_map)")


@dataclass(frozen=True)
class Part(TensorSpec):
    """Rows of a tensor in a file, under diffusers' key, with the interface of `StoredTensor`.

    source: the tensor in the file. rows: ranges of its rows, which are concatenated; () are all rows.
    """

    source: StoredTensor
    rows: tuple[slice, ...] = ()

    def open(self) -> np.ndarray:
        """Returns the tensor read-only: one range is memory-mapped, several are read and concatenated."""
        whole = self.source.open()
        ranges = [whole[rows] for rows in self.rows] or [whole]
        return (ranges[0] if len(ranges) == 1 else np.concatenate(ranges)).reshape(self.shape)


def is_bfl(keys: Iterable[str]) -> bool:
    """Returns whether the keys of a file are BFL's rather than diffusers'."""
    return any(_spelled(key).startswith((*_TRANSFORMER_MARKS, *_AUTOENCODER_MARKS)) for key in keys)


def bfl_key(key: str) -> str:
    """Translates diffusers' key of a transformer to BFL's; query, key and value of a double block share one key."""
    return _renamed(key, _TRANSFORMER_NAMES)


def config_of(stored: Mapping[str, StoredTensor]) -> UncheckedJSON:
    """Returns the diffusers config.json of a single file: sizes from the shapes, other fields as published.

    Args:
      stored: key -> tensor of one file; headers are enough.
    Raises: ClvrError if it is not a FLUX.2 transformer or autoencoder, or if a tensor that determines a size is
      missing.
    """
    file = _File(stored)
    if file.has(_TRANSFORMER_MARKS):
        return FLUX2_TRANSFORMER.config_to_dict(_transformer_config(file))
    if file.has(_AUTOENCODER_MARKS):
        return FLUX2_VAE.config_to_dict(_autoencoder_config(file))
    raise ClvrError(
        f"{file.where}: neither a FLUX.2 transformer (double_blocks.*) nor its autoencoder (encoder.down.*) in BFL's "
        f"layout; it has {_some(sorted(stored)) or 'no tensors'}"
    )


def diffusers_tensors(stored: Mapping[str, StoredTensor]) -> dict[str, Part]:
    """Returns the location of every diffusers tensor in a file in BFL's layout. Reads no data.

    Args:
      stored: key -> tensor of one file in BFL's layout.
    Returns: diffusers' key -> its part of the file, in the order of our module.
    Raises: ClvrError listing tensors that are missing, unexpected or of another shape; a file that mixes both layouts
      has missing and unexpected ones.
    """
    config = config_of(stored)
    file = _File(stored)
    if config["_class_name"] == FLUX2_TRANSFORMER.torch_class:
        entries = FLUX2_TRANSFORMER.entries(config)
        names = {key: bfl_key(key) for entry in entries for key in entry.keys}
    else:
        entries, levels = FLUX2_VAE.entries(config), len(config["block_out_channels"])
        names = {key: _autoencoder_key(key, levels) for entry in entries for key in entry.keys}
    file.check(set(names.values()))
    parts = {key: _part(key, file.tensors[name]) for key, name in names.items()}
    check_keys(entries, {key: part.shape for key, part in parts.items()}, file.where)
    return parts


class _File:
    """The tensors of a file under canonical BFL keys."""

    def __init__(self, stored: Mapping[str, StoredTensor]):
        self.where = str(next((tensor.file for tensor in stored.values()), "checkpoint"))
        self.tensors: dict[str, StoredTensor] = {}
        for key, tensor in stored.items():
            other = self.tensors.setdefault(_spelled(key), tensor)
            if other is not tensor:
                raise ClvrError(f"{self.where}: {other.key} and {key} are the same tensor of the model; remove one")

    def has(self, beginnings: tuple[str, ...]) -> bool:
        return any(key.startswith(beginnings) for key in self.tensors)

    def shape(self, key: str, axes: int) -> tuple[int, ...]:
        if key not in self.tensors:
            raise ClvrError(f"{self.where}: {key} is missing, so this is not a complete FLUX.2 file; fetch it again")
        shape = self.tensors[key].shape
        if len(shape) != axes:
            raise ClvrError(
                f"{self.where}: {key} has {len(shape)} axes, FLUX.2's has {axes}; take the file in bfloat16"
            )
        if 0 in shape:
            raise ClvrError(f"{self.where}: {key} has the shape {shape}, so it is not of a FLUX.2 model")
        return shape

    def count(self, beginning: str) -> int:
        """Returns the length of a list of modules: one more than the highest index after `beginning`.

        Raises: ClvrError if it is more than the file has tensors: all tensors of all modules would be listed.
        """
        matches = (re.match(re.escape(beginning) + r"(\d{1,9})\.", key) for key in self.tensors)
        count = max((int(match[1]) + 1 for match in matches if match), default=0)
        if count > len(self.tensors):
            raise ClvrError(f"{self.where}: names {beginning}{count - 1} but has only {len(self.tensors):,} tensors")
        return count

    def check(self, expected: set[str]) -> None:
        missing = sorted(expected - self.tensors.keys())
        unexpected = sorted(self.tensors[key].key for key in self.tensors.keys() - expected)
        sides = (("missing", missing), ("unexpected", unexpected))
        faults = [f"{len(keys)} {title}: {_some(keys)}" for title, keys in sides if keys]
        if faults:
            hint = "; it is quantized, take the file in bfloat16" if any(map(_QUANTIZED.fullmatch, unexpected)) else ""
            raise ClvrError(f"{self.where}: tensors are not those of FLUX.2 in BFL's layout; {'; '.join(faults)}{hint}")


def _transformer_config(file: _File) -> Flux2TransformerConfig:
    width, in_channels = file.shape("img_in.weight", 2)
    head_dim = file.shape("single_blocks.0.norm.query_norm.scale", 1)[0]
    out_channels = file.shape("final_layer.linear.weight", 2)[0]
    return Flux2TransformerConfig(
        in_channels=in_channels,
        out_channels=None if out_channels == in_channels else out_channels,
        num_layers=file.count("double_blocks."),
        num_single_layers=file.count("single_blocks."),
        attention_head_dim=head_dim,
        num_attention_heads=width // head_dim,
        joint_attention_dim=file.shape("txt_in.weight", 2)[1],
        timestep_guidance_channels=file.shape("time_in.in_layer.weight", 2)[1],
        mlp_ratio=file.shape("double_blocks.0.img_mlp.2.weight", 2)[1] / width,
        guidance_embeds=file.has(("guidance_in.",)),
    )


def _autoencoder_config(file: _File) -> AutoencoderKLFlux2Config:
    encoder = _widths(file, "encoder.down.")
    decoder = _widths(file, "decoder.up.")
    return AutoencoderKLFlux2Config(
        in_channels=file.shape("encoder.conv_in.weight", 4)[1],
        out_channels=file.shape("decoder.conv_out.weight", 4)[0],
        block_out_channels=encoder,
        decoder_block_out_channels=None if decoder == encoder else decoder,
        layers_per_block=file.count("encoder.down.0.block."),
        latent_channels=file.shape("decoder.conv_in.weight", 4)[1],
        use_quant_conv=file.has(("encoder.quant_conv.",)),
        use_post_quant_conv=file.has(("decoder.post_quant_conv.",)),
        mid_block_add_attention=file.has(("encoder.mid.attn_1.",)),
    )


def _widths(file: _File, levels: str) -> tuple[int, ...]:
    """Returns the channels of each level, finest first."""
    return tuple(file.shape(f"{levels}{level}.block.0.conv1.weight", 4)[0] for level in range(file.count(levels)))


def _autoencoder_key(key: str, levels: int) -> str:
    """Translates diffusers' key to BFL's, which count the decoder's levels from the finest instead of the coarsest."""
    key = re.sub(r"(?<=\.up_blocks\.)\d+", lambda level: str(levels - 1 - int(level[0])), key)
    return _renamed(key, _AUTOENCODER_NAMES)


def _part(key: str, source: StoredTensor) -> Part:
    """Returns the part of a file's tensor that is diffusers' tensor `key`."""
    count, *rest = source.shape or (0,)
    if fused := _FUSED.fullmatch(key):
        third, number = count // 3, "qkv".index(fused[1])
        return Part(key, (third, *rest), source.dtype, source, (slice(number * third, (number + 1) * third),))
    if key == _SWAPPED:
        return Part(key, source.shape, source.dtype, source, (slice(count // 2, count), slice(count // 2)))
    shape = source.shape[:2] if _AS_CONVOLUTION.fullmatch(key) and source.shape[2:] == (1, 1) else source.shape
    return Part(key, shape, source.dtype, source)


def _spelled(key: str) -> str:
    return _renamed(key, _SPELLINGS)


def _renamed(key: str, names: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in names:
        key = re.sub(pattern, replacement, key)
    return key


def _some(keys: list[str], most: int = 6) -> str:
    return ", ".join(keys[:most]) + (f", ... ({len(keys) - most} more)" if len(keys) > most else "")
