"""The check of memory before loading: figures are those of the loaded models, and messages name what would fit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clvr_jax.cli import main
from clvr_jax.errors import ClvrError
from clvr_jax.models.common.quantization import weight_bytes
from clvr_jax.pipelines import memory
from clvr_jax.pipelines.closed_loop import ClosedLoopPipeline
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.flux2.programs import cache_references, decode
from clvr_jax.pipelines.loading import layout_of
from clvr_jax.pipelines.memory import DeviceMemory, bytes_per_device, check_memory, mesh_that_fits, needed, parts_of
from clvr_jax.pipelines.registry import SHIPPED
from clvr_jax.pipelines.working_memory import image_call, working_bytes
from clvr_jax.sharding import MeshConfig
from tests.helpers.models import small_flux2

CONTROLLER = SHIPPED / "shapes-tiny" / "controller"


@pytest.mark.parametrize("quantize", [None, "int8", {"controller": "int8"}])
def test_figures_are_the_bytes_of_the_loaded_models(quantize):
    loop = ClosedLoopPipeline.from_pretrained("shapes-tiny", "bfloat16", quantize=quantize)
    held = {
        "transformer": loop.flux.transformer,
        "text_encoder": loop.flux.text_encoder,
        "vae": loop.flux.vae,
        "controller": loop.controller._vlm.model,
    }
    parts = parts_of("shapes-tiny", {"controller": CONTROLLER, "verifier": CONTROLLER})
    assert [part.name for part in parts] == list(held)
    sizes = bytes_per_device(parts, np.dtype(jnp.bfloat16), quantize)
    assert sizes == {name: weight_bytes(nnx.state(module)) for name, module in held.items()}


def test_a_mesh_divides_what_it_shards():
    parts = parts_of("shapes-tiny")
    alone = bytes_per_device(parts, np.dtype(np.float32))
    sharded = bytes_per_device(parts, np.dtype(np.float32), None, layout_of(MeshConfig(fsdp=4, devices=4)))
    assert alone["transformer"] / 4 <= sharded["transformer"] < alone["transformer"] / 3.9


def test_with_offloading_the_largest_model_counts():
    parts = parts_of("shapes-tiny", {"controller": CONTROLLER})
    sizes = bytes_per_device(parts, np.dtype(np.float32))
    assert needed(parts, sizes, False) == sum(sizes.values())
    assert needed(parts, sizes, True) == sizes["vae"] + max(sizes.values())
    assert needed(parts, sizes, True, is_host=True) == sum(sizes.values()) + max(sizes.values())


def test_the_message_names_what_would_fit():
    parts = parts_of("shapes-tiny", {"controller": CONTROLLER})
    total = needed(parts, bytes_per_device(parts, np.dtype(np.float32)), False)

    def check(free, is_host=False, offload=None, count=1):
        check_memory(parts, "float32", None, None, offload, DeviceMemory(int(free), is_host, count))

    check(total)
    message = (
        r"transformer \S+ MiB \+ text_encoder .* \+ vae .* \+ controller .* in float32 need .* which has .* free; "
    )
    with pytest.raises(ClvrError, match=message + r"what would fit: --dtype bfloat16 \(.*\) or --quantize int8 \(.*\)"):
        check(0.6 * total)
    with pytest.raises(ClvrError, match=r"fit: --dtype bfloat16 --quantize int8 --offload components \("):
        check(0.2 * total)
    with pytest.raises(ClvrError, match=r"fit: --mesh\.fsdp 8 \("):
        check(0.2 * total, count=jax.device_count())
    for free, is_host in ((1000, False), (0.2 * total, True)):  # a CPU has no second memory
        with pytest.raises(ClvrError, match="no dtype, quantization or offloading would make it fit"):
            check(free, is_host)
    with pytest.raises(ClvrError, match=r"\+ a copy of the largest in float32 need .* or no --offload \("):
        check(total, is_host=True, offload="components")


def test_a_call_needs_at_least_the_bound_and_not_much_more():
    """The bound beside the temporaries of the compiled programs, for an image with two references."""
    pipe = Flux2Pipeline.from_pretrained("shapes-tiny")
    call = image_call("shapes-tiny", (64, 64), [(64, 64), (64, 64)])
    assert call.tokens == min(pipe.settings.text_buckets) + 3 * (64 // pipe.vae.config.token_pixels) ** 2
    graphdef, state = nnx.split(pipe.vae)
    side = 64 // pipe.vae.config.token_pixels
    latents = jax.ShapeDtypeStruct((1, side, side, pipe.vae.config.token_channels), jnp.float32)
    compiled = jax.jit(decode, static_argnums=0).lower(graphdef, state, latents).compile()
    bound = working_bytes(call._replace(transformer=None), np.dtype(np.float32))
    assert 0.2 * compiled.memory_analysis().temp_size_in_bytes < bound < compiled.memory_analysis().temp_size_in_bytes


def test_images_that_do_not_fit_beside_the_weights_are_named():
    parts = parts_of("shapes-tiny")
    weights = needed(parts, bytes_per_device(parts, np.dtype(np.float32)), False)
    small, large = (image_call("shapes-tiny", (side, side)) for side in (64, 2048))
    check_memory(parts, "float32", None, None, None, DeviceMemory(2 * weights, False), small)
    message = r"an image of 2048 x 2048 does not fit: .* and the image at least .* more; choose a smaller --size; "
    with pytest.raises(ClvrError, match=message):
        check_memory(parts, "float32", None, None, None, DeviceMemory(2 * weights, False), large)
    sharded = layout_of(MeshConfig(fsdp=1, sequence=4, devices=4))
    only_tokens = large._replace(height=16, width=16)
    alone, divided = (working_bytes(only_tokens, np.dtype(np.float32), layout) for layout in (None, sharded))
    assert divided == alone // 4


def test_the_bound_counts_cached_references(tmp_path):
    """The cache of the bound is that of the pipeline, of which each device has its heads."""
    path = tmp_path / "model"
    small_flux2("shapes-tiny").save_pretrained(str(path))
    plain = image_call(str(path), (64, 64), [(64, 64), (32, 64)])
    settings = json.loads((path / "clvr.json").read_text())
    settings["flux2"]["reference_cache"] = "image"
    (path / "clvr.json").write_text(json.dumps(settings))
    call = image_call(str(path), (64, 64), [(64, 64), (32, 64)])
    assert (call.tokens + call.cached_tokens, plain.cached_tokens) == (plain.tokens, 0)
    pipe = Flux2Pipeline.from_pretrained(str(path))
    channels = pipe.transformer.config.in_channels
    grids = tuple((side // pipe.vae.config.token_pixels, 64 // pipe.vae.config.token_pixels) for side in (64, 32))
    tokens = jax.ShapeDtypeStruct((1, call.cached_tokens, channels), jnp.float32)
    cache = jax.eval_shape(lambda tokens: cache_references(*nnx.split(pipe.transformer), tokens, grids), tokens)
    elements = sum(leaf.size for leaf in jax.tree.leaves(cache))
    denoised = working_bytes(call._replace(height=16, width=16), np.dtype(np.float32))
    without = working_bytes(call._replace(height=16, width=16, cached_tokens=0), np.dtype(np.float32))
    assert denoised - without == 4 * elements
    layout = layout_of(MeshConfig(fsdp=1, tensor=4, devices=4))
    sharded = working_bytes(call._replace(height=16, width=16), np.dtype(np.float32), layout)
    assert sharded - without == elements
    arguments = (0, (), True)
    cache = jax.eval_shape(
        lambda tokens: cache_references(*nnx.split(pipe.transformer), tokens, grids, *arguments), tokens
    )
    small = image_call(str(path), (64, 64), [(64, 64), (32, 64)], reference_cache_dtype="int8")
    quantized = working_bytes(small._replace(height=16, width=16), np.dtype(np.float32))
    assert quantized - without == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


@pytest.mark.parametrize("command", ["sample", "generate"])
def test_commands_say_it_before_they_load(command, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(memory, "device_memory", lambda layout=None: DeviceMemory(1_000_000, is_host=True))
    monkeypatch.setattr("clvr_jax.convert.models.load_model", None)  # never reached
    out = tmp_path / "out"
    assert main([command, "a red circle", "--out", str(out.with_suffix(".png") if command == "sample" else out)]) == 1
    error = capsys.readouterr().err
    assert "the weights do not fit" in error
    assert len(error.strip().splitlines()) <= 2
    assert not list(tmp_path.iterdir())


def test_klein_4b_needs_13_gib_in_bfloat16_and_half_of_it_in_int8(tmp_path):
    """The published configuration, without weights."""
    from clvr_jax.convert.architectures import FLUX2_TRANSFORMER, FLUX2_VAE, QWEN3
    from clvr_jax.models.flux2 import AutoencoderKLFlux2Config
    from clvr_jax.pipelines.flux2 import KLEIN

    transformer, encoder = KLEIN["klein-4b"]
    for name, family, config in (
        ("transformer", FLUX2_TRANSFORMER, transformer),
        ("text_encoder", QWEN3, encoder),
        ("vae", FLUX2_VAE, AutoencoderKLFlux2Config()),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(family.config_to_dict(config)))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "Flux2KleinPipeline"}))
    sizes = bytes_per_device(parts_of(str(tmp_path)), np.dtype(jnp.bfloat16))
    assert abs(sizes["transformer"] / 2 / 3.876e9 - 1) < 1e-3
    assert 13.0 < sum(sizes.values()) / 2**30 < 13.4
    quantized = bytes_per_device(parts_of(str(tmp_path)), np.dtype(jnp.bfloat16), "int8")
    for name in ("transformer", "text_encoder"):
        assert quantized[name] < 0.51 * sizes[name]


def test_models_that_do_not_fit_one_device_get_a_mesh_of_all():
    """Its 4 heads allow a tensor axis of 4; the rest is fsdp."""
    parts = parts_of("shapes-tiny", {"controller": CONTROLLER})
    call = image_call("shapes-tiny")
    weights = needed(parts, bytes_per_device(parts, np.dtype(np.float32)), False)
    working = working_bytes(call, np.dtype(np.float32))

    def chosen(free, count=8, is_host=False):
        device = DeviceMemory(int(free), is_host, count)
        mesh = mesh_that_fits(parts, "float32", None, None, device, call)
        if mesh is not None:
            check_memory(parts, "float32", None, layout_of(mesh), None, device, call)
        return mesh

    assert chosen(weights + working) is None
    assert chosen(0.4 * weights + working) == MeshConfig(fsdp=2, tensor=4)
    assert chosen(0.01 * weights) is None
    assert chosen(0.4 * weights + working, count=1) is None
    assert chosen(0.4 * weights + working, is_host=True) is None  # virtual devices share the memory
