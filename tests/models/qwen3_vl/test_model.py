"""Qwen3-VL computes what transformers' model computes, from positions to logits, and converts there and back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Qwen3VLConfig as ReferenceConfig
from transformers import Qwen3VLForConditionalGeneration

from clvr_jax.convert.architectures.qwen3_vl import KEY_MAPPING, config_from_dict, config_to_dict
from clvr_jax.convert.rules import check_keys, entries, leaves_of, state_to_torch
from clvr_jax.errors import ClvrError
from clvr_jax.models.common.abstract import abstract_module
from clvr_jax.models.qwen3.layers import inverse_frequencies
from clvr_jax.models.qwen3_vl import Qwen3VL, Qwen3VLConfig
from clvr_jax.models.qwen3_vl.positions import (
    Conversation,
    as_grids,
    batch_conversations,
    merged_tokens,
    mrope_positions,
)
from tests.models.parity import TOLERANCE, load_tensors, relative_error
from tests.models.qwen3_vl.reference import (
    SMALL,
    checkpoint_of,
    compiled,
    conversation,
    make_pair,
    pad,
    reference_inputs,
)

ODD = ((1, 8, 8), (1, 6, 10), (1, 12, 4), (1, 14, 18))
MROPE = {"image_token_id": SMALL.image_token_id, "merge": SMALL.vision.spatial_merge_size}


@pytest.fixture(scope="module")
def pair():
    return make_pair()


def positions_of(ids_bt, grids, mask_bt=None):
    return mrope_positions(ids_bt, grids, attention_mask_bt=mask_bt, **MROPE)


def inputs_of_layers(reference, **inputs):
    """What enters every language layer of the PyTorch model and leaves the last, and its output."""
    seen = []
    layers = reference.model.language_model.layers
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
        for layer in layers
    ]
    norm = reference.model.language_model.norm
    hooks.append(norm.register_forward_pre_hook(lambda _, args: seen.append(args[0])))
    with torch.no_grad():
        output = reference(**inputs)
    for hook in hooks:
        hook.remove()
    return seen, output


@pytest.mark.parametrize("grids", [((1, 8, 8),), ODD, ((1, 6, 6),) * 3, ((1, 2, 30), (2, 4, 6), (1, 2, 2))])
def test_vision_tower_block_by_block(pair, grids):
    model, reference = pair
    patches = conversation(np.random.default_rng(1), grids, 1)[1]
    with torch.no_grad():
        expected = reference.model.visual(
            torch.tensor(patches), grid_thw=torch.tensor(grids), output_hidden_states=True
        )
    arguments = {"pixel_values_bnp": patches[None], "grid_thw": grids, "return_hidden": True}
    features = compiled(model.model.visual, **arguments)
    for ours, block in zip(features.hidden_lbnd, expected.hidden_states[1:], strict=True):
        assert relative_error(ours[0], block) < TOLERANCE
    for ours, feature in zip(features.deepstack_kbnd, expected.deepstack_features, strict=True):
        assert relative_error(ours[0], feature) < TOLERANCE
    assert relative_error(features.tokens_bnd[0], expected.pooler_output) < TOLERANCE


def test_deepstack_features_of_blocks_that_are_not_the_first():
    vision = dataclasses.replace(SMALL.vision, depth=5, deepstack_visual_indexes=(1, 4))
    model, reference = make_pair(dataclasses.replace(SMALL, vision=vision), seed=3)
    patches = conversation(np.random.default_rng(1), ODD, 1)[1]
    with torch.no_grad():
        expected = reference.model.visual(torch.tensor(patches), grid_thw=torch.tensor(ODD))
    features = compiled(model, "encode_images", pixel_values=patches, grid_thw=ODD)
    assert features.deepstack_kbnd.shape[0] == 2
    for ours, feature in zip(features.deepstack_kbnd, expected.deepstack_features, strict=True):
        assert relative_error(ours[0], feature) < TOLERANCE
    assert relative_error(features.tokens_bnd[0], expected.pooler_output) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("grids", "text"), [(((1, 8, 8),), 5), (ODD, 11), (ODD, 140)], ids=["one", "odd", "long"])
def test_every_layer_and_the_logits(pair, grids, text):
    model, reference = pair
    ids, patches = conversation(np.random.default_rng(2), grids, text)
    ids_bt = np.array([ids])
    assert text < 100 or ids_bt.shape[1] > 600
    hidden, output = inputs_of_layers(reference, **reference_inputs(ids_bt, patches, grids))
    positions_3bt, _ = positions_of(ids_bt, [grids])
    arguments = {"input_ids_bt": ids_bt, "pixel_values": patches, "grid_thw": grids, "positions_3bt": positions_3bt}
    ours = compiled(model, "hidden_states", **arguments)
    assert len(hidden) == ours.shape[0] == SMALL.text.num_hidden_layers + 1
    for layer, expected in zip(ours, hidden, strict=True):
        assert relative_error(layer, expected) < TOLERANCE
    assert relative_error(compiled(model, **arguments), output.logits) < TOLERANCE


def test_an_untied_head_and_text_alone():
    model, reference = make_pair(dataclasses.replace(SMALL, tie_word_embeddings=False), seed=5)
    assert "lm_head.weight" in checkpoint_of(reference)
    ids_bt = np.random.default_rng(0).integers(0, 700, (2, 37))
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor(ids_bt)).logits
    assert relative_error(compiled(model, input_ids_bt=ids_bt), expected) < TOLERANCE


def test_bfloat16_is_as_near_to_float32_as_the_reference_is():
    torch.manual_seed(0)
    reference = Qwen3VLForConditionalGeneration(ReferenceConfig(**config_to_dict(SMALL))).eval()
    model = abstract_module(lambda rngs: Qwen3VL(SMALL, rngs=rngs, dtype=jnp.bfloat16))
    load_tensors(model, checkpoint_of(reference), KEY_MAPPING)
    ids, patches = conversation(np.random.default_rng(2), ODD, 11)
    inputs = reference_inputs(np.array([ids]), patches, ODD)
    ours = compiled(model, **batch_conversations([Conversation(ids, patches, ODD)], **MROPE, length_multiple=1))
    with torch.no_grad():
        exact = reference(**inputs).logits
        rounded = reference.bfloat16()(**inputs).logits.float()
    assert relative_error(ours, exact) < 1e-2
    assert relative_error(ours, exact) < 1.5 * relative_error(rounded, exact)


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_of_padded_batches(pair, side):
    _, reference = pair
    rng = np.random.default_rng(4)
    grids = [ODD, ODD[:1], ((1, 4, 22), (1, 10, 2))]
    rows = [conversation(rng, own, text)[0] for own, text in zip(grids, (7, 20, 1), strict=True)]
    ids_bt, mask_bt = pad(rows, side)
    inputs = reference_inputs(ids_bt, np.zeros(1), sum(grids, ()), mask_bt)
    expected, deltas = reference.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"], None, inputs["attention_mask"]
    )
    ours, ours_delta = positions_of(ids_bt, grids, mask_bt)
    np.testing.assert_array_equal(ours, expected.numpy())
    np.testing.assert_array_equal(ours_delta, deltas[:, 0].numpy())


@pytest.mark.parametrize(("head_dim", "theta"), [(128, 5e6), (36, 1e4), (32, 1e4)])
def test_frequencies_of_the_released_models_differ_by_roundings_only(head_dim, theta):
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
    np.testing.assert_allclose(inverse_frequencies(head_dim, theta), 1.0 / (theta**exponents), rtol=5e-7)


@pytest.mark.slow
@pytest.mark.parametrize(("side", "grids"), [("right", [ODD[:1], ODD[:1] * 2, ()]), ("left", [ODD, ODD[1:3], ODD[:1]])])
def test_a_padded_batch_equals_its_rows(pair, side, grids):
    model, _ = pair
    rng = np.random.default_rng(6)
    pairs = [conversation(rng, own, text) for own, text in zip(grids, (40, 9, 25), strict=True)]
    ids_bt, mask_bt = pad([ids for ids, _ in pairs], side)
    positions_3bt, _ = positions_of(ids_bt, grids, mask_bt)
    packed = np.concatenate([patches for _, patches in pairs])
    prompts = {"input_ids_bt": ids_bt, "positions_3bt": positions_3bt, "attention_mask_bt": mask_bt}
    together = compiled(model, **prompts, pixel_values=packed, grid_thw=sum(grids, ()))
    for row, (ids, patches) in enumerate(pairs):
        one_bt = np.array([ids])
        images = {"pixel_values": patches, "grid_thw": grids[row]} if grids[row] else {}
        alone = compiled(model, input_ids_bt=one_bt, positions_3bt=positions_of(one_bt, [grids[row]])[0], **images)
        assert relative_error(together[row][mask_bt[row] == 1], alone[0]) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("grids", [[ODD[:1], ODD[:1] * 3, ()], [ODD, ODD[1:3], ODD[:1]]], ids=["alike", "mixed"])
def test_batched_conversations_equal_the_reference(pair, grids):
    model, reference = pair
    rng = np.random.default_rng(7)
    pairs = [conversation(rng, own, text) for own, text in zip(grids, (40, 9, 25), strict=True)]
    conversations = [Conversation(*pair, own) for pair, own in zip(pairs, grids, strict=True)]
    batch = batch_conversations(conversations, **MROPE, length_multiple=32, image_slots=4)
    assert batch["input_ids_bt"].shape[1] % 32 == 0
    assert batch["pixel_values"].ndim == (2 if ODD in grids else 3)
    assert ODD in grids or batch["grid_thw"] == ODD[:1] * 4
    logits = compiled(model, **batch)
    patches = np.concatenate([patches for _, patches in pairs])
    inputs = reference_inputs(batch["input_ids_bt"], patches, sum(grids, ()), batch["attention_mask_bt"])
    with torch.no_grad():
        expected = reference(**inputs).logits
    real = batch["attention_mask_bt"]
    assert relative_error(logits[real], expected[torch.tensor(real)]) < TOLERANCE


@pytest.mark.slow
def test_logits_at_chosen_positions(pair):
    model, _ = pair
    ids, patches = conversation(np.random.default_rng(8), ODD[:2], 6)
    batch = batch_conversations([Conversation(ids, patches, ODD[:2])], **MROPE)
    at = jnp.array([[3, len(ids) - 1]])
    chosen = compiled(model, **batch, logits_at_bk=at)
    assert relative_error(chosen, compiled(model, **batch)[:, at[0]]) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "attention", "full"])
def test_gradients_reach_every_parameter_as_in_the_reference(pair, remat):
    trained, reference = pair
    model = abstract_module(lambda rngs: Qwen3VL(SMALL, rngs=rngs, remat=remat))
    nnx.update(model, nnx.state(trained))
    ids, patches = conversation(np.random.default_rng(9), ODD[:3], 8)
    batch = batch_conversations([Conversation(ids, patches, ODD[:3])], **MROPE, length_multiple=1)
    weights = np.random.default_rng(10).normal(size=(1, len(ids), SMALL.text.vocab_size)).astype(np.float32)
    graphdef, state = nnx.split(model)

    def loss(state):
        return (nnx.merge(graphdef, state)(**batch) * weights).mean()

    ours = state_to_torch(jax.jit(jax.grad(loss))(state), KEY_MAPPING)
    reference.zero_grad()
    inputs = reference_inputs(batch["input_ids_bt"], patches, ODD[:3])
    (reference(**inputs).logits * torch.tensor(weights)).mean().backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert np.abs(ours[name]).max() > 0, name
        if "k_proj.bias" not in name:
            assert relative_error(ours[name], gradient) < 10 * TOLERANCE, name


def test_weights_go_back_to_pytorch_and_give_the_same(pair):
    model, reference = pair
    again = Qwen3VLForConditionalGeneration(ReferenceConfig(**config_to_dict(SMALL), attn_implementation="eager"))
    tensors = {key: torch.tensor(tensor) for key, tensor in state_to_torch(model, KEY_MAPPING).items()}
    missing, unexpected = again.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    again.tie_weights()
    ids, patches = conversation(np.random.default_rng(2), ODD, 5)
    inputs = reference_inputs(np.array([ids]), patches, ODD)
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs).logits, reference(**inputs).logits)


@pytest.mark.parametrize("name", ["qwen3_vl_2b", "qwen3_vl_4b", "qwen3_vl_8b"])
def test_full_size_keys_and_shapes_agree(name):
    config = getattr(Qwen3VLConfig, name)()
    with torch.device("meta"):
        reference = Qwen3VLForConditionalGeneration(ReferenceConfig(**config_to_dict(config)))
    found = {key: tuple(tensor.shape) for key, tensor in reference.state_dict().items()}
    if config.tie_word_embeddings:
        found.pop("lm_head.weight")
    model = abstract_module(lambda rngs: Qwen3VL(config, rngs=rngs))
    check_keys(entries(nnx.state(model), KEY_MAPPING), found, name)
    ours = sum(leaf.size for leaf in leaves_of(nnx.state(model)).values())
    assert ours == sum(parameter.numel() for parameter in reference.parameters())
    billions = {"qwen3_vl_2b": 2.1, "qwen3_vl_4b": 4.4, "qwen3_vl_8b": 8.8}
    assert ours / 1e9 == pytest.approx(billions[name], abs=0.1)


@pytest.mark.parametrize("config", [SMALL, Qwen3VLConfig.qwen3_vl_2b(), Qwen3VLConfig.qwen3_vl_8b()])
def test_config_goes_there_and_back(config):
    written = config_to_dict(config)
    assert config_from_dict(written) == config
    assert config_from_dict(ReferenceConfig(**written).to_dict()) == config
    assert config_from_dict(ReferenceConfig(**written).to_diff_dict()) == config


def test_a_silent_config_means_what_transformers_means():
    theirs = ReferenceConfig(vision_config={"out_hidden_size": 4096}, text_config={})
    ours = config_from_dict({"model_type": "qwen3_vl", "text_config": {}, "vision_config": {"out_hidden_size": 4096}})
    assert ours == config_from_dict(theirs.to_dict())
    assert ours.text.rope_theta == 500_000


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("text_config", {"hidden_act": "gelu"}),
        ("text_config", {"rope_scaling": {"rope_type": "yarn"}}),
        ("text_config", {"rope_scaling": {"mrope_interleaved": False, "mrope_section": [6, 5, 5]}}),
        ("vision_config", {"window_size": 112}),
        ("vision_config", {"hidden_act": "silu"}),
    ],
)
def test_configs_of_other_models_are_refused(part, change):
    written = config_to_dict(SMALL)
    written[part].update(change)
    with pytest.raises(ClvrError):
        config_from_dict(written)


def test_mistakes_are_named(pair):
    model, _ = pair
    ids, patches = conversation(np.random.default_rng(0), ODD, 3)
    with pytest.raises(ClvrError, match="patches, but image grids"):
        Conversation(ids, patches, ODD[:2])
    with pytest.raises(ClvrError, match="image tokens"):
        positions_of(np.array([ids]), [ODD[:3]])
    with pytest.raises(ClvrError, match="not contiguous"):
        positions_of(np.array([[SMALL.image_token_id, 1, SMALL.image_token_id]]), [((1, 2, 4),)])
    with pytest.raises(ClvrError, match="need"):
        model(jnp.array([ids]), jnp.asarray(patches), ODD[:2])
    with pytest.raises(ClvrError, match="both be given"):
        model(jnp.array([ids]), jnp.asarray(patches))
    with pytest.raises(ClvrError, match="multiples of 2"):
        model(jnp.array([ids]), jnp.zeros((21, SMALL.vision.patch_features)), ((1, 3, 7),))
    with pytest.raises(ClvrError, match="does not fit"):
        model.prefill(jnp.array([ids]), cache_length=10)
    with pytest.raises(ClvrError, match="out_hidden_size"):
        dataclasses.replace(SMALL, vision=dataclasses.replace(SMALL.vision, out_hidden_size=64))


def test_a_1024_square_picture_is_1024_tokens():
    assert merged_tokens(as_grids([[1, 64, 64]]), 2) == (1024,)
