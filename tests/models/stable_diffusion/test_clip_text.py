import json

import numpy as np
import pytest
import torch
import transformers

from clvr_jax.convert.architectures import CLIP_TEXT, CLIP_TEXT_PROJECTED
from clvr_jax.convert.architectures.clip_text import KEY_MAPPING, canonicalize_keys, config_from_dict, config_to_dict
from clvr_jax.convert.models import save_model
from clvr_jax.convert.rules import check_keys, entries, state_to_torch
from clvr_jax.errors import ClvrError
from clvr_jax.models.common.abstract import abstract_module
from clvr_jax.models.stable_diffusion import CLIPText, CLIPTextConfig
from tests.helpers.models import random_module
from tests.models.parity import TOLERANCE, load_tensors, randomize, relative_error

EOS = 90
SMALL = CLIPTextConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    max_position_embeddings=11,
    eos_token_id=EOS,
    projection_dim=20,
)
PRESETS = [CLIPTextConfig.clip_vit_l(), CLIPTextConfig.open_clip_vit_bigg()]


def change(config, **fields):
    return CLIPTextConfig(**{**config.__dict__, **fields})


def make_reference(config):
    fields = config_to_dict(config)
    return getattr(transformers, fields["architectures"][0])(transformers.CLIPTextConfig(**fields))


def tensors_of(reference):
    return canonicalize_keys({key: tensor.numpy() for key, tensor in reference.state_dict().items()})


def make_pair(config):
    reference = randomize(make_reference(config))
    model = abstract_module(lambda rngs: CLIPText(config, rngs=rngs))
    load_tensors(model, tensors_of(reference), KEY_MAPPING)
    return model, reference


def make_ids(padding):
    """Texts of 3, 7 and 11 tokens, the last of them EOS, the largest id; `padding` after it."""
    ids = np.random.default_rng(0).integers(1, EOS, (3, 11))
    for row, length in enumerate((3, 7, 11)):
        ids[row, length - 1 :] = [EOS] + [padding] * (11 - length)
    return ids


def run_reference(reference, ids):
    with torch.no_grad():
        return reference(torch.tensor(ids), output_hidden_states=True)


@pytest.mark.slow
@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize(("eos", "padding"), [(EOS, EOS), (EOS, 0), (EOS, 96), (2, EOS), (2, 0)])
def test_every_output_with_projection_matches_transformers(hidden_act, eos, padding):
    model, reference = make_pair(change(SMALL, hidden_act=hidden_act, eos_token_id=eos))
    ids = make_ids(padding)
    ours, theirs = model(ids), run_reference(reference, ids)
    assert len(ours.hidden_states_lbtd) == len(theirs.hidden_states) == 4
    for mine, expected in zip(ours.hidden_states_lbtd, theirs.hidden_states, strict=True):
        assert relative_error(mine, expected) < TOLERANCE
    assert relative_error(ours.last_hidden_state_btd, theirs.last_hidden_state) < TOLERANCE
    assert relative_error(ours.text_embeds_bp, theirs.text_embeds) < TOLERANCE


def test_pooled_output_and_clip_skip_match_transformers_without_projection():
    model, reference = make_pair(change(SMALL, projection_dim=None))
    ids = make_ids(EOS)
    theirs = run_reference(reference, ids)
    for skip in range(4):
        ours = model(ids, clip_skip=skip)
        assert ours.text_embeds_bp is None
        assert relative_error(ours.pooler_output_bd, theirs.pooler_output) < TOLERANCE
        # As StableDiffusionPipeline.encode_prompt does it.
        expected = reference.final_layer_norm(theirs.hidden_states[-(skip + 1)])
        assert relative_error(ours.last_hidden_state_btd, expected) < TOLERANCE


@pytest.mark.parametrize("projection_dim", [None, 20])
def test_the_way_back_is_bit_for_bit_and_transformers_loads_the_folder(tmp_path, projection_dim):
    config = change(SMALL, projection_dim=projection_dim)
    model, reference = make_pair(config)
    tensors, back = tensors_of(reference), state_to_torch(model, KEY_MAPPING)
    assert tensors.keys() == back.keys()
    assert all(np.array_equal(tensors[key], back[key]) for key in tensors)
    save_model(tmp_path / "encoder", model, CLIP_TEXT if projection_dim is None else CLIP_TEXT_PROJECTED)
    loaded, report = type(reference).from_pretrained(tmp_path / "encoder", output_loading_info=True)
    assert not any(report.values())
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in reference.state_dict().items())


@pytest.mark.parametrize("preset", PRESETS)
def test_full_size_keys_and_shapes_are_those_of_transformers(preset):
    with torch.device("meta"):
        reference = make_reference(preset)
    model = abstract_module(lambda rngs: CLIPText(preset, rngs=rngs))
    shapes = {key: tuple(tensor.shape) for key, tensor in canonicalize_keys(reference.state_dict()).items()}
    check_keys(entries(model, KEY_MAPPING), shapes, "meta")


def test_old_buffers_and_the_vision_tower_are_left_out_and_names_without_prefix_understood():
    tensors = tensors_of(make_reference(SMALL))
    more = ("text_model.embeddings.position_ids", "vision_model.post_layernorm.bias", "logit_scale")
    assert canonicalize_keys({**tensors, **dict.fromkeys(more)}).keys() == tensors.keys()
    bare = {"embeddings.position_ids": None, "final_layer_norm.bias": None}
    assert list(canonicalize_keys(bare)) == ["text_model.final_layer_norm.bias"]


@pytest.mark.parametrize("config", [SMALL, change(SMALL, projection_dim=None), *PRESETS])
def test_configs_survive_the_way_through_json_and_transformers(config):
    fields = config_to_dict(config)
    assert config_from_dict(json.loads(json.dumps(fields))) == config
    assert config_from_dict(transformers.CLIPTextConfig(**fields).to_dict()) == config


def test_a_nested_config_takes_the_width_of_the_projection_from_outside():
    text = transformers.CLIPTextConfig(**{**config_to_dict(SMALL), "projection_dim": 512, "architectures": None})
    whole = transformers.CLIPConfig(text_config=text.to_dict(), projection_dim=20, architectures=["CLIPModel"])
    assert config_from_dict(whole.to_dict()) == SMALL


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"projection_dim": -1}, "projection_dim"),
        ({"eos_token_id": [1, 2]}, "eos_token_id"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"rope_theta": 1e4}, "rope_theta"),
        ({"architectures": ["T5EncoderModel"]}, "T5EncoderModel"),
    ],
)
def test_models_we_cannot_run_are_refused(fields, message):
    with pytest.raises(ClvrError, match=message):
        config_from_dict({**config_to_dict(SMALL), **fields})


def test_wrong_calls_are_refused():
    model = random_module(lambda rngs: CLIPText(SMALL, rngs=rngs))
    with pytest.raises(ClvrError, match="max_position_embeddings 11"):
        model(np.zeros((1, 12), np.int32))
    with pytest.raises(ClvrError, match=r"in 0\.\.3"):
        model(make_ids(0), clip_skip=4)
