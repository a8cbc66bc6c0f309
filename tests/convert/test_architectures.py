"""Every architecture goes from PyTorch to JAX and back bit for bit, whoever wrote the PyTorch folder."""

import dataclasses
import json
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.torch import load_file, save_file

from clvr_jax.checkpoint_io.tensors import FLOATS, stored_tensors, write_tensors
from clvr_jax.convert.architectures import (
    ARCHITECTURES,
    AUTOENCODER_KL,
    FLUX2_VAE,
    UNET,
    WITHOUT_MODULE,
    architecture_of,
    clip_text,
)
from clvr_jax.convert.architectures import QWEN3_VL as QWEN3_VL_ARCHITECTURE
from clvr_jax.convert.models import load_model
from clvr_jax.convert.rules import leaves_of
from clvr_jax.convert.streaming.conversion import convert
from clvr_jax.convert.streaming.planning import plan
from clvr_jax.errors import ClvrError, UsageError
from tests.models.flux2 import test_autoencoder_kl as flux2_vae
from tests.models.flux2 import test_transformer as flux2
from tests.models.parity import randomize
from tests.models.qwen3 import test_model as language
from tests.models.qwen3_vl.reference import SMALL as QWEN3_VL
from tests.models.stable_diffusion import test_autoencoder_kl as vae
from tests.models.stable_diffusion import test_clip_text as clip
from tests.models.stable_diffusion import test_unet_2d_condition as unet

TIED_VL = dataclasses.replace(QWEN3_VL, tie_word_embeddings=True)
MODELS = {
    "flux2": lambda: flux2.make_reference(flux2.SMALL),
    "flux2 with guidance": lambda: flux2.make_reference(flux2.change(flux2.SMALL, guidance_embeds=True)),
    "flux2 autoencoder": lambda: diffusers.AutoencoderKLFlux2.from_config(config_of(FLUX2_VAE, flux2_vae.SMALL)),
    "autoencoder": lambda: diffusers.AutoencoderKL.from_config(config_of(AUTOENCODER_KL, vae.SMALL)),
    "qwen3": lambda: language.make_reference(language.SMALL),
    "qwen3 tied": lambda: language.make_reference(language.change(language.SMALL, tie_word_embeddings=True)),
    "qwen3-vl": lambda: make_qwen3_vl(QWEN3_VL),
    "qwen3-vl tied": lambda: make_qwen3_vl(TIED_VL),
    "unet of sdxl": lambda: diffusers.UNet2DConditionModel.from_config(config_of(UNET, unet.SDXL)),
    "unet of sd1.5": lambda: diffusers.UNet2DConditionModel.from_config(config_of(UNET, unet.SD15)),
    "clip": lambda: clip.make_reference(clip.change(clip.SMALL, projection_dim=None)),
    "clip projected": lambda: clip.make_reference(clip.SMALL),
}


def config_of(architecture, config):
    return architecture.config_to_dict(config)


def make_qwen3_vl(config):
    return transformers.Qwen3VLForConditionalGeneration(
        transformers.Qwen3VLConfig(**config_of(QWEN3_VL_ARCHITECTURE, config))
    )


def bits(folder, **options):
    return {key: (s.dtype, s.shape, s.open().tobytes()) for key, s in stored_tensors(folder, **options).items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders as PyTorch writes them."""
    root = tmp_path_factory.mktemp("families")
    for name, make in MODELS.items():
        randomize(make()).to(torch.bfloat16).save_pretrained(root / name, max_shard_size="40KB")
    return root


def test_every_architecture_is_among_them(saved):
    assert {architecture_of(folder) for folder in saved.iterdir()} == set(ARCHITECTURES)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_bit_for_bit_and_pytorch_loads_it(saved, tmp_path, name):
    source = saved / name
    assert (source / "diffusion_pytorch_model.safetensors.index.json").exists() or (
        source / "model.safetensors.index.json"
    ).exists(), "the source is meant to be in shards"
    convert(plan(source, "jax"), tmp_path / "jax")
    convert(plan(tmp_path / "jax", "torch"), tmp_path / "torch")
    architecture = architecture_of(source)
    # transformers 5 leaves out a prefix of CLIP that published files have, and that goes back with it.
    config = architecture.config_from_dict(json.loads((source / "config.json").read_text()))
    expected = architecture.canonicalize_keys(bits(source), config)
    assert bits(tmp_path / "torch") == expected
    home = diffusers if hasattr(diffusers, architecture.torch_class) else transformers
    before, after = (
        getattr(home, architecture.torch_class).from_pretrained(folder, torch_dtype=torch.bfloat16).state_dict()
        for folder in (source, tmp_path / "torch")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux2", "flux2 autoencoder", "qwen3-vl"])
def test_an_abstract_model_has_the_structure_and_the_shapes_of_a_model_with_weights(saved, name):
    architecture = architecture_of(saved / name)
    config = json.loads((saved / name / "config.json").read_text())
    graphdef, abstract = architecture.split(config, jnp.bfloat16)
    expected_graphdef, expected = nnx.split(architecture.make(config, jnp.bfloat16))
    assert graphdef == expected_graphdef
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (abstract, expected)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", ["flux2", "unet of sdxl", "qwen3 tied"])
def test_both_formats_load_as_the_same_module(saved, tmp_path, name):
    convert(plan(saved / name, "jax"), tmp_path / "jax")
    architecture = architecture_of(saved / name)
    first, second = (leaves_of(load_model(folder, architecture)) for folder in (saved / name, tmp_path / "jax"))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[path], second[path]) for path in first)


@pytest.mark.parametrize(
    ("name", "embeddings"),
    [("qwen3 tied", "model.embed_tokens.weight"), ("qwen3-vl tied", "model.language_model.embed_tokens.weight")],
)
def test_a_head_stored_beside_the_embeddings_it_is_tied_to_is_left_out(saved, tmp_path, name, embeddings):
    folder = tmp_path / name
    shutil.copytree(saved / name, folder)
    tensors = {key: stored.open() for key, stored in stored_tensors(saved / name).items()}
    for path in folder.glob("model*"):
        path.unlink()
    write_tensors(folder, {**tensors, "lm_head.weight": tensors[embeddings]}, "model")
    convert(plan(folder, "jax"), tmp_path / "jax")
    convert(plan(tmp_path / "jax", "torch"), tmp_path / "torch")
    assert bits(tmp_path / "torch") == bits(saved / name)
    write_tensors(folder, {**tensors, "lm_head.weight": -tensors[embeddings]}, "model")
    with pytest.raises(ClvrError, match="tie_word_embeddings"):
        plan(folder, "jax")


@pytest.mark.slow
def test_the_format_may_stay_where_the_dtype_changes(saved, tmp_path):
    convert(plan(saved / "unet of sd1.5", "torch", "float32"), tmp_path / "torch")
    for key, stored in stored_tensors(saved / "unet of sd1.5").items():
        found = stored_tensors(tmp_path / "torch")[key]
        assert found.dtype == np.float32
        assert np.array_equal(found.open(), stored.open().astype(np.float32)), key
    convert(plan(tmp_path / "torch", "jax"), tmp_path / "jax32")
    convert(plan(tmp_path / "jax32", "jax", "bfloat16"), tmp_path / "jax16")
    convert(plan(tmp_path / "jax16", "torch"), tmp_path / "back")
    assert bits(tmp_path / "back") == bits(saved / "unet of sd1.5")


@pytest.fixture(scope="module")
def pipeline(saved, tmp_path_factory):
    """A folder like Stable Diffusion's: weights in several formats, and a part that has no module here."""
    root = tmp_path_factory.mktemp("pipeline") / "sd"
    root.mkdir()
    (root / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    for name, source in (("unet", "unet of sd1.5"), ("vae", "autoencoder"), ("text_encoder", "clip")):
        shutil.copytree(saved / source, root / name)
    whole = {key: stored.open().astype(np.float16) for key, stored in stored_tensors(root / "unet").items()}
    write_tensors(root / "unet", whole, "diffusion_pytorch_model.fp16")
    for path in ("unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin", "vae/model.onnx"):
        (root / path).write_bytes(b"other weights")
    (root / "safety_checker").mkdir()
    (root / "safety_checker" / "config.json").write_text(json.dumps({"architectures": [WITHOUT_MODULE[1]]}))
    save_file({"weight": torch.ones(3)}, root / "safety_checker" / "model.safetensors")
    return root


def test_parts_without_a_module_are_copied_and_weights_in_other_formats_are_not(pipeline, tmp_path):
    conversion = plan(pipeline, "jax")
    assert conversion.without_module == {"safety_checker": WITHOUT_MODULE[1]}
    convert(conversion, tmp_path / "jax")
    convert(plan(tmp_path / "jax", "torch"), tmp_path / "torch")
    suffixes = {path.suffix for path in (tmp_path / "torch").rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors"}
    assert load_file(tmp_path / "torch" / "safety_checker" / "model.safetensors")["weight"].tolist() == [1, 1, 1]
    for name in ("unet", "vae", "text_encoder"):
        expected = (
            clip_text.canonicalize_keys(bits(pipeline / name)) if name == "text_encoder" else bits(pipeline / name)
        )
        assert bits(tmp_path / "torch" / name) == expected


def test_a_variant_is_taken_where_there_is_one(pipeline, tmp_path):
    convert(plan(pipeline, "jax", variant="fp16"), tmp_path / "jax")
    convert(plan(tmp_path / "jax", "torch"), tmp_path / "torch")
    assert {dtype for dtype, _, _ in bits(tmp_path / "torch" / "unet").values()} == {FLOATS["float16"]}
    assert bits(tmp_path / "torch" / "unet") == bits(pipeline / "unet", variant="fp16")
    assert bits(tmp_path / "torch" / "vae") == bits(pipeline / "vae")


def test_a_folder_with_variants_only_asks_for_one(pipeline, tmp_path):
    folder = tmp_path / "unet"
    folder.mkdir()
    for name in ("config.json", "diffusion_pytorch_model.fp16.safetensors"):
        shutil.copy(pipeline / "unet" / name, folder / name)
    with pytest.raises(ClvrError, match="--variant fp16"):
        plan(folder, "jax")


def test_a_pipeline_of_another_architecture_is_refused_with_what_could_be_converted(pipeline, tmp_path):
    folder = tmp_path / "flux1"
    shutil.copytree(pipeline, folder)
    (folder / "unet" / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    with pytest.raises(ClvrError, match=f"FluxTransformer2DModel; .*{UNET.torch_class}"):
        plan(folder, "jax")


def test_what_is_already_as_asked_is_no_work(saved):
    with pytest.raises(UsageError, match="--dtype"):
        plan(saved / "flux2", "torch")
