"""Merges whose aligned model is a LoRA or another adapter."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from clvr_jax.convert.lora.files import FILE_NAME, Factors
from clvr_jax.convert.lora.writing import write_factors
from clvr_jax.convert.streaming.conversion import convert
from clvr_jax.convert.streaming.planning import plan as plan_conversion
from clvr_jax.merging.methods import Settings
from clvr_jax.merging.planning import plan_merge
from clvr_jax.merging.streaming import merge
from tests.merging.small_models import sha256, tensors_of, three_models
from tests.merging.test_deltas import ulps


def lora(folder, shapes, rank=3, alpha=6.0):
    random = np.random.default_rng(5)
    factors = {
        module: Factors(
            (0.05 * random.normal(size=(rank, shape[1]))).astype(np.float32),
            (0.05 * random.normal(size=(shape[0], rank))).astype(np.float32),
            alpha / rank,
        )
        for module, shape in shapes.items()
    }
    write_factors(folder, factors, "transformer")
    return factors


@pytest.mark.parametrize("layout", ["torch", "jax"])
@pytest.mark.parametrize("as_file", [False, True])
def test_a_lora_is_added_as_its_product(tmp_path, layout, as_file):
    base, distill, _ = three_models(tmp_path, ("bfloat16", "bfloat16", "float32"))
    origin, tuned_to = tensors_of(base), tensors_of(distill)
    modules = [key.removesuffix(".weight") for key in origin if ".attn.to_" in key]
    factors = lora(tmp_path / "lora", {module: origin[f"{module}.weight"].shape for module in modules})
    align = tmp_path / "lora" / FILE_NAME if as_file else tmp_path / "lora"
    if layout == "jax":
        for path in (base, distill):
            convert(plan_conversion(path, "jax"), tmp_path / "jax" / path.name)
        base, distill = tmp_path / "jax" / "base", tmp_path / "jax" / "distill"
    plan = plan_merge(base, distill, align, Settings(align_weight=0.5))
    sums = merge(plan, tmp_path / "out")
    if layout == "jax":
        convert(plan_conversion(tmp_path / "out", "torch"), tmp_path / "torch")
    for key, ours in tensors_of(tmp_path / ("torch" if layout == "jax" else "out")).items():
        b, exact = origin[key].astype(np.float64), tuned_to[key].astype(np.float64)
        module = key.removesuffix(".weight")
        if module in factors:
            pair = factors[module]
            exact = exact + 0.5 * pair.scale * pair.up.astype(np.float64) @ pair.down
        assert ulps(ours, exact, b) <= 1, key
        assert (sums[key].align > 0) == (module in factors)
    assert plan.align.digests.finish() == sha256(tmp_path / "lora")


@pytest.mark.parametrize("layout", ["torch", "jax"])
def test_dora_of_a_kronecker_product_is_added_as_its_difference_to_the_base(tmp_path, layout):
    base, distill, _ = three_models(tmp_path)
    origin, tuned_to = tensors_of(base), tensors_of(distill)
    key = next(key for key in origin if key.endswith(".attn.to_q.weight"))
    weight = origin[key].astype(np.float64)
    random = np.random.default_rng(1)
    one, other = random.normal(size=(2, 4)) / 9, random.normal(size=(len(weight) // 2, weight.shape[1] // 4)) / 9
    magnitude = 1 + random.random(len(weight))
    name = "lycoris_" + key.removesuffix(".weight").replace(".", "_")
    parts = {"lokr_w1": one, "lokr_w2": other, "dora_scale": magnitude[:, None]}
    save_file(
        {f"{name}.{part}": torch.tensor(x, dtype=torch.float32) for part, x in parts.items()},
        tmp_path / "a.safetensors",
    )
    if layout == "jax":
        for path in (base, distill):
            convert(plan_conversion(path, "jax"), tmp_path / "jax" / path.name)
        base, distill = tmp_path / "jax" / "base", tmp_path / "jax" / "distill"
    merge(
        plan_merge(base, distill, tmp_path / "a.safetensors", Settings(align_weight=0.5), force=True), tmp_path / "out"
    )
    if layout == "jax":
        convert(plan_conversion(tmp_path / "out", "torch"), tmp_path / "torch")
    found = tensors_of(tmp_path / ("torch" if layout == "jax" else "out"))
    adapted = weight + np.kron(one, other)
    adapted *= magnitude[:, None] / np.linalg.norm(adapted, axis=1, keepdims=True)
    np.testing.assert_allclose(found[key], tuned_to[key] + 0.5 * (adapted - weight), atol=1e-5)
    assert all(np.allclose(found[other], tuned_to[other], atol=1e-6) for other in found if other != key)
