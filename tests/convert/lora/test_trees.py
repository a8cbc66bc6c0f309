import json
import re

import diffusers
import jax
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import clvr_jax as clvr
from clvr_jax.convert.architectures.unet_2d_condition import config_to_dict
from clvr_jax.convert.lora.files import FILE_NAME
from clvr_jax.convert.lora.names import key_aliases
from clvr_jax.convert.lora.trees import load_lora, save_lora
from clvr_jax.models.common.lora import init_lora, is_pair
from clvr_jax.models.stable_diffusion import UNet2DConditionConfig
from clvr_jax.trees import leaves_by_path
from tests.convert.lora.models import (
    KINDS,
    A,
    B,
    add_adapter,
    outputs,
    random_factors,
    reference_outputs,
    same,
    save_by_diffusers,
    save_factors,
    shapes_of,
)
from tests.models.parity import TOLERANCE, relative_error


@pytest.fixture(scope="module", params=["flux2", "sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def kind(request):
    return KINDS[request.param]


def metadata(path):
    with safe_open(path, framework="numpy") as file:
        return json.loads(file.metadata()["lora_adapter_metadata"])


@pytest.mark.slow
def test_a_peft_adapter_gives_the_same_output_fused_and_unfused(kind, tmp_path):
    model, reference = kind.make_pair()
    base = nnx.state(model)
    plain = reference_outputs(kind, reference)
    add_adapter(
        reference,
        kind.targets,
        rank_pattern={"to_q": 2, ".*blocks.0.*to_v": 6},
        alpha_pattern={"to_k": 1.5, ".*blocks.1.*to_v": 9.0},
    )
    expected = reference_outputs(kind, reference)
    assert relative_error(plain, expected) > 0.05
    save_by_diffusers(kind, reference, tmp_path)
    lora = load_lora(tmp_path, kind.key_mapping, model)
    fused = jax.jit(clvr.apply_delta)(base, lora)
    assert relative_error(outputs(kind, fused), expected) < TOLERANCE
    assert relative_error(outputs(kind, clvr.apply_delta(fused, lora, -1.0)), plain) < TOLERANCE
    reference.set_adapters("default", 0.4)
    half = clvr.apply_delta(base, lora, 0.4)
    assert relative_error(outputs(kind, half), reference_outputs(kind, reference)) < TOLERANCE
    reference.fuse_lora()
    assert relative_error(outputs(kind, half), reference_outputs(kind, reference)) < TOLERANCE


@pytest.mark.slow
def test_the_way_back_gives_the_same_output_in_diffusers(kind, tmp_path):
    model, reference = kind.make_pair()
    random = np.random.default_rng(0)
    lora = init_lora(model, [r"to_[qk]\.", r"proj_out|linear_1|conv1"], 3, 4.5, jax.random.key(0))
    lora = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.1 * random.normal(size=leaf.shape).astype(np.float32), lora)
    save_lora(tmp_path, lora, kind.key_mapping, model)
    kind.pipeline(reference).load_lora_weights(tmp_path)
    ours = outputs(kind, clvr.apply_delta(nnx.state(model), lora))
    assert relative_error(ours, reference_outputs(kind, reference)) < TOLERANCE
    assert same(load_lora(tmp_path, kind.key_mapping, model), lora)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_file_returns_bit_for_bit(kind, tmp_path, dtype):
    model, reference = kind.make_pair()
    add_adapter(reference, kind.targets, rank=3, alpha=7)
    save_by_diffusers(kind, reference.to(dtype), tmp_path / "theirs")
    save_lora(tmp_path / "ours", load_lora(tmp_path / "theirs", kind.key_mapping, model), kind.key_mapping, model)
    ours, theirs = (load_file(tmp_path / side / FILE_NAME) for side in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(ours[key].dtype == dtype and torch.equal(ours[key], theirs[key]) for key in theirs)
    config = metadata(tmp_path / "ours" / FILE_NAME)
    assert (config[f"{kind.component}.r"], config[f"{kind.component}.lora_alpha"]) == (3, 7)
    assert [path.name for path in (tmp_path / "ours").iterdir()] == [FILE_NAME]


def test_layers_that_differ_share_a_stack_and_return_as_they_were(kind, tmp_path):
    model, reference = kind.make_pair()
    add_adapter(
        reference,
        r".*to_[qk]",
        rank_pattern={".*blocks.0.*to_q": 2},
        alpha_pattern={".*blocks.1.*to_q": 9.0},
        exclude_modules=r".*blocks\.1\..*to_k",
    )
    save_by_diffusers(kind, reference, tmp_path / "theirs")
    lora = load_lora(tmp_path / "theirs", kind.key_mapping, model)
    save_lora(tmp_path / "ours", lora, kind.key_mapping, model)
    ours, theirs = (load_file(tmp_path / side / FILE_NAME) for side in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert same(load_lora(tmp_path / "ours", kind.key_mapping, model), lora)
    _, fresh = kind.make_pair()
    kind.pipeline(fresh).load_lora_weights(tmp_path / "ours")
    assert relative_error(reference_outputs(kind, fresh), reference_outputs(kind, reference)) < 1e-6


def test_every_spelling_of_a_name_and_of_the_factors_is_read_alike(kind, tmp_path):
    model, _ = kind.make_pair()
    factors = random_factors(shapes_of(kind, model))
    own = f"{kind.component}."
    written = {
        "diffusers": (own, A, B),
        "bare": ("", A, B),
        "peft": ("base_model.model.", ".lora_A.default.weight", ".lora_B.default.weight"),
        "comfy": ("diffusion_model.", ".lora_down.weight", ".lora_up.weight"),
        "diffusers before peft": (own, ".lora.down.weight", ".lora.up.weight"),
        "kohya": ("lora_unet_", ".lora_down.weight", ".lora_up.weight"),
        "lycoris": ("lycoris_", ".lora_down.weight", ".lora_up.weight"),
    }
    trees = {}
    for spelling, (prefix, down, up) in written.items():
        names = {m: prefix + (m.replace(".", "_") if prefix.endswith("_") else m) for m in factors}
        save_factors(tmp_path / FILE_NAME, {names[m]: pair for m, pair in factors.items()}, down, up, 1.5)
        trees[spelling] = load_lora(tmp_path, kind.key_mapping, model)
    assert all(same(tree, trees["diffusers"]) for tree in trees.values())
    pairs = leaves_by_path(trees["bare"], is_pair)
    assert len(pairs) == sum(path[-1] == "kernel" for path in leaves_by_path(nnx.state(model)))
    assert {pair.scale for pair in pairs.values()} == {0.5}


@pytest.mark.parametrize(("name", "original"), [("sd15", False), ("sdxl", False), ("sdxl", True)])
def test_kohya_files_are_read_as_diffusers_converts_them(name, original, tmp_path):
    kind = KINDS[name]
    model, reference = kind.make_pair()
    # diffusers itself does not find its own name of this module in kohya's files.
    shapes = {module: shape for module, shape in shapes_of(kind, model).items() if "add_embedding" not in module}
    names = {module: "lora_unet_" + module.replace(".", "_") for module in shapes}
    if original:
        originals = re.compile("lora_unet_(input_blocks|middle_block|output_blocks|time_embed_|out_2).*")
        found = key_aliases(shapes).items()
        names = {spelling.modules[0]: other for other, spelling in found if originals.fullmatch(other)}
        assert names.keys() == shapes.keys()
    factors = random_factors(shapes)
    save_factors(
        tmp_path / FILE_NAME,
        {names[module]: pair for module, pair in factors.items()},
        ".lora_down.weight",
        ".lora_up.weight",
        1.5,
    )
    ours = load_lora(tmp_path, kind.key_mapping, model)
    kind.pipeline(reference).load_lora_weights(tmp_path, adapter_name="default")
    save_by_diffusers(kind, reference, tmp_path / "converted")
    assert len(load_file(tmp_path / "converted" / FILE_NAME)) == 2 * len(shapes)
    assert same(ours, load_lora(tmp_path / "converted", kind.key_mapping, model))


def test_the_names_of_sdxl_are_those_of_its_original_code():
    with torch.device("meta"):
        published = diffusers.UNet2DConditionModel.from_config(config_to_dict(UNet2DConditionConfig.sdxl()))
    modules = [key.removesuffix(".weight") for key, tensor in published.state_dict().items() if tensor.ndim > 1]
    found = {name: spelling.modules for name, spelling in key_aliases(modules).items()}
    for name, module in {
        "input_blocks.0.0": "conv_in",
        "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks.4.0.skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
        "input_blocks.7.1.proj_out": "down_blocks.2.attentions.0.proj_out",
        "input_blocks.8.0.emb_layers.1": "down_blocks.2.resnets.1.time_emb_proj",
        "input_blocks.8.1.transformer_blocks.9.ff.net.0.proj": (
            "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj"
        ),
        "middle_block.1.proj_in": "mid_block.attentions.0.proj_in",
        "middle_block.2.out_layers.3": "mid_block.resnets.1.conv2",
        "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks.5.1.transformer_blocks.0.attn1.to_out.0": (
            "up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_out.0"
        ),
        "output_blocks.8.0.in_layers.2": "up_blocks.2.resnets.2.conv1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "out.2": "conv_out",
    }.items():
        assert found[name] == (module,), name
        assert found["lora_unet_" + name.replace(".", "_")] == (module,), name


def bfl_shapes(config):
    """BFL's modules and the shapes of their weights, written out."""
    d, mlp = config.inner_dim, config.mlp_dim
    shapes = {
        "img_in": (d, config.in_channels),
        "txt_in": (d, config.joint_attention_dim),
        "time_in.in_layer": (d, config.timestep_guidance_channels),
        "time_in.out_layer": (d, d),
        "double_stream_modulation_img.lin": (6 * d, d),
        "double_stream_modulation_txt.lin": (6 * d, d),
        "single_stream_modulation.lin": (3 * d, d),
        "final_layer.linear": (config.in_channels, d),
        "final_layer.adaLN_modulation.1": (2 * d, d),
    }
    for i in range(config.num_layers):
        for stream in ("img", "txt"):
            shapes |= {
                f"double_blocks.{i}.{stream}_attn.qkv": (3 * d, d),
                f"double_blocks.{i}.{stream}_attn.proj": (d, d),
                f"double_blocks.{i}.{stream}_mlp.0": (2 * mlp, d),
                f"double_blocks.{i}.{stream}_mlp.2": (d, mlp),
            }
    for i in range(config.num_single_layers):
        shapes |= {f"single_blocks.{i}.linear1": (3 * d + 2 * mlp, d), f"single_blocks.{i}.linear2": (d, d + mlp)}
    return shapes


@pytest.mark.parametrize(
    "prefix", [pytest.param("diffusion_model.", id="ai-toolkit"), pytest.param("base_model.model.", id="fal")]
)
def test_bfl_files_are_read_as_diffusers_converts_them(prefix, tmp_path):
    """The trainer ai-toolkit writes BFL's names under ComfyUI's prefix, that of fal under PEFT's."""
    kind = KINDS["flux2"]
    model, _ = kind.make_pair()
    factors = random_factors(bfl_shapes(model.config))
    save_factors(tmp_path / FILE_NAME, {prefix + m: pair for m, pair in factors.items()}, A, B)
    ours = load_lora(tmp_path, kind.key_mapping, model)
    converted = diffusers.Flux2KleinPipeline.lora_state_dict(tmp_path)
    # diffusers leaves (shift, scale) as it is here, though not when it converts the weights themselves: see below.
    last = "transformer.norm_out.linear.lora_B.weight"
    converted[last] = torch.cat(converted[last].chunk(2)[::-1])
    save_file({key: tensor.contiguous() for key, tensor in converted.items()}, tmp_path / "converted.safetensors")
    theirs = load_lora(tmp_path / "converted.safetensors", kind.key_mapping, model)
    assert same(ours, theirs)
    assert len(leaves_by_path(ours, is_pair)) == sum(path[-1] == "kernel" for path in leaves_by_path(nnx.state(model)))


def test_a_bfl_adapter_changes_the_weights_as_it_does_in_bfl_layout(tmp_path):
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers as to_diffusers

    kind = KINDS["flux2"]
    model, reference = kind.make_pair()
    factors = random_factors(bfl_shapes(model.config))
    save_factors(tmp_path / FILE_NAME, factors, A, B, alpha=6.0)
    changes = to_diffusers({f"{module}.weight": 2.0 * b @ a for module, (a, b) in factors.items()})
    with torch.no_grad():
        for key, change in changes.items():
            reference.get_parameter(key).add_(0.02 * change)
    ours = outputs(kind, clvr.apply_delta(nnx.state(model), load_lora(tmp_path, kind.key_mapping, model), 0.02))
    assert relative_error(ours, reference_outputs(kind, reference)) < TOLERANCE


def test_kohya_files_of_flux2_change_what_diffusers_changes(tmp_path):
    kind = KINDS["flux2"]
    model, _ = kind.make_pair()
    shapes = {m: shape for m, shape in bfl_shapes(model.config).items() if "modulation" not in m.lower()}
    factors = random_factors(shapes)
    # Three adapters of rank 1 in one file: `up` of a fused projection is block-diagonal.
    d = model.config.inner_dim
    for i in range(model.config.num_layers):
        factors[f"double_blocks.{i}.img_attn.qkv"][1].mul_(torch.eye(3).repeat_interleave(d, dim=0))
    names = {module: "lora_unet_" + module.replace(".", "_") for module in factors}
    save_factors(
        tmp_path / FILE_NAME, {names[m]: pair for m, pair in factors.items()}, ".lora_down.weight", ".lora_up.weight", 2
    )
    ours = load_lora(tmp_path, kind.key_mapping, model)
    converted = diffusers.Flux2KleinPipeline.lora_state_dict(tmp_path)
    save_file({key: tensor.clone() for key, tensor in converted.items()}, tmp_path / "converted.safetensors")
    theirs = load_lora(tmp_path / "converted.safetensors", kind.key_mapping, model)
    ours, theirs = (leaves_by_path(tree, is_pair) for tree in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for path, pair in ours.items():
        assert (pair.a.shape, pair.b.shape) == (theirs[path].a.shape, theirs[path].b.shape)
        # diffusers multiplies alpha / rank into the factors, which rounds them.
        assert relative_error(pair.product(), theirs[path].product()) < 1e-6
    assert ours["transformer_blocks", "attn", "to_q", "kernel"].a.shape[-1] == 1
    assert ours["transformer_blocks", "attn", "add_q_proj", "kernel"].a.shape[-1] == 3


def test_files_of_diffusers_before_peft_are_read(tmp_path):
    kind = KINDS["sd15"]
    model, reference = kind.make_pair()
    shapes = {m: s for m, s in shapes_of(kind, model).items() if ".attn" in m}
    factors = random_factors(shapes)
    old = {
        "unet." + re.sub(r"(attn[12])\.(to_.*?)(\.0)?$", r"\1.processor.\2_lora", module): pair
        for module, pair in factors.items()
    }
    save_factors(tmp_path / FILE_NAME, old, ".down.weight", ".up.weight")
    kind.pipeline(reference).load_lora_weights(tmp_path)
    ours = outputs(kind, clvr.apply_delta(nnx.state(model), load_lora(tmp_path, kind.key_mapping, model)))
    assert relative_error(ours, reference_outputs(kind, reference)) < TOLERANCE
