"""FLOPs counted from configurations are those the compiler counts, elementwise work aside."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from clvr_jax.cost_model.flops import (
    flux2_flops,
    qwen3_flops,
    qwen3_vl_flops,
    reference_cache_flops,
    token_passes,
)
from clvr_jax.cost_model.flops_images import decoder_flops, encoder_flops, unet_flops
from clvr_jax.errors import ClvrError
from clvr_jax.models.common.abstract import abstract_module
from clvr_jax.models.flux2 import (
    AutoencoderKLFlux2,
    AutoencoderKLFlux2Config,
    Flux2Transformer,
    Flux2TransformerConfig,
    ReferenceCache,
)
from clvr_jax.models.flux2.position_ids import latent_ids, reference_ids, text_ids
from clvr_jax.models.flux2.reference_cache import KeyValue
from clvr_jax.models.qwen3 import Qwen3, Qwen3Config
from clvr_jax.models.qwen3_vl import Qwen3VL, Qwen3VLConfig, Qwen3VLTextConfig, Qwen3VLVisionConfig
from clvr_jax.models.stable_diffusion import UNet2DCondition, UNet2DConditionConfig

FLUX = Flux2TransformerConfig(
    num_layers=1, num_single_layers=2, num_attention_heads=8, joint_attention_dim=512, guidance_embeds=False
)
TEXT, SIDE, BATCH = 64, 16, 2


@pytest.fixture(autouse=True)
def unrolled(monkeypatch):
    """The compiler counts a loop's body once, so loops over layers are written out."""
    monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))

    def fori_loop(start, stop, body, carry):
        for i in range(start, stop):
            carry = body(i, carry)
        return carry

    monkeypatch.setattr(jax.lax, "fori_loop", fori_loop)


def compiled_flops(function, make_model, *inputs):
    """What the compiler counts for function(model, *inputs), shapes only: nothing is allocated or run."""
    graphdef, state = nnx.split(abstract_module(make_model))
    program = jax.jit(lambda state, *inputs: function(nnx.merge(graphdef, state), *inputs))
    return program.lower(state, *inputs).compile().cost_analysis()["flops"]


def compiled_training_flops(function, make_model, *inputs):
    """The same for the gradient of the mean square of what the function returns, with respect to the weights."""
    graphdef, state = nnx.split(abstract_module(make_model))

    def loss(state, *inputs):
        return jnp.mean(jnp.square(function(nnx.merge(graphdef, state), *inputs)))

    return jax.jit(jax.grad(loss)).lower(state, *inputs).compile().cost_analysis()["flops"]


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def velocity(model, latents, text, timestep):
    return model(latents, text, timestep, latent_ids(SIDE, SIDE), text_ids(TEXT))


FLUX_INPUTS = (array(BATCH, SIDE * SIDE, 128), array(BATCH, TEXT, 512), array(BATCH))


def flux(rngs, remat="full"):
    return Flux2Transformer(FLUX, rngs=rngs, remat=remat)


def test_flux2_forward():
    counted = flux2_flops(FLUX, BATCH, text=TEXT, image=SIDE * SIDE).forward
    assert compiled_flops(velocity, flux, *FLUX_INPUTS) == pytest.approx(counted, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "dots", "attention"])
def test_flux2_training(remat):
    counted = flux2_flops(FLUX, BATCH, text=TEXT, image=SIDE * SIDE).hardware(remat)
    compiled = compiled_training_flops(velocity, functools.partial(flux, remat=remat), *FLUX_INPUTS)
    assert compiled == pytest.approx(counted, rel=0.01)


def cached(tokens):
    def blocks(depth):
        return KeyValue(*(array(depth, BATCH, tokens, FLUX.num_attention_heads, FLUX.attention_head_dim),) * 2)

    return ReferenceCache(blocks(FLUX.num_layers), blocks(FLUX.num_single_layers))


def test_flux2_with_cached_references():
    def attend(model, latents, text, timestep, cache):
        return model(latents, text, timestep, latent_ids(SIDE, SIDE), text_ids(TEXT), cached=(cache,))

    counted = flux2_flops(FLUX, BATCH, text=TEXT, image=SIDE * SIDE, cached=3 * SIDE).forward
    assert compiled_flops(attend, flux, *FLUX_INPUTS, cached(3 * SIDE)) == pytest.approx(counted, rel=0.01)


def test_the_cache_of_a_reference_that_follows_another():
    def cache(model, tokens, earlier):
        return model.reference_cache(tokens, reference_ids([(SIDE, SIDE)], 1), earlier=(earlier,))

    counted = reference_cache_flops(FLUX, BATCH, references=SIDE * SIDE, earlier=3 * SIDE).forward
    # Of the last block, only keys and values are needed, and the compiler may leave out the rest.
    d, tokens = FLUX.inner_dim, SIDE * SIDE
    unused = 2 * d * (2 * d + 3 * FLUX.mlp_dim) * tokens + 4 * tokens * (tokens + 3 * SIDE) * d
    compiled = compiled_flops(cache, flux, FLUX_INPUTS[0], cached(3 * SIDE))
    assert 0.99 * (counted - BATCH * unused) < compiled < 1.01 * counted


def test_token_passes_of_eight_images_of_1024_x_1024():
    """Of a loop in 4 steps with a text of 512 tokens."""

    def passes(mode):
        counts = (token_passes(mode, steps=4, text=512, image=4096, references=number) for number in range(8))
        return sum(counts)

    assert passes("none") == 606_208
    assert passes("image") == 262_144
    assert passes("loop") == 176_128


def test_klein_4b_with_four_references():
    """A token meets each weight of a block once; of a double-stream block that is the half of its own stream."""
    flops = flux2_flops(Flux2TransformerConfig.klein_4b(), 1, text=512, image=4096, references=4 * 4096)
    tokens, d, blocks = 512 + 5 * 4096, 3072, 5 + 20
    assert flops.projections == 2 * tokens * blocks * (4 * d * d + 3 * d * 3 * d)
    assert flops.attention == 4 * tokens**2 * blocks * d
    assert flops.attention > 0.6 * flops.projections  # the closed loop pays for its history here


QWEN3 = Qwen3Config(
    vocab_size=1024, hidden_size=512, intermediate_size=1536, num_hidden_layers=3, num_attention_heads=8,
    num_key_value_heads=2, head_dim=128,
)  # fmt: skip


def qwen3(rngs):
    return Qwen3(QWEN3, rngs=rngs, remat="full")


@pytest.mark.slow
def test_qwen3_forward_and_training():
    counted, ids = qwen3_flops(QWEN3, BATCH, 128), array(BATCH, 128, dtype=jnp.int32)
    assert compiled_flops(Qwen3.__call__, qwen3, ids) == pytest.approx(counted.forward, rel=0.01)
    assert compiled_training_flops(Qwen3.__call__, qwen3, ids) == pytest.approx(counted.hardware("full"), rel=0.01)


def test_qwen3_as_text_encoder_runs_only_the_layers_it_needs():
    counted = qwen3_flops(QWEN3, BATCH, 128, layers=2, logits=0).forward
    compiled = compiled_flops(
        lambda model, ids: model.hidden_states(ids, layers=(1, 2)), qwen3, array(BATCH, 128, dtype=jnp.int32)
    )
    assert compiled == pytest.approx(counted, rel=0.01)


def test_qwen3_vl():
    vision = Qwen3VLVisionConfig(
        depth=3, hidden_size=512, intermediate_size=2048, num_heads=8, out_hidden_size=512,
        deepstack_visual_indexes=(0, 2),
    )  # fmt: skip
    text = Qwen3VLTextConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1536, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2,
    )  # fmt: skip
    config = Qwen3VLConfig(text, vision)
    grids, tokens = ((1, 16, 16), (1, 8, 12)), 128
    pixels = array(BATCH, 16 * 16 + 8 * 12, vision.patch_features)
    compiled = compiled_flops(
        lambda model, ids, pixels: model(ids, pixels, grids),
        lambda rngs: Qwen3VL(config, rngs=rngs),
        array(BATCH, tokens, dtype=jnp.int32),
        pixels,
    )
    assert compiled == pytest.approx(qwen3_vl_flops(config, BATCH, tokens, grids).forward, rel=0.01)


@pytest.mark.slow
def test_autoencoder():
    config = AutoencoderKLFlux2Config(block_out_channels=(64, 128, 256))

    def vae(rngs):
        return AutoencoderKLFlux2(config, rngs=rngs)

    encode = compiled_flops(lambda model, x: model.encode(x), vae, array(BATCH, 512, 384, 3))
    decode = compiled_flops(lambda model, x: model.decode(x), vae, array(BATCH, 128, 96, 32))
    assert encode == pytest.approx(encoder_flops(config, BATCH, 512, 384).forward, rel=0.02)
    assert decode == pytest.approx(decoder_flops(config, BATCH, 512, 384).forward, rel=0.02)


@pytest.mark.slow
def test_unet():
    config = UNet2DConditionConfig(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(128, 256), cross_attention_dim=512, transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=32, projection_class_embeddings_input_dim=256,
    )  # fmt: skip
    compiled = compiled_flops(
        lambda model, x, t, text, pooled, ids: model(x, t, text, text_embeds_bd=pooled, time_ids_b6=ids),
        lambda rngs: UNet2DCondition(config, rngs=rngs),
        array(BATCH, 96, 64, 4), array(BATCH), array(BATCH, 77, 512), array(BATCH, 64), array(BATCH, 6),
    )  # fmt: skip
    assert compiled == pytest.approx(unet_flops(config, BATCH, 96, 64, 77).forward, rel=0.02)


def test_unknown_remat():
    with pytest.raises(ClvrError, match="the policies are dots, attention, full"):
        flux2_flops(FLUX, 1, text=1, image=1).hardware("some")
