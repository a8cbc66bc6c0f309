import dataclasses
import json
import re

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from clvr_jax.convert.architectures.unet_2d_condition import config_from_dict, config_to_dict, key_mapping
from clvr_jax.convert.rules import check_keys, entries, state_to_torch
from clvr_jax.errors import ClvrError
from clvr_jax.models.common.abstract import abstract_module
from clvr_jax.models.stable_diffusion import UNet2DCondition, UNet2DConditionConfig
from clvr_jax.models.stable_diffusion.unet_blocks import Transformer
from clvr_jax.sharding import MeshConfig, MeshLayout
from tests.models.parity import TOLERANCE, load_state, randomize, relative_error

SDXL = dataclasses.replace(
    UNet2DConditionConfig.sdxl(),
    block_out_channels=(16, 24, 32),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=20,
    transformer_layers_per_block=(1, 2, 3),
    attention_head_dim=(2, 3, 4),
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=60,
)
# Both kinds of blocks and as many kinds of layers, in two levels: a third of the time to compile.
TWO_LEVEL_SDXL = dataclasses.replace(
    SDXL,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(16, 24),
    transformer_layers_per_block=(1, 2),
    attention_head_dim=(2, 3),
)
SD15 = dataclasses.replace(
    UNet2DConditionConfig.sd15(),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    block_out_channels=(16, 24),
    norm_num_groups=8,
    cross_attention_dim=12,
    attention_head_dim=4,
)


def make_pair(config, **options):
    reference = randomize(diffusers.UNet2DConditionModel.from_config(config_to_dict(config)))
    model = abstract_module(lambda rngs: UNet2DCondition(config, rngs=rngs, **options))
    load_state(model, reference, key_mapping(config))
    return model, reference


def make_inputs(config, size=(8, 12), text=7, batch=2, seed=0):
    random = np.random.default_rng(seed)
    inputs = {
        "latents_bhwc": random.normal(size=(batch, *size, config.in_channels)),
        "timestep_b": random.integers(0, 1000, batch),
        "text_bsd": random.normal(size=(batch, text, config.cross_attention_dim)),
    }
    if config.addition_embed_type:
        inputs["time_ids_b6"] = random.integers(0, 1024, (batch, 6))
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["text_embeds_bd"] = random.normal(size=(batch, width))
    if config.time_cond_proj_dim:
        inputs["timestep_cond_bd"] = random.normal(size=(batch, config.time_cond_proj_dim))
    return {name: array.astype(np.float32) for name, array in inputs.items()}


def run(model, inputs):
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state, inputs: nnx.merge(graphdef, state)(**inputs))(state, inputs)


def run_reference(reference, inputs, dtype=torch.float32):
    tensors = {name: torch.tensor(array) for name, array in inputs.items()}
    for name in tensors.keys() - {"timestep_b", "time_ids_b6"}:
        tensors[name] = tensors[name].to(dtype)
    added = {"text_embeds": tensors.get("text_embeds_bd"), "time_ids": tensors.get("time_ids_b6")}
    out = reference(
        tensors["latents_bhwc"].permute(0, 3, 1, 2),
        tensors["timestep_b"],
        tensors["text_bsd"],
        timestep_cond=tensors.get("timestep_cond_bd"),
        added_cond_kwargs=added,
    )
    return out.sample.permute(0, 2, 3, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "size", "text"),
    [
        (TWO_LEVEL_SDXL, (8, 12), 77),
        (dataclasses.replace(SDXL, time_cond_proj_dim=10), (9, 7), 1),
        (SD15, (5, 9), 33),
        (dataclasses.replace(SD15, time_cond_proj_dim=6, in_channels=9), (6, 4), 5),
    ],
)
def test_output_matches_diffusers(config, size, text):
    model, reference = make_pair(config)
    inputs = make_inputs(config, size, text)
    with torch.no_grad():
        expected = run_reference(reference, inputs)
    assert relative_error(run(model, inputs), expected) < TOLERANCE


@pytest.mark.slow
def test_timesteps_match_diffusers_at_the_published_width():
    config = dataclasses.replace(
        SD15,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        block_out_channels=(320,),
        layers_per_block=1,
    )
    model, reference = make_pair(config)
    inputs = make_inputs(config, (1, 1), batch=9)
    inputs["timestep_b"] = np.array([0, 1, 13, 333, 501, 750, 951, 998, 999], np.float32)
    with torch.no_grad():
        expected = run_reference(reference, inputs)
    ours = run(model, inputs)
    assert max(relative_error(a, b) for a, b in zip(ours, expected, strict=True)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("config", [TWO_LEVEL_SDXL, SD15])
def test_bfloat16_matches_diffusers_in_bfloat16(config):
    _, reference = make_pair(config)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            # With plainly random weights a branch is as loud as what it is added to, and roundings grow from block to
            # block: PyTorch's own bfloat16 is then 1.5e-2 from its float32. Branches of trained networks are quiet.
            if re.search(r"(conv2|proj_out|to_out\.0|net\.2)\.weight", name):
                parameter *= 0.1
            parameter.copy_(parameter.bfloat16())
    model = abstract_module(lambda rngs: UNet2DCondition(config, rngs=rngs, dtype=jnp.bfloat16))
    load_state(model, reference, key_mapping(config))
    inputs = make_inputs(config, (16, 16))
    with torch.no_grad():
        expected = run_reference(reference.bfloat16(), inputs, torch.bfloat16)
    assert relative_error(run(model, inputs).astype(jnp.float32), expected) < 1e-2


@pytest.mark.slow
def test_gradients_match_pytorch_with_and_without_remat():
    inputs = make_inputs(TWO_LEVEL_SDXL, (4, 6))

    def gradients(remat):
        model, reference = make_pair(TWO_LEVEL_SDXL, remat=remat)
        graphdef, state = nnx.split(model)
        loss = jax.jit(jax.grad(lambda state: jnp.square(nnx.merge(graphdef, state)(**inputs)).mean()))
        return state_to_torch(loss(state), key_mapping(TWO_LEVEL_SDXL)), reference

    (plain, reference), (rematerialised, _) = gradients("dots"), gradients("full")
    run_reference(reference, inputs).square().mean().backward()
    for name, parameter in reference.named_parameters():
        assert relative_error(rematerialised[name], plain[name]) < TOLERANCE, name
        assert relative_error(plain[name], parameter.grad) < TOLERANCE, name


@pytest.mark.slow
@pytest.mark.parametrize("config", [SDXL, SD15])
def test_weights_return_bit_for_bit(config):
    model, reference = make_pair(config)
    back = state_to_torch(model, key_mapping(config))
    assert back.keys() == reference.state_dict().keys()
    for key, tensor in reference.state_dict().items():
        assert np.array_equal(back[key], tensor.numpy()), key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "billions"), [(UNet2DConditionConfig.sdxl(), 2.567), (UNet2DConditionConfig.sd15(), 0.860)]
)
def test_full_size_keys_and_shapes_are_those_of_diffusers(config, billions):
    with torch.device("meta"):
        reference = diffusers.UNet2DConditionModel.from_config(config_to_dict(config))
    model = abstract_module(lambda rngs: UNet2DCondition(config, rngs=rngs))
    shapes = {key: tuple(tensor.shape) for key, tensor in reference.state_dict().items()}
    check_keys(entries(model, key_mapping(config)), shapes, "meta")
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) / 1e9 == pytest.approx(billions, abs=5e-4)
    # What diffusers itself writes, null fields included.
    assert config_from_dict(json.loads(reference.to_json_string())) == config


def test_the_config_of_the_published_sdxl_is_accepted():
    published = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.19.0.dev0",
        **{key: value for key, value in config_to_dict(UNet2DConditionConfig.sdxl()).items() if key != "dropout"},
        "upcast_attention": None,
        "mid_block_only_cross_attention": None,
        "addition_embed_type_num_heads": 64,
    }
    assert config_from_dict(json.loads(json.dumps(published))) == UNet2DConditionConfig.sdxl()


@pytest.mark.parametrize(
    "fields",
    [
        {"class_embed_type": "timestep"},
        {"mid_block_type": "UNetMidBlock2D"},
        {"down_block_types": ["AttnDownBlock2D"] * 3},
        {"up_block_types": ["UpBlock2D"]},
        {"transformer_layers_per_block": [1, [2, 2], 3]},
        {"attention_head_dim": [2, 4]},
        {"block_out_channels": [16, 24, 30]},
        {"layers_per_block": [1, 1, 1]},
        {"addition_embed_type": "image"},
        {"colour_space": "lab"},
    ],
)
def test_what_is_not_supported_is_refused(fields):
    with pytest.raises(ClvrError, match=next(iter(fields))):
        config_from_dict({**config_to_dict(SDXL), **fields})


@pytest.mark.slow
def test_wrong_calls_are_refused_in_one_line():
    inputs = make_inputs(SDXL)
    model = abstract_module(lambda rngs: UNet2DCondition(SDXL, rngs=rngs))
    wrong = {
        "latents have shape": {"latents_bhwc": inputs["latents_bhwc"][..., :3]},
        "text has shape": {"text_bsd": inputs["text_bsd"][..., :3]},
        "needs text_embeds_bd": {"text_embeds_bd": None},
        "needs time_ids_b6": {"time_ids_b6": None},
        "does not take timestep_cond_bd": {"timestep_cond_bd": np.zeros((2, 4), np.float32)},
        "embed to 52 features": {"time_ids_b6": inputs["time_ids_b6"][:, :5]},
    }
    for message, change in wrong.items():
        with pytest.raises(ClvrError, match=message):
            model(**{**inputs, **change})


@pytest.mark.slow
def test_a_sequence_axis_shards_the_tokens_of_transformers():
    """Each of four devices computes a quarter, although 2 heads are too few for them."""
    options = {"groups": 4, "heads": 2, "depth": 2, "linear": True, "remat": "dots"}
    model = Transformer(16, 20, **options, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32)
    graphdef, state = nnx.split(model)
    random = np.random.default_rng(0)
    x, text = (random.normal(size=shape).astype(np.float32) for shape in ((1, 16, 12, 16), (1, 7, 20)))

    def compiled():
        return jax.jit(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs)).lower(state, x, text).compile()

    alone = compiled()
    with MeshLayout(MeshConfig(fsdp=1, sequence=4, devices=4).make()).active():
        sharded = compiled()
        together = sharded(state, x, text)
    assert relative_error(together, alone(state, x, text)) < TOLERANCE
    assert sharded.cost_analysis()["flops"] < 0.35 * alone.cost_analysis()["flops"]
