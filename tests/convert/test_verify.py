"""Verification: small models of every architecture agree after a conversion, and a wrong conversion is found."""

import dataclasses
import io
import json
import shutil
import sys

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from rich.console import Console
from safetensors.numpy import load_file

from clvr_jax.checkpoint_io.tensors import DIFFUSERS_NAME, write_tensors
from clvr_jax.convert.architectures import (
    ARCHITECTURES,
    AUTOENCODER_KL,
    CLIP_TEXT,
    CLIP_TEXT_PROJECTED,
    FLUX2_TRANSFORMER,
    FLUX2_VAE,
    QWEN3,
    QWEN3_VL,
    UNET,
)
from clvr_jax.convert.models import load_model
from clvr_jax.convert.probes import PROBES
from clvr_jax.convert.streaming.conversion import convert
from clvr_jax.convert.streaming.planning import plan
from clvr_jax.convert.verify import TOLERANCE, Agreement, agreement_list, agreement_table, compare, verify
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.pipelines.registry import SHIPPED
from tests.models.flux2 import test_autoencoder_kl as test_autoencoder_kl_flux2
from tests.models.flux2 import test_transformer as test_flux2_transformer
from tests.models.parity import randomize
from tests.models.qwen3 import test_model as test_qwen3
from tests.models.qwen3_vl.reference import SMALL as SMALL_QWEN3_VL
from tests.models.stable_diffusion import test_autoencoder_kl, test_clip_text, test_unet_2d_condition

MODELS = {
    "clip": (CLIP_TEXT, test_clip_text.change(test_clip_text.SMALL, projection_dim=None)),
    "clip_projected": (CLIP_TEXT_PROJECTED, test_clip_text.SMALL),
    "flux2": (FLUX2_TRANSFORMER, test_flux2_transformer.change(test_flux2_transformer.SMALL, guidance_embeds=True)),
    "flux2_vae": (FLUX2_VAE, test_autoencoder_kl_flux2.SMALL),
    "qwen3": (QWEN3, test_qwen3.SMALL),
    "qwen3_vl": (QWEN3_VL, SMALL_QWEN3_VL),
    "sd15_unet": (UNET, dataclasses.replace(test_unet_2d_condition.SD15, layers_per_block=1, time_cond_proj_dim=6)),
    "sd15_vae": (AUTOENCODER_KL, test_autoencoder_kl.SMALL),
    "sdxl_unet": (UNET, test_unet_2d_condition.TWO_LEVEL_SDXL),
}


def make(architecture, config, seed=0):
    fields = architecture.config_to_dict(config)
    if architecture.file_name == DIFFUSERS_NAME:
        return randomize(getattr(diffusers, architecture.torch_class).from_config(fields), seed)
    kind = getattr(transformers, architecture.torch_class)
    return randomize(kind(kind.config_class(**fields)), seed)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """All models side by side as PyTorch saves them."""
    folder = tmp_path_factory.mktemp("verify") / "torch"
    for name, (architecture, config) in MODELS.items():
        make(architecture, config).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def converted(saved):
    convert(plan(saved, "jax"), saved.with_name("jax"))
    return saved.with_name("jax")


def spoiled(folder, name, edit, target):
    """The model `name` with tensors that `edit` changed, converted to `target`."""
    shutil.copytree(folder / name, target.with_name("spoiled"))
    file = next(target.with_name("spoiled").glob("*.safetensors"))
    tensors = load_file(file)
    edit(tensors)
    write_tensors(file.parent, tensors, file.stem)
    convert(plan(file.parent, "jax"), target)
    return target


@pytest.mark.slow
def test_small_models_of_every_architecture_agree_and_nothing_else_is_said(saved, converted, capfd):
    seen = []
    agreements = verify(saved, converted, on_model=seen.append)
    assert capfd.readouterr() == ("", "")
    assert seen == [agreement.component for agreement in agreements] == list(MODELS)
    assert {agreement.title for agreement in agreements} == {architecture.title for architecture in ARCHITECTURES}
    for agreement in agreements:
        assert agreement.agrees, agreement
        assert 0 < agreement.relative <= TOLERANCE  # 0 would mean that one framework was compared with itself
    assert transformers.utils.logging.is_progress_bar_enabled()
    assert diffusers.utils.logging.get_verbosity() == diffusers.utils.logging.WARNING


@pytest.mark.slow
def test_the_shipped_pipeline_agrees(tmp_path):
    shapes = SHIPPED / "shapes-tiny"
    convert(plan(shapes, "jax"), tmp_path / "jax")
    agreements = verify(shapes, tmp_path / "jax")
    transformers = ["transformer", "transformer_base", "transformer_sft"]
    assert [a.component for a in agreements] == ["controller", "text_encoder", *transformers, "vae"]
    assert all(agreement.agrees for agreement in agreements)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_weight_has_a_part_in_what_is_compared(converted, name):
    architecture, config = MODELS[name]
    model = load_model(converted / name, architecture)
    graphdef, state = nnx.split(model)
    inputs = PROBES[architecture].inputs(config, np.random.default_rng(0))
    answers = jax.jit(lambda state: PROBES[architecture].run_jax(nnx.merge(graphdef, state), inputs))
    expected = answers(state)
    leaves, structure = jax.tree.flatten(state)
    plan_of = architecture.entries(architecture.config_to_dict(config))
    assert len(plan_of) == len(leaves)
    for number, (entry, leaf) in enumerate(zip(plan_of, leaves, strict=True)):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue  # counts batches
        for layer, key in enumerate(entry.keys):
            if key.endswith(("k_proj.bias", "to_k.bias")):
                continue  # moves all scores of a query alike, which softmax does not see
            changed = np.array(leaf)  # in NumPy: JAX would compile a program for each shape
            part = changed[layer] if entry.stacked else changed
            part += 0.05 * np.random.default_rng(number).standard_normal(part.shape, np.float32)
            found = answers(
                structure.unflatten([*leaves[:number], jax.device_put(changed, leaf.sharding), *leaves[number + 1 :]])
            )
            assert not compare(name, "", found, expected).agrees, key


@pytest.mark.slow
def test_one_wrong_weight_is_found_and_its_model_named(saved, converted, tmp_path):
    pair = tmp_path / "torch"
    for name in ("clip", "qwen3"):
        shutil.copytree(saved / name, pair / name)

    def edit(tensors):
        tensors["model.layers.2.mlp.up_proj.weight"][7, 5] += 0.3

    spoiled(saved, "qwen3", edit, tmp_path / "jax" / "qwen3")
    shutil.copytree(converted / "clip", tmp_path / "jax" / "clip")
    clip, qwen3 = verify(pair, tmp_path / "jax")
    assert (clip.component, clip.agrees) == ("clip", True)
    assert (qwen3.component, qwen3.agrees) == ("qwen3", False)
    assert qwen3.relative > 10 * TOLERANCE


def test_a_nan_is_no_agreement(saved, tmp_path):
    def edit(tensors):
        next(tensor for key, tensor in tensors.items() if key.endswith("final_layer_norm.bias"))[3] = np.nan

    jax_folder = spoiled(saved, "clip", edit, tmp_path / "jax")
    for torch_folder in (saved / "clip", tmp_path / "spoiled"):  # in one framework, and in both
        (agreement,) = verify(torch_folder, jax_folder)
        assert agreement.component == torch_folder.name
        assert agreement.differing == ["last hidden state", "pooled"]
        assert not agreement.agrees


@pytest.mark.slow
def test_another_models_weights_and_a_folder_beside_itself(saved, converted, tmp_path):
    make(*MODELS["clip_projected"], seed=1).save_pretrained(tmp_path / "other")
    (same,) = verify(saved / "clip_projected", saved / "clip_projected")
    (other,) = verify(tmp_path / "other", converted / "clip_projected")
    assert same.agrees
    assert other.differing == ["hidden state -2", "last hidden state", "pooled"]


@pytest.mark.slow
def test_a_conversion_that_casts_is_compared_with_what_was_cast(saved, converted, tmp_path):
    convert(plan(saved / "clip", "jax", "bfloat16"), tmp_path / "jax")
    convert(plan(converted / "clip", "torch", "float16"), tmp_path / "torch")
    (unaware,) = verify(saved / "clip", tmp_path / "jax")
    (to_jax,) = verify(saved / "clip", tmp_path / "jax", dtype="bfloat16")
    (to_torch,) = verify(tmp_path / "torch", converted / "clip", dtype="float16")
    assert [unaware.agrees, to_jax.agrees, to_torch.agrees] == [False, True, True]


@pytest.mark.slow
def test_a_variant_is_compared_with_that_variant(saved, tmp_path):
    model = make(*MODELS["clip"], seed=1)
    model.save_pretrained(tmp_path / "torch" / "clip", variant="fp16")
    shutil.copy(saved / "clip" / "model.safetensors", tmp_path / "torch" / "clip")
    shutil.copytree(saved / "clip_projected", tmp_path / "torch" / "without")
    convert(plan(tmp_path / "torch", "jax", variant="fp16"), tmp_path / "jax")
    assert [a.agrees for a in verify(tmp_path / "torch", tmp_path / "jax", variant="fp16")] == [True, True]
    assert [a.agrees for a in verify(tmp_path / "torch", tmp_path / "jax")] == [False, True]


@pytest.mark.slow
def test_what_cannot_be_verified_is_one_clear_error(saved, converted, tmp_path, monkeypatch):
    for folder in (tmp_path / "flux.safetensors", converted):
        with pytest.raises(UsageError, match="not a directory that PyTorch reads"):
            verify(folder, converted)
    with pytest.raises(ClvrError, match="no such file"):
        verify(saved / "clip", tmp_path)
    with pytest.raises(ClvrError, match="another model than that of"):
        verify(saved / "sd15_unet", converted / "sdxl_unet")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ClvrError, match=r"pip install 'clvr-jax\[torch\]'"):
        verify(saved, converted)


def test_differences_are_relative_to_each_output():
    theirs = {"small": np.array([1e-3, -2e-3]), "large": np.array([1e3, 0.0])}
    ours = {"small": np.array([1e-3, -1e-3]), "large": np.array([1e3, 1e-2])}
    agreement = compare("unet", "UNet", ours, theirs)
    assert agreement.largest == 1e-2
    assert agreement.outputs == pytest.approx({"small": 0.5, "large": 1e-5})
    assert agreement.differing == ["small"]
    zero = np.zeros(2)
    assert compare("", "", {"x": zero}, {"x": zero}).agrees
    for ours, theirs in [
        (zero + 1, zero),
        (zero, zero + np.nan),
        (zero + np.nan, zero),
        (zero + np.inf, zero + np.inf),
    ]:
        assert not compare("", "", {"x": ours}, {"x": theirs}).agrees


def test_the_report_says_which_model_and_output_differ():
    good = Agreement("vae", "FLUX.2 autoencoder", {"mean": 1e-7, "decoded": 2e-7}, 3e-6)
    bad = Agreement("unet", "UNet", {"noise": float("nan")}, float("nan"))
    console = Console(width=120, file=io.StringIO())
    console.print(agreement_table([good, bad]))
    lines = console.file.getvalue().splitlines()
    assert any("vae" in line and "2e-07" in line and "agree" in line for line in lines)
    assert any("unet" in line and "nan" in line and "differ: noise" in line for line in lines)
    first, second = json.loads(json.dumps(agreement_list([good, bad]), allow_nan=False))
    assert (first["agrees"], first["relative"], first["outputs"]["mean"]) == (True, 2e-7, 1e-7)
    assert (second["agrees"], second["relative"], second["model"]) == (False, None, "unet")
