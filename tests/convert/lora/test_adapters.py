"""LoHa, LoKr, DoRA, core tensors, PiSSA and OLoRA against the merges of PEFT and the arithmetic of LyCORIS."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from lycoris.modules import LoConModule, LohaModule, LokrModule
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import clvr_jax as clvr
from clvr_jax.convert.architectures import FLUX2_TRANSFORMER
from clvr_jax.convert.lora.names import key_aliases
from clvr_jax.convert.lora.trees import adapters_by_path, delta_slice, load_lora, save_lora
from clvr_jax.convert.models import load_model, save_model
from clvr_jax.convert.rules import entries
from clvr_jax.errors import ClvrError
from clvr_jax.models.common.adapters import KernelAdapter, is_adapter
from clvr_jax.trees import leaves_by_path
from tests.convert.lora.models import KINDS, shapes_of

FLUX2_TARGETS = r".*(to_q|to_k|to_out\.0|linear_in|norm_out\.linear|to_qkv_mlp_proj)"
# Every kind of layer, and convolutions with fewer and with more inputs than outputs: each shape is a program.
UNET_TARGETS = r"(down_blocks|up_blocks\.0\.resnets\.0)\..*(to_q|to_k|to_out\.0|proj_in|conv1|conv_shortcut)"
TARGETS = {"flux2": FLUX2_TARGETS, "sd15": UNET_TARGETS}
BOUND = 1e-5


@pytest.fixture(params=["flux2", "sd15"])
def kind(request):
    return KINDS[request.param]


def targets_of(kind):
    return FLUX2_TARGETS if kind.component == "transformer" else UNET_TARGETS


def filled(model, names, seed=7):
    """Random values for an adapter's parameters, strong enough that its absence would show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in names):
                noise = torch.randn(parameter.shape, generator=generator)
                is_magnitude = "magnitude" in name
                parameter.copy_(parameter * (1 + 0.2 * noise) if is_magnitude else noise / 3)


def weights(model):
    return {key: tensor.detach().numpy() for key, tensor in model.state_dict().items()}


def assert_equal(kind, state, expected, plain):
    """A state's parameters are those of PyTorch weights, of which some are not those of the base."""
    changed = 0
    for entry in entries(state, kind.key_mapping):
        ours = np.asarray(dict(leaves_by_path(state))[entry.path])
        for key, own in zip(entry.keys, entry.to_torch(ours), strict=True):
            scale = max(1.0, float(np.abs(expected[key]).max()))
            np.testing.assert_allclose(own / scale, expected[key] / scale, atol=BOUND, err_msg=key)
            changed += float(np.abs(expected[key] - plain[key]).max()) > 0.01
    assert changed > 3


def merged_by_peft(kind, config, folder, names):
    """Saves a random adapter of PEFT; returns our model, the base's weights and those that PEFT merges."""
    model, reference = kind.make_pair()
    plain = {key: tensor.copy() for key, tensor in weights(reference).items()}
    peft = get_peft_model(reference, config)
    filled(peft, names)
    peft.save_pretrained(folder)
    return model, plain, weights(peft.merge_and_unload(safe_merge=True))


CONFIGS = {
    "LoHa": lambda t: (LoHaConfig(r=3, alpha=5, target_modules=t, rank_pattern={"to_q": 2}), ["hada_"]),
    "LoHa, effective conv": lambda t: (
        LoHaConfig(r=3, alpha=5, target_modules=t, use_effective_conv2d=True),
        ["hada_"],
    ),
    "LoKr": lambda t: (LoKrConfig(r=3, alpha=5, target_modules=t, alpha_pattern={"to_k": 7}), ["lokr_"]),
    "LoKr of both": lambda t: (
        LoKrConfig(r=2, alpha=3, target_modules=t, decompose_both=True, decompose_factor=8),
        ["lokr_"],
    ),
    "LoKr, effective conv": lambda t: (
        LoKrConfig(r=2, alpha=3, target_modules=t, use_effective_conv2d=True),
        ["lokr_"],
    ),
    "LoKr with full matrices": lambda t: (LoKrConfig(r=64, alpha=16, target_modules=t), ["lokr_"]),
    "DoRA": lambda t: (
        LoraConfig(r=3, lora_alpha=5, target_modules=t, use_dora=True, alpha_pattern={"to_k": 7}),
        ["lora_"],
    ),
    "DoRA, rank-stabilized": lambda t: (
        LoraConfig(r=3, lora_alpha=5, target_modules=t, use_dora=True, use_rslora=True),
        ["lora_"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_is_what_peft_merges(kind, tmp_path, name):
    config, names = CONFIGS[name](targets_of(kind))
    model, plain, expected = merged_by_peft(kind, config, tmp_path, names)
    lora = load_lora(tmp_path, kind.key_mapping, model)
    assert any(isinstance(adapter, KernelAdapter) for adapter in leaves_by_path(lora, is_adapter).values())
    base = nnx.state(model)
    assert_equal(kind, clvr.apply_delta(base, lora), expected, plain)
    if kind is KINDS["flux2"]:  # long to compile for a UNet; each kernel's sum is jitted anyway
        assert_equal(kind, jax.jit(clvr.apply_delta)(base, lora), expected, plain)
    half = {key: plain[key] + 0.5 * (expected[key] - plain[key]) for key in plain}
    assert_equal(kind, clvr.apply_delta(base, lora, 0.5), half, plain)


@pytest.mark.parametrize("name", ["LoKr", "DoRA"])
def test_a_part_of_a_kernel_gets_its_part_of_the_delta(tmp_path, name):
    kind = KINDS["flux2"]
    model, _, _ = merged_by_peft(kind, CONFIGS[name](FLUX2_TARGETS)[0], tmp_path, CONFIGS[name](FLUX2_TARGETS)[1])
    lora = load_lora(tmp_path, kind.key_mapping, model)
    base = nnx.state(model)
    whole = leaves_by_path(clvr.apply_delta(base, lora))
    path = ("transformer_blocks", "attn", "to_q", "kernel")
    kernels = np.asarray(leaves_by_path(base)[path])
    adapters = adapters_by_path([(lora, 0.5)])[path]
    for layer, kernel in enumerate(kernels):
        index = (slice(3, 9), slice(0, 20))
        part = delta_slice(adapters, layer, index, lambda kernel=kernel: kernel)
        expected = 0.5 * (np.asarray(whole[path])[layer] - kernel)[index]
        np.testing.assert_allclose(part, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["LoKr", "DoRA"])
def test_a_model_is_read_with_its_adapter_also_as_int8(tmp_path, name):
    kind, (config, names) = KINDS["flux2"], CONFIGS[name](FLUX2_TARGETS)
    model, _, _ = merged_by_peft(kind, config, tmp_path / "lora", names)
    lora = load_lora(tmp_path / "lora", kind.key_mapping, model)
    save_model(tmp_path / "model", model, FLUX2_TRANSFORMER)
    merged = leaves_by_path(clvr.apply_delta(nnx.state(model), lora))
    read = leaves_by_path(nnx.state(load_model(tmp_path / "model", FLUX2_TRANSFORMER, loras=[(lora, 1.0)])))
    assert read.keys() == merged.keys()
    for path, leaf in read.items():
        np.testing.assert_allclose(leaf, merged[path], atol=BOUND, err_msg=str(path))
    small = load_model(tmp_path / "model", FLUX2_TRANSFORMER, loras=[(lora, 1.0)], quantize="int8")
    leaves = leaves_by_path(nnx.state(small))
    scales = [path for path in leaves if str(path[-1]) == "kernel_scale"]
    assert len(scales) > 3
    for at in scales:
        path, scale = (*at[:-1], "kernel"), np.asarray(leaves[at])[..., None, :]
        error = np.abs(np.asarray(leaves[path], np.float32) * scale - np.asarray(merged[path]))
        assert (error <= 0.5 * scale + BOUND).all(), path


# LyCORIS' arithmetic in the words of its functional module, for files in its names.


def tucker(core, a, b):
    return torch.einsum("i j ..., i p, j r -> p r ...", core, a, b)


def kron(one, other):
    return torch.kron(one.reshape(*one.shape, *[1] * (other.ndim - one.ndim)), other)


def decomposed(weight, magnitude, by_output=True):
    axes = [axis for axis in range(weight.ndim) if axis != (0 if by_output else 1)]
    norms = torch.linalg.vector_norm(weight, dim=axes, keepdim=True)
    return weight * magnitude / (norms + torch.finfo(torch.float32).eps)


GENERATOR = torch.Generator().manual_seed(1)


def random(*shape):
    return torch.randn(shape, generator=GENERATOR) / 3


def check(kind, folder, module, tensors, expected, prefix="lycoris_"):
    """A file of one module gives the expected PyTorch weight."""
    model, reference = kind.make_pair()
    name = prefix + module.replace(".", "_")
    save_file({f"{name}.{part}": tensor.contiguous() for part, tensor in tensors.items()}, folder / "x.safetensors")
    merged = clvr.apply_delta(nnx.state(model), load_lora(folder / "x.safetensors", kind.key_mapping, model))
    key = f"{module}.weight"
    entry = next(entry for entry in entries(nnx.state(model), kind.key_mapping) if key in entry.keys)
    ours = entry.to_torch(np.asarray(leaves_by_path(merged)[entry.path]))[entry.keys.index(key)]
    np.testing.assert_allclose(ours, expected(reference.state_dict()[key]).numpy(), atol=BOUND)


LINEAR = "transformer_blocks.0.attn.to_q"  # 48 x 48
CONV = "down_blocks.0.resnets.0.conv1"

LYCORIS = {
    "LoCon": (LoConModule, {}),
    "LoHa": (LohaModule, {}),
    "LoKr": (LokrModule, {"factor": 4}),
    "LoKr of both": (LokrModule, {"factor": 8, "decompose_both": True, "lora_dim": 2}),
    "LoKr with full matrices": (LokrModule, {"full_matrix": True}),
    "DoRA": (LoConModule, {"weight_decompose": True}),
    "DoRA by input": (LoConModule, {"weight_decompose": True, "wd_on_out": False}),
    "DoRA of LoHa": (LohaModule, {"weight_decompose": True}),
    "DoRA of LoKr": (LokrModule, {"weight_decompose": True, "factor": 4}),
}


@pytest.mark.parametrize("name", LYCORIS)
def test_a_linear_layer_is_what_it_is_in_lycoris(tmp_path, name):
    kind = KINDS["flux2"]
    layer = kind.make_pair()[1].get_submodule(LINEAR)
    made, options = LYCORIS[name]
    module = made("x", layer, **{"lora_dim": 3, "alpha": 5.0, **options})
    filled(module, ["lora_", "hada_", "lokr_"])
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if key.endswith("dora_scale"):
                parameter *= 1 + 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
        module.eval()
        effective = module.forward(torch.eye(layer.in_features)).T
    assert float((effective - layer.weight).abs().max()) > 0.01
    tensors = {key: tensor.detach() for key, tensor in module.custom_state_dict().items()}
    check(kind, tmp_path, LINEAR, tensors, lambda weight: effective)


@pytest.mark.parametrize(
    ("stored", "alpha", "scale"),
    [
        ({"lokr_w1": (4, 6), "lokr_w2": (12, 8)}, 999.0, 1.0),  # full matrices: alpha is ignored
        ({"lokr_w1": (4, 6), "lokr_w2_a": (12, 3), "lokr_w2_b": (3, 8)}, 6.0, 2.0),
        ({"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 6), "lokr_w2": (12, 8)}, 3.0, 1.5),
        ({"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 6), "lokr_w2_a": (12, 2), "lokr_w2_b": (2, 8)}, None, 1.0),
    ],
)
def test_lokr_has_the_scale_of_lycoris(tmp_path, stored, alpha, scale):
    tensors = {name: random(*shape) for name, shape in stored.items()}
    one, other = (
        tensors[name] if name in tensors else tensors[f"{name}_a"] @ tensors[f"{name}_b"]
        for name in ("lokr_w1", "lokr_w2")
    )
    more = {} if alpha is None else {"alpha": torch.tensor(alpha)}
    check(KINDS["flux2"], tmp_path, LINEAR, {**tensors, **more}, lambda w: w + scale * torch.kron(one, other))


@pytest.mark.slow
def test_convolutions_of_lycoris_have_core_tensors(tmp_path):
    kind = KINDS["sd15"]
    model, _ = kind.make_pair()
    outputs, inputs, *window = shapes_of(kind, model)[CONV]
    core, up, down = random(2, 2, *window), random(outputs, 2, 1, 1), random(2, inputs, 1, 1)
    tensors = {"lora_mid.weight": core, "lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(3.0)}
    delta = tucker(core, up[:, :, 0, 0].T, down[:, :, 0, 0])
    check(kind, tmp_path, CONV, tensors, lambda w: w + 1.5 * delta, "lora_unet_")
    parts = [random(*shape) for _ in range(2) for shape in ((2, 2, *window), (2, outputs), (2, inputs))]
    names = ("hada_t1", "hada_w1_a", "hada_w1_b", "hada_t2", "hada_w2_a", "hada_w2_b")
    delta = tucker(*parts[:3]) * tucker(*parts[3:])
    check(kind, tmp_path, CONV, dict(zip(names, parts, strict=True)), lambda w: w + delta, "lora_unet_")
    one, core, a, b = random(2, 4), random(3, 3, *window), random(3, outputs // 2), random(3, inputs // 4)
    tensors = {"lokr_w1": one, "lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(6.0)}
    check(kind, tmp_path, CONV, tensors, lambda w: w + 2 * kron(one, tucker(core, a, b)), "lora_unet_")
    full = random(outputs // 2, inputs // 4, *window)
    check(kind, tmp_path, CONV, {"lokr_w1": one, "lokr_w2": full}, lambda w: w + kron(one, full), "lora_unet_")


@pytest.mark.parametrize("by_output", [True, False])
@pytest.mark.parametrize("module", [LINEAR, CONV])
def test_dora_of_lycoris_has_a_magnitude_for_each_output_or_input(tmp_path, module, by_output):
    kind = KINDS["flux2" if module == LINEAR else "sd15"]
    outputs, inputs, *window = shapes_of(kind, kind.make_pair()[0])[module]
    ones = [1] * len(window)
    magnitude = 1 + random(outputs, 1, *ones).abs() if by_output else 1 + random(1, inputs, *ones).abs()
    down, up = random(2, inputs, *window), random(outputs, 2, *ones)
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.0), "dora_scale": magnitude}
    delta = 0.5 * (up.reshape(outputs, 2) @ down.reshape(2, -1)).reshape(outputs, inputs, *window)
    check(kind, tmp_path, module, tensors, lambda w: decomposed(w + delta, magnitude, by_output))
    one, other = random(2, 4), random(outputs // 2, inputs // 4, *window)
    tensors = {"lokr_w1": one, "lokr_w2": other, "dora_scale": magnitude}
    check(kind, tmp_path, module, tensors, lambda w: decomposed(w + kron(one, other), magnitude, by_output))


def test_adapters_of_fused_weights_are_divided_by_rows(tmp_path):
    """Weights that BFL's code fuses, and the one whose halves it exchanges."""
    kind = KINDS["flux2"]
    model, reference = kind.make_pair()
    shapes, state = shapes_of(kind, model), reference.state_dict()
    fused = {name: alias for name, alias in key_aliases(shapes).items() if len(alias.modules) == 3}
    name, alias = next(iter(fused.items()))
    weight = torch.cat([state[f"{module}.weight"] for module in alias.modules])
    one, other = random(6, 4), random(len(weight) // 6, weight.shape[1] // 4)
    magnitude = 1 + random(len(weight), 1).abs()
    rows = decomposed(weight + torch.kron(one, other), magnitude)
    tensors = {f"{name}.lokr_w1": one, f"{name}.lokr_w2": other, f"{name}.dora_scale": magnitude}
    last = next(name for name, alias in key_aliases(shapes).items() if alias.swapped)
    swapped = torch.cat(state["norm_out.linear.weight"].chunk(2)[::-1])
    halves = random(2, 4), random(len(swapped) // 2, swapped.shape[1] // 4)
    of_last = 1 + random(len(swapped), 1).abs()
    expected = torch.cat(decomposed(swapped + torch.kron(*halves), of_last).chunk(2)[::-1])
    tensors |= {f"{last}.lokr_w1": halves[0], f"{last}.lokr_w2": halves[1], f"{last}.dora_scale": of_last}
    save_file(tensors, tmp_path / "x.safetensors")
    merged = clvr.apply_delta(nnx.state(model), load_lora(tmp_path, kind.key_mapping, model))
    ours = {}
    for entry in entries(merged, kind.key_mapping):
        leaf = np.asarray(leaves_by_path(merged)[entry.path])
        ours |= dict(zip(entry.keys, entry.to_torch(leaf), strict=True))
    for module, own in zip(alias.modules, rows.chunk(3), strict=True):
        np.testing.assert_allclose(ours[f"{module}.weight"], own.numpy(), atol=BOUND)
    np.testing.assert_allclose(ours["norm_out.linear.weight"], expected.numpy(), atol=BOUND)
    save_file({**tensors, f"{name}.dora_scale": random(1, weight.shape[1])}, tmp_path / "x.safetensors")
    with pytest.raises(ClvrError, match="one DoRA magnitude for each input of a weight that is 3 weights"):
        load_lora(tmp_path, kind.key_mapping, model)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_began_as_a_part_of_the_base_is_read_as_the_difference(tmp_path, start):
    kind = KINDS["flux2"]
    model, reference = kind.make_pair()
    plain = {key: tensor.copy() for key, tensor in weights(reference).items()}
    config = LoraConfig(r=3, lora_alpha=5, target_modules=FLUX2_TARGETS, init_lora_weights=start)
    peft = get_peft_model(reference, config)
    peft.peft_config["default"].init_lora_weights = True  # as PEFT's documentation says
    peft.save_pretrained(tmp_path / f"{start}_init")
    peft.peft_config["default"].init_lora_weights = start
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    peft.save_pretrained(tmp_path / "trained")
    peft.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / f"{start}_init")
    )
    assert json.loads((tmp_path / "trained" / "adapter_config.json").read_text())["init_lora_weights"] == start
    expected = weights(peft.merge_and_unload())
    base = nnx.state(model)
    for folder in ("trained", "converted"):
        lora = load_lora(tmp_path / folder, kind.key_mapping, model)
        assert_equal(kind, clvr.apply_delta(base, lora), expected, plain)
    (tmp_path / f"{start}_init").rename(tmp_path / "elsewhere")
    with pytest.raises(ClvrError, match=rf"init_lora_weights '{start}'.*path_initial_model.*{start}_init$") as caught:
        load_lora(tmp_path / "trained", kind.key_mapping, model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lokr_w1": (2, 2)}, "1 incomplete"),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (24, 2)}, "2 incomplete"),
        ({"lokr_w1": (2, 2), "lokr_w2": (24, 25)}, r"of another shape: .*lokr_w2 \(24, 25\) \(the model's weight"),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (24, 2), "lokr_w2_b": (3, 24)}, "of another shape"),
        ({"lokr_w1": (2, 2), "lokr_w2": (0, 24)}, "of another shape"),
        ({"hada_w1_a": (48, 2), "hada_w1_b": (2, 48), "hada_w2_a": (48, 2)}, "3 incomplete"),
        ({"hada_w1_a": (48, 2), "hada_w1_b": (2, 48), "hada_w2_a": (2, 2), "hada_w2_b": (2, 48)}, "another shape"),
        ({"lora_down.weight": (2, 48), "lora_up.weight": (48, 2), "dora_scale": (47, 1)}, r"48 outputs or 48 inputs"),
        ({"dora_scale": (48, 1)}, "1 incomplete"),
        ({"lokr_w3": (2, 2)}, "1 unknown"),
        ({"oft_blocks": (2, 2)}, "1 unknown"),
    ],
)
def test_incomplete_and_misshapen_adapters_are_refused(tmp_path, tensors, message):
    kind = KINDS["flux2"]
    model, _ = kind.make_pair()
    name = "lycoris_" + LINEAR.replace(".", "_")
    save_file({f"{name}.{part}": torch.ones(shape) for part, shape in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ClvrError, match=message) as caught:
        load_lora(tmp_path, kind.key_mapping, model)
    assert "\n" not in str(caught.value)


def test_an_adapter_without_its_magnitudes_and_one_that_cannot_be_written_are_refused(tmp_path):
    kind = KINDS["flux2"]
    model, _, _ = merged_by_peft(kind, CONFIGS["DoRA"](FLUX2_TARGETS)[0], tmp_path, ["lora_"])
    file = tmp_path / "adapter_model.safetensors"
    with pytest.raises(ClvrError, match="only a plain LoRA can be written"):
        save_lora(tmp_path / "out", load_lora(tmp_path, kind.key_mapping, model), kind.key_mapping, model)
    save_file({key: tensor for key, tensor in load_file(file).items() if "magnitude" not in key}, file)
    with pytest.raises(ClvrError, match="use_dora is true, but the file has no lora_magnitude_vector"):
        load_lora(tmp_path, kind.key_mapping, model)


def test_dtypes_are_kept_or_chosen(tmp_path):
    kind = KINDS["flux2"]
    model, _, _ = merged_by_peft(kind, CONFIGS["LoHa"](FLUX2_TARGETS)[0], tmp_path, ["hada_"])
    lora = load_lora(tmp_path, kind.key_mapping, model, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(lora)} == {jnp.dtype(jnp.bfloat16)}
