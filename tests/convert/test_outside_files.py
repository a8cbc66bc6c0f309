"""Files of models that are damaged or hostile: one line that names the file and the field, before any work."""

import contextlib
import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from clvr_jax.checkpoint_io.orbax_tree import open_tree
from clvr_jax.checkpoint_io.tensors import read_header, stored_tensors, write_tensors
from clvr_jax.convert.architectures import (
    AUTOENCODER_KL,
    CLIP_TEXT,
    FLUX2_TRANSFORMER,
    FLUX2_VAE,
    QWEN3,
    QWEN3_VL,
    UNET,
)
from clvr_jax.convert.configs import section
from clvr_jax.convert.streaming.planning import plan
from clvr_jax.errors import ClvrError
from clvr_jax.files.atomic_io import read_json
from clvr_jax.pipelines.flux2 import Flux2Settings
from clvr_jax.pipelines.registry import SHIPPED, load_pipeline, read_settings

SHAPES = SHIPPED / "shapes-tiny"
CONFIGS = {
    QWEN3: read_json(SHAPES / "text_encoder" / "config.json"),
    QWEN3_VL: read_json(SHAPES / "controller" / "config.json"),
    FLUX2_TRANSFORMER: read_json(SHAPES / "transformer" / "config.json"),
    FLUX2_VAE: read_json(SHAPES / "vae" / "config.json"),
    UNET: {"sample_size": 8},
    AUTOENCODER_KL: {"latent_channels": 4},
    CLIP_TEXT: {"hidden_size": 512, "model_type": "clip_text_model"},
}


@pytest.mark.parametrize("architecture", CONFIGS, ids=lambda architecture: architecture.torch_class)
def test_a_field_of_any_type_ends_in_a_configuration_or_in_our_error(architecture):
    values = ["x", None, -1, 0, 10**9, 10**400, 1.5, float("nan"), [], {}, [1, "a"], True, "\0", [[[]]], {"a": {}}]
    given = CONFIGS[architecture]
    for name in [*given, "architectures", "rope_parameters", "rope_scaling", "layer_types", "text_config"]:
        for value in values:
            with contextlib.suppress(ClvrError):
                architecture.config_from_dict({**given, name: value})


@pytest.mark.parametrize(
    ("architecture", "field", "value", "message"),
    [
        (QWEN3, "rms_norm_eps", "x", "rms_norm_eps is 'x'; it must be a finite number"),
        (QWEN3, "rms_norm_eps", float("nan"), "rms_norm_eps is nan"),
        (QWEN3, "rms_norm_eps", 0, "rms_norm_eps is 0; it must be above 0"),
        (
            QWEN3,
            "num_hidden_layers",
            10**9,
            "num_hidden_layers is 1000000000; it must be an integer in the supported range",
        ),
        (QWEN3, "hidden_size", True, "hidden_size is True"),
        (QWEN3, "hidden_size", 64.5, "hidden_size is 64.5"),
        (QWEN3, "tie_word_embeddings", 1, "tie_word_embeddings is 1; it must be true or false"),
        (QWEN3, "num_attention_heads", 0, "Qwen3Config"),
        (FLUX2_TRANSFORMER, "axes_dims_rope", "32", "axes_dims_rope is '32'; it must be a list"),
        (FLUX2_VAE, "patch_size", [2], "patch_size is a list of 1"),
        (UNET, "layers_per_block", 10**6, "layers_per_block is 1000000"),
        (UNET, "block_out_channels", [8] * 5000, "block_out_channels is a list of 5000"),
        (QWEN3_VL, "text_config", 3, "text_config is 3; it must be an object"),
        (QWEN3_VL, "image_token_id", "x", "token ids integers"),
    ],
)
def test_a_value_that_a_field_cannot_have_is_refused_by_name(architecture, field, value, message):
    with pytest.raises(ClvrError, match=message):
        architecture.config_from_dict({**CONFIGS[architecture], field: value})


def test_an_outer_silence_about_the_head_means_that_it_is_not_tied():
    given = {name: value for name, value in CONFIGS[QWEN3_VL].items() if name != "tie_word_embeddings"}
    inner = {**given, "text_config": {**section(given, "text_config"), "tie_word_embeddings": True}}
    from transformers import Qwen3VLConfig

    assert Qwen3VLConfig(**inner).tie_word_embeddings is False
    assert QWEN3_VL.config_from_dict(inner).tie_word_embeddings is False
    assert QWEN3_VL.config_from_dict({**inner, "tie_word_embeddings": True}).tie_word_embeddings is True


@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.uint8])
def test_weights_that_are_no_floating_point_numbers_are_refused(tmp_path, dtype):
    folder = shutil.copytree(SHAPES / "text_encoder", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(dtype)
    write_tensors(folder, tensors, "model")
    with pytest.raises(ClvrError, match=r"1 weights are stored as another type: model\.norm\.weight"):
        plan(folder, "jax")


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "x" * 400, "\0", "..", ""])
def test_an_index_names_files_and_no_paths(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ClvrError, match=r"weight_map must be|absent"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize("listed", [3, [1], {"a": 3}, {"a": ["x"]}, {"a": None}])
def test_an_index_of_other_types_is_refused(tmp_path, listed):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(ClvrError, match="weight_map must be an object"):
        stored_tensors(tmp_path)


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ClvrError, match="not a file"):
        read_header(tmp_path / "model.safetensors")
    with pytest.raises(ClvrError, match="not a file"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("metadata", "array", "message"),
    [
        ({}, {}, "not what Orbax writes"),
        ({"tree_metadata": 3}, {}, "not what Orbax writes"),
        ({"tree_metadata": {"a": {"key_metadata": [{"key": 3}]}}}, {}, "not what Orbax writes"),
        ({"tree_metadata": {"a": {"key_metadata": [{"key": "../../x"}]}}}, {}, "which is not a file name"),
        (None, {}, "not what zarr writes"),
        (None, {"dtype": "<f4", "shape": [-1], "chunks": [1]}, "sizes must be integers"),
        (None, {"dtype": "<f4", "shape": [2, 2], "chunks": [1]}, "differ in length"),
        (None, {"dtype": "<x9", "shape": [2], "chunks": [1]}, "not what zarr writes"),
        (None, {"dtype": "<f4", "shape": [2], "chunks": [0]}, "a chunk has no rows"),
    ],
)
def test_metadata_of_a_checkpoint_is_read_with_its_types(tmp_path, metadata, array, message):
    good = {"tree_metadata": {"('a',)": {"key_metadata": [{"key": "a"}]}}}
    (tmp_path / "_METADATA").write_text(json.dumps(good if metadata is None else metadata))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".zarray").write_text(json.dumps(array))
    with pytest.raises(ClvrError, match=message):
        open_tree(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("clvr.json", {"flux2": {}, "flux": {}}, "unknown flux; it may contain flux2 and transformers"),
        ("clvr.json", {"flux2": 3}, "flux2 must be an object"),
        ("clvr.json", {"transformers": {"transformer": 3}}, "transformers: transformer must be an object"),
        ("clvr.json", {"flux2": {"text_buckets": [-5, 3]}}, "text_buckets is a list of 2"),
        ("clvr.json", {"flux2": {"text_buckets": [0]}}, r"text_buckets \(0,\)"),
        ("clvr.json", {"flux2": {"guidance_scale": float("nan")}}, "guidance_scale is nan"),
        ("clvr.json", {"flux2": {"stepps": 3}}, "unknown field 'stepps'"),
        ("clvr.json", {"flux2": {"reference_cache": "images"}}, "reference_cache is 'images'; it must be one of none"),
        (
            "clvr.json",
            {"flux2": {"reference_latents": "keep"}},
            "reference_latents is 'keep'; it must be one of encoded",
        ),
        ("model_index.json", {"_class_name": ["Flux2KleinPipeline"]}, "_class_name is a list of 1; it must be a text"),
        ("model_index.json", {"_class_name": "Flux2KleinPipeline", "is_distilled": "no"}, "is_distilled is 'no'"),
    ],
)
def test_settings_of_a_pipeline_are_checked_before_its_weights_are_read(tmp_path, file, content, message):
    shutil.copytree(SHAPES / "scheduler", tmp_path / "scheduler")
    (tmp_path / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline"}')
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ClvrError, match=message) as caught:
        load_pipeline(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_settings_that_are_shipped_are_read():
    assert read_settings(SHAPES, "flux2", "transformers")["flux2"]["world"] == "shapes"
    assert Flux2Settings(text_buckets=(8, 16)).text_buckets == (8, 16)
