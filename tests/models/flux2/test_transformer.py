import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from clvr_jax.convert.architectures.flux2_transformer import KEY_MAPPING, config_from_dict, config_to_dict
from clvr_jax.convert.rules import check_keys, entries, state_to_torch
from clvr_jax.errors import ClvrError
from clvr_jax.models.common.abstract import abstract_module
from clvr_jax.models.flux2 import Flux2Transformer, Flux2TransformerConfig
from clvr_jax.models.flux2.position_ids import latent_ids, reference_ids, text_ids
from tests.helpers.models import random_module
from tests.models.parity import TOLERANCE, load_state, randomize, relative_error

SMALL = Flux2TransformerConfig(
    in_channels=12,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=3,
    joint_attention_dim=20,
    timestep_guidance_channels=32,
    axes_dims_rope=(2, 6, 6, 2),
    guidance_embeds=False,
)
PRESETS = [Flux2TransformerConfig.klein_4b, Flux2TransformerConfig.klein_9b, Flux2TransformerConfig.dev]

AXES = {"hidden_states": "btc", "encoder_hidden_states": "btd", "timestep": "b", "guidance": "b"}


def change(config, **fields):
    return Flux2TransformerConfig(**{**config.__dict__, **fields})


def make_reference(config):
    return randomize(diffusers.Flux2Transformer2DModel.from_config(config_to_dict(config)))


def make_pair(config, **options):
    reference = make_reference(config)
    model = abstract_module(lambda rngs: Flux2Transformer(config, rngs=rngs, **options))
    load_state(model, reference, KEY_MAPPING)
    return model, reference


def make_inputs(config, size=(3, 5), references=(), text=7, batch=2, seed=0):
    random = np.random.default_rng(seed)
    img_ids = np.concatenate([latent_ids(*size), reference_ids(references)])
    return {
        "hidden_states": random.normal(size=(batch, len(img_ids), config.in_channels)).astype(np.float32),
        "encoder_hidden_states": random.normal(size=(batch, text, config.joint_attention_dim)).astype(np.float32),
        "timestep": random.uniform(size=batch).astype(np.float32),
        "img_ids": img_ids,
        "txt_ids": text_ids(text),
        "guidance": random.uniform(1, 5, batch).astype(np.float32) if config.guidance_embeds else None,
    }


def run(model, inputs, **options):
    graphdef, state = nnx.split(model)
    ids = {name: inputs[name] for name in ("img_ids", "txt_ids")}
    arrays = {f"{name}_{axes}": inputs[name] for name, axes in AXES.items()}
    return jax.jit(lambda state, arrays: nnx.merge(graphdef, state)(**arrays, **ids, **options))(state, arrays)


def run_reference(reference, inputs, **options):
    dtype = reference.dtype
    tensors = {name: None if array is None else torch.tensor(array) for name, array in inputs.items()}
    for name in ("hidden_states", "encoder_hidden_states"):
        tensors[name] = tensors[name].to(dtype)
    with torch.no_grad():
        return reference(**tensors, return_dict=False, **options)[0]


@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize(
    ("size", "references", "text"),
    [
        ((3, 5), (), 7),
        ((1, 1), ((2, 3),), 1),
        ((4, 2), ((2, 3), (5, 1)), 12),
        ((3, 3), ((1, 2), (4, 4), (3, 1)), 5),
        ((5, 7), ((2, 2), (3, 4), (4, 3), (1, 6)), 33),
    ],
)
def test_output_and_every_block_match_diffusers(size, references, text, guidance):
    config = change(SMALL, guidance_embeds=guidance)
    model, reference = make_pair(config)
    inputs = make_inputs(config, size, references, text)
    blocks = []
    for block in [*reference.transformer_blocks, *reference.single_transformer_blocks]:
        block.register_forward_hook(lambda module, args, output: blocks.append(output))
    expected = run_reference(reference, inputs)
    out, states = run(model, inputs, return_hidden_states=True)
    assert relative_error(out, expected) < TOLERANCE
    for layer, (text_state, image_state) in enumerate(blocks[: config.num_layers]):
        assert relative_error(states.text_lbtd[layer], text_state) < TOLERANCE
        assert relative_error(states.image_lbtd[layer], image_state) < TOLERANCE
    for layer, joint_state in enumerate(blocks[config.num_layers :]):
        assert relative_error(states.joint_lbtd[layer], joint_state) < TOLERANCE


@pytest.mark.slow
def test_long_text_and_many_large_references_match_diffusers():
    config = change(SMALL, attention_head_dim=32, axes_dims_rope=(8, 8, 8, 8), num_attention_heads=2)
    model, reference = make_pair(config)
    inputs = make_inputs(config, (9, 40), ((40, 6), (3, 64), (16, 16)), text=650, batch=1)
    assert relative_error(run(model, inputs), run_reference(reference, inputs)) < TOLERANCE


def test_all_timesteps_match_diffusers():
    model, reference = make_pair(change(SMALL, timestep_guidance_channels=256))
    inputs = make_inputs(SMALL, (2, 2), batch=65)
    inputs["timestep"] = np.linspace(0, 1, 65, dtype=np.float32)
    ours, theirs = run(model, inputs), run_reference(reference, inputs)
    assert max(relative_error(a, b) for a, b in zip(ours, theirs, strict=True)) < TOLERANCE


@pytest.mark.parametrize(
    "options", [{"out_channels": 5}, {"patch_size": 2}, {"mlp_ratio": 2.7}, {"rope_theta": 10_000}]
)
def test_every_option_of_the_config_has_its_effect(options):
    config = change(SMALL, **options)
    model, reference = make_pair(config)
    inputs = make_inputs(config, references=((2, 2),))
    assert relative_error(run(model, inputs), run_reference(reference, inputs)) < TOLERANCE


def test_bfloat16_matches_diffusers_in_bfloat16():
    model, reference = make_pair(SMALL, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    nnx.update(model, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), nnx.state(model)))
    inputs = make_inputs(SMALL, references=((4, 2),))
    expected = run_reference(reference.to(torch.bfloat16), inputs)
    out = run(model, inputs)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out.astype(jnp.float32), expected) < 1e-2


def test_masked_tokens_are_attended_to_by_nobody():
    model, reference = make_pair(SMALL)
    inputs = make_inputs(SMALL, references=((2, 3),))
    tokens = inputs["hidden_states"].shape[1] + 7
    mask = np.random.default_rng(1).uniform(size=(2, tokens)) < 0.7
    joint_attention_kwargs = {"attention_mask": torch.tensor(mask)[:, None, None]}
    expected = run_reference(reference, inputs, joint_attention_kwargs=joint_attention_kwargs)
    assert relative_error(run(model, inputs, mask_bt=jnp.asarray(mask)), expected) < TOLERANCE


@pytest.mark.slow
def test_gradients_are_finite_and_the_same_with_remat():
    inputs = make_inputs(SMALL, references=((2, 3),))

    def gradients(remat):
        model, _ = make_pair(SMALL, remat=remat)
        graphdef, state = nnx.split(model)
        return jax.jit(jax.grad(lambda state: jnp.square(nnx.merge(graphdef, state)(*inputs.values())).mean()))(state)

    plain, rematerialised = jax.tree.leaves(gradients("dots")), jax.tree.leaves(gradients("full"))
    assert len(plain) == len(entries(abstract_module(lambda rngs: Flux2Transformer(SMALL, rngs=rngs)), KEY_MAPPING))
    for one, other in zip(plain, rematerialised, strict=True):
        assert np.isfinite(one).all()
        assert np.abs(one).max() > 0
        assert relative_error(one, other) < TOLERANCE


def test_gradients_match_pytorch():
    model, reference = make_pair(SMALL)
    inputs = make_inputs(SMALL, references=((2, 3),))
    graphdef, state = nnx.split(model)
    gradients = jax.jit(jax.grad(lambda state: jnp.square(nnx.merge(graphdef, state)(*inputs.values())).mean()))(state)
    tensors = {name: None if array is None else torch.tensor(array) for name, array in inputs.items()}
    reference(**tensors, return_dict=False)[0].square().mean().backward()
    ours = state_to_torch(gradients, KEY_MAPPING)
    for name, parameter in reference.named_parameters():
        assert relative_error(ours[name], parameter.grad) < 10 * TOLERANCE, name


@pytest.mark.parametrize("preset", PRESETS)
def test_full_size_keys_and_shapes_are_those_of_diffusers(preset):
    config = preset()
    with torch.device("meta"):
        reference = diffusers.Flux2Transformer2DModel.from_config(config_to_dict(config))
    model = abstract_module(lambda rngs: Flux2Transformer(config, rngs=rngs))
    shapes = {key: tuple(tensor.shape) for key, tensor in reference.state_dict().items()}
    check_keys(entries(model, KEY_MAPPING), shapes, "meta")
    assert config_from_dict(dict(reference.config)) == config


@pytest.mark.parametrize(("preset", "billions"), [(PRESETS[0], 3.876), (PRESETS[1], 9.079)])
def test_parameter_counts_are_those_of_the_published_models(preset, billions):
    model = abstract_module(lambda rngs: Flux2Transformer(preset(), rngs=rngs))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) / 1e9 == pytest.approx(billions, abs=5e-4)


def test_the_way_back_to_pytorch_gives_the_same_output():
    model = random_module(lambda rngs: Flux2Transformer(SMALL, rngs=rngs))
    reference = diffusers.Flux2Transformer2DModel.from_config(config_to_dict(SMALL)).eval()
    tensors = {key: torch.tensor(array) for key, array in state_to_torch(model, KEY_MAPPING).items()}
    reference.load_state_dict(tensors, strict=True)
    inputs = make_inputs(SMALL, references=((2, 3),))
    assert relative_error(run(model, inputs), run_reference(reference, inputs)) < TOLERANCE


def test_ids_are_those_of_the_klein_pipeline():
    pipeline = diffusers.Flux2KleinPipeline
    sizes = [(2, 3), (5, 1), (4, 4), (1, 7)]
    images = [torch.zeros(1, 8, *size) for size in sizes]
    assert np.array_equal(reference_ids(sizes), pipeline._prepare_image_ids(images)[0])
    assert np.array_equal(latent_ids(3, 5), pipeline._prepare_latent_ids(torch.zeros(2, 8, 3, 5))[0])
    assert np.array_equal(text_ids(9), pipeline._prepare_text_ids(torch.zeros(2, 9, 6))[0])
    assert reference_ids([]).shape == (0, 4)


def test_wrong_calls_are_refused_in_one_line():
    model = abstract_module(lambda rngs: Flux2Transformer(SMALL, rngs=rngs))
    inputs = make_inputs(SMALL)
    wrong = {
        "ids are for": {"img_ids": latent_ids(3, 4)},
        "expected \\(tokens, 4\\)": {"txt_ids": np.zeros((7, 3), np.int32)},
        "differs within the batch": {"txt_ids": np.stack([text_ids(7), text_ids(7) + 1])},
        "hidden_states has shape": {"hidden_states": inputs["hidden_states"][..., :3]},
        "embeds no guidance": {"guidance": np.ones(2, np.float32)},
    }
    for message, change_of in wrong.items():
        with pytest.raises(ClvrError, match=message):
            model(*{**inputs, **change_of}.values())
    with pytest.raises(ClvrError, match="known at trace time"):
        jax.jit(lambda ids: model(*{**inputs, "img_ids": ids}.values()))(inputs["img_ids"])
    guided = abstract_module(lambda rngs: Flux2Transformer(change(SMALL, guidance_embeds=True), rngs=rngs))
    with pytest.raises(ClvrError, match="pass guidance_b"):
        guided(*inputs.values())


@pytest.mark.parametrize(
    "fields",
    [
        {"num_layers": 0},
        {"axes_dims_rope": (4, 4, 4)},
        {"axes_dims_rope": (1, 7, 6, 2)},
        {"timestep_guidance_channels": 33},
        {"out_channels": 0},
    ],
)
def test_impossible_configs_are_refused(fields):
    with pytest.raises(ClvrError, match=next(iter(fields))):
        change(SMALL, **fields)
