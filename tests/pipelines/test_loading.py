"""How pipelines are loaded: on a mesh they compute what one device computes, and LoRAs and dtypes are obeyed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import save_file

from clvr_jax.convert.architectures import FLUX2_TRANSFORMER
from clvr_jax.convert.lora.trees import load_lora, save_lora
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.merging.deltas import apply_delta
from clvr_jax.models.common.lora import init_lora, is_pair
from clvr_jax.pipelines import loading
from clvr_jax.pipelines.closed_loop import ClosedLoopPipeline
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.qwen3_vl import Qwen3VLPipeline
from clvr_jax.pipelines.sdxl import SDXLPipeline
from clvr_jax.sharding import MeshConfig

MESHES = {
    "fsdp": MeshConfig(fsdp=8),
    "tensor": MeshConfig(fsdp=1, tensor=4, devices=4),
    "sequence": MeshConfig(fsdp=1, sequence=4, devices=4),
    "mixed": MeshConfig(fsdp=2, sequence=2, tensor=2),
}
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8))


def drawn(pipeline):
    options = {"height": 32, "width": 64, "num_inference_steps": 2, "guidance_scale": 1.0}
    return pipeline("a red circle", [PHOTO], output_type="np", **options).images


def answered(pipeline):
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a red circle"}]}]
    (answer,) = pipeline.answer_all([chat], [[PHOTO.resize((64, 64))]], 3, top_logprobs=2)
    return answer.text, np.array([token.logprob for token in answer.tokens])


@pytest.fixture(scope="module")
def drawn_alone(folder):
    return drawn(Flux2Pipeline.from_pretrained(str(folder)))


@pytest.fixture(scope="module")
def answered_alone(small_qwen3_vl):
    return answered(Qwen3VLPipeline.from_pretrained(small_qwen3_vl))


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_flux2_on_a_mesh_generates_what_one_device_generates(folder, drawn_alone, name):
    pipeline = Flux2Pipeline.from_pretrained(str(folder), mesh=MESHES[name])
    np.testing.assert_allclose(drawn(pipeline), drawn_alone, atol=1e-5)
    weights = jax.tree.leaves(nnx.state(pipeline.transformer))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in weights) / sum(leaf.nbytes for leaf in weights)
    assert held < (0.2 if name == "fsdp" else 0.4)


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_qwen3_vl_on_a_mesh_answers_as_on_one_device(small_qwen3_vl, answered_alone, name):
    text, logprobs = answered(Qwen3VLPipeline.from_pretrained(small_qwen3_vl, mesh=MESHES[name]))
    assert text == answered_alone[0]
    np.testing.assert_allclose(logprobs, answered_alone[1], atol=1e-5)


def latents_of(directory, mesh=None):
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
    return SDXLPipeline.from_pretrained(str(directory), mesh=mesh)(["a red circle", "a blue star"], **options).images


@pytest.fixture(scope="module")
def sdxl_alone(folders):
    return latents_of(folders(True, "euler"))


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_sdxl_on_a_mesh_generates_what_one_device_generates(folders, sdxl_alone, name):
    """Its attention has 2 heads: a tensor axis of 4 is too large, a sequence axis is not."""
    mesh = MeshConfig(fsdp=1, tensor=2, devices=2) if name == "tensor" else MESHES[name]
    np.testing.assert_allclose(latents_of(folders(True, "euler"), mesh), sdxl_alone, atol=1e-5)


@pytest.mark.slow
def test_stable_diffusion_1_on_a_mesh_generates_what_one_device_generates(folders):
    """Its transformers have convolutions at both ends."""
    directory = folders(False, "pndm")
    np.testing.assert_allclose(latents_of(directory, MESHES["mixed"]), latents_of(directory), atol=1e-5)


def test_a_mesh_that_does_not_divide_the_heads_is_refused_before_weights_are_read(folder, folders, small_qwen3_vl):
    with pytest.raises(UsageError, match=r"mesh: tensor 4 shards heads 4 ways.* 2 heads of block 1 of unet; .* 1, 2"):
        SDXLPipeline.from_pretrained(str(folders(True, "euler")), mesh=MeshConfig(sequence=2, tensor=4))
    with pytest.raises(UsageError, match=r"tensor 8 shards heads 8 ways.* 4 heads of transformer; .* one of 1, 2, 4"):
        Flux2Pipeline.from_pretrained(str(folder), mesh=MeshConfig(tensor=8))
    with pytest.raises(UsageError, match=r"sequence 2 x tensor 4|tensor 4 x sequence 2"):
        ClosedLoopPipeline.from_pretrained(
            str(folder), controller=str(small_qwen3_vl), mesh=MeshConfig(sequence=2, tensor=4)
        )
    with pytest.raises(UsageError, match="heads of controller"):
        Qwen3VLPipeline.from_pretrained(small_qwen3_vl, mesh=MeshConfig(tensor=8))


@pytest.fixture(scope="module")
def loras(folder, tmp_path_factory):
    """A pipeline's transformer, and two LoRA trees of it with their files."""
    transformer = Flux2Pipeline.from_pretrained(str(folder)).transformer
    place, made = tmp_path_factory.mktemp("loras"), []
    for seed, target in enumerate((r"attn\.to_[qk]\.", r"to_qkv_mlp_proj|attn\.to_q\.")):
        tree = init_lora(nnx.state(transformer), [target], 2, 3.0, jax.random.key(seed))
        rng = np.random.default_rng(seed)

        def filled(pair, rng=rng):
            return dataclasses.replace(pair, b=jnp.asarray(rng.normal(size=pair.b.shape), jnp.float32))

        tree = jax.tree.map(filled, tree, is_leaf=is_pair)
        save_lora(place / f"{seed}.safetensors", tree, FLUX2_TRANSFORMER.key_mapping(transformer.config), transformer)
        made.append((tree, str(place / f"{seed}.safetensors")))
    return transformer, made


@pytest.mark.parametrize("mesh", [None, MeshConfig(fsdp=2, tensor=2, devices=4)])
def test_loras_are_added_with_their_weights(folder, loras, mesh):
    transformer, ((first, first_file), (second, second_file)) = loras
    expected = apply_delta(apply_delta(nnx.state(transformer), first, 0.5), second)
    pipeline = Flux2Pipeline.from_pretrained(str(folder), mesh=mesh, lora=[(first_file, 0.5), second_file])
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6),
        nnx.state(pipeline.transformer),
        expected,
    )


@pytest.mark.parametrize("mesh", [None, MeshConfig(fsdp=2, tensor=2, devices=4)])
def test_dora_of_a_kronecker_product_is_added_with_its_weight(folder, loras, tmp_path, mesh):
    transformer, _ = loras
    state = nnx.state(transformer)
    rng = np.random.default_rng(3)
    tensors = {}
    for layer in range(transformer.config.num_layers):
        inputs, outputs = state["transformer_blocks"]["attn"]["to_q"]["kernel"].shape[1:]
        name = f"lycoris_transformer_blocks_{layer}_attn_to_q"
        tensors[f"{name}.lokr_w1"] = rng.normal(size=(2, 4)).astype(np.float32)
        tensors[f"{name}.lokr_w2"] = rng.normal(size=(outputs // 2, inputs // 4)).astype(np.float32)
        tensors[f"{name}.dora_scale"] = 1 + rng.random(size=(outputs, 1)).astype(np.float32)
    save_file(tensors, tmp_path / "a.safetensors")
    lora = load_lora(tmp_path / "a.safetensors", FLUX2_TRANSFORMER.key_mapping(transformer.config), transformer)
    expected = apply_delta(state, lora, 0.5)
    pipeline = Flux2Pipeline.from_pretrained(str(folder), mesh=mesh, lora=[(str(tmp_path / "a.safetensors"), 0.5)])
    changed = nnx.state(pipeline.transformer)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), changed, expected)
    assert not np.allclose(
        *(jax.tree.leaves(tree["transformer_blocks"]["attn"]["to_q"])[0] for tree in (state, changed))
    )


def test_loras_are_added_to_a_directory_in_jax_layout(folder, loras, tmp_path):
    from clvr_jax.convert.streaming.conversion import convert
    from clvr_jax.convert.streaming.planning import plan

    transformer, ((first, file), _) = loras
    convert(plan(folder, "jax"), tmp_path / "converted")
    pipeline = Flux2Pipeline.from_pretrained(str(tmp_path / "converted"), lora=[(file, 2.0)])
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6),
        nnx.state(pipeline.transformer),
        apply_delta(nnx.state(transformer), first, 2.0),
    )


def test_a_lora_of_another_model_and_a_weight_that_is_no_number_are_refused(folder, folders, loras):
    _, ((_, file), _) = loras
    with pytest.raises(ClvrError, match="not a LoRA of this unet"):
        SDXLPipeline.from_pretrained(str(folders(True, "euler")), lora=[file])
    with pytest.raises(UsageError, match="finite number"):
        Flux2Pipeline.from_pretrained(str(folder), lora=[(file, float("nan"))])
    with pytest.raises(ClvrError, match="no such"):
        Flux2Pipeline.from_pretrained(str(folder), lora=["absent.safetensors"])


def test_the_dtype_is_the_checkpoints_own_on_an_accelerator(folder, tmp_path, monkeypatch):
    pipeline = Flux2Pipeline.from_pretrained(str(folder), None)
    assert pipeline.transformer.x_embedder.kernel.dtype == jnp.float32  # on a CPU
    pipeline.save_pretrained(str(tmp_path / "half"), "bfloat16")
    assert Flux2Pipeline.from_pretrained(str(tmp_path / "half"), None).vae.bn.running_var.dtype == jnp.float32
    monkeypatch.setattr(loading.jax, "default_backend", lambda: "tpu")
    assert loading.resolve_dtype(None, tmp_path / "half" / "transformer") == jnp.float32  # so small a model
    monkeypatch.setattr(loading, "SMALL", 1)
    loaded = Flux2Pipeline.from_pretrained(str(tmp_path / "half"), None)
    assert loaded.transformer.x_embedder.kernel.dtype == jnp.bfloat16
    assert Flux2Pipeline.from_pretrained(str(tmp_path / "half"), "float32").vae.bn.running_var.dtype == jnp.float32


def test_sizes_that_do_not_divide_are_refused_with_the_nearest(folder):
    pipeline = Flux2Pipeline.from_pretrained(str(folder))
    with pytest.raises(UsageError, match=r"size 50 x 61: .* multiples of 8 pixels; the nearest size is 48 x 64"):
        pipeline("a red circle", height=50, width=61)
    with pytest.raises(UsageError, match="nearest size is 8 x 8"):
        ClosedLoopPipeline(pipeline, object()).run(["a"], height=1, width=9, verification="none")
