"""Collectives of compiled programs: their bytes, their axes, and how often the loops around them run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clvr_jax.cost_model.hardware import parse_topology, planning_devices
from clvr_jax.cost_model.hlo import collectives, merged, sent_by_axis
from clvr_jax.errors import ClvrError

P = PartitionSpec
LAYERS, WIDTH = 6, 256


def cpu_mesh(**axes):
    return Mesh(np.array(jax.devices("cpu")[:8]).reshape(tuple(axes.values())), tuple(axes))


def text_of(mesh, function, in_specs, out_specs, *inputs):
    mapped = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return jax.jit(mapped).lower(*inputs).compile().as_text()


def array(*shape, dtype=jnp.float32, sharding=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def test_psum_of_known_bytes():
    mesh = cpu_mesh(data=4, model=2)
    text = text_of(mesh, lambda x: jax.lax.psum(x, "data"), P("data"), P(), array(4 * 128, 64))
    (found,) = collectives(text, mesh.shape)
    assert (found.kind, found.dtype, found.bytes, found.devices) == ("all-reduce", "f32", 128 * 64 * 4, 4)
    assert found.axes == ("data",)
    assert found.sent == 2 * 128 * 64 * 4 * 3 / 4
    assert found.source.endswith("psum")


def test_every_kind_on_its_axis():
    mesh = cpu_mesh(data=4, model=2)

    def program(x):
        x = jax.lax.ppermute(x, "model", [(0, 1), (1, 0)])
        x = jax.lax.all_to_all(x, "data", 0, 1, tiled=True).reshape(x.shape)
        x = jax.lax.psum_scatter(x, "data", tiled=True)
        return jax.lax.all_gather(x, ("data", "model"), tiled=True)

    found = collectives(text_of(mesh, program, P("data"), P(), array(4 * 128, 64)), mesh.shape)
    size = 128 * 64 * 4
    assert [(one.kind, one.axis, one.bytes, one.devices) for one in found] == [
        ("collective-permute", "model", size, 2),
        ("all-to-all", "data", size, 4),
        ("reduce-scatter", "data", size, 4),
        ("all-gather", "data+model", 2 * size, 8),
    ]
    assert [one.sent for one in found] == [size, size * 3 / 4, size * 3 / 4, 2 * size * 7 / 8]


def test_gathers_of_scanned_layers_count_once_a_layer():
    mesh = cpu_mesh(fsdp=8)

    def program(weights, x):
        def layer(x, weight):
            return jnp.tanh(x @ jax.lax.all_gather(weight, "fsdp", tiled=True)), None

        return jax.lax.scan(layer, x, weights)[0]

    text = text_of(mesh, program, (P(None, "fsdp"), P()), P(), array(LAYERS, WIDTH, WIDTH), array(4, WIDTH))
    (found,) = collectives(text, mesh.shape)
    assert (found.times, found.bytes) == (LAYERS, WIDTH * WIDTH * 4)
    assert sent_by_axis([found]) == {"fsdp": LAYERS * WIDTH * WIDTH * 4 * 7 / 8}


def test_nested_loops_multiply():
    mesh = cpu_mesh(data=8)

    def program(x):
        def outer(x, _):
            x = jax.lax.scan(lambda x, _: (jax.lax.psum(x, "data") / 9, None), x, None, length=3)[0]
            return jax.lax.psum(jnp.sin(x), "data"), None

        return jax.lax.scan(outer, x, None, length=5)[0]

    found = collectives(text_of(mesh, program, P(), P(), array(16, 16)), mesh.shape)
    assert sorted(one.times for one in found) == [5, 15]
    assert [one.times for one in merged(found)] == [20]


def test_a_loop_that_depends_on_data_is_an_error_only_with_collectives_in_it():
    mesh = cpu_mesh(data=8)

    def until_large(step, x):
        return jax.lax.while_loop(lambda x: x.sum() < 100, step, x)

    quiet = text_of(mesh, functools.partial(until_large, lambda x: x * 2), P("data"), P("data"), array(8))
    assert collectives(quiet, mesh.shape) == []
    loud = text_of(mesh, functools.partial(until_large, lambda x: jax.lax.psum(x, "data")), P(), P(), array(8))
    with pytest.raises(ClvrError, match="trip count that depends on data"):
        collectives(loud, mesh.shape)


def test_wrong_mesh_and_no_program():
    mesh = cpu_mesh(data=8)
    text = text_of(mesh, lambda x: jax.lax.psum(x, "data"), P("data"), P(), array(8))
    with pytest.raises(ClvrError, match=r"mesh \{'data': 4\} has 4 devices; the program is for 8"):
        collectives(text, {"data": 4})
    with pytest.raises(ClvrError, match=r"mesh \{'fsdp': 2\} has 2 devices; there uses device 3"):
        collectives(_LOOP, {"fsdp": 2})
    (found,) = collectives(text)  # without a mesh: no axes, but all else
    assert (found.axes, found.devices, found.bytes) == ((), 8, 4)
    with pytest.raises(ClvrError, match="no program"):
        collectives("nothing")


# What other compilers write, cut down to what is read.
_LOOP = """\
HloModule loop
%step.1 (state: (bf16[8,16], u32[])) -> (bf16[8,16], u32[]) {
  %state = (bf16[8,16]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) parameter(0)
  %two = u32[]{:T(128)} constant(2)
  %count = u32[]{:T(128)} get-tuple-element(%state), index=1
  %next = u32[]{:T(128)} add(%count, %two)
  %x = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=0
  %there = (bf16[8,16]{1,0:T(8,128)(2,1)}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%x), channel_id=9, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}, metadata={op_name="a(b)"}
  %done = bf16[8,16]{1,0:T(8,128)(2,1)} collective-permute-done(%there)
  ROOT %out = (bf16[8,16]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) tuple(%done, %next)
}

%more.1 (state.1: (bf16[8,16], u32[])) -> pred[] {
  %eight = u32[]{:T(128)} constant(8)
  %state.1 = (bf16[8,16]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) parameter(0)
  %count.1 = u32[]{:T(128)} get-tuple-element(%state.1), index=1
  ROOT %test = pred[]{:T(512)} compare(%count.1, %eight), direction=LT
}

ENTRY %main (x.1: bf16[8,16]) -> bf16[8,16] {
  %x.1 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = u32[]{:T(128)} constant(1)
  %start = (bf16[8,16]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) tuple(%x.1, %zero)
  %while.1 = (bf16[8,16]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) while(%start), condition=%more.1, body=%step.1
  ROOT %result = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%while.1), index=0
}
"""

_TPU_KERNEL = """\
HloModule kernel
%other (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %twice = f32[8]{0} add(%p, %p)
}, execution_thread="sparsecore"

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %attention = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block_q":512}
}}, metadata={op_name="attention"}
  %beside = f32[8]{0} call(%x), to_apply=%other
  ROOT %sum = f32[8]{0} all-reduce(%attention), replica_groups=[4,2]<=[8], to_apply=%add
}
"""

_TPU_FUSIONS = """\
HloModule fusions
%begin (p: bf16[2,16]) -> (bf16[8,16], u32[]) {
  %p = bf16[2,16]{1,0} parameter(0)
  %all-gather.1 = bf16[8,16]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, \
replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}
  ROOT %custom-call.1 = (bf16[8,16]{1,0}, u32[]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p.1: bf16[2,16]) -> bf16[8,16] {
  %p.1 = bf16[2,16]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[8,16]{1,0} all-gather(%p.1), channel_id=7, \
replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}
}

%end (p.2: bf16[2,16]) -> bf16[8,16] {
  %p.2 = bf16[2,16]{1,0} parameter(0)
  %all-gather.3 = bf16[8,16]{1,0} all-gather(%p.2), channel_id=7, \
replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}
  ROOT %custom-call.2 = bf16[8,16]{1,0} custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (p.3: bf16[8,16]) -> bf16[4,16] {
  %p.3 = bf16[8,16]{1,0} parameter(0)
  %all-reduce.1 = bf16[8,16]{1,0} all-reduce(%p.3), channel_id=8, replica_groups=[4,2]<=[8], to_apply=%add
  %rank = u32[] partition-id()
  ROOT %mine = bf16[4,16]{1,0} dynamic-slice(%all-reduce.1, %rank, %rank), dynamic_slice_sizes={4,16}
}

ENTRY %main (x: bf16[2,16]) -> bf16[4,16] {
  %x = bf16[2,16]{1,0} parameter(0)
  %begun = (bf16[8,16]{1,0}, u32[]) fusion(%x), kind=kCustom, calls=%begin
  %beside = bf16[8,16]{1,0} fusion(%x), kind=kCustom, calls=%async_collective_fusion.1
  %ended = bf16[8,16]{1,0} fusion(%x), kind=kCustom, calls=%end
  ROOT %scattered = bf16[4,16]{1,0} fusion(%ended), kind=kCustom, calls=%all-reduce-scatter.1, \
metadata={op_name="gradient"}
}
"""

_GPU_ASYNC = """\
HloModule gpu
%wrapped (p: f32[8]) -> f32[2] {
  %p = f32[8]{0} parameter(0)
  ROOT %rs = f32[2]{0} reduce-scatter(%p), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, to_apply=%add
}

ENTRY %main (x: f32[8]) -> f32[2] {
  %x = f32[8]{0} parameter(0)
  %ar = (f32[8]{0}, f32[8]{0}) all-reduce-start(%x, %x), replica_groups={}, to_apply=%add
  %ar.1 = (f32[8]{0}, f32[8]{0}) all-reduce-done(%ar)
  %ag = ((f32[8]{0}, f32[4]{0}), (f32[16]{0}, f32[8]{0})) all-gather-start(%x, %x), replica_groups=[4,2]<=[8]
  %ag.1 = (f32[16]{0}, f32[8]{0}) all-gather-done(%ag)
  %start = ((f32[8]{0}), f32[2]{0}) async-start(%x), calls=%wrapped
  ROOT %done = f32[2]{0} async-done(%start), calls=%wrapped
}
"""


def test_loop_without_a_noted_trip_count_is_read_from_its_counter():
    (found,) = collectives(_LOOP, {"fsdp": 4})
    assert (found.times, found.bytes, found.axis, found.source) == (4, 8 * 16 * 2, "fsdp", "a(b)")  # 1, 3, 5, 7


def test_fusions_of_the_tpu_compiler():
    gather, scatter = collectives(_TPU_FUSIONS, {"fsdp": 4, "tensor": 2})
    assert (gather.name, gather.bytes, gather.devices, gather.axis) == ("all-gather.1", 8 * 16 * 2, 4, "fsdp")
    assert (scatter.kind, scatter.bytes, scatter.axis) == ("reduce-scatter", 8 * 16 * 2, "tensor")
    assert scatter.source == "gradient"


def test_asynchronous_pairs_count_once():
    reduce, gather, scatter = collectives(_GPU_ASYNC, {"data": 4, "tensor": 2})
    assert (reduce.kind, reduce.bytes, reduce.devices, reduce.axis) == ("all-reduce", 64, 8, "data+tensor")
    assert (gather.kind, gather.bytes, gather.axis) == ("all-gather", 96, "tensor")
    assert (scatter.kind, scatter.bytes, scatter.axis) == ("reduce-scatter", 32, "data")


@pytest.mark.parametrize(
    ("written", "axis"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", "b+c"),
        ("{}", "a+b+c"),
        ("[2,4]<=[8]", "b+c"),
        ("[4,2]<=[2,4]T(1,0)", "a"),
        ("mesh['x'=4,'y'=2] {'x'}", "a+b"),
        ("mesh['x'=4,'y'=2] {'x','y'}", "a+b+c"),
        ("mesh['x'=4,'y'=1,'z'=2], device_ids=([2,4]T(1,0)) {'x'}", "b+c"),
        ("mesh['x'=2,'y'=4], device_ids=(0,2,4,6,1,3,5,7) {'x'}", "c"),
        ("mesh['x'=8] {'x':(1)2}", "a"),
        ("mesh['x'=8] {'x':(2)2}", "b"),
        ("mesh['x'=8] {'x':(4)2}", "c"),
    ],
)
def test_ways_to_write_groups(written, axis):
    text = f"""\
ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %sum = f32[8]{{0}} all-reduce(%x), channel_id=1, replica_groups={written}, to_apply=%add
}}
"""
    (found,) = collectives(text, {"a": 2, "b": 2, "c": 2})
    assert (found.axis, found.devices) == (axis, 2 ** len(found.axes))


@pytest.mark.slow
def test_training_step_compiled_for_tpu():
    """Layers cut along fsdp and tensor: weights are gathered forward and backward, gradients scattered, all by XLA."""
    pytest.importorskip("libtpu", reason="libtpu is not installed")
    devices = planning_devices(parse_topology("v5e:2x2"))
    mesh = Mesh(np.array(devices).reshape(2, 2), ("fsdp", "tensor"))

    def laid_out(*spec):
        return NamedSharding(mesh, P(*spec))

    def loss(weights, x_btd):
        def layer(x_btd, weights):
            into, out = weights
            return jax.lax.with_sharding_constraint(x_btd + jax.nn.relu(x_btd @ into) @ out, laid_out("fsdp")), None

        return jnp.mean(jnp.square(jax.lax.scan(jax.checkpoint(layer), x_btd, weights)[0].astype(jnp.float32)))

    width, wide = 512, 2048
    weights = (
        array(LAYERS, width, wide, dtype=jnp.bfloat16, sharding=laid_out(None, "fsdp", "tensor")),
        array(LAYERS, wide, width, dtype=jnp.bfloat16, sharding=laid_out(None, "tensor", "fsdp")),
    )
    x_btd = array(4, 256, width, dtype=jnp.bfloat16, sharding=laid_out("fsdp"))
    step = jax.jit(jax.grad(loss), out_shardings=jax.tree.map(lambda leaf: leaf.sharding, weights))
    compiled = step.trace(weights, x_btd).lower(lowering_platforms=("tpu",)).compile()

    sent = sent_by_axis(collectives(compiled.as_text(), mesh.shape))
    matrix, activation = width * wide * 2 // 2, 2 * 256 * width * 2  # bytes: cut along tensor; two rows of a batch
    assert sent["fsdp"] == pytest.approx(LAYERS * 2 * 3 * matrix / 2, rel=0.01)
    assert sent["tensor"] == pytest.approx(LAYERS * 2 * activation, rel=0.01)


def test_attributes_of_a_kernel_and_computations_of_another_core_end_where_they_end():
    [found] = collectives(_TPU_KERNEL, {"data": 4, "fsdp": 2})
    assert (found.name, found.axes, found.bytes) == ("sum", ("fsdp",), 32)
