import diffusers
import jax
import numpy as np
import pytest
import torch

from clvr_jax.convert.architectures.autoencoder_kl_flux2 import KEY_MAPPING, config_from_dict, config_to_dict
from clvr_jax.convert.rules import check_keys, entries, state_to_torch
from clvr_jax.errors import ClvrError
from clvr_jax.models.common.abstract import abstract_module
from clvr_jax.models.flux2 import AutoencoderKLFlux2, AutoencoderKLFlux2Config
from clvr_jax.models.flux2.autoencoder_kl import patchify, unpatchify
from tests.models.parity import TOLERANCE, load_state, randomize, relative_error, run_jitted

SMALL = AutoencoderKLFlux2Config(
    block_out_channels=(16, 32, 48), layers_per_block=1, latent_channels=6, norm_num_groups=8, sample_size=64
)


def make_pair(config):
    reference = randomize(diffusers.AutoencoderKLFlux2.from_config(config_to_dict(config)))
    model = abstract_module(lambda rngs: AutoencoderKLFlux2(config, rngs=rngs))
    load_state(model, reference, KEY_MAPPING)
    return model, reference


@pytest.mark.slow
@pytest.mark.parametrize("size", [(32, 32), (40, 24), (36, 68)])
@pytest.mark.parametrize("options", [{}, {"decoder_block_out_channels": (8, 24, 64), "mid_block_add_attention": False}])
def test_encode_and_decode_match_diffusers(size, options):
    config = AutoencoderKLFlux2Config(**{**SMALL.__dict__, **options})
    model, reference = make_pair(config)
    images = np.random.default_rng(0).uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        posterior = reference.encode(torch.tensor(images).permute(0, 3, 1, 2)).latent_dist
        decoded = reference.decode(posterior.mode()).sample.permute(0, 2, 3, 1)
    latents = posterior.mode().permute(0, 2, 3, 1).numpy()
    (mean, log_variance), ours = run_jitted(lambda m, x, z: (m.moments(x), m.decode(z)), model, images, latents)
    assert relative_error(mean, posterior.mean.permute(0, 2, 3, 1)) < TOLERANCE
    assert relative_error(log_variance, posterior.logvar.permute(0, 2, 3, 1)) < TOLERANCE
    assert relative_error(ours, decoded) < TOLERANCE


@pytest.mark.slow
def test_tokens_are_what_the_klein_pipeline_makes():
    model, reference = make_pair(SMALL)
    images = np.random.default_rng(1).uniform(-1, 1, (1, 24, 40, 3)).astype(np.float32)
    with torch.no_grad():
        latents = reference.encode(torch.tensor(images).permute(0, 3, 1, 2)).latent_dist.mode()
        patched = diffusers.Flux2KleinPipeline._patchify_latents(latents)
        mean = reference.bn.running_mean.view(1, -1, 1, 1)
        scale = torch.sqrt(reference.bn.running_var.view(1, -1, 1, 1) + reference.config.batch_norm_eps)
        tokens = ((patched - mean) / scale).permute(0, 2, 3, 1)

    def there_and_back(model, images):
        tokens = model.encode_tokens(images)
        return tokens, model.decode_tokens(tokens), model.decode(model.encode(images))

    ours, from_tokens, from_latents = run_jitted(there_and_back, model, images)
    assert ours.shape == (1, 24 // SMALL.token_pixels, 40 // SMALL.token_pixels, SMALL.token_channels)
    assert relative_error(ours, tokens) < TOLERANCE
    assert relative_error(from_tokens, from_latents) < TOLERANCE


def test_unpatchify_inverts_patchify():
    x = jax.random.normal(jax.random.key(0), (2, 4, 6, 5))
    assert np.array_equal(unpatchify(patchify(x)), x)


def test_weights_return_bit_for_bit():
    model, reference = make_pair(SMALL)
    back = state_to_torch(model, KEY_MAPPING)
    for key, tensor in reference.state_dict().items():
        assert back[key].dtype == tensor.numpy().dtype, key
        assert np.array_equal(back[key], tensor.numpy()), key


def test_full_size_keys_and_shapes_are_those_of_diffusers():
    with torch.device("meta"):
        reference = diffusers.AutoencoderKLFlux2()
    abstract = abstract_module(lambda rngs: AutoencoderKLFlux2(AutoencoderKLFlux2Config(), rngs=rngs))
    found = {key: tuple(tensor.shape) for key, tensor in reference.state_dict().items()}
    check_keys(entries(abstract, KEY_MAPPING), found, "AutoencoderKLFlux2")


def test_config_survives_the_round_trip_and_unknown_fields_are_errors():
    assert config_from_dict(config_to_dict(SMALL)) == SMALL
    with pytest.raises(ClvrError, match="unknown field 'colour_space'"):
        config_from_dict({"colour_space": "lab"})
    with pytest.raises(ClvrError, match="multiple of"):
        AutoencoderKLFlux2Config(block_out_channels=(12,), norm_num_groups=8)
