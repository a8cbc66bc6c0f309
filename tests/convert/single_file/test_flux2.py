import math
from pathlib import Path

import diffusers
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_ldm_vae_checkpoint,
)
from flax import nnx
from safetensors.numpy import save_file

from clvr_jax.checkpoint_io.tensors import StoredTensor, read_header, stored_tensors
from clvr_jax.convert.architectures import autoencoder_kl_flux2, flux2_transformer
from clvr_jax.convert.rules import state_from_torch
from clvr_jax.convert.single_file.flux2 import config_of, diffusers_tensors, is_bfl
from clvr_jax.errors import ClvrError
from clvr_jax.models.common.abstract import abstract_module
from clvr_jax.models.flux2 import AutoencoderKLFlux2, AutoencoderKLFlux2Config, Flux2Transformer, Flux2TransformerConfig
from clvr_jax.pipelines.registry import SHIPPED
from tests.models.parity import TOLERANCE, relative_error

SMALL = Flux2TransformerConfig(
    in_channels=12,
    num_layers=2,
    num_single_layers=3,
    num_attention_heads=2,
    joint_attention_dim=20,
    timestep_guidance_channels=32,
)
SMALL_AUTOENCODER = AutoencoderKLFlux2Config(
    block_out_channels=(32, 64), decoder_block_out_channels=(32, 96), layers_per_block=1, latent_channels=4
)
PRESETS = [Flux2TransformerConfig.klein_4b, Flux2TransformerConfig.klein_9b, Flux2TransformerConfig.dev]


def transformer_shapes(config):
    """Keys and shapes of BFL's own module, `Flux2` with its SwiGLU and global modulation."""
    width, head, mlp = config.inner_dim, config.attention_head_dim, config.mlp_dim
    shapes = {
        "img_in.weight": (width, config.in_channels),
        "txt_in.weight": (width, config.joint_attention_dim),
        "double_stream_modulation_img.lin.weight": (6 * width, width),
        "double_stream_modulation_txt.lin.weight": (6 * width, width),
        "single_stream_modulation.lin.weight": (3 * width, width),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.linear.weight": (config.token_channels, width),
    }
    for embedder in ("time_in", "guidance_in") if config.guidance_embeds else ("time_in",):
        shapes[f"{embedder}.in_layer.weight"] = (width, config.timestep_guidance_channels)
        shapes[f"{embedder}.out_layer.weight"] = (width, width)
    for i in range(config.num_layers):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            shapes[f"{block}_attn.qkv.weight"] = (3 * width, width)
            shapes[f"{block}_attn.norm.query_norm.scale"] = (head,)
            shapes[f"{block}_attn.norm.key_norm.scale"] = (head,)
            shapes[f"{block}_attn.proj.weight"] = (width, width)
            shapes[f"{block}_mlp.0.weight"] = (2 * mlp, width)
            shapes[f"{block}_mlp.2.weight"] = (width, mlp)
    for i in range(config.num_single_layers):
        shapes[f"single_blocks.{i}.linear1.weight"] = (3 * width + 2 * mlp, width)
        shapes[f"single_blocks.{i}.linear2.weight"] = (width, width + mlp)
        shapes[f"single_blocks.{i}.norm.query_norm.scale"] = (head,)
        shapes[f"single_blocks.{i}.norm.key_norm.scale"] = (head,)
    return shapes


def autoencoder_shapes(config):
    """Keys and shapes of BFL's own `AutoEncoder`, that of latent diffusion with a batch norm."""
    shapes = {}

    def conv(name, features_in, features_out, size=3):
        shapes.update({f"{name}.weight": (features_out, features_in, size, size), f"{name}.bias": (features_out,)})

    def norm(name, features):
        shapes.update({f"{name}.weight": (features,), f"{name}.bias": (features,)})

    def resnet(name, features_in, features_out):
        norm(f"{name}.norm1", features_in)
        conv(f"{name}.conv1", features_in, features_out)
        norm(f"{name}.norm2", features_out)
        conv(f"{name}.conv2", features_out, features_out)
        if features_in != features_out:
            conv(f"{name}.nin_shortcut", features_in, features_out, 1)

    def middle(half, features):
        resnet(f"{half}.mid.block_1", features, features)
        norm(f"{half}.mid.attn_1.norm", features)
        for name in ("q", "k", "v", "proj_out"):
            conv(f"{half}.mid.attn_1.{name}", features, features, 1)
        resnet(f"{half}.mid.block_2", features, features)

    widths, z, last = config.block_out_channels, config.latent_channels, len(config.block_out_channels) - 1
    conv("encoder.conv_in", 3, widths[0])
    for level, width in enumerate(widths):
        for i in range(config.layers_per_block):
            resnet(f"encoder.down.{level}.block.{i}", widths[max(level - 1, 0)] if i == 0 else width, width)
        if level < last:
            conv(f"encoder.down.{level}.downsample.conv", width, width)
    middle("encoder", widths[-1])
    norm("encoder.norm_out", widths[-1])
    conv("encoder.conv_out", widths[-1], 2 * z)
    conv("encoder.quant_conv", 2 * z, 2 * z, 1)

    widths = config.decoder_widths
    conv("decoder.post_quant_conv", z, z, 1)
    conv("decoder.conv_in", z, widths[-1])
    middle("decoder", widths[-1])
    for level, width in enumerate(widths):
        for i in range(config.layers_per_block + 1):
            resnet(f"decoder.up.{level}.block.{i}", widths[min(level + 1, last)] if i == 0 else width, width)
        if level > 0:
            conv(f"decoder.up.{level}.upsample.conv", width, width)
    norm("decoder.norm_out", widths[0])
    conv("decoder.conv_out", widths[0], 3)
    shapes.update({"bn.running_mean": (4 * z,), "bn.running_var": (4 * z,), "bn.num_batches_tracked": ()})
    return shapes


def random_tensors(shapes, dtype=np.float32):
    random = np.random.default_rng(0)
    tensors = {}
    for key, shape in shapes.items():
        scale = math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 1.0
        tensors[key] = (scale * random.normal(size=shape)).astype(dtype)
        if key.endswith("running_var"):
            tensors[key] = np.abs(tensors[key]) + dtype(0.5)
        if key.endswith("num_batches_tracked"):
            tensors[key] = np.array(7, np.int64)
    return tensors


def written(path, tensors):
    save_file(tensors, path)
    return {stored.key: stored for stored in read_header(path)}


def unwritten(shapes):
    return {
        key: StoredTensor(key, shape, np.dtype(np.float32), Path("model.safetensors"), 0)
        for key, shape in shapes.items()
    }


def loaded(module, config, stored, key_mapping):
    """Our module with the weights of a file; nothing is initialized."""
    graphdef, state = nnx.split(abstract_module(lambda rngs: module(config, rngs=rngs)))
    tensors = {key: part.open() for key, part in diffusers_tensors(stored).items()}
    return nnx.merge(graphdef, state_from_torch(tensors, state, key_mapping))


def converted_transformer(tensors):
    """BFL's tensors -> what diffusers makes of them, in float32."""
    return convert_flux2_transformer_checkpoint_to_diffusers(
        {key: torch.tensor(tensor.astype(np.float32)) for key, tensor in tensors.items()}
    )


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_transformer_is_bit_for_bit_what_diffusers_converts(tmp_path, prefix, dtype):
    tensors = random_tensors(transformer_shapes(SMALL), dtype)
    stored = written(tmp_path / "bfl.safetensors", {prefix + key: tensor for key, tensor in tensors.items()})
    expected = converted_transformer(tensors)
    found = diffusers_tensors(stored)
    assert found.keys() == expected.keys()
    for key, part in found.items():
        opened = part.open()
        assert (part.key, part.shape, part.dtype, part.nbytes) == (key, opened.shape, opened.dtype, opened.nbytes)
        assert opened.dtype == dtype
        assert np.array_equal(opened.astype(np.float32), expected[key].numpy()), key


@pytest.mark.slow
def test_our_transformer_computes_what_diffusers_does_with_its_own_conversion(tmp_path):
    tensors = random_tensors(transformer_shapes(SMALL))
    stored = written(tmp_path / "bfl.safetensors", tensors)
    config = config_of(stored)
    reference = diffusers.Flux2Transformer2DModel.from_config(config).eval()
    reference.load_state_dict(converted_transformer(tensors))
    model = loaded(Flux2Transformer, flux2_transformer.config_from_dict(config), stored, flux2_transformer.KEY_MAPPING)

    random = np.random.default_rng(1)
    hidden, text = (random.normal(size=size).astype(np.float32) for size in ((1, 6, 12), (1, 5, 20)))
    timestep, guidance = np.float32([0.6]), np.float32([3.5])
    image_ids = np.array([(0, h, w, 0) for h in range(2) for w in range(3)])
    text_ids = np.array([(0, 0, 0, i) for i in range(5)])
    with torch.no_grad():
        given = map(torch.tensor, (hidden, text, timestep, image_ids, text_ids, guidance))
        expected = reference(*given, return_dict=False)[0]

    @jax.jit
    def velocity(model):
        return model(hidden, text, timestep, img_ids=image_ids, txt_ids=text_ids, guidance_b=guidance)

    assert relative_error(velocity(model), expected) < TOLERANCE


def converted_autoencoder(tensors, config):
    """BFL's tensors -> what diffusers makes of them, which knows an autoencoder of latent diffusion: no batch norm, and
    the quantising convolutions at the top."""
    lifted = {}
    for key, tensor in tensors.items():
        lifted[key.split(".", 1)[1] if "quant_conv" in key else key] = torch.tensor(tensor)
    statistics = {key: tensor for key, tensor in lifted.items() if key.startswith("bn.")}
    return {**convert_ldm_vae_checkpoint(lifted, config), **statistics}


@pytest.mark.parametrize("nested", [True, False])
def test_an_autoencoder_is_bit_for_bit_what_diffusers_converts(tmp_path, nested):
    tensors = random_tensors(autoencoder_shapes(SMALL_AUTOENCODER))
    as_published = tensors
    if not nested:
        as_published = {key.split(".", 1)[1] if "quant_conv" in key else key: t for key, t in tensors.items()}
    stored = written(tmp_path / "ae.safetensors", as_published)
    config = config_of(stored)
    assert autoencoder_kl_flux2.config_from_dict(config) == SMALL_AUTOENCODER
    expected, found = converted_autoencoder(tensors, config), diffusers_tensors(stored)
    assert found.keys() == expected.keys()
    for key, part in found.items():
        assert part.shape == tuple(expected[key].shape)
        assert np.array_equal(part.open(), expected[key].numpy()), key


@pytest.mark.slow
def test_our_autoencoder_computes_what_diffusers_does_with_its_own_conversion(tmp_path):
    tensors = random_tensors(autoencoder_shapes(SMALL_AUTOENCODER))
    stored = written(tmp_path / "ae.safetensors", tensors)
    config = config_of(stored)
    reference = diffusers.AutoencoderKLFlux2.from_config(config).eval()
    reference.load_state_dict(converted_autoencoder(tensors, config))
    model = loaded(AutoencoderKLFlux2, SMALL_AUTOENCODER, stored, autoencoder_kl_flux2.KEY_MAPPING)
    images = np.random.default_rng(2).uniform(-1, 1, (1, 16, 24, 3)).astype(np.float32)
    with torch.no_grad():
        mode = reference.encode(torch.tensor(images).permute(0, 3, 1, 2)).latent_dist.mode()
        decoded = reference.decode(mode).sample.permute(0, 2, 3, 1)
    latents = mode.permute(0, 2, 3, 1).numpy()
    assert relative_error(jax.jit(lambda model: model.encode(images))(model), latents) < TOLERANCE
    assert relative_error(jax.jit(lambda model: model.decode(latents))(model), decoded) < TOLERANCE
    assert np.array_equal(model.bn.running_mean[...], tensors["bn.running_mean"])
    assert int(model.bn.num_batches_tracked[...]) == 7


@pytest.mark.parametrize("preset", PRESETS)
def test_full_size_transformers_have_the_keys_shapes_and_config_of_diffusers(preset):
    stored = unwritten(transformer_shapes(preset()))
    config = config_of(stored)
    assert flux2_transformer.config_from_dict(config) == preset()
    with torch.device("meta"):
        reference = diffusers.Flux2Transformer2DModel.from_config(config).state_dict()
    found = {key: part.shape for key, part in diffusers_tensors(stored).items()}
    assert found == {key: tuple(tensor.shape) for key, tensor in reference.items()}


def test_the_full_size_autoencoder_has_the_keys_shapes_and_config_of_diffusers():
    stored = unwritten(autoencoder_shapes(AutoencoderKLFlux2Config()))
    assert autoencoder_kl_flux2.config_from_dict(config_of(stored)) == AutoencoderKLFlux2Config()
    with torch.device("meta"):
        reference = diffusers.AutoencoderKLFlux2().state_dict()
    found = {key: part.shape for key, part in diffusers_tensors(stored).items()}
    assert found == {key: tuple(tensor.shape) for key, tensor in reference.items()}


def test_a_row_range_stays_mapped(tmp_path):
    stored = written(tmp_path / "bfl.safetensors", random_tensors(transformer_shapes(SMALL)))
    parts = diffusers_tensors(stored)
    assert isinstance(parts["transformer_blocks.1.attn.to_k.weight"].open(), np.memmap)
    assert isinstance(parts["single_transformer_blocks.2.attn.to_qkv_mlp_proj.weight"].open(), np.memmap)


def test_layouts_are_told_apart():
    assert is_bfl(transformer_shapes(SMALL))
    assert is_bfl(f"model.diffusion_model.{key}" for key in transformer_shapes(SMALL))
    assert is_bfl(autoencoder_shapes(SMALL_AUTOENCODER))
    for name in ("transformer", "vae", "text_encoder"):
        stored = stored_tensors(SHIPPED / "shapes-tiny" / name)
        assert not is_bfl(stored), name
        with pytest.raises(ClvrError, match="neither a FLUX"):
            diffusers_tensors(stored)


def without(beginning):
    return lambda shapes: {key: shape for key, shape in shapes.items() if not key.startswith(beginning)}


@pytest.mark.parametrize(
    ("shapes", "spoil", "message"),
    [
        (transformer_shapes(SMALL), without("double_blocks.0."), "double_blocks.0.img_mlp.2.weight is missing"),
        (transformer_shapes(SMALL), without("single_blocks.1."), "4 missing: single_blocks.1.linear1.weight"),
        (transformer_shapes(SMALL), without("guidance_in.in"), "1 missing: guidance_in.in_layer.weight"),
        (transformer_shapes(SMALL), without("img_in"), "img_in.weight is missing"),
        (transformer_shapes(SMALL), lambda s: {**s, "txt_in.bias": (256,)}, "1 unexpected: txt_in.bias"),
        (
            transformer_shapes(SMALL),
            lambda s: {**s, "transformer_blocks.0.attn.to_q.weight": (256, 256)},
            "1 unexpected: transformer_blocks.0.attn.to_q.weight",
        ),
        (
            transformer_shapes(SMALL),
            lambda s: {**s, "model.diffusion_model.img_in.weight": s["img_in.weight"]},
            "img_in.weight and model.diffusion_model.img_in.weight are the same",
        ),
        (
            transformer_shapes(SMALL),
            lambda s: {**s, "double_blocks.0.img_attn.qkv.weight": (768, 250)},
            r"to_q.weight \(expected \(256, 256\), found \(256, 250\)\)",
        ),
        (transformer_shapes(SMALL), lambda s: {**s, "img_in.weight_scale": ()}, "it is quantized"),
        (
            transformer_shapes(SMALL),
            lambda s: {**s, "img_in.weight": (1536,)},
            "img_in.weight has 1 axes, FLUX.2's has 2",
        ),
        (autoencoder_shapes(SMALL_AUTOENCODER), without("bn."), "3 missing: bn.num_batches_tracked"),
        (autoencoder_shapes(SMALL_AUTOENCODER), without("decoder.up.1.block.1"), "missing: decoder.up.1.block.1.conv1"),
        (
            autoencoder_shapes(SMALL_AUTOENCODER),
            lambda s: {**s, "encoder.down_blocks.0.resnets.0.conv1.bias": (32,)},
            "1 unexpected: encoder.down_blocks.0.resnets.0.conv1.bias",
        ),
        (autoencoder_shapes(SMALL_AUTOENCODER), lambda s: {}, "it has no tensors"),
        (
            transformer_shapes(SMALL),
            lambda s: {**s, "double_blocks.999999999.img_attn.proj.weight": (256, 256)},
            "names double_blocks.999999999 but has only",
        ),
        (
            autoencoder_shapes(SMALL_AUTOENCODER),
            lambda s: {**s, "decoder.up.87654321.block.0.conv1.weight": (8, 8, 3, 3)},
            "names decoder.up.87654321 but has only",
        ),
        (
            transformer_shapes(SMALL),
            lambda s: {**s, f"single_blocks.{'9' * 5000}.linear1.weight": (8, 8)},
            "1 unexpected: single_blocks.9",
        ),
        (transformer_shapes(SMALL), lambda s: {**s, "img_in.weight": (0, 12)}, r"has the shape \(0, 12\)"),
        (
            transformer_shapes(SMALL),
            lambda s: {**s, "single_blocks.0.norm.query_norm.scale": (0,)},
            r"query_norm.scale has the shape \(0,\)",
        ),
    ],
)
def test_what_is_no_whole_model_is_one_clear_error(shapes, spoil, message):
    with pytest.raises(ClvrError, match=message) as caught:
        diffusers_tensors(unwritten(spoil(shapes)))
    assert "\n" not in str(caught.value)
