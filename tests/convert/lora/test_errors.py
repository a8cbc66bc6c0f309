"""LoRA files that say less, more or other than they should, and where their scale is found."""

import json

import jax
import jax.numpy as jnp
import pytest
import torch
from safetensors.torch import load_file, save_file

from clvr_jax.convert.lora.files import FILE_NAME
from clvr_jax.convert.lora.trees import load_lora, save_lora
from clvr_jax.errors import ClvrError
from clvr_jax.models.common.lora import init_lora
from tests.convert.lora.models import KINDS, A, B, random_factors, same, save_factors, shapes_of


@pytest.fixture(scope="module")
def flux2_file(tmp_path_factory):
    """Tensors of a LoRA of two layers in diffusers' names, and the model."""
    model, _ = KINDS["flux2"].make_pair()
    shapes = {m: s for m, s in shapes_of(KINDS["flux2"], model).items() if m.endswith(("0.attn.to_q", "1.attn.to_q"))}
    folder = tmp_path_factory.mktemp("lora")
    save_factors(folder / FILE_NAME, {f"transformer.{m}": p for m, p in random_factors(shapes, 4).items()}, A, B)
    return load_file(folder / FILE_NAME), model


def load(tensors, model, folder, header=None, **options):
    save_file(tensors, folder / FILE_NAME, metadata=header)
    return load_lora(folder, KINDS["flux2"].key_mapping, model, **options)


@pytest.mark.parametrize(
    ("header", "scale"),
    [
        (None, 1.0),
        ({"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 2})}, 0.5),
        ({"lora_adapter_metadata": json.dumps({"r": 4, "lora_alpha": 2, "use_rslora": True})}, 1.0),
        ({"lora_adapter_metadata": json.dumps({"text_encoder.lora_alpha": 3})}, 1.0),
        ({"adapter_config": json.dumps({"lora_alpha": 12})}, 3.0),
        ({"lora_alpha": "8"}, 2.0),
        ({"transformer.lora_alpha": "16"}, 4.0),
        ({"network_alpha": "16"}, 4.0),
        ({"transformer.network_alpha": "16", "network_alpha": "16.0"}, 4.0),
        ({"alpha": "1"}, 0.25),
        ({"ss_network_alpha": "2"}, 0.5),
        ({"ss_network_alpha": "None"}, 1.0),
        ({"adapter_config": json.dumps({"lora_alpha": 12, "init_lora_weights": "gaussian"})}, 3.0),
    ],
)
def test_alpha_is_found_where_files_keep_it(flux2_file, tmp_path, header, scale):
    lora = load(*flux2_file, tmp_path, header)
    assert lora["transformer_blocks"]["attn"]["to_q"]["kernel"].scale == scale


def test_a_folder_of_peft_keeps_alpha_beside_the_tensors(flux2_file, tmp_path):
    tensors, model = flux2_file
    tensors = {key.replace("transformer.", "base_model.model.", 1): tensor for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    lora = load_lora(tmp_path, KINDS["flux2"].key_mapping, model, dtype=jnp.bfloat16)
    assert lora["transformer_blocks"]["attn"]["to_q"]["kernel"].scale == 2.0
    assert {leaf.dtype for leaf in jax.tree.leaves(lora)} == {jnp.dtype(jnp.bfloat16)}


FIRST = "transformer.transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(FIRST + A), rf"1 incomplete: {FIRST}\.lora_B\.weight"),
        (
            lambda t: t.update({"transformer.blocks.0.q.lora_A.weight": torch.ones(1)}),
            "1 unknown: transformer.blocks.0",
        ),
        (lambda t: t.update({"logits": torch.ones(1)}), r"it has context_embedder, .*1 unknown: logits"),
        (lambda t: t.update({FIRST + ".alphas": torch.ones(1)}), "1 unknown"),
        (lambda t: t.update({FIRST + A: torch.ones(4, 5)}), r"of another shape: .*\(4, 5\).*the model's \(4, 48\)"),
        (lambda t: t.update({FIRST + A: torch.ones(3, 48)}), r"\(3, 48\) and .*\(48, 4\) \(the model's .*\(48, 3\)"),
        (lambda t: t.update({FIRST.partition(".")[2] + A: torch.ones(4, 48)}), "1 given twice"),
        (lambda t: t.update({FIRST + ".lora_magnitude_vector": torch.ones(47)}), "of another shape"),
        (lambda t: t.update({FIRST + ".lokr_w1": torch.ones(2, 2)}), "3 incomplete"),
        (lambda t: t.update({FIRST + ".hada_w1_a": torch.ones(2, 2)}), "3 incomplete"),
        (lambda t: t.update({FIRST + ".lora_mid.weight": torch.ones(2, 2)}), "of another shape"),
        (lambda t: t.update({FIRST + ".diff": torch.ones(2, 2)}), "1 unknown"),
        (
            lambda t: t.update({"lora_te1_x.lora_down.weight": torch.ones(2, 2)}),
            r"lora_te1_x.*ignore_text_encoder=True",
        ),
        (lambda t: (t.clear(), t.update({"text_encoder.x": torch.ones(1)})), "ignore_text_encoder"),
        (lambda t: t.clear(), "contains no LoRA of a transformer"),
        (
            lambda t: t.update({FIRST + ".alpha": torch.ones(0)}),
            rf"1 of its tensors .*{FIRST}\.alpha \(float32 \(0,\)\)",
        ),
        (lambda t: t.update({FIRST + A: torch.ones(4, 48, dtype=torch.int64)}), r"lora_A.weight \(int64 \(4, 48\)\)"),
    ],
)
def test_files_that_are_not_of_this_model_are_refused_in_one_line(flux2_file, tmp_path, edit, message):
    tensors, model = dict(flux2_file[0]), flux2_file[1]
    edit(tensors)
    with pytest.raises(ClvrError, match=message) as caught:
        load(tensors, model, tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_metadata_that_contradicts_the_tensors_is_refused(flux2_file, tmp_path):
    tensors, model = flux2_file
    with pytest.raises(ClvrError, match="has rank 4 by its tensors, 8 by its metadata"):
        load(tensors, model, tmp_path, {"adapter_config": json.dumps({"r": 8, "lora_alpha": 8})})
    with pytest.raises(ClvrError, match=r"has alpha 2.0 by its tensors, 8 by its metadata"):
        load({**tensors, FIRST + ".alpha": torch.tensor(2.0)}, model, tmp_path, {"adapter_config": '{"lora_alpha": 8}'})
    with pytest.raises(ClvrError, match="its metadata cannot be read"):
        load(tensors, model, tmp_path, {"adapter_config": "{"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq'"),
        ({"init_lora_weights": "of tomorrow"}, "init_lora_weights 'of tomorrow'"),
        ({"init_lora_weights": ["pissa"]}, "init_lora_weights a list of 1"),
        ({"use_dora": True}, "use_dora is true, but the file has no lora_magnitude_vector"),
        ({"transformer.use_dora": True, "transformer.r": 4}, "use_dora is true, but"),
        ({"use_dora": True, "init_lora_weights": "pissa"}, "init_lora_weights 'pissa' with use_dora"),
        ({"use_qalora": True}, "use_qalora"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"bias": "all"}, "bias 'all'"),
        ({"peft_type": "OFT"}, "peft_type 'OFT' is none of LORA, LOHA, LOKR"),
        ({"peft_type": ["LORA"]}, "peft_type a list of 1"),
        ({"a_field_of_tomorrow": 3}, "a_field_of_tomorrow 3"),
        ({"lora_alpha": "x"}, "lora_alpha must be a number"),
        ({"lora_alpha": 10**400}, "lora_alpha must be at most 1e\\+09 in size"),
        ({"alpha_pattern": {"(": 3}}, "which is no pattern"),
        ({"alpha_pattern": {"a{99999999999}": 3}}, "which is no pattern"),
        ({"rank_pattern": {"([a-z_]+.?)+!": 3}}, "a pattern that may take very long to match"),
        ({"rank_pattern": {".*.*.*.*.*!": 3}}, "at most 4 repetitions and no repeated group"),
        ({"alpha_pattern": [3]}, "alpha_pattern must be an object"),
        ({"use_rslora": "yes"}, "use_rslora must be true or false"),
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_an_adapter_that_peft_merges_in_another_way_is_refused_by_name(flux2_file, tmp_path, fields, message, beside):
    tensors, model = flux2_file
    header = None if beside else {"lora_adapter_metadata": json.dumps(fields)}
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata=header)
    if beside:
        (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(ClvrError, match=message) as caught:
        load_lora(tmp_path, KINDS["flux2"].key_mapping, model)
    assert str(tmp_path) in str(caught.value)


def test_strengths_of_a_header_that_differ_are_refused(flux2_file, tmp_path):
    with pytest.raises(ClvrError, match="several alphas"):
        load(*flux2_file, tmp_path, {"network_alpha": "4", "transformer.lora_alpha": "8"})
    with pytest.raises(ClvrError, match="network_alpha is 'x'"):
        load(*flux2_file, tmp_path, {"network_alpha": "x"})
    with pytest.raises(ClvrError, match="network_alpha is 'nan'"):
        load(*flux2_file, tmp_path, {"network_alpha": "nan"})


def test_what_peft_writes_by_default_is_read(flux2_file, tmp_path):
    from peft import LoraConfig

    written = {**LoraConfig(r=4, lora_alpha=8, target_modules=["to_q"]).to_dict(), "target_modules": ["to_q"]}
    lora = load(*flux2_file, tmp_path, {"lora_adapter_metadata": json.dumps(written)})
    assert lora["transformer_blocks"]["attn"]["to_q"]["kernel"].scale == 2.0


def test_onetrainers_names_are_read(flux2_file, tmp_path):
    tensors, model = flux2_file
    expected = load(tensors, model, tmp_path)
    names = {A: ".lora_down.weight", B: ".lora_up.weight"}
    renamed = {}
    for key, tensor in tensors.items():
        end = A if key.endswith(A) else B
        module = key.removesuffix(end).removeprefix("transformer.").replace(".", "_")
        renamed[f"lora_transformer_{module}{names[end]}"] = tensor
    assert same(load(renamed, model, tmp_path), expected)


def test_tensors_of_a_text_encoder_are_left_out_when_that_is_asked_for(flux2_file, tmp_path):
    tensors, model = flux2_file
    alone = load(tensors, model, tmp_path)
    more = {**tensors, "text_encoder.q_proj.lora_A.weight": torch.ones(2, 2), "lora_te2_q.alpha": torch.ones(())}
    assert same(load(more, model, tmp_path, ignore_text_encoder=True), alone)


def test_places_without_a_lora_are_named(tmp_path):
    model, key_mapping = KINDS["flux2"].make_pair()[0], KINDS["flux2"].key_mapping
    with pytest.raises(ClvrError, match="no such file or directory"):
        load_lora(tmp_path / "absent", key_mapping, model)
    with pytest.raises(ClvrError, match=f"contains neither {FILE_NAME} nor exactly one safetensors file; it has none"):
        load_lora(tmp_path, key_mapping, model)
    (tmp_path / "x.safetensors").write_bytes(b"torn")
    with pytest.raises(ClvrError, match="not a complete safetensors file"):
        load_lora(tmp_path, key_mapping, model)


def test_a_tree_of_another_model_is_not_saved(tmp_path):
    model, key_mapping = KINDS["flux2"].make_pair()[0], KINDS["flux2"].key_mapping
    wide = {"x_embedder": {"kernel": jnp.ones((99, 4))}}
    with pytest.raises(ClvrError, match=r"1 do not fit: x_embedder\.kernel \(99, 2\).*the model's kernel: \(12, 48\)"):
        save_lora(tmp_path, init_lora(wide, ["x"], 2, 2, jax.random.key(0)), key_mapping, model)
    with pytest.raises(ClvrError, match="the model's kernel: None"):
        save_lora(tmp_path, init_lora({"x": wide}, ["x"], 2, 2, jax.random.key(0)), key_mapping, model)
    with pytest.raises(ClvrError, match="nothing to write"):
        save_lora(tmp_path, {}, key_mapping, model)
    assert list(tmp_path.iterdir()) == []
