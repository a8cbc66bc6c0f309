import dataclasses
import json

import diffusers
import numpy as np
import pytest
import torch

from clvr_jax.convert.architectures.autoencoder_kl import (
    KEY_MAPPING,
    canonicalize_keys,
    config_from_dict,
    config_to_dict,
)
from clvr_jax.convert.rules import check_keys, entries, state_to_torch
from clvr_jax.errors import ClvrError
from clvr_jax.models.common.abstract import abstract_module
from clvr_jax.models.stable_diffusion import AutoencoderKL, AutoencoderKLConfig
from tests.models.parity import TOLERANCE, load_state, randomize, relative_error, run_jitted

SMALL = AutoencoderKLConfig(block_out_channels=(16, 32, 48), latent_channels=6, norm_num_groups=8)


def make_pair(config):
    reference = randomize(diffusers.AutoencoderKL.from_config(config_to_dict(config)))
    model = abstract_module(lambda rngs: AutoencoderKL(config, rngs=rngs))
    load_state(model, reference, KEY_MAPPING)
    return model, reference


@pytest.mark.slow
@pytest.mark.parametrize("size", [(40, 24), (36, 68)])
@pytest.mark.parametrize(
    "options", [{}, {"mid_block_add_attention": False, "use_quant_conv": False, "use_post_quant_conv": False}]
)
def test_encode_and_decode_match_diffusers(size, options):
    model, reference = make_pair(dataclasses.replace(SMALL, **options))
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
def test_scaled_latents_are_what_the_pipelines_make():
    model, _ = make_pair(dataclasses.replace(SMALL, scaling_factor=0.3, shift_factor=0.1))
    images = np.random.default_rng(1).uniform(-1, 1, (1, 8, 12, 3)).astype(np.float32)

    def there_and_back(model, images):
        scaled, latents = model.encode_scaled(images), model.encode(images)
        return scaled, latents, model.decode_scaled(scaled), model.decode(latents)

    scaled, latents, from_scaled, from_latents = run_jitted(there_and_back, model, images)
    assert relative_error(scaled, (np.asarray(latents) - 0.1) * 0.3) < TOLERANCE
    assert relative_error(from_scaled, from_latents) < TOLERANCE


def test_weights_return_bit_for_bit():
    model, reference = make_pair(SMALL)
    back = state_to_torch(model, KEY_MAPPING)
    assert back.keys() == reference.state_dict().keys()
    for key, tensor in reference.state_dict().items():
        assert np.array_equal(back[key], tensor.numpy()), key


def test_old_names_of_attention_are_understood_as_diffusers_understands_them(tmp_path):
    _, reference = make_pair(SMALL)
    reference.save_pretrained(tmp_path)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, tensor in reference.state_dict().items():
        owner, _, kind = key.rpartition(".")
        new = next((name for name in names if owner.endswith(f"attentions.0.{name}")), None)
        old[f"{owner.removesuffix(new)}{names[new]}.{kind}" if new else key] = tensor
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in old
    assert not any("to_q" in key or "to_out" in key for key in old)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(old, tmp_path / "diffusion_pytorch_model.bin")
    loaded = diffusers.AutoencoderKL.from_pretrained(tmp_path, use_safetensors=False).state_dict()
    found = canonicalize_keys(old)
    assert found.keys() == loaded.keys()
    for key, tensor in loaded.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("preset", [AutoencoderKLConfig.sdxl, AutoencoderKLConfig.sd15])
def test_full_size_keys_and_shapes_are_those_of_diffusers(preset):
    config = preset()
    with torch.device("meta"):
        reference = diffusers.AutoencoderKL.from_config(config_to_dict(config))
    abstract = abstract_module(lambda rngs: AutoencoderKL(config, rngs=rngs))
    check_keys(
        entries(abstract, KEY_MAPPING), {key: tuple(t.shape) for key, t in reference.state_dict().items()}, "meta"
    )
    assert config_from_dict(json.loads(reference.to_json_string())) == config


@pytest.mark.parametrize(
    "fields",
    [
        {"act_fn": "gelu"},
        {"latents_mean": [0.0]},
        {"down_block_types": ["AttnDownEncoderBlock2D"]},
        {"block_out_channels": [12]},
        {"colour_space": "lab"},
    ],
)
def test_what_is_not_supported_is_refused(fields):
    with pytest.raises(ClvrError, match=next(iter(fields))):
        config_from_dict({**config_to_dict(SMALL), **fields})
